package issue

import (
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
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

var (
	errWrongIssuer = errors.New("draft was prepared by another issuer or is used up")
	maxSerial      = new(big.Int).Sub(new(big.Int).Lsh(big.NewInt(1), 128), big.NewInt(1))
)

// newSerial is a random number from 1 to 2^128-1.
func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, maxSerial)
	if err != nil {
		return nil, err
	}
	return n.Add(n, big.NewInt(1)), nil
}

// PrepareLeaf builds the certificate of a workload and checks it.
func (i *Issuer) PrepareLeaf(l Leaf) (*Draft, error) {
	l.NotBefore, l.NotAfter = l.NotBefore.UTC().Truncate(time.Second), l.NotAfter.UTC().Truncate(time.Second)
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("make a serial number: %w", err)
	}
	subject, err := l.subject()
	if err != nil {
		return nil, fmt.Errorf("encode the subject: %w", err)
	}
	ski, err := subjectKeyID(l.PublicKey)
	if err != nil {
		return nil, err
	}
	tbs := i.buildLeaf(l, serial, subject, ski)
	if err := i.checkLeaf(tbs, l, serial, subject, ski); err != nil {
		return nil, fmt.Errorf("certificate for %s does not meet its profile: %w", l.ID, err)
	}
	return &Draft{issuer: i, tbs: tbs, NotBefore: l.NotBefore, NotAfter: l.NotAfter, Serial: serial}, nil
}

func (i *Issuer) buildLeaf(l Leaf, serial *big.Int, subject, ski []byte) []byte {
	sans := make([][]byte, 0, len(l.DNSNames)+1)
	for _, name := range l.DNSNames {
		sans = append(sans, tlv(tagContext2, []byte(name)))
	}
	sans = append(sans, tlv(tagContext6, []byte(l.ID.String())))
	return i.build(serial, subject, l.PublicKey, l.NotBefore, l.NotAfter,
		extLeafKeyUsage,
		extLeafExtUse,
		extLeafBasic,
		extension(oidSubjectKeyID, false, tlv(tagOctets, ski)),
		i.extAuthorityKeyID,
		extension(oidSAN, false, tlv(tagSequence, sans...)),
	)
}

// leafExtensions is the number of extensions of the profile: anything more was
// smuggled in.
const leafExtensions = 6

// checkLeaf compares what a relying party would read with the profile.
func (i *Issuer) checkLeaf(tbs []byte, l Leaf, serial *big.Int, subject, ski []byte) error {
	cert, err := i.parseDraft(tbs)
	if err != nil {
		return err
	}
	if err := i.checkCommon(cert, serial, subject, l.PublicKey, ski, l.NotBefore, l.NotAfter); err != nil {
		return err
	}
	switch {
	case l.ID.IsZero():
		return errors.New("no SPIFFE ID")
	case len(l.DNSNames) > 0 && cert.Subject.CommonName != l.DNSNames[0]:
		return errors.New("common name is not the first DNS name")
	case l.Subject == nil && (!slices.Equal(cert.Subject.Country, leafName.Country) || !slices.Equal(cert.Subject.Organization, leafName.Organization)):
		return errors.New("subject is not C=US, O=SPIRE")
	case !cert.BasicConstraintsValid || cert.IsCA:
		return errors.New("basic constraints")
	case cert.KeyUsage != x509.KeyUsageDigitalSignature|x509.KeyUsageKeyEncipherment|x509.KeyUsageKeyAgreement:
		return fmt.Errorf("key usage %b", cert.KeyUsage)
	case !slices.Equal(cert.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) || len(cert.UnknownExtKeyUsage) > 0:
		return errors.New("extended key usage")
	case len(cert.URIs) != 1 || cert.URIs[0].String() != l.ID.String():
		return fmt.Errorf("URI SANs %v", cert.URIs)
	case !slices.Equal(cert.DNSNames, l.DNSNames):
		return fmt.Errorf("DNS SANs %q", cert.DNSNames)
	case len(cert.Extensions) != leafExtensions:
		return errors.New("extensions")
	}
	return nil
}
