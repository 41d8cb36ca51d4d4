package procfs

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

// maxFile is the most that is read of one file, in bytes: twelve cgroup
// hierarchies of PATH_MAX, and room for the longest list of groups (65,536).
const maxFile = 1 << 20

// ErrTooLong is returned for a file longer than any the kernel writes.
var ErrTooLong = errors.New("longer than the kernel writes it")

// FS is a /proc. It holds no descriptor. Safe for concurrent use.
type FS struct {
	root string
}

// New returns the /proc mounted at root; "" means /proc.
func New(root string) *FS {
	if root == "" {
		root = "/proc"
	}
	return &FS{root: root}
}

// Root is the directory the files are read from.
func (f *FS) Root() string { return f.root }

// Self stands for the reading process in every method that takes a number.
const Self = -1

func (f *FS) path(pid int, name string) string {
	var b [96]byte
	p := append(b[:0], f.root...)
	p = append(p, '/')
	if pid == Self {
		p = append(p, "self"...)
	} else {
		p = strconv.AppendInt(p, int64(pid), 10)
	}
	p = append(p, '/')
	return string(append(p, name...))
}

var buffers = sync.Pool{New: func() any { b := make([]byte, 4096); return &b }}

// read calls use with the contents of one file of the process; use must not
// keep the bytes. A process that is gone is os.ErrNotExist.
func (f *FS) read(pid int, name string, use func([]byte) error) error {
	path := f.path(pid, name)
	fd, err := open(path, unix.O_RDONLY)
	if err != nil {
		return gone(&os.PathError{Op: "open", Path: path, Err: err})
	}
	defer unix.Close(fd)
	pooled := buffers.Get().(*[]byte)
	defer buffers.Put(pooled)
	buf, err := readAll(fd, (*pooled)[:0])
	if err != nil {
		return gone(&os.PathError{Op: "read", Path: path, Err: err})
	}
	if cap(buf) <= 64<<10 {
		*pooled = buf[:0]
	}
	if err := use(buf); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func readAll(fd int, buf []byte) ([]byte, error) {
	for {
		if len(buf) > maxFile {
			return nil, ErrTooLong
		}
		if len(buf) == cap(buf) {
			buf = append(buf, make([]byte, max(cap(buf), 512))...)[:len(buf)]
		}
		n, err := unix.Read(fd, buf[len(buf):cap(buf)])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return nil, err
		case n <= 0:
			return buf, nil
		}
		buf = buf[:len(buf)+n]
	}
}

// gone makes the two ways in which the kernel says that a process has ended
// answer to os.ErrNotExist.
func gone(err error) error {
	if errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("%w: %w", err, os.ErrNotExist)
	}
	return err
}

func open(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
		if err != unix.EINTR {
			return fd, err
		}
	}
}

func readlink(path string) (string, error) {
	var buf [unix.PathMax + 64]byte
	for {
		n, err := unix.Readlink(path, buf[:])
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return "", gone(&os.PathError{Op: "readlink", Path: path, Err: err})
		case n >= len(buf):
			return "", &os.PathError{Op: "readlink", Path: path, Err: ErrTooLong}
		}
		return string(buf[:n]), nil
	}
}
