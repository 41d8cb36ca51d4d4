package procfs_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/internal/procfs"
)

func TestParseCgroups(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, in string
		want     []procfs.Cgroup
		bad      bool
	}{
		{name: "empty", want: []procfs.Cgroup{}},
		{name: "unified", in: "0::/a/b\n", want: []procfs.Cgroup{{Path: "/a/b"}}},
		{name: "above our namespace", in: "0::/../../x\n", want: []procfs.Cgroup{{Path: "/../../x"}}},
		{
			name: "hybrid", in: "9:name=systemd:/\n4:cpu,cpuacct:/x\n0::/\n",
			want: []procfs.Cgroup{{9, "name=systemd", "/"}, {4, "cpu,cpuacct", "/x"}, {0, "", "/"}},
		},
		{
			name: "colons and spaces in names", in: "0::/a.slice:cri-containerd:id (deleted)\n",
			want: []procfs.Cgroup{{Path: "/a.slice:cri-containerd:id (deleted)"}},
		},
		{name: "no line end", in: "0::/a", bad: true},
		{name: "no path", in: "0:\n", bad: true},
		{name: "relative path", in: "0::a\n", bad: true},
		{name: "empty path", in: "0::\n", bad: true},
		{name: "no number", in: "x::/\n", bad: true},
		{name: "negative number", in: "-1::/\n", bad: true},
		{name: "empty line", in: "\n", bad: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			got, err := procfs.ParseCgroups([]byte(tc.in))
			if tc.bad {
				if !errors.Is(err, procfs.ErrMalformed) {
					t.Fatalf("ParseCgroups(%q) = %v, %v; want ErrMalformed", tc.in, got, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

const statusText = "Name:\tx\\nUid:\t7\t7\t7\t7\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t12\nNSpid:\t12\t3\t1\n" +
	"Uid:\t1000\t1001\t1002\t1003\nGid:\t100\t101\t102\t103\nGroups:\t4 24 4294967294 \nUid:\t0\t0\t0\t0\n"

func TestParseStatus(t *testing.T) {
	t.Parallel()
	got, err := procfs.ParseStatus([]byte(statusText))
	if err != nil {
		t.Fatal(err)
	}
	want := procfs.Status{
		UID: 1001, GID: 101, RealUID: 1000, RealGID: 100,
		Groups: []uint32{4, 24, 4294967294}, NSpid: []int32{12, 3, 1}, State: 'S',
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	for _, bad := range []string{
		"", "Uid:\t1\t2\t3\t4\n", "Uid:\t1\nGid:\t1\t1\t1\t1\nGroups:\t\n",
		"Uid:\t1\t1\t1\t4294967296\nGid:\t1\t1\t1\t1\nGroups:\t\n", "Uid:\ta\tb\tc\td\nGid:\t1\t1\t1\t1\nGroups:\t\n",
	} {
		if _, err := procfs.ParseStatus([]byte(bad)); !errors.Is(err, procfs.ErrMalformed) {
			t.Errorf("ParseStatus(%q): %v, want ErrMalformed", bad, err)
		}
	}
}

func TestParseStartTime(t *testing.T) {
	t.Parallel()
	line := "7 (a) b) S" + strings.Repeat(" 1", 18) + " 4242 9\n"
	if got, err := procfs.ParseStartTime([]byte(line)); err != nil || got != 4242 {
		t.Errorf("ParseStartTime(%q) = %d, %v", line, got, err)
	}
	for _, bad := range []string{"", "7 a S 1", "7 (a) S 1 2", "7 (a) S" + strings.Repeat(" 1", 18) + " -3"} {
		if _, err := procfs.ParseStartTime([]byte(bad)); !errors.Is(err, procfs.ErrMalformed) {
			t.Errorf("ParseStartTime(%q): %v, want ErrMalformed", bad, err)
		}
	}
}

// The real /proc: what we read of ourselves is what we know of ourselves.
func TestSelf(t *testing.T) {
	t.Parallel()
	fs := procfs.New("")
	for _, pid := range []int{procfs.Self, os.Getpid()} {
		s, err := fs.Status(pid)
		if err != nil {
			t.Fatal(err)
		}
		if int(s.UID) != os.Geteuid() || int(s.GID) != os.Getegid() || int(s.RealUID) != os.Getuid() {
			t.Errorf("Status = %+v", s)
		}
		if len(s.NSpid) == 0 || int(s.NSpid[len(s.NSpid)-1]) != os.Getpid() {
			t.Errorf("NSpid = %v, want …%d", s.NSpid, os.Getpid())
		}
		if start, err := fs.StartTime(pid); err != nil || start == 0 {
			t.Errorf("StartTime = %d, %v", start, err)
		}
		if groups, err := fs.Cgroups(pid); err != nil || len(groups) == 0 {
			t.Errorf("Cgroups = %v, %v", groups, err)
		}
		if ns, err := fs.Namespace(pid, "pid"); err != nil || ns == 0 {
			t.Errorf("Namespace = %d, %v", ns, err)
		}
	}
}

func TestExe(t *testing.T) {
	t.Parallel()
	fs := procfs.New("")
	exe, err := fs.OpenExe(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer exe.Close()
	want, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if exe.Path() != want {
		t.Errorf("Path = %q, want %q", exe.Path(), want)
	}
	f, err := exe.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum := sha256.New()
	n, err := io.Copy(sum, f)
	if err != nil || uint64(n) != exe.ID().Size {
		t.Errorf("read %d bytes of %d: %v", n, exe.ID().Size, err)
	}
}

// The held file stays the one that was executed when it is deleted and another
// takes its path.
func TestExeReplaced(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "sleeper")
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip("no sleep(1):", err)
	}
	if sleep, err = filepath.EvalSymlinks(sleep); err != nil {
		t.Fatal(err)
	}
	copyFile(t, sleep, path)
	cmd := exec.Command(path, "60")
	if err := cmd.Start(); err != nil {
		if errors.Is(err, syscall.ETXTBSY) {
			t.Skip("another test forked while the copy was open:", err)
		}
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	fs := procfs.New("")
	before, err := fs.OpenExe(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer before.Close()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("other"), 0o700); err != nil {
		t.Fatal(err)
	}
	after, err := fs.OpenExe(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer after.Close()
	if before.ID().Ino != after.ID().Ino || after.Path() != path+" (deleted)" {
		t.Errorf("after replacement: %q %+v, before %+v", after.Path(), after.ID(), before.ID())
	}
	f, err := before.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if n, err := io.Copy(io.Discard, f); err != nil || n < 1000 {
		t.Errorf("read %d bytes: %v", n, err)
	}
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(to, data, 0o700); err != nil {
		t.Fatal(err)
	}
}

func TestGone(t *testing.T) {
	t.Parallel()
	cmd := exec.Command("true")
	if err := cmd.Run(); err != nil {
		t.Skip("no true(1):", err)
	}
	fs := procfs.New("")
	pid := cmd.ProcessState.Pid()
	_, err1 := fs.Cgroups(pid)
	_, err2 := fs.Status(pid)
	_, err3 := fs.StartTime(pid)
	_, err4 := fs.OpenExe(pid)
	_, err5 := fs.Namespace(pid, "pid")
	for _, err := range []error{err1, err2, err3, err4, err5} {
		if !errors.Is(err, os.ErrNotExist) {
			t.Errorf("a process that has ended: %v, want os.ErrNotExist", err)
		}
	}
}

// Another root, and files longer than any buffer.
func TestRoot(t *testing.T) {
	t.Parallel()
	root := t.TempDir()
	if err := os.MkdirAll(filepath.Join(root, "7", "ns"), 0o700); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(root, "7", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	var lines strings.Builder
	for i := range 500 {
		fmt.Fprintf(&lines, "%d:c%d:/%s\n", i, i, strings.Repeat("x", i))
	}
	write("cgroup", lines.String())
	fs := procfs.New(root)
	got, err := fs.Cgroups(7)
	if err != nil || len(got) != 500 || len(got[499].Path) != 500 {
		t.Errorf("Cgroups: %d lines, %v", len(got), err)
	}
	write("cgroup", "0::/"+strings.Repeat("x", 2<<20)+"\n")
	if _, err := fs.Cgroups(7); !errors.Is(err, procfs.ErrTooLong) {
		t.Errorf("2 MB of cgroup: %v, want ErrTooLong", err)
	}
	write("status", "nothing")
	if _, err := fs.Status(7); !errors.Is(err, procfs.ErrMalformed) {
		t.Errorf("bad status: %v, want ErrMalformed", err)
	}
	if err := os.Symlink("cgroup:[x]", filepath.Join(root, "7", "ns", "cgroup")); err != nil {
		t.Fatal(err)
	}
	if _, err := fs.Namespace(7, "cgroup"); !errors.Is(err, procfs.ErrMalformed) {
		t.Errorf("bad namespace: %v, want ErrMalformed", err)
	}
}

func BenchmarkCgroups(b *testing.B) {
	fs := procfs.New("")
	pid := os.Getpid()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := fs.Cgroups(pid); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkStatus(b *testing.B) {
	fs := procfs.New("")
	pid := os.Getpid()
	b.ReportAllocs()
	for b.Loop() {
		if _, err := fs.Status(pid); err != nil {
			b.Fatal(err)
		}
	}
}
