package kubereview_test

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

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/internal/inspecttls"
	"github.com/spiffe-node/spiffe-node/internal/inspecttls/kubereview"
)

// api answers every review with the same status and remembers what was asked.
type api struct {
	path, body string
	code       int
	status     string
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	data, _ := io.ReadAll(r.Body)
	a.path, a.body = r.URL.Path, string(data)
	w.Header().Set("Content-Type", "application/json")
	if a.code != 0 {
		w.WriteHeader(a.code)
	}
	_, _ = io.WriteString(w, a.status)
}

func open(t *testing.T, a *api) *kubereview.Reviewer {
	t.Helper()
	server := httptest.NewServer(a)
	t.Cleanup(server.Close)
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := `{"apiVersion":"v1","kind":"Config","current-context":"t","clusters":[{"name":"t","cluster":{"server":"` + server.URL + `"}}],"contexts":[{"name":"t","context":{"cluster":"t"}}]}`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := kubereview.New(path, "test")
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestToken(t *testing.T) {
	const good = `"user":{"username":"u","uid":"1","groups":["g"],"extra":{"k":["v"]}}`
	for name, tc := range map[string]struct {
		status string
		code   int
		want   inspecttls.User
		bad    bool // the token's fault
		err    bool
	}{
		"good":               {status: `{"status":{"authenticated":true,"audiences":["aud"],` + good + `}}`, want: inspecttls.User{Name: "u", UID: "1", Groups: []string{"g"}, Extra: map[string][]string{"k": {"v"}}}},
		"unknown":            {status: `{"status":{"authenticated":false,"error":"expired"}}`, bad: true, err: true},
		"other audience":     {status: `{"status":{"authenticated":true,"audiences":["kubernetes"],` + good + `}}`, bad: true, err: true},
		"no audience":        {status: `{"status":{"authenticated":true,` + good + `}}`, bad: true, err: true},
		"nameless":           {status: `{"status":{"authenticated":true,"audiences":["aud"]}}`, err: true},
		"empty answer":       {status: `{}`, bad: true, err: true},
		"no answer":          {status: `x`, err: true},
		"may not be asked":   {status: `{"kind":"Status","apiVersion":"v1","status":"Failure","reason":"Forbidden","message":"no"}`, code: 403, err: true},
		"internal API error": {status: `oops`, code: 500, err: true},
	} {
		t.Run(name, func(t *testing.T) {
			a := &api{status: tc.status, code: tc.code}
			got, err := open(t, a).Token(t.Context(), "the-token", "aud")
			if (err != nil) != tc.err || errors.Is(err, inspecttls.ErrUnknownToken) != tc.bad {
				t.Errorf("error %v", err)
			}
			if err != nil && strings.Contains(err.Error(), "the-token") {
				t.Errorf("the token is in %v", err)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
			if a.path != "/apis/authentication.k8s.io/v1/tokenreviews" || !strings.Contains(a.body, `"spec":{"token":"the-token","audiences":["aud"]}`) {
				t.Errorf("%s %s", a.path, a.body)
			}
		})
	}
}

func TestAccess(t *testing.T) {
	user := inspecttls.User{Name: "u", UID: "1", Groups: []string{"g"}, Extra: map[string][]string{"k": {"v"}}}
	access := inspecttls.Access{Verb: "get", Group: "spiffe-node.io", Resource: "pods", Subresource: "inspect", Namespace: "shop", Name: "web"}
	for status, want := range map[string]bool{
		`{"status":{"allowed":true}}`:               true,
		`{"status":{"allowed":false}}`:              false,
		`{"status":{"allowed":true,"denied":true}}`: false,
		`{}`: false,
	} {
		a := &api{status: status}
		if got, err := open(t, a).Access(t.Context(), user, access); err != nil || got != want {
			t.Errorf("%s: %v, %v", status, got, err)
		}
		var sent struct{ Spec json.RawMessage }
		if err := json.Unmarshal([]byte(a.body), &sent); err != nil || a.path != "/apis/authorization.k8s.io/v1/subjectaccessreviews" {
			t.Errorf("%s: %v", a.path, err)
		}
		const spec = `{"resourceAttributes":{"namespace":"shop","verb":"get","group":"spiffe-node.io","version":"*","resource":"pods","subresource":"inspect","name":"web"},"user":"u","groups":["g"],"extra":{"k":["v"]},"uid":"1"}`
		if string(sent.Spec) != spec {
			t.Errorf("asked %s", sent.Spec)
		}
	}
	if _, err := open(t, &api{code: 403, status: "{}"}).Access(t.Context(), user, access); err == nil {
		t.Error("a refusal to answer is no answer")
	}
}

func TestNotInCluster(t *testing.T) {
	if _, err := kubereview.New("", "test"); err == nil {
		t.Skip("this test runs in a cluster")
	}
	if _, err := kubereview.New(filepath.Join(t.TempDir(), "none"), "test"); err == nil {
		t.Error("a kubeconfig that is not there is taken")
	}
}
