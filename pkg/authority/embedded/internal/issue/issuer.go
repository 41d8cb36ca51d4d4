package issue

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Issuer is a CA certificate and its key, proven to belong together.
type Issuer struct {
	cert *x509.Certificate
	key  crypto.Signer
	alg  x509.SignatureAlgorithm
	hash crypto.Hash
	// above is from the issuer of cert to the root; empty where cert is one.
	above []*x509.Certificate
	// constrained: there are name constraints up to the root, so what is issued
	// is verified before it leaves.
	constrained bool
}

// Root says what a new self-signed CA certificate contains.
type Root struct {
	TrustDomain spiffeid.TrustDomain
	// Subject is C, O and CN; the serial number is added to it.
	Subject             pkix.Name
	NotBefore, NotAfter time.Time
}

// NewRoot makes a key and a self-signed CA certificate in SPIRE's shape.
func NewRoot(keyType KeyType, r Root) (*Issuer, error) {
	key, err := keyType.Generate()
	if err != nil {
		return nil, fmt.Errorf("make a CA key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("make a CA serial number: %w", err)
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("encode the CA's public key: %w", err)
	}
	ski, err := subjectKeyID(spki)
	if err != nil {
		return nil, err
	}
	alg, _, err := signingFor(key.Public())
	if err != nil {
		return nil, err
	}
	subject := r.Subject
	// Without it, two roots of one trust domain would share a name, and
	// verifiers that look issuers up by name would take the wrong one.
	subject.SerialNumber = serial.String()
	id := r.TrustDomain.ID().URL()
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               subject,
		NotBefore:             r.NotBefore.UTC().Truncate(time.Second),
		NotAfter:              r.NotAfter.UTC().Truncate(time.Second),
		SignatureAlgorithm:    alg,
		SubjectKeyId:          ski,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		URIs:                  []*url.URL{id},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("self-sign the CA certificate: %w", err)
	}
	return NewIssuer(r.TrustDomain, der, key)
}

// NewIssuer joins a self-signed CA certificate and its key. It refuses a
// certificate that is not a CA of the trust domain, and a key that does not
// belong to it.
func NewIssuer(td spiffeid.TrustDomain, certDER []byte, key crypto.Signer) (*Issuer, error) {
	cert, err := x509.ParseCertificate(certDER)
	if err != nil {
		return nil, fmt.Errorf("parse the CA certificate: %w", err)
	}
	alg, hash, err := signingFor(key.Public())
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("encode the CA's public key: %w", err)
	}
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA || cert.MaxPathLen > 0 || cert.MaxPathLenZero:
		return nil, errors.New("CA certificate: basic constraints do not make it a plain CA")
	case cert.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign:
		return nil, fmt.Errorf("CA certificate: key usage %b", cert.KeyUsage)
	case len(cert.ExtKeyUsage)+len(cert.UnknownExtKeyUsage) > 0:
		return nil, errors.New("CA certificate: it has extended key usages")
	case len(cert.SubjectKeyId) == 0:
		return nil, errors.New("CA certificate: no subject key identifier")
	case len(cert.URIs) != 1 || cert.URIs[0].String() != td.IDString():
		return nil, fmt.Errorf("CA certificate: URI SAN %v is not %s", cert.URIs, td.IDString())
	case !bytes.Equal(cert.RawSubjectPublicKeyInfo, spki):
		return nil, errors.New("CA certificate: the key is not the certificate's")
	}
	i := &Issuer{cert: cert, key: key, alg: alg, hash: hash}
	return i, i.prove()
}

// prove signs and verifies once, so that a key that does not work is found
// before anybody depends on it.
func (i *Issuer) prove() error {
	probe := []byte("spiffe-node CA key self-test")
	sig, err := crypto.SignMessage(i.key, rand.Reader, probe, i.hash)
	if err != nil {
		return fmt.Errorf("CA key self-test: %w", err)
	}
	if err := i.cert.CheckSignature(i.alg, probe, sig); err != nil {
		return fmt.Errorf("CA key self-test: %w", err)
	}
	return nil
}

// Certificate is the CA certificate. Not to be modified.
func (i *Issuer) Certificate() *x509.Certificate { return i.cert }

// AuthorityID is the lowercase hex of the subject key identifier.
func (i *Issuer) AuthorityID() string { return hex.EncodeToString(i.cert.SubjectKeyId) }

// MarshalKey is the private key in PKCS#8, for the state file only.
func (i *Issuer) MarshalKey() ([]byte, error) { return x509.MarshalPKCS8PrivateKey(i.key) }

// PublicKeyFromCSR takes the public key out of a PKCS#10 request whose
// signature proves that the sender holds the private key. The rest of the
// request is returned for those who mint; nobody else may look at it.
func PublicKeyFromCSR(der []byte) (spki []byte, csr *x509.CertificateRequest, err error) {
	csr, err = ParseCSR(der)
	if err != nil {
		return nil, nil, err
	}
	spki, err = VerifyCSR(csr)
	return spki, csr, err
}

// maxCSR bounds what the parser gets to see, in bytes: an RSA-8192 request
// with a hundred names stays far below.
const maxCSR = 64 << 10

// ParseCSR reads a PKCS#10 request without verifying anything.
func ParseCSR(der []byte) (*x509.CertificateRequest, error) {
	if len(der) > maxCSR {
		return nil, fmt.Errorf("request of %d bytes is larger than %d", len(der), maxCSR)
	}
	return x509.ParseCertificateRequest(der)
}

// VerifyCSR checks the strength of the request's key and the request's
// signature, in this order, and returns the SubjectPublicKeyInfo.
func VerifyCSR(csr *x509.CertificateRequest) ([]byte, error) {
	if err := CheckPublicKey(csr.PublicKey); err != nil {
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, err
	}
	// Encoded anew: the request's own bytes may hold odd parameters.
	return x509.MarshalPKIXPublicKey(csr.PublicKey)
}
