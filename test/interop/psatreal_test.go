package interop_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
)

// kubeAPI is as much of an API server as a k8s_psat attestor asks: whose a token
// is, which pod that is, and which node the pod is on. The result is a
// kubeconfig for it.
func kubeAPI(t *testing.T, token string) string {
	t.Helper()
	answer := func(w http.ResponseWriter, v any) {
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(v)
	}
	type object = map[string]any
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		switch req.URL.Path {
		case "/apis/authentication.k8s.io/v1/tokenreviews":
			// As JSON or as a Protocol Buffer, the token is in it as it is.
			review, _ := io.ReadAll(req.Body)
			status := object{"authenticated": false}
			if bytes.Contains(review, []byte(token)) && bytes.Contains(review, []byte("spire-server")) {
				status = object{"authenticated": true, "audiences": []string{"spire-server"}, "user": object{
					"username": "system:serviceaccount:spire-system:spire-agent",
					"extra": object{
						"authentication.kubernetes.io/pod-name": []string{"agent-1"},
						"authentication.kubernetes.io/pod-uid":  []string{"pod-uid-1"},
					},
				}}
			}
			answer(w, object{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "status": status})
		case "/api/v1/namespaces/spire-system/pods/agent-1":
			answer(w, object{
				"apiVersion": "v1", "kind": "Pod", "metadata": object{"name": "agent-1", "namespace": "spire-system", "uid": "pod-uid-1"},
				"spec": object{"nodeName": "node-1", "serviceAccountName": "spire-agent"}, "status": object{"hostIP": "127.0.0.1"},
			})
		case "/api/v1/nodes/node-1":
			answer(w, object{"apiVersion": "v1", "kind": "Node", "metadata": object{"name": "node-1", "uid": "node-uid-1"}})
		default:
			http.NotFound(w, req)
		}
	}))
	t.Cleanup(srv.Close)
	ca := base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(path, fmt.Appendf(nil, `apiVersion: v1
kind: Config
clusters: [{name: c, cluster: {server: %q, certificate-authority-data: %q}}]
users: [{name: u, user: {token: server}}]
contexts: [{name: x, context: {cluster: c, user: u}}]
current-context: x
`, srv.URL, ca), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// A pod's token attests its node, and does so again when the agent was evicted.
func TestPSATAtASPIREServer(t *testing.T) {
	kubeconfig := kubeAPI(t, "projected")
	s := startSPIREServer(t, "", fmt.Sprintf(`NodeAttestor "k8s_psat" { plugin_data { clusters = { "demo" = {
		service_account_allow_list = ["spire-system:spire-agent"]
		kube_config_file = %q
	} } } }`, kubeconfig))
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("projected\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	n := newJoined(t, s.address, fmt.Sprintf("{path: %s}", s.path("bundle.pem")),
		fmt.Sprintf("{type: k8s_psat, cluster: demo, tokenPath: %s}", token), "    rebootstrap: {mode: always}")
	n.start()
	id := "spiffe://" + trustDomain + "/spire/agent/k8s_psat/demo/node-uid-1"
	s.real("entry", "create", "-node", "-spiffeID", "spiffe://"+trustDomain+"/nodes", "-selector", "k8s_psat:agent_node_name:node-1")
	s.create("spiffe://"+trustDomain+"/nodes", "/pod")
	if cert, _ := got(minutes(t, 1), t, n, "default"); cert.URIs[0].Path != "/pod" {
		t.Errorf("got %s", cert.URIs[0])
	}
	// The server forgets the node; the token on disk has been renewed.
	s.real("agent", "evict", "-spiffeID", id)
	n.said("the server turned the agent's SVID away")
	n.waitReady()
	if cert, _ := got(minutes(t, 1), t, n, "default"); cert.URIs[0].Path != "/pod" {
		t.Errorf("got %s", cert.URIs[0])
	}
}
