package issue

import (
	"bytes"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"time"
)

// Draft is a to-be-signed certificate that was checked against its profile.
// Good for one signature by the issuer that prepared it.
type Draft struct {
	issuer *Issuer
	tbs    []byte
	// NotBefore, NotAfter and Serial are as in the certificate.
	NotBefore, NotAfter time.Time
	Serial              *big.Int
}

// build is a TBSCertificate below this issuer, with the extensions in the
// order given.
func (i *Issuer) build(serial *big.Int, subject, spki []byte, notBefore, notAfter time.Time, extensions ...[]byte) []byte {
	return tlv(tagSequence,
		derVersion3,
		derInteger(serial.Bytes()),
		i.signing.der,
		i.cert.RawSubject,
		tlv(tagSequence, derTime(notBefore), derTime(notAfter)),
		subject,
		spki,
		tlv(tagExplicit3, tlv(tagSequence, extensions...)),
	)
}

// parseDraft reads to-be-signed bytes as a relying party would. The parser
// wants a signature; any verifier would refuse this one.
func (i *Issuer) parseDraft(tbs []byte) (*x509.Certificate, error) {
	return x509.ParseCertificate(tlv(tagSequence, tbs, i.signing.der, tlv(tagBitString, []byte{0, 0})))
}

// checkCommon compares what every certificate below this issuer has in common.
func (i *Issuer) checkCommon(cert *x509.Certificate, serial *big.Int, subject, spki, ski []byte, notBefore, notAfter time.Time) error {
	switch {
	case cert.Version != 3:
		return fmt.Errorf("version %d", cert.Version)
	case cert.SignatureAlgorithm != i.signing.alg:
		return fmt.Errorf("signature algorithm %v", cert.SignatureAlgorithm)
	case cert.SerialNumber.Cmp(serial) != 0 || serial.Sign() <= 0 || serial.Cmp(maxSerial) > 0:
		return errors.New("serial number")
	case !bytes.Equal(cert.RawIssuer, i.cert.RawSubject):
		return errors.New("issuer is not the CA's subject")
	case !bytes.Equal(cert.RawSubject, subject):
		return errors.New("subject")
	case !bytes.Equal(cert.RawSubjectPublicKeyInfo, spki):
		return errors.New("public key")
	case !cert.NotBefore.Equal(notBefore) || !cert.NotAfter.Equal(notAfter):
		return errors.New("validity")
	case !cert.NotAfter.After(cert.NotBefore):
		return fmt.Errorf("not after %s is not later than not before %s", cert.NotAfter, cert.NotBefore)
	case cert.NotAfter.After(i.cert.NotAfter):
		return fmt.Errorf("not after %s is later than the CA's %s", cert.NotAfter, i.cert.NotAfter)
	case !bytes.Equal(cert.SubjectKeyId, ski) || !bytes.Equal(cert.AuthorityKeyId, i.cert.SubjectKeyId):
		return errors.New("key identifiers")
	case len(cert.IPAddresses)+len(cert.EmailAddresses) > 0:
		return errors.New("IP or email SANs")
	case len(cert.UnhandledCriticalExtensions) > 0:
		return errors.New("critical extensions")
	}
	return nil
}
