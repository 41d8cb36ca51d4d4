// Package x509pop attests agents by a certificate of their machine and the
// proof that they hold its key: the x509pop type of SPIRE.
//
// Promise: a result is for a leaf that chains to a configured CA, or in Mode
// SPIFFE is an X.509-SVID of the own trust domain below a path set aside for
// it, and whose key signed a nonce of this very conversation. One certificate
// is one agent, unless the template says otherwise.
//
// Threats: anybody may send certificates, in any number and size, so they are
// counted and measured before they are parsed further or verified. An answer
// is good for one challenge only. A workload whose SVID is not below the
// prefix, and a certificate of a CA that signs for others too but carries
// somebody else's name, do not become agents. Whoever can have a certificate
// signed by a configured CA is an agent: give it a CA for nothing else.
package x509pop

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"strings"
	"text/template"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest"
)

// Type is the attestation type.
const Type = "x509pop"

// Mode says whose certificates count.
type Mode string

// The modes, named as SPIRE names them.
const (
	ExternalPKI Mode = "external_pki" // those of configured CAs
	SPIFFE      Mode = "spiffe"       // X.509-SVIDs of the own trust domain
)

// Defaults of Config.
const (
	DefaultSVIDPrefix       = "/spire-exchange/"
	DefaultMaxIntermediates = 4
	DefaultMaxRSAKeySize    = 8192
)

// maxCAFile bounds a CA file, in bytes.
const maxCAFile = 4 << 20

// Config says whom to attest.
type Config struct {
	// TrustDomain is that of the agents; required.
	TrustDomain spiffeid.TrustDomain
	// Mode is required.
	Mode Mode
	// CAFiles are PEM files with the CAs of ExternalPKI, required there. They
	// are read anew at each attestation, so a CA may be exchanged.
	CAFiles []string
	// Bundle is the own trust domain's, required for SPIFFE.
	Bundle func() *x509bundle.Bundle
	// SVIDPrefix is the path below which an SVID makes an agent; "" =
	// DefaultSVIDPrefix.
	SVIDPrefix string
	// AgentPath is a template for the agent's path below /spire/agent, see
	// naming; "" = the default of the mode.
	AgentPath string
	// MaxIntermediates and MaxRSAKeySize (bits) bound what is verified; 0 = the
	// defaults.
	MaxIntermediates, MaxRSAKeySize int
	// VerifyCallerIP lets only an address in that is a SAN of the certificate.
	VerifyCallerIP bool
}

// Attestor attests by certificate. Safe for concurrent use.
type Attestor struct {
	cfg  Config
	path *template.Template
}

// New checks the configuration and reads the CAs once.
func New(cfg Config) (*Attestor, error) {
	if cfg.MaxIntermediates == 0 {
		cfg.MaxIntermediates = DefaultMaxIntermediates
	}
	if cfg.MaxRSAKeySize == 0 {
		cfg.MaxRSAKeySize = DefaultMaxRSAKeySize
	}
	if cfg.SVIDPrefix == "" {
		cfg.SVIDPrefix = DefaultSVIDPrefix
	}
	if !strings.HasSuffix(cfg.SVIDPrefix, "/") {
		cfg.SVIDPrefix += "/"
	}
	switch {
	case cfg.TrustDomain.IsZero():
		return nil, errors.New("x509pop: trust domain missing")
	case cfg.MaxIntermediates < 0 || cfg.MaxRSAKeySize < 0:
		return nil, errors.New("x509pop: a limit is negative")
	case cfg.Mode == ExternalPKI && len(cfg.CAFiles) == 0:
		return nil, errors.New("x509pop: no CA files, so nobody could attest")
	case cfg.Mode == SPIFFE && cfg.Bundle == nil:
		return nil, errors.New("x509pop: trust bundle missing")
	case cfg.Mode == SPIFFE && len(cfg.CAFiles) > 0:
		return nil, errors.New("x509pop: CA files do not count in mode spiffe; leave them out")
	case cfg.Mode != ExternalPKI && cfg.Mode != SPIFFE:
		return nil, fmt.Errorf("x509pop: mode %q is neither %s nor %s", cfg.Mode, ExternalPKI, SPIFFE)
	}
	a := &Attestor{cfg: cfg}
	var err error
	if a.path, err = parseAgentPath(cfg); err != nil {
		return nil, err
	}
	if cfg.Mode == ExternalPKI {
		if _, err := readCAs(cfg.CAFiles); err != nil {
			return nil, fmt.Errorf("x509pop: %w", err)
		}
	}
	return a, nil
}

// Type is x509pop.
func (a *Attestor) Type() string { return Type }

// Attest takes a certificate chain as payload and has the agent sign a nonce.
func (a *Attestor) Attest(ctx context.Context, data []byte, challenge func([]byte) ([]byte, error)) (*nodeattest.Result, error) {
	sent, err := a.parse(data)
	if err != nil {
		return nil, err
	}
	chains, err := a.verify(sent)
	if err != nil {
		return nil, err
	}
	if err := a.checkCaller(nodeattest.Caller(ctx), sent.leaf); err != nil {
		return nil, err
	}
	if err := prove(sent.leaf, challenge); err != nil {
		return nil, err
	}
	return a.name(sent.leaf, chains)
}

// verify is the chains from the leaf to CAs that count.
func (a *Attestor) verify(sent *chain) ([][]*x509.Certificate, error) {
	roots, err := a.roots()
	if err != nil {
		return nil, err
	}
	intermediates := x509.NewCertPool()
	for _, c := range sent.intermediates {
		intermediates.AddCert(c)
	}
	pool := x509.NewCertPool()
	for _, c := range roots {
		pool.AddCert(c)
	}
	chains, err := sent.leaf.Verify(x509.VerifyOptions{
		Roots: pool, Intermediates: intermediates, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	})
	if err == nil && a.cfg.Mode == SPIFFE {
		// Beside the chain, an SVID has rules of its own: one ID, and no CA.
		_, _, err = x509svid.Verify(append([]*x509.Certificate{sent.leaf}, sent.intermediates...), x509bundle.FromX509Authorities(a.cfg.TrustDomain, roots))
	}
	if err != nil {
		return nil, nodeattest.Denied("certificate verification failed: %v", err)
	}
	return chains, nil
}

func (a *Attestor) roots() ([]*x509.Certificate, error) {
	if a.cfg.Mode == SPIFFE {
		return a.cfg.Bundle().X509Authorities(), nil
	}
	return readCAs(a.cfg.CAFiles)
}

func (a *Attestor) checkCaller(address netip.Addr, leaf *x509.Certificate) error {
	if !a.cfg.VerifyCallerIP {
		return nil
	}
	if !address.IsValid() {
		return errors.New("client IP not available for verification")
	}
	address = address.Unmap().WithZone("")
	for _, raw := range leaf.IPAddresses {
		if ip, ok := netip.AddrFromSlice(raw); ok && ip.Unmap() == address {
			return nil
		}
	}
	return nodeattest.Denied("client IP %s does not match any certificate IP SAN", address)
}

// readCAs reads files of certificates; one without any is an error, for it
// would shut agents out without a word.
func readCAs(files []string) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for _, name := range files {
		data, err := readFile(name)
		if err != nil {
			return nil, fmt.Errorf("CA file: %w", err)
		}
		n := len(out)
		for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
			if block.Type != "CERTIFICATE" {
				return nil, fmt.Errorf("CA file %s holds a %s, not only certificates", name, block.Type)
			}
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("CA file %s: %w", name, err)
			}
			out = append(out, cert)
		}
		if len(out) == n {
			return nil, fmt.Errorf("CA file %s holds no PEM certificate", name)
		}
	}
	return out, nil
}

func readFile(name string) ([]byte, error) {
	f, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxCAFile+1))
	if err == nil && len(data) > maxCAFile {
		err = fmt.Errorf("%s is larger than %d bytes", name, maxCAFile)
	}
	return data, err
}
