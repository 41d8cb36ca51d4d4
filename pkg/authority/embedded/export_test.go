package embedded

import (
	"context"
	"errors"
	"sync/atomic"
	"time"
)

// MemoryStore is a store without a disk, for tests inside a synctest bubble and
// for faults on demand.
type MemoryStore struct {
	Values map[string]map[string][]byte
	// Writes counts successful applies.
	Writes int

	fail atomic.Pointer[error]
}

// Fail makes every apply answer err from now on; nil ends that.
func (m *MemoryStore) Fail(err error) { m.fail.Store(&err) }

// NewMemoryStore is an empty store.
func NewMemoryStore() *MemoryStore {
	m := &MemoryStore{Values: make(map[string]map[string][]byte)}
	for _, name := range dataBuckets {
		m.Values[name] = make(map[string][]byte)
	}
	return m
}

func (m *MemoryStore) load(f func(bucket, key string, value []byte) error) error {
	for bucket, values := range m.Values {
		for key, value := range values {
			if err := f(bucket, key, value); err != nil {
				return errors.Join(ErrCorrupt, err)
			}
		}
	}
	return nil
}

func (m *MemoryStore) apply(changes []change) error {
	if err := m.fail.Load(); err != nil && *err != nil {
		return *err
	}
	m.Writes++
	for _, c := range changes {
		if c.value == nil {
			delete(m.Values[c.bucket], c.key)
		} else {
			m.Values[c.bucket][c.key] = c.value
		}
	}
	return nil
}

func (m *MemoryStore) close() error { return nil }

// OpenWith is Open on a given store.
func OpenWith(cfg Config, s *MemoryStore) (*Authority, error) {
	cfg.StatePath = "memory"
	cfg = cfg.withDefaults()
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	return open(cfg, s)
}

// Rotate, PruneEntries and PruneBundle are the jobs of Run.
func (a *Authority) Rotate(now time.Time) error       { return a.rotate(context.Background(), now) }
func (a *Authority) PruneEntries(now time.Time) error { return a.pruneEntries(now) }
func (a *Authority) PruneBundle(now time.Time) error  { return a.pruneBundle(now) }
func (a *Authority) PruneTokens(now time.Time) error  { return a.pruneTokens(now) }

// LoadValue is what the start does with one stored value.
func LoadValue(cfg Config, bucket, key string, value []byte) error {
	a := &Authority{cfg: cfg.withDefaults()}
	l := &loading{a: a, agents: newAgentBook(), tokens: make(map[string]time.Time), relations: new(relationBook)}
	return l.add(bucket, key, value)
}

// LoadContent is LoadValue with a good frame around the content.
func LoadContent(cfg Config, bucket, key string, content []byte) error {
	return LoadValue(cfg, bucket, key, seal(bucket, key, content))
}

// ForgetWrite makes the authority believe that its last write did not reach the
// disk, as after a failed fsync of a commit that happened nevertheless.
func (a *Authority) ForgetWrite() { a.store.(*boltStore).generation-- }

// Buckets are the names of the buckets with framed values.
func Buckets() []string { return dataBuckets }

// Content takes the frame off a value.
func Content(bucket, key string, value []byte) ([]byte, error) { return unseal(bucket, key, value) }
