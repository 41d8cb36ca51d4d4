package issue

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Intermediate is what goes into the CA certificate of a downstream server of
// the same trust domain.
type Intermediate struct {
	TrustDomain spiffeid.TrustDomain
	PublicKey   []byte // SubjectPublicKeyInfo
	// NotBefore and NotAfter are cut to whole seconds and lie within the
	// issuer's.
	NotBefore, NotAfter time.Time
}

// downstreamUnit starts the OU that SPIRE Server gives CAs below it; a number
// follows, which is that of the certificates it sends as its own chain.
const downstreamUnit = "DOWNSTREAM-"

// ErrPathLength says that the CAs above allow none below.
var ErrPathLength = errors.New("the path length of a certificate above allows no further CA")

// caExtensions: key usage, basic constraints, two key identifiers, SAN.
const caExtensions = 5

// IssueIntermediate signs the CA certificate of a downstream server.
func (i *Issuer) IssueIntermediate(in Intermediate) (*Issued, error) {
	if in.TrustDomain.IsZero() {
		return nil, errors.New("downstream CA certificate without a trust domain")
	}
	if i.room() < 1 {
		return nil, ErrPathLength
	}
	subject, err := i.downstreamSubject()
	if err != nil {
		return nil, fmt.Errorf("encode the subject: %w", err)
	}
	p, err := newProfile(subject, in.PublicKey, in.NotBefore, in.NotAfter)
	if err != nil {
		return nil, err
	}
	p.extensions, p.further = caExtensions, in.check
	issued, err := i.issue(&x509.Certificate{
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		IsCA:     true,
		URIs:     []*url.URL{in.TrustDomain.ID().URL()},
	}, p)
	if err == nil && i.constrained {
		err = i.verify(issued)
	}
	if err != nil {
		return nil, err
	}
	return issued, nil
}

// downstreamSubject is this CA's subject with another unit. A CA that is a
// downstream itself may have the unit that its own downstreams would get; they
// get the next, or issuer and subject would be one name.
func (i *Issuer) downstreamSubject() ([]byte, error) {
	name := i.cert.Subject
	for n := max(1, len(i.above)); ; n++ {
		name.OrganizationalUnit = []string{downstreamUnit + strconv.Itoa(n)}
		subject, err := asn1.Marshal(name.ToRDNSequence())
		if err != nil || !bytes.Equal(subject, i.cert.RawSubject) {
			return subject, err
		}
	}
}

// check compares what is a downstream CA's alone.
func (in *Intermediate) check(cert *x509.Certificate) error {
	switch {
	case bytes.Equal(cert.RawSubject, cert.RawIssuer):
		return errors.New("subject is the issuer's")
	case !cert.IsCA || cert.MaxPathLen >= 0:
		return errors.New("basic constraints")
	case cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign:
		return fmt.Errorf("key usage %b", cert.KeyUsage)
	case len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) > 0:
		return errors.New("extended key usage")
	case len(cert.URIs) != 1 || cert.URIs[0].String() != in.TrustDomain.IDString():
		return fmt.Errorf("URI SANs %v", cert.URIs)
	case len(cert.DNSNames) > 0:
		return fmt.Errorf("DNS SANs %q", cert.DNSNames)
	}
	return nil
}
