package issue

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"math/big"
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

// downstreamUnit is the OU that SPIRE Server gives CAs one step below a root.
const downstreamUnit = "DOWNSTREAM-1"

// caExtensions is the number of extensions of an intermediate.
const caExtensions = 5

// PrepareIntermediate builds the CA certificate of a downstream server and
// checks it.
func (i *Issuer) PrepareIntermediate(in Intermediate) (*Draft, error) {
	in.NotBefore, in.NotAfter = in.NotBefore.UTC().Truncate(time.Second), in.NotAfter.UTC().Truncate(time.Second)
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("make a serial number: %w", err)
	}
	name := i.cert.Subject
	name.OrganizationalUnit = []string{downstreamUnit}
	subject, err := asn1.Marshal(name.ToRDNSequence())
	if err != nil {
		return nil, fmt.Errorf("encode the subject: %w", err)
	}
	ski, err := subjectKeyID(in.PublicKey)
	if err != nil {
		return nil, err
	}
	tbs := i.build(serial, subject, in.PublicKey, in.NotBefore, in.NotAfter,
		extCAKeyUsage,
		extCABasic,
		extension(oidSubjectKeyID, false, tlv(tagOctets, ski)),
		i.extAuthorityKeyID,
		extension(oidSAN, false, tlv(tagSequence, tlv(tagContext6, []byte(in.TrustDomain.IDString())))),
	)
	if err := i.checkIntermediate(tbs, in, serial, subject, ski); err != nil {
		return nil, fmt.Errorf("downstream CA certificate of %s does not meet its profile: %w", in.TrustDomain, err)
	}
	return &Draft{issuer: i, tbs: tbs, NotBefore: in.NotBefore, NotAfter: in.NotAfter, Serial: serial}, nil
}

func (i *Issuer) checkIntermediate(tbs []byte, in Intermediate, serial *big.Int, subject, ski []byte) error {
	cert, err := i.parseDraft(tbs)
	if err != nil {
		return err
	}
	if err := i.checkCommon(cert, serial, subject, in.PublicKey, ski, in.NotBefore, in.NotAfter); err != nil {
		return err
	}
	switch {
	case in.TrustDomain.IsZero():
		return errors.New("no trust domain")
	case bytes.Equal(cert.RawSubject, cert.RawIssuer):
		return errors.New("subject is the issuer's")
	case !cert.BasicConstraintsValid || !cert.IsCA || cert.MaxPathLen >= 0:
		return errors.New("basic constraints")
	case cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign:
		return fmt.Errorf("key usage %b", cert.KeyUsage)
	case len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) > 0:
		return errors.New("extended key usage")
	case len(cert.URIs) != 1 || cert.URIs[0].String() != in.TrustDomain.IDString():
		return fmt.Errorf("URI SANs %v", cert.URIs)
	case len(cert.DNSNames) > 0:
		return fmt.Errorf("DNS SANs %q", cert.DNSNames)
	case len(cert.Extensions) != caExtensions:
		return errors.New("extensions")
	}
	return nil
}
