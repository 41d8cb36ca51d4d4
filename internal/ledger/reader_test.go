package ledger_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// follow runs a reader for the time of the test.
func follow(t *testing.T, cfg ledger.ReaderConfig) *ledger.Reader {
	t.Helper()
	r, err := ledger.NewReader(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	})
	return r
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-deadline:
			t.Fatal("never: " + what)
		case <-time.After(time.Millisecond):
		}
	}
}

// published collects what OnPublish is told.
type published struct {
	mu  sync.Mutex
	ids []string
}

func (p *published) add(r ledger.Record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ids = append(p.ids, r.VolumeID)
}

func (p *published) is(want ...string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return cmp.Equal(p.ids, want)
}

func TestReaderFollowsTheWriter(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	s := open(t, dir)
	early := record("csi-early")
	early.PodUID = "early"
	put(t, s, early)
	var p published
	r := follow(t, ledger.ReaderConfig{Dir: dir, OnPublish: p.add})
	if _, ok := r.Pod("early"); !ok {
		t.Error("what was there at start is not known at once")
	}
	eventually(t, "the early volume is announced", func() bool { return p.is("csi-early") })

	var told atomic.Int32
	stop := r.Watch(uid, func() { told.Add(1) })
	rec := record("csi-a")
	put(t, s, rec)
	want := attest.Pod{UID: uid, Namespace: "default", Name: "web-0", ServiceAccount: "web", Witness: "ledger"}
	eventually(t, "the pod is known", func() bool { _, ok := r.Pod(uid); return ok })
	if got, _ := r.Pod(uid); !cmp.Equal(got, want) {
		t.Errorf("%+v", got)
	}
	if got, ok := r.Record(uid); !ok || got != rec {
		t.Errorf("%+v, %v", got, ok)
	}
	if got := r.Named("default", "web-0"); len(got) != 2 || len(r.Named("default", "other")) != 0 || len(r.Named("other", "web-0")) != 0 {
		t.Errorf("by name: %+v", got)
	}
	eventually(t, "the watcher is told", func() bool { return told.Load() == 1 })
	eventually(t, "the volume is announced", func() bool { return p.is("csi-early", "csi-a") })

	// A second volume of the pod, published later, speaks for it; when it goes
	// the first does again.
	second := record("csi-b")
	second.ServiceAccount, second.Published = "other", rec.Published.Add(time.Second)
	put(t, s, second)
	eventually(t, "the newer record speaks", func() bool { got, _ := r.Pod(uid); return got.ServiceAccount == "other" })
	if err := s.Delete("csi-b"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the older record speaks", func() bool { got, ok := r.Pod(uid); return ok && got.ServiceAccount == "web" })
	if err := s.Delete("csi-a"); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pod is forgotten", func() bool { _, ok := r.Pod(uid); return !ok })
	eventually(t, "the watcher is told of all", func() bool { return told.Load() == 4 })
	stop()
	stop()
	put(t, s, rec)
	eventually(t, "the pod is known again", func() bool { _, ok := r.Pod(uid); return ok })
	if told.Load() != 4 {
		t.Error("told after stop")
	}
	if r.Len() != 2 {
		t.Errorf("%d volumes", r.Len())
	}
}

// A record that is written again without a change is no news.
func TestReaderIsQuietAboutTheSame(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	s := open(t, dir)
	put(t, s, record("csi-a"))
	var p published
	r := follow(t, ledger.ReaderConfig{Dir: dir, OnPublish: p.add, Resync: 5 * time.Millisecond})
	var told atomic.Int32
	defer r.Watch(uid, func() { told.Add(1) })()
	put(t, s, record("csi-a"))
	other := record("csi-z")
	other.PodUID = "other"
	put(t, s, other)
	eventually(t, "the other is announced", func() bool { return p.is("csi-a", "csi-z") })
	if told.Load() != 0 {
		t.Errorf("told %d times of nothing", told.Load())
	}
}

func TestReaderGoesOnBesideCorruptFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	s := open(t, dir)
	put(t, s, record("csi-a"))
	write(t, filepath.Join(dir, "csi-bad.json"), "half a rec")
	var p published
	r := follow(t, ledger.ReaderConfig{Dir: dir, OnPublish: p.add})
	b := record("csi-b")
	b.PodUID = "b"
	put(t, s, b)
	eventually(t, "a good record is known", func() bool { _, ok := r.Pod("b"); return ok })
	// A record that breaks is no longer vouched for; when it is mended it is.
	path := filepath.Join(dir, "csi-b.json")
	write(t, path, "broken")
	eventually(t, "the broken record is dropped", func() bool { _, ok := r.Pod("b"); return !ok })
	if got, err := os.ReadFile(path); err != nil || string(got) != "broken" {
		t.Errorf("it was touched: %q, %v", got, err)
	}
	put(t, s, b)
	eventually(t, "the mended record is known", func() bool { _, ok := r.Pod("b"); return ok })
	if got, err := os.ReadFile(filepath.Join(dir, "csi-bad.json")); err != nil || string(got) != "half a rec" {
		t.Errorf("it was touched: %q, %v", got, err)
	}
}

func TestReaderSurvivesTheDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	put(t, open(t, dir), record("csi-a"))
	var p published
	r := follow(t, ledger.ReaderConfig{Dir: dir, OnPublish: p.add, Resync: 20 * time.Millisecond})
	eventually(t, "it has started", func() bool { return p.is("csi-a") })
	for i := range 3 {
		if err := os.Rename(dir, fmt.Sprintf("%s.%d", dir, i)); err != nil {
			t.Fatal(err)
		}
		eventually(t, "the pod is forgotten", func() bool { _, ok := r.Pod(uid); return !ok })
		put(t, open(t, dir), record("csi-a"))
		eventually(t, "the pod is known again", func() bool { _, ok := r.Pod(uid); return ok })
	}
}

// Thousands of changes at once, more than the kernel queues for a reader that
// is slow, end in the right picture.
func TestReaderAfterABurst(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	s := open(t, dir)
	r := follow(t, ledger.ReaderConfig{Dir: dir, Resync: 50 * time.Millisecond})
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 100 {
				rec := record(fmt.Sprintf("csi-%d-%d", w, i))
				rec.PodUID = rec.VolumeID
				if err := s.Put(rec); err != nil {
					t.Error(err)
				}
				if i%4 != 0 {
					if err := s.Delete(rec.VolumeID); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	eventually(t, "100 volumes are left", func() bool { return r.Len() == 100 })
	for _, rec := range s.List() {
		if _, ok := r.Pod(rec.PodUID); !ok {
			t.Errorf("%s is not known", rec.PodUID)
		}
	}
}

// BenchmarkSeen is the time from Put to the answer of Pod.
func BenchmarkSeen(b *testing.B) {
	dir := filepath.Join(b.TempDir(), "ledger")
	s := open(b, dir)
	r, err := ledger.NewReader(ledger.ReaderConfig{Dir: dir})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	defer func() {
		cancel()
		if err := <-done; err != nil {
			b.Error(err)
		}
	}()
	news := make(chan struct{}, 1)
	defer r.Watch(uid, func() { news <- struct{}{} })()
	rec := record("csi-a")
	for b.Loop() {
		put(b, s, rec)
		<-news
		rec.Published = rec.Published.Add(time.Second)
	}
}
