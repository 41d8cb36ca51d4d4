package adminapi_test

import (
	"slices"
	"strconv"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/testing/protocmp"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

func FuzzPageToken(f *testing.F) {
	for _, s := range []string{"", "0", "1", "-1", "+1", "007", "9223372036854775807", "9223372036854775808", "x", "1 ", "1_0", "0x10", "\x00", "٣"} {
		f.Add(s, int32(2))
	}
	rows := []int64{1, 2, 5, 9, 1 << 40}
	f.Fuzz(func(t *testing.T, token string, size int32) {
		items, next, err := adminapi.Cut(size, token, rows)
		if err != nil {
			if size <= 0 {
				t.Fatal("without a size the token does not count")
			}
			return
		}
		if size <= 0 {
			if len(items) != len(rows) || next != "" {
				t.Fatalf("size %d: %v, %q", size, items, next)
			}
			return
		}
		// Walking on from any token ends, and sees each later row once.
		var after int64
		if token != "" {
			if after, err = strconv.ParseInt(token, 10, 64); err != nil || after < 0 {
				t.Fatalf("token %q was accepted", token)
			}
		}
		seen := items
		for next != "" {
			if items, next, err = adminapi.Cut(size, next, rows); err != nil {
				t.Fatal(err)
			}
			seen = append(seen, items...)
			if len(seen) > len(rows) {
				t.Fatalf("walk does not end: %v", seen)
			}
		}
		var want []int64
		for _, r := range rows {
			if r > after {
				want = append(want, r)
			}
		}
		if !slices.Equal(seen, want) {
			t.Fatalf("after %q: %v, want %v", token, seen, want)
		}
	})
}

func TestPageTokenIsEmptyOnlyAfterAnEmptyPage(t *testing.T) {
	for _, tc := range []struct {
		size int32
		n    int
		want string
	}{{0, 5, ""}, {2, 2, "9"}, {2, 1, "9"}, {2, 0, ""}} {
		if _, next, err := adminapi.Page(tc.size, "", tc.n, 9); err != nil || next != tc.want {
			t.Errorf("size %d, %d items: next %q, %v", tc.size, tc.n, next, err)
		}
	}
}

func TestMask(t *testing.T) {
	full := func() *typespb.Entry {
		return &typespb.Entry{
			Id: "id", SpiffeId: id("td", "/a"), ParentId: id("td", "/b"), Selectors: selectors("a:b"), X509SvidTtl: 1, JwtSvidTtl: 2,
			FederatesWith: []string{"x"}, Admin: true, Downstream: true, ExpiresAt: 3, DnsNames: []string{"d"}, RevisionNumber: 4,
			StoreSvid: true, Hint: "h", CreatedAt: 5, AdditionalAttributes: noPrefetch(),
		}
	}
	for name, tc := range map[string]struct {
		mask *typespb.EntryMask
		want *typespb.Entry
	}{
		"none":  {nil, full()},
		"empty": {&typespb.EntryMask{}, &typespb.Entry{Id: "id"}},
		"agent's": {
			&typespb.EntryMask{SpiffeId: true, RevisionNumber: true, AdditionalAttributes: true},
			&typespb.Entry{Id: "id", SpiffeId: id("td", "/a"), RevisionNumber: 4, AdditionalAttributes: noPrefetch()},
		},
	} {
		got := full()
		adminapi.ApplyMask(tc.mask, got)
		if diff := cmp.Diff(tc.want, got, protocmp.Transform()); diff != "" {
			t.Errorf("%s:\n%s", name, diff)
		}
	}
}
