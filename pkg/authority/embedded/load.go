package embedded

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/spiffe-node/spiffe-node/internal/latest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

var (
	errNoTrustDomain = errors.New("no trust domain")
	errTrailing      = errors.New("bytes behind the value")
)

// loading collects what the store holds.
type loading struct {
	a       *Authority
	rows    []int64
	entries []*entry.Entry
	book    bundleBook
	agents  *agentBook
	journal journal
	tokens  map[string]time.Time

	relations *relationBook
}

func (a *Authority) load() error {
	l := &loading{a: a, agents: newAgentBook(), tokens: make(map[string]time.Time), relations: new(relationBook)}
	if err := a.store.load(l.add); err != nil {
		return err
	}
	set := entry.Restore(func(yield func(int64, *entry.Entry) bool) {
		for i, e := range l.entries {
			if !yield(l.rows[i], e) {
				return
			}
		}
	})
	if set.Len() != len(l.entries) {
		return fmt.Errorf("%w: %s: two entries share an ID; %s", ErrCorrupt, a.cfg.StatePath, remedy)
	}
	l.book.set = &authority.BundleSet{}
	a.entries, a.agents = latest.New(set), latest.New(l.agents)
	a.tokens = l.tokens
	a.relations = latest.New(l.relations)
	a.journal.Store(l.resume())
	if l.book.own == nil {
		own, err := newBundleState(ownRow, &Bundle{TrustDomain: a.cfg.TrustDomain})
		if err != nil {
			return err
		}
		l.book.own = own
	}
	a.bundles = latest.New(l.book.publishable())
	a.metrics.version.Set(float64(l.book.own.Sequence))
	a.metrics.entries.Set(float64(set.Len()))
	return nil
}

// resume is the journal without active and prepared keys that the bundle does
// not have: what they sign would verify nowhere.
func (l *loading) resume() *journal {
	j := l.journal
	for _, k := range []kind{kindX509, kindJWT} {
		s := j.of(k)
		for _, p := range []**slot{&s.current, &s.next} {
			if *p == nil || (*p).state == Old || l.book.own != nil && l.book.own.find(k, (*p).rootID()) != nil {
				continue
			}
			l.a.log.Warn("signing key is not in the trust bundle; it is not used any more", slog.String("kind", string(k)), slog.String("authority_id", (*p).id))
			*p = nil
		}
		if s.current != nil {
			l.a.metrics.expiry.WithLabelValues(string(k)).Set(float64(s.current.notAfter.Unix()))
		}
	}
	return &j
}

// add takes one stored value.
func (l *loading) add(bucket, key string, value []byte) error {
	content, err := unseal(bucket, key, value)
	if err != nil {
		return err
	}
	switch bucket {
	case bucketEntries:
		return l.addEntry(key, content)
	case bucketBundles:
		return l.addBundle(key, content)
	case bucketAgents:
		return l.addAgent(key, content)
	case bucketCA:
		return l.addSlots(key, content)
	case bucketTokens:
		return l.addToken(key, content)
	case bucketRelationships:
		return l.addRelationship(key, content)
	default:
		return fmt.Errorf("unknown bucket %q", bucket)
	}
}

func (l *loading) addEntry(key string, content []byte) error {
	row, err := parseRow(key)
	if err != nil {
		return err
	}
	e := new(entry.Entry)
	if err := e.UnmarshalBinary(content); err != nil {
		return err
	}
	if e.ID == "" || !e.SPIFFEID.MemberOf(l.a.cfg.TrustDomain) {
		return fmt.Errorf("entry %q with SPIFFE ID %q does not belong here", e.ID, e.SPIFFEID)
	}
	l.rows, l.entries = append(l.rows, row), append(l.entries, e)
	return nil
}

func (l *loading) addBundle(key string, content []byte) error {
	row, err := parseRow(key)
	if err != nil {
		return err
	}
	b, err := decodeBundle(content)
	if err != nil {
		return err
	}
	state, err := newBundleState(row, b)
	if err != nil {
		return err
	}
	if own := b.TrustDomain == l.a.cfg.TrustDomain; own != (row == ownRow) {
		return fmt.Errorf("bundle of %q in row %d", b.TrustDomain, row)
	}
	l.book = *l.book.with(state)
	return nil
}

func (l *loading) addAgent(key string, content []byte) error {
	row, err := parseRow(key)
	if err != nil {
		return err
	}
	agent, err := decodeAgent(row, content)
	if err != nil {
		return err
	}
	l.agents = l.agents.with(agent)
	return nil
}

func (l *loading) addSlots(key string, content []byte) error {
	switch kind := kind(key); kind {
	case kindX509, kindJWT:
		s, err := decodeSlots(kind, l.a.cfg.TrustDomain, content)
		if err != nil {
			return err
		}
		*l.journal.of(kind) = s
		return nil
	default:
		return errors.New("unknown key")
	}
}

// unmarshalStrict refuses members this program does not know, since writing the
// value back would drop them.
func unmarshalStrict(content []byte, into any) error {
	dec := json.NewDecoder(bytes.NewReader(content))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil {
		return err
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return errTrailing
	}
	return nil
}
