package sds

import (
	"errors"
	"fmt"
	"slices"
	"strconv"

	"google.golang.org/grpc/mem"

	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// This file and delta.go are the protocol: functions of (state, request or
// update) to (response or nothing). They do no I/O and take no lock.

// verdict is what a request says about the last response.
type verdict int

const (
	noVerdict verdict = iota
	acked
	nacked
	stale
)

func (v verdict) String() string {
	return [...]string{noVerdict: "none", acked: "ack", nacked: "nack", stale: "stale"}[v]
}

// Causes of a response.
const (
	causeFirst  = "first"  // first answer to the first request
	causeNames  = "names"  // the client changed its list of names
	causeChange = "change" // content changed, or came into being
)

// errWithdrawn ends a stream whose identity was taken away on purpose.
var errWithdrawn = errors.New("identity withdrawn")

// action is what follows from an event.
type action struct {
	send    mem.BufferSlice // encoded response; nil = nothing to send
	cause   string
	version string // of the response; empty for delta
	sent    []resource
	removed []string

	verdict verdict
	about   string   // the nonce the verdict is about
	rejects nack     // what the client said, if nacked
	unknown []string // names found unknown just now
	narrow  bool     // all bundles were asked for, but only the own one can be given
	end     error    // the stream ends; nothing is sent
}

// item is what the client has been sent under one name.
type item struct {
	name    string
	version string // of the resource; from the client for initial versions
	entryID string
	serial  string
	brought bool // delta: from the client's initial versions, not ours yet
}

// core is the state SotW and delta streams have in common.
type core struct {
	r        *resolver
	started  bool // the first request came
	wildcard bool
	plain    bool     // bundles go out as plain trusted_ca
	judged   bool     // the client has said what it thinks of the last response
	warned   bool     // about narrow
	targets  []target // asked for by name, no repetition
	trust    trust
	nonces   uint64 // responses so far
	items    []item
}

// ask replaces the list of names.
func (c *core) ask(names []string, a *action) {
	before := c.unknown()
	c.targets = make([]target, 0, len(names))
	for _, name := range names {
		c.targets = append(c.targets, c.r.target(name))
	}
	if now := c.unknown(); !slices.Equal(now, before) {
		a.unknown = now
	}
}

// names are all names asked for.
func (c *core) names() []string {
	return c.which(func(*target) bool { return true })
}

// unknown are those that are no names of ours.
func (c *core) unknown() []string {
	return c.which(func(t *target) bool { return t.means == meansNothing })
}

// late are those the client waits for.
func (c *core) late() []string {
	return c.which(func(t *target) bool { return t.late })
}

func (c *core) which(is func(*target) bool) (names []string) {
	for i := range c.targets {
		if t := &c.targets[i]; is(t) {
			names = append(names, t.name)
		}
	}
	return names
}

func (c *core) nonce() string { return strconv.FormatUint(c.nonces, 10) }

func (c *core) item(name string) *item {
	for i := range c.items {
		if c.items[i].name == name {
			return &c.items[i]
		}
	}
	return nil
}

// respond counts a response.
func (c *core) respond() {
	c.nonces++
	c.judged = false
}

// judge reads ACK and NACK; once per response, as later requests repeat its
// nonce. A nonce that is not the last one is about an older
// response.
func (c *core) judge(nonce string, rejects *nack) (verdict, nack) {
	switch {
	case nonce == "" || c.nonces == 0:
		return noVerdict, nack{}
	case nonce != c.nonce():
		return stale, nack{}
	case c.judged && rejects == nil: // a later request, with the same nonce
		return noVerdict, nack{}
	case rejects != nil:
		return nacked, *rejects
	}
	return acked, nack{}
}

// look is what a fold finds out about the names.
type look struct {
	known  []resource
	absent []string // late, and nothing says it will come
}

// survey resolves all names and updates late.
func (c *core) survey(u *svid.Update, a *action) look {
	var out look
	if c.wildcard {
		out.known = c.r.everything(u, c.plain)
	}
	covered := len(out.known)
	for i := range c.targets {
		t := &c.targets[i]
		t.late = false
		if t.means == meansNothing {
			continue
		}
		held := ""
		if it := c.item(t.name); it != nil {
			held = it.entryID
		}
		res, st := c.r.resolve(u, *t, c.plain, held)
		switch st {
		case known:
			if !slices.ContainsFunc(out.known[:covered], func(o resource) bool { return o.name == t.name }) {
				out.known = append(out.known, res)
			}
		case absent:
			out.absent = append(out.absent, t.name)
			t.late = true
		default:
			t.late = true
		}
		if c.plain && t.means == meansAllBundles && !c.warned && len(u.Federated) > 0 {
			c.warned, a.narrow = true, true
		}
	}
	return out
}

// lapsed says whether what the client has under a name is neither to be had
// any more nor merely late.
func (c *core) lapsed(u *svid.Update, it *item, known []resource) bool {
	if slices.ContainsFunc(known, func(r resource) bool { return r.name == it.name }) {
		return false
	}
	_, st := c.r.resolve(u, c.r.target(it.name), c.plain, it.entryID)
	return st == absent || st == unknown
}

// stream is the state of one StreamSecrets call.
type stream struct {
	core
	version string // of the last response
}

func newStream(r *resolver) machine { return &stream{core: core{r: r}} }

func (*stream) kind() string { return "sotw" }

func (s *stream) read(b []byte) (func(*svid.Update) action, error) {
	q := new(request)
	if err := q.unmarshal(b); err != nil {
		return nil, undecodable(err)
	}
	if err := checkRequest(q.typeURL, q.limits()); err != nil {
		return nil, err
	}
	return func(u *svid.Update) action { return s.request(q, u) }, nil
}

// request folds a request into the state.
func (s *stream) request(q *request, u *svid.Update) (a action) {
	first := !s.started
	if !first {
		a.verdict, a.rejects = s.judge(q.nonce, q.nack)
		a.about = q.nonce
		if a.verdict == acked && q.version != s.version {
			a.verdict = nacked
			a.rejects = nack{message: fmt.Sprintf("client kept version %q", clip(q.version, 64))}
		}
		s.judged = s.judged || a.verdict == acked || a.verdict == nacked
		s.trust.heard(q.nonce, a.verdict, q.nack != nil)
		if a.verdict == stale {
			// The client sends its list again with the nonce of the response
			// that is on its way.
			return a
		}
	}
	s.started = true
	if first || q.node != nil {
		s.plain = q.node.plain(s.r.plain)
	}
	wildcard, names := normalise(q.names.list)
	changed := wildcard != s.wildcard || !sameSet(names, s.names())
	if s.wildcard = wildcard; first || changed {
		s.ask(names, &a)
	}
	cause := causeChange
	switch {
	case first:
		cause = causeFirst
	case changed:
		cause = causeNames
		if !wildcard {
			s.items = slices.DeleteFunc(s.items, func(it item) bool { return !slices.Contains(names, it.name) })
		}
	}
	s.fold(u, cause, &a)
	return a
}

// update folds a changed picture into the state.
func (s *stream) update(u *svid.Update) (a action) {
	if s.started {
		s.fold(u, causeChange, &a)
	}
	return a
}

func (s *stream) fold(u *svid.Update, cause string, a *action) {
	found := s.survey(u, a)
	if cause == causeNames {
		s.trust.keep(found.known)
	}
	if !s.wildcard {
		for _, name := range found.absent {
			if it := s.item(name); it != nil && it.entryID != "" {
				a.end = fmt.Errorf("%w: %s", errWithdrawn, name)
				return
			}
		}
	}
	if len(found.known) == 0 {
		return
	}
	lapsed := s.wildcard && slices.ContainsFunc(s.items, func(it item) bool { return s.lapsed(u, &it, found.known) })
	if cause == causeChange && !lapsed && !s.lacks(found.known) {
		return
	}
	if s.nonces == 0 {
		cause = causeFirst
	}
	s.respond()
	s.version = versionOf(found.known)
	// A name that is merely late keeps what the client has under it.
	if lapsed {
		s.items = slices.DeleteFunc(s.items, func(it item) bool { return s.lapsed(u, &it, found.known) })
	}
	for i := range found.known {
		s.set(&found.known[i])
	}
	s.trust.pushed(found.known, s.nonces)
	a.cause, a.version, a.sent = cause, s.version, found.known
	a.send = encodeResponse(s.version, s.nonce(), found.known)
}

// lacks says whether the client has not been sent all of known.
func (c *core) lacks(known []resource) bool {
	for i := range known {
		if it := c.item(known[i].name); it == nil || it.version != known[i].payload.version {
			return true
		}
	}
	return false
}

func (c *core) set(r *resource) {
	it := item{name: r.name, version: r.payload.version, entryID: r.entryID, serial: r.serial}
	if old := c.item(r.name); old != nil {
		*old = it
		return
	}
	c.items = append(c.items, it)
}

// normalise drops empty names and repetitions; nothing left means everything.
func normalise(in []string) (wildcard bool, names []string) {
	seen := make(map[string]struct{}, len(in))
	names = make([]string, 0, len(in))
	for _, name := range in {
		if name == wildcardName {
			wildcard = true
			continue
		}
		if _, twice := seen[name]; name == "" || twice {
			continue
		}
		seen[name] = struct{}{}
		names = append(names, name)
	}
	return wildcard || len(names) == 0, names
}

// sameSet compares lists without repetitions regardless of order.
func sameSet(a, b []string) bool {
	if len(a) != len(b) {
		return false
	}
	if slices.Equal(a, b) {
		return true
	}
	in := make(map[string]struct{}, len(a))
	for _, s := range a {
		in[s] = struct{}{}
	}
	for _, s := range b {
		if _, ok := in[s]; !ok {
			return false
		}
	}
	return true
}
