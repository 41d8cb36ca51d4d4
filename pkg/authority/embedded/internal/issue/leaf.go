package issue

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Leaf is what goes into a workload X509-SVID.
type Leaf struct {
	ID       spiffeid.ID
	DNSNames []string // in order; the first becomes the CN
	// PublicKey is the SubjectPublicKeyInfo, as PublicKeyFromCSR gives it.
	PublicKey []byte
	// Subject replaces C=US, O=SPIRE when not nil; its CN yields to the first
	// DNS name.
	Subject *pkix.Name
	// NotBefore and NotAfter are cut to whole seconds. NotAfter may not be
	// later than the issuer's.
	NotBefore, NotAfter time.Time
}

// leafName is the subject of an X509-SVID without DNS names.
var leafName = pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}}

// plainSubject is leafName encoded: most certificates have it.
var plainSubject = sync.OnceValues(func() ([]byte, error) { return asn1.Marshal(leafName.ToRDNSequence()) })

func (l *Leaf) subject() ([]byte, error) {
	if l.Subject == nil && len(l.DNSNames) == 0 {
		return plainSubject()
	}
	name := leafName
	if l.Subject != nil {
		name = *l.Subject
	}
	if len(l.DNSNames) > 0 {
		name.CommonName = l.DNSNames[0]
	}
	return asn1.Marshal(name.ToRDNSequence())
}

var maxSerial = new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 128), big.NewInt(1))

// newSerial is a random number from 1 to 2^128-1.
func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, maxSerial)
	if err != nil {
		return nil, err
	}
	return n.Add(n, big.NewInt(1)), nil
}

// IssueLeaf signs the certificate of a workload. Where names are constrained
// above, one that would not verify does not leave.
func (i *Issuer) IssueLeaf(l Leaf) (*Issued, error) {
	issued, err := i.issueLeaf(l)
	if err == nil && i.constrained {
		err = i.verify(issued)
	}
	if err != nil {
		return nil, err
	}
	return issued, nil
}

func (i *Issuer) issueLeaf(l Leaf) (*Issued, error) {
	if l.ID.IsZero() {
		return nil, errors.New("certificate without a SPIFFE ID")
	}
	subject, err := l.subject()
	if err != nil {
		return nil, fmt.Errorf("encode the subject: %w", err)
	}
	p, err := newProfile(subject, l.PublicKey, l.NotBefore, l.NotAfter)
	if err != nil {
		return nil, err
	}
	p.extensions, p.further = leafExtensions, l.check
	return i.issue(&x509.Certificate{
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment | x509.KeyUsageKeyAgreement,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		DNSNames:    l.DNSNames,
		URIs:        []*url.URL{l.ID.URL()},
	}, p)
}

// newProfile draws the serial number and derives the key identifier.
func newProfile(subject, spki []byte, notBefore, notAfter time.Time) (p profile, err error) {
	p = profile{subject: subject, spki: spki, notBefore: notBefore.UTC().Truncate(time.Second), notAfter: notAfter.UTC().Truncate(time.Second)}
	if p.serial, err = newSerial(); err != nil {
		return p, fmt.Errorf("make a serial number: %w", err)
	}
	p.ski, err = subjectKeyID(spki)
	return p, err
}

// leafExtensions: key usage, extended key usage, basic constraints, two key
// identifiers, SAN.
const leafExtensions = 6

// check compares what is a workload's alone.
func (l *Leaf) check(cert *x509.Certificate) error {
	switch {
	case len(l.DNSNames) > 0 && cert.Subject.CommonName != l.DNSNames[0]:
		return errors.New("common name is not the first DNS name")
	case l.Subject == nil && (!slices.Equal(cert.Subject.Country, leafName.Country) || !slices.Equal(cert.Subject.Organization, leafName.Organization)):
		return errors.New("subject is not C=US, O=SPIRE")
	case cert.IsCA:
		return errors.New("it is a CA's")
	case cert.KeyUsage != x509.KeyUsageDigitalSignature|x509.KeyUsageKeyEncipherment|x509.KeyUsageKeyAgreement:
		return fmt.Errorf("key usage %b", cert.KeyUsage)
	case !slices.Equal(cert.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) || len(cert.UnknownExtKeyUsage) > 0:
		return errors.New("extended key usage")
	case len(cert.URIs) != 1 || cert.URIs[0].String() != l.ID.String():
		return fmt.Errorf("URI SANs %v", cert.URIs)
	case !slices.Equal(cert.DNSNames, l.DNSNames):
		return fmt.Errorf("DNS SANs %q", cert.DNSNames)
	}
	return nil
}
