package csi_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/mount/mounttest"
)

// crowd mounts count file systems that are none of ours.
func crowd(tb testing.TB, count int) {
	tb.Helper()
	dir := mounttest.Tmpfs(tb, "")
	from := filepath.Join(dir, "from")
	if err := os.Mkdir(from, 0o755); err != nil {
		tb.Fatal(err)
	}
	for i := range count {
		at := filepath.Join(dir, fmt.Sprintf("at-%05d", i))
		if err := os.Mkdir(at, 0o755); err != nil {
			tb.Fatal(err)
		}
		if err := unix.Mount(from, at, "", unix.MS_BIND, ""); err != nil {
			tb.Fatalf("mount %d: %v", i, err)
		}
	}
}

// TestPublishStaysFlat compares the best of many publishes without and with
// 10,000 other mounts. A driver that reads the mount table takes 14 ms more.
func TestPublishStaysFlat(t *testing.T) {
	if testing.Short() {
		t.Skip("short: makes 10,000 mounts")
	}
	n := newNode(t)
	r := n.request(testUID, testVolume)
	best := func() (publish, unpublish time.Duration) {
		publish, unpublish = time.Hour, time.Hour
		for range 100 {
			t0 := time.Now()
			n.publish(r)
			t1 := time.Now()
			n.unpublish(unpublishOf(r))
			publish, unpublish = min(publish, t1.Sub(t0)), min(unpublish, time.Since(t1))
		}
		return publish, unpublish
	}
	p0, u0 := best()
	crowd(t, 10_000)
	p1, u1 := best()
	t.Logf("publish %v and %v, unpublish %v and %v with 10,000 mounts", p0, p1, u0, u1)
	if p1 > 2*p0+time.Millisecond || u1 > 2*u0+time.Millisecond {
		t.Error("the time depends on the mounts of the host")
	}
}

// BenchmarkPublish measures publish and unpublish over the CSI socket beside
// other mounts. The bar is 0.3 ms each, flat.
func BenchmarkPublish(b *testing.B) {
	for _, count := range []int{0, 10_000} {
		b.Run(fmt.Sprintf("others=%d", count), func(b *testing.B) {
			n := newNode(b)
			crowd(b, count)
			r := n.request(testUID, testVolume)
			u := unpublishOf(r)
			ctx := context.Background()
			var pub, unpub time.Duration
			for b.Loop() {
				t0 := time.Now()
				if _, err := n.client.NodePublishVolume(ctx, r); err != nil {
					b.Fatal(err)
				}
				t1 := time.Now()
				if _, err := n.client.NodeUnpublishVolume(ctx, u); err != nil {
					b.Fatal(err)
				}
				pub += t1.Sub(t0)
				unpub += time.Since(t1)
			}
			b.ReportMetric(float64(pub.Microseconds())/float64(b.N), "publish-us")
			b.ReportMetric(float64(unpub.Microseconds())/float64(b.N), "unpublish-us")
			b.ReportMetric(0, "ns/op")
		})
	}
}

// BenchmarkRepublish is what a kubelet that starts again does to every volume.
func BenchmarkRepublish(b *testing.B) {
	n := newNode(b)
	r := n.request(testUID, testVolume)
	n.publish(r)
	for b.Loop() {
		n.publish(r)
	}
	n.unpublish(unpublishOf(r))
}
