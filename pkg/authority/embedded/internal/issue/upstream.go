package issue

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxChain is how many certificates may stand from a CA to its root, both
// counted.
const MaxChain = 10

// NewRequest makes a key and a PKCS#10 request for a CA certificate that
// somebody else signs. The validity of r does not count.
func NewRequest(keyType KeyType, r Root) (crypto.Signer, []byte, error) {
	key, err := keyType.Generate()
	if err != nil {
		return nil, nil, fmt.Errorf("make a CA key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, nil, fmt.Errorf("make the serial number of a CA's name: %w", err)
	}
	subject := r.Subject
	// As on a root: no two CAs share a name.
	subject.SerialNumber = serial.String()
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: subject, URIs: []*url.URL{r.TrustDomain.ID().URL()},
	}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make a request for a CA certificate: %w", err)
	}
	return key, csr, nil
}

// NewIntermediate joins a CA certificate that somebody above has signed and its
// key. chain goes from that certificate over its issuers to the root, each
// signed by the next. It refuses a chain under which relying parties would not
// accept a workload's certificate.
func NewIntermediate(td spiffeid.TrustDomain, chain []*x509.Certificate, key crypto.Signer) (*Issuer, error) {
	if len(chain) < 2 || len(chain) > MaxChain {
		return nil, fmt.Errorf("a CA certificate with its issuers is 2 to %d certificates, not %d", MaxChain, len(chain))
	}
	alg, hash, err := signingFor(key.Public())
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return nil, fmt.Errorf("encode the CA's public key: %w", err)
	}
	cert := chain[0]
	const usages = x509.KeyUsageCertSign | x509.KeyUsageCRLSign | x509.KeyUsageDigitalSignature
	switch {
	case !cert.BasicConstraintsValid || !cert.IsCA:
		return nil, errors.New("CA certificate: basic constraints do not make it a CA")
	case cert.KeyUsage&x509.KeyUsageCertSign == 0 || cert.KeyUsage&^usages != 0:
		return nil, fmt.Errorf("CA certificate: key usage %b", cert.KeyUsage)
	case len(cert.SubjectKeyId) == 0:
		return nil, errors.New("CA certificate: no subject key identifier")
	case len(cert.URIs) != 1 || cert.URIs[0].String() != td.IDString():
		return nil, fmt.Errorf("CA certificate: URI SAN %v is not %s", cert.URIs, td.IDString())
	case !slices.Equal(cert.RawSubjectPublicKeyInfo, spki):
		return nil, errors.New("CA certificate: the key is not the certificate's")
	case len(chain[len(chain)-1].SubjectKeyId) == 0:
		return nil, fmt.Errorf("root %q has no subject key identifier, by which it would be known", chain[len(chain)-1].Subject)
	}
	i := &Issuer{cert: cert, key: key, alg: alg, hash: hash, above: slices.Clone(chain[1:])}
	for n, c := range chain {
		if n+1 < len(chain) {
			if err := c.CheckSignatureFrom(chain[n+1]); err != nil {
				return nil, fmt.Errorf("%q is not signed by the certificate after it, %q: %w", c.Subject, chain[n+1].Subject, err)
			}
		}
		i.constrained = i.constrained || slices.ContainsFunc(c.Extensions, isNameConstraints)
	}
	if below := i.room(); below < 0 {
		return nil, errors.New("the path length of a certificate above allows no CA here")
	}
	if err := i.prove(); err != nil {
		return nil, err
	}
	return i, i.rehearse(td)
}

var oidNameConstraints = asn1.ObjectIdentifier{2, 5, 29, 30}

func isNameConstraints(e pkix.Extension) bool { return e.Id.Equal(oidNameConstraints) }

// room is how many CAs the path lengths above leave below this one; negative if
// this one is too many already.
func (i *Issuer) room() int {
	room := MaxChain
	for n, c := range append([]*x509.Certificate{i.cert}, i.above...) {
		if c.MaxPathLen >= 0 {
			room = min(room, c.MaxPathLen-n)
		}
	}
	return room
}

// rehearse issues a certificate that nobody gets to see and verifies it as TLS
// servers and clients do.
func (i *Issuer) rehearse(td spiffeid.TrustDomain) error {
	id, err := spiffeid.FromPath(td, "/rehearsal")
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	spki, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return err
	}
	notBefore, notAfter := i.Validity()
	issued, err := i.issueLeaf(Leaf{ID: id, PublicKey: spki, NotBefore: notBefore, NotAfter: notAfter})
	if err != nil {
		return fmt.Errorf("try the CA certificate: %w", err)
	}
	if err := i.verify(issued); err != nil {
		return fmt.Errorf("an X509-SVID below this CA would not verify: %w", err)
	}
	return nil
}

// verify checks a certificate below i up to the root, as TLS servers and
// clients do: validity, name constraints, path lengths and usages.
func (i *Issuer) verify(issued *Issued) error {
	cert, err := x509.ParseCertificate(issued.DER)
	if err != nil {
		return err
	}
	opts := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: issued.NotBefore}
	opts.Roots.AddCert(i.above[len(i.above)-1])
	for _, c := range append([]*x509.Certificate{i.cert}, i.above[:len(i.above)-1]...) {
		opts.Intermediates.AddCert(c)
	}
	usages := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	if cert.IsCA {
		usages = []x509.ExtKeyUsage{x509.ExtKeyUsageAny}
	}
	for _, usage := range usages {
		opts.KeyUsages = []x509.ExtKeyUsage{usage}
		if _, err := cert.Verify(opts); err != nil {
			return err
		}
	}
	return nil
}

// Validity is when this CA and all above it are valid.
func (i *Issuer) Validity() (notBefore, notAfter time.Time) {
	notBefore, notAfter = i.cert.NotBefore, i.cert.NotAfter
	for _, c := range i.above {
		if c.NotBefore.After(notBefore) {
			notBefore = c.NotBefore
		}
		if c.NotAfter.Before(notAfter) {
			notAfter = c.NotAfter
		}
	}
	return notBefore, notAfter
}

// Above are the certificates from this CA's issuer to the root; empty for a
// root. Not to be modified.
func (i *Issuer) Above() []*x509.Certificate { return i.above }

// Intermediates are what goes behind a certificate that this CA has signed: the
// CA itself and its issuers without the root. Empty for a root.
func (i *Issuer) Intermediates() [][]byte {
	if len(i.above) == 0 {
		return nil
	}
	out := [][]byte{i.cert.Raw}
	for _, c := range i.above[:len(i.above)-1] {
		out = append(out, c.Raw)
	}
	return out
}

// RootID is the lowercase hex of the root's subject key identifier: the
// authority ID of a root, that of the last certificate above otherwise.
func (i *Issuer) RootID() string {
	if len(i.above) == 0 {
		return i.AuthorityID()
	}
	return hex.EncodeToString(i.above[len(i.above)-1].SubjectKeyId)
}
