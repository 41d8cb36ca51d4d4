package adminapi_test

import (
	"context"
	"encoding/binary"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
)

var here = netip.MustParseAddr("192.0.2.1")

func TestCallersWaitTheirTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := adminapi.NewLimiter(1)
		start := time.Now()
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if err := l.Wait(t.Context(), here, 1); err != nil {
					t.Error(err)
				}
			})
		}
		// Somebody else does not wait for them.
		if err := l.Wait(t.Context(), netip.MustParseAddr("192.0.2.2"), 1); err != nil || time.Since(start) != 0 {
			t.Error(err, time.Since(start))
		}
		wg.Wait()
		if took := time.Since(start); took != 2*time.Second {
			t.Errorf("three took %s", took)
		}
	})
}

func TestWaitingThatCannotEndIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := adminapi.NewLimiter(2)
		want{int32(codes.ResourceExhausted), "rejecting request: rate (3) exceeds burst size (2)"}.checkError(t, l.Wait(t.Context(), here, 3))
		if err := l.Wait(t.Context(), here, 2); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		start := time.Now()
		if err := l.Wait(ctx, here, 2); status.Code(err) != codes.ResourceExhausted || time.Since(start) != 0 {
			t.Errorf("%v after %s", err, time.Since(start))
		}
		// Who gives up gives its turn back.
		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(100*time.Millisecond, cancel)
		if err := l.Wait(ctx, here, 2); status.Code(err) != codes.ResourceExhausted {
			t.Error(err)
		}
		// A queue longer than a minute is none to stand in.
		var refused int
		var mu sync.Mutex
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() {
				if err := l.Wait(t.Context(), here, 1); err != nil {
					mu.Lock()
					refused++
					mu.Unlock()
				}
			})
		}
		wg.Wait()
		if refused < 70 || refused > 80 {
			t.Errorf("%d of 200 refused", refused)
		}
	})
}

// However many addresses call, memory is bounded; those of one IPv6 network are
// one caller, and the socket is nobody's address.
func TestCallersAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := adminapi.NewLimiter(100)
		for i := range uint32(100_000) {
			if err := l.Wait(t.Context(), netip.AddrFrom4([4]byte(binary.BigEndian.AppendUint32(nil, i))), 1); err != nil {
				break // the bucket of those beyond is empty
			}
		}
		if n := l.Buckets(); n > 8192 {
			t.Errorf("%d buckets", n)
		}
		time.Sleep(5 * time.Minute)
		for i := range uint32(20) {
			if err := l.Wait(t.Context(), netip.AddrFrom16([16]byte(append([]byte{0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0}, binary.BigEndian.AppendUint32(nil, i)...))), 1); err != nil {
				t.Fatal(err)
			}
		}
		if n := l.Buckets(); n != 1 {
			t.Errorf("%d buckets after a pause", n)
		}
		for range 1000 {
			if err := l.Wait(t.Context(), netip.Addr{}, 1000); err != nil {
				t.Fatal(err)
			}
		}
	})
}

func TestAttestationIsLimited(t *testing.T) {
	s := serve(t, func(s *settings) { s.nodes.NoAttestationLimit = false })
	start := time.Now()
	for _, node := range []string{"n1", "n2", "n3"} {
		if _, _, err := s.attestWith(t, "knock", node); err != nil {
			t.Fatal(err)
		}
	}
	if took := time.Since(start); took < 1900*time.Millisecond {
		t.Errorf("three took %s", took)
	}
}
