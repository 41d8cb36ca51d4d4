package mount

import (
	"errors"
	"fmt"
	"path"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	k8smount "k8s.io/mount-utils"
)

const (
	tablePath = "/proc/self/mountinfo"
	// deletedMark is what the kernel adds to the root of a mount whose
	// directory was removed.
	deletedMark = "//deleted"
)

// Entry is one mount of the table.
type Entry struct {
	MountPoint string
	// Root is the directory of the filesystem that is mounted.
	Root string
	// Deleted: that directory has no name any more.
	Deleted bool
	// Dev is the filesystem.
	Dev uint64
	id  int
}

// Table is the mount table at one moment, in the order of the kernel: of two
// mounts on one point the later is on top.
type Table []Entry

// ReadTable reads the whole mount table, which takes longer the more mounts
// there are: 15 ms for 10,000.
func ReadTable() (Table, error) {
	infos, err := k8smount.ParseMountInfo(tablePath)
	if err != nil {
		return nil, fmt.Errorf("read the mount table: %w", err)
	}
	out := make(Table, len(infos))
	for i := range infos {
		root, deleted := strings.CutSuffix(unescape(infos[i].Root), deletedMark)
		out[i] = Entry{
			MountPoint: unescape(infos[i].MountPoint),
			Root:       root,
			Deleted:    deleted,
			Dev:        unix.Mkdev(uint32(infos[i].Major), uint32(infos[i].Minor)),
			id:         infos[i].ID,
		}
	}
	return out, nil
}

// Of are the mounts of the source directory, alive or of an earlier directory
// that had its path.
func (t Table) Of(src *Source) (Table, error) {
	id, err := mountID(src.fd)
	if err != nil {
		return nil, err
	}
	resolved, err := filepath.EvalSymlinks(src.path)
	if err != nil {
		return nil, fmt.Errorf("resolve %s: %w", src.path, err)
	}
	var root string
	var dev uint64
	found := false
	for _, e := range t {
		if e.id != id {
			continue
		}
		rel, err := filepath.Rel(e.MountPoint, resolved)
		if err != nil || rel == ".." || strings.HasPrefix(rel, "../") {
			return nil, fmt.Errorf("the mount table shows %s below %s: it changed meanwhile", src.path, e.MountPoint)
		}
		root, dev, found = path.Join(e.Root, rel), e.Dev, true
	}
	if !found {
		return nil, fmt.Errorf("the mount table does not show what %s is on", src.path)
	}
	var out Table
	for _, e := range t {
		if e.Dev == dev && e.Root == root && e.MountPoint != resolved {
			out = append(out, e)
		}
	}
	return out, nil
}

// At are the mounts on one point, the topmost last.
func (t Table) At(point string) Table {
	var out Table
	for _, e := range t {
		if e.MountPoint == point {
			out = append(out, e)
		}
	}
	return out
}

// Corrupted says that an error of [Target.Look] comes from a mount whose
// filesystem no longer answers, rather than from a missing name.
func Corrupted(err error) bool {
	// mount-utils looks at the errno inside os's own error types only.
	var errno unix.Errno
	return errors.As(err, &errno) && k8smount.IsCorruptedMnt(errno)
}

// unescape undoes the octal escapes of the mount table: space, tab, newline,
// backslash and hash.
func unescape(s string) string {
	if !strings.Contains(s, `\`) {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) && isOctal(s[i+1]) && isOctal(s[i+2]) && isOctal(s[i+3]) {
			b.WriteByte((s[i+1]-'0')<<6 | (s[i+2]-'0')<<3 | (s[i+3] - '0'))
			i += 3
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

func isOctal(c byte) bool { return c >= '0' && c <= '7' }
