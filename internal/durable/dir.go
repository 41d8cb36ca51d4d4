package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// ErrNotPrivate says that a directory or file meant for secrets can be reached
// by others.
var ErrNotPrivate = errors.New("not private")

// MkdirAll creates dir and its missing parents with perm (less the umask) and
// makes each new name durable. Existing directories are left as they are.
func MkdirAll(dir string, perm fs.FileMode) error {
	dir = filepath.Clean(dir)
	info, err := os.Stat(dir)
	switch {
	case err == nil && info.IsDir():
		return nil
	case err == nil:
		return fmt.Errorf("make directory %s: %w", dir, syscall.ENOTDIR)
	case !errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("make directory %s: %w", dir, err)
	}
	parent := filepath.Dir(dir)
	if parent != dir {
		if err := MkdirAll(parent, perm); err != nil {
			return err
		}
	}
	if err := os.Mkdir(dir, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make directory %s: %w", dir, err)
	}
	return SyncDir(parent)
}

// OwnerDir makes sure that dir is a directory, not a symbolic link, that
// belongs to this process's user and is closed to everybody else. A missing
// one is created with mode 0700 (its parents with 0755). An existing one that
// is open to others is refused with ErrNotPrivate and left as it is.
func OwnerDir(dir string) error {
	dir = filepath.Clean(dir)
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		if err := MkdirAll(filepath.Dir(dir), 0o755); err != nil {
			return err
		}
		if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("make directory %s: %w", dir, err)
		}
		if err := SyncDir(filepath.Dir(dir)); err != nil {
			return err
		}
	}
	return CheckOwnerDir(dir)
}

// CheckOwnerDir is OwnerDir without the creation.
func CheckOwnerDir(dir string) error {
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("check directory %s: %w", dir, err)
	}
	if !info.IsDir() {
		return fmt.Errorf("check directory %s: %w", dir, syscall.ENOTDIR)
	}
	return checkPrivate(dir, info, "chmod 0700")
}

// CheckOwnerFile says whether path is a regular file that belongs to this
// process's user and is closed to everybody else; otherwise the error wraps
// ErrNotPrivate.
func CheckOwnerFile(path string) error {
	info, err := os.Lstat(path)
	if err != nil {
		return fmt.Errorf("check file %s: %w", path, err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("check file %s: %w: it is no regular file but %s", path, ErrNotPrivate, info.Mode().Type())
	}
	return checkPrivate(path, info, "chmod 0600")
}

func checkPrivate(path string, info fs.FileInfo, remedy string) error {
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s is %w: it belongs to uid %d, this process runs as uid %d; chown it or choose another path",
			path, ErrNotPrivate, st.Uid, os.Geteuid())
	}
	if open := info.Mode().Perm() & 0o077; open != 0 {
		return fmt.Errorf("%s is %w: mode %#o lets others in; %s it after checking who could read it",
			path, ErrNotPrivate, info.Mode().Perm(), remedy)
	}
	return nil
}
