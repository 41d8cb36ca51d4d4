package interop_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// startSPIREAgent runs the SPIRE Agent that SPIRE_AGENT names, on a socket in
// dir, as SPIRE's chart has it there.
func startSPIREAgent(t *testing.T, s *spireServer, dir, data, token string) *agent {
	t.Helper()
	for _, name := range []string{"socket", "api.sock"} { // the chart's init container
		path := filepath.Join(dir, name)
		if to, err := os.Readlink(path); err != nil || to != "spire-agent.sock" {
			_ = os.Remove(path)
			if err := os.Symlink("spire-agent.sock", path); err != nil {
				t.Fatal(err)
			}
		}
	}
	if fi, err := os.Lstat(filepath.Join(dir, "spire-agent.sock")); err == nil && fi.Mode()&os.ModeSymlink != 0 {
		_ = os.Remove(filepath.Join(dir, "spire-agent.sock"))
	}
	return runSPIREAgent(t, s.authority, dir, data, fmt.Sprintf("join_token = %q", token), `NodeAttestor "join_token" { plugin_data {} }`)
}

// runSPIREAgent runs the SPIRE Agent that SPIRE_AGENT names as an agent of a,
// with more settings and a node attestor.
func runSPIREAgent(t *testing.T, of *authority, dir, data, more, attestor string) *agent {
	t.Helper()
	host, port, _ := strings.Cut(of.address, ":")
	doc := fmt.Sprintf(`agent {
	data_dir = %q
	server_address = %q
	server_port = %q
	socket_path = %q
	trust_bundle_path = %q
	trust_domain = %q
	%s
}
plugins {
	%s
	KeyManager "disk" { plugin_data { directory = %q } }
	WorkloadAttestor "unix" { plugin_data {} }
}
`, data, host, port, filepath.Join(dir, "spire-agent.sock"), of.path("bundle.pem"), trustDomain, more, attestor, data)
	config := filepath.Join(data, "agent.conf")
	if err := os.WriteFile(config, []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	a := &agent{t: t, dir: data, log: &logBuffer{}}
	a.cmd = exec.Command(os.Getenv("SPIRE_AGENT"), "run", "-config", config)
	a.cmd.Stdout, a.cmd.Stderr = a.log, a.log
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	a.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) {
		defer close(done)
		_ = cmd.Wait()
	}(a.cmd, a.done)
	t.Cleanup(a.stop)
	return a
}

// podMount is dir in a mount namespace of its own, as a running pod has it.
func podMount(t *testing.T, dir string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts need root: skipping what a running pod's mount sees")
	}
	at, err := os.MkdirTemp("", "m") //nolint:usetesting // t.TempDir is too long for a socket //nolint:usetesting // removed after the mount in it is gone
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(at) })
	cmd := exec.CommandContext(t.Context(), "sh", "-c", `mount --bind "$0" "$1" && echo ok && exec sleep 600`, dir, at)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Skipf("no mount namespace here: %v", err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	if _, err := out.Read(make([]byte, 3)); err != nil {
		t.Fatalf("bind mount: %v", err)
	}
	return fmt.Sprintf("/proc/%d/root%s", cmd.Process.Pid, at)
}

// A workload runs through the move of its node from SPIRE Agent and back, with
// one mount of the socket directory and one open client.
func TestNodeMovesFromSPIREAgentAndBack(t *testing.T) {
	if os.Getenv("SPIRE_AGENT") == "" {
		t.Skip("SPIRE_AGENT does not name a spire-agent binary")
	}
	s := startSPIREServer(t)
	s.cli("entry", "create", "-parentID", "spiffe://"+trustDomain+"/node", "-spiffeID", "spiffe://"+trustDomain+"/web", "-selector", self())
	dir, err := os.MkdirTemp("", "sn-") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	for _, sub := range []string{"p", "d"} {
		if err := os.Mkdir(filepath.Join(dir, sub), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	public, data := filepath.Join(dir, "p"), filepath.Join(dir, "d")
	before, err := os.Stat(public)
	if err != nil {
		t.Fatal(err)
	}
	spire := startSPIREAgent(t, s, public, data, s.token("/node"))
	pod := podMount(t, public)

	source, err := workloadapi.NewX509Source(withTimeout(t), workloadapi.WithClientOptions(workloadapi.WithAddr("unix:"+pod+"/spire-agent.sock")))
	if err != nil {
		t.Fatalf("%v\n%s", err, spire.log)
	}
	defer source.Close()
	serial := func() string {
		t.Helper()
		svid, err := source.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		if svid.ID.Path() != "/web" {
			t.Fatalf("got %s", svid.ID)
		}
		return svid.Certificates[0].SerialNumber.String()
	}
	// changed waits until the client has got an SVID from the other agent, and
	// all names of the socket answer.
	changed := func(from string, log *logBuffer) string {
		t.Helper()
		start := time.Now()
		for deadline := start.Add(patience); serial() == from; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the client got nothing from the next agent:\n%s", log)
			}
		}
		t.Logf("the open client was served by the next agent after %s", time.Since(start).Round(time.Millisecond))
		for _, name := range []string{"socket", "spire-agent.sock", "api.sock"} {
			if _, err := workloadapi.FetchX509SVID(withTimeout(t), workloadapi.WithAddr("unix:"+pod+"/"+name)); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
		if after, err := os.Stat(public); err != nil || !os.SameFile(before, after) {
			t.Errorf("the directory's inode changed: %v", err)
		}
		return serial()
	}
	first := serial()

	// Ours comes while SPIRE Agent still serves; then that ends.
	ours := joinedAt(t, s, s.address, s.token("/node"), public)
	spire.stop()
	second := changed(first, ours.log)

	// And back, with what SPIRE Agent has on its disk.
	spire = startSPIREAgent(t, s, public, data, "")
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		if fi, err := os.Lstat(filepath.Join(public, "spire-agent.sock")); err == nil && fi.Mode()&os.ModeSocket != 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("SPIRE Agent did not come back:\n%s", spire.log)
		}
	}
	ours.stop()
	changed(second, spire.log)
}
