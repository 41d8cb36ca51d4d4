package durable_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"testing"

	"github.com/spiffe-node/spiffe-node/internal/durable"
)

func TestWriteFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	for i, perm := range []fs.FileMode{0o600, 0o644, 0o400} {
		want := []byte(strconv.Itoa(i))
		if err := durable.WriteFile(path, want, perm); err != nil {
			t.Fatal(err)
		}
		wantContent(t, path, want)
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != perm {
			t.Errorf("mode %v, want %v", info.Mode().Perm(), perm)
		}
	}
	wantNames(t, dir, "f")
}

func TestWriteFileReplacesSymlink(t *testing.T) {
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	if err := os.WriteFile(victim, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(victim, link); err != nil {
		t.Fatal(err)
	}
	if err := durable.WriteFile(link, []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantContent(t, victim, []byte("mine"))
	wantContent(t, link, []byte("new"))
}

func TestWriteFileConcurrent(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "f")
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			data := bytes.Repeat([]byte{byte('a' + i)}, 4096)
			for range 10 {
				if err := durable.WriteFile(path, data, 0o600); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 4096 || len(bytes.Trim(got, string(got[:1]))) != 0 {
		t.Error("content of two writers mixed")
	}
	wantNames(t, dir, "f")
}

func TestWriteFileMissingDirectory(t *testing.T) {
	err := durable.WriteFile(filepath.Join(t.TempDir(), "no", "f"), nil, 0o600)
	if !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

func TestWriteFileTargetIsDirectory(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "d")
	if err := os.MkdirAll(filepath.Join(path, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := durable.WriteFile(path, []byte("x"), 0o600); err == nil {
		t.Error("replaced a directory")
	}
	wantNames(t, dir, "d")
}

func TestWriteFileReadOnly(t *testing.T) {
	dir := mountTmpfs(t, "64k")
	path := filepath.Join(dir, "f")
	if err := durable.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	remount(t, dir, syscall.MS_RDONLY)
	if err := durable.WriteFile(path, []byte("new"), 0o600); !errors.Is(err, syscall.EROFS) {
		t.Errorf("got %v, want EROFS", err)
	}
	wantContent(t, path, []byte("old"))
}

func TestWriteFileNoSpace(t *testing.T) {
	dir := mountTmpfs(t, "64k")
	path := filepath.Join(dir, "f")
	if err := durable.WriteFile(path, []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := durable.WriteFile(path, make([]byte, 1<<20), 0o600); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("got %v, want ENOSPC", err)
	}
	wantContent(t, path, []byte("old"))
	wantNames(t, dir, "f")
	if err := durable.WriteFile(path, []byte("new"), 0o600); err != nil {
		t.Errorf("the failed write left no room for the next: %v", err)
	}
}

func TestRemove(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := durable.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := durable.Remove(path); err != nil {
			t.Error(err)
		}
	}
}

func TestRemoveTemp(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"f", ".f.tmp-123", ".fg.tmp-123", ".f.tmp-"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := durable.RemoveTemp(filepath.Join(dir, "f")); err != nil {
		t.Fatal(err)
	}
	wantNames(t, dir, ".f.tmp-", ".fg.tmp-123", "f")
}

func TestMkdirAll(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b", "c")
	for range 2 {
		if err := durable.MkdirAll(dir, 0o750); err != nil {
			t.Fatal(err)
		}
	}
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := durable.MkdirAll(filepath.Join(file, "d"), 0o750); !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("got %v, want ENOTDIR", err)
	}
}

func TestOwnerDir(t *testing.T) {
	base := t.TempDir()
	dir := filepath.Join(base, "a", "state")
	for range 2 {
		if err := durable.OwnerDir(dir); err != nil {
			t.Fatal(err)
		}
	}
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm() != 0o700 {
		t.Errorf("mode %v", info.Mode())
	}

	t.Run("open to others", func(t *testing.T) {
		if err := os.Chmod(dir, 0o750); err != nil {
			t.Fatal(err)
		}
		if err := durable.OwnerDir(dir); !errors.Is(err, durable.ErrNotPrivate) {
			t.Errorf("got %v", err)
		}
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("symlink", func(t *testing.T) {
		link := filepath.Join(base, "link")
		if err := os.Symlink(dir, link); err != nil {
			t.Fatal(err)
		}
		if err := durable.OwnerDir(link); !errors.Is(err, syscall.ENOTDIR) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("stranger's", func(t *testing.T) {
		if os.Geteuid() != 0 {
			t.Skip("needs root to give a directory away")
		}
		if err := os.Chown(dir, 12345, -1); err != nil {
			t.Fatal(err)
		}
		if err := durable.OwnerDir(dir); !errors.Is(err, durable.ErrNotPrivate) {
			t.Errorf("got %v", err)
		}
	})
}

func TestCheckOwnerFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := durable.CheckOwnerFile(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	if err := durable.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := durable.CheckOwnerFile(path); err != nil {
		t.Error(err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if err := durable.CheckOwnerFile(path); !errors.Is(err, durable.ErrNotPrivate) {
		t.Errorf("group-readable: %v", err)
	}
	if err := durable.CheckOwnerFile(filepath.Dir(path)); !errors.Is(err, durable.ErrNotPrivate) {
		t.Errorf("directory: %v", err)
	}
}

func mountTmpfs(t *testing.T, size string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount a small tmpfs")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size="+size+",mode=0700"); err != nil {
		t.Skipf("cannot mount a tmpfs here: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

func remount(t *testing.T, dir string, flags uintptr) {
	t.Helper()
	if err := syscall.Mount("", dir, "", syscall.MS_REMOUNT|flags, ""); err != nil {
		t.Fatal(err)
	}
}

func wantContent(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Error(err)
	} else if !bytes.Equal(got, want) {
		t.Errorf("%s holds %q, want %q", path, got, want)
	}
}

func wantNames(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if len(got) != len(want) {
		t.Fatalf("names %q, want %q", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("names %q, want %q", got, want)
		}
	}
}
