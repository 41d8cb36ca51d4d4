package sds

import (
	"slices"

	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// delta is the state of one DeltaSecrets call. Here the protocol has a word
// for what is gone, so a withdrawn identity is removed and the stream stays,
// waiting for it to come back.
type delta struct {
	core
}

func newDelta(r *resolver) machine { return &delta{core: core{r: r}} }

func (*delta) kind() string { return "delta" }

func (d *delta) read(b []byte) (func(*svid.Update) action, error) {
	q := new(deltaRequest)
	if err := q.unmarshal(b); err != nil {
		return nil, undecodable(err)
	}
	if err := checkRequest(q.typeURL, q.limits()); err != nil {
		return nil, err
	}
	return func(u *svid.Update) action { return d.request(q, u) }, nil
}

// request folds a request into the state.
func (d *delta) request(q *deltaRequest, u *svid.Update) (a action) {
	first := !d.started
	d.started = true
	if first || q.node != nil {
		d.plain = q.node.plain(d.r.plain)
	}
	// Subscriptions count whatever the nonce: they are changes, not lists.
	a.verdict, a.rejects = d.judge(q.nonce, q.nack)
	a.about = q.nonce
	d.judged = d.judged || a.verdict == acked || a.verdict == nacked
	d.trust.heard(q.nonce, a.verdict, q.nack != nil)
	if first {
		a.verdict = noVerdict
		d.wildcard = len(q.subscribe.list) == 0
	}
	force := d.subscribe(q.subscribe.list, q.unsubscribe.list, first, &a)
	if len(d.targets) > MaxNames {
		a.end = errTooManyNames
		return a
	}
	if first {
		for _, t := range d.targets {
			if version, ok := q.initial[t.name]; ok && t.means != meansNothing {
				d.items = append(d.items, item{name: t.name, version: version, brought: true})
			}
		}
		if d.wildcard {
			for name, version := range q.initial {
				if d.item(name) == nil {
					d.items = append(d.items, item{name: name, version: version, brought: true})
				}
			}
		}
	}
	cause := causeNames
	if first {
		cause = causeFirst
	}
	d.fold(u, cause, force, &a)
	return a
}

// update folds a changed picture into the state.
func (d *delta) update(u *svid.Update) (a action) {
	if d.started {
		d.fold(u, causeChange, nil, &a)
	}
	return a
}

// subscribe changes the list of names. It returns those to be sent even if the
// client should have them: who subscribes again may have dropped what it had.
func (d *delta) subscribe(add, drop []string, first bool, a *action) (force map[string]bool) {
	if len(add) == 0 && len(drop) == 0 {
		return nil
	}
	names := d.names()
	have := make(map[string]struct{}, len(names)+len(add))
	for _, name := range names {
		have[name] = struct{}{}
	}
	for _, name := range add {
		switch name {
		case wildcardName:
			d.wildcard = true
			continue
		case "":
			continue
		}
		if _, ok := have[name]; !ok {
			have[name] = struct{}{}
			names = append(names, name)
		}
		if !first {
			if force == nil {
				force = make(map[string]bool)
			}
			force[name] = true
		}
	}
	for _, name := range drop {
		if name == wildcardName {
			d.wildcard = false
		}
		delete(have, name)
	}
	left := func(name string) bool { _, ok := have[name]; return ok }
	if len(drop) > 0 {
		names = slices.DeleteFunc(names, func(name string) bool { return !left(name) })
	}
	if !d.wildcard {
		d.items = slices.DeleteFunc(d.items, func(it item) bool { return !left(it.name) })
	}
	d.ask(names, a)
	return force
}

func (d *delta) fold(u *svid.Update, cause string, force map[string]bool, a *action) {
	found := d.survey(u, a)
	if cause == causeNames {
		d.trust.keep(found.known)
	}
	send := found.known[:0:0]
	for i := range found.known {
		r := &found.known[i]
		if it := d.item(r.name); it == nil || it.version != r.payload.version || force[r.name] {
			send = append(send, *r)
		} else {
			if it.brought {
				d.trust.brought(r)
			}
			it.entryID, it.serial, it.brought = r.entryID, r.serial, false
		}
	}
	removed := d.gone(u, found)
	if len(send) == 0 && len(removed) == 0 {
		return
	}
	if d.nonces == 0 {
		cause = causeFirst
	} else if cause == causeNames && len(force) == 0 {
		cause = causeChange
	}
	d.respond()
	for i := range send {
		d.set(&send[i])
	}
	d.trust.pushed(send, d.nonces)
	d.items = slices.DeleteFunc(d.items, func(it item) bool { return slices.Contains(removed, it.name) })
	a.cause, a.sent, a.removed = cause, send, removed
	a.send = encodeDelta(d.nonce(), send, removed)
}

// gone lists what the client has and no longer may have. What the client
// brought along under a name it asks for is left alone while it waits: on a
// new stream, late and withdrawn look the same.
func (d *delta) gone(u *svid.Update, found look) (removed []string) {
	if !u.Synced {
		return nil
	}
	for i := range d.items {
		it := &d.items[i]
		asked := slices.ContainsFunc(d.targets, func(t target) bool { return t.name == it.name && t.means != meansNothing })
		if (!asked || !it.brought) && d.lapsed(u, it, found.known) {
			removed = append(removed, it.name)
		}
	}
	return removed
}
