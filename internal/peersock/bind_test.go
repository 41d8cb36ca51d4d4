package peersock_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/spiffe-node/spiffe-node/internal/peersock"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// lockedBuffer is a log.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) count(s string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Count(l.b.String(), s)
}

func refused(t *testing.T, reg *prometheus.Registry, reason string) int {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		if f.GetName() != "spiffe_node_peer_refused_total" && f.GetName() != "spiffe_node_peer_bind_failures_total" {
			continue
		}
		for _, m := range f.GetMetric() {
			if m.GetLabel()[0].GetValue() == reason {
				return int(m.GetCounter().GetValue())
			}
		}
	}
	return 0
}

func TestLimits(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		reason string
		cfg    peersock.Config
		inPod  bool
	}{
		{"limit_global", peersock.Config{MaxConns: 3}, true},
		{"limit_uid", peersock.Config{MaxConnsPerUID: 3}, true},
		{"limit_key", peersock.Config{MaxConnsPerKey: 3}, true},
	} {
		t.Run(tc.reason, func(t *testing.T) {
			t.Parallel()
			var log lockedBuffer
			reg := prometheus.NewRegistry()
			cfg := tc.cfg
			cfg.Logger = slog.New(slog.NewTextHandler(&log, nil))
			cfg.Metrics = peersock.NewMetrics(reg)
			cfg.Bind = func(context.Context, attest.Caller) (attest.Subject, error) { return newSubject("pod-1"), nil }
			s := serve(t, cfg)
			for range 2 {
				s.dial(t)
				s.next(t)
			}
			third := s.dial(t)
			conn := s.next(t)
			for range 5 {
				wantClosed(t, s.dial(t))
			}
			if got := refused(t, reg, tc.reason); got != 5 {
				t.Errorf("%d refusals counted, want 5", got)
			}
			if got := log.count("connection refused"); got < 1 || got > 3 {
				t.Errorf("%d refusals logged, want one per second", got)
			}
			wantOpen(t, third)
			// Room again.
			conn.Close()
			eventually(t, "the connection is not counted any more", func() bool { n, _, _ := s.Counts(); return n == 2 })
			wantOpen(t, s.dial(t))
			s.next(t)
		})
	}
}

// Two pods have each their own limit; outside pods the user's is the only one.
func TestLimitsApart(t *testing.T) {
	t.Parallel()
	var n atomic.Int64
	s := serve(t, peersock.Config{MaxConnsPerKey: 1, Bind: func(context.Context, attest.Caller) (attest.Subject, error) {
		sub := newSubject("uid:0")
		switch i := n.Add(1); {
		case i <= 2:
			sub.key = "pod-" + itoa(int(i))
		default:
			sub.inPod = false
		}
		return sub, nil
	}})
	for range 6 {
		s.dial(t)
		s.next(t)
	}
}

// Callers that cannot be bound are limited too, and do not count as a pod.
func TestLimitUnbound(t *testing.T) {
	t.Parallel()
	s := serve(t, peersock.Config{MaxConnsPerKey: 2, Bind: func(context.Context, attest.Caller) (attest.Subject, error) {
		return nil, attest.ErrDenied
	}})
	for range 2 {
		s.dial(t)
		s.next(t)
	}
	wantClosed(t, s.dial(t))
}

// A Bind that fails for good is answered per call; the connection stays.
func TestBindDenied(t *testing.T) {
	t.Parallel()
	var calls atomic.Int64
	s := serve(t, peersock.Config{Bind: func(context.Context, attest.Caller) (attest.Subject, error) {
		calls.Add(1)
		return nil, fmt.Errorf("%w: witnesses disagree", attest.ErrDenied)
	}})
	client := s.dial(t)
	p := s.next(t).Peer()
	deadline := time.Now().Add(400 * time.Millisecond)
	for time.Now().Before(deadline) {
		if _, err := p.Subject(); !errors.Is(err, attest.ErrDenied) {
			t.Fatalf("Subject: %v, want ErrDenied", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if calls.Load() != 1 {
		t.Errorf("a denied caller was bound %d times", calls.Load())
	}
	wantOpen(t, client)
}

// One that may pass is tried again.
func TestBindAgain(t *testing.T) {
	t.Parallel()
	var calls atomic.Int64
	bound := newSubject("pod")
	reg := prometheus.NewRegistry()
	s := serve(t, peersock.Config{Metrics: peersock.NewMetrics(reg), Bind: func(context.Context, attest.Caller) (attest.Subject, error) {
		if calls.Add(1) < 3 {
			return nil, errors.New("out of descriptors")
		}
		return bound, nil
	}})
	s.dial(t)
	p := s.next(t).Peer()
	if _, err := p.Subject(); err == nil || errors.Is(err, attest.ErrDenied) {
		t.Fatalf("Subject: %v", err)
	}
	eventually(t, "the caller is bound", func() bool {
		got, err := p.Subject()
		return err == nil && got == attest.Subject(bound)
	})
	if calls.Load() != 3 {
		t.Errorf("bound %d times, want 3", calls.Load())
	}
	if got := refused(t, reg, "error"); got != 2 {
		t.Errorf("%d failures counted, want 2", got)
	}
	if _, _, keys := s.Counts(); keys != 1 {
		t.Errorf("%d keys are counted, want the pod's alone", keys)
	}
}

func TestBindPanics(t *testing.T) {
	t.Parallel()
	s := serve(t, peersock.Config{Bind: func(context.Context, attest.Caller) (attest.Subject, error) { panic("oops") }})
	s.dial(t)
	if _, err := s.next(t).Peer().Subject(); !errors.Is(err, attest.ErrDenied) || strings.Contains(err.Error(), "oops") {
		t.Errorf("Subject: %v", err)
	}
}

// A slow Bind stalls nobody else and is answered after its time.
func TestBindSlow(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	var n atomic.Int64
	s := serve(t, peersock.Config{
		BindTimeout: 100 * time.Millisecond, BindParallel: 4,
		Bind: func(context.Context, attest.Caller) (attest.Subject, error) { // does not look at its context
			if n.Add(1) <= 3 {
				<-release
			}
			return newSubject("pod-" + itoa(int(n.Load()))), nil
		},
	})
	for range 3 {
		s.dial(t)
	}
	eventually(t, "three are being bound", func() bool { return n.Load() == 3 })
	start := time.Now()
	for range 20 {
		s.dial(t)
		if _, err := s.next(t).Peer().Subject(); err != nil && !errors.Is(err, peersock.ErrBindTimeout) {
			t.Fatal(err)
		}
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("others waited %v", took)
	}
	var slow []*peersock.Peer
	for range 3 {
		p := s.next(t).Peer()
		if _, err := p.Subject(); err != nil {
			if !errors.Is(err, peersock.ErrBindTimeout) || errors.Is(err, attest.ErrDenied) {
				t.Errorf("slow one: %v", err)
			}
			slow = append(slow, p)
		}
	}
	close(release)
	// What comes late is taken all the same.
	for _, p := range slow {
		eventually(t, "the slow one is bound", func() bool { _, err := p.Subject(); return err == nil })
	}
}

// settling is a subject whose Settle blocks.
type settling struct {
	*subject
	settle func(context.Context) error
}

func (settling) Settled() bool                      { return false }
func (s settling) Settle(ctx context.Context) error { return s.settle(ctx) }

// A Settle that never ends holds up its own key alone.
func TestSettle(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	defer close(release)
	var n, stuck atomic.Int64
	s := serve(t, peersock.Config{
		BindTimeout: 200 * time.Millisecond,
		Bind: func(context.Context, attest.Caller) (attest.Subject, error) {
			switch i := n.Add(1); {
			case i <= 10:
				return settling{newSubject("bad"), func(context.Context) error {
					stuck.Add(1)
					<-release
					return nil
				}}, nil
			case i == 11:
				return settling{newSubject("denied"), func(context.Context) error { return attest.ErrDenied }}, nil
			case i == 12:
				return settling{newSubject("panics"), func(context.Context) error { panic("oops") }}, nil
			}
			return settling{newSubject("good"), func(context.Context) error { return nil }}, nil
		},
	})
	for range 10 {
		s.dial(t)
	}
	eventually(t, "all are bound", func() bool { return n.Load() == 10 })
	start := time.Now()
	for i := range 6 {
		s.dial(t)
		_, err := s.next(t).Peer().Subject()
		switch {
		case i < 2 && !errors.Is(err, attest.ErrDenied), i >= 2 && err != nil && !errors.Is(err, peersock.ErrBindTimeout):
			t.Errorf("connection %d: %v", i, err)
		}
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("others waited %v", took)
	}
	if stuck.Load() != peersock.DefaultSettlePerKey {
		t.Errorf("%d are stuck, want %d", stuck.Load(), peersock.DefaultSettlePerKey)
	}
	for range 10 {
		s.next(t) // answered after their time
	}
}

// A Settle that takes longer than the caller is kept waiting still counts, and
// the caller is not bound a second time meanwhile.
func TestSettleLate(t *testing.T) {
	t.Parallel()
	release := make(chan struct{})
	var binds atomic.Int64
	s := serve(t, peersock.Config{
		BindTimeout: 50 * time.Millisecond,
		Bind: func(context.Context, attest.Caller) (attest.Subject, error) {
			binds.Add(1)
			return settling{newSubject("pod"), func(ctx context.Context) error {
				select {
				case <-release:
					return nil
				case <-ctx.Done():
					return ctx.Err()
				}
			}}, nil
		},
	})
	s.dial(t)
	p := s.next(t).Peer()
	deadline := time.Now().Add(400 * time.Millisecond)
	for time.Now().Before(deadline) {
		if _, err := p.Subject(); !errors.Is(err, peersock.ErrBindTimeout) {
			t.Fatalf("Subject: %v", err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	close(release)
	eventually(t, "the caller is bound", func() bool { _, err := p.Subject(); return err == nil })
	if binds.Load() != 1 {
		t.Errorf("bound %d times", binds.Load())
	}
}

// A caller that ends while it is being bound never comes out of Accept.
func TestCallerExitsWhileBound(t *testing.T) {
	t.Parallel()
	started, release := make(chan struct{}), make(chan struct{})
	bound := newSubject("pod")
	s := serve(t, peersock.Config{Bind: func(context.Context, attest.Caller) (attest.Subject, error) {
		close(started)
		<-release
		return bound, nil
	}})
	c := startChild(t, "connect "+s.path)
	<-started
	c.end()
	eventually(t, "the connection is gone", func() bool { n, _, _ := s.Counts(); return n == 0 })
	close(release)
	<-bound.closed
	select {
	case got := <-s.conns:
		t.Errorf("accepted %+v", got.Peer().Caller())
	case <-time.After(20 * time.Millisecond):
	}
	if _, _, keys := s.Counts(); keys != 0 {
		t.Errorf("%d keys are still counted", keys)
	}
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewRegistry()
	s := serve(t, peersock.Config{Metrics: peersock.NewMetrics(reg)})
	c := startChild(t, "connect "+s.path)
	conn := s.next(t)
	c.end()
	wantClosed(t, conn)
	want := map[string]float64{
		"spiffe_node_peer_caller_exits_total":  1,
		"spiffe_node_peer_connections":         0,
		"spiffe_node_peer_connections_total":   1,
		"spiffe_node_peer_identification_info": 1,
	}
	eventually(t, "the metrics are right", func() bool {
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		got := make(map[string]float64)
		for _, f := range families {
			if _, ok := want[f.GetName()]; ok {
				m := f.GetMetric()[0]
				got[f.GetName()] = m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
		return maps.Equal(got, want)
	})
}

func TestGate(t *testing.T) {
	t.Parallel()
	var g peersock.Gate
	now := time.Unix(1000, 0)
	if n, ok := g.Open("a", now); !ok || n != 0 {
		t.Errorf("first: %d, %v", n, ok)
	}
	for range 5 {
		if _, ok := g.Open("a", now.Add(time.Second-1)); ok {
			t.Error("two within a second")
		}
	}
	if _, ok := g.Open("b", now); !ok {
		t.Error("another key is held back")
	}
	if n, ok := g.Open("a", now.Add(time.Second)); !ok || n != 5 {
		t.Errorf("after a second: %d, %v; want 5, true", n, ok)
	}
	for i := range 5000 {
		g.Open(itoa(i), now.Add(2*time.Second))
	}
	if g.Keys() > 1024 {
		t.Errorf("%d keys are remembered", g.Keys())
	}
	if _, ok := g.Open("later", now.Add(4*time.Second)); !ok || g.Keys() > 1 {
		t.Errorf("old keys are not forgotten: %d", g.Keys())
	}
}
