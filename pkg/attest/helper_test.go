package attest_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// childEnv makes the test binary another process: what it is, and its argument.
const childEnv = "ATTEST_TEST_CHILD"

func TestMain(m *testing.M) {
	what, arg, _ := strings.Cut(os.Getenv(childEnv), " ")
	switch what {
	case "":
		os.Exit(m.Run())
	case "wait":
		fmt.Println("ready")
		_, _ = io.Copy(io.Discard, os.Stdin)
	case "drop": // gives up root for a user, a group and further groups
		ids := make([]int, 0, 4)
		for f := range strings.FieldsSeq(arg) {
			n, _ := strconv.Atoi(f)
			ids = append(ids, n)
		}
		if err := errors.Join(syscall.Setgroups(ids[2:]), syscall.Setgid(ids[1]), syscall.Setuid(ids[0])); err != nil {
			fmt.Println(err)
			return
		}
		fmt.Println("ready")
		_, _ = io.Copy(io.Discard, os.Stdin)
	case "exec": // executes arg at the first byte on stdin
		fmt.Println("ready")
		_, _ = os.Stdin.Read(make([]byte, 1))
		fmt.Fprintln(os.Stderr, syscall.Exec(arg, []string{arg, "60"}, nil))
	case "namespaced":
		inNamespace(arg)
	}
	os.Exit(0)
}

// child is another process, held by a pidfd.
type child struct {
	cmd   *exec.Cmd
	in    io.WriteCloser
	out   *bufio.Reader
	pidfd int
}

func (c *child) Alive() error {
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(c.pidfd), Events: unix.POLLIN}}, 0)
	if err != nil || n > 0 {
		return fmt.Errorf("%w: ended (%w)", attest.ErrDenied, errors.Join(err, errEnded))
	}
	return nil
}

func (c *child) caller() attest.Caller {
	return attest.Caller{PID: int32(c.cmd.Process.Pid), Process: c}
}

func startChild(tb testing.TB, what string, attr *syscall.SysProcAttr) *child {
	tb.Helper()
	exe, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	return startProgram(tb, exe, what, attr)
}

func startProgram(tb testing.TB, exe, what string, attr *syscall.SysProcAttr) *child {
	tb.Helper()
	c := &child{cmd: exec.Command(exe)}
	c.cmd.Env = append(os.Environ(), childEnv+"="+what)
	c.cmd.SysProcAttr = attr
	c.cmd.Stderr = os.Stderr
	c.in, _ = c.cmd.StdinPipe()
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	c.out = bufio.NewReader(out)
	if err := c.cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	if c.pidfd, err = unix.PidfdOpen(c.cmd.Process.Pid, 0); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		c.kill()
		unix.Close(c.pidfd)
	})
	if line, err := c.out.ReadString('\n'); err != nil || line != "ready\n" {
		tb.Fatalf("child says %q, %v", line, err)
	}
	return c
}

func (c *child) kill() {
	_ = c.cmd.Process.Kill()
	_ = c.cmd.Wait()
}

func needRoot(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("needs root")
	}
}

var errEnded = errors.New("process ended")

// alive is a process that never ends.
type alive struct{}

func (alive) Alive() error              { return nil }
func (alive) Groups() ([]uint32, error) { return nil, nil }

// fakeProc is a /proc in which process numbers have the given cgroup files and
// this process is in the host's cgroup namespace.
func fakeProc(tb testing.TB, self string, cgroups map[int]string) string {
	tb.Helper()
	root := tb.TempDir()
	write := func(pid, text string) {
		tb.Helper()
		if err := os.MkdirAll(filepath.Join(root, pid, "ns"), 0o700); err != nil {
			tb.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, pid, "cgroup"), []byte(text), 0o600); err != nil {
			tb.Fatal(err)
		}
	}
	write("self", self)
	if err := os.Symlink("cgroup:[4026531835]", filepath.Join(root, "self", "ns", "cgroup")); err != nil {
		tb.Fatal(err)
	}
	for pid, text := range cgroups {
		write(strconv.Itoa(pid), text)
	}
	return root
}

// source is a PodSource under the test's control. It notifies with its lock
// held, which a source may.
type source struct {
	mu      sync.Mutex
	pods    map[string]attest.Pod
	ctrs    map[string]attest.Container
	watches map[int]func()
	next    int
	asked   atomic.Int64
}

func (s *source) Pod(uid string) (attest.Pod, bool) {
	s.asked.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	p, ok := s.pods[uid]
	return p, ok
}

func (s *source) Container(uid, id string) (attest.Container, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.ctrs[uid+"/"+id]
	return c, ok
}

func (s *source) Watch(_ string, notify func()) func() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.watches == nil {
		s.watches = make(map[int]func())
	}
	s.next++
	id := s.next
	s.watches[id] = notify
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.watches, id)
	}
}

func (s *source) set(uid string, p *attest.Pod) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.pods == nil {
		s.pods = make(map[string]attest.Pod)
	}
	if p == nil {
		delete(s.pods, uid)
	} else {
		s.pods[uid] = *p
	}
	for _, notify := range s.watches {
		notify()
	}
}

func (s *source) watching() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.watches)
}
