package svid_test

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// A default identity that only its age decided is reported, once for each
// caller and pair; one that was meant is not.
func TestAmbiguousDefaultIsReported(t *testing.T) {
	older := func(e *entry.Entry) *entry.Entry {
		e.CreatedAt = e.CreatedAt.Add(-time.Hour)
		return e
	}
	// on has the entry ask for what every caller of this test has.
	on := func(e *entry.Entry, selectors ...string) *entry.Entry {
		e.Selectors = attest.MustSelectors(selectors...)
		return e
	}
	for name, tc := range map[string]struct {
		entries []*entry.Entry
		edit    func(*svid.Config)
		want    []string
	}{
		"tie":                {[]*entry.Entry{on(workload("a"), "unix:uid:1"), older(on(workload("b"), "unix:gid:1"))}, nil, []string{"b before a"}},
		"more selectors":     {[]*entry.Entry{on(workload("a"), "unix:uid:1"), on(workload("b"), "unix:uid:1", "unix:gid:1")}, nil, nil},
		"one entry":          {[]*entry.Entry{on(workload("a"), "unix:uid:1")}, nil, nil},
		"order of SPIRE":     {[]*entry.Entry{on(workload("a"), "unix:uid:1"), on(workload("b"), "unix:gid:1")}, func(c *svid.Config) { c.Order = entry.OrderSPIRE }, nil},
		"same ID":            {[]*entry.Entry{on(workload("a"), "unix:uid:1"), twin(on(workload("a"), "unix:gid:1"))}, nil, nil},
		"fallback and other": {[]*entry.Entry{on(workload("a"), "unix:uid:1"), fallback(on(workload("b"), "unix:gid:1"))}, nil, nil},
		"hint decides": {
			[]*entry.Entry{hinted(on(workload("a"), "unix:uid:1")), on(workload("b"), "unix:gid:1")},
			func(c *svid.Config) { c.DefaultHint = "main" }, nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var mu sync.Mutex
				var got []string
				w := run(t, newAuthority(), newEntries(tc.entries...), func(c *svid.Config) {
					c.OnAmbiguous = func(s attest.Subject, chosen, other *entry.Entry) {
						mu.Lock()
						defer mu.Unlock()
						got = append(got, chosen.SPIFFEID.Path()[1:]+" before "+other.SPIFFEID.Path()[1:])
					}
					if tc.edit != nil {
						tc.edit(c)
					}
				})
				s := w.subscribe(newCaller("x", "unix:uid:1", "unix:gid:1"))
				for range 3 {
					advance(time.Second)
					s.Update()
				}
				mu.Lock()
				defer mu.Unlock()
				if diff := cmp.Diff(tc.want, got); diff != "" {
					t.Errorf("-want +got:\n%s", diff)
				}
			})
		})
	}
}

func twin(e *entry.Entry) *entry.Entry     { e.ID += "-twin"; return e }
func fallback(e *entry.Entry) *entry.Entry { e.Fallback = true; return e }
func hinted(e *entry.Entry) *entry.Entry   { e.Hint = "main"; return e }
