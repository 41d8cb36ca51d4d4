package sds

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// wildcardName asks for everything, as an empty list does.
const wildcardName = "*"

// standing is what is known of a name for one caller at one moment.
type standing int

const (
	// known: there is a secret to send.
	known standing = iota
	// pending: it will come; an entry matches, or the agent has not heard of
	// entries or bundles yet.
	pending
	// absent: nothing says that it will come. Late all the same: entries are
	// made while callers wait.
	absent
	// unknown: not a name of ours.
	unknown
)

// meaning is what a requested name stands for, whoever asks.
type meaning uint8

const (
	meansNothing meaning = iota
	meansDefault
	meansBundle
	meansAllBundles
	meansIdentity
	meansTrustDomain
)

// resolver turns names into secrets. Safe for concurrent use.
type resolver struct {
	names   Names
	plain   bool // configured form of validation contexts
	bodies  *bodies
	encoded func() // called for each body encoded; may be nil
}

// target is a requested name with its meaning, worked out once per request.
type target struct {
	name  string
	means meaning
	late  bool        // the client waits for it
	id    spiffeid.ID // of meansIdentity and meansTrustDomain
}

// target parses a requested name. It never fails: what is no name of ours
// means nothing.
func (r *resolver) target(name string) target {
	means, id := r.classify(name)
	return target{name: name, means: means, id: id}
}

func (r *resolver) classify(name string) (meaning, spiffeid.ID) {
	switch {
	case name == "":
		return meansNothing, spiffeid.ID{}
	case name == r.names.SVID:
		return meansDefault, spiffeid.ID{}
	case name == r.names.Bundle:
		return meansBundle, spiffeid.ID{}
	case name == r.names.AllBundles:
		return meansAllBundles, spiffeid.ID{}
	case !strings.HasPrefix(name, "spiffe://"):
		return meansNothing, spiffeid.ID{}
	}
	id, err := spiffeid.FromString(name)
	switch {
	case err != nil:
		return meansNothing, spiffeid.ID{}
	case id.Path() == "":
		return meansTrustDomain, id
	}
	return meansIdentity, id
}

// resolve answers one name for a caller with update u. held is the entry the
// name was served from before, if any: while its SVID is merely late, the name
// does not move to another entry.
func (r *resolver) resolve(u *svid.Update, t target, plain bool, held string) (resource, standing) {
	name, id := t.name, t.id
	switch t.means {
	case meansDefault:
		return r.defaultIdentity(u, name, held)
	case meansIdentity:
		return r.identityByID(u, name, id)
	case meansBundle:
		return r.bundleFor(u, name, u.Own, plain)
	case meansTrustDomain:
		bundle := u.Federated[id.TrustDomain()]
		if u.Own != nil && u.Own.TrustDomain() == id.TrustDomain() {
			bundle = u.Own
		}
		return r.bundleFor(u, name, bundle, plain)
	case meansAllBundles:
		if u.Own == nil || plain {
			// Without the SPIFFE validator all roots would vouch for all trust
			// domains; the own bundle alone fails closed.
			return r.bundleFor(u, name, u.Own, plain)
		}
		p := r.bodies.allBundles(u)
		if len(p.pieces) == 0 {
			return resource{}, pending
		}
		return resource{name: name, payload: p, roots: u.Roots}, known
	}
	return resource{}, unknown
}

func (r *resolver) defaultIdentity(u *svid.Update, name, held string) (resource, standing) {
	if held != "" && slices.ContainsFunc(u.Late, func(e *entry.Entry) bool { return e.ID == held }) {
		return resource{}, pending
	}
	if len(u.Identities) > 0 {
		return r.certificate(name, u.Identities[0]), known
	}
	return resource{}, waiting(u, len(u.Late) > 0)
}

func (r *resolver) identityByID(u *svid.Update, name string, id spiffeid.ID) (resource, standing) {
	for _, ident := range u.Identities {
		if ident.Entry.SPIFFEID == id {
			return r.certificate(name, ident), known
		}
	}
	return resource{}, waiting(u, slices.ContainsFunc(u.Late, func(e *entry.Entry) bool { return e.SPIFFEID == id }))
}

// waiting tells the two kinds of late apart.
func waiting(u *svid.Update, matched bool) standing {
	if matched || !u.Synced {
		return pending
	}
	return absent
}

func (r *resolver) certificate(name string, ident *svid.Identity) resource {
	p, fresh := r.bodies.certificate(ident.SVID)
	r.count(fresh)
	return resource{name: name, payload: p, entryID: ident.Entry.ID, serial: ident.SVID.Serial}
}

func (r *resolver) bundleFor(u *svid.Update, name string, t *spiffebundle.Bundle, plain bool) (resource, standing) {
	if t == nil {
		return resource{}, waiting(u, u.Own == nil)
	}
	body, fresh := r.bodies.bundle(t)
	r.count(fresh)
	switch {
	case body.empty:
		return resource{}, pending
	case plain:
		return resource{name: name, payload: body.plain, roots: rootsOf(u, t)}, known
	}
	return resource{name: name, payload: body.single, roots: rootsOf(u, t)}, known
}

// rootsOf is the generation of the own bundle, 0 for others.
func rootsOf(u *svid.Update, t *spiffebundle.Bundle) uint32 {
	if t == u.Own {
		return u.Roots
	}
	return 0
}

func (r *resolver) count(fresh bool) {
	if fresh && r.encoded != nil {
		r.encoded()
	}
}

// everything is what an empty list of names asks for: bundles under their
// trust domains, own first, and identities under their SPIFFE IDs.
func (r *resolver) everything(u *svid.Update, plain bool) []resource {
	out := make([]resource, 0, 1+len(u.Federated)+len(u.Identities))
	add := func(res resource, st standing) {
		if st == known {
			out = append(out, res)
		}
	}
	if u.Own != nil {
		add(r.bundleFor(u, u.Own.TrustDomain().IDString(), u.Own, plain))
	}
	tds := make([]spiffeid.TrustDomain, 0, len(u.Federated))
	for td := range u.Federated {
		if u.Own == nil || td != u.Own.TrustDomain() {
			tds = append(tds, td)
		}
	}
	slices.SortFunc(tds, spiffeid.TrustDomain.Compare)
	for _, td := range tds {
		add(r.bundleFor(u, td.IDString(), u.Federated[td], plain))
	}
	first := len(out)
	for _, ident := range u.Identities {
		name := ident.Entry.SPIFFEID.String()
		if !slices.ContainsFunc(out[first:], func(o resource) bool { return o.name == name }) {
			out = append(out, r.certificate(name, ident))
		}
	}
	return out
}

// versionOf is the version of a response: that of its content. Order does not
// count as the names are part of it and the list is in a fixed order.
func versionOf(resources []resource) string {
	buf := make([]byte, 0, 512)
	for i := range resources {
		buf = append(buf, resources[i].name...)
		buf = append(buf, 0)
		buf = append(buf, resources[i].payload.digest[:]...)
	}
	sum := sha256.Sum256(buf)
	return hex.EncodeToString(sum[:8])
}
