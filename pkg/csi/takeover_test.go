package csi_test

import (
	"context"
	"os"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"

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

// A node has volumes of the SPIFFE CSI driver when this one takes its place.
func TestTakeOverFromSPIFFECSI(t *testing.T) {
	for name, times := range map[string]int{"one mount": 1, "stacked by an old version": 3} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			ctx := context.Background()
			r := n.request(testUID, testVolume)
			n.spiffeCSI(t, r, times)
			kubeletNote(t, r.GetTargetPath())

			// Restarts leave it to the pod that uses it.
			for range 2 {
				n.start()
				found, _, err := n.driver.Reconcile(ctx)
				if err != nil || len(found) != 1 || found[0].Result != csi.ResultUnrecorded {
					t.Fatalf("reconciled to %+v, %v", found, err)
				}
				if got := mountsAt(t, r.GetTargetPath()); got != times {
					t.Fatalf("%d mounts are left of %d", got, times)
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
			n.spiffeCSI(t, r, times)
			n.publish(r)
			n.wantRecord(r, true)
			if got := mountsAt(t, r.GetTargetPath()); got != times {
				t.Errorf("%d mounts after the publish, %d before: a pod may be using them", got, times)
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
