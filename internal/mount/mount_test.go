package mount_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/mount"
	"github.com/spiffe-node/spiffe-node/internal/mount/mounttest"
)

func mkdir(tb testing.TB, parts ...string) string {
	tb.Helper()
	dir := filepath.Join(parts...)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		tb.Fatal(err)
	}
	return dir
}

func symlink(tb testing.TB, to, at string) {
	tb.Helper()
	if err := os.Symlink(to, at); err != nil {
		tb.Fatal(err)
	}
}

func openTarget(tb testing.TB, root, rel string) *mount.Target {
	tb.Helper()
	target, err := mount.OpenTarget(root, rel)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(target.Close)
	return target
}

func openSource(tb testing.TB, dir string) *mount.Source {
	tb.Helper()
	src, err := mount.OpenSource(dir)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(src.Close)
	return src
}

func wantKind(tb testing.TB, target *mount.Target, want mount.Kind) mount.State {
	tb.Helper()
	st, err := target.Look()
	if err != nil {
		tb.Fatal(err)
	}
	if st.Kind != want {
		tb.Fatalf("%s is %s, want %s", target.Path(), st.Kind, want)
	}
	return st
}

func TestOpenTargetFollowsNothingBelowTheRoot(t *testing.T) {
	dir := t.TempDir()
	root := mkdir(t, dir, "root")
	mkdir(t, root, "a/b")
	outside := mkdir(t, dir, "outside/b")
	symlink(t, filepath.Dir(outside), filepath.Join(root, "link"))
	symlink(t, "a", filepath.Join(root, "inner"))
	symlink(t, root, filepath.Join(dir, "rootlink"))
	if err := os.WriteFile(filepath.Join(root, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for rel, want := range map[string]error{
		"a/b/c":    nil,
		"a":        nil,
		"link/b/c": mount.ErrSymlink,
		"inner/b":  mount.ErrSymlink,
		"none/x":   os.ErrNotExist,
		"file/x":   unix.ENOTDIR,
	} {
		for _, r := range []string{root, filepath.Join(dir, "rootlink")} {
			target, err := mount.OpenTarget(r, rel)
			if !errors.Is(err, want) {
				t.Errorf("open %s: %v, want %v", rel, err, want)
			}
			if err == nil {
				target.Close()
			}
		}
		if err := mount.WalkBeneath(root, filepath.Dir(rel)); !errors.Is(err, want) {
			t.Errorf("walk to %s: %v, want %v", filepath.Dir(rel), err, want)
		}
	}
	for _, rel := range []string{"", ".", "..", "../x", "a/../b", "a/", "/a", "a//b", "a\x00b"} {
		if _, err := mount.OpenTarget(root, rel); err == nil {
			t.Errorf("opened %q", rel)
		}
	}
	if _, err := mount.OpenTarget("root", "a"); err == nil {
		t.Error("opened below a relative root")
	}
}

// The ways to bind: the calls of today's kernels, those of older ones, and
// through a kept copy.
var binds = map[string]func(*mount.Target, *mount.Source, mount.Options) error{
	"new calls": (*mount.Target).Bind,
	"mount(2)":  (*mount.Target).BindClassic,
	"copies": func(t *mount.Target, src *mount.Source, o mount.Options) error {
		var c mount.Copies
		src.UseCopies(&c)
		defer src.UseCopies(nil)
		// The second is a copy of the copy; it alone stays.
		if err := t.Bind(src, o); err != nil {
			return err
		}
		if _, err := t.Unmount(); err != nil {
			return err
		}
		return t.Bind(src, o)
	},
}

func TestBindAndUnmount(t *testing.T) {
	for name, bind := range binds {
		for _, ro := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s read-only=%v", name, ro), func(t *testing.T) {
				dir := mounttest.Tmpfs(t, "")
				src := openSource(t, mkdir(t, dir, "src"))
				target := openTarget(t, mkdir(t, dir, "root"), "target")
				wantKind(t, target, mount.Absent)
				if err := target.Mkdir(0o750); err != nil {
					t.Fatal(err)
				}
				if err := target.Mkdir(0o750); !errors.Is(err, os.ErrExist) {
					t.Errorf("made twice: %v", err)
				}
				wantKind(t, target, mount.Directory)
				if root, err := target.IsMountRoot(); err != nil || root {
					t.Errorf("fdinfo says mounted: %v, %v", root, err)
				}
				if err := bind(target, src, mount.Options{ReadOnly: ro}); err != nil {
					t.Fatal(err)
				}
				if st := wantKind(t, target, mount.Mounted); st.ID != src.ID() || st.Deleted {
					t.Errorf("%+v, want %+v", st, src.ID())
				}
				if root, err := target.IsMountRoot(); err != nil || !root {
					t.Errorf("fdinfo says not mounted: %v, %v", root, err)
				}
				var fs unix.Statfs_t
				if err := unix.Statfs(target.Path(), &fs); err != nil {
					t.Fatal(err)
				}
				want := int64(unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC)
				if fs.Flags&want != want || (fs.Flags&unix.ST_RDONLY != 0) != ro {
					t.Errorf("flags %#x", fs.Flags)
				}
				if err := target.Rmdir(); !errors.Is(err, unix.EBUSY) {
					t.Errorf("removed a mount point: %v", err)
				}
				if lazy, err := target.Unmount(); err != nil || lazy {
					t.Fatalf("unmount: %v, lazy %v", err, lazy)
				}
				if _, err := target.Unmount(); !errors.Is(err, unix.EINVAL) {
					t.Errorf("unmounted twice: %v", err)
				}
				for range 2 {
					if err := target.Rmdir(); err != nil {
						t.Fatal(err)
					}
				}
				wantKind(t, target, mount.Absent)
			})
		}
	}
}

// A link put in the target's place between the look and the bind is not
// followed, nor is one in the place of the directory above.
func TestBindFollowsNoLink(t *testing.T) {
	for name, bind := range binds {
		t.Run(name, func(t *testing.T) {
			dir := mounttest.Tmpfs(t, "")
			src := openSource(t, mkdir(t, dir, "src"))
			elsewhere := mkdir(t, dir, "elsewhere/target")
			root := mkdir(t, dir, "root")
			mkdir(t, root, "vol")
			target := openTarget(t, root, "vol/target")
			symlink(t, elsewhere, filepath.Join(root, "vol/target"))
			wantKind(t, target, mount.Other)
			if err := bind(target, src, mount.Options{}); err == nil {
				t.Error("bound on a link")
			}
			// The directory above is swapped: the one that was opened counts.
			if err := os.Remove(filepath.Join(root, "vol/target")); err != nil {
				t.Fatal(err)
			}
			if err := target.Mkdir(0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Rename(filepath.Join(root, "vol"), filepath.Join(root, "old")); err != nil {
				t.Fatal(err)
			}
			symlink(t, filepath.Dir(elsewhere), filepath.Join(root, "vol"))
			if err := bind(target, src, mount.Options{}); err != nil {
				t.Fatal(err)
			}
			table, err := mount.ReadTable()
			if err != nil {
				t.Fatal(err)
			}
			if len(table.At(elsewhere)) != 0 || len(table.At(filepath.Join(root, "old/target"))) != 1 {
				t.Error("mounted elsewhere")
			}
			if _, err := target.Unmount(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestUnmountInUse(t *testing.T) {
	dir := mounttest.Tmpfs(t, "")
	src := openSource(t, mkdir(t, dir, "src"))
	target := openTarget(t, mkdir(t, dir, "root"), "target")
	if err := errors.Join(target.Mkdir(0o755), target.Bind(src, mount.Options{})); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(target.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if lazy, err := target.Unmount(); err != nil || !lazy {
		t.Fatalf("unmount: %v, lazy %v", err, lazy)
	}
	wantKind(t, target, mount.Directory)
}

// Unmounting never follows a link in the target's place to somebody's mount.
func TestUnmountFollowsNoLink(t *testing.T) {
	dir := mounttest.Tmpfs(t, "")
	src := openSource(t, mkdir(t, dir, "src"))
	root := mkdir(t, dir, "root")
	theirs := openTarget(t, root, "theirs")
	if err := errors.Join(theirs.Mkdir(0o755), theirs.Bind(src, mount.Options{})); err != nil {
		t.Fatal(err)
	}
	symlink(t, theirs.Path(), filepath.Join(root, "ours"))
	ours := openTarget(t, root, "ours")
	if _, err := ours.Unmount(); err == nil {
		t.Error("unmounted through a link")
	}
	if err := ours.Rmdir(); !errors.Is(err, unix.ENOTDIR) {
		t.Errorf("removed a link: %v", err)
	}
	wantKind(t, theirs, mount.Mounted)
}

func TestRmdirRemovesEmptyDirectoriesOnly(t *testing.T) {
	root := t.TempDir()
	if err := os.WriteFile(filepath.Join(root, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	mkdir(t, root, "full/x")
	for name, want := range map[string]error{"file": unix.ENOTDIR, "full": unix.ENOTEMPTY, "none": nil} {
		if err := openTarget(t, root, name).Rmdir(); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", name, err, want)
		}
	}
}

func TestDeletedSource(t *testing.T) {
	dir := mounttest.Tmpfs(t, "")
	path := mkdir(t, dir, "src")
	src := openSource(t, path)
	target := openTarget(t, mkdir(t, dir, "root"), "target")
	if err := errors.Join(target.Mkdir(0o755), target.Bind(src, mount.Options{})); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if st := wantKind(t, target, mount.Mounted); !st.Deleted {
		t.Error("not seen as deleted")
	}
	in, err := target.OpenMounted()
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if !in.Deleted() {
		t.Error("not seen as deleted from inside")
	}
	mkdir(t, path)
	live := openSource(t, path)
	if st, _ := target.Look(); st.ID == live.ID() || live.Deleted() {
		t.Error("the new directory passes for the old")
	}
	table, err := mount.ReadTable()
	if err != nil {
		t.Fatal(err)
	}
	ours, err := table.Of(live)
	if err != nil || len(ours) != 1 || !ours[0].Deleted || ours[0].MountPoint != target.Path() {
		t.Errorf("%+v, %v", ours, err)
	}
	if _, err := mount.OpenSource(filepath.Join(dir, "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

// A kept copy never stands in for another directory or other options.
func TestCopiesFollowTheSource(t *testing.T) {
	dir := mounttest.Tmpfs(t, "")
	var c mount.Copies
	root := mkdir(t, dir, "root")
	for i := range 6 {
		path := mkdir(t, dir, "src")
		src := openSource(t, path)
		src.UseCopies(&c)
		target := openTarget(t, root, fmt.Sprintf("target-%d", i))
		if err := errors.Join(target.Mkdir(0o755), target.Bind(src, mount.Options{ReadOnly: i%2 == 1})); err != nil {
			t.Fatal(err)
		}
		if st := wantKind(t, target, mount.Mounted); st.ID != src.ID() {
			t.Fatalf("bound %+v, want %+v", st.ID, src.ID())
		}
		var fs unix.Statfs_t
		if err := unix.Statfs(target.Path(), &fs); err != nil || (fs.Flags&unix.ST_RDONLY != 0) != (i%2 == 1) {
			t.Errorf("flags %#x, %v", fs.Flags, err)
		}
		if i%2 == 1 { // every other round with the directory made anew
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestTableSeesStacksAndOddNames(t *testing.T) {
	dir := mounttest.Tmpfs(t, "")
	src := openSource(t, mkdir(t, dir, "s r\tc"))
	other := openSource(t, mkdir(t, dir, "s r\tc2"))
	root := mkdir(t, dir, `ro ot\040`)
	target := openTarget(t, root, "tar\nget")
	if err := target.Mkdir(0o755); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := target.Bind(src, mount.Options{}); err != nil {
			t.Fatal(err)
		}
	}
	// One of another directory, and one of a directory below the source.
	for name, s := range map[string]*mount.Source{"other": other, "below": openSource(t, mkdir(t, src.Path(), "below"))} {
		o := openTarget(t, root, name)
		if err := errors.Join(o.Mkdir(0o755), o.Bind(s, mount.Options{})); err != nil {
			t.Fatal(err)
		}
	}
	table, err := mount.ReadTable()
	if err != nil {
		t.Fatal(err)
	}
	ours, err := table.Of(src)
	if err != nil {
		t.Fatal(err)
	}
	if len(ours) != 3 || len(ours.At(target.Path())) != 3 || len(table.At(target.Path())) != 3 {
		t.Errorf("%+v", ours)
	}
	for range 3 {
		wantKind(t, target, mount.Mounted)
		if _, err := target.Unmount(); err != nil {
			t.Fatal(err)
		}
	}
	wantKind(t, target, mount.Directory)
}

// A bind below a shared mount reaches its peers once, and leaves them when it
// is unmounted; with mount(2) and a shared source it would multiply.
func TestBindBelowASharedMount(t *testing.T) {
	dir := mounttest.Tmpfs(t, "")
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	src := openSource(t, mkdir(t, dir, "src"))
	root, peer := mkdir(t, dir, "root"), mkdir(t, dir, "peer")
	if err := unix.Mount(root, peer, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(peer, unix.MNT_DETACH) })
	target := openTarget(t, root, "target")
	if err := target.Mkdir(0o755); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := target.Bind(src, mount.Options{}); err != nil {
			t.Fatal(err)
		}
		table, err := mount.ReadTable()
		if err != nil {
			t.Fatal(err)
		}
		here, there := len(table.At(target.Path())), len(table.At(filepath.Join(peer, "target")))
		if here != 1 || there != 1 {
			t.Fatalf("%d mounts here and %d at the peer, want 1 and 1", here, there)
		}
		if _, err := target.Unmount(); err != nil {
			t.Fatal(err)
		}
		if table, err = mount.ReadTable(); err != nil {
			t.Fatal(err)
		}
		if got := len(table.At(filepath.Join(peer, "target"))); got != 0 {
			t.Fatalf("%d mounts stay at the peer", got)
		}
	}
}

func TestLock(t *testing.T) {
	root := t.TempDir()
	a, b := openTarget(t, root, "x"), openTarget(t, root, "x")
	for range 2 {
		if err := a.Lock(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := b.Lock(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("locked twice: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- b.Lock(context.WithoutCancel(ctx)) }()
	a.Close()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	a.Close() // twice is once
}

func TestCorrupted(t *testing.T) {
	for err, want := range map[error]bool{
		fmt.Errorf("look at x: %w", unix.ENOTCONN): true,
		fmt.Errorf("look at x: %w", unix.ESTALE):   true,
		fmt.Errorf("look at x: %w", unix.ENOENT):   false,
		errors.New("else"):                         false,
	} {
		if got := mount.Corrupted(err); got != want {
			t.Errorf("%v: %v", err, got)
		}
	}
	if mount.Corrupted(nil) {
		t.Error("no error is corrupted")
	}
}

// Nothing is left open, whatever fails.
func TestDescriptorsAreClosed(t *testing.T) {
	count := func() int {
		names, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(names)
	}
	root := t.TempDir()
	symlink(t, root, filepath.Join(root, "link"))
	src, err := mount.OpenSource(root)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	before := count()
	for range 20 {
		for _, rel := range []string{"x", "none/x", "link/x"} {
			target, err := mount.OpenTarget(root, rel)
			if err != nil {
				continue
			}
			_ = target.Lock(context.Background())
			_, _ = target.Look()
			_ = target.Bind(src, mount.Options{})
			_ = target.BindClassic(src, mount.Options{})
			_, _ = target.Unmount()
			_, _ = target.OpenMounted()
			target.Close()
		}
		_ = mount.WalkBeneath(root, "link/a")
		_ = mount.WalkBeneath(root, "none")
	}
	if after := count(); after != before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}

func FuzzUnescape(f *testing.F) {
	for _, s := range []string{`/a\040b`, `\134`, `\`, `\0`, `\04`, `\777`, `\08x`, "//deleted", `/x\012//deleted`, ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got := mount.Unescape(s)
		if len(got) > len(s) || !strings.Contains(s, `\`) && got != s {
			t.Fatalf("%q became %q", s, got)
		}
		// What the kernel escapes comes back as it was.
		var kernel strings.Builder
		for i := range len(s) {
			if strings.IndexByte(" \t\n\\#", s[i]) >= 0 {
				fmt.Fprintf(&kernel, `\%03o`, s[i])
			} else {
				kernel.WriteByte(s[i])
			}
		}
		if back := mount.Unescape(kernel.String()); back != s {
			t.Fatalf("%q came back as %q", s, back)
		}
	})
}
