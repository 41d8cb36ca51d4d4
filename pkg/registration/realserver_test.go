package registration_test

import (
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"k8s.io/client-go/rest"
)

// realServer starts etcd and a kube-apiserver, or skips the test where there is
// none. SPIFFE_NODE_APISERVER names the binary; else the one that test/e2e has
// built is taken.
func realServer(tb testing.TB) *rest.Config {
	tb.Helper()
	binary := os.Getenv("SPIFFE_NODE_APISERVER")
	if binary == "" {
		home, _ := os.UserCacheDir()
		found, _ := filepath.Glob(filepath.Join(home, "spiffe-node-e2e", "*", "bin", "kube-apiserver"))
		if len(found) == 0 {
			tb.Skip("no kube-apiserver: set SPIFFE_NODE_APISERVER, or run make e2e once")
		}
		binary = found[len(found)-1]
	}
	etcd, err := exec.LookPath("etcd")
	if err != nil {
		tb.Skip("no etcd in PATH")
	}
	dir := tb.TempDir()
	client, peer, port := freePort(tb), freePort(tb), freePort(tb)
	url := func(port int) string { return fmt.Sprintf("http://127.0.0.1:%d", port) }
	run(tb, dir, etcd, "--data-dir", filepath.Join(dir, "etcd"), "--listen-client-urls", url(client), "--advertise-client-urls", url(client),
		"--listen-peer-urls", url(peer), "--unsafe-no-fsync")
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		tb.Fatal(err)
	}
	write := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, data, 0o600); err != nil {
			tb.Fatal(err)
		}
		return path
	}
	sa := write("sa.key", pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)}))
	tokens := write("tokens", []byte("secret,admin,admin,system:masters\n"))
	run(tb, dir, binary, "--etcd-servers", url(client), "--secure-port", fmt.Sprint(port), "--bind-address", "127.0.0.1", "--cert-dir", filepath.Join(dir, "certs"),
		"--service-account-issuer", "https://kubernetes.default.svc", "--service-account-key-file", sa, "--service-account-signing-key-file", sa,
		"--token-auth-file", tokens, "--authorization-mode", "RBAC", "--endpoint-reconciler-type", "none", "--disable-admission-plugins", "ServiceAccount,TaintNodesByCondition")
	cfg := &rest.Config{Host: fmt.Sprintf("https://127.0.0.1:%d", port), BearerToken: "secret", TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
	waitReady(tb, cfg)
	return cfg
}

func freePort(tb testing.TB) int {
	tb.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // a test's port
	if err != nil {
		tb.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

// run starts a process that ends with the test.
func run(tb testing.TB, dir, name string, args ...string) {
	tb.Helper()
	out, err := os.Create(filepath.Join(dir, filepath.Base(name)+".log"))
	if err != nil {
		tb.Fatal(err)
	}
	cmd := exec.CommandContext(context.Background(), name, args...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if text, err := os.ReadFile(out.Name()); err == nil && tb.Failed() {
			tb.Logf("%s:\n%s", name, text[max(0, len(text)-3000):])
		}
		_ = out.Close()
	})
}

func waitReady(tb testing.TB, cfg *rest.Config) {
	tb.Helper()
	k := dynamicClient(tb, cfg)
	deadline := time.Now().Add(90 * time.Second)
	for {
		_, err := k.Resource(gvr("namespaces")).Get(tb.Context(), "kube-system", getOptions)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			tb.Fatalf("the API server is not ready: %v", err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
