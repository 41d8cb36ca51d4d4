package spireserver

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bootstrap gives the trust bundle with which the server is verified until it
// has told its own. It is asked anew for every attempt, so that a bundle that
// was put right is used. Safe for concurrent use.
type Bootstrap func(ctx context.Context, td spiffeid.TrustDomain) (*x509bundle.Bundle, error)

// Formats of a bootstrap bundle.
const (
	FormatPEM    = "pem"    // certificates, PEM
	FormatSPIFFE = "spiffe" // SPIFFE bundle, JSON
)

// maxBootstrap bounds a bootstrap bundle, bytes.
const maxBootstrap = 4 << 20

// BundleFile reads the bundle from a file.
func BundleFile(path, format string) Bootstrap {
	return func(_ context.Context, td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("trust bundle: %w", err)
		}
		defer f.Close()
		data, err := readLimited(f)
		if err != nil {
			return nil, fmt.Errorf("trust bundle %s: %w", path, err)
		}
		b, err := ParseBundle(td, data, format)
		if err != nil {
			return nil, fmt.Errorf("trust bundle %s: %w", path, err)
		}
		return b, nil
	}
}

// BundleURL fetches the bundle over https, whose server is verified with the
// system's roots.
func BundleURL(address, format string) Bootstrap {
	return bundleURL(http.DefaultTransport, address, format)
}

func bundleURL(transport http.RoundTripper, address, format string) Bootstrap {
	client := &http.Client{
		Transport: transport,
		Timeout:   fetchTimeout,
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			switch {
			case req.URL.Scheme != "https":
				return fmt.Errorf("redirected to %s, which is not https", req.URL.Redacted())
			case len(via) >= 5:
				return errors.New("redirected more than 5 times")
			}
			return nil
		},
	}
	return func(ctx context.Context, td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
		u, err := url.Parse(address)
		if err != nil || u.Scheme != "https" || u.Host == "" {
			return nil, fmt.Errorf("trust bundle: %q is not an https URL", address)
		}
		return fetchBundle(ctx, client, u, td, format)
	}
}

// ParseBundle reads a trust bundle in one of the formats; "" is FormatPEM. It
// has at least one X.509 authority.
func ParseBundle(td spiffeid.TrustDomain, data []byte, format string) (*x509bundle.Bundle, error) {
	var roots []*x509.Certificate
	switch format {
	case FormatPEM, "":
		for rest := data; ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			if block.Type != "CERTIFICATE" {
				return nil, fmt.Errorf("holds a PEM block of type %q; only CERTIFICATE belongs there", block.Type)
			}
			certs, err := x509.ParseCertificates(block.Bytes)
			if err != nil {
				return nil, err
			}
			roots = append(roots, certs...)
		}
	case FormatSPIFFE:
		b, err := spiffebundle.Parse(td, data)
		if err != nil {
			return nil, err
		}
		roots = b.X509Authorities()
	default:
		return nil, fmt.Errorf("format %q is none of %s, %s", format, FormatPEM, FormatSPIFFE)
	}
	if len(roots) == 0 {
		return nil, errors.New("holds no X.509 authority")
	}
	out := x509bundle.New(td)
	for _, root := range roots {
		out.AddX509Authority(root) // once, however often it is there
	}
	return out, nil
}
