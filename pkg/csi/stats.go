package csi

import (
	"context"
	"errors"
	"fmt"
	"os"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/mount"
)

// NodeGetInfo names the node; there is no limit of volumes and no topology.
func (d *Driver) NodeGetInfo(context.Context, *csipb.NodeGetInfoRequest) (*csipb.NodeGetInfoResponse, error) {
	return &csipb.NodeGetInfoResponse{NodeId: d.cfg.NodeID}, nil
}

// NodeGetCapabilities are volume statistics and, in the forms before and since
// CSI 1.13, the volume's condition.
func (d *Driver) NodeGetCapabilities(context.Context, *csipb.NodeGetCapabilitiesRequest) (*csipb.NodeGetCapabilitiesResponse, error) {
	var out csipb.NodeGetCapabilitiesResponse
	for _, c := range []csipb.NodeServiceCapability_RPC_Type{
		csipb.NodeServiceCapability_RPC_GET_VOLUME_STATS,
		csipb.NodeServiceCapability_RPC_GET_VOLUME_HEALTH,
		capVolumeCondition,
	} {
		out.Capabilities = append(out.Capabilities, &csipb.NodeServiceCapability{
			Type: &csipb.NodeServiceCapability_Rpc{Rpc: &csipb.NodeServiceCapability_RPC{Type: c}},
		})
	}
	return &out, nil
}

// NodeGetVolumeStats says how the volume is: the condition is abnormal unless
// the live socket directory is mounted and a socket in it answers. The usage is
// that of the filesystem the directory is on; a socket directory has none of
// its own.
func (d *Driver) NodeGetVolumeStats(ctx context.Context, req *csipb.NodeGetVolumeStatsRequest) (*csipb.NodeGetVolumeStatsResponse, error) {
	id, p := req.GetVolumeId(), req.GetVolumePath()
	if err := validateIDs(id, "volume_path", p); err != nil {
		return nil, err
	}
	c, err := d.inspect(id, p)
	if err != nil {
		return nil, err
	}
	usage := c.usage
	if usage == nil { // the kubelet refuses an answer without one
		usage = []*csipb.VolumeUsage{{Unit: csipb.VolumeUsage_BYTES}}
	}
	resp := &csipb.NodeGetVolumeStatsResponse{Usage: usage}
	addVolumeCondition(resp, c)
	return resp, nil
}

// NodeGetVolumeHealth is the condition in the form of CSI 1.13.
func (d *Driver) NodeGetVolumeHealth(ctx context.Context, req *csipb.NodeGetVolumeHealthRequest) (*csipb.NodeGetVolumeHealthResponse, error) {
	id, p := req.GetVolumeId(), req.GetVolumePublishPath()
	if id != "" && p == "" { // the path is optional in the request
		r, ok := d.cfg.Ledger.Get(id)
		if !ok {
			return nil, status.Errorf(codes.NotFound, "volume %.128q is not published", id)
		}
		p = r.TargetPath
	}
	if err := validateIDs(id, "volume_publish_path", p); err != nil {
		return nil, err
	}
	c, err := d.inspect(id, p)
	if err != nil {
		return nil, err
	}
	h := &csipb.VolumeHealth{VolumeId: id}
	if c.reason != "" {
		h.HealthStatuses = []*csipb.VolumeHealth_VolumeHealthEntry{{
			Status:  csipb.VolumeHealthErrorType_INACCESSIBLE,
			Reason:  c.reason,
			Message: c.message,
		}}
	}
	return &csipb.NodeGetVolumeHealthResponse{VolumeHealth: h}, nil
}

// condition is how a volume is. An empty reason is a healthy one.
type condition struct {
	reason  string // CamelCase
	message string
	usage   []*csipb.VolumeUsage
}

// inspect looks at a volume; that it is not published at the path is NotFound.
func (d *Driver) inspect(id, p string) (condition, error) {
	vt, err := parseTarget(d.roots, p)
	if err != nil {
		return condition{}, status.Errorf(codes.NotFound, "the volume path %v", err)
	}
	rec, recorded := d.cfg.Ledger.Get(id)
	recorded = recorded && rec.TargetPath == vt.path()
	if !recorded && id != VolumeID(vt.uid, vt.name) {
		return condition{}, status.Errorf(codes.NotFound, "volume %s is not published at %s", id, vt.path())
	}
	t, err := d.cfg.Mounts.Target(vt.root, vt.rel)
	switch {
	case err == nil:
		defer t.Close()
	case errors.Is(err, os.ErrNotExist), errors.Is(err, mount.ErrSymlink):
		return condition{}, status.Errorf(codes.NotFound, "the volume path: %v", err)
	default:
		return condition{}, internal(err)
	}
	state, err := t.Look()
	switch {
	case mount.Corrupted(err):
		return condition{reason: "FilesystemUnreachable", message: fmt.Sprintf("the filesystem does not answer: %v", err)}, nil
	case err != nil:
		return condition{}, internal(err)
	case state.Kind == mount.Mounted:
		return d.inspectMounted(t)
	case recorded:
		return condition{reason: "NotMounted", message: "the volume was published but nothing is mounted any more: restart the driver to have it mounted again, and the pod if it does not see it"}, nil
	}
	return condition{}, status.Errorf(codes.NotFound, "volume %s is not mounted at %s", id, vt.path())
}

// inspectMounted looks into what is mounted.
func (d *Driver) inspectMounted(t Target) (condition, error) {
	dir, err := t.OpenMounted()
	if err != nil {
		return condition{}, internal(err)
	}
	defer dir.Close()
	c := condition{message: "the agent's socket directory is mounted and a socket in it answers"}
	if c.usage, err = usageOf(dir); err != nil {
		return condition{}, internal(err)
	}
	live, err := mountSource(d.cfg.SourceDir)
	if err != nil {
		c.reason, c.message = "SourceMissing", fmt.Sprintf("the agent's socket directory cannot be looked at: %v", err)
		return c, nil
	}
	defer live.Close()
	const remedy = "the next publish, or a restart of the driver, repairs the mount; a pod that still sees the old directory must be made anew"
	switch {
	case dir.Deleted(), live.Deleted():
		c.reason, c.message = "SourceDeleted", "the agent's socket directory was deleted on the host and the mount leads nowhere: "+remedy
		return c, nil
	case dir.ID() != live.ID():
		c.reason, c.message = "SourceReplaced", "another directory than the agent's socket directory is mounted: "+remedy
		return c, nil
	}
	if err := d.agent.answers(dir); err != nil {
		c.reason, c.message = "AgentNotServing", fmt.Sprintf("no agent answers: %v", err)
	}
	return c, nil
}

func usageOf(dir *mount.Source) ([]*csipb.VolumeUsage, error) {
	fs, err := dir.Statfs()
	if err != nil {
		return nil, err
	}
	bs := fs.Bsize
	return []*csipb.VolumeUsage{{
		Unit:      csipb.VolumeUsage_BYTES,
		Total:     int64(fs.Blocks) * bs,
		Available: int64(fs.Bavail) * bs,
		Used:      int64(fs.Blocks-fs.Bfree) * bs,
	}, {
		Unit:      csipb.VolumeUsage_INODES,
		Total:     int64(fs.Files),
		Available: int64(fs.Ffree),
		Used:      int64(fs.Files - fs.Ffree),
	}}, nil
}
