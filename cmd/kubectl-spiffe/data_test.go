package main

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

func TestParseEntries(t *testing.T) {
	got, err := parseEntries([]byte(`{"entries":[{
		"selectors":[{"type":"unix","value":"uid:1"},{"type":"k8s","value":"ns:a:b"}],
		"parent_id":"spiffe://td/p", "spiffe_id":"spiffe://td/w", "x509_svid_ttl":1, "jwt_svid_ttl":2,
		"federates_with":["spiffe://other"], "entry_id":"e", "admin":true, "downstream":true, "entryExpiry":3,
		"dns_names":["b","a"], "revision_number":9, "store_svid":true, "hint":"h", "created_at":9,
		"additional_attributes":{"disable_x509_svid_prefetch":true,"jwt_svid_include_jti":true}, "something":"else"}]}`))
	if err != nil {
		t.Fatal(err)
	}
	want := []*typespb.Entry{{
		Id: "e", SpiffeId: &typespb.SPIFFEID{TrustDomain: "td", Path: "/w"}, ParentId: &typespb.SPIFFEID{TrustDomain: "td", Path: "/p"},
		Selectors:   []*typespb.Selector{{Type: "unix", Value: "uid:1"}, {Type: "k8s", Value: "ns:a:b"}},
		X509SvidTtl: 1, JwtSvidTtl: 2, FederatesWith: []string{"spiffe://other"}, Admin: true, Downstream: true, ExpiresAt: 3,
		DnsNames: []string{"b", "a"}, StoreSvid: true, Hint: "h",
		AdditionalAttributes: &typespb.Entry_AdditionalAttributes{DisableX509SvidPrefetch: true, JwtSvidIncludeJti: true},
	}}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
	for in, text := range map[string]string{
		`{`:                        "unexpected end of JSON input",
		`{"entries":[null]}`:       "entry 0 is null",
		`{"entries":[{}]}`:         "invalid SPIFFE ID: cannot be empty",
		`{"entries":[{}]} x`:       "invalid character 'x' after top-level value",
		`{"entries":[{"hint":1}]}`: "json: cannot unmarshal number into Go struct field RegistrationEntry.entries.hint of type string",
		`{"entries":[{"spiffe_id":"spiffe://td/a","parent_id":"x"}]}`: "invalid parent ID: scheme is missing or invalid",
		`{"entries":[{"x509_svid_ttl":99999999999}]}`:                 "json: cannot unmarshal number 99999999999 into Go struct field RegistrationEntry.entries.x509_svid_ttl of type int32",
	} {
		if _, err := parseEntries([]byte(in)); err == nil || err.Error() != text {
			t.Errorf("%s: got %v, want %s", in, err, text)
		}
	}
}

func FuzzParseEntries(f *testing.F) {
	f.Add(`{"entries":[{"spiffe_id":"spiffe://td/a","parent_id":"spiffe://td/b","selectors":[{"type":"a","value":"b"}]}]}`)
	f.Add(`{"ENTRIES":[{"Spiffe_ID":"spiffe://td/a","parent_id":"spiffe://td/b","selectors":[null]}]}`)
	f.Add(`{"entries":[null]}`)
	f.Add(`{"entries":{}}`)
	f.Add(`[]`)
	f.Fuzz(func(t *testing.T, s string) {
		entries, err := parseEntries([]byte(s))
		if err != nil {
			return
		}
		for _, e := range entries {
			if e.GetSpiffeId().GetTrustDomain() == "" || e.GetParentId().GetTrustDomain() == "" {
				t.Errorf("%s: IDs are missing in %v", s, e)
			}
		}
	})
}

func FuzzParseSelector(f *testing.F) {
	for _, s := range []string{"", ":", "a:b", "a:b:c", "a", ":b", "a:", "\x00:\xff"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		sel, err := parseSelector(s)
		if err != nil {
			if strings.Contains(s, ":") {
				t.Errorf("%q: %v", s, err)
			}
			return
		}
		if sel.GetType()+":"+sel.GetValue() != s || strings.Contains(sel.GetType(), ":") {
			t.Errorf("%q became %v", s, sel)
		}
	})
}

func TestPruneKeepsDefaults(t *testing.T) {
	v, err := plain(answer{message: &typespb.Entry{Id: "x"}})
	if err != nil {
		t.Fatal(err)
	}
	out, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"admin":false,"created_at":"0","dns_names":[],"downstream":false,"expires_at":"0","federates_with":[],"hint":"","id":"x","jwt_svid_ttl":0,"revision_number":"0","selectors":[],"store_svid":false,"x509_svid_ttl":0}`
	if string(out) != want {
		t.Errorf("got  %s\nwant %s", out, want)
	}
}

func TestPlural(t *testing.T) {
	for n, want := range map[int]string{0: "0 entries", 1: "1 entry", 2: "2 entries"} {
		if got := count(n, "entry", "entries"); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}
