package interop_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	trustDomain = "example.org"
	nodeName    = "interop"
	agentID     = "spiffe://example.org/spire/agent/local/interop"
	patience    = 30 * time.Second
)

// built builds the commands once for all tests.
var built = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "spiffe-node-interop-")
	if err != nil {
		return "", err
	}
	args := []string{"build", "-o", dir + "/"}
	if raceEnabled {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, "./cmd/sds-agent", "./cmd/authority", "./cmd/kubectl-spiffe")...)
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w\n%s", err, out)
	}
	return dir, nil
})

func binary(t *testing.T, name string) string {
	t.Helper()
	dir, err := built()
	if err != nil {
		t.Fatalf("build: %v", err)
	}
	return filepath.Join(dir, name)
}

// logBuffer collects what a process writes while it is being read.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// agent is a running sds-agent, or another daemon that is run in its manner.
type agent struct {
	t      *testing.T
	name   string // of the command; empty = sds-agent
	dir    string // short: socket paths are limited
	health string
	env    []string // beside this process's own
	cmd    *exec.Cmd
	done   chan struct{}
	log    *logBuffer
}

// startAgent starts an agent with a directory of its own. extra is appended to
// its configuration.
func startAgent(t *testing.T, extra string) *agent {
	t.Helper()
	// Restart state must lie on tmpfs; /dev/shm is one on every Linux.
	dir, err := os.MkdirTemp("/dev/shm", "sn-") //nolint:usetesting // t.TempDir is no tmpfs and too long for a socket
	if err != nil {
		t.Skipf("no tmpfs at /dev/shm: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	a := &agent{t: t, dir: dir, health: freeAddress(t), log: &logBuffer{}}
	doc := fmt.Sprintf(`apiVersion: config.spiffe-node.io/v1alpha1
kind: AgentConfiguration
trustDomain: %s
node: {name: %s}
socket: {directory: %s}
admin: {socketPath: %s}
authority: {embedded: {statePath: %s}}
identity: {stateDirectory: %s}
attestation: {unix: {discoverWorkloadPath: true}}
health: {address: "%s"}
log: {level: debug}
%s`, trustDomain, nodeName, a.path("public"), a.admin(), a.path("authority/authority.db"), a.path("state"), a.health, extra)
	if err := os.WriteFile(a.path("agent.yaml"), []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	a.start()
	t.Cleanup(a.stop)
	return a
}

func (a *agent) path(name string) string { return filepath.Join(a.dir, name) }
func (a *agent) admin() string           { return a.path("admin/api.sock") }
func (a *agent) socket() string          { return a.path("public/socket") }

// start runs the agent and waits until it is ready.
func (a *agent) start() {
	a.t.Helper()
	a.launch()
	a.waitReady()
}

func (a *agent) launch() {
	a.t.Helper()
	a.cmd = exec.Command(binary(a.t, cmp.Or(a.name, "sds-agent")), "--config", a.path("agent.yaml"))
	a.cmd.Env = append(os.Environ(), a.env...)
	a.run()
}

// run starts the agent's command.
func (a *agent) run() {
	a.t.Helper()
	a.cmd.Stdout, a.cmd.Stderr = a.log, a.log
	if a.cmd.SysProcAttr == nil {
		a.cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	a.cmd.SysProcAttr.Pdeathsig = syscall.SIGKILL
	if err := a.cmd.Start(); err != nil {
		a.t.Fatal(err)
	}
	a.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) {
		defer close(done)
		_ = cmd.Wait()
	}(a.cmd, a.done)
}

func (a *agent) waitReady() {
	a.t.Helper()
	ctx, cancel := context.WithTimeout(a.t.Context(), patience)
	defer cancel()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+a.health+"/readyz", nil)
		if err != nil {
			a.t.Fatal(err)
		}
		if res, err := http.DefaultClient.Do(req); err == nil {
			_, _ = io.Copy(io.Discard, res.Body)
			_ = res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return
			}
		}
		select {
		case <-a.done:
			a.t.Fatalf("the agent ended:\n%s", a.log)
		case <-ctx.Done():
			a.t.Fatalf("the agent never became ready:\n%s", a.log)
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// stop ends the agent as Kubernetes does and fails the test if it does not end
// cleanly.
func (a *agent) stop() {
	a.t.Helper()
	select {
	case <-a.done:
		return
	default:
	}
	_ = a.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-a.done:
		if !a.cmd.ProcessState.Success() {
			a.t.Errorf("the agent ended with %v:\n%s", a.cmd.ProcessState, a.log)
		}
	case <-time.After(patience):
		_ = a.cmd.Process.Kill()
		a.t.Errorf("the agent did not end on SIGTERM:\n%s", a.log)
	}
}

func (a *agent) kill() {
	a.t.Helper()
	_ = a.cmd.Process.Kill()
	<-a.done
}

// alive fails the test if the agent has ended or its log shows a panic.
func (a *agent) alive() {
	a.t.Helper()
	select {
	case <-a.done:
		a.t.Fatalf("the agent ended:\n%s", a.log)
	default:
	}
	if strings.Contains(a.log.String(), "panic") {
		a.t.Errorf("a handler panicked:\n%s", a.log)
	}
}

// cli runs kubectl-spiffe and gives back its output; it must succeed.
func (a *agent) cli(args ...string) string {
	a.t.Helper()
	out, err := a.tryCLI(args...)
	if err != nil {
		a.t.Fatalf("kubectl-spiffe %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return out
}

func (a *agent) tryCLI(args ...string) (string, error) {
	cmd := exec.CommandContext(a.t.Context(), binary(a.t, "kubectl-spiffe"), append(args, "-socketPath", a.admin())...)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// createEntry registers an identity for callers with the selectors and gives
// back the entry ID.
func (a *agent) createEntry(path string, more ...string) string {
	a.t.Helper()
	args := append([]string{"entry", "create", "-output", "json", "-parentID", agentID, "-spiffeID", "spiffe://" + trustDomain + path}, more...)
	var res struct {
		Results []struct {
			Status struct{ Code int }
			Entry  struct{ ID string }
		}
	}
	out := a.cli(args...)
	if err := json.Unmarshal([]byte(out), &res); err != nil || len(res.Results) != 1 || res.Results[0].Status.Code != 0 {
		a.t.Fatalf("entry create: %v\n%s", err, out)
	}
	return res.Results[0].Entry.ID
}

// self is the selector that this test process matches.
func self() string { return fmt.Sprintf("unix:uid:%d", os.Getuid()) }

func (a *agent) dial() *grpc.ClientConn {
	a.t.Helper()
	conn, err := grpc.NewClient("unix:"+a.socket(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

func withTimeout(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	return ctx
}
