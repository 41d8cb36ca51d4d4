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
	rec, recorded := d.cfg.Ledger.Get(id)
	if recorded && rec.TargetPath != vt.path() {
		// Its own unpublish names its own target; this one is a stranger's.
		recorded = false
	}
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
	state, err := d.lookAt(t, recorded)
	if err != nil {
		return "", internal(err)
	}
	if state.Kind != mount.Mounted && !recorded {
		return didNotKnow, nil
	}
	// The ledger speaks for all that is mounted on a target of its own: after a
	// change of the host path behind the source, nothing else could.
	var mayTake func(mount.State) error
	if !recorded {
		mayTake = func(st mount.State) error { return d.mayTake(id, vt, t, st) }
	}
	did = didForget
	if state.Kind == mount.Mounted {
		did = didUnmount
		if state, err = d.unmountAll(t, mayTake); err != nil {
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

// mayTake decides on a mount no record speaks for: the mount table, or the
// directory itself, must say that it is ours, and the volume ID that it is the
// one the caller means.
func (d *Driver) mayTake(id string, vt volumeTarget, t Target, state mount.State) error {
	if want := VolumeID(vt.uid, vt.name); !d.cfg.AnyVolumeID && id != want {
		return status.Errorf(codes.FailedPrecondition, "volume_id %q is not that of what is mounted on %s, which is %s; nothing was touched", id, t.Path(), want)
	}
	src, err := mountSource(d.cfg.SourceDir)
	if err == nil {
		defer src.Close()
		if state.ID == src.ID() {
			return nil
		}
		ours, err := d.oursByTable(t.Path(), src)
		if err != nil {
			return internal(err)
		}
		if ours {
			return nil
		}
	}
	return status.Errorf(codes.FailedPrecondition, "what is mounted on %s is neither in the ledger nor the agent's socket directory %s: it is not the driver's and was not touched; unmount it by hand if nobody needs it", t.Path(), d.cfg.SourceDir)
}

// oursByTable says whether every mount on the target is of the path of the
// socket directory, alive or deleted. It reads the whole mount table.
func (d *Driver) oursByTable(target string, src *mount.Source) (bool, error) {
	table, err := d.cfg.Mounts.Table()
	if err != nil {
		return false, err
	}
	ours, err := table.Of(src)
	if err != nil {
		return false, err
	}
	n := 0
	for _, point := range d.spellings(target) {
		all := table.At(point)
		if len(ours.At(point)) != len(all) {
			return false, nil
		}
		n += len(all)
	}
	return n > 0, nil
}

// spellings are the paths under which the mount table may show a target: the
// table resolves symbolic links.
func (d *Driver) spellings(target string) []string {
	out := []string{target}
	rel, ok := strings.CutPrefix(target, d.roots[0]+"/")
	if ok && len(d.roots) > 1 {
		out = append(out, path.Join(d.roots[1], rel))
	}
	return out
}

// unmountAll takes everything off the target and returns what is left. Each
// mount is asked for first; a nil mayTake allows all of them.
func (d *Driver) unmountAll(t Target, mayTake func(mount.State) error) (mount.State, error) {
	for range maxStack {
		state, err := d.lookAt(t, mayTake == nil)
		if err != nil || state.Kind != mount.Mounted {
			return state, err
		}
		if mayTake != nil {
			if err := mayTake(state); err != nil {
				return state, err
			}
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

// lookAt is Look, except that a mount of ours whose filesystem no longer
// answers (the socket directory may be anywhere) is still a mount.
func (d *Driver) lookAt(t Target, ours bool) (mount.State, error) {
	state, err := t.Look()
	if ours && mount.Corrupted(err) {
		d.log.Warn("what is mounted on the target does not answer and is unmounted unseen", slog.String("target", t.Path()), slog.Any("error", err))
		return mount.State{Kind: mount.Mounted}, nil
	}
	return state, err
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
