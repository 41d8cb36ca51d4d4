package podevent_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/spiffe-node/spiffe-node/internal/podevent"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// writer remembers what is written.
type writer struct {
	mu     sync.Mutex
	events []podevent.Event
	err    error
	stuck  bool
}

func (w *writer) Write(ctx context.Context, e podevent.Event, _ time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stuck {
		<-ctx.Done()
		return ctx.Err()
	}
	w.events = append(w.events, e)
	return w.err
}

func (w *writer) written() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.events)
}

func run(t *testing.T, w podevent.Writer) (*podevent.Reporter, *bytes.Buffer) {
	t.Helper()
	log := &bytes.Buffer{}
	r, err := podevent.New(w, slog.New(slog.NewTextHandler(log, nil)), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return r, log
}

func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func pod(i int) podevent.Pod {
	return podevent.Pod{Namespace: "shop", Name: "web", UID: fmt.Sprint("u", i)}
}

func says(note string) func() string { return func() string { return note } }

func TestSameIsSaidOnceInAWhile(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &writer{}
		r, _ := run(t, w)
		for range 50 {
			r.Report(pod(1), podevent.ReasonLate, says("why"))
		}
		r.Report(pod(1), podevent.ReasonConflict, says("two"))
		r.Report(pod(2), podevent.ReasonLate, says("why"))
		after(time.Minute)
		if n := w.written(); n != 3 {
			t.Errorf("%d events, want 3: %v", n, w.events)
		}
		if e := w.events[0]; e.Name != "web" || e.Note != "why" || e.Reason != podevent.ReasonLate {
			t.Errorf("%+v", e)
		}
		after(10 * time.Minute)
		r.Report(pod(1), podevent.ReasonLate, says("still"))
		after(time.Second)
		if n := w.written(); n != 4 {
			t.Errorf("not said again after a while: %d events", n)
		}
	})
}

func TestNothingToSay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &writer{}
		r, _ := run(t, w)
		r.Report(pod(1), podevent.ReasonLate, says(""))
		r.Report(podevent.Pod{Namespace: "shop", Name: "web"}, podevent.ReasonLate, says("x"))
		r.Report(podevent.Pod{}, podevent.ReasonLate, says("x"))
		after(time.Minute)
		if n := w.written(); n != 0 {
			t.Errorf("%d events of nothing", n)
		}
		r.Report(pod(2), podevent.ReasonLate, says(strings.Repeat("ü", 2000)))
		after(time.Minute)
		if n := len(w.events[0].Note); n > 1024 {
			t.Errorf("a note of %d bytes", n)
		}
	})
}

// A burst is written slowly and what is too much is dropped; nobody waits.
func TestBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &writer{}
		r, _ := run(t, w)
		for i := range 1000 {
			r.Report(pod(i), podevent.ReasonLate, says("why"))
		}
		after(time.Second)
		first := w.written()
		after(time.Hour)
		if last := w.written(); first > 25 || last > 90 || last < 60 {
			t.Errorf("%d events in a second, %d in the end", first, last)
		}
	})
}

func TestAPIServerAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := &writer{err: errors.New("forbidden")}
		r, log := run(t, w)
		for i := range 5 {
			r.Report(pod(i), podevent.ReasonLate, says("why"))
		}
		after(time.Minute)
		if n := strings.Count(log.String(), "forbidden"); n != 1 {
			t.Errorf("%d lines in the log:\n%s", n, log)
		}
		w.mu.Lock()
		w.stuck = true
		w.mu.Unlock()
		r.Report(pod(9), podevent.ReasonLate, says("why"))
		after(time.Minute) // and the end of the test is not held up either
	})
}
