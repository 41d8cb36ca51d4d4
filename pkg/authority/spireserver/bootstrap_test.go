package spireserver_test

import (
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"

	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
)

func TestBootstrapSources(t *testing.T) {
	r := newRoot()
	asPEM := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: r.cert.Raw})
	b := spiffebundle.New(td)
	b.AddX509Authority(r.cert)
	asJSON, err := b.Marshal()
	must(err)
	dir := t.TempDir()
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		must(os.WriteFile(path, data, 0o600))
		return path
	}
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		switch req.URL.Path {
		case "/ok":
			_, _ = w.Write(asJSON)
		case "/plain":
			http.Redirect(w, req, "http://"+req.Host+"/ok", http.StatusFound)
		case "/loop":
			http.Redirect(w, req, "/loop", http.StatusFound)
		case "/big":
			_, _ = w.Write(make([]byte, 5<<20))
		default:
			http.NotFound(w, req)
		}
	}))
	defer srv.Close()
	defer srv.Client().CloseIdleConnections()
	fetch := func(path string) spireserver.Bootstrap {
		return spireserver.BundleURLWith(srv.Client().Transport, srv.URL+path, "spiffe")
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: []byte("x")})
	for name, tc := range map[string]struct {
		from spireserver.Bootstrap
		want string // empty = success
	}{
		"pem":               {from: spireserver.BundleFile(write("a.pem", append(asPEM, asPEM...)), "")},
		"spiffe":            {from: spireserver.BundleFile(write("a.json", asJSON), "spiffe")},
		"https":             {from: fetch("/ok")},
		"missing":           {spireserver.BundleFile(filepath.Join(dir, "no"), "pem"), "no such file"},
		"empty":             {spireserver.BundleFile(write("empty", nil), "pem"), "no X.509 authority"},
		"other format":      {spireserver.BundleFile(write("b.json", asJSON), "pem"), "no X.509 authority"},
		"a key":             {spireserver.BundleFile(write("key", key), "pem"), "PRIVATE KEY"},
		"bad format":        {spireserver.BundleFile(write("c.pem", asPEM), "der"), "none of pem, spiffe"},
		"unknown authority": {spireserver.BundleURL(srv.URL+"/ok", "spiffe"), "certificate"},
		"not https":         {spireserver.BundleURL("http://a/b", "spiffe"), "not an https URL"},
		"no host":           {spireserver.BundleURL("https:", "spiffe"), "not an https URL"},
		"404":               {fetch("/no"), "404"},
		"to http":           {fetch("/plain"), "not https"},
		"loop":              {fetch("/loop"), "redirected more than"},
		"too big":           {fetch("/big"), "larger than"},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := tc.from(t.Context(), td)
			switch {
			case tc.want == "" && (err != nil || len(b.X509Authorities()) != 1):
				t.Errorf("%v", err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("%v, want %q", err, tc.want)
			}
			if err != nil && strings.Contains(err.Error(), "MC4CAQ") {
				t.Error("content in the error")
			}
		})
	}
}

func TestNodeAttestors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "token")
	psat := spireserver.PSAT{Cluster: "demo", TokenPath: path}
	if _, err := psat.Prove(t.Context()); err == nil {
		t.Error("a missing token")
	}
	for _, token := range []string{"first", "second"} { // the kubelet renews it
		must(os.WriteFile(path, []byte(token+"\n"), 0o600))
		proof, err := psat.Prove(t.Context())
		must(err)
		data := proof.Payload
		var got map[string]string
		must(json.Unmarshal(data, &got))
		if len(got) != 2 || got["cluster"] != "demo" || got["token"] != token {
			t.Errorf("payload %s", data)
		}
		if proof, err := (spireserver.JoinToken{Path: path}).Prove(t.Context()); err != nil || string(proof.Payload) != token {
			t.Errorf("%q %v", proof.Payload, err)
		}
	}
	must(os.WriteFile(path, []byte(strings.Repeat("secret ", 20000)), 0o600))
	if _, err := psat.Prove(t.Context()); err == nil || strings.Contains(err.Error(), "secret") {
		t.Errorf("too large: %v", err)
	}
	must(os.WriteFile(path, []byte(" \n"), 0o600))
	if _, err := psat.Prove(t.Context()); err == nil {
		t.Error("an empty token")
	}
}

func TestConfigRefusals(t *testing.T) {
	good := newFake().config(t)
	for name, edit := range map[string]func(*spireserver.Config){
		"no trust domain": func(c *spireserver.Config) { c.TrustDomain = spireserver.Config{}.TrustDomain },
		"no address":      func(c *spireserver.Config) { c.Addresses = nil },
		"no port":         func(c *spireserver.Config) { c.Addresses = []string{"host"} },
		"no bootstrap":    func(c *spireserver.Config) { c.Bootstrap = nil },
		"both bootstraps": func(c *spireserver.Config) { c.InsecureBootstrap = true },
		"no attestor":     func(c *spireserver.Config) { c.Attestor = nil },
		"negative":        func(c *spireserver.Config) { c.WithdrawConfirm = -1 },
		"negative delay":  func(c *spireserver.Config) { c.RebootstrapDelay = -1 },
		"odd rebootstrap": func(c *spireserver.Config) { c.Rebootstrap = "maybe" },
		"token again":     func(c *spireserver.Config) { c.Rebootstrap = spireserver.RebootstrapAlways },
		"nobody again": func(c *spireserver.Config) {
			c.Rebootstrap, c.Attestor = spireserver.RebootstrapAlways, spireserver.PSAT{}
			c.Bootstrap, c.InsecureBootstrap = nil, true
		},
	} {
		cfg := good
		edit(&cfg)
		if c, err := spireserver.New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
			_ = c.Close()
		}
	}
}
