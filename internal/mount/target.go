package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ErrSymlink says that a path below the trusted root leads through a symbolic
// link, or ends in one.
var ErrSymlink = errors.New("is or leads through a symbolic link")

// Kind is what a target is at the moment.
type Kind int

// The kinds of target.
const (
	Absent    Kind = iota // nothing has this name
	Directory             // a directory on which nothing is mounted
	Mounted               // the root of a mount
	Other                 // a file, a symbolic link or another stranger
)

// String is the kind in a word.
func (k Kind) String() string {
	return [...]string{"absent", "directory", "mounted", "other"}[k]
}

// FileID identifies a file while anything holds it.
type FileID struct {
	Dev uint64
	Ino uint64
}

// State is what [Target.Look] saw.
type State struct {
	Kind Kind
	// ID is the file that has the name, on top of whatever is mounted there.
	ID FileID
	// Deleted: the directory that is mounted here has no name any more.
	Deleted bool
}

// Target is a name in a directory below a trusted root. The directory is held
// by descriptor until Close. A Target is for one goroutine.
type Target struct {
	parent int
	lock   int
	name   string
	path   string
}

// OpenTarget walks from root, which may be a symbolic link, along rel, which
// must be clean, relative and without "..", to the directory that holds the
// last element of rel. Nothing of rel may be a symbolic link: that is
// [ErrSymlink]. A missing directory on the way is [os.ErrNotExist].
func OpenTarget(root, rel string) (*Target, error) {
	if !path.IsAbs(root) {
		return nil, fmt.Errorf("root %q of a mount target is not an absolute path", root)
	}
	if rel == "" || rel == "." || path.IsAbs(rel) || path.Clean(rel) != rel || rel == ".." || strings.HasPrefix(rel, "../") || strings.ContainsRune(rel, 0) {
		return nil, fmt.Errorf("mount target %q is not a clean path below its root", rel)
	}
	full := path.Join(root, rel)
	top, err := open(unix.AT_FDCWD, root, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", root, err)
	}
	defer unix.Close(top)
	dir, name := path.Split(rel)
	parent, err := openBeneath(top, path.Clean(dir))
	if err != nil {
		return nil, fmt.Errorf("open the directory of %s: %w", full, err)
	}
	return &Target{parent: parent, lock: -1, name: name, path: full}, nil
}

// Path is the target's path, for messages and records.
func (t *Target) Path() string { return t.path }

// Close lets go of the directory and of the lock, if it is held.
func (t *Target) Close() {
	if t.lock >= 0 {
		unix.Close(t.lock)
		t.lock = -1
	}
	if t.parent >= 0 {
		unix.Close(t.parent)
		t.parent = -1
	}
}

// lockPoll is how often a lock that another process holds is tried again.
const lockPoll = 5 * time.Millisecond

// Lock keeps other processes that use this package away from the names in the
// target's directory until Close. Those of the same process wait too. It ends
// with the context's error.
func (t *Target) Lock(ctx context.Context) error {
	if t.lock >= 0 {
		return nil
	}
	fd, err := open(t.parent, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return fmt.Errorf("lock the directory of %s: %w", t.path, err)
	}
	var again *time.Timer
	for {
		err = unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			t.lock = fd
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			unix.Close(fd)
			return fmt.Errorf("lock the directory of %s: %w", t.path, err)
		}
		if again == nil {
			again = time.NewTimer(lockPoll)
			defer again.Stop()
		} else {
			again.Reset(lockPoll)
		}
		select {
		case <-ctx.Done():
			unix.Close(fd)
			return fmt.Errorf("lock the directory of %s, which another process uses: %w", t.path, ctx.Err())
		case <-again.C:
		}
	}
}

// Look says what has the target's name now.
func (t *Target) Look() (State, error) {
	st, err := look(t.parent, t.name)
	if err != nil {
		return State{}, fmt.Errorf("look at %s: %w", t.path, err)
	}
	return st, nil
}

// Mkdir makes the directory with mode perm, less the umask. That it exists
// is [os.ErrExist].
func (t *Target) Mkdir(perm uint32) error {
	if err := unix.Mkdirat(t.parent, t.name, perm); err != nil {
		return fmt.Errorf("make directory %s: %w", t.path, err)
	}
	return nil
}

// Rmdir removes the directory if it is empty and nothing is mounted on it. It
// never removes anything but a directory. That it is gone is no error.
func (t *Target) Rmdir() error {
	err := unix.Unlinkat(t.parent, t.name, unix.AT_REMOVEDIR)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove directory %s: %w", t.path, err)
	}
	return nil
}

// Unmount takes the topmost mount off the target. A mount that somebody has a
// file open in is detached and ends when they are done: the directory holds
// sockets, so there is nothing to lose. lazy says that this happened. That
// nothing is mounted is unix.EINVAL.
func (t *Target) Unmount() (lazy bool, err error) {
	p := procPath(t.parent) + "/" + t.name
	err = unix.Unmount(p, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EBUSY) {
		lazy = true
		err = unix.Unmount(p, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH)
	}
	if err != nil {
		return false, fmt.Errorf("unmount %s: %w", t.path, err)
	}
	return lazy, nil
}

// procPath names an open descriptor so that calls which take no descriptor can
// use it.
func procPath(fd int) string { return "/proc/self/fd/" + strconv.Itoa(fd) }

// open is openat(2) that survives signals and never leaks into a child.
func open(dir int, name string, flags int) (int, error) {
	for {
		fd, err := unix.Openat(dir, name, flags|unix.O_CLOEXEC, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// openBeneath opens a directory by a clean relative path without following
// symbolic links: in one call where the kernel can (5.6), else step by step.
func openBeneath(top int, rel string) (int, error) {
	how := unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	}
	for {
		fd, err := unix.Openat2(top, rel, &how)
		switch {
		case err == nil:
			return fd, nil
		case errors.Is(err, unix.EINTR), errors.Is(err, unix.EAGAIN):
			continue
		case errors.Is(err, unix.ELOOP):
			return -1, ErrSymlink
		case errors.Is(err, unix.ENOSYS):
			return walkBeneath(top, rel)
		}
		return -1, err
	}
}

// walkBeneath is openBeneath for kernels without openat2.
func walkBeneath(top int, rel string) (int, error) {
	at, err := open(top, ".", unix.O_PATH|unix.O_DIRECTORY)
	if err != nil || rel == "." {
		return at, err
	}
	for name := range strings.SplitSeq(rel, "/") {
		next, err := open(at, name, unix.O_PATH|unix.O_NOFOLLOW)
		if err == nil {
			var st unix.Stat_t
			if err = unix.Fstat(next, &st); err == nil {
				switch st.Mode & unix.S_IFMT {
				case unix.S_IFDIR:
				case unix.S_IFLNK:
					err = ErrSymlink
				default:
					err = unix.ENOTDIR
				}
			}
			if err != nil {
				unix.Close(next)
			}
		}
		unix.Close(at)
		if err != nil {
			return -1, err
		}
		at = next
	}
	return at, nil
}

// isNotExist keeps os out of the callers' way.
func isNotExist(err error) bool { return errors.Is(err, os.ErrNotExist) }
