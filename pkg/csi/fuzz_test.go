package csi_test

import (
	"context"
	"os"
	"path"
	"path/filepath"
	"strings"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/spiffe-node/spiffe-node/internal/mount/mounttest"
	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

func FuzzParseTarget(f *testing.F) {
	good := "/var/lib/kubelet/pods/" + testUID + "/volumes/kubernetes.io~csi/spiffe/mount"
	for _, s := range []string{
		good, good + "/", good + "//", good + "/.", strings.Replace(good, "/pods", "/./pods", 1), "/snap" + good,
		good + "/../mount", good + "\x00", "", "/", "//", "mount", "/var/lib/kubelet", "/var/lib/kubelet/", "/var/lib/kubeletx/pods",
		strings.Replace(good, "spiffe", "..", 1), strings.Replace(good, testUID, "", 1), strings.Replace(good, "~csi", "~secret", 1),
		strings.Replace(good, "spiffe", strings.Repeat("a", 64), 1), strings.Repeat("/a", 3000),
	} {
		f.Add(s)
	}
	roots := []string{"/var/lib/kubelet", "/snap/var/lib/kubelet"}
	f.Fuzz(func(t *testing.T, s string) {
		p, uid, name, err := csi.ParseTarget(roots, s)
		if err != nil {
			return
		}
		if want := path.Join(roots[0], "pods", uid, "volumes/kubernetes.io~csi", name, "mount"); p != want {
			t.Fatalf("%q is %q, its parts make %q", s, p, want)
		}
		if strings.ContainsAny(uid+name, "/\x00") || strings.Contains(s, "..") && uid == "" {
			t.Fatalf("%q has parts %q and %q", s, uid, name)
		}
		if again, _, _, err := csi.ParseTarget(roots, p); err != nil || again != p {
			t.Fatalf("%q is not its own clean form: %q, %v", p, again, err)
		}
		if c := path.Clean(s); c != p && c != strings.Replace(p, roots[0], roots[1], 1) {
			t.Fatalf("%q cleaned is %q, parsed %q", s, c, p)
		}
	})
}

// FuzzPublish feeds raw protobuf to a driver that mounts for real. Whatever
// comes, nothing is mounted but the source on a target the request may name.
func FuzzPublish(f *testing.F) {
	mounttest.Require(f)
	n := newNode(f)
	good := n.request(testUID, testVolume)
	n.target(otherUID, "other")
	seed := func(change func(*csipb.NodePublishVolumeRequest)) {
		r := proto.CloneOf(good)
		change(r)
		// Every worker has a node of its own: paths are said relative to it.
		r.TargetPath = strings.Replace(r.TargetPath, n.root, "/kubelet", 1)
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	seed(func(*csipb.NodePublishVolumeRequest) {})
	seed(func(r *csipb.NodePublishVolumeRequest) { r.VolumeCapability = nil })
	seed(func(r *csipb.NodePublishVolumeRequest) { r.VolumeContext = nil })
	seed(func(r *csipb.NodePublishVolumeRequest) { r.TargetPath = n.root })
	seed(func(r *csipb.NodePublishVolumeRequest) { r.VolumeContext["csi.storage.k8s.io/pod.uid"] = otherUID })
	seed(func(r *csipb.NodePublishVolumeRequest) { r.TargetPath = "/etc" })
	f.Add([]byte{})
	f.Add([]byte{0x22, 0x00})
	f.Fuzz(func(t *testing.T, raw []byte) {
		var r csipb.NodePublishVolumeRequest
		if proto.Unmarshal(raw, &r) != nil {
			return
		}
		if rest, ok := strings.CutPrefix(r.GetTargetPath(), "/kubelet"); ok {
			r.TargetPath = n.root + rest
		}
		_, err := n.driver.NodePublishVolume(context.Background(), &r)
		if code := status.Code(err); code == codes.Unknown {
			t.Fatalf("an error without a code: %v", err)
		}
		for _, rec := range n.store.List() {
			if !strings.HasPrefix(rec.TargetPath, filepath.Join(n.root, "pods")+"/") || rec.VolumeID != csi.VolumeID(rec.PodUID, rec.VolumeName) || !strings.Contains(rec.TargetPath, rec.PodUID) {
				t.Fatalf("recorded %+v", rec)
			}
			if err == nil && rec.VolumeID != r.GetVolumeId() {
				t.Fatalf("recorded %+v for %q", rec, r.GetVolumeId())
			}
		}
		u := &csipb.NodeUnpublishVolumeRequest{VolumeId: r.GetVolumeId(), TargetPath: r.GetTargetPath()}
		if _, uerr := n.driver.NodeUnpublishVolume(context.Background(), u); err == nil && uerr != nil {
			t.Fatalf("published and not unpublished: %v", uerr)
		}
		if got := len(n.store.List()); got != 0 {
			t.Fatalf("%d records left", got)
		}
		if _, err := os.Stat(filepath.Join(n.source, "socket")); err != nil {
			t.Fatalf("the source was touched: %v", err)
		}
	})
}
