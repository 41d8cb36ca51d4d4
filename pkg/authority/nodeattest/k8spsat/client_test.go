package k8spsat_test

import (
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	"k8s.io/client-go/rest"

	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/k8spsat"
)

// apiServer answers as an API server does to the three questions.
func apiServer(t *testing.T) *k8spsat.Client {
	t.Helper()
	answer := func(w http.ResponseWriter, code int, body string) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_, _ = io.WriteString(w, body)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /apis/authentication.k8s.io/v1/tokenreviews", func(w http.ResponseWriter, r *http.Request) {
		var in authenticationv1.TokenReview
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			answer(w, http.StatusBadRequest, `{"kind":"Status","apiVersion":"v1","status":"Failure","code":400}`)
			return
		}
		in.APIVersion, in.Kind = "authentication.k8s.io/v1", "TokenReview"
		switch in.Spec.Token {
		case secret:
			in.Status = authenticationv1.TokenReviewStatus{
				Authenticated: true, Audiences: in.Spec.Audiences[:1],
				User: authenticationv1.UserInfo{Username: "system:serviceaccount:spiffe-node:agent", Extra: map[string]authenticationv1.ExtraValue{
					"authentication.kubernetes.io/pod-name": {"agent-x7"}, "authentication.kubernetes.io/pod-uid": {"pod-uid"},
				}},
			}
		case "half":
			in.Status = authenticationv1.TokenReviewStatus{Authenticated: true, Error: "could not tell"}
		default:
			in.Status.Error = "invalid bearer token"
		}
		in.Spec.Token = ""
		body, err := json.Marshal(in)
		if err != nil {
			t.Error(err)
		}
		answer(w, http.StatusCreated, string(body))
	})
	mux.HandleFunc("GET /api/v1/namespaces/spiffe-node/pods/agent-x7", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, `{"kind":"Pod","apiVersion":"v1","metadata":{"uid":"pod-uid","labels":{"app":"agent"}},"spec":{"serviceAccountName":"agent","nodeName":"node-1"},"status":{"hostIP":"10.0.0.7"}}`)
	})
	mux.HandleFunc("GET /api/v1/nodes/node-1", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, `{"kind":"Node","apiVersion":"v1","metadata":{"uid":"node-uid","labels":{"zone":"a"}}}`)
	})
	mux.HandleFunc("GET /api/v1/nodes/forbidden", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusForbidden, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Forbidden","code":403}`)
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusNotFound, `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"NotFound","code":404}`)
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	c, err := k8spsat.NewClient(&rest.Config{Host: s.URL, ContentConfig: rest.ContentConfig{ContentType: "application/json"}})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestClient(t *testing.T) {
	c := apiServer(t)
	got, err := attestor(t, c).Attest(t.Context(), payload("prod", secret), nil)
	if err != nil {
		t.Fatal(err)
	}
	if got.AgentID.Path() != "/spire/agent/k8s_psat/prod/node-uid" || got.Selectors.Len() != 10 {
		t.Errorf("%s with %s", got.AgentID, got.Selectors)
	}
	for _, token := range []string{"guess", "half"} {
		if _, err := attestor(t, c).Attest(t.Context(), payload("prod", token), nil); !errors.Is(err, nodeattest.ErrDenied) {
			t.Errorf("token %q: %v", token, err)
		}
	}
	if _, err := c.Pod(t.Context(), "x", "y"); !errors.Is(err, k8spsat.ErrGone) {
		t.Errorf("a pod that is not there: %v", err)
	}
	if _, err := c.Node(t.Context(), "x"); !errors.Is(err, k8spsat.ErrGone) {
		t.Errorf("a node that is not there: %v", err)
	}
	if _, err := c.Node(t.Context(), "forbidden"); err == nil || errors.Is(err, k8spsat.ErrGone) {
		t.Errorf("a node that may not be read: %v", err)
	}
}

func TestRESTConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "kubeconfig")
	err := os.WriteFile(path, []byte("apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: \"https://192.0.2.1\"}}]\ncontexts: [{name: x, context: {cluster: c}}]\ncurrent-context: x\n"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := k8spsat.RESTConfig(path)
	if err != nil || cfg.Host != "https://192.0.2.1" {
		t.Error(cfg, err)
	}
	if _, err := k8spsat.RESTConfig("/does/not/exist"); err == nil || !strings.Contains(err.Error(), "read kubeconfig") {
		t.Error(err)
	}
	if _, err := k8spsat.RESTConfig(""); err == nil || !strings.Contains(err.Error(), "name a kubeconfig file") {
		t.Error(err)
	}
}
