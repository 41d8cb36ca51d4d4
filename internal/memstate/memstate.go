// Package memstate keeps one file with secrets on a filesystem in memory, for a
// process that is restarted.
//
// It promises that what Read returns is what the last Write was given, whole,
// and that nothing is written where it could reach a disk. The file is readable
// by its owner only, and so is its directory; what it holds is in no error.
//
// Threats: a directory on a disk, or open to others, is refused; a file of
// another version, cut short or altered by accident is told by its header and
// checksum. There is no defence against who may write the file: that is the
// owner, who holds the secrets anyway.
package memstate

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/durable"
)

var (
	// ErrOnDisk refuses a directory that is not in memory.
	ErrOnDisk = errors.New("private keys must not reach a disk")
	// ErrUnusable says that a file is none this version can read.
	ErrUnusable = errors.New("not a state this version reads")
	// ErrOthers says that a file was left by the same program for somebody
	// else's secrets; it has been removed.
	ErrOthers = errors.New("the state was somebody else's")
)

// Config describes a file.
type Config struct {
	Dir    string // owner-only, on tmpfs; made if missing
	Name   string // of the file
	Header string // what the file is and its version, such as "spiffe-node agent 1 "
	Limit  int64  // bytes; a larger file is not ours
	// Of is whose secrets they are, one line, such as the address of who gave
	// them: a file that says something else is removed, unread. "" = it does not
	// matter.
	Of string
	// AnyFilesystem is for tests that have no tmpfs.
	AnyFilesystem bool
}

// File is one file. Not safe for concurrent use.
type File struct {
	path string
	cfg  Config
}

// Open checks that secrets may be put into the directory.
func Open(cfg Config) (*File, error) {
	if err := durable.OwnerDir(cfg.Dir); err != nil {
		return nil, err
	}
	if !cfg.AnyFilesystem {
		if err := checkMemory(cfg.Dir); err != nil {
			return nil, err
		}
	}
	f := &File{path: filepath.Join(cfg.Dir, cfg.Name), cfg: cfg}
	if err := durable.RemoveTemp(f.path); err != nil {
		return nil, err
	}
	return f, nil
}

func checkMemory(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("statfs %s: %w", dir, err)
	}
	switch uint32(st.Type) {
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		return nil
	}
	return fmt.Errorf("%w: %s is on a filesystem of type %#x, not tmpfs; "+
		"set --state-dir (identity.stateDirectory) to a directory on tmpfs such as /run/spiffe-node/state, or to nothing to keep no restart state",
		ErrOnDisk, dir, uint32(st.Type))
}

// Write replaces the file and erases body.
func (f *File) Write(body []byte) error {
	if f.cfg.Of != "" {
		marked := append(fmt.Appendf(make([]byte, 0, len(mark)+len(f.cfg.Of)+1+len(body)), "%s%s\n", mark, f.cfg.Of), body...)
		clear(body)
		body = marked
	}
	data := Seal(f.cfg.Header, body)
	clear(body)
	defer clear(data)
	return durable.WriteFile(f.path, data, 0o600)
}

// mark is before the name of an owner. No body begins like that: they are JSON.
const mark = "of "

// Read is the body that was written last; the error wraps fs.ErrNotExist if
// there is none, ErrOthers if there was one of somebody else. Erase it after use.
func (f *File) Read() ([]byte, error) {
	info, err := os.Lstat(f.path)
	if err != nil {
		return nil, err
	}
	if err := durable.CheckOwnerFile(f.path); err != nil {
		return nil, err
	}
	if info.Size() > f.cfg.Limit {
		return nil, fmt.Errorf("%w: the file has %d bytes, more than %d", ErrUnusable, info.Size(), f.cfg.Limit)
	}
	data, err := os.ReadFile(f.path)
	if err != nil {
		return nil, err
	}
	body, err := Unseal(f.cfg.Header, data)
	if err != nil {
		clear(data)
		return nil, err
	}
	marked, isMarked := bytes.CutPrefix(body, []byte(mark))
	if !isMarked {
		return body, nil
	}
	of, body, _ := bytes.Cut(marked, []byte("\n"))
	if f.cfg.Of != "" && string(of) != f.cfg.Of {
		err := fmt.Errorf("%w: %q", ErrOthers, of)
		clear(data)
		return nil, errors.Join(err, os.Remove(f.path))
	}
	return body, nil
}

// SetAside renames a file that cannot be used; the result is its new name.
func (f *File) SetAside() (string, error) {
	bad := f.path + ".bad"
	return bad, os.Rename(f.path, bad)
}

// Seal puts header and checksum before a body:
//
//	HEADER<sha256 of the body, hex>\nBODY
func Seal(header string, body []byte) []byte {
	return append(fmt.Appendf(make([]byte, 0, len(body)+len(header)+sha256.Size*2+1), "%s%x\n", header, sha256.Sum256(body)), body...)
}

// Unseal is the body of what Seal made; it shares data's memory.
func Unseal(header string, data []byte) ([]byte, error) {
	head, body, ok := bytes.Cut(data, []byte("\n"))
	sum, isOurs := bytes.CutPrefix(head, []byte(header))
	if !ok || !isOurs {
		return nil, fmt.Errorf("%w: it does not start with %q", ErrUnusable, header)
	}
	if string(sum) != fmt.Sprintf("%x", sha256.Sum256(body)) {
		return nil, fmt.Errorf("%w: the checksum does not match, the file was cut or changed", ErrUnusable)
	}
	return body, nil
}
