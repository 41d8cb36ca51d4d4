package interop_test

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// spireServer is a SPIRE Server process that is handled like one of ours: its
// admin socket is where authority's would be.
type spireServer struct{ *authority }

// spireServerBinary is the SPIRE Server that the environment names.
func spireServerBinary() string {
	return cmp.Or(os.Getenv("SPIFFE_NODE_TEST_SPIRE_SERVER"), os.Getenv("SPIRE_SERVER"))
}

// isSPIRE114 says whether it is of the release before the present one.
func isSPIRE114(t *testing.T) bool {
	t.Helper()
	out, err := exec.Command(spireServerBinary(), "--version").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	return strings.HasPrefix(strings.TrimSpace(string(out)), "1.14.")
}

// startSPIREServer runs a SPIRE Server with more keys of the server, and more
// plugins.
func startSPIREServer(t *testing.T, more ...string) *spireServer {
	t.Helper()
	if spireServerBinary() == "" {
		t.Skip("SPIFFE_NODE_TEST_SPIRE_SERVER does not name a spire-server binary")
	}
	more = append(more, "", "")
	dir, err := os.MkdirTemp("", "sn-") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &spireServer{&authority{agent: &agent{t: t, dir: dir, log: &logBuffer{}}, address: freeAddress(t)}}
	_, port, err := net.SplitHostPort(s.address)
	if err != nil {
		t.Fatal(err)
	}
	doc := fmt.Sprintf(`server {
	bind_address = "127.0.0.1"
	bind_port = %q
	socket_path = %q
	trust_domain = %q
	data_dir = %q
	log_level = "DEBUG"
	%s
}
plugins {
	DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = %q } }
	NodeAttestor "join_token" { plugin_data {} }
	%s
	KeyManager "disk" { plugin_data { keys_path = %q } }
}
`, port, s.admin(), trustDomain, dir, more[0], s.path("db.sqlite3"), more[1], s.path("keys.json"))
	if err := os.WriteFile(s.path("server.conf"), []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	s.start()
	t.Cleanup(s.stop)
	if err := os.WriteFile(s.path("bundle.pem"), []byte(s.cli("bundle", "show")), 0o600); err != nil {
		t.Fatal(err)
	}
	if s.bundle, err = x509bundle.Load(serverID.TrustDomain(), s.path("bundle.pem")); err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *spireServer) start() {
	s.t.Helper()
	s.cmd = exec.Command(spireServerBinary(), "run", "-config", s.path("server.conf"))
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	s.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) {
		defer close(done)
		_ = cmd.Wait()
	}(s.cmd, s.done)
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if _, err := s.tryCLI("healthcheck"); err == nil {
			return
		}
		if time.Now().After(deadline) {
			s.t.Fatalf("the server never became healthy:\n%s", s.log)
		}
	}
}

// server is an authority elsewhere, whoever wrote it.
type server interface {
	cli(args ...string) string
	token(path string) string
	start()
	kill()
	path(name string) string
}

// joined starts an agent that gets its identities from a server.
func joined(t *testing.T, s server, address, token string) *agent {
	t.Helper()
	return joinedAt(t, s, address, token, "")
}

// joinedAt is joined with a socket directory of its own; "" = one that is made.
func joinedAt(t *testing.T, s server, address, token, public string) *agent {
	t.Helper()
	n := newJoined(t, "127.0.0.1:1, "+address, fmt.Sprintf("{path: %s}", s.path("bundle.pem")), "", "")
	if public != "" {
		edit(t, n.path("agent.yaml"), n.path("public"), public)
	}
	n.setToken(token)
	n.start()
	return n
}

// newJoined is joined with the trust bundle's source, the node attestation (""
// = by the token in a file) and more keys below spireServer; it is not started
// yet.
func newJoined(t *testing.T, address, trust, attestation, more string) *agent {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "sn-") //nolint:usetesting // t.TempDir is no tmpfs and too long for a socket
	if err != nil {
		t.Skipf("no tmpfs at /dev/shm: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	n := &agent{t: t, dir: dir, health: freeAddress(t), log: &logBuffer{}}
	if attestation == "" {
		attestation = fmt.Sprintf("{type: join_token, joinTokenFile: %s}", n.path("token"))
	}
	doc := fmt.Sprintf(`apiVersion: config.spiffe-node.io/v1alpha1
kind: AgentConfiguration
trustDomain: %s
socket: {directory: %s}
admin: {socketPath: %s}
authority:
  spireServer:
    address: "%s"
    trustBundle: %s
    nodeAttestation: %s
    withdrawConfirm: 2s
%s
identity: {stateDirectory: %s}
health: {address: "%s"}
log: {level: debug}
`, trustDomain, n.path("public"), n.admin(), address, trust, attestation, more, n.path("state"), n.health)
	if err := os.WriteFile(n.path("agent.yaml"), []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if n.cmd != nil {
			n.stop()
		}
	})
	return n
}

func (a *agent) setToken(token string) {
	a.t.Helper()
	if err := os.WriteFile(a.path("token"), []byte(token), 0o600); err != nil {
		a.t.Fatal(err)
	}
}

func TestAgentOfAServer(t *testing.T) {
	t.Run("authority", func(t *testing.T) {
		a := startAuthority(t, "")
		serverLife(t, a, a.address)
	})
	t.Run("SPIRE Server", func(t *testing.T) {
		s := startSPIREServer(t)
		serverLife(t, s, s.address)
	})
}

func serverLife(t *testing.T, s server, address string) {
	t.Helper()
	token := s.token("")
	n := joined(t, s, address, token)
	parent := "spiffe://" + trustDomain + "/spire/agent/join_token/" + token
	create := func(path string) {
		t.Helper()
		s.cli("entry", "create", "-parentID", parent, "-spiffeID", "spiffe://"+trustDomain+path, "-selector", self())
	}
	entryID := func(path string) string {
		t.Helper()
		for line := range strings.Lines(s.cli("entry", "show", "-spiffeID", "spiffe://"+trustDomain+path)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "Entry ID" {
				return strings.TrimSpace(v)
			}
		}
		t.Fatalf("no entry for %s", path)
		return ""
	}

	// A stream waits; the entry comes.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	e := openEnvoy(ctx, n, "default")
	e.quiet()
	start := time.Now()
	create("/w1")
	cert := leaf(t, secrets(t, e.next())["default"])
	t.Logf("entry to secret: %s", time.Since(start))

	// It changes.
	start = time.Now()
	s.cli("entry", "update", "-entryID", entryID("/w1"), "-parentID", parent, "-spiffeID", "spiffe://"+trustDomain+"/w1", "-selector", self(), "-dns", "a.example")
	next := leaf(t, secrets(t, e.next())["default"])
	if len(next.DNSNames) != 1 || next.SerialNumber.Cmp(cert.SerialNumber) == 0 {
		t.Errorf("after the update: %v", next.DNSNames)
	}
	t.Logf("update to secret: %s", time.Since(start))

	// The server goes; the agent goes and comes back without it.
	waitForState(t, n)
	time.Sleep(300 * time.Millisecond) // the newest SVID is in the state by then
	s.kill()
	n.kill()
	n.launch()
	e = nil
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial("unix", n.socket()); err == nil { //nolint:noctx // a probe
			_ = c.Close()
			e = openEnvoy(ctx, n, "default")
			break
		}
	}
	if got := leaf(t, secrets(t, e.next())["default"]); got.SerialNumber.Cmp(next.SerialNumber) != 0 {
		t.Error("the restarted agent serves another SVID")
	}
	s.start()
	start = time.Now()
	n.waitReady()
	t.Logf("server back to agent ready: %s", time.Since(start))
	create("/w2")
	e2 := openEnvoy(ctx, n, "spiffe://"+trustDomain+"/w2")
	if got := leaf(t, secrets(t, e2.next())["spiffe://"+trustDomain+"/w2"]); got.URIs[0].Path != "/w2" {
		t.Errorf("got %s", got.URIs[0])
	}
	if out := s.cli("agent", "count"); !strings.Contains(out, "1 attested agent") {
		t.Errorf("the agent attested again: %s", out)
	}

	// Entries go.
	start = time.Now()
	s.cli("entry", "delete", "-entryID", entryID("/w2"))
	select {
	case err := <-e2.end:
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("ended with %v", err)
		}
	case <-ctx.Done():
		t.Fatalf("the identity was not withdrawn:\n%s", n.log)
	}
	t.Logf("delete to withdrawal: %s", time.Since(start))

	// The agent is evicted: what it has is served, and a new token helps.
	s.cli("agent", "evict", "-spiffeID", parent)
	for deadline := time.Now().Add(patience); !strings.Contains(n.log.String(), "the join token has been used"); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the eviction went unnoticed:\n%s", n.log)
		}
	}
	if got := leaf(t, secrets(t, openEnvoy(ctx, n, "default").next())["default"]); got.URIs[0].Path != "/w1" {
		t.Errorf("an evicted agent serves %s", got.URIs[0])
	}
	n.setToken(s.token(""))
	n.waitReady()
	n.alive()
}
