package mount

import "golang.org/x/sys/unix"

// WalkBeneath is the step-by-step way for kernels without openat2.
func WalkBeneath(root, rel string) error {
	top, err := open(unix.AT_FDCWD, root, unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer unix.Close(top)
	fd, err := walkBeneath(top, rel)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// BindClassic is Bind for kernels without mount_setattr.
func (t *Target) BindClassic(src *Source, o Options) error { return t.bindClassic(src, o) }

// IsMountRoot is Look for kernels whose statx does not tell mount roots.
func (t *Target) IsMountRoot() (bool, error) { return isMountRoot(t.parent, t.name) }

// Unescape undoes the escapes of the mount table.
func Unescape(s string) string { return unescape(s) }
