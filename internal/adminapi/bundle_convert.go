package adminapi

import (
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// bundleToWire has every field set; masks are applied afterwards.
func bundleToWire(b *embedded.Bundle) *typespb.Bundle {
	out := &typespb.Bundle{
		TrustDomain:    b.TrustDomain.Name(),
		RefreshHint:    int64(b.RefreshHint / time.Second),
		SequenceNumber: b.Sequence,
	}
	for _, root := range b.X509 {
		out.X509Authorities = append(out.X509Authorities, &typespb.X509Certificate{Asn1: root.Certificate.Raw, Tainted: root.Tainted})
	}
	for _, key := range b.JWT {
		out.JwtAuthorities = append(out.JwtAuthorities, &typespb.JWTKey{
			PublicKey: key.PublicKey, KeyId: key.ID, ExpiresAt: spirewire.TimeToWire(key.ExpiresAt), Tainted: key.Tainted,
		})
	}
	return out
}

// x509FromWire reads roots; an element may hold several certificates one after
// the other but not none. Tainting is the authority's and cannot be set.
func x509FromWire(in []*typespb.X509Certificate) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for _, c := range in {
		certs, err := x509.ParseCertificates(c.GetAsn1())
		switch {
		case err != nil:
			return nil, err
		case len(certs) == 0:
			return nil, errors.New("no certificate found")
		}
		out = append(out, certs...)
	}
	return out, nil
}

func jwtFromWire(in []*typespb.JWTKey) ([]embedded.JWTKey, error) {
	var out []embedded.JWTKey
	for _, k := range in {
		_, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		switch {
		case err != nil:
			return nil, err
		case k.GetKeyId() == "":
			return nil, errors.New("missing key ID")
		}
		out = append(out, embedded.JWTKey{ID: k.GetKeyId(), PublicKey: k.GetPublicKey(), ExpiresAt: spirewire.TimeFromWire(k.GetExpiresAt())})
	}
	return out, nil
}

// federatedDomain reads the name of a foreign trust domain; what is the verb
// of the refusal for the own one.
func federatedDomain(own spiffeid.TrustDomain, name, what string) (spiffeid.TrustDomain, error) {
	td, err := spiffeid.TrustDomainFromString(name)
	switch {
	case err != nil:
		return td, invalid("trust domain argument is not valid", err)
	case td == own:
		return td, invalid(what, nil)
	}
	return td, nil
}

// bundleFromWire reads a federated bundle.
func bundleFromWire(own spiffeid.TrustDomain, in *typespb.Bundle, what string) (*embedded.Bundle, error) {
	td, err := federatedDomain(own, in.GetTrustDomain(), what)
	if err != nil {
		return nil, err
	}
	out := &embedded.Bundle{
		TrustDomain: td,
		RefreshHint: time.Duration(in.GetRefreshHint()) * time.Second,
		Sequence:    in.GetSequenceNumber(),
	}
	roots, err := x509FromWire(in.GetX509Authorities())
	if err != nil {
		return nil, invalid("failed to convert bundle: unable to parse X.509 authority", err)
	}
	for _, cert := range roots {
		out.X509 = append(out.X509, embedded.Root{Certificate: cert})
	}
	if out.JWT, err = jwtFromWire(in.GetJwtAuthorities()); err != nil {
		return nil, invalid("failed to convert bundle: unable to parse JWT authority", err)
	}
	if in.GetRefreshHint() < 0 || in.GetRefreshHint() > maxRefreshHint {
		return nil, invalid("failed to convert bundle", fmt.Errorf("refresh hint of %d s is out of range", in.GetRefreshHint()))
	}
	return out, nil
}

// maxRefreshHint, in seconds, is what the store takes: centuries.
const maxRefreshHint = 1 << 33
