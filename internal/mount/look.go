package mount

import (
	"bufio"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const lookMask = unix.STATX_TYPE | unix.STATX_INO | unix.STATX_NLINK | unix.STATX_MNT_ID

// look asks the kernel about one name; no other mount is looked at.
func look(dir int, name string) (State, error) {
	var st unix.Statx_t
	err := unix.Statx(dir, name, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, lookMask, &st)
	switch {
	case isNotExist(err):
		return State{Kind: Absent}, nil
	case err != nil:
		return State{}, err
	case uint32(st.Mode)&unix.S_IFMT != unix.S_IFDIR:
		return State{Kind: Other, ID: idOf(&st)}, nil
	}
	out := State{Kind: Directory, ID: idOf(&st), Deleted: st.Nlink == 0}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT != 0 {
		if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0 {
			out.Kind = Mounted
		}
		return out, nil
	}
	root, err := isMountRoot(dir, name)
	if err != nil {
		return State{}, err
	}
	if root {
		out.Kind = Mounted
	}
	return out, nil
}

func idOf(st *unix.Statx_t) FileID {
	return FileID{Dev: unix.Mkdev(st.Dev_major, st.Dev_minor), Ino: st.Ino}
}

// isMountRoot is for kernels whose statx does not tell mount roots (before
// 5.8): a directory on another mount than its parent is one.
func isMountRoot(dir int, name string) (bool, error) {
	fd, err := open(dir, name, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	in, err := mountID(dir)
	if err != nil {
		return false, err
	}
	of, err := mountID(fd)
	if err != nil {
		return false, err
	}
	return in != of, nil
}

// mountID is the number, in the first column of the mount table, of the mount
// that an open file is on.
func mountID(fd int) (int, error) {
	f, err := os.Open("/proc/self/fdinfo/" + strconv.Itoa(fd))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		if v, ok := strings.CutPrefix(lines.Text(), "mnt_id:"); ok {
			return strconv.Atoi(strings.TrimSpace(v))
		}
	}
	return 0, fmt.Errorf("the kernel names no mount for an open file in %s", f.Name())
}
