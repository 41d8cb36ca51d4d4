package csi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"strings"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/internal/mount"
)

// maxStack bounds how many mounts are taken off one target. Earlier drivers
// stacked tens of thousands over a host, but not on one path.
const maxStack = 100_000

// NodeUnpublishVolume takes the volume off the target: unmount, remove the
// directory, forget the record. A volume that is neither recorded nor mounted
// is answered OK, and nothing is touched.
func (d *Driver) NodeUnpublishVolume(ctx context.Context, req *csipb.NodeUnpublishVolumeRequest) (*csipb.NodeUnpublishVolumeResponse, error) {
	id, target := req.GetVolumeId(), req.GetTargetPath()
	if err := validateIDs(id, "target_path", target); err != nil {
		return nil, err
	}
	vt, err := d.unpublishTarget(id, target)
	if err != nil {
		return nil, err
	}
	unlock, err := d.lock(ctx, id, vt.rel)
	if err != nil {
		return nil, err
	}
	defer unlock()
	did, err := d.unpublish(ctx, id, vt)
	if err != nil {
		return nil, err
	}
	d.log.LogAttrs(ctx, slog.LevelInfo, "volume unpublished", slog.String("outcome", did), slog.String("volume_id", id), slog.String("volume", vt.name), slog.String("pod_uid", vt.uid))
	return &csipb.NodeUnpublishVolumeResponse{}, nil
}

// unpublishTarget is parseTarget, or what the ledger says where the volume was
// published under another kubelet root.
func (d *Driver) unpublishTarget(id, target string) (volumeTarget, error) {
	vt, err := parseTarget(d.roots, target)
	if err == nil {
		return vt, nil
	}
	if r, ok := d.cfg.Ledger.Get(id); ok && len(target) < maxPath && path.Clean(target) == r.TargetPath {
		return volumeTarget{root: "/", rel: strings.TrimPrefix(r.TargetPath, "/"), uid: r.PodUID, name: r.VolumeName}, nil
	}
	return volumeTarget{}, invalid("target_path %v; nothing was touched", err)
}

// What an unpublish found to do.
const (
	didUnmount = "unmounted"
	didForget  = "was not mounted"
	didNotKnow = "unknown, nothing touched"
)

func (d *Driver) unpublish(ctx context.Context, id string, vt volumeTarget) (did string, err error) {
	_, recorded := d.record(id, vt)
	t, err := d.cfg.Mounts.Target(vt.root, vt.rel)
	switch {
	case errors.Is(err, os.ErrNotExist):
		// No parent, no mount.
		return d.forget(id, recorded, didForget)
	case errors.Is(err, mount.ErrSymlink), errors.Is(err, unix.ENOTDIR):
		return "", invalid("target_path: %v; nothing was touched", err)
	case err != nil:
		return "", internal(err)
	}
	defer t.Close()
	if err := t.Lock(ctx); err != nil {
		return "", internal(err)
	}
	// Another process may have been at work until the lock was free.
	rec, recorded := d.record(id, vt)
	mine := d.claim(id, vt, t, rec, recorded)
	state, err := mine.look()
	if err != nil {
		return "", internal(err)
	}
	if state.Kind != mount.Mounted && !recorded {
		return didNotKnow, nil
	}
	did = didForget
	if state.Kind == mount.Mounted {
		did = didUnmount
		if state, err = d.unmountAll(t, mine); err != nil {
			return "", internal(err)
		}
	}
	if state.Kind == mount.Directory {
		if err := t.Rmdir(); err != nil {
			if errors.Is(err, unix.ENOTEMPTY) {
				return "", status.Errorf(codes.FailedPrecondition, "%v: the volume is unmounted, what is in the directory is not the driver's: remove it", err)
			}
			return "", internal(err)
		}
	}
	return d.forget(id, recorded, did)
}

// record is the volume's record if it is of this target.
func (d *Driver) record(id string, vt volumeTarget) (ledger.Record, bool) {
	r, ok := d.cfg.Ledger.Get(id)
	return r, ok && r.TargetPath == vt.path()
}

// unmountAll takes everything off the target and returns what is left. It stops
// at a mount that is not ours.
func (d *Driver) unmountAll(t Target, mine claim) (mount.State, error) {
	for range maxStack {
		state, err := mine.look()
		if err != nil || state.Kind != mount.Mounted {
			return state, err
		}
		if err := mine.check(state); err != nil {
			return state, err
		}
		lazy, err := t.Unmount()
		if err != nil {
			return state, err
		}
		if lazy {
			d.log.Warn("volume was in use and is detached: it ends when its last user does", slog.String("target", t.Path()))
		}
	}
	return mount.State{}, fmt.Errorf("unmount %s: more than %d mounts are on it", t.Path(), maxStack)
}

// forget removes the record, the last step.
func (d *Driver) forget(id string, recorded bool, did string) (string, error) {
	if !recorded {
		if did == didUnmount {
			return did, nil
		}
		return didNotKnow, nil
	}
	if err := d.cfg.Ledger.Delete(id); err != nil {
		return "", ledgerError(err)
	}
	d.metrics.volumes.Set(float64(d.cfg.Ledger.Len()))
	return did, nil
}
