package spirewire_test

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

func fullEntry() *entry.Entry {
	return &entry.Entry{
		ID:                      "e",
		SPIFFEID:                spiffeid.RequireFromString("spiffe://td/w"),
		ParentID:                spiffeid.RequireFromString("spiffe://td/p"),
		Selectors:               attest.MustSelectors("k8s:ns:x", "unix:uid:1"),
		X509SVIDTTL:             time.Minute,
		JWTSVIDTTL:              2 * time.Minute,
		FederatesWith:           []spiffeid.TrustDomain{spiffeid.RequireTrustDomainFromString("other")},
		DNSNames:                []string{"b", "a"},
		Hint:                    "h",
		Admin:                   true,
		Downstream:              true,
		StoreSVID:               true,
		ExpiresAt:               time.Unix(4102444800, 0).UTC(),
		Revision:                3,
		CreatedAt:               time.Unix(1700000000, 0).UTC(),
		DisableX509SVIDPrefetch: true,
		JWTSVIDIncludeJTI:       true,
	}
}

func TestEntryThereAndBack(t *testing.T) {
	want := fullEntry()
	data, err := proto.Marshal(spirewire.EntryToWire(want))
	if err != nil {
		t.Fatal(err)
	}
	var msg typespb.Entry
	if err := proto.Unmarshal(data, &msg); err != nil {
		t.Fatal(err)
	}
	got, err := spirewire.EntryFromWire(&msg)
	if err != nil {
		t.Fatal(err)
	}
	if !want.Equal(got) {
		t.Errorf("got %+v, want %+v", got, want)
	}
}

// What is not set has no trace on the wire.
func TestSmallEntry(t *testing.T) {
	got := spirewire.EntryToWire(&entry.Entry{ID: "e", SPIFFEID: spiffeid.RequireFromString("spiffe://td/w")})
	want := &typespb.Entry{Id: "e", SpiffeId: &typespb.SPIFFEID{TrustDomain: "td", Path: "/w"}}
	if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
		t.Error(diff)
	}
}

func TestEntryFromWireRefuses(t *testing.T) {
	for text, edit := range map[string]func(*typespb.Entry){
		"entry has no ID": func(e *typespb.Entry) { e.Id = "" },
		"entry e: invalid spiffe ID: request must specify SPIFFE ID":       func(e *typespb.Entry) { e.SpiffeId = nil },
		"entry e: invalid parent ID: path must have a leading slash":       func(e *typespb.Entry) { e.ParentId.Path = "x" },
		"entry e: selector list is empty":                                  func(e *typespb.Entry) { e.Selectors = nil },
		"entry e: missing selector type":                                   func(e *typespb.Entry) { e.Selectors[0] = nil },
		"entry e: invalid federated trust domain: trust domain is missing": func(e *typespb.Entry) { e.FederatesWith = []string{""} },
		"entry e: selector type contains ':'":                              func(e *typespb.Entry) { e.Selectors[0].Type = "a:b" },
	} {
		e := spirewire.EntryToWire(fullEntry())
		edit(e)
		if _, err := spirewire.EntryFromWire(e); err == nil || !strings.HasPrefix(err.Error(), text) {
			t.Errorf("got %v, want %s", err, text)
		}
	}
	if _, err := spirewire.EntryFromWire(nil); err == nil {
		t.Error("nil was accepted")
	}
	masked := spirewire.EntryToWire(fullEntry())
	masked.ParentId = nil
	if e, err := spirewire.EntryFromWire(masked); err != nil || !e.ParentID.IsZero() {
		t.Errorf("an agent does not ask for the parent: %v, %v", e, err)
	}
}

func TestTimesAndSeconds(t *testing.T) {
	if got := spirewire.TimeToWire(time.Unix(10, 600_000_000)); got != 11 {
		t.Errorf("10.6 s became %d, want it rounded", got)
	}
	if spirewire.TimeToWire(time.Time{}) != 0 || !spirewire.TimeFromWire(0).IsZero() {
		t.Error("0 is no time")
	}
	if got := spirewire.TimeFromWire(-1).Unix(); got != -1 {
		t.Errorf("-1 became %d", got)
	}
	for d, want := range map[time.Duration]int32{
		0: 0, 1500 * time.Millisecond: 1, time.Duration(math.MaxInt64): math.MaxInt32, -time.Duration(math.MaxInt64): math.MinInt32,
	} {
		if got := spirewire.SecondsToWire(d); got != want {
			t.Errorf("%s became %d, want %d", d, got, want)
		}
	}
}

func TestIDs(t *testing.T) {
	if spirewire.IDToWire(spiffeid.ID{}) != nil {
		t.Error("no ID has no wire form")
	}
	got, err := spirewire.IDFromWire(&typespb.SPIFFEID{TrustDomain: "spiffe://td/ignored", Path: "/x"})
	if err != nil || got.String() != "spiffe://td/x" {
		t.Errorf("got %s, %v", got, err)
	}
}

func FuzzEntryFromWire(f *testing.F) {
	data, err := proto.Marshal(spirewire.EntryToWire(fullEntry()))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte{})
	f.Add([]byte{0x0a, 0x01, 'e', 0x12, 0x00, 0x22, 0x00})
	f.Fuzz(func(t *testing.T, data []byte) {
		var msg typespb.Entry
		if proto.Unmarshal(data, &msg) != nil {
			return
		}
		e, err := spirewire.EntryFromWire(&msg)
		if err != nil {
			return
		}
		again, err := spirewire.EntryFromWire(spirewire.EntryToWire(e))
		if err != nil || !e.Equal(again) {
			t.Errorf("%+v became %+v, %v", e, again, err)
		}
	})
}
