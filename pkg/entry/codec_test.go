package entry_test

import (
	"errors"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// full has a value other than zero in every field.
func full() *entry.Entry {
	return &entry.Entry{
		ID:                      "id",
		SPIFFEID:                id("/w"),
		ParentID:                id("/spire/agent/x"),
		Selectors:               sels("unix:uid:1", "k8s:ns:a:b"),
		X509SVIDTTL:             time.Hour,
		JWTSVIDTTL:              5 * time.Minute,
		FederatesWith:           []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("b.org"), spiffeid.RequireTrustDomainFromString("a.org")},
		DNSNames:                []string{"b", "a"},
		Hint:                    "<hint>",
		Admin:                   true,
		Downstream:              true,
		StoreSVID:               true,
		ExpiresAt:               time.Unix(2_000_000_000, 0),
		Revision:                7,
		CreatedAt:               time.Unix(1_700_000_000, 5),
		DisableX509SVIDPrefetch: true,
		JWTSVIDIncludeJTI:       true,
		Fallback:                true,
		Suspended:               true,
	}
}

// TestEveryField makes sure that no field is forgotten by Equal, Clone or the
// codec: it empties them one after the other.
func TestEveryField(t *testing.T) {
	t.Parallel()
	fields := reflect.TypeFor[entry.Entry]()
	for i := range fields.NumField() {
		name := fields.Field(i).Name
		e := full()
		v := reflect.ValueOf(e).Elem().Field(i)
		if v.IsZero() {
			t.Errorf("%s: zero in full()", name)
		}
		v.SetZero()
		if e.Equal(full()) || full().Equal(e) {
			t.Errorf("%s: Equal does not look at it", name)
		}
		meta := name == "ID" || name == "Revision" || name == "CreatedAt" || name == "Suspended"
		if same := e.SameContent(full()); same != meta {
			t.Errorf("%s: SameContent is %v", name, same)
		}
		for _, e := range []*entry.Entry{e, full()} {
			data, err := e.MarshalBinary()
			if err != nil {
				t.Fatal(err)
			}
			var back entry.Entry
			if err := back.UnmarshalBinary(data); err != nil {
				t.Fatalf("%s: %v", data, err)
			}
			if diff := cmp.Diff(e, &back, compareEntries); diff != "" || !back.Equal(e) {
				t.Errorf("without %s (-in +out):\n%s", name, diff)
			}
			if !e.Clone().Equal(e) {
				t.Errorf("without %s: the clone differs", name)
			}
		}
	}
}

func TestCloneSharesNothing(t *testing.T) {
	t.Parallel()
	e := full()
	c := e.Clone()
	c.DNSNames[0], c.FederatesWith[0] = "x", td
	if !e.Equal(full()) {
		t.Error("changing the clone changed the entry")
	}
	if e.Equal(nil) || (*entry.Entry)(nil).Equal(e) || !(*entry.Entry)(nil).Equal(nil) {
		t.Error("Equal and nil")
	}
}

func TestSameContentIgnoresFederationOrder(t *testing.T) {
	t.Parallel()
	a, b := full(), full()
	b.FederatesWith[0], b.FederatesWith[1] = b.FederatesWith[1], b.FederatesWith[0]
	if !a.SameContent(b) || a.Equal(b) {
		t.Error("order of federated trust domains")
	}
	b.DNSNames[0], b.DNSNames[1] = b.DNSNames[1], b.DNSNames[0]
	if a.SameContent(b) {
		t.Error("the order of DNS names does not count")
	}
}

func TestUnmarshalErrors(t *testing.T) {
	t.Parallel()
	for data, want := range map[string]string{
		``:                                 "EOF",
		`null`:                             "version 0",
		`{}`:                               "version 0",
		`{"v":2}`:                          "version 2, this program reads version 1",
		`{"v":2,"news":1}`:                 "version 2, this program reads version 1",
		`{"v":1,"news":1}`:                 `unknown field "news"`,
		`{"v":1}x`:                         "bytes behind",
		`{"v":1}{}`:                        "bytes behind",
		`{"v":1,"spiffe_id":"x"}`:          "scheme is missing",
		`{"v":1,"selectors":["x"]}`:        "type:value",
		`{"v":1,"federates_with":["A B"]}`: "trust domain",
		`{"v":1,"x509_svid_ttl":1000000000000000}`: "TTL",
		`{"v":1,"created_at":"yesterday"}`:         "yesterday",
		"\x00\x01":                                 "invalid character",
	} {
		e := full()
		err := e.UnmarshalBinary([]byte(data))
		if !errors.Is(err, entry.ErrCodec) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v, want %q", data, err, want)
		}
		if !e.Equal(full()) {
			t.Errorf("%q: the entry changed although there was an error", data)
		}
	}
}

func FuzzCodec(f *testing.F) {
	data, err := full().MarshalBinary()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(`{"v":1}`))
	f.Add([]byte(`{"v":1,"selectors":["a:b","","a:b"],"expires_at":-1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var e entry.Entry
		if e.UnmarshalBinary(data) != nil {
			return
		}
		again, err := e.MarshalBinary()
		if err != nil {
			t.Fatal(err)
		}
		var back entry.Entry
		if err := back.UnmarshalBinary(again); err != nil || !back.Equal(&e) {
			t.Errorf("%s\n-> %s\n%v", data, again, err)
		}
	})
}
