package sds

import (
	"slices"
	"strconv"
)

// trust is how far a stream is with the X.509 authorities of the own bundle, in
// generations (see svid.Update.Roots); 0 = none.
type trust struct {
	sent, acked uint32
	nonce       uint32 // of the response that brought sent; the last 32 bits
	rejected    bool   // the client turned sent down
}

// pushed notes a response with these resources.
func (t *trust) pushed(resources []resource, nonce uint64) {
	for i := range resources {
		if roots := resources[i].roots; roots != 0 {
			if roots != t.sent {
				t.rejected = false
			}
			t.sent, t.nonce = roots, uint32(nonce)
			return
		}
	}
}

// keep forgets everything once the client no longer asks for the authorities:
// nothing will be sent that it could acknowledge.
func (t *trust) keep(known []resource) {
	if !slices.ContainsFunc(known, func(r resource) bool { return r.roots != 0 }) {
		*t = trust{}
	}
}

// brought notes that the client came with what it would be sent.
func (t *trust) brought(r *resource) {
	if r.roots != 0 && t.sent == 0 {
		t.sent, t.acked = r.roots, r.roots
	}
}

// heard notes what the client says about a response. Only the one that brought
// the authorities counts; a later one may have been about something else.
func (t *trust) heard(nonce string, v verdict, rejects bool) {
	if t.sent == 0 || v == noVerdict {
		return
	}
	if n, err := strconv.ParseUint(nonce, 10, 64); err != nil || uint32(n) != t.nonce {
		return
	}
	switch {
	case v == nacked || rejects:
		t.rejected = true
	default:
		t.acked, t.rejected = t.sent, false
	}
}

// RootsStatus is how far one open stream is with the X.509 authorities of the
// own trust bundle.
type RootsStatus struct {
	// Peer is what Config.PeerID said.
	Peer uint64
	Kind string
	// Sent is the generation the client was sent last, Acked the one it
	// acknowledged last; 0 = none.
	Sent, Acked uint32
	// Rejected says that the client turned Sent down, with these words.
	Rejected bool
	Text     string
}

// Roots visits the open streams that have been sent the own bundle. It never
// waits for a client and allocates nothing per stream.
func (s *Server) Roots(visit func(RootsStatus)) {
	s.mu.Lock()
	open := make([]*call, 0, len(s.open))
	for c := range s.open {
		open = append(open, c)
	}
	s.mu.Unlock()
	for _, c := range open {
		if st := c.roots(); st.Sent != 0 {
			visit(st)
		}
	}
}

func (c *call) roots() RootsStatus {
	c.mu.Lock()
	defer c.mu.Unlock()
	t := c.machine.trusts()
	st := RootsStatus{Peer: c.peer, Kind: c.machine.kind(), Sent: t.sent, Acked: t.acked, Rejected: t.rejected}
	if t.rejected && c.nack != nil {
		st.Text = c.nack.text
	}
	return st
}

func (c *core) trusts() *trust { return &c.trust }
