package csi_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

// spiffeCSI publishes as the SPIFFE CSI driver does: the last directory, a plain
// bind mount, no record. Versions before 0.2.12 stack one mount for each
// publish.
func (n *node) spiffeCSI(t *testing.T, r *csipb.NodePublishVolumeRequest, times int) {
	t.Helper()
	if err := os.Mkdir(r.GetTargetPath(), 0o750); err != nil {
		t.Fatal(err)
	}
	for range times {
		bind(t, n.source, r.GetTargetPath())
	}
}

// withSPIFFECSI runs the driver that SPIFFE_CSI_DRIVER names while do is at it.
func (n *node) withSPIFFECSI(t *testing.T, do func(csipb.NodeClient)) {
	t.Helper()
	if os.Getenv("SPIFFE_CSI_DRIVER") == "" {
		t.Skip("SPIFFE_CSI_DRIVER does not name a spiffe-csi-driver binary")
	}
	socket := filepath.Join(shortDir(t), "csi.sock")
	cmd := exec.CommandContext(t.Context(), os.Getenv("SPIFFE_CSI_DRIVER"), "-node-id", "n1", "-workload-api-socket-dir", n.source, "-csi-socket-path", socket)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	do(csipb.NewNodeClient(conn))
	_ = conn.Close()
	_ = cmd.Process.Signal(syscall.SIGTERM)
	_ = cmd.Wait()
}

// realSPIFFECSI publishes through the driver itself.
func (n *node) realSPIFFECSI(t *testing.T, r *csipb.NodePublishVolumeRequest, times int) {
	t.Helper()
	n.withSPIFFECSI(t, func(client csipb.NodeClient) {
		for range times {
			if _, err := client.NodePublishVolume(t.Context(), r, grpc.WaitForReady(true)); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// And back: the SPIFFE CSI driver unpublishes what this one has published.
func TestSPIFFECSITakesOver(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	n.publish(r)
	n.withSPIFFECSI(t, func(client csipb.NodeClient) {
		if _, err := client.NodePublishVolume(t.Context(), r, grpc.WaitForReady(true)); err != nil {
			t.Errorf("the kubelet publishes again: %v", err)
		}
		if _, err := client.NodeUnpublishVolume(t.Context(), unpublishOf(r)); err != nil {
			if _, err = client.NodeUnpublishVolume(t.Context(), unpublishOf(r)); err != nil { // as the kubelet does
				t.Error(err)
			}
		}
	})
	if got := mountsAt(t, r.GetTargetPath()); got != 0 {
		t.Fatalf("%d mounts are left", got)
	}
	removeAll(t, filepath.Join(n.root, "pods", testUID))
	n.start()
	found, _, err := n.driver.Reconcile(t.Context())
	if err != nil || len(found) != 1 || found[0].Result != csi.ResultForgotten {
		t.Errorf("reconciled to %+v, %v", found, err)
	}
	n.wantNothing(r)
}

// A node has volumes of the SPIFFE CSI driver when this one takes its place.
func TestTakeOverFromSPIFFECSI(t *testing.T) {
	type publish = func(n *node, t *testing.T, r *csipb.NodePublishVolumeRequest, times int)
	for name, c := range map[string]struct {
		times   int
		publish publish
	}{
		"one mount":                 {1, (*node).spiffeCSI},
		"stacked by an old version": {3, (*node).spiffeCSI},
		"the driver itself":         {2, (*node).realSPIFFECSI},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			ctx := context.Background()
			r := n.request(testUID, testVolume)
			c.publish(n, t, r, c.times)
			mounts := mountsAt(t, r.GetTargetPath())
			kubeletNote(t, r.GetTargetPath())

			// Restarts leave it to the pod that uses it.
			for range 2 {
				n.start()
				found, _, err := n.driver.Reconcile(ctx)
				if err != nil || len(found) != 1 || found[0].Result != csi.ResultUnrecorded {
					t.Fatalf("reconciled to %+v, %v", found, err)
				}
				if got := mountsAt(t, r.GetTargetPath()); got != mounts {
					t.Fatalf("%d mounts are left of %d", got, mounts)
				}
			}
			stats, err := n.client.NodeGetVolumeStats(ctx, &csipb.NodeGetVolumeStatsRequest{VolumeId: r.GetVolumeId(), VolumePath: r.GetTargetPath()})
			if err != nil || len(stats.GetUsage()) == 0 {
				t.Fatalf("stats: %v, %v", stats, err)
			}
			health, err := n.client.NodeGetVolumeHealth(ctx, &csipb.NodeGetVolumeHealthRequest{VolumeId: r.GetVolumeId(), VolumePublishPath: r.GetTargetPath()})
			if err != nil || len(health.GetVolumeHealth().GetHealthStatuses()) != 0 {
				t.Fatalf("health: %v, %v", health, err)
			}

			// The pod ends before anything was published anew.
			n.unpublish(unpublishOf(r))
			n.wantNothing(r)

			// Another outlives a restart of the kubelet, which publishes again: now
			// it is on record, and the next restart takes a stack down.
			c.publish(n, t, r, c.times)
			n.publish(r)
			n.wantRecord(r, true)
			if got := mountsAt(t, r.GetTargetPath()); got != mounts {
				t.Errorf("%d mounts after the publish, %d before: a pod may be using them", got, mounts)
			}
			n.start()
			if _, _, err := n.driver.Reconcile(ctx); err != nil {
				t.Fatal(err)
			}
			n.wantPublished(r)
			n.unpublish(unpublishOf(r))
			n.wantNothing(r)
		})
	}
}
