package spireserver

import (
	"context"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

// ownBundle is the own trust bundle with what is tainted in it. Immutable.
type ownBundle struct {
	*spiffebundle.Bundle
	taintedX509 map[string]bool
	taintedJWT  map[string]bool
}

// bundleStore is what is known of the bundles. Safe for concurrent use.
type bundleStore struct {
	mu        sync.Mutex
	own       *ownBundle
	federated map[spiffeid.TrustDomain]*spiffebundle.Bundle
	complete  bool      // federated bundles were asked for once
	replaced  time.Time // the agent's SVID, because of a taint
}

// bundleFromWire reads a bundle of a trust domain. Tainted authorities are in
// it: they count until they are revoked.
func bundleFromWire(td spiffeid.TrustDomain, in *typespb.Bundle) (*ownBundle, error) {
	if name, err := spiffeid.TrustDomainFromString(in.GetTrustDomain()); err != nil || name != td {
		return nil, fmt.Errorf("%w: the bundle of %s says it is of %q", errProtocol, td, in.GetTrustDomain())
	}
	out := &ownBundle{Bundle: spiffebundle.New(td), taintedX509: map[string]bool{}, taintedJWT: map[string]bool{}}
	for i, a := range in.GetX509Authorities() {
		certs, err := x509.ParseCertificates(a.GetAsn1())
		if err != nil || len(certs) == 0 {
			return nil, fmt.Errorf("bundle of %s: X.509 authority %d is no certificate: %w", td, i, errors.Join(errProtocol, err))
		}
		for _, cert := range certs {
			out.AddX509Authority(cert)
			if a.GetTainted() && len(cert.SubjectKeyId) > 0 {
				out.taintedX509[hex.EncodeToString(cert.SubjectKeyId)] = true
			}
		}
	}
	for _, k := range in.GetJwtAuthorities() {
		pub, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err == nil {
			err = out.AddJWTAuthority(k.GetKeyId(), pub)
		}
		if err != nil {
			return nil, fmt.Errorf("bundle of %s: JWT authority %q: %w", td, k.GetKeyId(), err)
		}
		if k.GetTainted() {
			out.taintedJWT[k.GetKeyId()] = true
		}
	}
	out.SetSequenceNumber(in.GetSequenceNumber())
	// A hint that no time.Duration can hold says nothing.
	if hint := in.GetRefreshHint(); hint > 0 && hint < 1<<32 {
		out.SetRefreshHint(time.Duration(hint) * time.Second)
	}
	return out, nil
}

// fetchOwn asks for the own bundle. One without roots cannot be right: whoever
// took it would trust nobody.
func (c *Client) fetchOwn(ctx context.Context, cc grpc.ClientConnInterface) (*ownBundle, error) {
	res, err := bundlepb.NewBundleClient(cc).GetBundle(ctx, &bundlepb.GetBundleRequest{})
	if err != nil {
		return nil, err
	}
	return c.ownFromWire(res)
}

func (c *Client) ownFromWire(in *typespb.Bundle) (*ownBundle, error) {
	b, err := bundleFromWire(c.cfg.TrustDomain, in)
	if err != nil {
		return nil, err
	}
	if len(b.X509Authorities()) == 0 {
		return nil, fmt.Errorf("%w: the trust bundle holds no X.509 authority", errProtocol)
	}
	return b, nil
}

// refreshOwn asks for the own bundle as the attested agent and takes it over.
func (c *Client) refreshOwn(ctx context.Context) error {
	var b *ownBundle
	err := c.call(ctx, "GetBundle", func(ctx context.Context, cc grpc.ClientConnInterface) (err error) {
		b, err = c.fetchOwn(ctx, cc)
		return err
	})
	if err != nil {
		return fmt.Errorf("get trust bundle: %w", err)
	}
	if c.report.status().Watching && c.olderOwn(b) {
		return nil // what was pushed meanwhile is newer
	}
	c.takeOwn(b)
	return nil
}

func (c *Client) olderOwn(b *ownBundle) bool {
	c.store.mu.Lock()
	defer c.store.mu.Unlock()
	if c.store.own == nil {
		return false
	}
	have, _ := c.store.own.SequenceNumber()
	got, _ := b.SequenceNumber()
	return got < have
}

// takeOwn makes b the own bundle, for serving and for verifying the server.
func (c *Client) takeOwn(b *ownBundle) {
	c.store.mu.Lock()
	old := c.store.own
	if old != nil && old.Equal(b.Bundle) {
		b.Bundle = old.Bundle // what did not change keeps its pointer
	}
	c.store.own = b
	c.store.mu.Unlock()
	c.setTrust(b.X509Bundle(), true)
	if old == nil || old.Bundle != b.Bundle {
		c.stateChanged()
	}
	c.publishBundles()
	if id := c.identity.Get(); id != nil && c.taintedSVID(id, b) && c.store.mayReplace() {
		c.tainted.Store(id) // replaced at once
		signal(c.wakeID)
	}
}

// mayReplace says whether it is time to try for an agent SVID below another
// authority: a server may sign with a tainted one for a while.
func (s *bundleStore) mayReplace() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := time.Now()
	if now.Sub(s.replaced) < time.Minute {
		return false
	}
	s.replaced = now
	return true
}

// taintedSVID says whether the agent's own SVID hangs on a tainted authority.
func (c *Client) taintedSVID(id *nodeSVID, b *ownBundle) bool {
	return slices.ContainsFunc(id.Certificates, func(cert *x509.Certificate) bool {
		return b.taintedX509[hex.EncodeToString(cert.AuthorityKeyId)]
	})
}

// refreshFederated asks for the bundles of foreign trust domains. One that
// cannot be had keeps its last content and holds up no other; one the server
// does not know is given up.
func (c *Client) refreshFederated(ctx context.Context, tds []spiffeid.TrustDomain) error {
	type answer struct {
		bundle *spiffebundle.Bundle
		gone   bool
		err    error
	}
	answers := make([]answer, len(tds))
	var g errgroup.Group
	g.SetLimit(federatedParallel)
	for i, td := range tds {
		g.Go(func() error {
			a := &answers[i]
			a.err = c.call(ctx, "GetFederatedBundle", func(ctx context.Context, cc grpc.ClientConnInterface) error {
				res, err := bundlepb.NewBundleClient(cc).GetFederatedBundle(ctx, &bundlepb.GetFederatedBundleRequest{TrustDomain: td.Name()})
				if err != nil {
					return err
				}
				b, err := bundleFromWire(td, res)
				if err == nil {
					a.bundle = b.Bundle
				}
				return err
			})
			if status.Code(a.err) == codes.NotFound {
				a.gone, a.err = true, nil
			}
			return nil
		})
	}
	_ = g.Wait()
	var errs []error
	c.store.mu.Lock()
	for i, td := range tds {
		switch a := answers[i]; {
		case a.err != nil:
			errs = append(errs, fmt.Errorf("bundle of %s: %w", td, a.err))
		case a.gone:
			c.store.dropFederated(td)
		default:
			c.store.putFederated(a.bundle)
		}
	}
	c.store.complete = true
	c.store.mu.Unlock()
	for _, err := range errs {
		c.log.Warn("federated bundle not received; the last one stays", slog.Any("error", err))
	}
	c.publishBundles()
	return errors.Join(errs...)
}

// keepFederated forgets the bundles nobody federates with any more.
func (s *bundleStore) keepFederated(tds []spiffeid.TrustDomain) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for td := range s.federated {
		if !slices.Contains(tds, td) {
			s.dropFederated(td)
		}
	}
}

// unknownFederated are those of tds without a bundle.
func (s *bundleStore) unknownFederated(tds []spiffeid.TrustDomain) []spiffeid.TrustDomain {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []spiffeid.TrustDomain
	for _, td := range tds {
		if s.federated[td] == nil {
			out = append(out, td)
		}
	}
	return out
}

// dropFederated and putFederated are for holders of mu; the map is replaced,
// because a published set shares it.
func (s *bundleStore) dropFederated(td spiffeid.TrustDomain) {
	if _, ok := s.federated[td]; ok {
		s.federated = maps.Clone(s.federated)
		delete(s.federated, td)
	}
}

func (s *bundleStore) putFederated(b *spiffebundle.Bundle) {
	td := b.TrustDomain()
	if old := s.federated[td]; old != nil && old.Equal(b) {
		return
	}
	s.federated = maps.Clone(s.federated)
	if s.federated == nil {
		s.federated = map[spiffeid.TrustDomain]*spiffebundle.Bundle{}
	}
	s.federated[td] = b
}

// publishBundles makes a new set if anything in it changed. The first comes
// when every bundle has been asked for.
func (c *Client) publishBundles() {
	c.store.mu.Lock()
	defer c.store.mu.Unlock()
	own := c.store.own
	if own == nil || !c.store.complete {
		return
	}
	old := c.bundles.Get()
	next := &authority.BundleSet{
		Version: 1, Own: own.Bundle, Federated: c.store.federated,
		TaintedX509: own.taintedX509, TaintedJWT: own.taintedJWT,
	}
	if old != nil {
		if old.Own == next.Own && maps.Equal(old.Federated, next.Federated) &&
			maps.Equal(old.TaintedX509, next.TaintedX509) && maps.Equal(old.TaintedJWT, next.TaintedJWT) {
			return
		}
		next.Version = old.Version + 1
	}
	c.bundles.Set(next)
}
