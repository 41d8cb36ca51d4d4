package csi_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/internal/mount"
	"github.com/spiffe-node/spiffe-node/internal/mount/mounttest"
	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

const (
	testUID    = "0c7a6dbd-6d4a-4f52-8c4a-9c1f3b2a7e10"
	testVolume = "spiffe"
)

// node is a driver on a machine of its own: kubelet root, agent, ledger.
type node struct {
	t       testing.TB
	root    string // the kubelet's
	source  string
	ledger  string
	agent   net.Listener
	driver  *csi.Driver
	store   *ledger.Store
	client  csipb.NodeClient
	ids     csipb.IdentityClient
	changes []func(*csi.Config)
}

func newNode(tb testing.TB, changes ...func(*csi.Config)) *node {
	tb.Helper()
	dir := mounttest.Tmpfs(tb, "")
	n := &node{t: tb, root: filepath.Join(dir, "kubelet"), source: filepath.Join(dir, "agent"), ledger: filepath.Join(dir, "ledger"), changes: changes}
	for _, d := range []string{filepath.Join(n.root, "pods"), n.source} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			tb.Fatal(err)
		}
	}
	n.startAgent()
	n.start()
	return n
}

// startAgent listens as the agent does.
func (n *node) startAgent() {
	n.t.Helper()
	l, err := net.Listen("unix", filepath.Join(n.source, "socket"))
	if err != nil {
		n.t.Fatal(err)
	}
	n.agent = l
	n.t.Cleanup(func() { _ = l.Close() })
}

// start starts a driver on what is there, as after a crash of an earlier one.
func (n *node) start(changes ...func(*csi.Config)) {
	n.t.Helper()
	store, err := ledger.Open(n.ledger, testLog(n.t))
	if err != nil {
		n.t.Fatal(err)
	}
	cfg := csi.Config{NodeID: "node-1", Version: "test", SourceDir: n.source, KubeletRoot: n.root, Ledger: store, Logger: testLog(n.t)}
	for _, c := range append(n.changes, changes...) {
		c(&cfg)
	}
	d, err := csi.New(cfg)
	if err != nil {
		n.t.Fatal(err)
	}
	n.driver, n.store = d, store
	conn := serve(n.t, d)
	n.client, n.ids = csipb.NewNodeClient(conn), csipb.NewIdentityClient(conn)
}

// serve puts the driver behind a real socket.
func serve(tb testing.TB, d *csi.Driver) *grpc.ClientConn {
	tb.Helper()
	path := filepath.Join(shortDir(tb), "csi.sock")
	l, live, err := csi.ListenSocket(path)
	if err != nil || live {
		tb.Fatalf("listen: %v (live %v)", err, live)
	}
	s := csi.NewServer(testLog(tb), csi.NewMetrics(nil))
	d.Register(s)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = conn.Close()
		s.Stop()
		if err := <-done; err != nil {
			tb.Errorf("serve: %v", err)
		}
	})
	return conn
}

func testLog(tb testing.TB) *slog.Logger {
	tb.Helper()
	if _, bench := tb.(*testing.B); bench {
		return slog.New(slog.DiscardHandler)
	}
	return slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// target makes the directories the kubelet makes and returns the path.
func (n *node) target(uid, volume string) string {
	n.t.Helper()
	dir := filepath.Join(n.root, "pods", uid, "volumes/kubernetes.io~csi", volume)
	if err := os.MkdirAll(dir, 0o750); err != nil {
		n.t.Fatal(err)
	}
	return filepath.Join(dir, "mount")
}

// request is what the kubelet sends for an inline volume.
func (n *node) request(uid, volume string) *csipb.NodePublishVolumeRequest {
	n.t.Helper()
	return &csipb.NodePublishVolumeRequest{
		VolumeId:   csi.VolumeID(uid, volume),
		TargetPath: n.target(uid, volume),
		Readonly:   true,
		VolumeCapability: &csipb.VolumeCapability{
			AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{}},
			AccessMode: &csipb.VolumeCapability_AccessMode{Mode: csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		VolumeContext: map[string]string{
			"csi.storage.k8s.io/ephemeral":           "true",
			"csi.storage.k8s.io/pod.name":            "web-0",
			"csi.storage.k8s.io/pod.namespace":       "default",
			"csi.storage.k8s.io/pod.uid":             uid,
			"csi.storage.k8s.io/serviceAccount.name": "web",
		},
	}
}

func unpublishOf(r *csipb.NodePublishVolumeRequest) *csipb.NodeUnpublishVolumeRequest {
	return &csipb.NodeUnpublishVolumeRequest{VolumeId: r.GetVolumeId(), TargetPath: r.GetTargetPath()}
}

func (n *node) publish(r *csipb.NodePublishVolumeRequest) {
	n.t.Helper()
	if _, err := n.client.NodePublishVolume(context.Background(), r); err != nil {
		n.t.Fatalf("publish: %v", err)
	}
}

func (n *node) unpublish(r *csipb.NodeUnpublishVolumeRequest) {
	n.t.Helper()
	if _, err := n.client.NodeUnpublishVolume(context.Background(), r); err != nil {
		n.t.Fatalf("unpublish: %v", err)
	}
}

// wantCode checks a refusal and that it says the words an operator needs.
func wantCode(tb testing.TB, err error, code codes.Code, words ...string) {
	tb.Helper()
	if got := status.Code(err); got != code {
		tb.Fatalf("code %s, want %s (%v)", got, code, err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			tb.Errorf("error %q does not say %q", err, w)
		}
	}
}

// mountsAt counts the mounts on the target.
func mountsAt(tb testing.TB, target string) int {
	tb.Helper()
	table, err := mount.ReadTable()
	if err != nil {
		tb.Fatal(err)
	}
	return len(table.At(target))
}

// wantPublished checks the whole promise of a publish.
func (n *node) wantPublished(r *csipb.NodePublishVolumeRequest) {
	n.t.Helper()
	target := filepath.Clean(r.GetTargetPath())
	if got := mountsAt(n.t, target); got != 1 {
		n.t.Fatalf("%d mounts on %s, want 1", got, target)
	}
	if err := dialIn(target); err != nil {
		n.t.Fatalf("the agent cannot be reached through the volume: %v", err)
	}
	n.wantRecord(r, true)
}

// dialIn connects to the agent in a directory whose path is longer than a
// socket address can be.
func dialIn(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	c, err := net.Dial("unix", fmt.Sprintf("/proc/self/fd/%d/socket", f.Fd()))
	if err != nil {
		return err
	}
	return c.Close()
}

// wantNothing checks that nothing is left of a volume.
func (n *node) wantNothing(r *csipb.NodePublishVolumeRequest) {
	n.t.Helper()
	target := filepath.Clean(r.GetTargetPath())
	if got := mountsAt(n.t, target); got != 0 {
		n.t.Fatalf("%d mounts on %s, want none", got, target)
	}
	if _, err := os.Lstat(target); !errors.Is(err, os.ErrNotExist) {
		n.t.Fatalf("%s is still there (%v)", target, err)
	}
	n.wantRecord(r, false)
}

// wantRecord reads the ledger from its files, as the agent does.
func (n *node) wantRecord(r *csipb.NodePublishVolumeRequest, want bool) {
	n.t.Helper()
	s, err := ledger.Open(n.ledger, nil)
	if err != nil {
		n.t.Fatal(err)
	}
	rec, ok := s.Get(r.GetVolumeId())
	if ok != want {
		n.t.Fatalf("record of %s: %v, want %v", r.GetVolumeId(), ok, want)
	}
	if ok && (rec.PodUID != r.GetVolumeContext()["csi.storage.k8s.io/pod.uid"] || rec.PodName != "web-0" || rec.PodNamespace != "default" || rec.ServiceAccount != "web") {
		n.t.Fatalf("record says %+v", rec)
	}
}

var testTime = time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
