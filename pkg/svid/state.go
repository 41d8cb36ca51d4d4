package svid

import (
	"bytes"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/durable"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// The restart state is one file, identities.state, replaced whole:
//
//	spiffe-node identities 1 <sha256 of the rest, hex>\n
//	{"bundles": ..., "identities": [{"entry": ..., "chain": [...], "key": ...}]}
//
// A file that is of another version, does not match its checksum or says
// anything that cannot be true is not used at all and renamed to
// identities.state.bad.
const (
	stateName   = "identities.state"
	stateHeader = "spiffe-node identities 1 "
	stateLimit  = 256 << 20 // bytes; more cannot be ours

	// saveDelay gathers changes into one write.
	saveDelay = 250 * time.Millisecond
)

// stateFile is where the restart state lives.
type stateFile struct {
	path   string
	urgent chan struct{} // something must be erased: no delay
}

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

// openState checks that keys may be put into dir.
func openState(dir string, anyFilesystem bool) (*stateFile, error) {
	if err := durable.OwnerDir(dir); err != nil {
		return nil, fmt.Errorf("restart state: %w", err)
	}
	if !anyFilesystem {
		if err := checkMemory(dir); err != nil {
			return nil, err
		}
	}
	f := &stateFile{path: filepath.Join(dir, stateName), urgent: make(chan struct{}, 1)}
	if err := durable.RemoveTemp(f.path); err != nil {
		return nil, fmt.Errorf("restart state: %w", err)
	}
	return f, nil
}

// checkMemory refuses a directory that would put keys on a disk.
func checkMemory(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("restart state: statfs %s: %w", dir, err)
	}
	switch uint32(st.Type) {
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		return nil
	}
	return fmt.Errorf("restart state: %s is on a filesystem of type %#x, not tmpfs, and private keys must not reach a disk; "+
		"set --state-dir (identity.stateDirectory) to a directory on tmpfs such as /run/spiffe-node/state, or to nothing to keep no restart state",
		dir, uint32(st.Type))
}

// hurry has the state written without delay. A nil stateFile does nothing.
func (f *stateFile) hurry() {
	if f != nil {
		signal(f.urgent)
	}
}

// keepState writes the state a moment after it changed, and once more at the
// end if it must.
func (m *Manager) keepState(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			select {
			case <-m.save:
				m.saveState()
			default:
			}
			return
		case <-m.save:
		}
		t := time.NewTimer(saveDelay)
		select {
		case <-ctx.Done():
		case <-m.state.urgent:
		case <-t.C:
		}
		t.Stop()
		start := time.Now()
		m.saveState()
		// However much there is to write, it takes a tenth of the time.
		sleep(ctx, 9*time.Since(start))
	}
}

func (m *Manager) saveState() {
	data, err := m.encodeState()
	if err == nil {
		err = durable.WriteFile(m.state.path, data, 0o600)
	}
	clear(data) // it holds keys
	if err != nil {
		m.log.Error("restart state was not written; an agent restarted now waits for the authority", slog.Any("error", err))
	}
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
	defer clear(body)
	return append(fmt.Appendf(make([]byte, 0, len(body)+128), "%s%x\n", stateHeader, sha256.Sum256(body)), body...), nil
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

// restore loads what the process before left. Whatever is wrong with it, the
// agent starts; a file that cannot be trusted is set aside.
func (m *Manager) restore() {
	info, err := os.Lstat(m.state.path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var data []byte
	if err == nil {
		err = durable.CheckOwnerFile(m.state.path)
	}
	if err == nil && info.Size() > stateLimit {
		err = fmt.Errorf("the file has %d bytes, more than %d", info.Size(), stateLimit)
	}
	if err == nil {
		data, err = os.ReadFile(m.state.path)
	}
	var bundles *authority.BundleSet
	var records []*record
	if err == nil {
		bundles, records, err = decodeState(data, m.now())
		clear(data)
	}
	if err != nil {
		m.setAside(err)
		return
	}
	entries := make([]*entry.Entry, len(records))
	for i, r := range records {
		entries[i] = r.entry
	}
	m.do(func(now time.Time) {
		m.set, m.bundles = entry.NewSet(entries...), bundles
		if bundles != nil {
			m.jwts.taint(bundles.TaintedJWT)
		}
		for _, r := range records {
			if r.renewAt.IsZero() || r.renewAt.After(r.svid.NotAfter) {
				r.renewAt = renewalTime(r.svid, now)
			}
			m.records[r.entry.ID] = r
			m.showLocked(r)
			// Nobody has called yet, so nobody needs it yet; it must not be
			// let go before its pod has had the time to come back.
			m.setTimerLocked(&r.alarm, r, r.svid.NotAfter)
		}
	})
	m.log.Info("restart state loaded", slog.Int("identities", len(records)))
}

func (m *Manager) setAside(why error) {
	bad := m.state.path + ".bad"
	err := os.Rename(m.state.path, bad)
	m.log.Error("restart state is not usable and was set aside; identities come from the authority",
		slog.String("kept_as", bad), slog.Any("error", errors.Join(why, err)))
}

// decodeState reads a state file: all of it, or an error. Identities that
// expired since are left out.
func decodeState(data []byte, now time.Time) (*authority.BundleSet, []*record, error) {
	head, body, ok := bytes.Cut(data, []byte("\n"))
	sum, isOurs := bytes.CutPrefix(head, []byte(stateHeader))
	if !ok || !isOurs {
		return nil, nil, fmt.Errorf("the file does not start with %q: it is of another version or no restart state", stateHeader)
	}
	if string(sum) != fmt.Sprintf("%x", sha256.Sum256(body)) {
		return nil, nil, errors.New("the checksum does not match: the file was cut or changed")
	}
	var st savedState
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&st); err != nil {
		return nil, nil, fmt.Errorf("decode: %w", err)
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
