package peersock_test

import (
	"context"
	"errors"
	"net"
	"os"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/peersock"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

func TestPeer(t *testing.T) {
	t.Parallel()
	bound := newSubject("pod")
	s := serve(t, peersock.Config{Bind: func(_ context.Context, c attest.Caller) (attest.Subject, error) {
		if int(c.PID) != os.Getpid() || int(c.UID) != os.Geteuid() || int(c.GID) != os.Getegid() {
			t.Errorf("caller %+v", c)
		}
		if err := c.Process.Alive(); err != nil {
			t.Error(err)
		}
		return bound, nil
	}})
	if s.Mode() != peersock.ModePidfd {
		t.Skip("this kernel has no SO_PEERPIDFD")
	}
	before := time.Now()
	client := s.dial(t)
	c := s.next(t)
	p := c.Peer()
	if p.ID() != 1 || p.Since().Before(before.Add(-time.Second)) || p.Since().After(time.Now()) {
		t.Errorf("ID %d, Since %v", p.ID(), p.Since())
	}
	if got, err := p.Subject(); got != attest.Subject(bound) || err != nil {
		t.Errorf("Subject = %v, %v", got, err)
	}
	if got := s.Connections(); !slices.Equal(got, []*peersock.Peer{p}) {
		t.Errorf("Connections = %v", got)
	}
	groups, err := p.Groups()
	want, _ := os.Getgroups()
	if err != nil || len(groups) != len(want) {
		t.Errorf("Groups = %v, %v; want %v", groups, err, want)
	}
	// Data still flows through it.
	go func() { _, _ = client.Write([]byte("x")) }()
	if n, err := c.Read(make([]byte, 2)); n != 1 || err != nil {
		t.Errorf("Read = %d, %v", n, err)
	}
	bound.deny()
	if got, err := p.Subject(); got != nil || !errors.Is(err, attest.ErrDenied) {
		t.Errorf("Subject of a denied caller = %v, %v", got, err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := c.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
	<-bound.closed
	if err := p.Alive(); !errors.Is(err, attest.ErrDenied) {
		t.Errorf("Alive after Close: %v", err)
	}
	if conns, users, keys := s.Counts(); conns+users+keys != 0 {
		t.Errorf("still counted: %d connections, %d users, %d keys", conns, users, keys)
	}
	wantClosed(t, client)
}

func TestPeerOfAnotherUser(t *testing.T) {
	t.Parallel()
	needRoot(t)
	s := serve(t, peersock.Config{})
	c := startChild(t, "drop 12345 777 888 999 "+s.path)
	p := s.next(t).Peer()
	caller := p.Caller()
	if int(caller.PID) != c.Process.Pid || caller.UID != 12345 || caller.GID != 777 {
		t.Errorf("caller %+v", caller)
	}
	if groups, err := p.Groups(); err != nil || !slices.Equal(groups, []uint32{888, 999}) {
		t.Errorf("Groups = %v, %v", groups, err)
	}
	if _, err := p.Subject(); !errors.Is(err, peersock.ErrNoSubject) {
		t.Errorf("Subject without Bind: %v", err)
	}
}

func TestCallerExits(t *testing.T) {
	t.Parallel()
	bound := newSubject("pod")
	s := serve(t, peersock.Config{Bind: func(context.Context, attest.Caller) (attest.Subject, error) { return bound, nil }})
	c := startChild(t, "connect "+s.path)
	conn := s.next(t)
	c.end()
	wantClosed(t, conn)
	<-bound.closed
	eventually(t, "counts are zero", func() bool { n, _, _ := s.Counts(); return n == 0 })
	if err := conn.Peer().Alive(); !errors.Is(err, attest.ErrDenied) {
		t.Errorf("Alive of a dead caller: %v", err)
	}
}

// The caller's child inherits the connection and outlives it.
func TestDescriptorInherited(t *testing.T) {
	t.Parallel()
	s := serve(t, peersock.Config{})
	c := startChild(t, "inherit "+s.path)
	conn := s.next(t)
	if int(conn.Peer().Caller().PID) != c.Process.Pid {
		t.Fatalf("caller %d, want %d", conn.Peer().Caller().PID, c.Process.Pid)
	}
	_ = c.Process.Kill()
	wantClosed(t, conn)
	if line, err := c.out.ReadString('\n'); line != "over <nil>\n" {
		t.Errorf("the heir says %q, %v; want the end of its connection", line, err)
	}
}

// The caller passes the connection to this process and ends.
func TestDescriptorPassed(t *testing.T) {
	t.Parallel()
	s := serve(t, peersock.Config{})
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "pair")
	c := startChild(t, "pass "+s.path, theirs)
	theirs.Close()
	defer unix.Close(pair[0])
	oob := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := unix.Recvmsg(pair[0], make([]byte, 1), oob, unix.MSG_CMSG_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		t.Fatal(err)
	}
	fds, err := unix.ParseUnixRights(&msgs[0])
	if err != nil {
		t.Fatal(err)
	}
	file := os.NewFile(uintptr(fds[0]), "passed")
	passed, err := net.FileConn(file)
	file.Close()
	if err != nil {
		t.Fatal(err)
	}
	defer passed.Close()
	conn := s.next(t)
	if int(conn.Peer().Caller().PID) != c.Process.Pid {
		t.Fatalf("caller %d, want %d", conn.Peer().Caller().PID, c.Process.Pid)
	}
	wantOpen(t, passed)
	c.end()
	wantClosed(t, passed)
}

// The process that connected is gone before the connection is accepted, its
// number perhaps another's, and somebody else holds the connection.
func TestCallerReplacedBeforeAccept(t *testing.T) {
	t.Parallel()
	s := unserved(t, peersock.Config{Bind: func(context.Context, attest.Caller) (attest.Subject, error) {
		t.Error("a dead caller was bound")
		return nil, attest.ErrDenied
	}})
	if s.Mode() != peersock.ModePidfd {
		t.Skip("this kernel has no SO_PEERPIDFD")
	}
	c := startChild(t, "inherit "+s.path)
	pid := c.Process.Pid
	_ = c.Process.Kill()
	_, _ = c.Process.Wait()
	reused := false
	if os.Geteuid() == 0 {
		for range 50 {
			if os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(itoa(pid-1)), 0) != nil {
				break
			}
			if victim := startChild(t, "sleep"); victim.Process.Pid == pid {
				reused = true
				break
			}
		}
	}
	t.Logf("process number %d given to another: %v", pid, reused)
	s.accept(t)
	if line, err := c.out.ReadString('\n'); line != "over <nil>\n" && line != "over read conn: connection reset by peer\n" {
		t.Errorf("the heir says %q, %v; want the end of its connection", line, err)
	}
	select {
	case got := <-s.conns:
		t.Errorf("accepted %+v", got.Peer().Caller())
	case <-time.After(20 * time.Millisecond):
	}
}

// Many connections: no goroutine and no descriptor remains, none is added.
func TestManyConnections(t *testing.T) {
	n := 1000
	s := serve(t, peersock.Config{Bind: func(context.Context, attest.Caller) (attest.Subject, error) {
		sub := newSubject("pod")
		sub.inPod = false
		return sub, nil
	}})
	s.dial(t).Close() // the first Accept has started
	s.next(t).Close()
	fds, goroutines := descriptors(t), runtime.NumGoroutine()
	clients, conns := make([]net.Conn, n), make([]net.Conn, n)
	for i := range clients {
		clients[i] = s.dial(t)
		conns[i] = s.next(t)
	}
	eventually(t, "binders end", func() bool { return runtime.NumGoroutine() <= goroutines })
	if got := descriptors(t) - fds; got != 3*n { // one of them is the client's
		t.Errorf("%d descriptors for %d connections, want two and the client's each", got, n)
	}
	for i := range clients {
		if i%2 == 0 {
			clients[i].Close()
		}
		conns[i].Close()
		clients[i].Close()
	}
	eventually(t, "descriptors are back", func() bool { return descriptors(t) <= fds })
	if got := s.Connections(); len(got) != 0 {
		t.Errorf("%d connections left", len(got))
	}
}

// The same with processes that exit.
func TestManyCallers(t *testing.T) {
	s := serve(t, peersock.Config{})
	fds := -1
	for range 20 {
		c := startChild(t, "connect "+s.path)
		conn := s.next(t)
		c.end()
		wantClosed(t, conn)
		if fds < 0 {
			fds = descriptors(t)
		}
	}
	eventually(t, "descriptors are back", func() bool { return descriptors(t) <= fds })
}

func TestClose(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	var binding atomic.Int64
	s := serve(t, peersock.Config{Bind: func(ctx context.Context, _ attest.Caller) (attest.Subject, error) {
		if binding.Add(1) == 1 {
			return newSubject("a"), nil
		}
		select {
		case <-ctx.Done():
		case <-release:
		}
		return newSubject("b"), nil
	}})
	child := startChild(t, "connect "+s.path)
	accepted := s.next(t)
	waiting := s.dial(t)
	eventually(t, "the second is being bound", func() bool { return binding.Load() == 2 })
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := s.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("second Close: %v", err)
	}
	close(release)
	wantClosed(t, waiting)
	// What was accepted lives on, and is still watched.
	wantOpen(t, accepted)
	child.end()
	wantClosed(t, accepted)
	if _, err := s.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
	eventually(t, "counts are zero", func() bool { n, _, _ := s.Counts(); return n == 0 })
}

func TestCloseUnserved(t *testing.T) {
	t.Parallel()
	s := unserved(t, peersock.Config{})
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := s.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Accept after Close: %v", err)
	}
}

// Connections come and go at once, while binds and settles run.
func TestConcurrently(t *testing.T) {
	t.Parallel()
	var n atomic.Int64
	s := serve(t, peersock.Config{MaxConnsPerKey: 20, BindParallel: 4, Bind: func(context.Context, attest.Caller) (attest.Subject, error) {
		switch i := n.Add(1); i % 4 {
		case 0:
			return nil, errors.New("not now")
		case 1:
			return nil, attest.ErrDenied
		case 2:
			return settling{newSubject("slow"), func(context.Context) error { runtime.Gosched(); return nil }}, nil
		default:
			return newSubject("fast"), nil
		}
	}})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			for i := range 100 {
				c, err := net.Dial("unix", s.path)
				if err != nil {
					t.Error(err)
					return
				}
				if i%3 == 0 {
					runtime.Gosched()
				}
				c.Close()
			}
		})
		wg.Go(func() {
			for range 50 {
				for _, p := range s.Connections() {
					_, _ = p.Subject()
					_ = p.Alive()
					_, _ = p.Groups()
				}
			}
		})
	}
	stop := make(chan struct{})
	closed := make(chan struct{})
	go func() {
		defer close(closed)
		for {
			select {
			case c := <-s.conns:
				c.Close()
			case <-stop:
				return
			}
		}
	}()
	wg.Wait()
	eventually(t, "all connections are gone", func() bool {
		conns, users, keys := s.Counts()
		return conns == 0 && users == 0 && keys == 0
	})
	close(stop)
	<-closed
}
