package embedded

import (
	"cmp"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded/internal/issue"
)

// kind is X.509 or JWT; the text is the key in the CA bucket and the label in
// metrics.
type kind string

const (
	kindX509 kind = "x509"
	kindJWT  kind = "jwt"
)

func (k kind) name() string {
	if k == kindX509 {
		return "X.509"
	}
	return "JWT"
}

// LocalState is what an own authority is doing.
type LocalState string

// The states, spelled as SPIRE Server's.
const (
	Active   LocalState = "ACTIVE"   // signs
	Prepared LocalState = "PREPARED" // in the bundle, signs next
	Old      LocalState = "OLD"      // in the bundle, signs no more
)

// slot is one signing key. Immutable. An OLD one has lost its private key.
type slot struct {
	id                  string // subject key ID in hex, or JWT key ID
	upstream            string // subject key ID in hex of the upstream root below which it stands, or empty
	state               LocalState
	notBefore, notAfter time.Time
	x509                *issue.Issuer // of kindX509 unless OLD
	jwt                 *issue.JWTKey // of kindJWT unless OLD
}

// usable says whether the slot's key may sign at now. A key whose time has not
// come is as bad as an expired one: the clock went backwards, and what it signs
// would verify nowhere.
func (s *slot) usable(now time.Time) bool {
	return s != nil && s.state != Old && !now.Before(s.notBefore) && now.Before(s.notAfter)
}

func (s *slot) in(state LocalState) *slot {
	c := *s
	c.state = state
	if state == Old {
		c.x509, c.jwt = nil, nil
	}
	return &c
}

// slots are the two keys of one kind. Immutable.
type slots struct {
	current *slot // ACTIVE
	next    *slot // PREPARED or OLD
}

// journal is all own keys. Immutable.
type journal struct{ x509, jwt slots }

func (j *journal) of(k kind) *slots {
	if k == kindX509 {
		return &j.x509
	}
	return &j.jwt
}

func (j *journal) with(k kind, s slots) *journal {
	c := *j
	*c.of(k) = s
	return &c
}

// step is one thing rotation does to a pair of slots.
type step string

const (
	stepNone     step = ""
	stepPrepare  step = "prepare"
	stepActivate step = "activate"
	stepReplace  step = "replace" // prepare and activate at once
)

// due is what the time asks for: a new key is prepared when less than half of
// the life (at most 30 days) is left and takes over when less than a sixth (at
// most 7 days) is left. One that was not made in time is prepared all the same,
// and gets around before it signs; only where nothing valid is left it signs at
// once.
func (s slots) due(now time.Time) step {
	ready := s.next != nil && s.next.state == Prepared && s.next.usable(now)
	switch {
	case s.current.usable(now):
	case ready:
		return stepActivate
	default:
		return stepReplace
	}
	life, left := s.current.notAfter.Sub(s.current.notBefore), s.current.notAfter.Sub(now)
	switch {
	case left < min(life/6, 7*24*time.Hour) && ready:
		return stepActivate
	case left < min(life/2, 30*24*time.Hour) && !ready:
		return stepPrepare
	default:
		return stepNone
	}
}

// activated is the pair after next has taken over.
func (s slots) activated() slots {
	out := slots{current: s.next.in(Active)}
	if s.current != nil {
		out.next = s.current.in(Old)
	}
	return out
}

// The stored form.
type (
	slotsRecord struct {
		Current *slotRecord `json:"current,omitempty"`
		Next    *slotRecord `json:"next,omitempty"`
	}
	slotRecord struct {
		ID        string     `json:"id"`
		State     LocalState `json:"state"`
		NotBefore time.Time  `json:"not_before"`
		NotAfter  time.Time  `json:"not_after"`
		Key       []byte     `json:"key,omitempty"`         // PKCS#8
		Cert      []byte     `json:"certificate,omitempty"` // DER, X.509 only
		Above     [][]byte   `json:"above,omitempty"`       // DER, from the certificate's issuer to the root; none if it is one
		Upstream  string     `json:"upstream_authority_id,omitempty"`
	}
)

func (s slots) change(k kind) (change, error) {
	var rec slotsRecord
	for _, p := range []struct {
		from *slot
		to   **slotRecord
	}{{s.current, &rec.Current}, {s.next, &rec.Next}} {
		if p.from == nil {
			continue
		}
		r, err := p.from.record()
		if err != nil {
			return change{}, fmt.Errorf("encode %s keys: %w", k.name(), err)
		}
		*p.to = r
	}
	content, err := json.Marshal(rec)
	if err != nil {
		return change{}, fmt.Errorf("encode %s keys: %w", k.name(), err)
	}
	return put(bucketCA, string(k), content), nil
}

func (s *slot) record() (*slotRecord, error) {
	r := &slotRecord{ID: s.id, State: s.state, NotBefore: s.notBefore.UTC(), NotAfter: s.notAfter.UTC(), Upstream: s.upstream}
	var err error
	switch {
	case s.x509 != nil:
		r.Cert = s.x509.Certificate().Raw
		for _, c := range s.x509.Above() {
			r.Above = append(r.Above, c.Raw)
		}
		r.Key, err = s.x509.MarshalKey()
	case s.jwt != nil:
		r.Key, err = s.jwt.MarshalKey()
	}
	return r, err
}

func decodeSlots(k kind, td spiffeid.TrustDomain, content []byte) (s slots, err error) {
	var rec slotsRecord
	if err := unmarshalStrict(content, &rec); err != nil {
		return s, err
	}
	if rec.Current != nil {
		if s.current, err = rec.Current.slot(k, td); err != nil {
			return s, fmt.Errorf("current %s key: %w", k.name(), err)
		}
		if s.current.state != Active {
			return s, fmt.Errorf("current %s key is %s", k.name(), s.current.state)
		}
	}
	if rec.Next != nil {
		if s.next, err = rec.Next.slot(k, td); err != nil {
			return s, fmt.Errorf("next %s key: %w", k.name(), err)
		}
		if s.next.state == Active {
			return s, fmt.Errorf("next %s key is %s", k.name(), s.next.state)
		}
	}
	return s, nil
}

func (r *slotRecord) slot(k kind, td spiffeid.TrustDomain) (*slot, error) {
	s := &slot{id: r.ID, upstream: r.Upstream, state: r.State, notBefore: r.NotBefore, notAfter: r.NotAfter}
	var key crypto.Signer
	switch r.State {
	case Old:
		return s, nil
	case Active, Prepared:
		var err error
		if key, err = issue.ParseKey(r.Key); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("unknown state %q", r.State)
	}
	var err error
	if k == kindJWT {
		s.jwt, err = issue.NewJWTKey(r.ID, key, r.NotAfter)
		return s, err
	}
	if s.x509, err = r.issuer(td, key); err != nil {
		return nil, err
	}
	notBefore, notAfter := s.x509.Validity()
	if s.x509.AuthorityID() != r.ID || !notAfter.Equal(r.NotAfter) || !notBefore.Equal(r.NotBefore) {
		return nil, errors.New("certificate does not fit its record")
	}
	if len(r.Above) > 0 && s.x509.RootID() != r.Upstream || len(r.Above) == 0 && r.Upstream != "" {
		return nil, errors.New("upstream root does not fit its record")
	}
	return s, nil
}

func (r *slotRecord) issuer(td spiffeid.TrustDomain, key crypto.Signer) (*issue.Issuer, error) {
	if len(r.Above) == 0 {
		return issue.NewIssuer(td, r.Cert, key)
	}
	var chain []*x509.Certificate
	for _, der := range append([][]byte{r.Cert}, r.Above...) {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("parse a certificate of the CA's chain: %w", err)
		}
		chain = append(chain, c)
	}
	return issue.NewIntermediate(td, chain, key)
}

// rootID is the authority in the bundle that vouches for the slot's: itself, or
// the upstream root.
func (s *slot) rootID() string { return cmp.Or(s.upstream, s.id) }
