package csi

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/internal/mount"
)

// targetMode is the mode of the directories the driver makes; the kubelet's
// own have the same.
const targetMode = 0o750

// NodePublishVolume mounts the agent's socket directory on the target. The
// steps, each of which a repetition finds done or does: validate, open the
// source, lock, look, ask for the agent, record, make the directory, bind.
func (d *Driver) NodePublishVolume(ctx context.Context, req *csipb.NodePublishVolumeRequest) (*csipb.NodePublishVolumeResponse, error) {
	v, err := d.validatePublish(req)
	if err != nil {
		return nil, err
	}
	unlock, err := d.lock(ctx, v.id, v.target.rel)
	if err != nil {
		return nil, err
	}
	defer unlock()
	did, err := d.publish(ctx, v)
	if err != nil {
		return nil, err
	}
	d.log.LogAttrs(ctx, slog.LevelInfo, "volume published",
		slog.String("outcome", did),
		slog.String("volume_id", v.id),
		slog.String("volume", v.target.name),
		slog.String("namespace", v.record.PodNamespace),
		slog.String("pod", v.record.PodName),
		slog.String("pod_uid", v.record.PodUID))
	return &csipb.NodePublishVolumeResponse{}, nil
}

// lock keeps other calls for the same target, and for the same volume, waiting.
// Targets are locked before volumes, so that no two calls wait for each other.
func (d *Driver) lock(ctx context.Context, volumeID, rel string) (unlock func(), err error) {
	first, err := d.locks.lock(ctx, "target "+rel)
	if err != nil {
		return nil, status.Errorf(codes.Aborted, "another call for this target is still at work: %v", err)
	}
	second, err := d.locks.lock(ctx, "volume "+volumeID)
	if err != nil {
		first()
		return nil, status.Errorf(codes.Aborted, "another call for this volume is still at work: %v", err)
	}
	return func() {
		second()
		first()
	}, nil
}

// What a publish found to do, for logs and metrics.
const (
	didMount   = "mounted"
	didNothing = "already mounted"
	didRepair  = "repaired"
)

func (d *Driver) publish(ctx context.Context, v volume) (did string, err error) {
	src, err := d.openSource()
	if err != nil {
		return "", err
	}
	defer src.Close()
	t, err := d.openTarget(v.target)
	if err != nil {
		return "", err
	}
	defer t.Close()
	if err := t.Lock(ctx); err != nil {
		return "", internal(err)
	}
	state, err := t.Look()
	if err != nil {
		return "", internal(err)
	}
	if err := d.conflict(v); err != nil {
		return "", err
	}
	v.record.SourceDev, v.record.SourceIno = src.ID().Dev, src.ID().Ino
	old, recorded := d.cfg.Ledger.Get(v.id)
	switch {
	case state.Kind == mount.Other:
		return "", status.Errorf(codes.FailedPrecondition, "%s is no directory and not the driver's: remove it", t.Path())
	case state.Kind == mount.Mounted && state.ID == src.ID():
		// The mount stands; only the record may have been lost with its tmpfs.
		return didNothing, d.keep(v.record, old, recorded)
	case state.Kind == mount.Mounted:
		return didRepair, d.repair(t, src, state, v, old, recorded)
	}
	return didMount, d.mount(t, src, state, v, old, recorded)
}

// openTarget opens the directory the target is in; errors are answers to the
// kubelet.
func (d *Driver) openTarget(vt volumeTarget) (Target, error) {
	t, err := d.cfg.Mounts.Target(vt.root, vt.rel)
	switch {
	case err == nil:
		return t, nil
	case errors.Is(err, mount.ErrSymlink), errors.Is(err, unix.ENOTDIR):
		return nil, invalid("target_path: %v", err)
	case errors.Is(err, os.ErrNotExist):
		return nil, status.Errorf(codes.FailedPrecondition, "target_path: %v: the kubelet makes it before it calls; is %s/pods mounted into the driver, with mountPropagation: Bidirectional?", err, vt.root)
	}
	return nil, internal(err)
}

// conflict refuses what only a caller other than the kubelet can ask: one
// volume on two targets, or two volumes on one.
func (d *Driver) conflict(v volume) error {
	if r, ok := d.cfg.Ledger.Get(v.id); ok && r.TargetPath != v.target.path() {
		return status.Errorf(codes.FailedPrecondition, "volume %s is published at %s: unpublish it there first", v.id, r.TargetPath)
	}
	if !d.cfg.AnyVolumeID {
		return nil // the ID follows from the target
	}
	for _, r := range d.cfg.Ledger.List() {
		if r.TargetPath == v.target.path() && r.VolumeID != v.id {
			return status.Errorf(codes.AlreadyExists, "volume %s is published at %s: unpublish it first", r.VolumeID, r.TargetPath)
		}
	}
	return nil
}

// keep makes sure that the ledger says what the request says.
func (d *Driver) keep(want, old ledger.Record, recorded bool) error {
	if recorded && old.Same(want) {
		return nil
	}
	want.Published = time.Now().UTC()
	if recorded {
		want.Published = old.Published
	}
	if err := d.cfg.Ledger.Put(want); err != nil {
		return ledgerError(err)
	}
	d.metrics.volumes.Set(float64(d.cfg.Ledger.Len()))
	return nil
}

// mount is the whole way from nothing, or from what a crash left of an earlier
// attempt. On failure it takes back what it did.
func (d *Driver) mount(t Target, src *mount.Source, state mount.State, v volume, old ledger.Record, recorded bool) (err error) {
	if err := d.agent.check(src); err != nil {
		return err
	}
	var made bool
	defer func() {
		if err == nil {
			return
		}
		var undo []error
		if made {
			undo = append(undo, t.Rmdir())
		}
		undo = append(undo, d.restore(v.id, old, recorded))
		if e := errors.Join(undo...); e != nil {
			d.log.Error("failed publish left something behind", slog.String("volume_id", v.id), slog.String("target", t.Path()), slog.Any("error", e))
		}
	}()
	if err := d.keep(v.record, old, recorded); err != nil {
		return err
	}
	if state.Kind == mount.Absent {
		if err := t.Mkdir(targetMode); err != nil {
			return stepError(err)
		}
		made = true
	}
	return d.bind(t, src)
}

// bind mounts, and unmounts if what came out is not what was asked for.
func (d *Driver) bind(t Target, src *mount.Source) error {
	err := t.Bind(src, mount.Options{ReadOnly: d.cfg.ReadOnly})
	if err == nil {
		return nil
	}
	if st, e := t.Look(); e == nil && st.Kind == mount.Mounted && st.ID == src.ID() {
		_, e = t.Unmount()
		err = errors.Join(err, e)
	}
	return stepError(err)
}

// repair replaces a mount that leads to another directory than the live one:
// the socket directory was deleted and made anew, or is another by
// configuration. It must be ours, and there must be something better to put in
// its place.
func (d *Driver) repair(t Target, src *mount.Source, state mount.State, v volume, old ledger.Record, recorded bool) error {
	mine := d.claim(v.id, v.target, t, old, recorded)
	if err := mine.check(state); err != nil {
		return err
	}
	if err := d.agent.check(src); err != nil {
		return err
	}
	if _, err := d.unmountAll(t, mine); err != nil {
		return internal(err)
	}
	if err := d.keep(v.record, old, recorded); err != nil {
		return err
	}
	if err := d.bind(t, src); err != nil {
		// The dead mount cannot be had back. The next publish, or
		// reconciliation, goes on from here; only what the ledger did not say
		// before it shall not say now.
		if e := d.restore(v.id, old, recorded); e != nil {
			d.log.Error("failed repair left a record behind", slog.String("volume_id", v.id), slog.Any("error", e))
		}
		return err
	}
	return nil
}

// restore puts the ledger back to what it was.
func (d *Driver) restore(id string, old ledger.Record, recorded bool) error {
	now, ok := d.cfg.Ledger.Get(id)
	if !recorded {
		if !ok {
			return nil
		}
		return d.cfg.Ledger.Delete(id)
	}
	if ok && now == old {
		return nil
	}
	return d.cfg.Ledger.Put(old)
}

// internal is for failures that are the node's, not the request's. What is an
// answer already stays as it is.
func internal(err error) error {
	if st, ok := status.FromError(err); ok {
		return st.Err()
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		return status.Errorf(codes.Aborted, "%v", err)
	}
	return status.Errorf(codes.Internal, "%v", err)
}

// ledgerError gives the kubelet a code to retry with where room or a mount
// option is what is missing.
func ledgerError(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return status.Errorf(codes.ResourceExhausted, "%v: free room on the filesystem of the ledger", err)
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		return status.Errorf(codes.Internal, "%v: the ledger's directory must be writable for the driver", err)
	}
	return internal(err)
}

func stepError(err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return status.Errorf(codes.ResourceExhausted, "%v: the filesystem, or the kernel's limit of mounts (fs.mount-max), is full", err)
	case errors.Is(err, unix.EPERM):
		return status.Errorf(codes.Internal, "%v: the driver's container must be privileged", err)
	}
	return internal(err)
}
