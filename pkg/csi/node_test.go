package csi_test

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

func TestPublishAndUnpublish(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	n.publish(r)
	n.wantPublished(r)
	var st unix.Statfs_t
	if err := unix.Statfs(r.GetTargetPath(), &st); err != nil {
		t.Fatal(err)
	}
	if want := int64(unix.ST_NOSUID | unix.ST_NODEV | unix.ST_NOEXEC); st.Flags&want != want || st.Flags&unix.ST_RDONLY != 0 {
		t.Errorf("mount flags %#x", st.Flags)
	}
	n.unpublish(unpublishOf(r))
	n.wantNothing(r)
}

// Whatever is repeated, in whatever spelling, there is one mount.
func TestRepeats(t *testing.T) {
	for name, respell := range map[string]func(string) string{
		"same":            func(s string) string { return s },
		"trailing slash":  func(s string) string { return s + "/" },
		"many slashes":    func(s string) string { return s + "///" },
		"doubled slashes": func(s string) string { return filepath.Dir(s) + "//" + filepath.Base(s) },
		"dot":             func(s string) string { return filepath.Dir(s) + "/./" + filepath.Base(s) },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.request(testUID, testVolume)
			again := proto.CloneOf(r)
			again.TargetPath = respell(r.GetTargetPath())
			for range 3 {
				n.publish(r)
				n.publish(again)
			}
			n.wantPublished(r)
			n.unpublish(unpublishOf(again))
			n.wantNothing(r)
			n.unpublish(unpublishOf(r))
			n.unpublish(unpublishOf(again))
			n.publish(again)
			n.wantPublished(r)
		})
	}
}

func TestConcurrentPublishesMakeOneMount(t *testing.T) {
	n := newNode(t)
	rounds := 200
	if testing.Short() {
		rounds = 20
	}
	r := n.request(testUID, testVolume)
	slash := proto.CloneOf(r)
	slash.TargetPath += "/"
	for range rounds {
		var wg sync.WaitGroup
		for i := range 16 {
			req := r
			if i%2 == 1 {
				req = slash
			}
			wg.Go(func() {
				if _, err := n.client.NodePublishVolume(context.Background(), req); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if got := mountsAt(t, r.GetTargetPath()); got != 1 {
			t.Fatalf("%d mounts, want 1", got)
		}
		n.unpublish(unpublishOf(r))
	}
	n.wantNothing(r)
}

// Two processes, as while one driver takes over from another, and calls that
// contradict each other: what is left at the end is one of the two outcomes,
// whole.
func TestConcurrentProcesses(t *testing.T) {
	n := newNode(t)
	first := n.client
	n.start()
	r := n.request(testUID, testVolume)
	for range 30 {
		var wg sync.WaitGroup
		for i := range 8 {
			c := []csipb.NodeClient{first, n.client}[i%2]
			wg.Go(func() {
				if _, err := c.NodePublishVolume(context.Background(), r); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if got := mountsAt(t, r.GetTargetPath()); got != 1 {
			t.Fatalf("%d mounts, want 1", got)
		}
		n.unpublish(unpublishOf(r))
	}
}

func TestSymlinksAreRefused(t *testing.T) {
	for name, plant := range map[string]func(t *testing.T, n *node, target, elsewhere string){
		"target": func(t *testing.T, _ *node, target, elsewhere string) {
			t.Helper()
			symlink(t, elsewhere, target)
		},
		"volume directory": func(t *testing.T, _ *node, target, elsewhere string) {
			t.Helper()
			dir := filepath.Dir(target)
			remove(t, dir)
			symlink(t, elsewhere, dir)
		},
		"pod directory": func(t *testing.T, n *node, target, elsewhere string) {
			t.Helper()
			dir := filepath.Join(n.root, "pods", testUID)
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
			if err := os.MkdirAll(filepath.Join(elsewhere, "volumes/kubernetes.io~csi", testVolume), 0o755); err != nil {
				t.Fatal(err)
			}
			symlink(t, elsewhere, dir)
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.request(testUID, testVolume)
			elsewhere := t.TempDir()
			plant(t, n, r.GetTargetPath(), elsewhere)
			_, err := n.client.NodePublishVolume(context.Background(), r)
			if name == "target" {
				wantCode(t, err, codes.FailedPrecondition, "not the driver's")
			} else {
				wantCode(t, err, codes.InvalidArgument, "symbolic link")
			}
			n.wantRecord(r, false)
			if got := mountsAt(t, elsewhere); got != 0 {
				t.Errorf("mounted on the link's destination")
			}
			_, err = n.client.NodeUnpublishVolume(context.Background(), unpublishOf(r))
			if name == "target" {
				if err != nil {
					t.Errorf("unpublish of an unknown volume: %v", err)
				}
			} else {
				wantCode(t, err, codes.InvalidArgument, "nothing was touched")
			}
			if _, err := os.Lstat(elsewhere); err != nil {
				t.Errorf("the link's destination is gone: %v", err)
			}
		})
	}
}

func symlink(t *testing.T, to, at string) {
	t.Helper()
	if err := os.Symlink(to, at); err != nil {
		t.Fatal(err)
	}
}

func remove(t *testing.T, path string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
}

// microk8s has its kubelet root behind a link; the kubelet may say either.
func TestSymlinkedKubeletRoot(t *testing.T) {
	n := newNode(t)
	link := filepath.Join(t.TempDir(), "kubelet")
	symlink(t, n.root, link)
	n.start(func(c *csi.Config) { c.KubeletRoot = link })
	direct := n.request(testUID, testVolume)
	linked := proto.CloneOf(direct)
	linked.TargetPath = filepath.Join(link, "pods", testUID, "volumes/kubernetes.io~csi", testVolume, "mount")
	n.publish(linked)
	n.publish(direct)
	if got := mountsAt(t, direct.GetTargetPath()); got != 1 {
		t.Fatalf("%d mounts, want 1", got)
	}
	n.unpublish(unpublishOf(direct))
	n.wantNothing(direct)
}
