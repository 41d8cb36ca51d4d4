package peersock

import (
	"fmt"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// reaper watches all pidfds with one epoll descriptor that hangs itself in the
// runtime's poller: waiting costs one parked goroutine and no thread.
type reaper struct {
	fd   int
	file *os.File
	raw  syscall.RawConn
}

func newReaper() (*reaper, error) {
	fd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	file := os.NewFile(uintptr(fd), "epoll")
	raw, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("epoll: %w", err)
	}
	return &reaper{fd: fd, file: file, raw: raw}, nil
}

// add watches pidfd, which must be removed from epoll by closing it; id comes
// back from run.
func (r *reaper) add(pidfd int, id uint64) error {
	ev := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLONESHOT, Fd: int32(uint32(id)), Pad: int32(uint32(id >> 32))}
	if err := unix.EpollCtl(r.fd, unix.EPOLL_CTL_ADD, pidfd, &ev); err != nil {
		return os.NewSyscallError("epoll_ctl", err)
	}
	return nil
}

// run calls dead with the id of every process that ends, until close.
func (r *reaper) run(dead func(id uint64)) {
	var events [128]unix.EpollEvent
	for {
		n := 0
		err := r.raw.Read(func(fd uintptr) bool {
			var err error
			for {
				if n, err = unix.EpollWait(int(fd), events[:], 0); err != unix.EINTR {
					return err != nil || n > 0
				}
			}
		})
		if err != nil {
			return // closed
		}
		for _, ev := range events[:max(n, 0)] {
			dead(uint64(uint32(ev.Fd)) | uint64(uint32(ev.Pad))<<32)
		}
	}
}

func (r *reaper) close() { r.file.Close() }

// ended says whether the process behind pidfd has ended.
func ended(pidfd int) (bool, error) {
	fds := [1]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds[:], 0)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return false, os.NewSyscallError("poll", err)
		}
		return n > 0, nil
	}
}
