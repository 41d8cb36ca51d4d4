package csi

import (
	"log/slog"
	"path"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/internal/mount"
)

// claim decides which mounts on a target are ours to take away. The directory
// that is mounted tells: it is the live socket directory, or the one the record
// of the volume says, or, for those of an earlier driver and of a lost ledger,
// the mount table shows it to be of the socket directory's path.
type claim struct {
	d        *Driver
	id       string
	vt       volumeTarget
	t        Target
	rec      ledger.Record
	recorded bool
}

func (d *Driver) claim(id string, vt volumeTarget, t Target, rec ledger.Record, recorded bool) claim {
	return claim{d: d, id: id, vt: vt, t: t, rec: rec, recorded: recorded}
}

// unseen is the state of a mount that cannot be looked at.
var unseen = mount.State{Kind: mount.Mounted}

// look is Look, except that on a recorded target a mount whose filesystem no
// longer answers (the socket directory may be anywhere) is still a mount.
func (c claim) look() (mount.State, error) {
	state, err := c.t.Look()
	if c.recorded && mount.Corrupted(err) {
		c.d.log.Warn("what is mounted on the target does not answer and is taken for the volume", slog.String("target", c.t.Path()), slog.Any("error", err))
		return unseen, nil
	}
	return state, err
}

// check is nil if the topmost mount, which state shows, is ours; otherwise it
// is the answer to the caller.
func (c claim) check(state mount.State) error {
	switch {
	case c.recorded && (state == unseen || state.ID == mount.FileID{Dev: c.rec.SourceDev, Ino: c.rec.SourceIno}):
		return nil
	case !c.recorded && !c.d.cfg.AnyVolumeID && c.id != VolumeID(c.vt.uid, c.vt.name):
		return status.Errorf(codes.FailedPrecondition, "volume_id %q is not that of what is mounted on %s, which is %s; nothing was touched", c.id, c.t.Path(), VolumeID(c.vt.uid, c.vt.name))
	}
	src, err := mountSource(c.d.cfg.SourceDir)
	if err == nil {
		defer src.Close()
		if state.ID == src.ID() {
			return nil
		}
		ours, err := c.d.oursByTable(c.t.Path(), src)
		if err != nil {
			return internal(err)
		}
		if ours {
			return nil
		}
	}
	return status.Errorf(codes.FailedPrecondition, "something else than the agent's socket directory %s is mounted on %s: it is not the driver's and was not touched; unmount it by hand if nobody needs it", c.d.cfg.SourceDir, c.t.Path())
}

// oursByTable says whether the topmost mount on the target is of the path of
// the socket directory, alive or deleted. It reads the whole mount table.
func (d *Driver) oursByTable(target string, src *mount.Source) (bool, error) {
	table, err := d.cfg.Mounts.Table()
	if err != nil {
		return false, err
	}
	ours, err := table.Of(src)
	if err != nil {
		return false, err
	}
	for _, point := range d.spellings(target) {
		// Both are in the kernel's order: the topmost is the last.
		if all, mine := table.At(point), ours.At(point); len(all) > 0 {
			return len(mine) > 0 && mine[len(mine)-1] == all[len(all)-1], nil
		}
	}
	return false, nil
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
