package registration

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// groupKey stands for a SPIFFE ID, a parent and selectors: the authority
// stores one entry for each.
type groupKey [sha256.Size]byte

func groupOf(e *entry.Entry) groupKey {
	return sha256.Sum256([]byte(e.SPIFFEID.String() + "\x00" + e.ParentID.String() + "\x00" + e.Selectors.Key()))
}

// group is all declarations of one entry. The stored entry belongs to the
// group, not to the declaration that wins: when the winner goes, the next one
// takes the entry over.
type group struct {
	key     groupKey
	decls   []*declaration
	winner  *declaration
	entryID string // "" = not stored
	// err is why the entry could not be written, for the attempts so far.
	err      error
	attempts int
}

// join adds a declaration to its group.
func (x *engine) join(d *declaration) {
	key := groupOf(d.entry)
	g := x.groups[key]
	if g == nil {
		g = &group{key: key}
		x.groups[key] = g
	}
	g.decls = append(g.decls, d)
	d.group = g
	x.dirty[g] = true
}

// withdraw takes a declaration out of its group.
func (x *engine) withdraw(d *declaration) {
	g := d.group
	if i := slices.Index(g.decls, d); i >= 0 {
		g.decls = slices.Delete(g.decls, i, i+1)
	}
	d.move(placeNone)
	x.touch(d.src)
	x.dirty[g] = true
}

// move changes a declaration's place and its source's counters.
func (d *declaration) move(to place) {
	count := func(p place, step int) {
		switch p {
		case placeMasked:
			d.src.masked += step
		case placeWinner:
			d.src.toSet += step
		case placeNone:
		}
	}
	count(d.place, -1)
	count(to, 1)
	d.place = to
	if to != placeWinner {
		d.settle(false, nil, false)
	}
}

// settle notes whether a winner is stored, and if not, why. True if that is
// news.
func (d *declaration) settle(stored bool, err error, unfederated bool) bool {
	changed := d.stored != stored
	if changed {
		d.stored = stored
		if stored {
			d.src.success++
		} else {
			d.src.success--
		}
	}
	if old := d.src.failures[d]; (old == nil) != (err == nil) || err != nil && old.Error() != err.Error() {
		changed = true
	}
	if err != nil {
		d.src.failures[d] = err
	} else {
		delete(d.src.failures, d)
	}
	if d.src.unfederated[d] != unfederated {
		changed = true
		if unfederated {
			d.src.unfederated[d] = true
		} else {
			delete(d.src.unfederated, d)
		}
	}
	return changed
}

// decide finds a group's winner and the places of the others.
func (x *engine) decide(g *group) {
	var winner *declaration
	for _, d := range g.decls {
		if winner == nil || d.src.before(winner.src) {
			winner = d
		}
	}
	for _, d := range g.decls {
		to := placeMasked
		if d == winner {
			to = placeWinner
		}
		if d.place != to {
			d.move(to)
			x.touch(d.src)
		}
	}
	g.winner = winner
}

// change is one entry to write.
type change struct {
	group       *group
	entry       *entry.Entry // nil = delete the entry with id
	id          string
	unfederated bool
}

// plan is what must be written. Creations and updates come before deletions,
// so that an identity that moves from one entry to another is never missing.
type plan struct {
	create, update, remove []change
}

func (p *plan) empty() bool { return len(p.create)+len(p.update)+len(p.remove) == 0 }

// makePlan turns the dirty groups into a plan against the authority's set.
func (x *engine) makePlan(set *entry.Set) *plan {
	groups := make([]*group, 0, len(x.dirty))
	for g := range x.dirty {
		x.decide(g)
		groups = append(groups, g)
	}
	clear(x.dirty)
	slices.SortFunc(groups, func(a, b *group) int { return cmp.Compare(a.order(), b.order()) })
	for _, g := range groups {
		if g.winner != nil && g.entryID == "" {
			x.inherit(g)
		}
	}
	out := &plan{}
	for _, g := range groups {
		x.planGroup(out, g, set)
	}
	return out
}

func (g *group) order() string {
	if g.winner != nil {
		return g.winner.id
	}
	return g.entryID
}

// inherit takes over the entry that the winner had in another group, if nobody
// needs it there: the identity changes, the entry stays.
func (x *engine) inherit(g *group) {
	from := x.byEntry[g.winner.id]
	if from == nil || from.winner != nil || len(from.decls) > 0 {
		return
	}
	g.entryID, from.entryID = from.entryID, ""
	x.byEntry[g.entryID] = g
}

func (x *engine) planGroup(out *plan, g *group, set *entry.Set) {
	if g.winner == nil {
		if g.entryID == "" {
			x.forgetGroup(g)
			return
		}
		out.remove = append(out.remove, change{group: g, id: g.entryID})
		return
	}
	want, unfederated := x.content(g.winner)
	if g.entryID == "" {
		g.entryID = x.freeID(g, set)
		x.byEntry[g.entryID] = g
	}
	c := change{group: g, entry: want, id: g.entryID, unfederated: unfederated}
	want.ID = g.entryID
	have, ok := set.Get(g.entryID)
	switch {
	case !ok:
		out.create = append(out.create, c)
	case have.SameContent(want):
		x.settled(c, nil)
	default:
		out.update = append(out.update, c)
	}
}

// content is a winner's entry as it can be stored now: without the trust
// domains whose bundles are not there yet, for a pod is better off with its
// own identity than with none. True if some are missing.
func (x *engine) content(d *declaration) (*entry.Entry, bool) {
	e := d.entry.Clone()
	e.FederatesWith = slices.DeleteFunc(e.FederatesWith, func(td spiffeid.TrustDomain) bool {
		return td != x.TrustDomain && !x.bundles[td]
	})
	return e, len(e.FederatesWith) < len(d.entry.FederatesWith)
}

// freeID is the winner's preferred ID or, while that one is another group's or
// somebody else's, one made of both.
func (x *engine) freeID(g *group, set *entry.Set) string {
	id := g.winner.id
	_, stored := set.Get(id)
	if x.byEntry[id] == nil && !stored {
		return id
	}
	return id + "-" + hex.EncodeToString(g.key[:4])
}

func (x *engine) forgetGroup(g *group) {
	delete(x.retry, g)
	if len(g.decls) == 0 && g.entryID == "" && x.groups[g.key] == g {
		delete(x.groups, g.key)
	}
}

// settled notes the outcome of a change that created, updated or kept an entry.
func (x *engine) settled(c change, err error) {
	g := c.group
	g.err = err
	if err == nil {
		g.attempts = 0
		delete(x.retry, g)
	} else {
		x.later(g)
	}
	if g.winner != nil && g.winner.settle(err == nil, err, err == nil && c.unfederated) {
		x.touch(g.winner.src)
	}
}

// Backoff of writes that failed.
const (
	retryMin = time.Second
	retryMax = 30 * time.Second
)

func (x *engine) later(g *group) {
	wait := min(retryMin<<min(g.attempts, 6), retryMax)
	g.attempts++
	x.retry[g] = time.Now().Add(wait)
}
