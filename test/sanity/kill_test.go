package sanity_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"

	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/internal/mount"
	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

// TestKill kills the real driver with SIGKILL at random moments while several
// volumes are published and unpublished, starts it again each time, and checks
// what must hold at any moment (a mount has a record, and no target has two
// mounts) and at the end (the kubelet's repetitions get everything right).
func TestKill(t *testing.T) {
	d := newDriver(t)
	rounds := 25
	if testing.Short() {
		rounds = 5
	}
	const volumes = 4
	reqs := make([]*csipb.NodePublishVolumeRequest, volumes)
	for i := range reqs {
		reqs[i] = d.request(t, fmt.Sprintf("kill-%d", i))
	}
	var published atomic.Int64
	halfDone := 0
	for round := range rounds {
		cmd := d.start(t)
		d.waitUp(t)
		ctx, cancel := context.WithCancel(t.Context())
		conn := dial(t, d.socket)
		node := csipb.NewNodeClient(conn)
		var wg sync.WaitGroup
		for _, r := range reqs {
			wg.Go(func() {
				for ctx.Err() == nil {
					// What fails is repeated by the next round, as by a kubelet.
					if _, err := node.NodePublishVolume(ctx, r, grpc.WaitForReady(true)); err == nil {
						published.Add(1)
					}
					_, _ = node.NodeUnpublishVolume(ctx, &csipb.NodeUnpublishVolumeRequest{VolumeId: r.GetVolumeId(), TargetPath: r.GetTargetPath()}, grpc.WaitForReady(true))
				}
			})
		}
		<-time.After(2*time.Millisecond + rand.N(15*time.Millisecond))
		if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		cancel()
		wg.Wait()
		_ = conn.Close()
		halfDone += d.wantRecorded(t, round, reqs)
	}
	t.Logf("killed %d times in %d publishes; %d volumes were found half done or published", rounds, published.Load(), halfDone)
	if published.Load() == 0 || halfDone == 0 {
		t.Error("the driver was never killed at work")
	}
	d.run(t)
	node := csipb.NewNodeClient(dial(t, d.socket))
	for i, r := range reqs {
		if i%2 == 0 {
			if _, err := node.NodePublishVolume(t.Context(), r); err != nil {
				t.Error(err)
			}
			if n := mountsAt(t, r.GetTargetPath()); n != 1 {
				t.Errorf("%d mounts on %s, want 1", n, r.GetTargetPath())
			}
		}
		if _, err := node.NodeUnpublishVolume(t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: r.GetVolumeId(), TargetPath: r.GetTargetPath()}); err != nil {
			t.Error(err)
		}
	}
	d.wantNothingLeft(t)
}

// waitUp waits until the driver takes connections.
func (d *driver) waitUp(t *testing.T) {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		c, err := net.Dial("unix", d.socket)
		if err == nil {
			_ = c.Close()
			return
		}
		select {
		case <-deadline:
			t.Fatalf("the driver does not come up: %v", err)
		case <-time.After(time.Millisecond):
		}
	}
}

// wantRecorded checks what must hold whenever the driver dies, and returns how
// many volumes have something left.
func (d *driver) wantRecorded(t *testing.T, round int, reqs []*csipb.NodePublishVolumeRequest) (left int) {
	t.Helper()
	store, err := ledger.Open(d.ledger, nil)
	if err != nil {
		t.Fatal(err)
	}
	if bad := store.Bad(); len(bad) != 0 {
		t.Errorf("round %d: %v", round, bad)
	}
	for _, r := range reqs {
		n := mountsAt(t, r.GetTargetPath())
		_, ok := store.Get(r.GetVolumeId())
		if n > 1 || n == 1 && !ok {
			t.Errorf("round %d: %d mounts on %s, recorded %v", round, n, r.GetTargetPath(), ok)
		}
		if n > 0 || ok {
			left++
		}
	}
	return left
}

func mountsAt(t *testing.T, target string) int {
	t.Helper()
	table, err := mount.ReadTable()
	if err != nil {
		t.Fatal(err)
	}
	return len(table.At(target))
}

// request is the kubelet's for an inline volume of the test's pod.
func (d *driver) request(t *testing.T, volume string) *csipb.NodePublishVolumeRequest {
	t.Helper()
	dir := filepath.Join(filepath.Dir(target(d.root)), volume)
	if err := os.MkdirAll(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	vol, err := controller{}.CreateVolume(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	return &csipb.NodePublishVolumeRequest{
		VolumeId:   csi.VolumeID(podUID, volume),
		TargetPath: filepath.Join(dir, "mount"),
		Readonly:   true,
		VolumeCapability: &csipb.VolumeCapability{
			AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{}},
			AccessMode: &csipb.VolumeCapability_AccessMode{Mode: csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		VolumeContext: vol.GetVolume().GetVolumeContext(),
	}
}
