package sockdir_test

import (
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/spiffe-node/spiffe-node/internal/sockdir"
)

func listen(t *testing.T, dir string) *sockdir.Socket {
	t.Helper()
	s, err := sockdir.Listen(dir, "socket", "api.sock", "spire-agent.sock")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	fi, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	return fi.Sys().(*syscall.Stat_t).Ino
}

// answers says which of the listeners a client that dials path reaches.
func answers(t *testing.T, path string, listeners ...*sockdir.Socket) int {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for i, l := range listeners {
		if inode(t, path) == inode(t, l.Path()) && l.Current() {
			return i
		}
	}
	return -1
}

func TestListenPublishesAllNames(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "made", "public")
	s := listen(t, dir)
	for _, name := range []string{"socket", "api.sock", "spire-agent.sock"} {
		if got := answers(t, filepath.Join(dir, name), s); got != 0 {
			t.Errorf("%s leads elsewhere", name)
		}
	}
	fi, err := os.Stat(filepath.Join(dir, "socket"))
	if err != nil || fi.Mode().Perm() != 0o777 {
		t.Errorf("socket mode %v, %v; any uid must be able to connect", fi.Mode(), err)
	}
	if di, _ := os.Stat(dir); di.Mode().Perm()&0o055 != 0o055 {
		t.Errorf("directory mode %v", di.Mode())
	}
	left, _ := os.ReadDir(dir)
	if len(left) != 3 {
		t.Errorf("the directory holds %v", left)
	}
}

func TestSuccessorTakesOverWithoutAGap(t *testing.T) {
	dir := t.TempDir()
	before := inode(t, dir)
	old := listen(t, dir)
	next := listen(t, dir)
	if inode(t, dir) != before {
		t.Error("the directory's inode changed: pods would hold a dead mount")
	}
	if old.Current() || !next.Current() {
		t.Error("the name must lead to the successor")
	}
	if err := old.Unpublish(); err != nil {
		t.Fatal(err)
	}
	if got := answers(t, filepath.Join(dir, "api.sock"), next); got != 0 {
		t.Error("the predecessor removed its successor's names")
	}
	if err := next.Unpublish(); err != nil {
		t.Fatal(err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestListenAdoptsSocketsOfOthers(t *testing.T) {
	dir := t.TempDir()
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "api.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	_ = dead.Close()
	if err := os.Symlink("spire-agent.sock", filepath.Join(dir, "socket")); err != nil {
		t.Fatal(err)
	}
	s := listen(t, dir)
	if got := answers(t, filepath.Join(dir, "api.sock"), s); got != 0 {
		t.Error("api.sock still leads to the dead socket")
	}
}

func TestListenRefusesWhatIsNotASocket(t *testing.T) {
	for name, create := range map[string]func(path string) error{
		"file":      func(p string) error { return os.WriteFile(p, []byte("precious"), 0o600) },
		"directory": func(p string) error { return os.Mkdir(p, 0o700) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := create(filepath.Join(dir, "api.sock")); err != nil {
				t.Fatal(err)
			}
			if _, err := sockdir.Listen(dir, "socket", "api.sock"); err == nil || !strings.Contains(err.Error(), "api.sock") {
				t.Errorf("got %v", err)
			}
			if _, err := os.Lstat(filepath.Join(dir, "socket")); err == nil {
				t.Error("half published")
			}
		})
	}
}

func TestListenRefusesALinkedDirectory(t *testing.T) {
	target := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(target, link); err != nil {
		t.Fatal(err)
	}
	if _, err := sockdir.Listen(link, "socket"); err == nil || !strings.Contains(err.Error(), "not a link") {
		t.Errorf("got %v", err)
	}
}

func TestListenRefusesNames(t *testing.T) {
	for _, name := range []string{"", ".", "..", "a/b", "/abs"} {
		if _, err := sockdir.Listen(t.TempDir(), name); err == nil {
			t.Errorf("name %q accepted", name)
		}
	}
}

func TestListenOnReadOnlyDirectory(t *testing.T) {
	if os.Geteuid() == 0 {
		// Modes do not stop root; a path below a file stops everybody.
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := sockdir.Listen(filepath.Join(file, "dir"), "socket"); err == nil {
			t.Error("accepted")
		}
		return
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o500); err != nil {
		t.Fatal(err)
	}
	if _, err := sockdir.Listen(dir, "socket"); err == nil || !strings.Contains(err.Error(), fs.ErrPermission.Error()) {
		t.Errorf("got %v", err)
	}
}
