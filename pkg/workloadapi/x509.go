package workloadapi

import (
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"log/slog"
	"maps"
	"runtime"
	"slices"
	"sync"
	"weak"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// views remembers what pictures look like as X.509-SVID responses, so that all
// callers that share a picture share the response. An entry goes when the
// picture is collected.
type views struct {
	m sync.Map // weak.Pointer[svid.Update] -> *view[workload.X509SVIDResponse]
}

func (c *views) get(u *svid.Update, build func(*svid.Update) view[workload.X509SVIDResponse]) view[workload.X509SVIDResponse] {
	key := weak.Make(u)
	if v, ok := c.m.Load(key); ok {
		return *v.(*view[workload.X509SVIDResponse])
	}
	v := build(u)
	if _, loaded := c.m.LoadOrStore(key, &v); !loaded {
		runtime.AddCleanup(u, func(key weak.Pointer[svid.Update]) { c.m.Delete(key) }, key)
	}
	return v
}

// FetchX509SVID implements the Workload API.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, ss grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	const method = "FetchX509SVID"
	ctx := ss.Context()
	return s.guard(ctx, method, func() error {
		return stream(s, ctx, method, ss.Send, func(u *svid.Update) view[workload.X509SVIDResponse] {
			return s.views.get(u, s.x509View)
		})
	})
}

// FetchX509Bundles implements the Workload API.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, ss grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	const method = "FetchX509Bundles"
	ctx := ss.Context()
	return s.guard(ctx, method, func() error {
		return stream(s, ctx, method, ss.Send, s.x509Bundles)
	})
}

// standingOf is that of a caller that wants an identity.
func standingOf(u *svid.Update, have int) standing {
	switch {
	case have > 0:
		return ready
	case len(u.Identities)+len(u.Late) > 0, !u.Synced, u.Own == nil:
		return pending
	}
	return absent
}

// synced says whether the agent knows enough to call a caller unregistered.
func synced(u *svid.Update) bool { return u.Synced && u.Own != nil }

// digest collects content; each part counts with its length.
type digest struct{ h hash.Hash }

func (d digest) add(parts ...[]byte) {
	for _, p := range parts {
		d.h.Write(protowire.AppendVarint(nil, uint64(len(p))))
		d.h.Write(p)
	}
}

func (d digest) version() string { return hex.EncodeToString(d.h.Sum(nil)[:16]) }

func (s *Server) x509View(u *svid.Update) view[workload.X509SVIDResponse] {
	v := view[workload.X509SVIDResponse]{synced: synced(u), trust: u.Roots, response: new(workload.X509SVIDResponse)}
	d := digest{sha256.New()}
	own := x509DER(u.Own)
	if len(own) == 0 { // a response without the own bundle is of no use
		v.standing = standingOf(u, 0)
		if len(u.Identities) > 0 {
			v.standing = pending
		}
		return v
	}
	lost := beaten(matched(u))
	s.warnHints(lost)
	for _, ident := range u.Identities {
		if lost[ident.Entry] {
			continue
		}
		chain := slices.Concat(ident.SVID.ChainDER...)
		v.response.Svids = append(v.response.Svids, &workload.X509SVID{
			SpiffeId:    ident.Entry.SPIFFEID.String(),
			X509Svid:    chain,
			X509SvidKey: ident.SVID.KeyDER,
			Bundle:      own,
			Hint:        ident.Entry.Hint,
		})
		v.serials = append(v.serials, ident.SVID.Serial)
		d.add([]byte(ident.Entry.SPIFFEID.String()), chain, []byte(ident.Entry.Hint))
	}
	d.add(nil, own)
	v.standing = standingOf(u, len(v.response.GetSvids()))
	for _, td := range foreign(u) {
		if der := x509DER(u.Federated[td]); len(der) > 0 {
			if v.response.FederatedBundles == nil {
				v.response.FederatedBundles = make(map[string][]byte)
			}
			v.response.FederatedBundles[td.IDString()] = der
			d.add([]byte(td.Name()), der)
		}
	}
	v.version = d.version()
	return v
}

func (s *Server) warnHints(lost map[*entry.Entry]bool) {
	for e := range lost {
		s.log.Warn("entry left out: an older one has the same hint",
			slog.String("entry_id", e.ID), slog.String("spiffe_id", e.SPIFFEID.String()), slog.String("hint", e.Hint))
	}
}

// foreign are the federated trust domains in order.
func foreign(u *svid.Update) []spiffeid.TrustDomain {
	tds := slices.SortedFunc(maps.Keys(u.Federated), spiffeid.TrustDomain.Compare)
	return slices.DeleteFunc(tds, func(td spiffeid.TrustDomain) bool {
		return u.Own != nil && td == u.Own.TrustDomain()
	})
}

// x509DER is a bundle's X.509 authorities, concatenated; nil for none.
func x509DER(b *spiffebundle.Bundle) []byte {
	if b == nil {
		return nil
	}
	var out []byte
	for _, cert := range b.X509Authorities() {
		out = append(out, cert.Raw...)
	}
	return out
}

// bundles are those a caller may have. Callers without an identity get the own
// one if the configuration says so.
func (s *Server) bundles(u *svid.Update) (list []*spiffebundle.Bundle, st standing) {
	registered := len(u.Identities)+len(u.Late) > 0
	switch {
	case !registered && !s.config.AllowUnauthenticatedVerifiers:
		return nil, standingOf(u, 0)
	case u.Own == nil:
		return nil, pending
	}
	list = append(list, u.Own)
	if registered {
		for _, td := range foreign(u) {
			if b := u.Federated[td]; b != nil {
				list = append(list, b)
			}
		}
	}
	return list, ready
}

func (s *Server) x509Bundles(u *svid.Update) view[workload.X509BundlesResponse] {
	v := view[workload.X509BundlesResponse]{synced: synced(u), trust: u.Roots, response: &workload.X509BundlesResponse{Bundles: make(map[string][]byte)}}
	list, st := s.bundles(u)
	d := digest{sha256.New()}
	for _, b := range list {
		if der := x509DER(b); len(der) > 0 {
			v.response.Bundles[b.TrustDomain().IDString()] = der
			d.add([]byte(b.TrustDomain().Name()), der)
		}
	}
	if st == ready && len(v.response.GetBundles()) == 0 {
		st = pending
	}
	v.standing, v.version = st, d.version()
	return v
}
