package csi

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/internal/mount"
)

// Finding is one volume the reconciliation had to say something about.
type Finding struct {
	Target   string
	VolumeID string
	Result   string
	// Err is what kept it from being mended.
	Err error
}

// Results of the reconciliation, also the values of the metric's label.
const (
	// ResultHealthy: recorded and mounted once, of the live directory.
	ResultHealthy = "healthy"
	// ResultRepaired: recorded, and mounted again because nothing, a dead
	// directory or a stack was there.
	ResultRepaired = "repaired"
	// ResultForgotten: recorded, but neither mounted nor known to the kubelet;
	// the record was removed.
	ResultForgotten = "forgotten"
	// ResultRemoved: mounted, but neither recorded nor known to the kubelet:
	// a leak, unmounted.
	ResultRemoved = "removed"
	// ResultUnrecorded: mounted and known to the kubelet, but not recorded:
	// made by another driver, or the ledger was lost. It is left; the next
	// publish records it.
	ResultUnrecorded = "unrecorded"
	// ResultFailed: it could not be mended.
	ResultFailed = "failed"
)

// Reconcile holds the ledger against the mount table and mends what an earlier
// process left between two steps. It may run while calls are served. It
// returns what it found, healthy volumes left out, and how many were looked
// at; the error is for what kept it from looking at all.
func (d *Driver) Reconcile(ctx context.Context) (found []Finding, seen int, err error) {
	if err := d.cfg.Ledger.Refresh(); err != nil {
		return nil, 0, fmt.Errorf("reconcile volumes: %w", err)
	}
	table, err := d.cfg.Mounts.Table()
	if err != nil {
		return nil, 0, fmt.Errorf("reconcile volumes: %w", err)
	}
	jobs := d.jobs(table)
	for _, key := range slices.Sorted(maps.Keys(jobs)) {
		if err := ctx.Err(); err != nil {
			return found, seen, err
		}
		f := d.reconcileOne(ctx, jobs[key])
		seen++
		d.metrics.reconciled.WithLabelValues(f.Result).Inc()
		if f.Result == ResultHealthy {
			continue
		}
		found = append(found, f)
		level := slog.LevelInfo
		if f.Err != nil {
			level = slog.LevelError
		}
		d.log.LogAttrs(ctx, level, "volume reconciled", slog.String("result", f.Result), slog.String("target", f.Target), slog.String("volume_id", f.VolumeID), slog.Any("error", f.Err))
	}
	d.metrics.volumes.Set(float64(d.cfg.Ledger.Len()))
	d.log.LogAttrs(ctx, slog.LevelInfo, "volumes held against the mount table", slog.Int("volumes", seen), slog.Int("mended_or_listed", len(found)), slog.Int("mounts", len(table)))
	return found, seen, nil
}

// Bounds of the wait between two reconciliations where something failed.
const (
	reconcileAgain = time.Second
	reconcileMost  = time.Minute
)

// RunReconcile reconciles at start, and again with growing pauses while
// something could not be mended: the agent's directory may come later. Then it
// waits for ctx to end.
func (d *Driver) RunReconcile(ctx context.Context) error {
	pause := reconcileAgain
	for {
		found, _, err := d.Reconcile(ctx)
		if err != nil && ctx.Err() == nil {
			// Volumes can be published all the same.
			d.log.ErrorContext(ctx, "volumes were not held against the mount table", slog.Any("error", err))
		}
		if err == nil && !slices.ContainsFunc(found, func(f Finding) bool { return f.Err != nil }) {
			<-ctx.Done()
			return nil
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, reconcileMost)
	}
}

// job is one target to look at.
type job struct {
	target volumeTarget
	id     string
	// layers are our mounts on the target, by the table.
	layers int
}

// jobs are the targets of the ledger and those the mount table shows to be
// ours, by path.
func (d *Driver) jobs(table mount.Table) map[string]job {
	jobs := map[string]job{}
	for _, r := range d.cfg.Ledger.List() {
		vt, err := d.unpublishTarget(r.VolumeID, r.TargetPath)
		if err != nil {
			d.log.Warn("recorded volume has no target path of the kubelet and is left alone", slog.String("volume_id", r.VolumeID), slog.Any("error", err))
			continue
		}
		jobs[vt.path()] = job{target: vt, id: r.VolumeID}
	}
	for _, e := range d.ourMounts(table) {
		vt, err := parseTarget(d.roots, e.MountPoint)
		if err != nil {
			continue // somebody else's use of the directory
		}
		j, ok := jobs[vt.path()]
		if !ok {
			j = job{target: vt, id: VolumeID(vt.uid, vt.name)}
		}
		j.layers++
		jobs[vt.path()] = j
	}
	return jobs
}

func (d *Driver) ourMounts(table mount.Table) mount.Table {
	src, err := mountSource(d.cfg.SourceDir)
	if err != nil {
		d.log.Warn("mounts without a record cannot be told while the agent's socket directory is away", slog.Any("error", err))
		return nil
	}
	defer src.Close()
	ours, err := table.Of(src)
	if err != nil {
		d.log.Warn("mounts without a record cannot be told", slog.Any("error", err))
	}
	return ours
}

// reconcileOne decides on one target under its lock, by what is there now and
// not by the table, which is a moment old.
func (d *Driver) reconcileOne(ctx context.Context, j job) Finding {
	f := Finding{Target: j.target.path(), VolumeID: j.id, Result: ResultFailed}
	unlock, err := d.lock(ctx, j.id, j.target.rel)
	if err != nil {
		f.Err = err
		return f
	}
	defer unlock()
	rec, recorded := d.record(j.id, j.target)
	t, err := d.cfg.Mounts.Target(j.target.root, j.target.rel)
	if errors.Is(err, os.ErrNotExist) {
		f.Result, f.Err = d.settle(j.id, recorded, ResultForgotten)
		return f
	}
	if err != nil {
		f.Err = err
		return f
	}
	defer t.Close()
	if f.Err = t.Lock(ctx); f.Err != nil {
		return f
	}
	state, err := t.Look()
	switch {
	case mount.Corrupted(err):
		f.Err = fmt.Errorf("the filesystem under the target does not answer: %w", err)
		return f
	case err != nil:
		f.Err = err
		return f
	}
	switch {
	case recorded && state.Kind == mount.Absent:
		// Cut short before the directory was made or after it was removed.
		f.Result, f.Err = d.settle(j.id, true, ResultForgotten)
	case recorded && state.Kind == mount.Other:
		f.Err = fmt.Errorf("%s is no directory any more", t.Path())
	case recorded:
		f.Result, f.Err = d.mend(t, state, j, rec)
	case state.Kind == mount.Mounted && j.layers > 0:
		f.Result, f.Err = d.leak(t, j)
	default:
		f.Result = ResultHealthy // gone since the table was read
	}
	return f
}

// mend makes a recorded volume what it should be: one mount of the live
// directory.
func (d *Driver) mend(t Target, state mount.State, j job, rec ledger.Record) (string, error) {
	src, err := d.openSource()
	if err != nil {
		return ResultFailed, err
	}
	defer src.Close()
	if state.Kind == mount.Mounted && state.ID == src.ID() && j.layers <= 1 {
		return ResultHealthy, nil
	}
	if _, err := d.unmountAll(t, d.claim(j.id, j.target, t, rec, true)); err != nil {
		return ResultFailed, err
	}
	old := rec
	rec.SourceDev, rec.SourceIno = src.ID().Dev, src.ID().Ino
	if err := d.keep(rec, old, true); err != nil {
		return ResultFailed, err
	}
	if err := d.bind(t, src); err != nil {
		return ResultFailed, err
	}
	return ResultRepaired, nil
}

// leak decides on a mount of ours without a record. While the kubelet keeps its
// note of the volume it will unpublish it, and a container may be using it.
func (d *Driver) leak(t Target, j job) (string, error) {
	known, err := d.kubeletKnows(j.target)
	if err != nil {
		return ResultFailed, err
	}
	if known {
		return ResultUnrecorded, nil
	}
	if _, err := d.unmountAll(t, d.claim(j.id, j.target, t, ledger.Record{}, false)); err != nil {
		return ResultFailed, err
	}
	if err := t.Rmdir(); err != nil {
		return ResultFailed, err
	}
	return ResultRemoved, nil
}

// maxVolumeData bounds the kubelet's note, in bytes.
const maxVolumeData = 64 << 10

// kubeletKnows says whether the kubelet's note of the volume (vol_data.json
// beside the target, written before it publishes and removed after it
// unpublished) is there and names a driver.
func (d *Driver) kubeletKnows(vt volumeTarget) (bool, error) {
	name := filepath.Join(filepath.Dir(vt.path()), "vol_data.json")
	f, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read the kubelet's note of the volume: %w", err)
	}
	defer f.Close()
	var note struct {
		Driver string `json:"driverName"`
	}
	if err := json.NewDecoder(io.LimitReader(f, maxVolumeData)).Decode(&note); err != nil {
		// Whatever it says, there is one: leave the volume to the kubelet.
		return true, nil
	}
	return note.Driver != "", nil
}

// settle removes a record that describes nothing any more.
func (d *Driver) settle(id string, recorded bool, result string) (string, error) {
	if !recorded {
		return ResultHealthy, nil
	}
	if err := d.cfg.Ledger.Delete(id); err != nil {
		return ResultFailed, err
	}
	return result, nil
}
