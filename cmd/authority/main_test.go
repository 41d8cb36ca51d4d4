package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/doctest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var update = flag.Bool("update", false, "rewrite the flag table in docs/configuration.md")

func TestFlagsAreDocumented(t *testing.T) {
	doctest.Block(t, "../../docs/configuration.md", "authority-flags", doctest.Flags(commandLine().FlagSet()), *update)
}

// output is a writer that can be read while it is written.
type output struct {
	mu   sync.Mutex
	text strings.Builder
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// waitFor is what follows the marker in the output, up to the next quote.
func (o *output) waitFor(t *testing.T, marker string) string {
	t.Helper()
	for range 500 {
		if _, rest, ok := strings.Cut(o.String(), marker); ok {
			value, _, _ := strings.Cut(rest, `"`)
			return value
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("no %s in:\n%s", marker, o.String())
	return ""
}

func file(t *testing.T, content string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "authority.yaml")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const head = "apiVersion: " + config.APIVersion + "\nkind: AuthorityConfiguration\ntrustDomain: example.org\n"

func TestCommandLine(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		out  string
		err  string
	}{
		"version":        {[]string{"--version"}, "dev\n", ""},
		"valid":          {[]string{"--config", file(t, head), "--validate"}, "configuration is valid\n", ""},
		"flags alone":    {[]string{"--trust-domain", "x.example", "--validate"}, "configuration is valid\n", ""},
		"flag wins":      {[]string{"--config", file(t, head), "--log-level", "loud", "--validate"}, "", "log.level"},
		"unknown key":    {[]string{"--config", file(t, head+"sockets: 1\n"), "--validate"}, "", "sockets: is not a key here"},
		"argument":       {[]string{"serve"}, "", "unexpected argument"},
		"no domain":      {nil, "", "trustDomain: is missing"},
		"no such file":   {[]string{"--config", "/does/not/exist"}, "", "read configuration"},
		"no such flag":   {[]string{"--port", "1"}, "", "flag provided but not defined"},
		"agent's config": {[]string{"--config", file(t, strings.Replace(head, "Authority", "Agent", 1))}, "", "kind:"},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			err := commandLine().Execute(t.Context(), tc.args, &out, io.Discard)
			if out.String() != tc.out || (err == nil) != (tc.err == "") || err != nil && !strings.Contains(err.Error(), tc.err) {
				t.Errorf("%q, %v", out.String(), err)
			}
		})
	}
	if err := commandLine().Execute(t.Context(), []string{"--help"}, io.Discard, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("help: %v", err)
	}
}

// arguments are for a process that touches nothing outside dir.
func arguments(dir string, more ...string) []string {
	return append([]string{
		"--trust-domain", "example.org", "--address", "127.0.0.1:0", "--health-address", "127.0.0.1:0",
		"--admin-socket", filepath.Join(dir, "admin", "api.sock"), "--state", filepath.Join(dir, "state", "authority.db"),
	}, more...)
}

func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sn") //nolint:usetesting // its paths are too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func TestLife(t *testing.T) {
	dir := scratch(t)
	for round := range 2 { // the second with the state of the first
		ctx, stop := context.WithCancel(t.Context())
		var log output
		done := make(chan error, 1)
		go func() { done <- commandLine().Execute(ctx, arguments(dir), io.Discard, &log) }()
		log.waitFor(t, `"msg":"authority started"`)
		health := log.waitFor(t, `"msg":"serving health and metrics","address":"`)
		for _, path := range []string{"/livez", "/readyz", "/metrics"} {
			resp, err := http.Get("http://" + health + path)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if resp.StatusCode != http.StatusOK {
				t.Errorf("%s: %s: %s", path, resp.Status, body)
			}
			if path == "/metrics" && !strings.Contains(string(body), "spiffe_node_authority_ca_expiry_timestamp_seconds") {
				t.Error("metrics lack the CA's expiry")
			}
		}
		http.DefaultClient.CloseIdleConnections()
		stop()
		if err := <-done; err != nil {
			t.Errorf("round %d: %v", round, err)
		}
		if _, err := os.Stat(filepath.Join(dir, "admin", "api.sock")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left over: %v", err)
		}
	}
}

// A part that cannot be had ends the process with a reason and leaves nothing.
func TestFailures(t *testing.T) {
	for name, tc := range map[string]struct{ config, want string }{
		"address in use":  {"", "server API: listen tcp"},
		"no cluster here": {head + "nodeAttestation: {k8sPSAT: {cluster: c, serviceAccountAllowList: [\"a:b\"]}}\n", "nodeAttestation.k8sPSAT: find the cluster"},
		"no kubeconfig":   {head + "nodeAttestation: {k8sPSAT: {cluster: c, serviceAccountAllowList: [\"a:b\"], kubeConfigFile: /does/not/exist}}\n", "read kubeconfig"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := scratch(t)
			args := arguments(dir)
			if tc.config != "" {
				args = append(args, "--config", file(t, tc.config))
			} else {
				args = append(args, "--address", "192.0.2.1:1") // not ours
			}
			err := commandLine().Execute(t.Context(), args, io.Discard, io.Discard)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want %s", err, tc.want)
			}
			if _, err := os.Stat(filepath.Join(dir, "admin", "api.sock")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the socket is left over: %v", err)
			}
		})
	}
}
