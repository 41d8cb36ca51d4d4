package csi

import (
	"regexp"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/ledger"
)

// Keys of the volume context that the kubelet fills in if the CSIDriver object
// has podInfoOnMount: true.
const (
	keyEphemeral      = "csi.storage.k8s.io/ephemeral"
	keyPodName        = "csi.storage.k8s.io/pod.name"
	keyPodNamespace   = "csi.storage.k8s.io/pod.namespace"
	keyPodUID         = "csi.storage.k8s.io/pod.uid"
	keyServiceAccount = "csi.storage.k8s.io/serviceAccount.name"
)

// maxVolumeID is the bound CSI gives to its strings.
const maxVolumeID = 128

// objectName is what a namespace, pod or service account can be called.
var objectName = regexp.MustCompile(`^[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?$`)

func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

// volume is a publish request that passed.
type volume struct {
	id     string
	target volumeTarget
	record ledger.Record
}

// validatePublish checks a request. The order, and what is asked of the
// capability, are those of spiffe-csi; the checks of the pod are ours. Every
// refusal names the field of the pod, or of the CSIDriver object, that mends
// it.
func (d *Driver) validatePublish(req *csipb.NodePublishVolumeRequest) (volume, error) {
	if err := validateIDs(req.GetVolumeId(), "target_path", req.GetTargetPath()); err != nil {
		return volume{}, err
	}
	if err := validateCapability(req.GetVolumeCapability()); err != nil {
		return volume{}, err
	}
	if !req.GetReadonly() {
		return volume{}, invalid("the volume must be read-only: set spec.volumes[].csi.readOnly: true in the pod")
	}
	vc := req.GetVolumeContext()
	if vc[keyEphemeral] != "true" {
		return volume{}, invalid("only inline volumes are published: use spec.volumes[].csi in the pod, not a persistent volume; if it is one, the CSIDriver object %s lacks podInfoOnMount: true", d.cfg.Name)
	}
	return d.validatePod(req.GetVolumeId(), req.GetTargetPath(), vc)
}

func validateIDs(volumeID, pathField, path string) error {
	switch {
	case volumeID == "":
		return invalid("volume_id is missing from the request")
	case len(volumeID) > maxVolumeID:
		return invalid("volume_id has %d bytes, the most is %d", len(volumeID), maxVolumeID)
	case path == "":
		return invalid("%s is missing from the request", pathField)
	}
	return nil
}

func validateCapability(c *csipb.VolumeCapability) error {
	if c == nil {
		return invalid("volume_capability is missing from the request")
	}
	if c.GetAccessType() == nil {
		return invalid("volume_capability has no access_type")
	}
	m := c.GetMount()
	switch {
	case m == nil:
		return invalid("the volume can be mounted only: it is no block device; remove it from spec.containers[].volumeDevices of the pod")
	case m.GetFsType() != "":
		return invalid("the volume has no filesystem of its own: remove spec.volumes[].csi.fsType (%q) from the pod", m.GetFsType())
	case len(m.GetMountFlags()) > 0:
		return invalid("the volume takes no mount options (%d given): remove seLinuxMount from the CSIDriver object if it is set", len(m.GetMountFlags()))
	case c.GetAccessMode() == nil:
		return invalid("volume_capability has no access_mode")
	case c.GetAccessMode().GetMode() == csipb.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY:
		return invalid("access mode SINGLE_NODE_READER_ONLY is for persistent volumes: use spec.volumes[].csi with readOnly: true in the pod")
	}
	return nil
}

// validatePod holds the witnesses of the pod against each other: the volume
// context, the target path and the volume ID.
func (d *Driver) validatePod(id, target string, vc map[string]string) (volume, error) {
	for _, f := range []struct {
		key, field string
		optional   bool
	}{
		{key: keyPodNamespace, field: "metadata.namespace"},
		{key: keyPodName, field: "metadata.name"},
		// A static pod has none.
		{key: keyServiceAccount, field: "spec.serviceAccountName", optional: true},
	} {
		v := vc[f.key]
		if v == "" && f.optional {
			continue
		}
		if v == "" {
			return volume{}, invalid("the pod's %s is missing (volume context %s): the CSIDriver object %s must have podInfoOnMount: true", f.field, f.key, d.cfg.Name)
		}
		if !objectName.MatchString(v) {
			return volume{}, invalid("the pod's %s (volume context %s) is not a name Kubernetes allows", f.field, f.key)
		}
	}
	uid := vc[keyPodUID]
	if uid == "" {
		return volume{}, invalid("the pod's metadata.uid is missing (volume context %s): the CSIDriver object %s must have podInfoOnMount: true", keyPodUID, d.cfg.Name)
	}
	t, err := parseTarget(d.roots, target)
	if err != nil {
		return volume{}, invalid("target_path %v", err)
	}
	if t.uid != uid {
		return volume{}, invalid("the volume context names another pod than the target path: metadata.uid is %.64q there and %q in %s", uid, t.uid, t.path())
	}
	if want := VolumeID(t.uid, t.name); !d.cfg.AnyVolumeID && id != want {
		return volume{}, invalid("volume_id %q is not the kubelet's for volume %s of pod %s, which is %s: callers other than the kubelet compute it the same way, or the driver runs with --any-volume-id", id, t.name, t.uid, want)
	}
	return volume{id: id, target: t, record: ledger.Record{
		VolumeID:       id,
		VolumeName:     t.name,
		PodNamespace:   vc[keyPodNamespace],
		PodName:        vc[keyPodName],
		PodUID:         uid,
		ServiceAccount: vc[keyServiceAccount],
		TargetPath:     t.path(),
		Source:         d.cfg.SourceDir,
	}}, nil
}
