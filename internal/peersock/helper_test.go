package peersock_test

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/peersock"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// childEnv makes the test binary another process: what it is, and its argument.
const childEnv = "PEERSOCK_TEST_CHILD"

func TestMain(m *testing.M) {
	what, arg, _ := strings.Cut(os.Getenv(childEnv), " ")
	if what == "" {
		goleak.VerifyTestMain(m)
		return
	}
	if err := beChild(what, arg); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	os.Exit(0)
}

// beChild is what a child process does. Each says "ready" and its process
// number once it has connected.
func beChild(what, arg string) error {
	ready := func() { fmt.Println("ready", os.Getpid()) }
	rest := func() { _, _ = io.Copy(io.Discard, os.Stdin) }
	switch what {
	case "connect": // until stdin ends
		conn, err := net.Dial("unix", arg)
		if err != nil {
			return err
		}
		defer conn.Close()
		ready()
		rest()
	case "drop": // connects as another user
		var uid, gid, g1, g2 int
		var path string
		if _, err := fmt.Sscan(arg, &uid, &gid, &g1, &g2, &path); err != nil {
			return err
		}
		if err := errors.Join(syscall.Setgroups([]int{g1, g2}), syscall.Setgid(gid), syscall.Setuid(uid)); err != nil {
			return err
		}
		conn, err := net.Dial("unix", path)
		if err != nil {
			return err
		}
		defer conn.Close()
		ready()
		rest()
	case "inherit": // connects and gives the connection to a child of its own, then waits for stdin to end
		fd, err := dialFD(arg)
		if err != nil {
			return err
		}
		heir := self("hold")
		heir.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "conn")}
		heir.Stdout = os.Stdout
		if err := heir.Start(); err != nil {
			return err
		}
		rest()
	case "hold": // holds descriptor 3 until the other end closes it
		ready()
		_, err := io.Copy(io.Discard, os.NewFile(3, "conn"))
		fmt.Println("over", err)
	case "pass": // connects and passes the connection on descriptor 3, then waits for stdin to end
		fd, err := dialFD(arg)
		if err != nil {
			return err
		}
		if err := unix.Sendmsg(3, []byte("x"), unix.UnixRights(fd), nil, 0); err != nil {
			return err
		}
		ready()
		rest()
	case "exec": // connects, and executes another program once stdin says so
		if _, err := dialFD(arg); err != nil { // not closed on exec
			return err
		}
		ready()
		_, _ = os.Stdin.Read(make([]byte, 1))
		sleep, err := exec.LookPath("sleep")
		if err != nil {
			return err
		}
		return syscall.Exec(sleep, []string{"sleep", "60"}, nil)
	case "serve": // listens, and says why it refuses whom
		l, err := peersock.Listen(arg, peersock.Config{Logger: slog.New(slog.NewTextHandler(os.Stdout, nil))})
		if err != nil {
			return err
		}
		host, err := peersock.HostPIDNamespace("")
		if err != nil {
			return err
		}
		fmt.Println("in the host's PID namespace:", host)
		for {
			if _, err := l.Accept(); err != nil {
				return err
			}
			fmt.Println("accepted")
		}
	case "sleep":
		ready()
		rest()
	}
	return nil
}

func dialFD(path string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		return -1, err
	}
	return fd, unix.Connect(fd, &unix.SockaddrUnix{Name: path})
}

func self(what string) *exec.Cmd {
	exe, err := os.Executable()
	if err != nil {
		panic(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), childEnv+"="+what)
	cmd.Stderr = os.Stderr
	return cmd
}

type child struct {
	*exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startChild(tb testing.TB, what string, files ...*os.File) *child {
	tb.Helper()
	c := &child{Cmd: self(what)}
	c.ExtraFiles = files
	c.in, _ = c.StdinPipe()
	out, err := c.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	c.out = bufio.NewReader(out)
	if err := c.Start(); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(c.end)
	if line, err := c.out.ReadString('\n'); err != nil || !strings.HasPrefix(line, "ready ") {
		tb.Fatalf("child %q says %q, %v", what, line, err)
	}
	return c
}

// end kills the child and reaps it.
func (c *child) end() {
	_ = c.Process.Kill()
	_ = c.Wait()
}

// subject is a bound caller.
type subject struct {
	attest.Subject
	key    string
	inPod  bool
	closed chan struct{}
	mu     sync.Mutex
	err    error
}

func newSubject(key string) *subject {
	return &subject{key: key, inPod: true, closed: make(chan struct{})}
}

func (s *subject) LimitKey() string { return s.key }
func (s *subject) InPod() bool      { return s.inPod }
func (s *subject) Close()           { close(s.closed) }

func (s *subject) Err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.err
}

func (s *subject) deny() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = attest.ErrDenied
}

func socketPath(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "peersock") //nolint:usetesting // short enough for a socket, open to other users
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		tb.Fatal(err)
	}
	return filepath.Join(dir, "s")
}

// server accepts everything a Listener returns.
type server struct {
	*peersock.Listener
	path  string
	conns chan *peersock.Conn
	end   error // of Accept, once conns is closed
}

func serve(tb testing.TB, cfg peersock.Config) *server {
	tb.Helper()
	s := unserved(tb, cfg)
	s.accept(tb)
	return s
}

// unserved listens but accepts nothing yet.
func unserved(tb testing.TB, cfg peersock.Config) *server {
	tb.Helper()
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	path := socketPath(tb)
	l, err := peersock.Listen(path, cfg)
	if err != nil {
		tb.Fatal(err)
	}
	if err := os.Chmod(path, 0o777); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { l.Close() })
	return &server{Listener: l, path: path, conns: make(chan *peersock.Conn, 4096)}
}

func (s *server) accept(tb testing.TB) {
	tb.Helper()
	go func() {
		defer close(s.conns)
		for {
			c, err := s.Accept()
			if err != nil {
				s.end = err
				return
			}
			s.conns <- c.(*peersock.Conn)
		}
	}()
	tb.Cleanup(func() {
		s.Close()
		for c := range s.conns {
			c.Close()
		}
	})
}

func (s *server) next(tb testing.TB) *peersock.Conn {
	tb.Helper()
	select {
	case c, ok := <-s.conns:
		if !ok {
			tb.Fatal("the listener has ended:", s.end)
		}
		tb.Cleanup(func() { c.Close() })
		return c
	case <-time.After(10 * time.Second):
		tb.Fatal("no connection was accepted")
	}
	return nil
}

func (s *server) dial(tb testing.TB) net.Conn {
	tb.Helper()
	c, err := net.Dial("unix", s.path)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { c.Close() })
	return c
}

// wantClosed waits until the other end has closed c.
func wantClosed(tb testing.TB, c net.Conn) {
	tb.Helper()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	n, err := c.Read(make([]byte, 1))
	if n != 0 || err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		tb.Fatalf("the connection is open: read %d, %v", n, err)
	}
}

// wantOpen makes sure that the other end keeps c open for a moment.
func wantOpen(tb testing.TB, c net.Conn) {
	tb.Helper()
	_ = c.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
	if n, err := c.Read(make([]byte, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		tb.Fatalf("the connection is closed: read %d, %v", n, err)
	}
	_ = c.SetReadDeadline(time.Time{})
}

func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	deadline := time.Now().Add(10 * time.Second)
	for !ok() {
		if time.Now().After(deadline) {
			tb.Fatal("never happened: " + what)
		}
		time.Sleep(time.Millisecond)
	}
}

func needRoot(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("needs root")
	}
}

func descriptors(tb testing.TB) int {
	tb.Helper()
	list, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		tb.Fatal(err)
	}
	return len(list)
}

func itoa(n int) string { return strconv.Itoa(n) }
