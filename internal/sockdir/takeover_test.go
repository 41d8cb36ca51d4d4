package sockdir_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/internal/sockdir"
)

// mounted is dir as a pod sees it: bind-mounted, in a mount namespace of its
// own that ends with the test.
func mounted(t *testing.T, dir string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounts need root: skipping what a running pod's mount sees")
	}
	at := t.TempDir()
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
	ok := make([]byte, 3)
	if _, err := out.Read(ok); err != nil {
		t.Fatalf("bind mount: %v", err)
	}
	return fmt.Sprintf("/proc/%d/root%s", cmd.Process.Pid, at)
}

// spireAgent is a listener as SPIRE Agent's: it removes what has its name, binds
// it, and unlinks it by name when it ends.
func spireAgent(t *testing.T, dir string) *net.UnixListener {
	t.Helper()
	path := filepath.Join(dir, "spire-agent.sock")
	_ = os.Remove(path)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o777); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// alternateNames is what SPIRE's chart does before its agent starts.
func alternateNames(t *testing.T, dir string) {
	t.Helper()
	for _, name := range []string{"socket", "api.sock"} {
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
}

var allNames = []string{"socket", "spire-agent.sock", "api.sock"}

// reaches says whether a client of every name in dir comes out at l.
func reaches(t *testing.T, dir string, l net.Listener) {
	t.Helper()
	for _, name := range allNames {
		var c net.Conn
		var err error
		for deadline := time.Now().Add(10 * time.Second); ; {
			if c, err = net.Dial("unix", filepath.Join(dir, name)); err == nil || time.Now().After(deadline) {
				break
			}
		}
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		accepted := make(chan net.Conn, 1)
		go func() {
			if a, err := l.Accept(); err == nil {
				accepted <- a
			}
		}()
		select {
		case a := <-accepted:
			_ = a.Close()
		case <-time.After(10 * time.Second):
			t.Fatalf("%s leads to somebody else", name)
		}
		_ = c.Close()
	}
}

// A node moves from SPIRE Agent and back while a pod with a mount of the
// directory runs. Each time both are there for a while.
func TestTakeOverFromSPIREAgentAndBack(t *testing.T) {
	dir, err := os.MkdirTemp("", "sn") //nolint:usetesting // a path for a socket must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	alternateNames(t, dir)
	spire := spireAgent(t, dir)
	pod := mounted(t, dir)
	reaches(t, pod, spire)
	before := inode(t, dir)

	ours, err := sockdir.Listen(dir, "socket", "spire-agent.sock", "api.sock")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	said := make(chan string, 10)
	var keeping sync.WaitGroup
	keeping.Go(func() {
		ours.KeepLinks(ctx, 10*time.Millisecond, func(link string, err error) {
			if err != nil {
				link = err.Error()
			}
			said <- link
		})
	})
	reaches(t, pod, ours)
	_ = spire.Close() // unlinks by name what is our link by now
	if got, want := <-said, filepath.Join(dir, "spire-agent.sock"); got != want {
		t.Errorf("made again: %s, want %s", got, want)
	}
	reaches(t, pod, ours)

	// And back.
	alternateNames(t, dir)
	spire = spireAgent(t, dir)
	reaches(t, pod, spire)
	cancel()
	keeping.Wait()
	if err := ours.Unpublish(); err != nil {
		t.Fatal(err)
	}
	_ = ours.Close()
	reaches(t, pod, spire)
	if inode(t, dir) != before || inode(t, pod) != before {
		t.Error("the directory's inode changed: pods hold a dead mount")
	}
}
