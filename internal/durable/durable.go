// Package durable writes files and directories so that they survive a crash.
//
// Promise: when WriteFile returns nil, the new content is on the disk under
// its name, whatever happens next. When it returns an error, the old content is
// there, whole; only if the last step failed, the new one is, and may not
// survive a power failure. No reader ever sees a part of either.
//
// The syscalls of WriteFile, in order: openat(O_EXCL) of a temporary file in
// the same directory, fchmod, write, fsync, close, rename, and fsync of the
// directory. Leaving out the first fsync can leave an empty file after a power
// failure; leaving out the last can leave the old one.
//
// Threat: state directories hold private keys. OwnerDir refuses a directory
// that somebody else owns or may look into, rather than repairing it quietly:
// whoever could look in may have looked already.
package durable

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// tempPattern names temporary files; a crash may leave one behind and
// RemoveTemp clears it.
const tempPattern = ".%s.tmp-"

// WriteFile replaces the content of path by data, atomically and durably. The
// file gets exactly perm, whatever the umask. An existing symbolic link is
// replaced, not followed. Concurrent calls are safe; the last rename wins.
func WriteFile(path string, data []byte, perm fs.FileMode) (err error) {
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	// CreateTemp opens with O_EXCL and 0600, so that a secret is never
	// readable by others, not even between creation and Chmod.
	f, err := os.CreateTemp(dir, fmt.Sprintf(tempPattern, base)+"*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("write %s: %w", path, err), ignoreClosed(f.Close()), ignoreMissing(os.Remove(f.Name())))
		}
	}()
	if err = f.Chmod(perm); err != nil {
		return err
	}
	if _, err = f.Write(data); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return err
	}
	return SyncDir(dir)
}

// Remove deletes path and makes the deletion durable. A missing file is not
// an error.
func Remove(path string) error {
	if err := os.Remove(path); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return SyncDir(filepath.Dir(path))
}

// RemoveTemp deletes what interrupted calls of WriteFile for path left behind.
// It must not run beside a WriteFile for the same path.
func RemoveTemp(path string) error {
	dir, base := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("clean up after %s: %w", path, err)
	}
	prefix := fmt.Sprintf(tempPattern, base)
	var errs []error
	for _, e := range entries {
		if name := e.Name(); len(name) > len(prefix) && name[:len(prefix)] == prefix && e.Type().IsRegular() {
			errs = append(errs, ignoreMissing(os.Remove(filepath.Join(dir, name))))
		}
	}
	return errors.Join(errs...)
}

// SyncDir makes the names in dir durable.
func SyncDir(dir string) (err error) {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}

func ignoreMissing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func ignoreClosed(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}
