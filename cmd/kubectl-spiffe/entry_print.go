package main

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// idText is a SPIFFE ID as text; "(none)" if it is not set.
func idText(id *typespb.SPIFFEID) string {
	if id == nil {
		return "(none)"
	}
	return "spiffe://" + id.GetTrustDomain() + id.GetPath()
}

// printEntry writes the block that spire-server prints for an entry.
func printEntry(w io.Writer, e *typespb.Entry) {
	line := func(label, value string) { fmt.Fprintf(w, "%-24s: %s\n", label, value) }
	line("Entry ID", cmp.Or(e.GetId(), "(none)"))
	line("SPIFFE ID", idText(e.GetSpiffeId()))
	line("Parent ID", idText(e.GetParentId()))
	line("Revision", strconv.FormatInt(e.GetRevisionNumber(), 10))
	if e.GetDownstream() {
		line("Downstream", "true")
	}
	line("X509-SVID TTL", ttlText(e.GetX509SvidTtl()))
	line("JWT-SVID TTL", ttlText(e.GetJwtSvidTtl()))
	if e.GetExpiresAt() != 0 {
		line("Expiration time", time.Unix(e.GetExpiresAt(), 0).UTC().String())
	}
	for _, s := range e.GetSelectors() {
		line("Selector", s.GetType()+":"+s.GetValue())
	}
	for _, td := range e.GetFederatesWith() {
		line("FederatesWith", td)
	}
	for _, name := range e.GetDnsNames() {
		line("DNS name", name)
	}
	if e.GetAdmin() {
		line("Admin", "true")
	}
	if e.GetStoreSvid() {
		line("StoreSvid", "true")
	}
	if e.GetHint() != "" {
		line("Hint", e.GetHint())
	}
	if e.GetAdditionalAttributes().GetDisableX509SvidPrefetch() {
		line("DisableX509SvidPrefetch", "true")
	}
	if e.GetAdditionalAttributes().GetJwtSvidIncludeJti() {
		line("JwtSvidIncludeJti", "true")
	}
	fmt.Fprintln(w)
}

func ttlText(seconds int32) string {
	if seconds == 0 {
		return "default"
	}
	return strconv.Itoa(int(seconds))
}

// sortEntries orders entries, and the selectors within each, for people.
func sortEntries(entries []*typespb.Entry) {
	for _, e := range entries {
		slices.SortFunc(e.GetSelectors(), compareSelectors)
	}
	slices.SortStableFunc(entries, func(a, b *typespb.Entry) int {
		return cmp.Or(
			cmp.Compare(idText(a.GetSpiffeId()), idText(b.GetSpiffeId())),
			cmp.Compare(idText(a.GetParentId()), idText(b.GetParentId())),
			cmp.Compare(a.GetX509SvidTtl(), b.GetX509SvidTtl()),
			cmp.Compare(a.GetJwtSvidTtl(), b.GetJwtSvidTtl()),
			slices.CompareFunc(a.GetSelectors(), b.GetSelectors(), compareSelectors),
		)
	})
}

func compareSelectors(a, b *typespb.Selector) int {
	return cmp.Or(cmp.Compare(a.GetType(), b.GetType()), cmp.Compare(a.GetValue(), b.GetValue()))
}

// entryTable is one row per entry.
func entryTable(entries []*typespb.Entry) func(*table, bool) {
	return func(t *table, wide bool) {
		t.columns("SPIFFE ID", "PARENT", "SELECTORS", "AGE", "ENTRY ID")
		if wide {
			t.columns("REV", "X509 TTL", "JWT TTL", "EXPIRES", "DNS NAMES", "FEDERATES WITH", "HINT", "FLAGS")
		}
		for _, e := range entries {
			cells := []string{
				idText(e.GetSpiffeId()), parentText(e), strings.Join(selectorTexts(e.GetSelectors()), ","),
				age(e.GetCreatedAt()), e.GetId(),
			}
			if wide {
				expires := "never"
				if e.GetExpiresAt() != 0 {
					expires = time.Unix(e.GetExpiresAt(), 0).UTC().Format(time.RFC3339)
				}
				cells = append(cells, strconv.FormatInt(e.GetRevisionNumber(), 10), ttlText(e.GetX509SvidTtl()), ttlText(e.GetJwtSvidTtl()),
					expires, strings.Join(e.GetDnsNames(), ","), strings.Join(e.GetFederatesWith(), ","), e.GetHint(), flagsText(e))
			}
			t.row(cells...)
		}
	}
}

// parentText leaves the trust domain out where it is the entry's own.
func parentText(e *typespb.Entry) string {
	if p := e.GetParentId(); p.GetTrustDomain() == e.GetSpiffeId().GetTrustDomain() && p.GetPath() != "" {
		return p.GetPath()
	}
	return idText(e.GetParentId())
}

func selectorTexts(in []*typespb.Selector) []string {
	out := make([]string, len(in))
	for i, s := range in {
		out[i] = s.GetType() + ":" + s.GetValue()
	}
	return out
}

func flagsText(e *typespb.Entry) string {
	var out []string
	for _, f := range []struct {
		set  bool
		name string
	}{
		{e.GetAdmin(), "admin"},
		{e.GetDownstream(), "downstream"},
		{e.GetStoreSvid(), "store"},
		{e.GetAdditionalAttributes().GetDisableX509SvidPrefetch(), "no-prefetch"},
		{e.GetAdditionalAttributes().GetJwtSvidIncludeJti(), "jti"},
	} {
		if f.set {
			out = append(out, f.name)
		}
	}
	return strings.Join(out, ",")
}

// age is the time since unix seconds, in its one or two largest units.
func age(seconds int64) string {
	if seconds == 0 {
		return ""
	}
	return short3(time.Since(time.Unix(seconds, 0)))
}

// short3 is a duration as kubectl writes it.
func short3(d time.Duration) string {
	sign := ""
	if d <= -time.Second {
		sign, d = "-", -d
	}
	switch s := int64(max(d, 0) / time.Second); {
	case s < 120:
		return fmt.Sprintf("%s%ds", sign, s)
	case s < 600:
		return fmt.Sprintf("%s%dm%ds", sign, s/60, s%60)
	case s < 3*3600:
		return fmt.Sprintf("%s%dm", sign, s/60)
	case s < 8*3600:
		return fmt.Sprintf("%s%dh%dm", sign, s/3600, s/60%60)
	case s < 48*3600:
		return fmt.Sprintf("%s%dh", sign, s/3600)
	case s < 8*24*3600:
		return fmt.Sprintf("%s%dd%dh", sign, s/86400, s/3600%24)
	default:
		return fmt.Sprintf("%s%dd", sign, s/86400)
	}
}

// codeText is a status code as spire-server prints it.
func codeText(s *typespb.Status) string {
	return codes.Code(s.GetCode()).String() // unknown numbers print as such
}

// failed says whether a result is a failure.
func failed(s *typespb.Status) bool { return codes.Code(s.GetCode()) != codes.OK }
