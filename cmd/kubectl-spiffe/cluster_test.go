package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/inspecttls"
)

// oneToken is an API server that knows a single token.
type oneToken struct{}

func (oneToken) Token(_ context.Context, token, audience string) (inspecttls.User, error) {
	if token != "inspect-token" || audience != inspectAudience {
		return inspecttls.User{}, inspecttls.ErrUnknownToken
	}
	return inspecttls.User{Name: "inspector"}, nil
}

func (oneToken) Access(context.Context, inspecttls.User, inspecttls.Access) (bool, error) {
	return true, nil
}

// authority is a CA and certificates it signs.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func certificate(t *testing.T, id string, ca *authority) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), URIs: []*url.URL{u}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	parent, signer := template, key
	if ca == nil {
		template.IsCA, template.KeyUsage = true, x509.KeyUsageCertSign
	} else {
		parent, signer = ca.cert, ca.key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// inspectAPI is the cluster of testdata with an Inspect port on the agent of
// node1, whose certificate names id.
func inspectAPI(t *testing.T, id string) (api *fakeAPI, kubeconfig string) {
	t.Helper()
	var ca authority
	ca.cert, ca.key = certificate(t, "spiffe://td", nil)
	cert, key := certificate(t, id, &ca)
	server, err := inspecttls.New(t.Context(), inspecttls.Config{
		Address: "127.0.0.1:0", Node: "node1", Source: &scriptSource{now: time.Now()}, Reviewer: oneToken{},
		TLS: &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{cert.Raw}, PrivateKey: key}}, MinVersion: tls.VersionTLS13},
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	bundle, err := spiffebundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString("td"), []*x509.Certificate{ca.cert}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile("testdata/cluster/shop.yaml")
	if err != nil {
		t.Fatal(err)
	}
	api = &fakeAPI{token: "inspect-token", ports: map[string]string{}}
	text := strings.Replace(string(data), "{name: sds-agent}]", "{name: sds-agent, ports: [{name: inspect, containerPort: 9983}]}]", 1)
	if err := api.parse([]byte(text)); err != nil {
		t.Fatal(err)
	}
	api.objects = append(api.objects, map[string]any{
		"apiVersion": "v1", "kind": "ConfigMap", "metadata": map[string]any{"name": "spire-bundle", "namespace": "spire-server"},
		"data": map[string]any{"bundle.spiffe": string(bundle)},
	})
	_, port, err := net.SplitHostPort(server.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := strconv.Atoi(port); err != nil {
		t.Fatal(err)
	}
	api.ports["spiffe-node-abcde:9983"] = "127.0.0.1:" + port
	kubeconfig = filepath.Join(t.TempDir(), "kubeconfig")
	if err := api.start(t.Cleanup, kubeconfig, "shop"); err != nil {
		t.Fatal(err)
	}
	return api, kubeconfig
}

// spiffe runs the command with a kubeconfig.
func spiffe(kubeconfig string, args ...string) outcome {
	var out, errs bytes.Buffer
	code := run(context.Background(), args, system{stdin: strings.NewReader(""), stdout: &out, stderr: &errs, getenv: func(name string) string {
		return map[string]string{"KUBECONFIG": kubeconfig}[name]
	}})
	return outcome{out.String(), errs.String(), code != 0}
}

func TestInspectPort(t *testing.T) {
	api, kubeconfig := inspectAPI(t, "spiffe://td/spire/agent/k8s_psat/c/node1")
	o := spiffe(kubeconfig, "explain", "pod/web-0")
	if o.Failed || !strings.Contains(o.Stdout, "Verdict: issued") {
		t.Fatalf("%+v", o)
	}
	if !api.called("POST /api/v1/namespaces/spire-server/serviceaccounts/spiffe-inspect/token") || api.called("GET /api/v1/namespaces/spire-server/pods/spiffe-node-abcde/exec") {
		t.Errorf("calls: %q", api.calls)
	}
	if o := spiffe(kubeconfig, "status", "--on-node", "node1", "-A", "--inspect-service-account", "shop/inspector"); o.Failed || !strings.Contains(o.Stdout, "node1") {
		t.Errorf("%+v", o)
	}
	if !api.called("POST /api/v1/namespaces/shop/serviceaccounts/inspector/token") {
		t.Errorf("calls: %q", api.calls)
	}
	if o := spiffe(kubeconfig, "explain", "pod/web-0", "--inspect-service-account", "inspector"); !o.Failed || !strings.Contains(o.Stderr, "must be written as namespace/name") {
		t.Errorf("%+v", o)
	}
}

// A token is shown to an agent of the trust domain and to nobody else.
func TestInspectPortOfAnImpostor(t *testing.T) {
	for _, id := range []string{"spiffe://td/ns/shop/sa/web", "spiffe://other/spire/agent/x"} {
		_, kubeconfig := inspectAPI(t, id)
		if o := spiffe(kubeconfig, "explain", "pod/web-0"); !o.Failed || o.Stdout != "" {
			t.Errorf("%s: %+v", id, o)
		}
	}
}

func TestInspectPortRefuses(t *testing.T) {
	api, kubeconfig := inspectAPI(t, "spiffe://td/spire/agent/x")
	api.token = "another"
	if o := spiffe(kubeconfig, "explain", "pod/web-0"); !o.Failed || !strings.Contains(o.Stderr, "Unauthenticated") || !strings.Contains(o.Stderr, "--inspect-service-account none") {
		t.Errorf("%+v", o)
	}
}

// Without a token, a bundle or an open port, administrators come in by exec.
func TestExecIsTheFallback(t *testing.T) {
	for name, spoil := range map[string]func(*fakeAPI){
		"no account": func(f *fakeAPI) { f.token = "" },
		"may not":    func(f *fakeAPI) { f.forbidden = []string{"/api/v1/namespaces/spire-server/serviceaccounts"} },
		"no bundle":  func(f *fakeAPI) { f.objects = f.objects[:len(f.objects)-1] },
		"no forwards": func(f *fakeAPI) {
			f.forbidden = []string{"/api/v1/namespaces/spire-server/pods/spiffe-node-abcde/portforward"}
		},
		"old server": func(f *fakeAPI) { f.token, f.oldOnly = "", true },
	} {
		t.Run(name, func(t *testing.T) {
			api, kubeconfig := inspectAPI(t, "spiffe://td/spire/agent/x")
			api.command = tunnelInto(serveForReal(t))
			spoil(api)
			// That agent has no callers; that it says so is enough.
			o := spiffe(kubeconfig, "explain", "-pid", "1", "--on-node", "node1")
			if !o.Failed || !strings.Contains(o.Stderr, "spiffe.node.inspect") {
				t.Errorf("%+v", o)
			}
			if !api.called("GET /api/v1/namespaces/spire-server/pods/spiffe-node-abcde/exec") {
				t.Errorf("calls: %q", api.calls)
			}
		})
	}
}

func TestForbiddenEverywhere(t *testing.T) {
	api, kubeconfig := inspectAPI(t, "spiffe://td/spire/agent/x")
	api.forbidden = []string{"/api/v1/namespaces/spire-server/pods/spiffe-node-abcde/"}
	o := spiffe(kubeconfig, "explain", "pod/web-0")
	if !o.Failed || !strings.Contains(o.Stderr, "exec") || !strings.Contains(o.Stderr, "over the Inspect port") {
		t.Errorf("%+v", o)
	}
	// Nobody may list pods everywhere: the usual namespaces are tried.
	api.forbidden = []string{"/api/v1/pods"}
	if o := spiffe(kubeconfig, "explain", "pod/web-0"); o.Failed {
		t.Errorf("%+v", o)
	}
	api.forbidden = []string{"/api/v1/pods", "/api/v1/namespaces/spire-server/pods"}
	if o := spiffe(kubeconfig, "status"); !o.Failed || !strings.Contains(o.Stderr, "--spiffe-namespace") {
		t.Errorf("%+v", o)
	}
}
