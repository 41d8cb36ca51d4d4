package attest_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

func bind(tb testing.TB, cfg attest.Config, c attest.Caller) *attest.Binding {
	tb.Helper()
	a, err := attest.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	b, err := a.Bind(context.Background(), c)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(b.Close)
	return b
}

func writeFile(tb testing.TB, path, text string) string {
	tb.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		tb.Fatal(err)
	}
	return path
}

func TestUnixSelectors(t *testing.T) {
	t.Parallel()
	needRoot(t)
	dir := t.TempDir()
	cfg := attest.Config{Mode: attest.ModeUnix, Unix: attest.UnixConfig{
		PasswdFile: writeFile(t, filepath.Join(dir, "passwd"), "root:x:0:0::/:\n+nis::::::\nbad\napp:x:12345:1::/:\nsecond:x:12345:1::/:\n"),
		GroupFile:  writeFile(t, filepath.Join(dir, "group"), "apps:x:777:a,b\nextra:x:888:\n"),
	}}
	caller := startChild(t, "drop 12345 777 888 999", nil).caller()
	caller.UID, caller.GID = 12345, 777 // as SO_PEERCRED would say
	b := bind(t, cfg, caller)
	want := []string{
		"unix:gid:777", "unix:group:apps", "unix:supplementary_gid:888", "unix:supplementary_gid:999",
		"unix:supplementary_group:extra", "unix:uid:12345", "unix:user:app",
	}
	if d := cmp.Diff(want, b.Selectors().Strings()); d != "" {
		t.Error(d)
	}
	if b.LimitKey() != "uid:12345" || b.InPod() || b.PodUID() != "" {
		t.Errorf("LimitKey %q, InPod %v, PodUID %q", b.LimitKey(), b.InPod(), b.PodUID())
	}
	if d := cmp.Diff([]string{"kernel"}, b.Witnesses()); d != "" {
		t.Error(d)
	}
}

func TestUnixPath(t *testing.T) {
	t.Parallel()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	hash := sha256.Sum256(data)
	sum := attest.MustSelector("unix:sha256:" + hex.EncodeToString(hash[:]))
	path := attest.MustSelector("unix:path:" + exe)
	c := startChild(t, "wait", nil)
	for _, tc := range []struct {
		name      string
		discover  bool
		limit     int64
		path, sum bool
	}{
		{"off", false, 0, false, false},
		{"no limit", true, 0, true, true},
		{"never", true, -1, true, false},
		{"just fits", true, int64(len(data)), true, true},
		{"too large", true, int64(len(data)) - 1, true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			b := bind(t, attest.Config{Mode: attest.ModeUnix, Unix: attest.UnixConfig{DiscoverPath: tc.discover, SizeLimit: tc.limit}}, c.caller())
			if b.Settled() == tc.discover {
				t.Errorf("Settled before Settle = %v", b.Settled())
			}
			got := b.Selectors() // settles
			if !b.Settled() {
				t.Error("Selectors did not settle")
			}
			if got.Contains(path) != tc.path || got.Contains(sum) != tc.sum {
				t.Errorf("selectors %v; want path %v, sha256 %v", got.Strings(), tc.path, tc.sum)
			}
			for s := range got.All() {
				if strings.HasPrefix(s.Value(), "sha256:") && !tc.sum {
					t.Errorf("unexpected %v", s)
				}
			}
		})
	}
}

// waitExe waits until the process executes another file.
func waitExe(t *testing.T, pid int, was string) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		if now, err := os.Readlink("/proc/" + itoa(pid) + "/exe"); err == nil && now != was {
			return
		}
		time.Sleep(time.Millisecond)
	}
	t.Fatal("the child never executed the other program")
}

// A process that executes another program after it was bound keeps what it was
// bound with, or loses everything; it never gets what the other would.
func TestExecSwap(t *testing.T) {
	t.Parallel()
	sleep, err := exec.LookPath("sleep")
	if err != nil {
		t.Skip("no sleep(1):", err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cfg := attest.Config{Mode: attest.ModeUnix, Unix: attest.UnixConfig{DiscoverPath: true}}

	t.Run("before the hash", func(t *testing.T) {
		t.Parallel()
		c := startChild(t, "exec "+sleep, nil)
		b := bind(t, cfg, c.caller())
		notified := 0
		defer b.Watch(func() { notified++ })()
		_, _ = c.in.Write([]byte("x"))
		waitExe(t, c.cmd.Process.Pid, exe)
		if err := b.Settle(context.Background()); !errors.Is(err, attest.ErrDenied) {
			t.Errorf("Settle: %v, want ErrDenied", err)
		}
		if !errors.Is(b.Err(), attest.ErrDenied) || b.Selectors().Len() != 0 || notified != 1 {
			t.Errorf("denied caller: Err %v, selectors %v, %d notifications", b.Err(), b.Selectors().Strings(), notified)
		}
		if err := b.Settle(context.Background()); !errors.Is(err, attest.ErrDenied) {
			t.Errorf("second Settle: %v, want ErrDenied", err)
		}
	})
	t.Run("after the hash", func(t *testing.T) {
		t.Parallel()
		c := startChild(t, "exec "+sleep, nil)
		b := bind(t, cfg, c.caller())
		before := b.Selectors().Strings()
		_, _ = c.in.Write([]byte("x"))
		waitExe(t, c.cmd.Process.Pid, exe)
		if d := cmp.Diff(before, b.Selectors().Strings()); d != "" {
			t.Error(d)
		}
		if !strings.Contains(strings.Join(before, " "), "unix:path:"+exe) {
			t.Errorf("selectors %v lack the path", before)
		}
	})
	t.Run("ends before the hash", func(t *testing.T) {
		t.Parallel()
		c := startChild(t, "wait", nil)
		b := bind(t, cfg, c.caller())
		c.kill()
		if err := b.Settle(context.Background()); !errors.Is(err, attest.ErrDenied) {
			t.Errorf("Settle: %v, want ErrDenied", err)
		}
		if b.Selectors().Len() != 0 {
			t.Errorf("selectors of a dead caller: %v", b.Selectors().Strings())
		}
	})
	t.Run("no time for the hash", func(t *testing.T) {
		t.Parallel()
		c := startChild(t, "wait", nil)
		b := bind(t, cfg, c.caller())
		ctx, cancel := context.WithCancel(context.Background())
		cancel()
		if err := b.Settle(ctx); !errors.Is(err, context.Canceled) || errors.Is(err, attest.ErrDenied) || b.Settled() {
			t.Errorf("Settle without time: %v, settled %v", err, b.Settled())
		}
		if err := b.Settle(context.Background()); err != nil || !b.Settled() {
			t.Errorf("Settle with time: %v, settled %v", err, b.Settled())
		}
	})
}

func TestBindRefuses(t *testing.T) {
	t.Parallel()
	a, err := attest.New(attest.Config{Mode: attest.ModeUnix})
	if err != nil {
		t.Fatal(err)
	}
	dead := startChild(t, "wait", nil)
	dead.kill()
	for name, c := range map[string]attest.Caller{
		"other PID namespace": {PID: 0, Process: alive{}},
		"not held":            {PID: 1},
		"dead":                dead.caller(),
		"negative":            {PID: -1, Process: alive{}},
	} {
		if b, err := a.Bind(context.Background(), c); !errors.Is(err, attest.ErrDenied) {
			t.Errorf("%s: %v, %v; want ErrDenied", name, b, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := a.Bind(ctx, attest.Caller{PID: 1, Process: alive{}}); !errors.Is(err, context.Canceled) || errors.Is(err, attest.ErrDenied) {
		t.Errorf("no time: %v", err)
	}
}

func TestMode(t *testing.T) {
	t.Parallel()
	inPod := "0::/kubepods/pod" + uidA + "/" + ctrA + "\n"
	for _, tc := range []struct {
		mode attest.Mode
		self string
		want attest.Mode
	}{
		{attest.ModeAuto, "0::/init.scope\n", attest.ModeUnix},
		{attest.ModeAuto, inPod, attest.ModeBoth},
		{attest.ModeUnix, inPod, attest.ModeUnix},
		{attest.ModeKubernetes, "0::/\n", attest.ModeKubernetes},
		{attest.ModeBoth, "0::/\n", attest.ModeBoth},
	} {
		a, err := attest.New(attest.Config{Mode: tc.mode, Proc: fakeProc(t, tc.self, nil)})
		if err != nil || a.Mode() != tc.want {
			t.Errorf("New(%q) in %q: %v, want %q", tc.mode, tc.self, err, tc.want)
		}
	}
	// A configuration that speaks of pods is no plain machine's.
	a, err := attest.New(attest.Config{KubeletCgroups: []string{"/x"}, Proc: fakeProc(t, "0::/\n", nil)})
	if err != nil || a.Mode() != attest.ModeBoth || len(a.KubeletCgroups()) != 1 {
		t.Errorf("New with a kubelet cgroup: mode %v, %v", a.Mode(), err)
	}
	if _, err := attest.New(attest.Config{Proc: fakeProc(t, "x", nil)}); err == nil {
		t.Error("a process that cannot tell where it is went on")
	}
	if _, err := attest.New(attest.Config{RequireLedger: true, Proc: fakeProc(t, "0::/\n", nil)}); err == nil {
		t.Error("a required ledger was forgotten")
	}
	if _, err := attest.New(attest.Config{Mode: "docker"}); err == nil {
		t.Error("unknown mode was accepted")
	}
	if _, err := attest.New(attest.Config{Mode: attest.ModeBoth, RequireLedger: true}); err == nil {
		t.Error("a required ledger that is not there was accepted")
	}
}

// crowded is a process in very many groups.
type crowded struct {
	alive
	n int
}

func (c crowded) Groups() ([]uint32, error) { return make([]uint32, c.n), nil }

// unsupported is a process of a kernel that does not tell groups.
type unsupported struct{ alive }

func (unsupported) Groups() ([]uint32, error) { return nil, errors.ErrUnsupported }

func TestGroups(t *testing.T) {
	t.Parallel()
	a, err := attest.New(attest.Config{Mode: attest.ModeUnix})
	if err != nil {
		t.Fatal(err)
	}
	zero := attest.MustSelector("unix:supplementary_gid:0")
	for _, tc := range []struct {
		name    string
		process attest.Process
		want    bool
	}{
		{"many", crowded{n: 512}, true},
		{"too many", crowded{n: 513}, false},
		{"none", alive{}, false},
	} {
		b, err := a.Bind(context.Background(), attest.Caller{PID: 1, Process: tc.process})
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		if got := b.Selectors().Contains(zero); got != tc.want {
			t.Errorf("%s: group 0 is there %v, want %v", tc.name, got, tc.want)
		}
	}
	if _, err := a.Bind(context.Background(), attest.Caller{PID: int32(os.Getpid()), Process: unsupported{}}); err != nil {
		t.Errorf("groups from /proc: %v", err)
	}
}
