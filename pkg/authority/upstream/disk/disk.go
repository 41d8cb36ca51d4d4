// Package disk is an upstream CA whose certificate and key lie in files: a CA
// that a company's own has signed for the purpose, or a root itself.
//
// Promise: the files are read anew at each use, so a renewed certificate or a
// new root is taken over without a restart. They are used only together and
// only if they fit: what is signed verifies with the roots and the chain.
// Errors name the file, what is wrong with it and never its content.
//
// Threats: who holds the key can make any identity of the trust domain, so it
// should be that of a CA for this trust domain only, best with a path length of
// 0 and name constraints, and be readable by the authority alone. It is never
// copied, and its bytes are not kept.
package disk

import (
	"bytes"
	"cmp"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"os"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// backdate is how far notBefore lies in the past, for clocks that differ.
const backdate = 10 * time.Second

// Bounds of what is read.
const (
	maxFile         = 1 << 20
	maxCertificates = 100
)

// Config says where the files are.
type Config struct {
	// TrustDomain is that of the authority below.
	TrustDomain spiffeid.TrustDomain
	// CertFile holds the CA's certificate in PEM and, after it, those of its
	// issuers up to, but not necessarily with, the root.
	CertFile string
	// KeyFile holds the CA's private key in PEM.
	KeyFile string
	// BundleFile holds the roots in PEM; empty: CertFile holds a root.
	BundleFile string
	// Logger gets warnings; nil = none.
	Logger *slog.Logger
}

// Upstream signs with a key in a file. Safe for concurrent use.
type Upstream struct{ cfg Config }

var _ embedded.Upstream = (*Upstream)(nil)

// New needs no files yet.
func New(cfg Config) (*Upstream, error) {
	switch {
	case cfg.TrustDomain.IsZero():
		return nil, errors.New("upstream CA on disk: no trust domain")
	case cfg.CertFile == "" || cfg.KeyFile == "":
		return nil, errors.New("upstream CA on disk: certificate and key file are required")
	}
	if info, err := os.Stat(cfg.KeyFile); err == nil && info.Mode().Perm()&0o007 != 0 && cfg.Logger != nil {
		cfg.Logger.Warn("the key of the upstream CA is readable by everybody on this machine; make it the authority's alone",
			slog.String("path", cfg.KeyFile), slog.String("mode", info.Mode().Perm().String()))
	}
	return &Upstream{cfg}, nil
}

// Name is the certificate's file.
func (u *Upstream) Name() string { return "disk " + u.cfg.CertFile }

// files is what the files hold at one moment, found to fit together.
type files struct {
	chain []*x509.Certificate // the CA and its issuers, as in the file
	roots []embedded.Root
	key   crypto.Signer
}

// Bundle reads the roots. It also finds what would fail at the next signing.
func (u *Upstream) Bundle(context.Context) (*embedded.UpstreamBundle, error) {
	f, err := u.load(time.Now())
	if err != nil {
		return nil, err
	}
	return &embedded.UpstreamBundle{X509: f.roots}, nil
}

// PublishJWTKey answers that files know no JWT keys.
func (u *Upstream) PublishJWTKey(context.Context, embedded.JWTKey) ([]embedded.JWTKey, error) {
	return nil, errors.ErrUnsupported
}

// SignCA signs a CA certificate for the CSR's key, name and trust domain. It
// ends with the CA above at the latest.
func (u *Upstream) SignCA(_ context.Context, csrDER []byte, ttl time.Duration) (*embedded.UpstreamCA, error) {
	now := time.Now()
	f, err := u.load(now)
	if err != nil {
		return nil, err
	}
	csr, err := x509.ParseCertificateRequest(csrDER)
	if err != nil {
		return nil, fmt.Errorf("read the request: %w", err)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("check the request's signature: %w", err)
	}
	if len(csr.URIs) != 1 || csr.URIs[0].String() != u.cfg.TrustDomain.IDString() {
		return nil, fmt.Errorf("the request is for %v, not for %s", csr.URIs, u.cfg.TrustDomain.IDString())
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
	if err != nil {
		return nil, fmt.Errorf("make a serial number: %w", err)
	}
	ca := f.chain[0]
	template := &x509.Certificate{
		SerialNumber:          serial.Add(serial, big.NewInt(1)),
		RawSubject:            csr.RawSubject,
		URIs:                  csr.URIs,
		NotBefore:             later(now.Add(-backdate), ca.NotBefore),
		NotAfter:              earlier(now.Add(ttl), ca.NotAfter),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca, csr.PublicKey, f.key)
	if err != nil {
		return nil, fmt.Errorf("sign with %s: %w", u.cfg.KeyFile, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read what was signed with %s: %w", u.cfg.KeyFile, err)
	}
	return &embedded.UpstreamCA{
		Chain:          append([]*x509.Certificate{cert}, f.chain...),
		UpstreamBundle: embedded.UpstreamBundle{X509: f.roots},
	}, nil
}

func later(a, b time.Time) time.Time {
	if b.After(a) {
		return b
	}
	return a
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// load reads the files and checks that they fit together.
func (u *Upstream) load(now time.Time) (*files, error) {
	chain, err := readCertificates(u.cfg.CertFile)
	if err != nil {
		return nil, err
	}
	key, err := readKey(u.cfg.KeyFile)
	if err != nil {
		return nil, err
	}
	f := &files{chain: chain, key: key}
	rootFile := cmp.Or(u.cfg.BundleFile, u.cfg.CertFile)
	roots := chain
	if u.cfg.BundleFile != "" {
		if roots, err = readCertificates(u.cfg.BundleFile); err != nil {
			return nil, err
		}
	} else if len(chain) != 1 || !bytes.Equal(chain[0].RawSubject, chain[0].RawIssuer) {
		return nil, fmt.Errorf("%s: without a bundle file it must hold one self-signed root; name the file with the roots", u.cfg.CertFile)
	}
	for _, r := range roots {
		if err := checkCA(r, now); err != nil && len(roots) == 1 {
			return nil, fmt.Errorf("%s: root %q: %w", rootFile, r.Subject, err)
		}
		f.roots = append(f.roots, embedded.Root{Certificate: r})
	}
	for n, c := range chain {
		if err := checkCA(c, now); err != nil {
			return nil, fmt.Errorf("%s: certificate %d, %q: %w", u.cfg.CertFile, n+1, c.Subject, err)
		}
		if n+1 < len(chain) {
			if err := c.CheckSignatureFrom(chain[n+1]); err != nil {
				return nil, fmt.Errorf("%s: certificate %d, %q, is not signed by the one after it, %q; the signing CA comes first, then its issuers in order",
					u.cfg.CertFile, n+1, c.Subject, chain[n+1].Subject)
			}
		}
	}
	pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !pub.Equal(chain[0].PublicKey) {
		return nil, fmt.Errorf("%s: the key is not that of the first certificate in %s, %q", u.cfg.KeyFile, u.cfg.CertFile, chain[0].Subject)
	}
	opts := x509.VerifyOptions{
		Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), CurrentTime: now,
		KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}
	for _, r := range roots {
		opts.Roots.AddCert(r)
	}
	for _, c := range chain[1:] {
		opts.Intermediates.AddCert(c)
	}
	if _, err := chain[0].Verify(opts); err != nil {
		return nil, fmt.Errorf("%s: %q does not verify with the roots in %s: %w", u.cfg.CertFile, chain[0].Subject, rootFile, err)
	}
	return f, nil
}

func checkCA(c *x509.Certificate, now time.Time) error {
	switch {
	case !c.BasicConstraintsValid || !c.IsCA:
		return errors.New("it is no CA's (basic constraints)")
	case c.KeyUsage != 0 && c.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("its key usage does not allow signing certificates (keyCertSign)")
	case len(c.SubjectKeyId) == 0:
		return errors.New("it has no subject key identifier")
	case now.After(c.NotAfter):
		return fmt.Errorf("it expired at %s", c.NotAfter.Format(time.RFC3339))
	case now.Before(c.NotBefore):
		return fmt.Errorf("it is not valid before %s", c.NotBefore.Format(time.RFC3339))
	}
	return nil
}

func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err // names the file
	}
	defer func() { _ = f.Close() }()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	switch {
	case err != nil:
		return nil, err
	case len(data) > maxFile:
		return nil, fmt.Errorf("%s: larger than %d bytes", path, maxFile)
	}
	return data, nil
}

func readCertificates(path string) ([]*x509.Certificate, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	certs, err := parseCertificates(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return certs, nil
}

// parseCertificates reads certificates in PEM. Text around them is allowed,
// other blocks are not: a key does not belong there.
func parseCertificates(data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("holds a PEM block of type %q among the certificates", block.Type)
		}
		if len(out) == maxCertificates {
			return nil, fmt.Errorf("holds more than %d certificates", maxCertificates)
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("certificate %d: %w", len(out)+1, err)
		}
		out = append(out, c)
	}
	if len(out) == 0 {
		return nil, errors.New("holds no certificate in PEM")
	}
	return out, nil
}

func readKey(path string) (crypto.Signer, error) {
	data, err := readFile(path)
	if err != nil {
		return nil, err
	}
	key, err := parseKey(data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return key, nil
}

var errKey = errors.New("its private key cannot be read")

// parseKey reads the private key in PEM. What openssl puts before an elliptic
// key, the curve's parameters, is skipped. Errors carry nothing of the content.
func parseKey(data []byte) (crypto.Signer, error) {
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		var key any
		var err error
		switch block.Type {
		case "EC PARAMETERS":
			continue
		case "PRIVATE KEY":
			key, err = x509.ParsePKCS8PrivateKey(block.Bytes)
		case "RSA PRIVATE KEY":
			if block.Headers["DEK-Info"] != "" {
				return nil, errors.New("its private key is encrypted; store it without a passphrase")
			}
			key, err = x509.ParsePKCS1PrivateKey(block.Bytes)
		case "EC PRIVATE KEY":
			if block.Headers["DEK-Info"] != "" {
				return nil, errors.New("its private key is encrypted; store it without a passphrase")
			}
			key, err = x509.ParseECPrivateKey(block.Bytes)
		case "ENCRYPTED PRIVATE KEY":
			return nil, errors.New("its private key is encrypted; store it without a passphrase")
		default:
			return nil, fmt.Errorf("holds a PEM block of type %q, not a private key", block.Type)
		}
		if err != nil {
			return nil, errKey
		}
		signer, ok := key.(crypto.Signer)
		if !ok {
			return nil, fmt.Errorf("a key of type %T cannot sign", key)
		}
		return signer, nil
	}
	return nil, errors.New("holds no private key in PEM")
}
