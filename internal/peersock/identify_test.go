package peersock_test

import (
	"bufio"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/peersock"
)

func oldKernel(int) (int, error) { return -1, unix.ENOPROTOOPT }

// A kernel that does not know SO_PEERPIDFD leads to the fallback, which is
// visible and still ends connections with their caller.
func TestFallback(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	reg := prometheus.NewRegistry()
	s := serve(t, peersock.WithKernel(peersock.Config{
		Logger: slog.New(slog.NewTextHandler(&log, nil)), Metrics: peersock.NewMetrics(reg),
	}, peersock.Kernel{Peerpid: oldKernel}))
	if s.Mode() != peersock.ModeFallback {
		t.Fatalf("Mode = %q", s.Mode())
	}
	if log.count("SO_PEERPIDFD") != 1 {
		t.Error("the fallback is not logged")
	}
	families, _ := reg.Gather()
	seen := false
	for _, f := range families {
		seen = seen || f.GetName() == "spiffe_node_peer_identification_info" && f.GetMetric()[0].GetLabel()[0].GetValue() == "fallback"
	}
	if !seen {
		t.Error("the fallback is in no metric")
	}
	c := startChild(t, "connect "+s.path)
	conn := s.next(t)
	if int(conn.Peer().Caller().PID) != c.Process.Pid {
		t.Errorf("caller %+v", conn.Peer().Caller())
	}
	c.end()
	wantClosed(t, conn)
}

// What the fallback sees wrong, it refuses.
func TestFallbackRefuses(t *testing.T) {
	t.Parallel()
	me := &unix.Ucred{Pid: int32(os.Getpid()), Uid: uint32(os.Geteuid()), Gid: uint32(os.Getegid())}
	other := *me
	other.Uid = 54321
	stat := func(start string) string {
		return "1 (x) S 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 " + start + " 0\n"
	}
	status := "Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t\n"
	fake := t.TempDir()
	dir := filepath.Join(fake, itoa(os.Getpid()))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Error(err)
		}
	}
	write("status", status)
	write("stat", stat("100"))
	for _, tc := range []struct {
		name, reason, proc string
		kernel             peersock.Kernel
	}{
		{"gone", "caller_dead", "", peersock.Kernel{Open: func(int) (int, error) { return -1, unix.ESRCH }}},
		{"another user", "not_identified", "", peersock.Kernel{Peercred: func(int) (*unix.Ucred, error) { return &other, nil }}},
		{"no proc", "caller_dead", "/nonexistent", peersock.Kernel{}},
		{"no descriptors", "not_identified", "", peersock.Kernel{Open: func(int) (int, error) { return -1, unix.EMFILE }}},
		{"started meanwhile", "caller_dead", fake, peersock.Kernel{Open: func(pid int) (int, error) {
			write("stat", stat("101"))
			return unix.PidfdOpen(pid, 0)
		}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.kernel.Peerpid = oldKernel
			reg := prometheus.NewRegistry()
			s := serve(t, peersock.WithKernel(peersock.Config{Proc: tc.proc, Metrics: peersock.NewMetrics(reg)}, tc.kernel))
			wantClosed(t, s.dial(t))
			eventually(t, "the refusal is counted", func() bool { return refused(t, reg, tc.reason) == 1 })
		})
	}
}

// On a kernel that knows SO_PEERPIDFD, no error leads to the fallback.
func TestNoSilentFallback(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, reason string
		err          error
	}{
		{"unknown option, all of a sudden", "not_identified", unix.ENOPROTOOPT},
		{"no rights", "not_identified", unix.EPERM},
		{"no descriptors", "not_identified", unix.EMFILE},
		{"invalid", "not_identified", unix.EINVAL},
		{"reaped", "caller_dead", unix.ESRCH},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			calls := 0
			reg := prometheus.NewRegistry()
			s := serve(t, peersock.WithKernel(peersock.Config{Metrics: peersock.NewMetrics(reg)}, peersock.Kernel{
				Peerpid: func(int) (int, error) {
					if calls++; calls > 1 {
						return -1, tc.err
					}
					return unix.PidfdOpen(os.Getpid(), 0) // for the probe
				},
				Open: func(int) (int, error) { t.Error("fell back"); return -1, unix.ESRCH },
			}))
			if s.Mode() != peersock.ModePidfd {
				t.Errorf("Mode = %q", s.Mode())
			}
			wantClosed(t, s.dial(t))
			eventually(t, "the refusal is counted", func() bool { return refused(t, reg, tc.reason) == 1 })
		})
	}
	path := socketPath(t)
	if _, err := peersock.Listen(path, peersock.WithKernel(peersock.Config{}, peersock.Kernel{
		Peerpid: func(int) (int, error) { return -1, unix.EPERM },
	})); !errors.Is(err, unix.EPERM) {
		t.Errorf("Listen on a kernel that refuses to say: %v", err)
	}
}

func TestOtherNamespace(t *testing.T) {
	t.Parallel()
	var log lockedBuffer
	reg := prometheus.NewRegistry()
	s := serve(t, peersock.WithKernel(peersock.Config{
		Metrics: peersock.NewMetrics(reg), Logger: slog.New(slog.NewTextHandler(&log, nil)),
	}, peersock.Kernel{
		Peercred: func(int) (*unix.Ucred, error) { return &unix.Ucred{Pid: 0}, nil },
	}))
	wantClosed(t, s.dial(t))
	eventually(t, "the refusal is counted", func() bool { return refused(t, reg, "other_pid_namespace") == 1 })
	if log.count("hostPID") != 1 {
		t.Error("the log does not say what to do")
	}
}

// Out of descriptors for a moment: the listener goes on.
func TestAcceptFails(t *testing.T) {
	t.Parallel()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socketPath(t), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	p, err := peersock.New(l, peersock.Config{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	l.Close() // behind its back
	if _, err := p.Accept(); err == nil {
		t.Error("Accept on a closed socket succeeded")
	}
}

func TestHostPIDNamespace(t *testing.T) {
	t.Parallel()
	if ok, err := peersock.HostPIDNamespace(""); err != nil {
		t.Error(ok, err)
	}
	const (
		inner   = "pid:[4026532000]"
		initial = "pid:[4026531836]"
		ctr     = "/kubepods/pod1/"
	)
	for _, tc := range []struct {
		name, ns, nspid, self, init string
		want                        bool
	}{
		{"initial", initial, "7", "0::/\n", "0::/init.scope\n", true},
		{"first of its own", inner, "1", "0::/\n", "0::/\n", false},
		{"pod's sandbox is first", inner, "7", "0::" + ctr + "a\n", "0::" + ctr + "b\n", false},
		{"pod's sandbox is first, own cgroup namespace", inner, "7", "0::/\n", "0::/../b\n", false},
		{"our own container's first", inner, "7", "0::" + ctr + "a\n", "0::" + ctr + "a\n", false},
		{"our own container's first, own cgroup namespace", inner, "7", "0::/\n", "0::/\n", false},
		{"kind", inner, "70", "0::/kubelet/kubepods/pod1/a\n", "0::/init.scope\n", true},
		{"kind, own cgroup namespace", inner, "70", "0::/\n", "0::/../../../../init.scope\n", true},
		{"kind, v1", inner, "70", "4:pids:/docker/x/kubepods/pod1/a\n0::/\n", "4:pids:/docker/x\n0::/\n", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			proc := t.TempDir()
			for pid, cgroup := range map[string]string{"self": tc.self, "1": tc.init} {
				if err := os.MkdirAll(filepath.Join(proc, pid, "ns"), 0o700); err != nil {
					t.Fatal(err)
				}
				status := "NSpid:\t" + tc.nspid + "\nUid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t\n"
				for name, text := range map[string]string{"cgroup": cgroup, "status": status} {
					if err := os.WriteFile(filepath.Join(proc, pid, name), []byte(text), 0o600); err != nil {
						t.Fatal(err)
					}
				}
				if err := os.Symlink(tc.ns, filepath.Join(proc, pid, "ns", "pid")); err != nil {
					t.Fatal(err)
				}
			}
			if got, err := peersock.HostPIDNamespace(proc); err != nil || got != tc.want {
				t.Errorf("HostPIDNamespace = %v, %v; want %v", got, err, tc.want)
			}
		})
	}
}

// A listener in a PID namespace of its own, and a caller outside: the kernel
// says 0.
func TestRealNamespace(t *testing.T) {
	t.Parallel()
	needRoot(t)
	path := socketPath(t)
	cmd := self("serve " + path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Skip("no PID namespace:", err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	lines := bufio.NewScanner(out)
	want := func(part string) {
		t.Helper()
		for lines.Scan() {
			if strings.Contains(lines.Text(), part) {
				return
			}
			if strings.Contains(lines.Text(), "accepted") {
				t.Error("a caller nobody knows was accepted")
			}
		}
		t.Fatalf("never said %q: %v", part, lines.Err())
	}
	want("in the host's PID namespace: false")
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	wantClosed(t, c)
	want("reason=other_pid_namespace")
}
