package peersock

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// Conn is a connection whose peer is known. It has the methods of a net.Conn
// and no others: gRPC asks whoever offers a descriptor for options that TCP has,
// and keeps the answers.
type Conn struct {
	net.Conn // a *net.UnixConn
	peer     Peer
}

// Peer is who is at the other end.
func (c *Conn) Peer() *Peer { return &c.peer }

// Close ends the connection and everything kept for it. It may be called more
// than once.
func (c *Conn) Close() error { return c.peer.close() }

// Peer is the process at the other end of a connection, held by a pidfd for as
// long as the connection is open. It is the connection's gRPC AuthInfo and the
// attest.Process of its caller. Safe for concurrent use.
type Peer struct {
	l     *Listener
	conn  *Conn
	id    uint64
	since int64 // nanoseconds since 1970
	pid   int32
	uid   uint32
	gid   uint32

	mu      sync.Mutex
	pidfd   int32
	state   state
	handed  bool // delivered to Accept
	pending bool // Bind is queued or running
	failed  int64
	subject attest.Subject
	err     error  // why there is no subject
	key     string // what the connection is counted as; "" not yet
}

type state uint8

const (
	stateOpen state = iota
	stateClosed
)

var _ attest.Credentialed = (*Peer)(nil)

// ID is the connection's number, unique in its Listener and rising.
func (p *Peer) ID() uint64 { return p.id }

// Since is when the connection was accepted.
func (p *Peer) Since() time.Time { return time.Unix(0, p.since) }

// Caller is the peer as the attestor wants it.
func (p *Peer) Caller() attest.Caller {
	return attest.Caller{PID: p.pid, UID: p.uid, GID: p.gid, Process: p}
}

// rebindAfter is how long a failure of Bind that may pass is answered before
// Bind is tried again, in nanoseconds.
const rebindAfter = int64(250 * time.Millisecond)

// Subject is the bound caller: the same value for the life of the connection.
// An error that wraps attest.ErrDenied is final; any other may pass, and the
// caller is bound again in the background.
func (p *Peer) Subject() (attest.Subject, error) {
	p.mu.Lock()
	subject, err := p.subject, p.err
	again := subject == nil && !p.pending && p.state == stateOpen &&
		!errors.Is(err, attest.ErrDenied) && !errors.Is(err, ErrNoSubject) &&
		time.Now().UnixNano()-p.failed >= rebindAfter
	if again {
		p.pending = true
	}
	p.mu.Unlock()
	if again {
		p.l.enqueue(p.conn)
	}
	if subject == nil {
		return nil, err
	}
	if err := attest.Denied(subject); err != nil {
		return nil, err
	}
	return subject, nil
}

// Alive is nil while the process that called connect(2) runs and the
// connection is open.
func (p *Peer) Alive() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.state != stateOpen {
		return fmt.Errorf("%w: the caller's connection has ended", attest.ErrDenied)
	}
	dead, err := ended(int(p.pidfd))
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", attest.ErrDenied, err)
	case dead:
		return fmt.Errorf("%w: the calling process %d has ended", attest.ErrDenied, p.pid)
	}
	return nil
}

// Groups are the supplementary groups the process had at connect(2).
func (p *Peer) Groups() ([]uint32, error) {
	raw, err := p.conn.Conn.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, err
	}
	var groups []uint32
	var opErr error
	err = raw.Control(func(fd uintptr) { groups, opErr = peerGroups(int(fd)) })
	if err = errors.Join(err, opErr); err != nil {
		return nil, err
	}
	return groups, nil
}

// peerGroups is getsockopt(SO_PEERGROUPS), Linux 4.13.
func peerGroups(fd int) ([]uint32, error) {
	var few [32]uint32
	list := few[:]
	for {
		size := uint32(len(list) * 4)
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.SOL_SOCKET, unix.SO_PEERGROUPS,
			uintptr(unsafe.Pointer(&list[0])), uintptr(unsafe.Pointer(&size)), 0)
		switch {
		case errno == 0 && size == 0:
			return nil, nil
		case errno == 0:
			return append([]uint32(nil), list[:size/4]...), nil
		case errno == unix.ERANGE && int(size) > len(list)*4:
			list = make([]uint32, size/4)
		case errno == unix.ENOPROTOOPT:
			return nil, fmt.Errorf("getsockopt SO_PEERGROUPS: %w: %w", errno, errors.ErrUnsupported)
		default:
			return nil, os.NewSyscallError("getsockopt SO_PEERGROUPS", errno)
		}
	}
}

// close is Conn.Close.
func (p *Peer) close() error {
	p.mu.Lock()
	if p.state == stateClosed {
		p.mu.Unlock()
		return net.ErrClosed
	}
	p.state = stateClosed
	subject := p.subject
	unix.Close(int(p.pidfd)) // leaves epoll with it
	p.mu.Unlock()
	closeSubject(subject)
	err := p.conn.Conn.Close()
	p.l.forget(p)
	return err
}

func closeSubject(s attest.Subject) {
	switch s := s.(type) {
	case interface{ Close() }:
		s.Close()
	case io.Closer:
		s.Close()
	}
}
