package latest_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/spiffe-node/spiffe-node/internal/latest"
)

func TestWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := latest.New(0)
		got := make(chan int, 1)
		go func() {
			n, err := v.Wait(t.Context(), nil, func(n int) bool { return n >= 3 })
			if err != nil {
				t.Error(err)
			}
			got <- n
		}()
		for i := range 3 {
			v.Set(i)
			synctest.Wait()
			if len(got) > 0 {
				t.Fatalf("woken by %d", i)
			}
		}
		v.Set(7)
		if n := <-got; n != 7 || v.Get() != 7 {
			t.Errorf("got %d", n)
		}
		if n, err := v.Wait(t.Context(), nil, func(int) bool { return true }); n != 7 || err != nil {
			t.Errorf("what is there already: %d %v", n, err)
		}
	})
}

func TestWaitEnds(t *testing.T) {
	v := latest.New("")
	never := func(string) bool { return false }
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := v.Wait(ctx, nil, never); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	done := make(chan struct{})
	close(done)
	if _, err := v.Wait(t.Context(), done, never); !errors.Is(err, latest.ErrEnded) {
		t.Errorf("got %v", err)
	}
}

func TestLook(t *testing.T) {
	v := latest.New(1)
	n, replaced := v.Look()
	select {
	case <-replaced:
		t.Error("replaced by nothing")
	default:
	}
	v.Set(n + 1)
	<-replaced
	if v.Get() != 2 {
		t.Errorf("got %d", v.Get())
	}
}

func TestNobodyIsForgotten(t *testing.T) {
	v := latest.New(0)
	var readers sync.WaitGroup
	for range 20 {
		readers.Go(func() {
			for n := range 100 {
				if _, err := v.Wait(t.Context(), nil, func(got int) bool { return got > n }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for n := range 100 {
		v.Set(n + 1)
	}
	readers.Wait()
}
