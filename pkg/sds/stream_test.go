package sds_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/sds"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// world is a small cast for the protocol's tests.
type world struct {
	own, other *ca
	ownBundle  *spiffebundle.Bundle
	otherB     *spiffebundle.Bundle
	web, db    *svid.Identity
	web2       *svid.Identity // web, renewed
}

func newWorld(tb testing.TB) *world {
	tb.Helper()
	w := &world{own: newCA(tb, "example.org"), other: newCA(tb, "another.test")}
	w.ownBundle, w.otherB = w.own.bundle(), w.other.bundle()
	w.web, w.db = w.own.identity(tb, "e-web", "/web"), w.own.identity(tb, "e-db", "/db")
	w.web2 = w.own.identity(tb, "e-web", "/web")
	return w
}

// has is a picture with these identities.
func (w *world) has(list ...*svid.Identity) *svid.Update {
	return &svid.Update{Identities: list, Synced: true, Own: w.ownBundle}
}

// late adds entries without an SVID.
func late(u *svid.Update, list ...*svid.Identity) *svid.Update {
	out := *u
	for _, ident := range list {
		out.Late = append(out.Late, ident.Entry)
	}
	return &out
}

func (w *world) federated(u *svid.Update) *svid.Update {
	out := *u
	out.Federated = map[spiffeid.TrustDomain]*spiffebundle.Bundle{w.other.td: w.otherB}
	return &out
}

// step is one event and what it must lead to.
type step struct {
	ask   *discoveryv3.DiscoveryRequest // nil = the picture changes
	see   *svid.Update
	sends string // names of the resources sent; "" = nothing
	cause string
	check string // verdict
	late  string
	fails error
}

func ask(names ...string) *discoveryv3.DiscoveryRequest {
	return &discoveryv3.DiscoveryRequest{ResourceNames: names, TypeUrl: sds.TypeURL}
}

const last = "last" // stands for the last nonce or version

func ack(names ...string) *discoveryv3.DiscoveryRequest {
	q := ask(names...)
	q.ResponseNonce, q.VersionInfo = last, last
	return q
}

func nack(names ...string) *discoveryv3.DiscoveryRequest {
	q := ask(names...)
	q.ResponseNonce, q.ErrorDetail = last, &rpcstatus.Status{Code: 13, Message: "bad certificate"}
	return q
}

func nonce(q *discoveryv3.DiscoveryRequest, nonce, version string) *discoveryv3.DiscoveryRequest {
	q.ResponseNonce, q.VersionInfo = nonce, version
	return q
}

func secretNames(tb testing.TB, r *discoveryv3.DiscoveryResponse) string {
	tb.Helper()
	var out []string
	for _, a := range r.GetResources() {
		var s tlsv3.Secret
		if err := a.UnmarshalTo(&s); err != nil {
			tb.Fatal(err)
		}
		out = append(out, s.GetName())
	}
	return strings.Join(out, " ")
}

func TestStreamOfEvents(t *testing.T) {
	w := newWorld(t)
	none := w.has()
	unsynced := &svid.Update{}
	web, both := w.has(w.web), w.has(w.web, w.db)
	ren := w.has(w.web2)
	tests := map[string][]step{
		"known is answered at once, an ACK never": {
			{ask: ask("default"), see: web, sends: "default", cause: "first", check: "none"},
			{ask: ack("default"), see: web, check: "ack"},
			{see: web},
		},
		"late stays open and is served when it exists": {
			{ask: ask("default"), see: none, late: "default"},
			{see: none, late: "default"},
			{see: late(none, w.web), late: "default"},
			{see: web, sends: "default", cause: "first"},
		},
		"a reconnecting client is answered in full": {
			{ask: nonce(ask("default"), "17", "abc"), see: web, sends: "default", cause: "first", check: "none"},
		},
		"bundle names are answered while the identity is late": {
			{ask: ask("default", "ROOTCA"), see: none, sends: "ROOTCA", cause: "first", late: "default"},
			{ask: ack("default", "ROOTCA"), see: none, check: "ack", late: "default"},
			{see: web, sends: "default ROOTCA", cause: "change"},
		},
		"unknown names hold nothing up": {
			{ask: ask("file-root:system", "default", "kubernetes://x"), see: web, sends: "default", cause: "first"},
		},
		"only unknown names": {
			{ask: ask("file-root:system"), see: web},
			{see: both},
			{ask: ask("file-root:system", "default"), see: web, sends: "default", cause: "first"},
		},
		"rotation is pushed once": {
			{ask: ask("default"), see: web, sends: "default", cause: "first"},
			{see: ren, sends: "default", cause: "change"},
			{see: w.has(w.web2)},
			{ask: ack("default"), see: ren, check: "ack"},
		},
		"a change of something else is not pushed": {
			{ask: ask("default"), see: web, sends: "default", cause: "first"},
			{see: both},
			{see: w.federated(both)},
		},
		"name list changes are answered": {
			{ask: ask("default"), see: both, sends: "default", cause: "first"},
			{ask: ack("default", "spiffe://example.org/db"), see: both, sends: "default spiffe://example.org/db", cause: "names", check: "ack"},
			{ask: ack("spiffe://example.org/db"), see: both, sends: "spiffe://example.org/db", cause: "names", check: "ack"},
			{ask: ack("spiffe://example.org/db"), see: both, check: "ack"},
		},
		"order and repetition are no change": {
			{ask: ask("default", "ROOTCA"), see: web, sends: "default ROOTCA", cause: "first"},
			{ask: ack("ROOTCA", "default", "default", ""), see: web, check: "ack"},
		},
		"a name dropped and asked for again is sent again": {
			{ask: ask("default"), see: web, sends: "default", cause: "first"},
			{ask: ack("spiffe://example.org/none"), see: web, check: "ack", late: "spiffe://example.org/none"},
			{ask: ack("default"), see: web, sends: "default", cause: "names", check: "none"},
		},
		"a NACK is not answered with the same": {
			{ask: ask("default"), see: web, sends: "default", cause: "first"},
			{ask: nack("default"), see: web, check: "nack"},
			{see: web},
			{see: ren, sends: "default", cause: "change"},
		},
		"an old version with the last nonce is a NACK": {
			{ask: ask("default"), see: web, sends: "default", cause: "first"},
			{ask: nonce(ask("default"), last, "old"), see: web, check: "nack"},
		},
		"a NACKed response is not judged twice": {
			{ask: ask("default"), see: both, sends: "default", cause: "first"},
			{ask: nack("default"), see: both, check: "nack"},
			{ask: nonce(ask("default"), last, "old"), see: both, check: "none"},
			{ask: nonce(ask("ROOTCA"), last, "old"), see: both, sends: "ROOTCA", cause: "names", check: "none"},
		},
		"stale nonces are ignored, the list comes again": {
			{ask: ask("default"), see: web, sends: "default", cause: "first"},
			{see: ren, sends: "default", cause: "change"},
			{ask: nonce(ask("default", "ROOTCA"), "1", "x"), see: ren, check: "stale"},
			{ask: ack("default", "ROOTCA"), see: ren, sends: "default ROOTCA", cause: "names", check: "ack"},
		},
		"nonces of another stream before our first response do not count": {
			{ask: nonce(ask("default"), "9", "v"), see: none, late: "default"},
			{ask: nonce(ask("ROOTCA"), "9", "v"), see: none, sends: "ROOTCA", cause: "first", check: "none"},
		},
		"a new list without nonce counts": {
			{ask: ask("default"), see: web, sends: "default", cause: "first"},
			{ask: ask("ROOTCA"), see: web, sends: "ROOTCA", cause: "names", check: "none"},
		},
		"withdrawal ends the stream": {
			{ask: ask("default"), see: web, sends: "default", cause: "first"},
			{see: none, fails: sds.ErrWithdrawn},
		},
		"withdrawal of a named identity among others": {
			{ask: ask("ROOTCA", "spiffe://example.org/web"), see: both, sends: "ROOTCA spiffe://example.org/web", cause: "first"},
			{see: w.has(w.db), fails: sds.ErrWithdrawn},
		},
		"default moves to another entry when its own goes": {
			{ask: ask("default"), see: both, sends: "default", cause: "first"},
			{see: w.has(w.db), sends: "default", cause: "change"},
		},
		"default does not move while its own is merely late": {
			{ask: ask("default"), see: both, sends: "default", cause: "first"},
			{see: late(w.has(w.db), w.web), late: "default"},
			{see: both},
			{see: late(w.has(w.db), w.web), late: "default"},
			{see: w.has(w.web2, w.db), sends: "default", cause: "change"},
		},
		"late is not withdrawn": {
			{ask: ask("default"), see: web, sends: "default", cause: "first"},
			{see: late(none, w.web), late: "default"},
			{see: web},
		},
		"an agent that lost touch withdraws nothing": {
			{ask: ask("default"), see: web, sends: "default", cause: "first"},
			{see: unsynced, late: "default"},
		},
		"bundle-only streams survive withdrawal": {
			{ask: ask("ROOTCA"), see: web, sends: "ROOTCA", cause: "first"},
			{see: none},
		},
		"everything": {
			{ask: ask(), see: w.federated(both), sends: "spiffe://example.org spiffe://another.test spiffe://example.org/web spiffe://example.org/db", cause: "first"},
			{see: w.has(w.web), sends: "spiffe://example.org spiffe://example.org/web", cause: "change"},
			{see: none, sends: "spiffe://example.org", cause: "change"},
			{see: web, sends: "spiffe://example.org spiffe://example.org/web", cause: "change"},
			{see: late(none, w.web)},
		},
		"everything for nobody yet": {
			{ask: ask(), see: unsynced},
			{see: none, sends: "spiffe://example.org", cause: "first"},
		},
		"empty names are none": {
			{ask: ask("", ""), see: none, sends: "spiffe://example.org", cause: "first"},
		},
		"several names of the own bundle": {
			{ask: ask("ROOTCA", "ALL", "spiffe://example.org"), see: none, sends: "ROOTCA ALL spiffe://example.org", cause: "first"},
		},
		"a federated bundle comes, changes nothing else, and goes": {
			{ask: ask("spiffe://another.test", "ROOTCA"), see: web, sends: "ROOTCA", cause: "first", late: "spiffe://another.test"},
			{see: w.federated(web), sends: "spiffe://another.test ROOTCA", cause: "change"},
			{see: web, late: "spiffe://another.test"},
		},
		"ids of strangers are late": {
			{ask: ask("spiffe://nowhere.test/x", "spiffe://nowhere.test"), see: web, late: "spiffe://nowhere.test/x spiffe://nowhere.test"},
		},
		"nothing happens before the first request": {
			{see: web},
			{ask: ask("default"), see: web, sends: "default", cause: "first"},
		},
		"an empty picture": {
			{ask: ask("default", "ROOTCA", "ALL", "spiffe://example.org", "x"), see: unsynced, late: "default ROOTCA ALL spiffe://example.org"},
		},
	}
	for name, steps := range tests {
		t.Run(name, func(t *testing.T) {
			m := sds.NewSotW(sds.DefaultNames(), false)
			lastNonce, lastVersion := "", ""
			for i, s := range steps {
				var got sds.Outcome
				if s.ask != nil {
					q := s.ask
					if q.ResponseNonce == last {
						q.ResponseNonce = lastNonce
					}
					if q.VersionInfo == last {
						q.VersionInfo = lastVersion
					}
					got = m.Request(q, s.see)
				} else {
					got = m.Update(s.see)
				}
				at := fmt.Sprintf("step %d", i+1)
				if !errors.Is(got.End, s.fails) || (s.fails == nil) != (got.End == nil) {
					t.Fatalf("%s: end = %v, want %v", at, got.End, s.fails)
				}
				if s.fails != nil {
					continue
				}
				if names := secretNames(t, got.SotW); names != s.sends {
					t.Errorf("%s: sent %q, want %q", at, names, s.sends)
				}
				if got.Cause != s.cause {
					t.Errorf("%s: cause %q, want %q", at, got.Cause, s.cause)
				}
				if s.check != "" && got.Verdict != s.check {
					t.Errorf("%s: verdict %q, want %q", at, got.Verdict, s.check)
				}
				if l := strings.Join(got.Late, " "); l != s.late {
					t.Errorf("%s: late %q, want %q", at, l, s.late)
				}
				if got.SotW != nil {
					if got.SotW.GetNonce() == lastNonce {
						t.Errorf("%s: nonce %q repeated", at, lastNonce)
					}
					lastNonce, lastVersion = got.SotW.GetNonce(), got.SotW.GetVersionInfo()
				}
			}
		})
	}
}

// Equal content has the same version on every stream, other content another.
func TestVersionsComeFromContent(t *testing.T) {
	w := newWorld(t)
	version := func(u *svid.Update, plain bool, names ...string) string {
		return sds.NewSotW(sds.DefaultNames(), plain).Request(ask(names...), u).SotW.GetVersionInfo()
	}
	base := version(w.has(w.web), false, "default", "ROOTCA")
	same := *w.web.SVID // another pointer, equal content
	if got := version(w.has(&svid.Identity{Entry: w.web.Entry, SVID: &same}), false, "default", "ROOTCA"); got != base {
		t.Errorf("equal content: version %q, want %q", got, base)
	}
	for name, other := range map[string]string{
		"renewed":   version(w.has(w.web2), false, "default", "ROOTCA"),
		"form":      version(w.has(w.web), true, "default", "ROOTCA"),
		"fewer":     version(w.has(w.web), false, "default"),
		"same cert": version(w.has(w.web), false, "spiffe://example.org/web"),
	} {
		if other == base {
			t.Errorf("%s: version did not change", name)
		}
	}
}

func TestNamesSwitchedOff(t *testing.T) {
	w := newWorld(t)
	u := w.federated(w.has(w.web))
	istio := sds.Names{SVID: "default", Bundle: "null", AllBundles: "ROOTCA"}
	got := sds.NewSotW(istio, false).Request(ask("ROOTCA", "default"), u)
	want := []*tlsv3.Secret{validatorSecret(t, "ROOTCA", w.other, w.own), tlsSecret("default", w.web.SVID)}
	for i, a := range got.SotW.GetResources() {
		var s tlsv3.Secret
		if err := a.UnmarshalTo(&s); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want[i].String(), s.String()); diff != "" {
			t.Errorf("resource %d (-want +got):\n%s", i, diff)
		}
	}
	off := sds.NewSotW(sds.Names{}, false).Request(ask("default", "ROOTCA", "ALL", "spiffe://example.org/web"), u)
	if names := secretNames(t, off.SotW); names != "spiffe://example.org/web" {
		t.Errorf("sent %q with all names off", names)
	}
	if diff := cmp.Diff([]string{"default", "ROOTCA", "ALL"}, off.Unknown); diff != "" {
		t.Errorf("unknown (-want +got):\n%s", diff)
	}
	both := sds.NewSotW(sds.Names{Bundle: "ROOTCA", AllBundles: "ROOTCA"}, false).Request(ask("ROOTCA"), u)
	var s tlsv3.Secret
	if err := both.SotW.GetResources()[0].UnmarshalTo(&s); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(validatorSecret(t, "ROOTCA", w.own).String(), s.String()); diff != "" {
		t.Errorf("colliding names (-want +got):\n%s", diff)
	}
}

func nodeWith(value *structpb.Value, major, minor uint32) *corev3.Node {
	n := new(corev3.Node)
	if value != nil {
		n.Metadata = &structpb.Struct{Fields: map[string]*structpb.Value{
			"other": structpb.NewStringValue("x"), "disable_spiffe_cert_validation": value,
		}}
	}
	if major+minor > 0 {
		n.UserAgentVersionType = &corev3.Node_UserAgentBuildVersion{UserAgentBuildVersion: &corev3.BuildVersion{
			Version: &typev3.SemanticVersion{MajorNumber: major, MinorNumber: minor},
		}}
	}
	return n
}

func TestFormOfValidationContext(t *testing.T) {
	w := newWorld(t)
	b, s := structpb.NewBoolValue, structpb.NewStringValue
	tests := []struct {
		name       string
		node       *corev3.Node
		configured bool
		plain      bool
	}{
		{"no node", nil, false, false},
		{"no node, configured", nil, true, true},
		{"empty node", &corev3.Node{}, false, false},
		{"empty metadata", &corev3.Node{Metadata: &structpb.Struct{}}, true, true},
		{"bool", nodeWith(b(true), 0, 0), false, true},
		{"bool over configuration", nodeWith(b(false), 0, 0), true, false},
		{"text", nodeWith(s("true"), 0, 0), false, true},
		{"text 0", nodeWith(s("0"), 0, 0), true, false},
		{"unreadable text", nodeWith(s("maybe"), 0, 0), true, true},
		{"number", nodeWith(structpb.NewNumberValue(1), 0, 0), false, false},
		{"null", nodeWith(structpb.NewNullValue(), 0, 0), false, false},
		{"no kind", nodeWith(&structpb.Value{}, 0, 0), false, false},
		{"1.17", nodeWith(nil, 1, 17), false, true},
		{"1.18", nodeWith(nil, 1, 18), false, false},
		{"0.99", nodeWith(nil, 0, 99), false, true},
		{"2.0", nodeWith(nil, 2, 0), false, false},
		{"1.17 although asked for", nodeWith(b(false), 1, 17), false, true},
		{"build version without version", &corev3.Node{
			UserAgentVersionType: &corev3.Node_UserAgentBuildVersion{UserAgentBuildVersion: &corev3.BuildVersion{}},
		}, false, false},
		{"text version", &corev3.Node{UserAgentVersionType: &corev3.Node_UserAgentVersion{UserAgentVersion: "1.2.3"}}, false, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			q := ask("ROOTCA")
			q.Node = tt.node
			got := sds.NewSotW(sds.DefaultNames(), tt.configured).Request(q, w.has())
			var s tlsv3.Secret
			if err := got.SotW.GetResources()[0].UnmarshalTo(&s); err != nil {
				t.Fatal(err)
			}
			if plain := s.GetValidationContext().GetTrustedCa() != nil; plain != tt.plain {
				t.Errorf("plain = %v, want %v", plain, tt.plain)
			}
		})
	}
}

// The node comes with the first message only, even if that got no answer.
func TestNodeIsRemembered(t *testing.T) {
	w := newWorld(t)
	m := sds.NewSotW(sds.DefaultNames(), false)
	first := ask("default")
	first.Node = nodeWith(structpb.NewBoolValue(true), 0, 0)
	if got := m.Request(first, w.has()); got.SotW != nil {
		t.Fatal("answered although late")
	}
	got := m.Request(ask("ROOTCA"), w.has())
	var s tlsv3.Secret
	if err := got.SotW.GetResources()[0].UnmarshalTo(&s); err != nil {
		t.Fatal(err)
	}
	if s.GetValidationContext().GetTrustedCa() == nil {
		t.Error("node of the first message forgotten")
	}
}

func TestPlainAllBundlesIsNarrowedOnce(t *testing.T) {
	w := newWorld(t)
	m := sds.NewSotW(sds.DefaultNames(), true)
	if got := m.Request(ask("ALL"), w.federated(w.has(w.web))); !got.Narrow {
		t.Error("not reported")
	}
	if got := m.Request(ask("ALL", "ROOTCA"), w.federated(w.has(w.web))); got.Narrow {
		t.Error("reported twice")
	}
}

func TestTwoEntriesOneID(t *testing.T) {
	w := newWorld(t)
	twin := w.own.identity(t, "e-twin", "/web")
	u := w.has(w.web, twin)
	if names := secretNames(t, sds.NewSotW(sds.DefaultNames(), false).Request(ask(), u).SotW); names != "spiffe://example.org spiffe://example.org/web" {
		t.Errorf("everything is %q", names)
	}
	u.Late = []*entry.Entry{entryOf("e-x", "spiffe://example.org/x")}
	m := sds.NewSotW(sds.DefaultNames(), false)
	m.Request(ask("spiffe://example.org/web"), u)
	if got := m.Update(late(w.has(twin), w.web)); got.End != nil {
		t.Errorf("ended with %v although a twin has the name", got.End)
	}
}

// A bundle without an X.509 authority is nothing Envoy could use: late on its
// own, left out of all bundles.
func TestBundlesWithoutAuthorities(t *testing.T) {
	w := newWorld(t)
	u := w.has(w.web)
	u.Federated = map[spiffeid.TrustDomain]*spiffebundle.Bundle{w.other.td: spiffebundle.New(w.other.td)}
	got := sds.NewSotW(sds.DefaultNames(), false).Request(ask("ALL", "spiffe://another.test"), u)
	if names := secretNames(t, got.SotW); names != "ALL" || ids(got.Late...) != "spiffe://another.test" {
		t.Errorf("sent %q, late %q", names, got.Late)
	}
	var s tlsv3.Secret
	if err := got.SotW.GetResources()[0].UnmarshalTo(&s); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(validatorSecret(t, "ALL", w.own).String(), s.String()); diff != "" {
		t.Errorf("all bundles (-want +got):\n%s", diff)
	}
	u = &svid.Update{Synced: true, Own: spiffebundle.New(w.own.td)}
	for _, names := range [][]string{{"ROOTCA", "ALL", "spiffe://example.org"}, nil} {
		if got := sds.NewSotW(sds.DefaultNames(), false).Request(ask(names...), u); got.SotW != nil {
			t.Errorf("%q: sent %q of an empty bundle", names, secretNames(t, got.SotW))
		}
	}
}
