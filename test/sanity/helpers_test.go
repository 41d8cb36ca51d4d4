package sanity_test

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"strings"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/proto"

	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

// The volume every spec works with: one of a pod as the kubelet would name it.
const (
	podUID     = "6f1c2a9e-52f3-4b7e-9d3a-1b0c9a8d7e6f"
	volumeName = "sanity"
)

// controller is the throw-away controller. It keeps nothing: the volume it
// creates is the pod's inline volume, which exists as soon as it is published.
type controller struct {
	csipb.UnimplementedIdentityServer
	csipb.UnimplementedControllerServer
}

func (controller) GetPluginInfo(context.Context, *csipb.GetPluginInfoRequest) (*csipb.GetPluginInfoResponse, error) {
	return &csipb.GetPluginInfoResponse{Name: "sanity.controller.spiffe.io", VendorVersion: "throw-away"}, nil
}

func (controller) GetPluginCapabilities(context.Context, *csipb.GetPluginCapabilitiesRequest) (*csipb.GetPluginCapabilitiesResponse, error) {
	return &csipb.GetPluginCapabilitiesResponse{}, nil
}

func (controller) Probe(context.Context, *csipb.ProbeRequest) (*csipb.ProbeResponse, error) {
	return &csipb.ProbeResponse{}, nil
}

func (controller) ControllerGetCapabilities(context.Context, *csipb.ControllerGetCapabilitiesRequest) (*csipb.ControllerGetCapabilitiesResponse, error) {
	return &csipb.ControllerGetCapabilitiesResponse{}, nil
}

// CreateVolume answers with the kubelet's volume ID and volume context.
func (controller) CreateVolume(_ context.Context, r *csipb.CreateVolumeRequest) (*csipb.CreateVolumeResponse, error) {
	return &csipb.CreateVolumeResponse{Volume: &csipb.Volume{
		VolumeId:      csi.VolumeID(podUID, volumeName),
		CapacityBytes: r.GetCapacityRange().GetRequiredBytes(),
		VolumeContext: map[string]string{
			"csi.storage.k8s.io/ephemeral":           "true",
			"csi.storage.k8s.io/pod.name":            "sanity",
			"csi.storage.k8s.io/pod.namespace":       "default",
			"csi.storage.k8s.io/pod.uid":             podUID,
			"csi.storage.k8s.io/serviceAccount.name": "default",
		},
	}}, nil
}

func (controller) DeleteVolume(context.Context, *csipb.DeleteVolumeRequest) (*csipb.DeleteVolumeResponse, error) {
	return &csipb.DeleteVolumeResponse{}, nil
}

// proxyChanges is what the proxy rewrites, for the output.
const proxyChanges = `readonly=true on NodePublishVolume; the last element of target paths, which the suite calls "target", is "mount" as the kubelet has it`

// nodeProxy passes every call on to the driver; proxyChanges says what it
// changes.
type nodeProxy struct {
	csipb.UnimplementedIdentityServer
	csipb.UnimplementedNodeServer
	ids  csipb.IdentityClient
	node csipb.NodeClient
}

func kubeletSpelling(target string) string {
	if dir, ok := strings.CutSuffix(target, "/target"); ok {
		return dir + "/mount"
	}
	return target
}

func (p *nodeProxy) GetPluginInfo(ctx context.Context, r *csipb.GetPluginInfoRequest) (*csipb.GetPluginInfoResponse, error) {
	return p.ids.GetPluginInfo(ctx, r)
}

func (p *nodeProxy) GetPluginCapabilities(ctx context.Context, r *csipb.GetPluginCapabilitiesRequest) (*csipb.GetPluginCapabilitiesResponse, error) {
	return p.ids.GetPluginCapabilities(ctx, r)
}

func (p *nodeProxy) Probe(ctx context.Context, r *csipb.ProbeRequest) (*csipb.ProbeResponse, error) {
	return p.ids.Probe(ctx, r)
}

func (p *nodeProxy) NodeGetInfo(ctx context.Context, r *csipb.NodeGetInfoRequest) (*csipb.NodeGetInfoResponse, error) {
	return p.node.NodeGetInfo(ctx, r)
}

func (p *nodeProxy) NodeGetCapabilities(ctx context.Context, r *csipb.NodeGetCapabilitiesRequest) (*csipb.NodeGetCapabilitiesResponse, error) {
	return p.node.NodeGetCapabilities(ctx, r)
}

func (p *nodeProxy) NodePublishVolume(ctx context.Context, r *csipb.NodePublishVolumeRequest) (*csipb.NodePublishVolumeResponse, error) {
	r = proto.CloneOf(r)
	r.Readonly = true
	r.TargetPath = kubeletSpelling(r.GetTargetPath())
	return p.node.NodePublishVolume(ctx, r)
}

func (p *nodeProxy) NodeUnpublishVolume(ctx context.Context, r *csipb.NodeUnpublishVolumeRequest) (*csipb.NodeUnpublishVolumeResponse, error) {
	r = proto.CloneOf(r)
	r.TargetPath = kubeletSpelling(r.GetTargetPath())
	return p.node.NodeUnpublishVolume(ctx, r)
}

func (p *nodeProxy) NodeGetVolumeStats(ctx context.Context, r *csipb.NodeGetVolumeStatsRequest) (*csipb.NodeGetVolumeStatsResponse, error) {
	return p.node.NodeGetVolumeStats(ctx, r)
}

func (p *nodeProxy) NodeGetVolumeHealth(ctx context.Context, r *csipb.NodeGetVolumeHealthRequest) (*csipb.NodeGetVolumeHealthResponse, error) {
	return p.node.NodeGetVolumeHealth(ctx, r)
}

// serveController and serveProxy serve on new sockets and return their
// addresses.
func serveController(t *testing.T, dir string) string {
	t.Helper()
	s := grpc.NewServer()
	csipb.RegisterIdentityServer(s, controller{})
	csipb.RegisterControllerServer(s, controller{})
	return serve(t, s, filepath.Join(dir, "controller.sock"))
}

func serveProxy(t *testing.T, dir, driver string) string {
	t.Helper()
	conn := dial(t, driver)
	p := &nodeProxy{ids: csipb.NewIdentityClient(conn), node: csipb.NewNodeClient(conn)}
	s := grpc.NewServer()
	csipb.RegisterIdentityServer(s, p)
	csipb.RegisterNodeServer(s, p)
	return serve(t, s, filepath.Join(dir, "proxy.sock"))
}

func serve(t *testing.T, s *grpc.Server, path string) string {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Errorf("serve %s: %v", path, err)
		}
	})
	return path
}

func dial(t *testing.T, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithAuthority("localhost"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// target is the directory the suite publishes in, as the kubelet makes it.
func target(root string) string {
	return fmt.Sprintf("%s/pods/%s/volumes/kubernetes.io~csi/%s", root, podUID, volumeName)
}
