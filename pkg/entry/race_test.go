package entry_test

import (
	"fmt"
	"sync"
	"testing"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// TestReadersAndWriter is for the race detector: everybody reads every set
// while the next ones are made from it.
func TestReadersAndWriter(t *testing.T) {
	t.Parallel()
	agent := id("/spire/agent/x")
	sc := entry.NewScope(agent, sels("node:a"))
	sets := make(chan *entry.Set, 8)
	var wg sync.WaitGroup
	for r := range 4 {
		wg.Go(func() {
			g := newGen(uint64(r))
			for s := range sets {
				scoped := sc.Apply(s)
				scoped.Match(g.selectors(5))
				s.Match(g.selectors(5))
				s.Nearest(g.selectors(5), 3)
				s.Changes(s.Version() - 1)
				s.List(entry.Filter{ParentID: agent}, 0, 10)
				if err := s.Check(); err != nil {
					t.Error(err)
				}
				// A fork: nobody else may see it.
				s.With([]*entry.Entry{{ID: fmt.Sprint("fork", r), Selectors: sels("t0:v0")}}, nil)
			}
		})
	}
	s := entry.NewSet()
	g := newGen(99)
	for range 300 {
		s = s.With(g.change())
		for range 4 {
			sets <- s
		}
	}
	close(sets)
	wg.Wait()
}
