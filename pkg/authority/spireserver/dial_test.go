package spireserver_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
)

// pipe is a connection that knows whether it was closed.
type pipe struct {
	net.Conn
	address string
	closed  atomic.Bool
}

func (p *pipe) Close() error { p.closed.Store(true); return nil }

func TestFirstOf(t *testing.T) {
	refused := errors.New("connection refused")
	for name, tc := range map[string]struct {
		answers map[string]time.Duration // negative = refused after that
		took    time.Duration
		want    string
	}{
		"one":                     {map[string]time.Duration{"a": 0}, 0, "a"},
		"first is gone":           {map[string]time.Duration{"a": time.Hour, "b": 0}, 250 * time.Millisecond, "b"},
		"first refuses":           {map[string]time.Duration{"a": -time.Millisecond, "b": 0}, time.Millisecond, "b"},
		"two are gone":            {map[string]time.Duration{"a": time.Hour, "b": time.Hour, "c": 0}, 500 * time.Millisecond, "c"},
		"slow, but first":         {map[string]time.Duration{"a": 300 * time.Millisecond, "b": time.Second}, 300 * time.Millisecond, "a"},
		"all refuse":              {map[string]time.Duration{"a": -1, "b": -1, "c": -1}, 3, ""},
		"last is the only answer": {map[string]time.Duration{"a": -1, "b": time.Hour, "c": 700 * time.Millisecond}, 950 * time.Millisecond, "c"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var made []*pipe
				var addresses []string
				for _, a := range []string{"a", "b", "c"} {
					if _, ok := tc.answers[a]; ok {
						addresses = append(addresses, a)
					}
				}
				start := time.Now()
				conn, err := spireserver.FirstOf(t.Context(), addresses, func(ctx context.Context, a string) (net.Conn, error) {
					d := tc.answers[a]
					timer := time.NewTimer(max(d, -d))
					defer timer.Stop()
					select {
					case <-timer.C:
					case <-ctx.Done():
						return nil, ctx.Err()
					}
					if d < 0 {
						return nil, refused
					}
					p := &pipe{address: a}
					made = append(made, p)
					return p, nil
				})
				if took := time.Since(start); took < tc.took || took > tc.took+time.Millisecond {
					t.Errorf("took %s, want %s", took, tc.took)
				}
				if tc.want == "" {
					if !errors.Is(err, refused) {
						t.Errorf("got %v", err)
					}
					return
				}
				if err != nil || conn.(*pipe).address != tc.want {
					t.Fatalf("got %v %v", conn, err)
				}
				synctest.Wait()
				for _, p := range made {
					if p != conn && !p.closed.Load() {
						t.Errorf("the connection to %s was left open", p.address)
					}
				}
			})
		})
	}
}

// A connection that is there a moment too late is closed.
func TestFirstOfClosesTheLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		late := &pipe{address: "a"}
		conn, err := spireserver.FirstOf(t.Context(), []string{"a", "b"}, func(_ context.Context, a string) (net.Conn, error) {
			if a == "a" {
				time.Sleep(time.Second) // deaf to the end of its context
				return late, nil
			}
			return &pipe{address: a}, nil
		})
		if err != nil || conn.(*pipe).address != "b" {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		if !late.closed.Load() {
			t.Error("left open")
		}
	})
}

func TestDialTCP(t *testing.T) {
	lis, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	must(err)
	defer lis.Close()
	_, port, err := net.SplitHostPort(lis.Addr().String())
	must(err)
	for _, host := range []string{"127.0.0.1", "localhost"} {
		conn, err := spireserver.DialTCP(t.Context(), net.JoinHostPort(host, port))
		if err != nil {
			t.Errorf("%s: %v", host, err)
			continue
		}
		_ = conn.Close()
	}
	if _, err := spireserver.DialTCP(t.Context(), "127.0.0.1"); err == nil || !strings.Contains(err.Error(), "port") {
		t.Errorf("no port: %v", err)
	}
}

// Addresses at which nobody is, or nobody answers, keep no agent from those that
// follow; a server that moves to another address is found there.
func TestAddresses(t *testing.T) {
	for name, addresses := range map[string][]string{
		"refused": {"dead:1", "fake:1"},
		"silent":  {"silent:1", "fake:1"},
		"both":    {"silent:1", "dead:1", "silent:1", "fake:1"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				f := newFake()
				f.entries = wireEntries(1)
				f.up(t)
				cfg := f.config(t)
				cfg.Addresses = addresses
				c := run(t, cfg)
				// 250 ms for each silent one, for the attestation and again after it.
				wantReadyWithin(t, c, 1600*time.Millisecond)
				pass(time.Minute)
				f.down()
				pass(time.Minute)
				f.up(t)
				wantReadyWithin(t, c, 2500*time.Millisecond)
			})
		})
	}
}
