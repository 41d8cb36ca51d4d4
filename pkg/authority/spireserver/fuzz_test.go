package spireserver_test

import (
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/proto"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/internal/watchpb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
)

func encoded(tb testing.TB, m proto.Message) []byte {
	tb.Helper()
	data, err := proto.Marshal(m)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

// FuzzBundle: whatever a server sends as a bundle is a usable one or an error.
func FuzzBundle(f *testing.F) {
	fake := newFake()
	f.Add(encoded(f, fake.bundleLocked()))
	f.Add(encoded(f, &typespb.Bundle{TrustDomain: td.Name(), RefreshHint: 1 << 62, X509Authorities: []*typespb.X509Certificate{nil, {}}}))
	f.Add(encoded(f, &typespb.Bundle{TrustDomain: td.Name(), JwtAuthorities: []*typespb.JWTKey{nil, {KeyId: "a"}}}))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, data []byte) {
		var in typespb.Bundle
		if proto.Unmarshal(data, &in) != nil {
			return
		}
		b, err := spireserver.BundleFromWire(td, &in)
		if (b == nil) == (err == nil) {
			t.Fatal("neither or both of bundle and error")
		}
		if b != nil && b.TrustDomain() != td {
			t.Errorf("bundle of %s", b.TrustDomain())
		}
	})
}

// FuzzEntries: whatever a server lists, the set holds entries of the trust
// domain only, and the same answer again changes nothing.
func FuzzEntries(f *testing.F) {
	f.Add(encoded(f, &entrypb.GetAuthorizedEntriesResponse{Entries: wireEntries(3)}))
	f.Add(encoded(f, &entrypb.GetAuthorizedEntriesResponse{Entries: []*typespb.Entry{
		{Id: "a"},
		{},
		wireEntry("b", func(e *typespb.Entry) { e.Selectors = []*typespb.Selector{nil, {}} }),
		wireEntry("c", func(e *typespb.Entry) { e.ExpiresAt, e.CreatedAt, e.RevisionNumber = 1<<62, -1<<62, -1 }),
	}}))
	f.Fuzz(func(t *testing.T, data []byte) {
		var in entrypb.GetAuthorizedEntriesResponse
		if proto.Unmarshal(data, &in) != nil {
			return
		}
		once, twice := spireserver.Listed(t, td, in.GetEntries())
		if once != twice {
			t.Error("the same answer made another set")
		}
		for e := range once.All() {
			if e.ID == "" || !e.SPIFFEID.MemberOf(td) || e.Selectors.Len() == 0 {
				t.Errorf("%+v", e)
			}
		}
	})
}

// FuzzWatchEvent: whatever is pushed ends no process.
func FuzzWatchEvent(f *testing.F) {
	fake := newFake()
	f.Add(encoded(f, &watchpb.WatchEvent{Reset_: true, Version: "1", Entries: wireEntries(2), Bundle: fake.bundleLocked()}))
	f.Add(encoded(f, &watchpb.WatchEvent{Version: "2", RemovedEntries: []string{"", "e000"}, RemovedBundles: []string{"", "x"}}))
	f.Fuzz(func(t *testing.T, data []byte) {
		var in watchpb.WatchEvent
		if proto.Unmarshal(data, &in) == nil {
			spireserver.Pushed(t, td, &in)
		}
	})
}

// FuzzState: a file that was tampered with is set aside, never half used.
func FuzzState(f *testing.F) {
	f.Add([]byte("spiffe-node agent 1 e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855\n"))
	f.Add([]byte(`{"trust_domain":"example.org","chain":[],"key":"","entries":["AA=="]}`))
	fake := newFake()
	dir := filepath.Join(f.TempDir(), "state")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "agent.state"), spireserver.Summed(data), 0o600); err != nil {
			t.Fatal(err)
		}
		cfg := fake.config(t)
		cfg.StateDir = dir
		c, err := spireserver.New(cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if !c.Status().AgentID.IsZero() {
			t.Error("used")
		}
	})
}

func FuzzParseBundle(f *testing.F) {
	f.Add([]byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), "pem")
	f.Add([]byte(`{"keys":[]}`), "spiffe")
	f.Fuzz(func(t *testing.T, data []byte, format string) {
		b, err := spireserver.ParseBundle(td, data, format)
		if (b == nil) == (err == nil) || b != nil && b.Empty() {
			t.Error("neither or both of bundle and error, or an empty bundle")
		}
	})
}
