package attest_test

import (
	"context"
	"os"
	"testing"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// BenchmarkBind binds a real process by its real cgroup file.
func BenchmarkBind(b *testing.B) {
	for _, mode := range []attest.Mode{attest.ModeUnix, attest.ModeKubernetes, attest.ModeBoth} {
		b.Run(string(mode), func(b *testing.B) {
			a, err := attest.New(attest.Config{Mode: mode})
			if err != nil {
				b.Fatal(err)
			}
			c := attest.Caller{PID: int32(os.Getpid()), Process: alive{}}
			b.ReportAllocs()
			for b.Loop() {
				bound, err := a.Bind(context.Background(), c)
				if err != nil {
					b.Fatal(err)
				}
				bound.Selectors()
				bound.Close()
			}
		})
	}
	b.Run("path and sha256", func(b *testing.B) {
		a, err := attest.New(attest.Config{Mode: attest.ModeUnix, Unix: attest.UnixConfig{DiscoverPath: true}})
		if err != nil {
			b.Fatal(err)
		}
		c := attest.Caller{PID: int32(os.Getpid()), Process: alive{}}
		b.ReportAllocs()
		for b.Loop() {
			bound, err := a.Bind(context.Background(), c)
			if err != nil {
				b.Fatal(err)
			}
			bound.Selectors()
			bound.Close()
		}
	})
	b.Run("pod", func(b *testing.B) {
		s := &source{}
		s.set(uidA, web())
		a := newPods(b, s, nil)
		c := attest.Caller{PID: 10, Process: alive{}}
		b.ReportAllocs()
		for b.Loop() {
			bound, err := a.Bind(context.Background(), c)
			if err != nil {
				b.Fatal(err)
			}
			bound.Selectors()
			bound.Close()
		}
	})
}

func BenchmarkSelectors(b *testing.B) {
	s := &source{}
	s.set(uidA, web())
	bound := bindPID(b, newPods(b, s, nil), 10)
	b.Run("unchanged", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			bound.Selectors()
		}
	})
	b.Run("changed", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			s.set(uidA, web())
			bound.Selectors()
		}
	})
}
