package entry_test

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

func input() *entry.Input {
	return &entry.Input{
		ParentID:  &entry.InputID{TrustDomain: "example.org", Path: "/spire/agent/x"},
		SPIFFEID:  &entry.InputID{TrustDomain: "example.org", Path: "/w"},
		Selectors: []entry.InputSelector{{"unix", "uid:1"}, {"unix", "gid:1"}},
	}
}

// TestInputErrors holds the texts SPIRE Server 1.15.3 answers.
func TestInputErrors(t *testing.T) {
	t.Parallel()
	const (
		convert = "failed to convert entry: "
		create  = "failed to create entry: "
		invalid = create + "datastore-validation: invalid registration entry: "
	)
	for _, c := range []struct {
		name string
		edit func(in *entry.Input)
		want string
	}{
		{"no parent", func(in *entry.Input) { in.ParentID = nil }, convert + "invalid parent ID: request must specify SPIFFE ID"},
		{"parent without trust domain", func(in *entry.Input) { in.ParentID.TrustDomain = "" }, convert + "invalid parent ID: trust domain is missing"},
		{"parent's path", func(in *entry.Input) { in.ParentID.Path = "a" }, convert + "invalid parent ID: path must have a leading slash"},
		{"parent elsewhere", func(in *entry.Input) { in.ParentID.TrustDomain = "other.org" }, convert + `invalid parent ID: "spiffe://other.org/spire/agent/x" is not a member of trust domain "example.org"`},
		{"parent is the trust domain", func(in *entry.Input) { in.ParentID.Path = "" }, convert + `invalid parent ID: "spiffe://example.org" is not a member of trust domain "example.org"; path is empty`},
		{"no SPIFFE ID", func(in *entry.Input) { in.SPIFFEID = nil }, convert + "invalid spiffe ID: request must specify SPIFFE ID"},
		{"SPIFFE ID elsewhere", func(in *entry.Input) { in.SPIFFEID.TrustDomain = "other.org" }, convert + `invalid spiffe ID: "spiffe://other.org/w" is not a member of trust domain "example.org"`},
		{"SPIFFE ID is the trust domain", func(in *entry.Input) { in.SPIFFEID.Path = "" }, convert + `invalid spiffe ID: "spiffe://example.org" is not a workload in trust domain "example.org"; path is empty`},
		{"reserved", func(in *entry.Input) { in.SPIFFEID.Path = "/spire/x" }, convert + `invalid spiffe ID: "spiffe://example.org/spire/x" is not a workload in trust domain "example.org"; path is in the reserved namespace`},
		{"reserved itself", func(in *entry.Input) { in.SPIFFEID.Path = "/spire" }, convert + `invalid spiffe ID: "spiffe://example.org/spire" is not a workload in trust domain "example.org"; path is in the reserved namespace`},
		{"nearly reserved", func(in *entry.Input) { in.SPIFFEID.Path = "/spirex" }, ""},
		{"DNS name", func(in *entry.Input) { in.DNSNames = []string{"ok", "a."} }, convert + "invalid DNS name: domain ends with dot"},
		{"federation", func(in *entry.Input) { in.FederatesWith = []string{"BAD ORG"} }, convert + "invalid federated trust domain: trust domain characters are limited to lowercase letters, numbers, dots, dashes, and underscores"},
		{"no selectors", func(in *entry.Input) { in.Selectors = nil }, convert + "selector list is empty"},
		{"selector type", func(in *entry.Input) { in.Selectors[1].Type = "" }, convert + "missing selector type"},
		{"selector colon", func(in *entry.Input) { in.Selectors[1].Type = "a:b" }, convert + "selector type contains ':'"},
		{"selector value", func(in *entry.Input) { in.Selectors[1].Value = "" }, convert + "missing selector value"},
		{"hint", func(in *entry.Input) { in.Hint = strings.Repeat("a", 1025) }, convert + "hint is too long, max length is 1024 characters"},
		{"longest hint", func(in *entry.Input) { in.Hint = strings.Repeat("a", 1024) }, ""},
		{"cache", func(in *entry.Input) { in.StoreSVID, in.DisableX509SVIDPrefetch, in.ID = true, true, "a b" }, create + "datastore-validation: specifying cache behaviour is incompatible with storable SVIDs"},
		{"mixed types", func(in *entry.Input) { in.StoreSVID, in.Selectors[0].Type = true, "k8s" }, invalid + "selector types must be the same when store SVID is enabled"},
		{"long ID", func(in *entry.Input) { in.ID = strings.Repeat("a", 256) }, invalid + "entry ID too long"},
		{"longest ID", func(in *entry.Input) { in.ID = strings.Repeat("a", 255) }, ""},
		{"ID", func(in *entry.Input) { in.ID = "a b" }, invalid + "entry ID contains invalid characters"},
		{"dots as ID", func(in *entry.Input) { in.ID = ".." }, ""},
		{"X.509 TTL", func(in *entry.Input) { in.X509SVIDTTL = -1 }, invalid + "X509SvidTtl is not set"},
		{"JWT TTL", func(in *entry.Input) { in.JWTSVIDTTL = -1 }, invalid + "JwtSvidTtl is not set"},
		{"selector twice", func(in *entry.Input) { in.Selectors[1] = in.Selectors[0] }, create + "datastore-sql: UNIQUE constraint failed: selectors.registered_entry_id, selectors.type, selectors.value"},
		{"DNS name twice", func(in *entry.Input) { in.DNSNames = []string{"a", "a"} }, create + "datastore-sql: UNIQUE constraint failed: dns_names.registered_entry_id, dns_names.value"},
		{"federation twice", func(in *entry.Input) { in.FederatesWith = []string{"a.org", "spiffe://a.org/x"} }, ""},
		{"the first mistake counts", func(in *entry.Input) { in.ParentID, in.Selectors, in.ID = nil, nil, "a b" }, convert + "invalid parent ID: request must specify SPIFFE ID"},
		{"conversion comes first", func(in *entry.Input) { in.X509SVIDTTL, in.Hint = -1, strings.Repeat("a", 1025) }, convert + "hint is too long, max length is 1024 characters"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			in := input()
			c.edit(in)
			e, err := in.Entry(td)
			if err == nil {
				err = in.CheckRepeated(entry.AllFields)
			}
			got := ""
			if conversion := (*entry.ConversionError)(nil); errors.As(err, &conversion) {
				got = convert + err.Error()
			} else if err != nil {
				got = create + err.Error()
			}
			if got != c.want {
				t.Errorf("got  %q\nwant %q", got, c.want)
			}
			if err == nil {
				if err := e.Validate(td); err != nil {
					t.Errorf("the entry read: %v", err)
				}
			}
		})
	}
}

func TestInputEntry(t *testing.T) {
	t.Parallel()
	in := &entry.Input{
		ID:                "id",
		ParentID:          &entry.InputID{TrustDomain: "spiffe://example.org/ignored", Path: "/spire/server"},
		SPIFFEID:          &entry.InputID{TrustDomain: "example.org", Path: "/w"},
		Selectors:         []entry.InputSelector{{"unix", "uid:1"}, {"k8s", "ns:a"}},
		X509SVIDTTL:       60,
		JWTSVIDTTL:        5,
		FederatesWith:     []string{"b.org", "a.org", "b.org"},
		DNSNames:          []string{"b", "a"},
		Hint:              "h",
		Admin:             true,
		Downstream:        true,
		ExpiresAt:         7,
		JWTSVIDIncludeJTI: true,
	}
	want := &entry.Entry{
		ID:                "id",
		ParentID:          id("/spire/server"),
		SPIFFEID:          id("/w"),
		Selectors:         sels("k8s:ns:a", "unix:uid:1"),
		X509SVIDTTL:       time.Minute,
		JWTSVIDTTL:        5 * time.Second,
		FederatesWith:     []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("b.org"), spiffeid.RequireTrustDomainFromString("a.org")},
		DNSNames:          []string{"b", "a"},
		Hint:              "h",
		Admin:             true,
		Downstream:        true,
		ExpiresAt:         time.Unix(7, 0),
		JWTSVIDIncludeJTI: true,
	}
	got, err := in.Entry(td)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, compareEntries); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	in.ExpiresAt = 1<<63 - 1
	if got, err = in.Entry(td); err != nil || got.Expired(time.Now()) {
		t.Errorf("an expiry in the far future has passed: %v %v", got, err)
	}
}

var compareEntries = cmp.Options{
	cmp.Comparer(func(a, b selector.Set) bool { return a.Equal(b) }),
	cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b }),
	cmp.Comparer(func(a, b spiffeid.TrustDomain) bool { return a == b }),
}

func TestApplyTouchesOnlyItsFields(t *testing.T) {
	t.Parallel()
	base, err := input().Entry(td)
	if err != nil {
		t.Fatal(err)
	}
	base.ID, base.Hint, base.Revision = "id", "old", 3
	bad := &entry.Input{Hint: "new", ID: "b a d", DNSNames: []string{"*.*"}, X509SVIDTTL: -1}
	got, err := bad.Apply(base, entry.FieldHint, td)
	if err != nil {
		t.Fatal(err)
	}
	want := base.Clone()
	want.Hint = "new"
	if !got.Equal(want) || base.Hint != "old" {
		t.Errorf("got %+v, want %+v; base %+v", got, want, base)
	}
	// A field may be wrong only together with what is already there.
	mixed := &entry.Input{StoreSVID: true, Selectors: []entry.InputSelector{{"a", "1"}, {"b", "1"}}}
	base.StoreSVID = true
	if _, err := mixed.Apply(base, entry.FieldSelectors, td); err == nil {
		t.Error("mixed selectors of a storable SVID: no error")
	}
}

// TestUpdatesMayDoMore: SPIRE Server 1.15.3 accepts these updates.
func TestUpdatesMayDoMore(t *testing.T) {
	t.Parallel()
	base, err := input().Entry(td)
	if err != nil {
		t.Fatal(err)
	}
	base.Selectors = sels("a:1", "b:1")
	update := &entry.Input{StoreSVID: true, DisableX509SVIDPrefetch: true}
	got, err := update.Apply(base, entry.FieldStoreSVID|entry.FieldAttributes, td)
	if err != nil {
		t.Fatal(err)
	}
	if err := got.ValidateUpdate(td); err != nil {
		t.Error(err)
	}
	if err := got.Validate(td); err == nil {
		t.Error("a new entry like this: no error")
	}
	got.X509SVIDTTL = -1
	if err := got.ValidateUpdate(td); err == nil {
		t.Error("negative TTL: no error")
	}
	got.SPIFFEID = id("/spire/x")
	var conversion *entry.ConversionError
	if err := got.ValidateUpdate(td); !errors.As(err, &conversion) {
		t.Errorf("reserved path: %v", err)
	}
}

// TestCheckDNSName holds what SPIRE Server 1.15.3 answers for each name.
func TestCheckDNSName(t *testing.T) {
	t.Parallel()
	for name, want := range map[string]string{
		"":                             "empty or only whitespace",
		" ":                            "empty or only whitespace",
		"*.":                           "empty or only whitespace",
		"ünicode.x":                    "name must be ascii",
		"ü.*.*":                        "name must be ascii",
		"*.ü.x":                        "name must be ascii",
		"*":                            "wildcard must be first label",
		"a.*.b":                        "wildcard must be first label",
		"*a.b":                         "wildcard must be first label",
		"* .b":                         "wildcard must be first label",
		"*.*.a":                        "too many wildcards",
		"**.b":                         "too many wildcards",
		"a.b.":                         "domain ends with dot",
		"*.a.":                         "domain ends with dot",
		"a..b.":                        "domain ends with dot",
		"-a.b":                         "idna error\nidna: invalid label \"-a\"",
		"a..b":                         "idna error\nidna: invalid label \"a..b\"",
		"*..a":                         "idna error\nidna: invalid label \".a\"",
		"ab--cd.x":                     "idna error\nidna: invalid label \"ab--cd\"",
		"xn--a":                        "idna error\nidna: invalid label \"\\u0080\"",
		"XN--bcher-kva.de":             "idna error\nidna: invalid label \"XN--bcher-kva\"",
		"xn--BCHER-kva.de":             "idna error\nidna: invalid label \"BüCHER\"",
		"xn--":                         "idna error\nidna: invalid label \"\"",
		strings.Repeat("a", 64) + ".x": "idna error\nidna: invalid label \"" + strings.Repeat("a", 64) + "\"",
		strings.Repeat("a", 63) + ".x": "",
		"a_b.c":                        "",
		"UPPER.c":                      "",
		"a b.c":                        "",
		" a.b ":                        "",
		"*. b":                         "",
		"*.com":                        "",
		"1.2.3.4":                      "",
		"xn--bcher-kva.de":             "",
		"a:80":                         "",
	} {
		got := ""
		if err := entry.CheckDNSName(name); err != nil {
			got = err.Error()
		}
		if got != want {
			t.Errorf("%q: got %q, want %q", name, got, want)
		}
	}
}

func FuzzInput(f *testing.F) {
	f.Add("id", "example.org", "/spire/server", "/w", "unix", "uid:1", "a.org", "dns", int32(1), int64(2))
	f.Add("", "spiffe://example.org/x", "/", "//", ":", "", "", "*.a", int32(-1), int64(-62135596800))
	f.Fuzz(func(t *testing.T, id, domain, parent, path, kind, value, with, dns string, ttl int32, expires int64) {
		in := &entry.Input{
			ID:            id,
			ParentID:      &entry.InputID{TrustDomain: domain, Path: parent},
			SPIFFEID:      &entry.InputID{TrustDomain: domain, Path: path},
			Selectors:     []entry.InputSelector{{kind, value}},
			FederatesWith: []string{with},
			DNSNames:      []string{dns},
			X509SVIDTTL:   ttl,
			ExpiresAt:     expires,
		}
		e, err := in.Entry(td)
		if err != nil {
			return
		}
		if err := e.Validate(td); err != nil {
			t.Errorf("read, but not valid: %v", err)
		}
		if _, err := e.MarshalBinary(); err != nil {
			t.Errorf("read, but cannot be stored: %v", err)
		}
	})
}
