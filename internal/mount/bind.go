package mount

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Source is the directory to bind, held by descriptor: what is bound is what
// was looked at. Safe for concurrent use until Close.
type Source struct {
	fd      int
	path    string
	id      FileID
	deleted bool
	copies  *Copies
}

// OpenSource opens the directory; symbolic links on the way are followed, the
// path is the operator's.
func OpenSource(path string) (*Source, error) {
	fd, err := open(unix.AT_FDCWD, path, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return newSource(fd, path)
}

// OpenMounted opens the directory that is mounted on the target, as a source
// to look into.
func (t *Target) OpenMounted() (*Source, error) {
	fd, err := open(t.parent, t.name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", t.path, err)
	}
	return newSource(fd, t.path)
}

func newSource(fd int, path string) (*Source, error) {
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, lookMask, &st); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("look at %s: %w", path, err)
	}
	return &Source{fd: fd, path: path, id: idOf(&st), deleted: st.Nlink == 0}, nil
}

// Path is the path the source was opened by.
func (s *Source) Path() string { return s.path }

// ID is the directory's identity, the same that a target shows when it is
// bound there.
func (s *Source) ID() FileID { return s.id }

// Deleted says that the directory had no name any more when it was opened:
// what is mounted at the path is a directory somebody removed.
func (s *Source) Deleted() bool { return s.deleted }

// Statfs are the figures of the filesystem the directory is on.
func (s *Source) Statfs() (unix.Statfs_t, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(s.fd, &st); err != nil {
		return st, fmt.Errorf("read the figures of the filesystem of %s: %w", s.path, err)
	}
	return st, nil
}

// ProcPath is a short path to the directory that holds while it is open.
func (s *Source) ProcPath() string { return procPath(s.fd) }

// Close lets go of the directory.
func (s *Source) Close() {
	unix.Close(s.fd)
	s.fd = -1
}

// Options are the attributes of a new mount besides those that every mount
// gets: nosuid, nodev and noexec, none of which matters to a socket.
type Options struct {
	// ReadOnly makes the mount itself read-only. Sockets in it can still be
	// connected to.
	ReadOnly bool
}

func (o Options) attrs() uint64 {
	a := uint64(unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC)
	if o.ReadOnly {
		a |= unix.MOUNT_ATTR_RDONLY
	}
	return a
}

// Bind mounts the source on the target's directory, not recursively. The mount
// appears with all its attributes or not at all. Mounting on a mount stacks:
// callers look first, under [Target.Lock].
func (t *Target) Bind(src *Source, o Options) error {
	err := t.attach(src, o)
	if errors.Is(err, unix.ENOSYS) {
		err = t.bindClassic(src, o)
	}
	if err != nil {
		return fmt.Errorf("bind %s on %s: %w", src.path, t.path, err)
	}
	st, err := look(t.parent, t.name)
	if err != nil {
		return fmt.Errorf("look at the new mount on %s: %w", t.path, err)
	}
	if st.Kind != Mounted || st.ID != src.id {
		return fmt.Errorf("bind %s on %s: the kernel made a mount but the name leads elsewhere (%s)", src.path, t.path, st.Kind)
	}
	return nil
}

// attach makes the mount off to the side and moves it into place.
func (t *Target) attach(src *Source, o Options) error {
	tree, err := src.copyMount(o)
	if err != nil {
		return err
	}
	defer unix.Close(tree)
	return unix.MoveMount(tree, "", t.parent, t.name, unix.MOVE_MOUNT_F_EMPTY_PATH)
}

// bindClassic is for kernels without mount_setattr (before 5.12). The target
// is opened first, so that a link put in its place is not followed.
func (t *Target) bindClassic(src *Source, o Options) error {
	fd, err := open(t.parent, t.name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return err
	}
	at := procPath(fd)
	err = unix.Mount(procPath(src.fd), at, "", unix.MS_BIND, "")
	unix.Close(fd)
	if err != nil {
		return err
	}
	flags := uintptr(unix.MS_BIND | unix.MS_REMOUNT | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if o.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount("", procPath(t.parent)+"/"+t.name, "", flags, ""); err != nil {
		_, undo := t.Unmount()
		return errors.Join(err, undo)
	}
	return nil
}
