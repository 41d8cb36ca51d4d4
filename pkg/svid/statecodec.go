package svid

import (
	"bytes"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

type savedState struct {
	Bundles    *savedBundles   `json:"bundles,omitempty"`
	Identities []savedIdentity `json:"identities"`
}

type savedBundles struct {
	Own         *savedBundle    `json:"own,omitempty"`
	Federated   []savedBundle   `json:"federated,omitempty"`
	TaintedX509 map[string]bool `json:"tainted_x509,omitempty"`
	TaintedJWT  map[string]bool `json:"tainted_jwt,omitempty"`
}

type savedBundle struct {
	TrustDomain string          `json:"trust_domain"`
	JWKS        json.RawMessage `json:"jwks"`
}

type savedIdentity struct {
	Entry   savedEntry `json:"entry"`
	Chain   [][]byte   `json:"chain"`
	Key     []byte     `json:"key"`
	RenewAt time.Time  `json:"renew_at"`
	Resign  bool       `json:"resign,omitempty"`
}

type savedEntry struct {
	ID            string            `json:"id"`
	SPIFFEID      spiffeid.ID       `json:"spiffe_id"`
	ParentID      spiffeid.ID       `json:"parent_id"`
	Selectors     []attest.Selector `json:"selectors"`
	X509SVIDTTL   time.Duration     `json:"x509_svid_ttl,omitempty"` // nanoseconds
	JWTSVIDTTL    time.Duration     `json:"jwt_svid_ttl,omitempty"`  // nanoseconds
	FederatesWith []string          `json:"federates_with,omitempty"`
	DNSNames      []string          `json:"dns_names,omitempty"`
	Hint          string            `json:"hint,omitempty"`
	Admin         bool              `json:"admin,omitempty"`
	Downstream    bool              `json:"downstream,omitempty"`
	ExpiresAt     time.Time         `json:"expires_at,omitzero"`
	Revision      int64             `json:"revision,omitempty"`
	CreatedAt     time.Time         `json:"created_at"`
	NoPrefetch    bool              `json:"disable_x509_svid_prefetch,omitempty"`
	IncludeJTI    bool              `json:"jwt_svid_include_jti,omitempty"`
	Fallback      bool              `json:"fallback,omitempty"`
}

func (m *Manager) encodeState() ([]byte, error) {
	// Under the lock only pointers to immutable things are gathered.
	type held struct {
		r    *record
		e    *entry.Entry
		svid *X509SVID
		at   time.Time
		re   bool
	}
	m.mu.Lock()
	now := m.now()
	all := make([]held, 0, len(m.records))
	for _, r := range m.records {
		if r.svid != nil && now.Before(r.svid.NotAfter) && r.svid.ID == r.entry.SPIFFEID {
			all = append(all, held{r, r.entry, r.svid, r.renewAt, r.resign})
		}
	}
	bundles := m.bundles
	m.mu.Unlock()

	st := savedState{Identities: make([]savedIdentity, 0, len(all))}
	for _, h := range all {
		st.Identities = append(st.Identities, savedIdentity{
			Entry: saveEntry(h.e), Chain: h.svid.ChainDER, Key: h.svid.KeyDER, RenewAt: h.at, Resign: h.re,
		})
	}
	var err error
	if st.Bundles, err = saveBundles(bundles); err != nil {
		return nil, err
	}
	body, err := json.Marshal(st)
	if err != nil {
		return nil, fmt.Errorf("encode restart state: %w", err)
	}
	return body, nil
}

func saveBundles(set *authority.BundleSet) (*savedBundles, error) {
	if set == nil {
		return nil, nil
	}
	out := &savedBundles{TaintedX509: set.TaintedX509, TaintedJWT: set.TaintedJWT}
	save := func(b *spiffebundle.Bundle) (savedBundle, error) {
		jwks, err := b.Marshal()
		if err != nil {
			return savedBundle{}, fmt.Errorf("encode bundle of %s: %w", b.TrustDomain(), err)
		}
		return savedBundle{TrustDomain: b.TrustDomain().Name(), JWKS: jwks}, nil
	}
	if set.Own != nil {
		own, err := save(set.Own)
		if err != nil {
			return nil, err
		}
		out.Own = &own
	}
	for _, b := range set.Federated {
		s, err := save(b)
		if err != nil {
			return nil, err
		}
		out.Federated = append(out.Federated, s)
	}
	return out, nil
}

func saveEntry(e *entry.Entry) savedEntry {
	out := savedEntry{
		ID: e.ID, SPIFFEID: e.SPIFFEID, ParentID: e.ParentID,
		X509SVIDTTL: e.X509SVIDTTL, JWTSVIDTTL: e.JWTSVIDTTL,
		DNSNames: e.DNSNames, Hint: e.Hint, Admin: e.Admin, Downstream: e.Downstream,
		ExpiresAt: e.ExpiresAt, Revision: e.Revision, CreatedAt: e.CreatedAt,
		NoPrefetch: e.DisableX509SVIDPrefetch, IncludeJTI: e.JWTSVIDIncludeJTI, Fallback: e.Fallback,
	}
	for s := range e.Selectors.All() {
		out.Selectors = append(out.Selectors, s)
	}
	for _, td := range e.FederatesWith {
		out.FederatesWith = append(out.FederatesWith, td.Name())
	}
	return out
}

// decodeState reads the body of a state file: all of it, or an error.
// Identities that expired since are left out.
func decodeState(body []byte, now time.Time) (*authority.BundleSet, []*record, error) {
	var st savedState
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&st); err != nil {
		return nil, nil, fmt.Errorf("decode: %w", err)
	}
	if dec.More() {
		return nil, nil, errors.New("something follows the end")
	}
	bundles, err := loadBundles(st.Bundles)
	if err != nil {
		return nil, nil, err
	}
	var out []*record
	seen := make(map[string]bool, len(st.Identities))
	for i := range st.Identities {
		s := &st.Identities[i]
		r, err := loadRecord(s)
		clear(s.Key)
		if err != nil {
			return nil, nil, fmt.Errorf("identity of entry %q: %w", s.Entry.ID, err)
		}
		if seen[r.entry.ID] {
			return nil, nil, fmt.Errorf("entry %q occurs twice", r.entry.ID)
		}
		seen[r.entry.ID] = true
		if now.Before(r.svid.NotAfter) && !r.entry.Expired(now) {
			out = append(out, r)
		}
	}
	return bundles, out, nil
}

func loadBundles(s *savedBundles) (*authority.BundleSet, error) {
	if s == nil {
		return nil, nil
	}
	load := func(b savedBundle) (*spiffebundle.Bundle, error) {
		td, err := spiffeid.TrustDomainFromString(b.TrustDomain)
		if err != nil {
			return nil, fmt.Errorf("bundle of %q: %w", b.TrustDomain, err)
		}
		return spiffebundle.Parse(td, b.JWKS)
	}
	out := &authority.BundleSet{
		Federated:   make(map[spiffeid.TrustDomain]*spiffebundle.Bundle, len(s.Federated)),
		TaintedX509: s.TaintedX509,
		TaintedJWT:  s.TaintedJWT,
	}
	var err error
	if s.Own != nil {
		if out.Own, err = load(*s.Own); err != nil {
			return nil, err
		}
	}
	for _, f := range s.Federated {
		b, err := load(f)
		if err != nil {
			return nil, err
		}
		out.Federated[b.TrustDomain()] = b
	}
	return out, nil
}

func loadRecord(s *savedIdentity) (*record, error) {
	e, err := loadEntry(&s.Entry)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(s.Key)
	if err != nil {
		return nil, errors.New("the key cannot be read") // the cause could quote it
	}
	key, ok := parsed.(crypto.Signer)
	if !ok {
		return nil, fmt.Errorf("the key is a %T", parsed)
	}
	svid, err := newX509SVID(e.SPIFFEID, s.Chain, key)
	if err != nil {
		return nil, err
	}
	return &record{
		entry: e, groups: make(map[*group]struct{}, 1),
		svid: svid, signed: e, renewAt: s.RenewAt, resign: s.Resign,
	}, nil
}

func loadEntry(s *savedEntry) (*entry.Entry, error) {
	switch {
	case s.ID == "":
		return nil, errors.New("the entry ID is missing")
	case s.SPIFFEID.IsZero():
		return nil, errors.New("the SPIFFE ID is missing")
	case len(s.Selectors) == 0:
		return nil, errors.New("the selectors are missing")
	case s.X509SVIDTTL < 0 || s.JWTSVIDTTL < 0:
		return nil, errors.New("a TTL is negative")
	}
	e := &entry.Entry{
		ID: s.ID, SPIFFEID: s.SPIFFEID, ParentID: s.ParentID, Selectors: attest.NewSelectors(s.Selectors...),
		X509SVIDTTL: s.X509SVIDTTL, JWTSVIDTTL: s.JWTSVIDTTL,
		DNSNames: s.DNSNames, Hint: s.Hint, Admin: s.Admin, Downstream: s.Downstream,
		ExpiresAt: s.ExpiresAt, Revision: s.Revision, CreatedAt: s.CreatedAt,
		DisableX509SVIDPrefetch: s.NoPrefetch, JWTSVIDIncludeJTI: s.IncludeJTI, Fallback: s.Fallback,
	}
	if e.Selectors.Len() != len(s.Selectors) {
		return nil, errors.New("a selector is empty or occurs twice")
	}
	for _, name := range s.FederatesWith {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, fmt.Errorf("federated trust domain: %w", err)
		}
		e.FederatesWith = append(e.FederatesWith, td)
	}
	return e, nil
}
