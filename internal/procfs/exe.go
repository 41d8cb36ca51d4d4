package procfs

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// ExeID tells two executables, and two contents of one, apart.
type ExeID struct {
	Dev, Ino     uint64
	Size         uint64 // bytes
	Mtime, Ctime int64  // nanoseconds since 1970
}

// Exe is a hold on the file a process executes. The file stays the same when
// the process executes another one or when its path is given to another file.
// Safe for concurrent use until Close.
type Exe struct {
	fd   int
	path string
	id   ExeID
}

// OpenExe takes hold of the executable of a process. It neither opens nor
// reads the file, so that a file system which the caller serves (FUSE) cannot
// make it wait. It needs the rights of ptrace(2) over the process:
// os.ErrPermission without them, os.ErrNotExist when the process has ended or
// is a kernel thread.
func (f *FS) OpenExe(pid int) (*Exe, error) {
	link := f.path(pid, "exe")
	fd, err := open(link, unix.O_PATH)
	if err != nil {
		return nil, gone(&os.PathError{Op: "open", Path: link, Err: err})
	}
	e := &Exe{fd: fd}
	// The path comes from the descriptor, not from a second look at the
	// process, which might execute something else in between.
	if e.path, err = readlink("/proc/self/fd/" + strconv.Itoa(fd)); err == nil {
		e.id, err = identify(fd)
	}
	if err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("executable of process %d: %w", pid, err)
	}
	return e, nil
}

func identify(fd int) (ExeID, error) {
	var st unix.Statx_t
	const want = unix.STATX_INO | unix.STATX_SIZE | unix.STATX_MTIME | unix.STATX_CTIME
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, want, &st); err != nil {
		return ExeID{}, os.NewSyscallError("statx", err)
	}
	return ExeID{
		Dev:   unix.Mkdev(st.Dev_major, st.Dev_minor),
		Ino:   st.Ino,
		Size:  st.Size,
		Mtime: st.Mtime.Sec*1e9 + int64(st.Mtime.Nsec),
		Ctime: st.Ctime.Sec*1e9 + int64(st.Ctime.Nsec),
	}, nil
}

// Path is the path of the file as the kernel tells it: in the mount namespace
// of the process, with " (deleted)" behind it when it has been removed.
func (e *Exe) Path() string { return e.path }

// ID is the file's identity when it was taken hold of.
func (e *Exe) ID() ExeID { return e.id }

// Same says whether both are one file, reached by one path.
func (e *Exe) Same(o *Exe) bool {
	return e.id.Dev == o.id.Dev && e.id.Ino == o.id.Ino && e.path == o.path
}

// Open opens the held file for reading; it may wait for the file system.
func (e *Exe) Open() (io.ReadCloser, error) {
	// #nosec G304 -- a descriptor of our own
	return os.Open("/proc/self/fd/" + strconv.Itoa(e.fd))
}

// Close lets go of the file. It must be called once.
func (e *Exe) Close() error { return unix.Close(e.fd) }

// Namespace is the inode number of one of the process's namespaces: "pid",
// "cgroup", "mnt" and so on, see namespaces(7). Other users' processes need
// the rights of ptrace(2).
func (f *FS) Namespace(pid int, kind string) (uint64, error) {
	path := f.path(pid, "ns/"+kind)
	text, err := readlink(path)
	if err != nil {
		return 0, err
	}
	inner, ok := strings.CutPrefix(text, kind+":[")
	inner, closed := strings.CutSuffix(inner, "]")
	n, err := strconv.ParseUint(inner, 10, 64)
	if !ok || !closed || err != nil {
		return 0, fmt.Errorf("%s: %w: %q names no namespace", path, ErrMalformed, text)
	}
	return n, nil
}

// The numbers the kernel gives the initial namespaces (include/linux/nsfs.h,
// formerly proc_ns.h).
const (
	InitialCgroupNamespace uint64 = 0xEFFFFFFB
	InitialPIDNamespace    uint64 = 0xEFFFFFFC
)
