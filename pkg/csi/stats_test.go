package csi_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

// oldCondition reads the condition where a kubelet built with CSI 1.12 or
// before finds it: field 2, with abnormal 1 and message 2.
func oldCondition(t *testing.T, resp *csipb.NodeGetVolumeStatsResponse) (abnormal bool, message string) {
	t.Helper()
	b := resp.ProtoReflect().GetUnknown()
	num, typ, n := protowire.ConsumeTag(b)
	if num != 2 || typ != protowire.BytesType {
		t.Fatalf("no condition in the answer: %x", b)
	}
	m, k := protowire.ConsumeBytes(b[n:])
	if k < 0 || n+k != len(b) {
		t.Fatalf("more than a condition in the answer: %x", b)
	}
	num, typ, n = protowire.ConsumeTag(m)
	v, k := protowire.ConsumeVarint(m[n:])
	if num != 1 || typ != protowire.VarintType || k < 0 {
		t.Fatalf("not a condition: %x", m)
	}
	m = m[n+k:]
	num, typ, n = protowire.ConsumeTag(m)
	text, k := protowire.ConsumeString(m[n:])
	if num != 2 || typ != protowire.BytesType || n+k != len(m) {
		t.Fatalf("not a condition: %x", m)
	}
	return v == 1, text
}

func TestVolumeConditionTellsTheTruth(t *testing.T) {
	for name, c := range map[string]struct {
		change func(t *testing.T, n *node, target string)
		reason string
	}{
		"healthy":       {func(*testing.T, *node, string) {}, ""},
		"agent away":    {func(_ *testing.T, n *node, _ string) { _ = n.agent.Close() }, "AgentNotServing"},
		"agent is dead": {func(_ *testing.T, n *node, _ string) { n.deadSocket() }, "AgentNotServing"},
		"replaced":      {func(_ *testing.T, n *node, _ string) { n.replaceSource() }, "SourceDeleted"},
		"moved": {func(t *testing.T, n *node, _ string) {
			t.Helper()
			if err := os.Rename(n.source, n.source+".old"); err != nil {
				t.Fatal(err)
			}
			mkdir(t, n.source)
			n.startAgent()
		}, "SourceReplaced"},
		"source gone": {func(t *testing.T, n *node, _ string) {
			t.Helper()
			if err := os.Rename(n.source, n.source+".old"); err != nil {
				t.Fatal(err)
			}
		}, "SourceMissing"},
		"unmounted": {func(t *testing.T, _ *node, target string) {
			t.Helper()
			if err := unix.Unmount(target, 0); err != nil {
				t.Fatal(err)
			}
		}, "NotMounted"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.request(testUID, testVolume)
			n.publish(r)
			c.change(t, n, r.GetTargetPath())
			resp, err := n.client.NodeGetVolumeStats(context.Background(), &csipb.NodeGetVolumeStatsRequest{VolumeId: r.GetVolumeId(), VolumePath: r.GetTargetPath() + "/"})
			if err != nil {
				t.Fatal(err)
			}
			if len(resp.GetUsage()) == 0 || resp.GetUsage()[0].GetUnit() != csipb.VolumeUsage_BYTES {
				t.Errorf("usage %v", resp.GetUsage())
			}
			abnormal, message := oldCondition(t, resp)
			if abnormal != (c.reason != "") || message == "" {
				t.Errorf("condition %v %q, want %q", abnormal, message, c.reason)
			}
			health, err := n.client.NodeGetVolumeHealth(context.Background(), &csipb.NodeGetVolumeHealthRequest{VolumeId: r.GetVolumeId()})
			if err != nil {
				t.Fatal(err)
			}
			got := health.GetVolumeHealth().GetHealthStatuses()
			if (c.reason == "") != (len(got) == 0) || c.reason != "" && (got[0].GetReason() != c.reason || got[0].GetMessage() != message) {
				t.Errorf("health %v, want %q", got, c.reason)
			}
		})
	}
}

// deadSocket leaves the socket and nobody behind it.
func (n *node) deadSocket() {
	n.t.Helper()
	path := filepath.Join(n.source, "socket")
	if err := os.Rename(path, path+".kept"); err != nil {
		n.t.Fatal(err)
	}
	_ = n.agent.Close()
	if err := os.Rename(path+".kept", path); err != nil {
		n.t.Fatal(err)
	}
}

func TestStatsRefusals(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	n.publish(r)
	for name, c := range map[string]struct {
		id, path string
		want     codes.Code
	}{
		"no ID":            {"", r.GetTargetPath(), codes.InvalidArgument},
		"no path":          {r.GetVolumeId(), "", codes.InvalidArgument},
		"unknown volume":   {"nobody's", "some/path", codes.NotFound},
		"another path":     {r.GetVolumeId(), "some/path", codes.NotFound},
		"not published":    {csi.VolumeID(testUID, "other"), n.target(testUID, "other"), codes.NotFound},
		"another's target": {"nobody's", r.GetTargetPath(), codes.NotFound},
		"no such pod":      {csi.VolumeID(otherUID, testVolume), strings.Replace(r.GetTargetPath(), testUID, otherUID, 1), codes.NotFound},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := n.client.NodeGetVolumeStats(context.Background(), &csipb.NodeGetVolumeStatsRequest{VolumeId: c.id, VolumePath: c.path})
			wantCode(t, err, c.want)
		})
	}
	_, err := n.client.NodeGetVolumeHealth(context.Background(), &csipb.NodeGetVolumeHealthRequest{})
	wantCode(t, err, codes.InvalidArgument)
	_, err = n.client.NodeGetVolumeHealth(context.Background(), &csipb.NodeGetVolumeHealthRequest{VolumeId: "nobody's"})
	wantCode(t, err, codes.NotFound)
}

func TestIdentity(t *testing.T) {
	n := newNode(t)
	ctx := context.Background()
	info, err := n.ids.GetPluginInfo(ctx, &csipb.GetPluginInfoRequest{})
	if err != nil || info.GetName() != "csi.spiffe.io" || info.GetVendorVersion() != "test" {
		t.Errorf("info %v, %v", info, err)
	}
	caps, err := n.ids.GetPluginCapabilities(ctx, &csipb.GetPluginCapabilitiesRequest{})
	if err != nil || len(caps.GetCapabilities()) != 0 {
		t.Errorf("capabilities %v, %v", caps, err)
	}
	node, err := n.client.NodeGetInfo(ctx, &csipb.NodeGetInfoRequest{})
	if err != nil || node.GetNodeId() != "node-1" || node.GetMaxVolumesPerNode() != 0 || node.GetAccessibleTopology() != nil {
		t.Errorf("node %v, %v", node, err)
	}
	nc, err := n.client.NodeGetCapabilities(ctx, &csipb.NodeGetCapabilitiesRequest{})
	if err != nil || len(nc.GetCapabilities()) != 3 {
		t.Errorf("node capabilities %v, %v", nc, err)
	}
	_, err = n.client.NodeStageVolume(ctx, &csipb.NodeStageVolumeRequest{})
	wantCode(t, err, codes.Unimplemented)
	probe, err := n.ids.Probe(ctx, &csipb.ProbeRequest{})
	if err != nil || !probe.GetReady().GetValue() {
		t.Errorf("probe %v, %v", probe, err)
	}
}

func TestNewNamesWhatIsMissing(t *testing.T) {
	root := t.TempDir()
	n := struct{ csi.Ledger }{}
	for want, change := range map[string]func(*csi.Config){
		"node ID":          func(c *csi.Config) { c.NodeID = "" },
		"256":              func(c *csi.Config) { c.NodeID = strings.Repeat("n", 257) },
		"plugin name":      func(c *csi.Config) { c.Name = "csi/spiffe" },
		"socket directory": func(c *csi.Config) { c.SourceDir = "" },
		"absolute":         func(c *csi.Config) { c.SourceDir = "here" },
		"--root-dir":       func(c *csi.Config) { c.KubeletRoot = filepath.Join(root, "none") },
		"kubelet root":     func(c *csi.Config) { c.KubeletRoot = "here" },
		"ledger":           func(c *csi.Config) { c.Ledger = nil },
		"socket name":      func(c *csi.Config) { c.SocketNames = []string{"a/b"} },
		"agent check":      func(c *csi.Config) { c.AgentCheck = "maybe" },
		"needs a socket":   func(c *csi.Config) { c.SocketNames = []string{} },
	} {
		cfg := csi.Config{NodeID: "n", SourceDir: "/run/x", KubeletRoot: root, Ledger: n}
		change(&cfg)
		if _, err := csi.New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not say %q", err, want)
		}
	}
}
