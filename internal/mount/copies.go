package mount

import (
	"errors"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// Copies keeps one copy of a source's mount off to the side, to make further
// copies from. To copy a mount the kernel looks at everything that is mounted
// on it, which takes long if the source is a directory of the root file system
// or of /run; nothing is mounted on the copy. Kernels before 6.15 do not copy
// copies: there every copy is made from the source. The zero value is ready and
// serves one source at a time. Safe for concurrent use.
type Copies struct {
	mu   sync.Mutex
	id   FileID
	o    Options
	tree *os.File
	off  bool
}

// UseCopies makes binds of the source go through c.
func (s *Source) UseCopies(c *Copies) { s.copies = c }

// copyMount is a new mount of the source that is attached nowhere yet.
func (s *Source) copyMount(o Options) (int, error) {
	if s.copies != nil {
		if fd, ok := s.copies.next(s, o); ok {
			return fd, nil
		}
	}
	return copyMount(s.fd, o)
}

// next is a copy of the copy; ok is false where it must be made from the
// source.
func (c *Copies) next(s *Source, o Options) (fd int, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.off {
		return -1, false
	}
	// The copy holds the directory, so its ID cannot become another's.
	if c.tree == nil || c.id != s.id || c.o != o {
		c.drop()
		tree, err := copyMount(s.fd, o)
		if err != nil {
			return -1, false
		}
		c.tree, c.id, c.o = os.NewFile(uintptr(tree), s.path), s.id, o
	}
	fd, err := openTreeCopy(int(c.tree.Fd()))
	if err != nil {
		c.off = errors.Is(err, unix.EINVAL)
		c.drop()
		return -1, false
	}
	return fd, true
}

func (c *Copies) drop() {
	if c.tree != nil {
		_ = c.tree.Close()
		c.tree = nil
	}
}

// copyMount copies the mount of an open directory, with the directory as its
// root.
//
// The copy is private before it is attached: a member of the source's peer
// group would multiply with every bind where source and target are both shared
// (kind nodes). Attached below a shared mount it becomes a group of its own,
// so that it still reaches the host.
func copyMount(fd int, o Options) (int, error) {
	tree, err := openTreeCopy(fd)
	if err != nil {
		return -1, err
	}
	attr := unix.MountAttr{Attr_set: o.attrs(), Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(tree)
		return -1, err
	}
	return tree, nil
}

func openTreeCopy(fd int) (int, error) {
	return unix.OpenTree(fd, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
}
