package issue

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"time"
)

// Issued is a signed certificate.
type Issued struct {
	DER                 []byte
	NotBefore, NotAfter time.Time
	Serial              *big.Int
}

// profile is what a certificate below an issuer must say, and how the caller
// asked for it.
type profile struct {
	serial              *big.Int
	subject, spki, ski  []byte
	notBefore, notAfter time.Time
	extensions          int // anything more was smuggled in
	// further compares what differs from one kind of certificate to another.
	further func(*x509.Certificate) error
}

// issue builds the certificate with crypto/x509 and signs it if the bytes to be
// signed meet the profile. There is no way to sign first and look later.
func (i *Issuer) issue(template *x509.Certificate, p profile) (*Issued, error) {
	pub, err := x509.ParsePKIXPublicKey(p.spki)
	if err != nil {
		return nil, fmt.Errorf("public key: %w", err)
	}
	template.SerialNumber, template.RawSubject, template.SubjectKeyId = p.serial, p.subject, p.ski
	template.NotBefore, template.NotAfter = p.notBefore, p.notAfter
	template.SignatureAlgorithm, template.BasicConstraintsValid = i.alg, true
	der, err := x509.CreateCertificate(rand.Reader, template, i.cert, pub, guard{i.key, func(c *x509.Certificate) error { return i.check(c, p) }})
	if err != nil {
		return nil, err
	}
	return &Issued{DER: der, NotBefore: p.notBefore, NotAfter: p.notAfter, Serial: p.serial}, nil
}

// guard is a key that signs a certificate only after it has read it as a
// relying party would, and compared it with what was meant.
type guard struct {
	crypto.Signer
	check func(*x509.Certificate) error
}

var errDigest = errors.New("this key signs certificates it has seen, not digests")

// Sign refuses: a digest cannot be looked at.
func (guard) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, errDigest }

// SignMessage signs a TBSCertificate that passes the check.
func (g guard) SignMessage(random io.Reader, tbs []byte, opts crypto.SignerOpts) ([]byte, error) {
	cert, err := readUnsigned(tbs)
	if err != nil {
		return nil, fmt.Errorf("read the draft: %w", err)
	}
	if err := g.check(cert); err != nil {
		return nil, fmt.Errorf("the draft does not meet its profile: %w", err)
	}
	return crypto.SignMessage(g.Signer, random, tbs, opts)
}

// readUnsigned parses to-be-signed bytes. The parser wants a signature; any
// verifier would refuse the empty one it gets.
func readUnsigned(tbs []byte) (*x509.Certificate, error) {
	var head struct {
		Version   int `asn1:"optional,explicit,default:0,tag:0"`
		Serial    *big.Int
		Algorithm pkix.AlgorithmIdentifier
	}
	if _, err := asn1.Unmarshal(tbs, &head); err != nil {
		return nil, err
	}
	der, err := asn1.Marshal(struct {
		TBS       asn1.RawValue
		Algorithm pkix.AlgorithmIdentifier
		Signature asn1.BitString
	}{asn1.RawValue{FullBytes: tbs}, head.Algorithm, asn1.BitString{}})
	if err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

// check compares a certificate with its profile.
func (i *Issuer) check(cert *x509.Certificate, p profile) error {
	_, caNotAfter := i.Validity()
	switch {
	case cert.Version != 3:
		return fmt.Errorf("version %d", cert.Version)
	case cert.SignatureAlgorithm != i.alg:
		return fmt.Errorf("signature algorithm %v", cert.SignatureAlgorithm)
	case cert.SerialNumber.Cmp(p.serial) != 0 || p.serial.Sign() <= 0 || p.serial.Cmp(maxSerial) > 0:
		return errors.New("serial number")
	case !bytes.Equal(cert.RawIssuer, i.cert.RawSubject):
		return errors.New("issuer is not the CA's subject")
	case !bytes.Equal(cert.RawSubject, p.subject):
		return errors.New("subject")
	case !bytes.Equal(cert.RawSubjectPublicKeyInfo, p.spki):
		return errors.New("public key")
	case !cert.NotBefore.Equal(p.notBefore) || !cert.NotAfter.Equal(p.notAfter):
		return errors.New("validity")
	case !cert.NotAfter.After(cert.NotBefore):
		return fmt.Errorf("not after %s is not later than not before %s", cert.NotAfter, cert.NotBefore)
	case cert.NotAfter.After(caNotAfter):
		return fmt.Errorf("not after %s is later than the CA's %s", cert.NotAfter, caNotAfter)
	case !cert.BasicConstraintsValid:
		return errors.New("basic constraints")
	case !bytes.Equal(cert.SubjectKeyId, p.ski) || !bytes.Equal(cert.AuthorityKeyId, i.cert.SubjectKeyId):
		return errors.New("key identifiers")
	case len(cert.IPAddresses)+len(cert.EmailAddresses) > 0:
		return errors.New("IP or email SANs")
	case len(cert.Extensions) != p.extensions || len(cert.UnhandledCriticalExtensions) > 0:
		return errors.New("extensions")
	}
	return p.further(cert)
}
