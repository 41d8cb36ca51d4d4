package csi_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

// kubeletNote writes what the kubelet keeps beside a volume's target.
func kubeletNote(t *testing.T, target string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(filepath.Dir(target), "vol_data.json"), []byte(`{"driverName":"csi.spiffe.io","specVolID":"x"}`), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestReconcile(t *testing.T) {
	type request = *csipb.NodePublishVolumeRequest
	for name, c := range map[string]struct {
		leave    func(t *testing.T, n *node, r request)
		want     []string // results
		failed   bool
		mounts   int
		recorded bool
	}{
		"healthy": {
			leave:  func(_ *testing.T, n *node, r request) { n.publish(r) },
			mounts: 1, recorded: true,
		},
		"replaced source": {
			leave: func(_ *testing.T, n *node, r request) { n.publish(r); n.replaceSource() },
			want:  []string{csi.ResultRepaired}, mounts: 1, recorded: true,
		},
		"replaced source, no agent": {
			leave: func(t *testing.T, n *node, r request) {
				t.Helper()
				n.publish(r)
				n.replaceSource()
				removeAll(t, n.source)
			},
			want: []string{csi.ResultFailed}, failed: true, mounts: 1, recorded: true,
		},
		"unmounted by hand": {
			leave: func(t *testing.T, n *node, r request) {
				t.Helper()
				n.publish(r)
				if err := unix.Unmount(r.GetTargetPath(), 0); err != nil {
					t.Fatal(err)
				}
			},
			want: []string{csi.ResultRepaired}, mounts: 1, recorded: true,
		},
		"stacked": {
			leave: func(t *testing.T, n *node, r request) {
				t.Helper()
				n.publish(r)
				bind(t, n.source, r.GetTargetPath())
				bind(t, n.source, r.GetTargetPath())
			},
			want: []string{csi.ResultRepaired}, mounts: 1, recorded: true,
		},
		"record of nothing": {
			leave: func(t *testing.T, n *node, r request) {
				t.Helper()
				n.publish(r)
				if err := unix.Unmount(r.GetTargetPath(), 0); err != nil {
					t.Fatal(err)
				}
				removeAll(t, filepath.Join(n.root, "pods", testUID))
			},
			want: []string{csi.ResultForgotten},
		},
		"leak": {
			leave: func(t *testing.T, n *node, r request) {
				t.Helper()
				mkdir(t, r.GetTargetPath())
				bind(t, n.source, r.GetTargetPath())
				bind(t, n.source, r.GetTargetPath())
			},
			want: []string{csi.ResultRemoved},
		},
		"dead leak": {
			leave: func(t *testing.T, n *node, r request) {
				t.Helper()
				mkdir(t, r.GetTargetPath())
				bind(t, n.source, r.GetTargetPath())
				n.replaceSource()
			},
			want: []string{csi.ResultRemoved},
		},
		"another driver's volume in use": {
			leave: func(t *testing.T, n *node, r request) {
				t.Helper()
				mkdir(t, r.GetTargetPath())
				bind(t, n.source, r.GetTargetPath())
				kubeletNote(t, r.GetTargetPath())
			},
			want: []string{csi.ResultUnrecorded}, mounts: 1,
		},
		"foreign mount": {
			leave: func(t *testing.T, _ *node, r request) {
				t.Helper()
				mkdir(t, r.GetTargetPath())
				bind(t, t.TempDir(), r.GetTargetPath())
			},
			mounts: 1,
		},
		"source mounted where no volume is": {
			leave: func(t *testing.T, n *node, r request) {
				t.Helper()
				at := filepath.Join(n.root, "pods", "somewhere")
				mkdir(t, at)
				bind(t, n.source, at)
			},
		},
		"record of another root": {
			leave: func(t *testing.T, n *node, r request) {
				t.Helper()
				if err := n.store.Put(ledger.Record{
					VolumeID: r.GetVolumeId(), VolumeName: testVolume, PodNamespace: "default", PodName: "web-0", PodUID: testUID, ServiceAccount: "web",
					TargetPath: "/elsewhere/nothing", Source: n.source, Published: testTime,
				}); err != nil {
					t.Fatal(err)
				}
			},
			want: []string{csi.ResultForgotten},
		},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.request(testUID, testVolume)
			c.leave(t, n, r)
			n.start()
			found, _, err := n.driver.Reconcile(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, f := range found {
				got = append(got, f.Result)
				if (f.Err != nil) != c.failed {
					t.Errorf("%+v", f)
				}
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Errorf("results (-want +got):\n%s", d)
			}
			if got := mountsAt(t, r.GetTargetPath()); got != c.mounts {
				t.Errorf("%d mounts, want %d", got, c.mounts)
			}
			n.wantRecord(r, c.recorded)
			if c.failed {
				return
			}
			again, _, err := n.driver.Reconcile(context.Background())
			if err != nil || len(again) > 0 && again[0].Result != csi.ResultUnrecorded {
				t.Errorf("a second look finds %+v, %v", again, err)
			}
		})
	}
}

// A volume an earlier driver made is adopted by the next publish.
func TestPublishAdoptsAnUnrecordedMount(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	mkdir(t, r.GetTargetPath())
	bind(t, n.source, r.GetTargetPath())
	n.publish(r)
	n.wantPublished(r)
}
