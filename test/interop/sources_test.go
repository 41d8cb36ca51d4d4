package interop_test

import (
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
)

func discoveryClient(a *agent) secret.SecretDiscoveryServiceClient {
	return secret.NewSecretDiscoveryServiceClient(a.dial())
}

// source is where a first trust bundle comes from: keys of trustBundle, and how
// an agent that finds it there is launched.
type source struct {
	keys   string
	launch func(a *agent)
}

func bootstrapSources(t *testing.T, s *spireServer) map[string]source {
	t.Helper()
	content := map[string][]byte{}
	for _, name := range []string{"bundle.pem", "bundle.json"} {
		data, err := os.ReadFile(s.path(name))
		if err != nil {
			t.Fatal(err)
		}
		content[name] = data
	}
	serve := http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		if req.URL.Path == "/api/v1/namespaces/spire/configmaps/spire-bundle" && req.Header.Get("Authorization") == "Bearer pod" {
			_ = json.NewEncoder(w).Encode(map[string]any{"data": map[string]string{"bundle.crt": string(content["bundle.pem"])}})
			return
		}
		data, ok := content[filepath.Base(req.URL.Path)]
		if !ok {
			http.NotFound(w, req)
			return
		}
		_, _ = w.Write(data)
	})
	https := httptest.NewTLSServer(serve)
	t.Cleanup(https.Close)
	at, err := url.Parse(https.URL)
	if err != nil {
		t.Fatal(err)
	}
	roots := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: https.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	lis, err := new(net.ListenConfig).Listen(t.Context(), "unix", s.path("b.sock"))
	if err != nil {
		t.Fatal(err)
	}
	plain := httptest.NewUnstartedServer(serve)
	_ = plain.Listener.Close()
	plain.Listener = lis
	plain.Start()
	t.Cleanup(plain.Close)
	out := map[string]source{
		"PEM file":    {keys: fmt.Sprintf("{path: %s}", s.path("bundle.pem"))},
		"SPIFFE file": {keys: fmt.Sprintf("{path: %s, format: spiffe}", s.path("bundle.json"))},
		"socket":      {keys: fmt.Sprintf("{url: 'http://bundles/bundle.json', unixSocket: %s, format: spiffe}", s.path("b.sock"))},
		"insecure":    {keys: "{insecure: true}"},
		"https": {keys: fmt.Sprintf("{url: '%s/bundle.pem'}", https.URL), launch: func(a *agent) {
			a.launchAs(exec.Command(binary(a.t, "sds-agent"), "--config", a.path("agent.yaml")), "SSL_CERT_FILE="+roots)
		}},
	}
	if os.Geteuid() == 0 {
		// A pod's service account, in a mount namespace of the agent's own.
		const script = `mount -t tmpfs none /run && mkdir -p /run/secrets/kubernetes.io/serviceaccount && cd /run/secrets/kubernetes.io/serviceaccount &&
cp "$0" ca.crt && printf pod > token && exec "$@"`
		out["ConfigMap"] = source{keys: "{configMap: {namespace: spire, name: spire-bundle}}", launch: func(a *agent) {
			cmd := exec.Command("sh", "-c", script, roots, binary(a.t, "sds-agent"), "--config", a.path("agent.yaml"))
			cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
			a.launchAs(cmd, "KUBERNETES_SERVICE_HOST="+at.Hostname(), "KUBERNETES_SERVICE_PORT="+at.Port())
		}}
	}
	return out
}

// launchAs runs the agent by another command than launch does.
func (a *agent) launchAs(cmd *exec.Cmd, env ...string) {
	a.t.Helper()
	a.cmd = cmd
	a.cmd.Env = append(os.Environ(), env...)
	a.run()
}
