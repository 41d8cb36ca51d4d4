package csi_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/spiffe-node/spiffe-node/internal/mount"
	"github.com/spiffe-node/spiffe-node/internal/mount/mounttest"
	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

func TestUnpublishRefusals(t *testing.T) {
	n := newNode(t)
	target := n.target(testUID, testVolume)
	id := csi.VolumeID(testUID, testVolume)
	for name, r := range map[string]*csipb.NodeUnpublishVolumeRequest{
		"no ID":     {TargetPath: target},
		"no target": {VolumeId: id},
		"outside":   {VolumeId: id, TargetPath: "/etc"},
		"relative":  {VolumeId: id, TargetPath: "x"},
		"dots":      {VolumeId: id, TargetPath: target + "/../mount"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := n.client.NodeUnpublishVolume(context.Background(), r)
			wantCode(t, err, codes.InvalidArgument)
		})
	}
}

// What nobody published is answered OK and stays, whatever it is.
func TestUnpublishTouchesNoStranger(t *testing.T) {
	for name, plant := range map[string]func(t *testing.T, target string){
		"empty directory": func(t *testing.T, target string) {
			t.Helper()
			mkdir(t, target)
		},
		"file": func(t *testing.T, target string) {
			t.Helper()
			if err := os.WriteFile(target, []byte("mine"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"full directory": func(t *testing.T, target string) {
			t.Helper()
			mkdir(t, filepath.Join(target, "mine"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.request(testUID, testVolume)
			plant(t, r.GetTargetPath())
			n.unpublish(unpublishOf(r))
			if _, err := os.Lstat(r.GetTargetPath()); err != nil {
				t.Errorf("it is gone: %v", err)
			}
		})
	}
}

func TestUnpublishLeavesForeignMounts(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	target := r.GetTargetPath()
	mkdir(t, target)
	other := t.TempDir()
	bind(t, other, target)
	wantCode(t, callUnpublish(n, r), codes.FailedPrecondition, "not touched")
	wantCode(t, callPublish(n, r), codes.FailedPrecondition, "something else")
	if got := mountsAt(t, target); got != 1 {
		t.Fatalf("%d mounts", got)
	}
	n.wantRecord(r, false)
	// Ours on top of it is taken; the stranger's under it is not.
	bind(t, n.source, target)
	bind(t, n.source, target)
	wantCode(t, callUnpublish(n, r), codes.FailedPrecondition, "not touched")
	if got := mountsAt(t, target); got != 1 {
		t.Fatalf("%d mounts, want the foreign one", got)
	}
	if err := dialIn(target); err == nil {
		t.Fatal("ours is still on top")
	}
}

// spiffe-csi, or a lost ledger, leaves mounts without a record: the mount
// table speaks for them, dead ones and stacks included.
func TestUnpublishWithoutRecord(t *testing.T) {
	for name, prepare := range map[string]func(t *testing.T, n *node, target string){
		"live": func(t *testing.T, n *node, target string) {
			t.Helper()
			bind(t, n.source, target)
		},
		"stacked": func(t *testing.T, n *node, target string) {
			t.Helper()
			bind(t, n.source, target)
			bind(t, n.source, target)
			bind(t, n.source, target)
		},
		"dead": func(t *testing.T, n *node, target string) {
			t.Helper()
			bind(t, n.source, target)
			n.replaceSource()
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.request(testUID, testVolume)
			mkdir(t, r.GetTargetPath())
			prepare(t, n, r.GetTargetPath())
			other := unpublishOf(r)
			other.VolumeId = csi.VolumeID(testUID, "other")
			_, err := n.client.NodeUnpublishVolume(context.Background(), other)
			wantCode(t, err, codes.FailedPrecondition, "nothing was touched")
			n.unpublish(unpublishOf(r))
			if got := mountsAt(t, r.GetTargetPath()); got != 0 {
				t.Fatalf("%d mounts left", got)
			}
			n.wantNothing(r)
		})
	}
}

// A stranger's mount on top of ours is not ours because the target is.
func TestForeignMountOnAVolume(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	n.publish(r)
	bind(t, t.TempDir(), r.GetTargetPath())
	wantCode(t, callUnpublish(n, r), codes.FailedPrecondition, "not touched")
	wantCode(t, callPublish(n, r), codes.FailedPrecondition, "not touched")
	found, _, err := n.driver.Reconcile(context.Background())
	if err != nil || len(found) != 1 || found[0].Result != csi.ResultFailed {
		t.Errorf("%+v, %v", found, err)
	}
	if got := mountsAt(t, r.GetTargetPath()); got != 2 {
		t.Fatalf("%d mounts, want ours and the foreign one", got)
	}
	n.wantRecord(r, true)
	if err := unix.Unmount(r.GetTargetPath(), 0); err != nil {
		t.Fatal(err)
	}
	n.unpublish(unpublishOf(r))
	n.wantNothing(r)
}

// The host path behind the driver's view of the socket directory was changed:
// what is mounted is of a path and a file system the driver no longer sees.
func TestUnpublishAfterTheSourceHasMoved(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	n.publish(r)
	elsewhere := mounttest.Tmpfs(t, "")
	bind(t, elsewhere, n.source)
	n.unpublish(unpublishOf(r))
	n.wantNothing(r)
}

func TestUnpublishWhileInUse(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	n.publish(r)
	f, err := os.Open(r.GetTargetPath())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n.unpublish(unpublishOf(r))
	n.wantNothing(r)
}

func TestUnpublishKeepsWhatSomebodyPutThere(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	mkdir(t, filepath.Join(r.GetTargetPath(), "mine"))
	n.publish(r)
	wantCode(t, callUnpublish(n, r), codes.FailedPrecondition, "remove it")
	if _, err := os.Stat(filepath.Join(r.GetTargetPath(), "mine")); err != nil {
		t.Fatal(err)
	}
	removeAll(t, filepath.Join(r.GetTargetPath(), "mine"))
	n.unpublish(unpublishOf(r))
	n.wantNothing(r)
}

// The flag was changed between publish and unpublish: the ledger knows.
func TestUnpublishUnderAnotherRoot(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	n.publish(r)
	n.start(func(c *csi.Config) { c.KubeletRoot = t.TempDir() })
	other := unpublishOf(r)
	other.VolumeId = csi.VolumeID(otherUID, testVolume)
	_, err := n.client.NodeUnpublishVolume(context.Background(), other)
	wantCode(t, err, codes.InvalidArgument, "nothing was touched")
	n.unpublish(unpublishOf(r))
	n.wantNothing(r)
}

func TestFullLedger(t *testing.T) {
	n := newNode(t)
	small := mounttest.Tmpfs(t, "16k")
	n.ledger = filepath.Join(small, "ledger")
	n.start()
	first := n.request(testUID, "first")
	n.publish(first)
	fill(t, small)
	r := n.request(testUID, testVolume)
	wantCode(t, callPublish(n, r), codes.ResourceExhausted, "free room")
	n.wantNothing(r)
	if err := n.driver.Ready(); err == nil {
		t.Error("ready with a full ledger")
	}
	n.publish(first)
	n.unpublish(unpublishOf(first))
	n.wantNothing(first)
	n.publish(r)
	n.wantPublished(r)
}

func fill(t *testing.T, dir string) {
	t.Helper()
	f, err := os.Create(filepath.Join(dir, "ballast"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for block := make([]byte, 1024); ; {
		if _, err := f.Write(block); err != nil {
			return
		}
	}
}

func TestReadOnlyLedger(t *testing.T) {
	n := newNode(t)
	small := mounttest.Tmpfs(t, "64k")
	n.ledger = filepath.Join(small, "ledger")
	n.start()
	first := n.request(testUID, "first")
	n.publish(first)
	remount := func(flags uintptr) {
		t.Helper()
		if err := unix.Mount("", small, "", unix.MS_REMOUNT|flags, ""); err != nil {
			t.Fatal(err)
		}
	}
	remount(unix.MS_RDONLY)
	r := n.request(testUID, testVolume)
	wantCode(t, callPublish(n, r), codes.Internal, "writable")
	if got := mountsAt(t, r.GetTargetPath()); got != 0 {
		t.Fatal("mounted without a record")
	}
	if err := n.driver.Ready(); err == nil {
		t.Error("ready with a read-only ledger")
	}
	n.publish(first) // nothing to write
	wantCode(t, callUnpublish(n, first), codes.Internal, "writable")
	remount(0)
	n.unpublish(unpublishOf(first))
	n.wantNothing(first)
}

func TestReadOnlyTarget(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	pods := filepath.Join(n.root, "pods")
	bind(t, pods, pods)
	if err := unix.Mount("", pods, "", unix.MS_REMOUNT|unix.MS_BIND|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	wantCode(t, callPublish(n, r), codes.Internal, "read-only")
	n.wantNothing(r)
}

// dead shows mounts whose filesystem no longer answers, such as a FUSE or NFS
// directory somebody keeps sockets in.
type dead struct{ csi.Mounts }

func (d dead) Target(root, rel string) (csi.Target, error) {
	t, err := d.Mounts.Target(root, rel)
	if err != nil {
		return nil, err
	}
	return deadTarget{t}, nil
}

type deadTarget struct{ csi.Target }

func (t deadTarget) Look() (mount.State, error) {
	st, err := t.Target.Look()
	if err == nil && st.Kind == mount.Mounted {
		return mount.State{}, fmt.Errorf("look at %s: %w", t.Path(), unix.ENOTCONN)
	}
	return st, err
}

func TestDeadFilesystem(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	n.publish(r)
	n.start(func(c *csi.Config) { c.Mounts = dead{csi.HostMounts()} })
	health, err := n.client.NodeGetVolumeHealth(context.Background(), &csipb.NodeGetVolumeHealthRequest{VolumeId: r.GetVolumeId()})
	if err != nil || len(health.GetVolumeHealth().GetHealthStatuses()) != 1 || health.GetVolumeHealth().GetHealthStatuses()[0].GetReason() != "FilesystemUnreachable" {
		t.Errorf("health %v, %v", health, err)
	}
	found, _, err := n.driver.Reconcile(context.Background())
	if err != nil || len(found) != 1 || found[0].Result != csi.ResultFailed {
		t.Errorf("%+v, %v", found, err)
	}
	n.unpublish(unpublishOf(r))
	n.wantNothing(r)
}
