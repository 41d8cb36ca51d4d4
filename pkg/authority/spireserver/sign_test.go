package spireserver_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
)

func request(id string) authority.X509Request {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	must(err)
	return authority.X509Request{EntryID: id, SPIFFEID: spiffeid.RequireFromPath(td, "/"+id), CSR: csr}
}

// signAll asks for many at once; the result are the errors by entry.
func signAll(t *testing.T, c *spireserver.Client, n int) map[string]error {
	t.Helper()
	out := map[string]error{}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range n {
		req := request(fmt.Sprintf("e%03d", i))
		wg.Go(func() {
			issued, err := c.SignX509(t.Context(), req)
			if (issued == nil) == (err == nil) {
				t.Errorf("%s: neither or both of answer and error", req.EntryID)
			}
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				out[req.EntryID] = err
			}
		})
	}
	wg.Wait()
	return out
}

func TestBatches(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries = wireEntries(300)
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Second)
		if errs := signAll(t, c, 300); len(errs) != 0 {
			t.Fatal(errs)
		}
		if n := len(f.batches); n > 60 {
			t.Errorf("%d calls for 300 SVIDs", n)
		}
		f.edit(func() { f.fail["BatchNewX509SVID"] = status.Error(codes.ResourceExhausted, "too many") })
		for range 12 {
			for id, err := range signAll(t, c, 20) {
				if !errors.Is(err, authority.ErrTryLater) || errors.Is(err, authority.ErrRefused) {
					t.Fatalf("%s: %v", id, err)
				}
			}
		}
		f.edit(func() { delete(f.fail, "BatchNewX509SVID"); f.batches = nil })
		if errs := signAll(t, c, 100); len(errs) != 0 {
			t.Fatal(errs)
		}
		if f.batches[0] != 1 || slices.Max(f.batches) < 4 {
			t.Errorf("sizes after failures: %v", f.batches)
		}
	})
}

func TestItemsFailForThemselves(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries = wireEntries(8)
		f.sign = func(p *svidpb.NewX509SVIDParams) *svidpb.BatchNewX509SVIDResponse_Result {
			switch p.GetEntryId() {
			case "e001":
				return result(codes.Internal, "failed to sign X509-SVID")
			case "e002":
				return result(codes.InvalidArgument, "malformed CSR")
			case "e003":
				return &svidpb.BatchNewX509SVIDResponse_Result{} // no status
			case "e004":
				return result(codes.OK, "OK") // no SVID
			case "e005":
				out := result(codes.OK, "OK")
				out.Svid = &typespb.X509SVID{CertChain: [][]byte{[]byte("garbage")}}
				return out
			case "e006": // another root
				out := f.signLocked(p)
				key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
				must(err)
				out.Svid.CertChain = [][]byte{newRoot().issue(1, spiffeid.RequireFromPath(td, "/e006"), key.Public(), time.Hour)}
				return out
			case "e007": // another ID
				return f.signLocked(&svidpb.NewX509SVIDParams{EntryId: "e000", Csr: p.GetCsr()})
			}
			return f.signLocked(p)
		}
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Second)
		errs := signAll(t, c, 8)
		if errs["e000"] != nil {
			t.Errorf("e000: %v", errs["e000"])
		}
		for id, want := range map[string]error{
			"e001": authority.ErrTryLater, "e002": authority.ErrRefused, "e003": authority.ErrTryLater, "e004": authority.ErrTryLater,
			"e005": authority.ErrTryLater, "e006": authority.ErrTryLater, "e007": authority.ErrTryLater,
		} {
			if !errors.Is(errs[id], want) {
				t.Errorf("%s: %v, want %v", id, errs[id], want)
			}
		}
	})
}

// Not signed because not authorized: gone at once if the server does not list
// it any more, tried again if it does.
func TestNotAuthorized(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries = wireEntries(3)
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Second)
		f.edit(func() { f.entries = f.entries[:2] })
		if _, err := c.SignX509(t.Context(), request("e002")); !errors.Is(err, authority.ErrRefused) {
			t.Errorf("deleted entry: %v", err)
		}
		if got := now(t, c); got != "e000 e001" {
			t.Errorf("entries %q", got)
		}
		f.edit(func() { f.entries = f.entries[:1] })
		jwt := authority.JWTRequest{EntryID: "e001", SPIFFEID: spiffeid.RequireFromPath(td, "/e001"), Audience: []string{"a"}}
		if _, err := c.SignJWT(t.Context(), jwt); !errors.Is(err, authority.ErrRefused) {
			t.Errorf("deleted entry, JWT: %v", err)
		}
		if got := now(t, c); got != "e000" {
			t.Errorf("entries %q", got)
		}
		f.edit(func() {
			f.sign = func(*svidpb.NewX509SVIDParams) *svidpb.BatchNewX509SVIDResponse_Result {
				return result(codes.NotFound, "entry not found or not authorized")
			}
		})
		_, err := c.SignX509(t.Context(), request("e000"))
		if !errors.Is(err, authority.ErrTryLater) || errors.Is(err, authority.ErrRefused) {
			t.Errorf("a server that lags behind: %v", err)
		}
		if got := now(t, c); got != "e000" {
			t.Errorf("entries %q", got)
		}
	})
}

func TestMissingEntriesAreNotRenewed(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries = wireEntries(2)
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Second)
		f.edit(func() { f.entries = f.entries[:1] })
		pass(5500 * time.Millisecond)
		if _, err := c.SignX509(t.Context(), request("e001")); !errors.Is(err, authority.ErrTryLater) {
			t.Errorf("error %v", err)
		}
		if f.count("BatchNewX509SVID") != 0 {
			t.Error("the server was asked")
		}
	})
}

// A CA that rotates between bundle and signature.
func TestSVIDNeverPrecedesItsRoot(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries = wireEntries(1)
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Second)
		old := f.root
		f.edit(func() {
			f.root = newRoot()
			f.roots = append(f.roots, &typespb.X509Certificate{Asn1: f.root.cert.Raw})
			f.kid = "key-2"
		})
		if _, err := c.SignX509(t.Context(), request("e000")); err != nil {
			t.Fatal(err)
		}
		set, err := c.Bundles(t.Context(), 0)
		if err != nil || !set.Own.HasX509Authority(f.root.cert) || !set.Own.HasX509Authority(old.cert) {
			t.Errorf("the bundle lacks a root: %v", err)
		}
		f.edit(func() { f.kid = "key-3" })
		issued, err := c.SignJWT(t.Context(), authority.JWTRequest{EntryID: "e000", SPIFFEID: spiffeid.RequireFromPath(td, "/e000"), Audience: []string{"a"}})
		if err != nil || issued.Token == "" {
			t.Fatal(err)
		}
		if set, _ := c.Bundles(t.Context(), 0); !set.Own.HasJWTAuthority("key-3") {
			t.Error("the bundle lacks the JWT key")
		}
	})
}

func TestTaintsAndFederation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries = []*typespb.Entry{
			wireEntry("a", func(e *typespb.Entry) { e.FederatesWith = []string{"b.org", "c.org", "gone.org", "bad.org"} }),
			wireEntry("b", func(e *typespb.Entry) { e.FederatesWith = []string{"b.org", td.Name()} }),
		}
		for _, name := range []string{"b.org", "c.org"} {
			f.federated[name] = &typespb.Bundle{TrustDomain: name, X509Authorities: []*typespb.X509Certificate{{Asn1: newRoot().cert.Raw, Tainted: true}}}
		}
		f.federated["bad.org"] = &typespb.Bundle{TrustDomain: "other.org"}
		f.up(t)
		c := run(t, f.config(t))
		pass(time.Second)
		set, err := c.Bundles(t.Context(), 0)
		if err != nil || len(set.Federated) != 2 || len(set.TaintedX509) != 0 {
			t.Fatalf("%v %+v", err, set)
		}
		b, cc := spiffeid.RequireTrustDomainFromString("b.org"), spiffeid.RequireTrustDomainFromString("c.org")
		first := set
		pass(time.Minute)
		if set, _ = c.Bundles(t.Context(), 0); set != first {
			t.Error("a new set without a change")
		}
		f.edit(func() {
			f.fail["bundle of b.org"] = status.Error(codes.Internal, "no")
			f.federated["c.org"] = &typespb.Bundle{TrustDomain: "c.org", X509Authorities: []*typespb.X509Certificate{{Asn1: newRoot().cert.Raw}}}
			f.roots[0] = &typespb.X509Certificate{Asn1: f.roots[0].Asn1, Tainted: true}
		})
		pass(20 * time.Second)
		set, _ = c.Bundles(t.Context(), first.Version)
		if set.Federated[b] != first.Federated[b] || set.Federated[cc].Equal(first.Federated[cc]) {
			t.Error("the failing bundle did not stay, or the other did not change")
		}
		if !set.TaintedX509[hex.EncodeToString(f.root.cert.SubjectKeyId)] || !set.Own.HasX509Authority(f.root.cert) {
			t.Errorf("tainted: %v", set.TaintedX509)
		}
		// The agent's own SVID hangs on it; a join token's agent renews.
		if f.count("RenewAgent") == 0 || c.Ready() != nil {
			t.Errorf("renewed %d times: %v", f.count("RenewAgent"), c.Ready())
		}
		f.edit(func() { delete(f.federated, "c.org"); f.entries = f.entries[1:] })
		pass(40 * time.Second)
		if set, _ = c.Bundles(t.Context(), 0); len(set.Federated) != 1 {
			t.Errorf("federated: %v", set.Federated)
		}
	})
}

func TestNotReady(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		c := run(t, f.config(t))
		if _, err := c.SignX509(t.Context(), request("a")); !errors.Is(err, authority.ErrNotReady) {
			t.Errorf("not attested: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.Entries(ctx, 0); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("entries: %v", err)
		}
		if c.Ready() == nil {
			t.Error("ready")
		}
		_ = c.Close()
		if _, err := c.SignX509(t.Context(), request("a")); !errors.Is(err, authority.ErrNotReady) {
			t.Errorf("closed: %v", err)
		}
	})
}
