package registration

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"net/url"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/apimachinery/pkg/types"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

// federatedState is a ClusterFederatedTrustDomain.
type federatedState struct {
	*source
	// spec is the last valid one.
	relationship Relationship
	bundle       *embedded.Bundle // nil = none given
	hash         string           // of the bundle's text, "" = none given
	applied      string           // hash of the text last given to the authority
	// loses says that an older resource declares the trust domain too.
	loses       bool
	bundleErr   error
	relationErr error
}

var (
	errOwnDomain      = errors.New("trustDomain: is this authority's own")
	errEndpointNeeded = errors.New("bundleEndpointProfile: https_spiffe needs endpointSPIFFEID")
	errEndpointWeb    = errors.New("bundleEndpointProfile: https_web has no endpointSPIFFEID")
	errURL            = errors.New("bundleEndpointURL: must be an https URL with a host and without user name or password")
)

// setFederated takes over a ClusterFederatedTrustDomain.
func (x *engine) setFederated(c *v1alpha1.ClusterFederatedTrustDomain) {
	x.replaceNamed(kindFederated, c.Name, c.UID)
	if !x.handles(c.Spec.ClassName) {
		x.notOurs(kindFederated, c.Name, c.UID, c.Spec.ClassName)
		return
	}
	delete(x.otherClass, kindFederated+"/"+c.Name)
	f := x.federated[c.UID]
	if f == nil {
		f = &federatedState{source: newSource(kindFederated, &c.ObjectMeta), applied: c.Status.BundleHash}
		x.federated[c.UID] = f
	}
	unchanged := f.same(&c.ObjectMeta)
	f.meta(&c.ObjectMeta)
	f.observed.federated = &c.Status
	x.touch(f.source)
	if unchanged {
		return
	}
	x.federationDirty = true
	r, b, err := x.parseFederated(&c.Spec)
	x.accept(f.source, err)
	if err != nil {
		return
	}
	f.relationship, f.bundle, f.hash = r, b, ""
	if b != nil {
		sum := sha256.Sum256([]byte(c.Spec.TrustDomainBundle))
		f.hash = hex.EncodeToString(sum[:])
	}
}

func (x *engine) deleteFederated(uid types.UID) {
	f := x.federated[uid]
	if f == nil {
		return
	}
	x.dropSource(f.source)
	delete(x.federated, uid)
	x.federationDirty = true
}

func (s *settings) parseFederated(spec *v1alpha1.ClusterFederatedTrustDomainSpec) (Relationship, *embedded.Bundle, error) {
	var r Relationship
	var err error
	if r.TrustDomain, err = spiffeid.TrustDomainFromString(spec.TrustDomain); err != nil {
		return r, nil, fmt.Errorf("trustDomain: %w", err)
	}
	if r.TrustDomain == s.TrustDomain {
		return r, nil, errOwnDomain
	}
	u, err := url.Parse(spec.BundleEndpointURL)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil {
		return r, nil, errURL
	}
	r.URL = spec.BundleEndpointURL
	switch profile := spec.BundleEndpointProfile; profile.Type {
	case v1alpha1.HTTPSWeb:
		if profile.EndpointSPIFFEID != "" {
			return r, nil, errEndpointWeb
		}
	case v1alpha1.HTTPSSPIFFE:
		if profile.EndpointSPIFFEID == "" {
			return r, nil, errEndpointNeeded
		}
		if r.EndpointSPIFFEID, err = spiffeid.FromString(profile.EndpointSPIFFEID); err != nil {
			return r, nil, fmt.Errorf("bundleEndpointProfile: endpointSPIFFEID: %w", err)
		}
	default:
		return r, nil, fmt.Errorf("bundleEndpointProfile: type %q is neither https_web nor https_spiffe", profile.Type)
	}
	if spec.TrustDomainBundle == "" {
		return r, nil, nil
	}
	b, err := parseBundle(r.TrustDomain, spec.TrustDomainBundle)
	if err != nil {
		return r, nil, fmt.Errorf("trustDomainBundle: %w", err)
	}
	return r, b, nil
}

func parseBundle(td spiffeid.TrustDomain, text string) (*embedded.Bundle, error) {
	in, err := spiffebundle.Parse(td, []byte(text))
	if err != nil {
		return nil, err
	}
	return embedded.BundleOf(in)
}

// flushFederation gives the authority bundles and relationships.
func (x *engine) flushFederation(ctx context.Context) {
	if !x.federationDirty {
		return
	}
	x.federationDirty = false
	winners := make(map[spiffeid.TrustDomain]*federatedState)
	for _, f := range x.federated {
		if f.valid == 0 {
			continue
		}
		if o := winners[f.relationship.TrustDomain]; o == nil || f.before(o.source) {
			winners[f.relationship.TrustDomain] = f
		}
	}
	for _, f := range x.federated {
		x.touch(f.source)
		f.loses = f.valid > 0 && winners[f.relationship.TrustDomain] != f
		if f.loses {
			f.bundleErr, f.relationErr = nil, nil
		}
	}
	ok := true
	for td, f := range winners {
		f.bundleErr = x.applyBundle(ctx, td, f)
		ok = ok && f.bundleErr == nil
	}
	if x.Relationships != nil && !x.applyRelationships(ctx, winners) {
		ok = false
	}
	if !ok {
		x.retryFederation()
	}
}

// applyBundle stores the bundle in the resource if its text is new or the
// authority has none: what has been refreshed since is not set back.
func (x *engine) applyBundle(ctx context.Context, td spiffeid.TrustDomain, f *federatedState) error {
	if f.bundle == nil || f.hash == f.applied && x.bundles[td] {
		return nil
	}
	if err := x.Authority.SetFederatedBundle(ctx, f.bundle); err != nil {
		return err
	}
	f.applied = f.hash
	have := maps.Clone(x.bundles)
	if have == nil {
		have = make(map[spiffeid.TrustDomain]bool)
	}
	have[td] = true
	x.setBundles(have)
	return nil
}

func (x *engine) applyRelationships(ctx context.Context, winners map[spiffeid.TrustDomain]*federatedState) bool {
	have, err := x.Relationships.Registered(ctx)
	if err != nil {
		for _, f := range winners {
			f.relationErr = err
		}
		return false
	}
	ok := true
	known := make(map[spiffeid.TrustDomain]Relationship, len(have))
	for _, r := range have {
		known[r.TrustDomain] = r
		if winners[r.TrustDomain] == nil && !x.refusedUnknown() {
			ok = x.Relationships.DeleteRelationship(ctx, r.TrustDomain) == nil && ok
		}
	}
	for td, f := range winners {
		f.relationErr = nil
		if known[td] != f.relationship {
			f.relationErr = x.Relationships.SetRelationship(ctx, f.relationship)
		}
		ok = ok && f.relationErr == nil
	}
	return ok
}

// watchRelationships has the statuses follow what becomes of the endpoints, and
// sets back what somebody else made of a declared relationship.
func (x *engine) watchRelationships(ctx context.Context) {
	for {
		changed := x.Relationships.Changed()
		x.post(func() { x.federationDirty = true })
		select {
		case <-changed:
		case <-ctx.Done():
			return
		}
	}
}

// refusedUnknown says whether some resource is refused whose last valid version is
// not known: until it is mended, no relationship is taken for abandoned.
func (x *engine) refusedUnknown() bool {
	for _, f := range x.federated {
		if f.valid == 0 && f.refused != nil {
			return true
		}
	}
	return false
}
