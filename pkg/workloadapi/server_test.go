package workloadapi_test

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	spiffeapi "github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
	"github.com/spiffe-node/spiffe-node/pkg/workloadapi"
)

// world is a small cast.
type world struct {
	own, other *ca
	ownB       *spiffebundle.Bundle
	otherB     *spiffebundle.Bundle
	web, db    *svid.Identity
}

func newWorld(tb testing.TB) *world {
	tb.Helper()
	w := &world{own: newCA(tb, "example.org"), other: newCA(tb, "another.test")}
	w.ownB, w.otherB = w.own.bundle(), w.other.bundle()
	w.web = w.own.identity(tb, "e-web", "/web", "internal", time.Hour)
	w.db = w.own.identity(tb, "e-db", "/db", "", time.Hour)
	return w
}

func (w *world) has(list ...*svid.Identity) *svid.Update {
	return &svid.Update{Identities: list, Synced: true, Own: w.ownB}
}

func (w *world) federated(u *svid.Update) *svid.Update {
	out := *u
	out.Federated = map[spiffeid.TrustDomain]*spiffebundle.Bundle{w.other.td: w.otherB}
	return &out
}

func late(u *svid.Update, list ...*svid.Identity) *svid.Update {
	out := *u
	for _, ident := range list {
		out.Late = append(out.Late, ident.Entry)
	}
	return &out
}

// What go-spiffe makes of a node: X.509 context, bundles, rotation.
func TestX509WithGoSPIFFE(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.federated(w.has(w.web, w.db)))
	n := serve(t, l, nil)
	c := n.client(t)
	got, err := c.FetchX509Context(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(got.SVIDs) != 2 || got.DefaultSVID().ID != w.web.SVID.ID || got.DefaultSVID().Hint != "internal" || got.SVIDs[1].ID != w.db.SVID.ID {
		t.Errorf("SVIDs %+v", got.SVIDs)
	}
	if _, _, err := x509svid.Verify(got.DefaultSVID().Certificates, got.Bundles); err != nil {
		t.Errorf("SVID against bundles: %v", err)
	}
	if b, err := got.Bundles.GetX509BundleForTrustDomain(w.other.td); err != nil || !b.Equal(w.otherB.X509Bundle()) {
		t.Errorf("federated bundle %v, %v", b, err)
	}
	bundles, err := c.FetchX509Bundles(t.Context())
	if err != nil || bundles.Len() != 2 {
		t.Errorf("bundles %v, %v", bundles, err)
	}

	source, err := spiffeapi.NewX509Source(t.Context(), spiffeapi.WithClient(c))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	renewed := w.own.identity(t, "e-web", "/web", "internal", time.Hour)
	l.set(w.has(renewed))
	eventually(t, "renewed", func() bool {
		s, err := source.GetX509SVID()
		return err == nil && s.Certificates[0].SerialNumber.String() == renewed.SVID.Serial
	})
	eventually(t, "status", func() bool {
		st := n.server.Streams()
		return len(st) == 1 && st[0].Method == "FetchX509SVID" && st[0].Responses == 2 && cmp.Equal(st[0].Serials, []string{renewed.SVID.Serial})
	})
}

func TestJWTWithGoSPIFFE(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.federated(late(w.has(w.web), w.db))) // no X.509-SVID is no reason for no token
	l.jwt = func(e *entry.Entry, audience []string) (string, error) {
		if e == w.db.Entry && audience[0] == "half" {
			return "", errors.New("signer away")
		}
		return w.own.token(t, map[string]any{"sub": e.SPIFFEID.String(), "aud": audience, "exp": time.Now().Add(time.Minute).Unix(), "extra": 1.5}), nil
	}
	n := serve(t, l, nil)
	c := n.client(t)
	svids, err := c.FetchJWTSVIDs(t.Context(), jwtsvid.Params{Audience: "a", ExtraAudiences: []string{"b"}})
	if err != nil || len(svids) != 2 || svids[0].ID != w.web.SVID.ID || svids[0].Hint != "internal" {
		t.Fatalf("SVIDs %v, %v", svids, err)
	}
	if diff := cmp.Diff([]string{"a", "b"}, svids[0].Audience); diff != "" {
		t.Errorf("audience (-want +got):\n%s", diff)
	}
	one, err := c.FetchJWTSVIDs(t.Context(), jwtsvid.Params{Audience: "a", Subject: w.db.SVID.ID})
	if err != nil || len(one) != 1 || one[0].ID != w.db.SVID.ID {
		t.Errorf("by subject: %v, %v", one, err)
	}
	half, err := c.FetchJWTSVIDs(t.Context(), jwtsvid.Params{Audience: "half"})
	if err != nil || len(half) != 1 {
		t.Errorf("one entry failing: %v, %v", half, err)
	}
	valid, err := c.ValidateJWTSVID(t.Context(), svids[0].Marshal(), "b")
	if err != nil || valid.ID != w.web.SVID.ID || valid.Claims["extra"] != 1.5 {
		t.Errorf("validate: %+v, %v", valid, err)
	}
	bundles, err := c.FetchJWTBundles(t.Context())
	if err != nil || bundles.Len() != 2 {
		t.Fatalf("bundles %v, %v", bundles, err)
	}
	if b, _ := bundles.GetJWTBundleForTrustDomain(w.own.td); !b.Equal(w.ownB.JWTBundle()) {
		t.Errorf("own JWT bundle %v", b)
	}
	source, err := spiffeapi.NewJWTSource(t.Context(), spiffeapi.WithClient(c))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	if s, err := source.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "x"}); err != nil {
		t.Error(err)
	} else if _, err := jwtsvid.ParseAndValidate(s.Marshal(), source, []string{"x"}); err != nil {
		t.Error(err)
	}
}

// calls makes each call once and returns its error.
func (n *node) calls() map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"FetchX509SVID": func(ctx context.Context) error {
			s, err := n.raw.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			return err
		},
		"FetchX509Bundles": func(ctx context.Context) error {
			s, err := n.raw.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			return err
		},
		"FetchJWTBundles": func(ctx context.Context) error {
			s, err := n.raw.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			return err
		},
		"FetchJWTSVID": func(ctx context.Context) error {
			_, err := n.raw.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"a"}})
			return err
		},
		"ValidateJWTSVID": func(ctx context.Context) error {
			_, err := n.raw.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: "x"})
			return err
		},
	}
}

func TestSecurityHeader(t *testing.T) {
	w := newWorld(t)
	n := serve(t, newLayer(w.has(w.web)), nil)
	for name, md := range map[string]metadata.MD{
		"none": {}, "false": metadata.Pairs("workload.spiffe.io", "false"), "empty": metadata.Pairs("workload.spiffe.io", ""),
		"True": metadata.Pairs("workload.spiffe.io", "True"), "twice": metadata.Pairs("workload.spiffe.io", "true", "workload.spiffe.io", "true"),
	} {
		for method, call := range n.calls() {
			err := call(metadata.NewOutgoingContext(t.Context(), md))
			if st := status.Convert(err); st.Code() != codes.InvalidArgument || st.Message() != "security header missing from request" {
				t.Errorf("%s with header %s: %v", method, name, err)
			}
		}
	}
}

func TestWITIsUnimplemented(t *testing.T) {
	n := serve(t, newLayer(&svid.Update{}), nil)
	s, err := n.raw.FetchWITSVID(withHeader(t.Context()), &workload.WITSVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); status.Code(err) != codes.Unimplemented {
		t.Error(err)
	}
}

// Late callers are held, then get the specification's code; other refusals
// have other words.
func TestRefusals(t *testing.T) {
	w := newWorld(t)
	tests := []struct {
		name string
		set  func(*layer)
		want codes.Code
		text string
	}{
		{"late", func(*layer) {}, codes.PermissionDenied, "no identity issued"},
		{"not synced", func(l *layer) { l.update = &svid.Update{} }, codes.Unavailable, "late"},
		{"no picture", func(l *layer) { l.update = nil }, codes.Unavailable, "late"},
		{"denied", func(l *layer) { l.refuse = fmt.Errorf("inner detail: %w", attest.ErrDenied) }, codes.PermissionDenied, "denied"},
		{"over limit", func(l *layer) { l.full = svid.ErrOverLimit }, codes.ResourceExhausted, "over limit"},
		{"passing", func(l *layer) { l.refuse = errors.New("inner detail") }, codes.Unavailable, "try again"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLayer(w.has())
			tt.set(l)
			n := serve(t, l, nil)
			for method, call := range n.calls() {
				st := status.Convert(call(withHeader(t.Context())))
				if st.Code() != tt.want || !strings.Contains(st.Message(), tt.text) || strings.Contains(st.Message(), "inner detail") {
					t.Errorf("%s: %v", method, st)
				}
			}
			eventually(t, "nothing left", func() bool { subs, parked := l.counts(); return subs+parked == 0 && len(n.server.Streams()) == 0 })
		})
	}
}

func TestLateCallerIsServed(t *testing.T) {
	w := newWorld(t)
	for _, method := range []string{"FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles", "FetchJWTSVID"} {
		t.Run(method, func(t *testing.T) {
			l := newLayer(w.has())
			l.jwt = func(*entry.Entry, []string) (string, error) { return "token", nil }
			n := serve(t, l, func(c *workloadapi.Config) { c.FetchWait = time.Minute })
			go func() {
				for {
					if _, parked := l.counts(); parked == 1 {
						l.set(w.has(w.web))
						return
					}
					time.Sleep(time.Millisecond)
				}
			}()
			if err := n.calls()[method](withHeader(t.Context())); err != nil {
				t.Error(err)
			}
		})
	}
}

// The client hears from us before its own deadline.
func TestNeverHeldPastTheDeadline(t *testing.T) {
	w := newWorld(t)
	n := serve(t, newLayer(w.has()), func(c *workloadapi.Config) { c.FetchWait = time.Minute })
	ctx, cancel := context.WithTimeout(withHeader(t.Context()), 400*time.Millisecond)
	defer cancel()
	if err := n.calls()["FetchX509SVID"](ctx); status.Code(err) != codes.PermissionDenied {
		t.Error(err)
	}
}

// A stream is sent what is new, is kept while its identity is late, and ends
// when the last one is withdrawn.
func TestStreamsSayWhatIsNew(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.has(w.web))
	n := serve(t, l, nil)
	s, err := n.raw.FetchX509SVID(withHeader(t.Context()), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	recv := func() *workload.X509SVIDResponse {
		t.Helper()
		r, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	recv()
	same := *w.web.SVID
	l.set(w.has(&svid.Identity{Entry: w.web.Entry, SVID: &same})) // equal content
	l.set(late(w.has(), w.web))                                   // being renewed
	time.Sleep(100 * time.Millisecond)                            // longer than FetchWait
	l.set(w.has(w.web, w.db))
	if r := recv(); len(r.GetSvids()) != 2 {
		t.Errorf("%d SVIDs", len(r.GetSvids()))
	}
	l.set(w.has(w.db))
	if r := recv(); len(r.GetSvids()) != 1 {
		t.Errorf("%d SVIDs", len(r.GetSvids()))
	}
	l.set(w.has())
	if _, err := s.Recv(); status.Code(err) != codes.PermissionDenied {
		t.Errorf("withdrawn: %v", err)
	}
}

func TestHints(t *testing.T) {
	w := newWorld(t)
	young := w.own.identity(t, "e-0", "/young", "internal", time.Minute)
	twinA := w.own.identity(t, "e-a", "/a", "x", 0)
	twinB := w.own.identity(t, "e-b", "/b", "x", 0)
	twinB.Entry.CreatedAt = twinA.Entry.CreatedAt
	l := newLayer(w.has(young, w.web, twinB, twinA, w.db))
	l.jwt = func(e *entry.Entry, _ []string) (string, error) {
		return w.own.token(t, map[string]any{"sub": e.SPIFFEID.String(), "aud": "a", "exp": time.Now().Add(time.Minute).Unix()}), nil
	}
	n := serve(t, l, nil)
	got, err := n.client(t).FetchX509Context(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, s := range got.SVIDs {
		paths = append(paths, s.ID.Path())
	}
	if diff := cmp.Diff([]string{"/web", "/a", "/db"}, paths); diff != "" {
		t.Errorf("X.509-SVIDs (-want +got):\n%s", diff)
	}
	tokens, err := n.client(t).FetchJWTSVIDs(t.Context(), jwtsvid.Params{Audience: "a"})
	if err != nil || len(tokens) != 3 {
		t.Errorf("tokens %v, %v", tokens, err)
	}
	one, err := n.client(t).FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "a", Subject: young.SVID.ID})
	if err != nil || one.ID != young.SVID.ID {
		t.Errorf("by subject: %v, %v", one, err)
	}
}

func TestUnauthenticatedVerifiers(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.federated(w.has()))
	n := serve(t, l, func(c *workloadapi.Config) { c.AllowUnauthenticatedVerifiers = true })
	c := n.client(t)
	x, err := c.FetchX509Bundles(t.Context())
	if err != nil || x.Len() != 1 || !x.Has(w.own.td) {
		t.Errorf("X.509 bundles %v, %v", x, err)
	}
	j, err := c.FetchJWTBundles(t.Context())
	if err != nil || j.Len() != 1 || !j.Has(w.own.td) {
		t.Errorf("JWT bundles %v, %v", j, err)
	}
	token := w.own.token(t, map[string]any{"sub": "spiffe://example.org/x", "aud": "a", "exp": time.Now().Add(time.Minute).Unix()})
	if _, err := c.ValidateJWTSVID(t.Context(), token, "a"); err != nil {
		t.Error(err)
	}
	foreign := w.other.token(t, map[string]any{"sub": "spiffe://another.test/x", "aud": "a", "exp": time.Now().Add(time.Minute).Unix()})
	if _, err := c.ValidateJWTSVID(t.Context(), foreign, "a"); status.Code(err) != codes.InvalidArgument {
		t.Errorf("foreign token: %v", err)
	}
	if err := n.calls()["FetchX509SVID"](withHeader(t.Context())); status.Code(err) != codes.PermissionDenied {
		t.Errorf("SVID: %v", err)
	}
}

func TestFetchJWTSVIDRequests(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.has(w.web))
	n := serve(t, l, nil)
	ctx := withHeader(t.Context())
	for name, tt := range map[string]struct {
		req  *workload.JWTSVIDRequest
		jwt  error
		want codes.Code
	}{
		"no audience":       {&workload.JWTSVIDRequest{}, nil, codes.InvalidArgument},
		"empty audience":    {&workload.JWTSVIDRequest{Audience: []string{"a", ""}}, nil, codes.InvalidArgument},
		"many audiences":    {&workload.JWTSVIDRequest{Audience: strings.Split(strings.Repeat("a ", 200)+"a", " ")}, nil, codes.InvalidArgument},
		"long audience":     {&workload.JWTSVIDRequest{Audience: []string{strings.Repeat("a", 20000)}}, nil, codes.InvalidArgument},
		"bad id":            {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "http://x"}, nil, codes.InvalidArgument},
		"not theirs":        {&workload.JWTSVIDRequest{Audience: []string{"a"}, SpiffeId: "spiffe://example.org/db"}, nil, codes.PermissionDenied},
		"authority away":    {&workload.JWTSVIDRequest{Audience: []string{"a"}}, authority.ErrTryLater, codes.Unavailable},
		"withdrawn since":   {&workload.JWTSVIDRequest{Audience: []string{"a"}}, fmt.Errorf("x: %w", svid.ErrNotMatched), codes.PermissionDenied},
		"authority refuses": {&workload.JWTSVIDRequest{Audience: []string{"a"}}, fmt.Errorf("x: %w", authority.ErrRefused), codes.PermissionDenied},
	} {
		l.jwt = func(*entry.Entry, []string) (string, error) { return "", tt.jwt }
		if _, err := n.raw.FetchJWTSVID(ctx, tt.req); status.Code(err) != tt.want {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestValidateJWTSVID(t *testing.T) {
	w := newWorld(t)
	n := serve(t, newLayer(w.federated(w.has(w.web))), func(c *workloadapi.Config) { c.AllowedForeignJWTClaims = []string{"email"} })
	ctx := withHeader(t.Context())
	soon := time.Now().Add(time.Minute).Unix()
	own := func(sub string, aud any, exp any) string {
		claims := map[string]any{"sub": sub, "aud": aud, "x": []any{true, nil, "y"}}
		if exp != nil {
			claims["exp"] = exp
		}
		return w.own.token(t, claims)
	}
	id := "spiffe://example.org/x"
	for name, tt := range map[string]struct {
		audience, token string
	}{
		"no audience":     {"", own(id, "a", soon)},
		"no token":        {"a", ""},
		"rubbish":         {"a", "x.y.z"},
		"other audience":  {"b", own(id, "a", soon)},
		"no exp":          {"a", own(id, "a", nil)},
		"expired":         {"a", own(id, "a", time.Now().Add(-time.Hour).Unix())},
		"no spiffe id":    {"a", own("joe", "a", soon)},
		"foreign subject": {"a", own("spiffe://another.test/x", "a", soon)},
		"unknown domain":  {"a", own("spiffe://third.test/x", "a", soon)},
		"endless token":   {"a", strings.Repeat("x", 1<<17)},
	} {
		if _, err := n.raw.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: tt.audience, Svid: tt.token}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
	}
	r, err := n.raw.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: own(id, "a", soon)})
	if err != nil {
		t.Fatal(err)
	}
	if r.GetSpiffeId() != id || !cmp.Equal(r.GetClaims().AsMap()["aud"], []any{"a"}) || !cmp.Equal(r.GetClaims().AsMap()["x"], []any{true, nil, "y"}) {
		t.Errorf("own token: %v", r)
	}
	foreign := w.other.token(t, map[string]any{"sub": "spiffe://another.test/x", "aud": []string{"a", "c"}, "exp": soon, "email": "e", "admin": true})
	r, err = n.raw.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "a", Svid: foreign})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]any{"sub": "spiffe://another.test/x", "aud": []any{"a", "c"}, "exp": float64(soon), "email": "e"}
	if diff := cmp.Diff(want, r.GetClaims().AsMap()); diff != "" {
		t.Errorf("foreign claims (-want +got):\n%s", diff)
	}
}

func TestPanicsAreContained(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.has(&svid.Identity{})) // a bug below
	n := serve(t, l, nil)
	for method, call := range n.calls() {
		if method == "ValidateJWTSVID" || strings.HasSuffix(method, "Bundles") {
			continue // these do not look at identities
		}
		if err := call(withHeader(t.Context())); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v", method, err)
		}
	}
	l.set(w.has(w.web))
	if err := n.calls()["FetchX509SVID"](withHeader(t.Context())); err != nil {
		t.Error(err)
	}
	if subs, parked := l.counts(); parked != 0 {
		t.Errorf("%d subscriptions, %d parked", subs, parked)
	}
}

// A node that has entries but no bundle yet is late, not empty.
func TestWithoutOwnBundle(t *testing.T) {
	w := newWorld(t)
	l := newLayer(&svid.Update{Synced: true, Identities: []*svid.Identity{w.web}})
	n := serve(t, l, nil)
	for _, method := range []string{"FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles", "ValidateJWTSVID"} {
		if err := n.calls()[method](withHeader(t.Context())); status.Code(err) != codes.Unavailable {
			t.Errorf("%s: %v", method, err)
		}
	}
}

// Responses are shared between the callers that share a picture, and go with it.
func TestViewsDieWithThePicture(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.has(w.web))
	n := serve(t, l, nil)
	for range 3 {
		if err := n.calls()["FetchX509SVID"](withHeader(t.Context())); err != nil {
			t.Fatal(err)
		}
	}
	if n := n.server.Views(); n != 1 {
		t.Errorf("%d views of one picture", n)
	}
	l.set(w.has(w.db))
	if err := n.calls()["FetchX509SVID"](withHeader(t.Context())); err != nil {
		t.Fatal(err)
	}
	eventually(t, "old view forgotten", func() bool { runtime.GC(); return n.server.Views() == 1 })
}

// A client that does not read blocks its own stream only.
func TestSlowClient(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.has(w.web))
	n := serve(t, l, nil)
	slow, err := n.raw.FetchX509SVID(withHeader(t.Context()), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	good, err := n.raw.FetchX509SVID(withHeader(t.Context()), &workload.X509SVIDRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 300 {
		if _, err := good.Recv(); err != nil {
			t.Fatal(err)
		}
		l.set(w.has([]*svid.Identity{w.db, w.web}[i%2]))
	}
	if _, err := slow.Recv(); err != nil {
		t.Error(err)
	}
}

func TestConfig(t *testing.T) {
	l := newLayer(nil)
	if _, err := workloadapi.New(workloadapi.Config{JWT: l.issue}); err == nil {
		t.Error("no Subscribe accepted")
	}
	if _, err := workloadapi.New(workloadapi.Config{Subscribe: l.subscribe}); err == nil {
		t.Error("no JWT accepted")
	}
	reg := prometheus.NewRegistry()
	workloadapi.NewMetrics(reg)
	if _, err := reg.Gather(); err != nil {
		t.Error(err)
	}
}
