package registration

import (
	"context"
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/apimachinery/pkg/types"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// podOf is the UID of the pod that an entry is for, "" if it is for no single
// one.
func podOf(e *entry.Entry) types.UID {
	for s := range e.Selectors.All() {
		if uid, ok := strings.CutPrefix(s.Value(), "pod-uid:"); ok && s.Type() == "k8s" {
			return types.UID(uid)
		}
	}
	return ""
}

// adopt finds what earlier runs left: entries that are wanted go to their
// groups, by content first, so that an entry that fits stays untouched; those
// that nobody claims are deleted.
func (x *engine) adopt(set *entry.Set) {
	for g := range x.dirty {
		x.decide(g)
	}
	var rest []*entry.Entry
	for e := range set.All() {
		if !x.owns(e.ID) {
			x.sawForeign(e)
			continue
		}
		if g := x.groups[groupOf(e)]; g != nil && g.winner != nil && g.entryID == "" {
			g.entryID = e.ID
			x.byEntry[e.ID] = g
			continue
		}
		rest = append(rest, e)
	}
	for _, e := range rest {
		if by := x.holder(e); by != "" {
			x.held[e.ID] = by
			continue
		}
		x.orphan(e.ID)
	}
	x.seen = set
}

// orphan puts an entry that nobody claims into a group without declarations:
// it is deleted with the next plan, unless a winner inherits it.
func (x *engine) orphan(id string) {
	g := &group{entryID: id}
	x.byEntry[id] = g
	x.dirty[g] = true
}

// holder is the resource on whose behalf an unclaimed entry is kept: one whose
// newest specification is refused and whose last valid one is not known, for a
// restart is no reason to take away what a mistake did not.
func (x *engine) holder(e *entry.Entry) types.UID {
	if p := x.podsByUID[podOf(e)]; p != nil {
		for uid, r := range x.rules {
			if r.spec == nil && strings.HasPrefix(e.ID, entryID(uid, p.pod.UID)) {
				return uid
			}
		}
	}
	for uid, s := range x.statics {
		if s.refused != nil && s.decl == nil && strings.HasPrefix(e.ID, entryID(uid, "")) {
			return uid
		}
	}
	return ""
}

// releaseHeld gives up the entries kept for a resource.
func (x *engine) releaseHeld(uid types.UID) {
	for id, by := range x.held {
		if by == uid {
			delete(x.held, id)
			x.orphan(id)
		}
	}
}

// pruneHeld gives up those kept for a pod that is gone.
func (x *engine) pruneHeld(uid types.UID) {
	if len(x.held) == 0 {
		return
	}
	for id := range x.held {
		if e, ok := x.Authority.Set().Get(id); !ok || podOf(e) == uid {
			delete(x.held, id)
			x.orphan(id)
		}
	}
}

// setChanged looks at what became of the entries, whoever changed them: ours
// are put right.
func (x *engine) setChanged(set *entry.Set) {
	if set.Version() <= x.seen.Version() {
		return
	}
	delta, ok := set.Since(x.seen)
	if !ok {
		x.compareAll(set)
		x.seen = set
		return
	}
	for _, e := range delta.Removed {
		x.entryGone(e)
	}
	for _, e := range delta.Changed {
		x.entryChanged(e)
	}
	x.seen = set
}

func (x *engine) compareAll(set *entry.Set) {
	for id := range x.foreignOf {
		if _, ok := set.Get(id); !ok {
			x.forgetForeign(id)
		}
	}
	for id, g := range x.byEntry {
		if _, ok := set.Get(id); !ok {
			x.dirty[g] = true
		}
	}
	for e := range set.All() {
		x.entryChanged(e)
	}
	for _, g := range x.groups {
		if g.err != nil {
			x.dirty[g] = true
		}
	}
}

func (x *engine) entryGone(e *entry.Entry) {
	if !x.owns(e.ID) {
		x.forgetForeign(e.ID)
		// It may have been in somebody's way.
		if g := x.groups[groupOf(e)]; g != nil && g.err != nil {
			x.dirty[g] = true
		}
		return
	}
	delete(x.held, e.ID)
	if g := x.byEntry[e.ID]; g != nil {
		x.dirty[g] = true
	}
}

func (x *engine) entryChanged(e *entry.Entry) {
	if !x.owns(e.ID) {
		x.sawForeign(e)
		return
	}
	g := x.byEntry[e.ID]
	if g == nil {
		if x.held[e.ID] == "" {
			x.orphan(e.ID)
		}
		return
	}
	if g.winner == nil {
		return // about to be deleted
	}
	if want, _ := x.content(g.winner); !e.SameContent(want) {
		x.dirty[g] = true
	}
}

// sawForeign notes an entry that somebody else wrote, if it is for one pod.
func (x *engine) sawForeign(e *entry.Entry) {
	uid := podOf(e)
	if x.foreignOf[e.ID] == uid {
		return
	}
	x.forgetForeign(e.ID)
	if uid == "" {
		return
	}
	x.foreignOf[e.ID] = uid
	if x.foreign[uid] == nil {
		x.foreign[uid] = make(map[string]bool)
	}
	x.foreign[uid][e.ID] = true
	if p := x.podsByUID[uid]; p != nil {
		x.findForeign(p)
	}
}

func (x *engine) forgetForeign(id string) {
	uid, ok := x.foreignOf[id]
	if !ok {
		return
	}
	delete(x.foreignOf, id)
	ids := x.foreign[uid]
	delete(ids, id)
	if len(ids) > 0 {
		return
	}
	delete(x.foreign, uid)
	p := x.podsByUID[uid]
	if p == nil || p.foreign == nil {
		return
	}
	p.foreign = nil
	x.foreignPods--
	for r := range p.matches {
		r.foreign--
		x.touch(r.source)
	}
}

// findForeign tells a pod about entries for it that somebody else wrote.
func (x *engine) findForeign(p *podState) {
	ids := x.foreign[p.pod.UID]
	if len(ids) == 0 || p.foreign != nil {
		return
	}
	p.foreign = ids
	x.foreignPods++
	for r := range p.matches {
		r.foreign++
		x.touch(r.source)
	}
	if now := time.Now(); now.Sub(x.foreignSaid) > foreignPause {
		x.foreignSaid = now
		x.Logger.Warn("somebody else registers pods too; run one registrar per authority: switch this one off, or stop the other",
			slog.String("pod", p.name()), slog.Int("pods", x.foreignPods))
	}
}

// foreignPause is the least time between two warnings.
const foreignPause = 10 * time.Minute

// setBundles takes over which foreign bundles are stored.
func (x *engine) setBundles(have map[spiffeid.TrustDomain]bool) {
	changed := false
	for td := range have {
		changed = changed || !x.bundles[td]
	}
	for td := range x.bundles {
		changed = changed || !have[td]
	}
	if !changed {
		return
	}
	x.bundles = have
	for _, r := range x.rules {
		if r.spec == nil || len(r.spec.federates) == 0 {
			continue
		}
		for _, m := range r.pods {
			if m.decl != nil {
				x.dirty[m.decl.group] = true
			}
		}
	}
	for _, s := range x.statics {
		if s.decl != nil && len(s.decl.entry.FederatesWith) > 0 {
			x.dirty[s.decl.group] = true
		}
	}
	for _, f := range x.federated {
		x.touch(f.source)
	}
}

// watchSet posts each new set of entries until ctx ends.
func (x *engine) watchSet(ctx context.Context) {
	after := uint64(0)
	for ctx.Err() == nil {
		set, err := x.Authority.Entries(ctx, after)
		if err != nil {
			x.pause(ctx, "entries", err)
			continue
		}
		after = set.Version()
		x.post(func() { x.setChanged(set) })
	}
}

// watchBundles posts which foreign bundles there are until ctx ends.
func (x *engine) watchBundles(ctx context.Context) {
	after := uint64(0)
	for ctx.Err() == nil {
		set, err := x.Authority.Bundles(ctx, after)
		if err != nil {
			x.pause(ctx, "bundles", err)
			continue
		}
		after = set.Version
		have := make(map[spiffeid.TrustDomain]bool, len(set.Federated))
		for td := range set.Federated {
			have[td] = true
		}
		x.post(func() { x.setBundles(have) })
	}
}

// pause waits a little after an error of the authority.
func (x *engine) pause(ctx context.Context, what string, err error) {
	if ctx.Err() != nil {
		return
	}
	x.Logger.Warn("cannot read from the authority; trying again", slog.String("what", what), slog.Any("error", err))
	select {
	case <-ctx.Done():
	case <-time.After(time.Second):
	}
}
