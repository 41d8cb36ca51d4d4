package peersock

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/procfs"
)

// probe decides, once, how peers are identified. Only the kernel's answer that
// it does not know SO_PEERPIDFD leads to the fallback.
func (s *sys) probe() (mode string, err error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return "", os.NewSyscallError("socketpair", err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	pidfd, err := s.peerpid(pair[0])
	switch {
	case err == nil:
		unix.Close(pidfd)
		return ModePidfd, nil
	case errors.Is(err, unix.ENOPROTOOPT):
		return ModeFallback, nil
	}
	return "", fmt.Errorf("find out whether the kernel has SO_PEERPIDFD: %w", os.NewSyscallError("getsockopt", err))
}

// refusal is an error with the reason it is counted under.
type refusal struct {
	reason string
	err    error
}

func (r *refusal) Error() string { return r.err.Error() }
func (r *refusal) Unwrap() error { return r.err }

// identify asks the kernel who connected and takes hold of that process. The
// pidfd is the caller's to close.
func (l *Listener) identify(conn *net.UnixConn) (cred unix.Ucred, pidfd int, err error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return cred, -1, &refusal{reasonUnknown, err}
	}
	pidfd = -1
	ctlErr := raw.Control(func(fd uintptr) {
		var c *unix.Ucred
		if c, err = l.cfg.sys.peercred(int(fd)); err != nil {
			err = &refusal{reasonUnknown, os.NewSyscallError("getsockopt SO_PEERCRED", err)}
			return
		}
		cred = *c
		if cred.Pid <= 0 {
			err = &refusal{reasonNamespace, errOtherNamespace}
			return
		}
		if l.mode == ModePidfd {
			if pidfd, err = l.cfg.sys.peerpid(int(fd)); err != nil {
				err = refusedPidfd("getsockopt SO_PEERPIDFD", err)
			}
			return
		}
		pidfd, err = l.fallback(cred)
	})
	if err == nil && ctlErr != nil {
		err = &refusal{reasonUnknown, ctlErr}
	}
	if err == nil {
		var dead bool
		if dead, err = ended(pidfd); dead {
			err = &refusal{reasonDead, errEnded}
		} else if err != nil {
			err = &refusal{reasonUnknown, err}
		}
	}
	if err != nil && pidfd >= 0 {
		unix.Close(pidfd)
		pidfd = -1
	}
	return cred, pidfd, err
}

var (
	errOtherNamespace = errors.New("the caller is outside this process's PID namespace, so nothing can be known of it; " +
		"run the agent in the host's PID namespace (hostPID)")
	errEnded = errors.New("the calling process ended before its connection was accepted")
)

// refusedPidfd tells a caller that is gone (what kernels before 6.16 say of a
// reaped one) from other failures.
func refusedPidfd(op string, err error) *refusal {
	reason := reasonUnknown
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENODATA) || errors.Is(err, os.ErrNotExist) {
		reason = reasonDead
	}
	return &refusal{reason, os.NewSyscallError(op, err)}
}

// fallback takes hold of the process that has the recorded number now. It is
// the one that connected unless that one has ended and its number was given
// away before the accept. The start time, read before and after, closes the
// gap around pidfd_open; the user must be the recorded one.
func (l *Listener) fallback(cred unix.Ucred) (int, error) {
	pid := int(cred.Pid)
	before, err := l.proc.StartTime(pid)
	if err != nil {
		return -1, refusedPidfd("start time", err)
	}
	pidfd, err := l.cfg.sys.open(pid)
	if err != nil {
		return -1, refusedPidfd("pidfd_open", err)
	}
	after, err := l.proc.StartTime(pid)
	if err == nil && before != after {
		err = &refusal{reasonDead, errEnded}
	}
	var status procfs.Status
	if err == nil {
		status, err = l.proc.Status(pid)
	}
	if err == nil && status.UID != cred.Uid {
		err = &refusal{reasonUnknown, fmt.Errorf("process %d runs as user %d but user %d connected", pid, status.UID, cred.Uid)}
	}
	if err != nil {
		unix.Close(pidfd)
		if r := (*refusal)(nil); errors.As(err, &r) {
			return -1, r
		}
		return -1, refusedPidfd("identify", err)
	}
	return pidfd, nil
}
