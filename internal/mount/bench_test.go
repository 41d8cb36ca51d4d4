package mount_test

import (
	"fmt"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/mount"
	"github.com/spiffe-node/spiffe-node/internal/mount/mounttest"
)

// BenchmarkTarget is the kernel's part of a publish and an unpublish, beside
// others' mounts on the file systems of the target, of the source or of
// neither. Without Copies (and before Linux 6.15) those on the source's matter
// where it is not a mount of its own, as it is in a container.
func BenchmarkTarget(b *testing.B) {
	for _, c := range []struct {
		others int
		where  string
	}{{0, "none"}, {10_000, "elsewhere"}, {10_000, "target"}, {10_000, "source"}} {
		b.Run(fmt.Sprintf("others=%d/on=%s", c.others, c.where), func(b *testing.B) {
			on := map[string]string{"elsewhere": mounttest.Tmpfs(b, ""), "target": mounttest.Tmpfs(b, ""), "source": mounttest.Tmpfs(b, "")}
			for i := range c.others {
				from := mkdir(b, on[c.where], "from")
				if err := unix.Mount(from, mkdir(b, on[c.where], fmt.Sprintf("at-%05d", i)), "", unix.MS_BIND, ""); err != nil {
					b.Fatal(err)
				}
			}
			src := openSource(b, mkdir(b, on["source"], "src"))
			src.UseCopies(new(mount.Copies))
			mkdir(b, on["target"], "root/a/b/c/d")
			for b.Loop() {
				target, err := mount.OpenTarget(filepath.Join(on["target"], "root"), "a/b/c/d/mount")
				if err != nil {
					b.Fatal(err)
				}
				if err := target.Mkdir(0o750); err != nil {
					b.Fatal(err)
				}
				if err := target.Bind(src, mount.Options{}); err != nil {
					b.Fatal(err)
				}
				if st, err := target.Look(); err != nil || st.Kind != mount.Mounted {
					b.Fatal(st, err)
				}
				if _, err := target.Unmount(); err != nil {
					b.Fatal(err)
				}
				if err := target.Rmdir(); err != nil {
					b.Fatal(err)
				}
				target.Close()
			}
		})
	}
}
