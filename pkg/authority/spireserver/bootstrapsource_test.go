package spireserver_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
)

func asPEM(r *root) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.cert.Raw})
}

func TestBundleSocket(t *testing.T) {
	r := newRoot()
	dir, err := os.MkdirTemp("", "sn-") //nolint:usetesting // t.TempDir is too long for a socket
	must(err)
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "bundle.sock")
	lis, err := new(net.ListenConfig).Listen(t.Context(), "unix", socket)
	must(err)
	var query url.Values
	srv := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		query = req.URL.Query()
		switch req.URL.Path {
		case "/ok":
			_, _ = w.Write(asPEM(r))
		case "/away":
			http.Redirect(w, req, "http://elsewhere/ok", http.StatusFound)
		default:
			http.NotFound(w, req)
		}
	}))
	_ = srv.Listener.Close()
	srv.Listener = lis
	srv.Start()
	defer srv.Close()
	b, err := spireserver.BundleSocket(socket, "http://bundles/ok?of=mine", "pem")(t.Context(), td)
	if err != nil || len(b.X509Authorities()) != 1 {
		t.Fatal(err)
	}
	if query.Get("of") != "mine" || query.Get("spiffe-trust-domain") != td.Name() || query.Get("spire-attest-mode") != "bootstrap" {
		t.Errorf("query %v", query)
	}
	for address, want := range map[string]string{
		"http://bundles/no":   "404",
		"http://bundles/away": "redirected",
		"ftp://bundles/ok":    "not an http or https URL",
		"http:":               "not an http or https URL",
	} {
		if _, err := spireserver.BundleSocket(socket, address, "pem")(t.Context(), td); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", address, err, want)
		}
	}
	if _, err := spireserver.BundleSocket(socket+"x", "http://bundles/ok", "pem")(t.Context(), td); err == nil {
		t.Error("nobody listens")
	}
}

func TestBundleWorkloadAPI(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	w := &workloadAPI{root: newRoot(), id: spiffeid.RequireFromPath(td, "/x"), key: key}
	path := serveWorkloadAPI(t, w)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	b, err := spireserver.BundleWorkloadAPI(path)(ctx, td)
	if err != nil || len(b.X509Authorities()) != 1 || !b.X509Authorities()[0].Equal(w.root.cert) {
		t.Fatalf("%v", err)
	}
	other := spiffeid.RequireTrustDomainFromString("other.example")
	if _, err := spireserver.BundleWorkloadAPI(path)(ctx, other); err == nil || !strings.Contains(err.Error(), "no trust bundle of other.example") {
		t.Errorf("another trust domain: %v", err)
	}
}

// clusterPod is a pod's service account and the API server that it leads to.
func clusterPod(t *testing.T, answer http.HandlerFunc) (account string, getenv func(string) string) {
	t.Helper()
	srv := httptest.NewTLSServer(answer)
	t.Cleanup(srv.Close)
	account = t.TempDir()
	must(os.WriteFile(filepath.Join(account, "token"), []byte("the-token\n"), 0o600))
	must(os.WriteFile(filepath.Join(account, "ca.crt"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600))
	u, err := url.Parse(srv.URL)
	must(err)
	return account, func(name string) string {
		return map[string]string{"KUBERNETES_SERVICE_HOST": u.Hostname(), "KUBERNETES_SERVICE_PORT": u.Port()}[name]
	}
}

func TestBundleConfigMap(t *testing.T) {
	r := newRoot()
	account, getenv := clusterPod(t, func(w http.ResponseWriter, req *http.Request) {
		if req.Header.Get("Authorization") != "Bearer the-token" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		switch req.URL.Path {
		case "/api/v1/namespaces/spire/configmaps/spire-bundle":
			must(json.NewEncoder(w).Encode(map[string]any{
				"data": map[string]string{"bundle.crt": string(asPEM(r)), "empty": ""}, "binaryData": map[string][]byte{"binary": asPEM(r)},
			}))
		case "/api/v1/namespaces/spire/configmaps/secret":
			w.WriteHeader(http.StatusForbidden)
		case "/api/v1/namespaces/spire/configmaps/moved":
			http.Redirect(w, req, "https://elsewhere.invalid/", http.StatusFound)
		case "/api/v1/namespaces/spire/configmaps/big":
			_, _ = w.Write(make([]byte, 5<<20))
		case "/api/v1/namespaces/spire/configmaps/odd":
			_, _ = w.Write([]byte("[]"))
		default:
			http.NotFound(w, req)
		}
	})
	for name, tc := range map[string]struct {
		name, key, want string // want empty = success
	}{
		"text":       {"spire-bundle", "bundle.crt", ""},
		"binary":     {"spire-bundle", "binary", ""},
		"no key":     {"spire-bundle", "other", "it has no key other"},
		"empty":      {"spire-bundle", "empty", "no X.509 authority"},
		"none":       {"other", "bundle.crt", "404"},
		"forbidden":  {"secret", "bundle.crt", "let this service account get it"},
		"moved":      {"moved", "bundle.crt", "302"},
		"big":        {"big", "bundle.crt", "larger than"},
		"odd answer": {"odd", "bundle.crt", "no ConfigMap"},
		"odd name":   {"../../secrets/x", "bundle.crt", "no names of Kubernetes"},
	} {
		b, err := spireserver.BundleConfigMapOf(spireserver.ConfigMap{Namespace: "spire", Name: tc.name, Key: tc.key}, "pem", account, getenv)(t.Context(), td)
		switch {
		case tc.want == "" && (err != nil || len(b.X509Authorities()) != 1):
			t.Errorf("%s: %v", name, err)
		case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
		if err != nil && strings.Contains(err.Error(), "the-token") {
			t.Errorf("%s: the token is in the error", name)
		}
	}
	from := spireserver.ConfigMap{Namespace: "spire", Name: "spire-bundle", Key: "bundle.crt"}
	nowhere := func(string) string { return "" }
	if _, err := spireserver.BundleConfigMapOf(from, "pem", account, nowhere)(t.Context(), td); err == nil || !strings.Contains(err.Error(), "no pod of a cluster") {
		t.Errorf("outside of a cluster: %v", err)
	}
	must(os.WriteFile(filepath.Join(account, "ca.crt"), asPEM(newRoot()), 0o600))
	if _, err := spireserver.BundleConfigMapOf(from, "pem", account, getenv)(t.Context(), td); err == nil || !strings.Contains(err.Error(), "certificate") {
		t.Errorf("an API server of another CA: %v", err)
	}
}

func FuzzConfigMap(f *testing.F) {
	f.Add([]byte(`{"data":{"k":"v"}}`), "k")
	f.Add([]byte(`{"binaryData":{"k":"AA=="}}`), "k")
	f.Add([]byte(`{"data":null}`), "")
	f.Fuzz(func(_ *testing.T, body []byte, key string) {
		_, _ = spireserver.ConfigMapKey(body, key)
	})
}

func FuzzX509POPChallenge(f *testing.F) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	ask, _ := challenge(key.Public())
	f.Add(ask)
	f.Add([]byte(`{"ecdsa_signature":{"nonce":"AAAA"}}`))
	f.Add([]byte(`null`))
	f.Fuzz(func(t *testing.T, ask []byte) {
		answer, err := spireserver.POPAnswer(key, ask)
		if (err == nil) != json.Valid(answer) {
			t.Fatal("neither or both of answer and error")
		}
	})
}
