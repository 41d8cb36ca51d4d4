package federation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

const (
	// maxDocument bounds a bundle document, in bytes: hundreds of authorities.
	maxDocument = 1 << 20
	// fetchTimeout bounds one attempt, from the name look-up to the last byte.
	fetchTimeout = 30 * time.Second
	// maxRedirects bounds how often an endpoint may send us on within its host.
	maxRedirects = 3
	maxHeader    = 64 << 10
)

// errNoEndpointBundle is SPIRE Server's text.
var errNoEndpointBundle = errors.New("can't perform SPIFFE Authentication: local copy of bundle not found")

// fetcher gets bundle documents. Safe for concurrent use.
type fetcher struct {
	// roots judge https_web endpoints; nil = the system's.
	roots *x509.CertPool
	// bundle is what is stored for a trust domain, nil if nothing is.
	bundle func(spiffeid.TrustDomain) *x509bundle.Bundle
}

// fetch gets the bundle of a relationship from its endpoint.
func (f *fetcher) fetch(ctx context.Context, r embedded.Relationship) (*spiffebundle.Bundle, error) {
	config, err := f.tlsConfig(r)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	dialer := &net.Dialer{Timeout: 10 * time.Second, ControlContext: controlDial}
	client := &http.Client{
		CheckRedirect: checkRedirect,
		Transport: &http.Transport{
			Proxy:                  http.ProxyFromEnvironment,
			DialContext:            dialer.DialContext,
			TLSClientConfig:        config,
			TLSHandshakeTimeout:    10 * time.Second,
			ForceAttemptHTTP2:      true,
			DisableKeepAlives:      true, // each time anew, so each time authenticated
			MaxResponseHeaderBytes: maxHeader,
		},
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, r.EndpointURL, http.NoBody)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, explained(r, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the endpoint answers with status %d, not 200", resp.StatusCode)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxDocument+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read the bundle: %w", err)
	case len(data) > maxDocument:
		return nil, fmt.Errorf("the bundle is larger than %d bytes", maxDocument)
	}
	return spiffebundle.Parse(r.TrustDomain, data)
}

func (f *fetcher) tlsConfig(r embedded.Relationship) (*tls.Config, error) {
	if r.EndpointID.IsZero() {
		return &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: f.roots}, nil
	}
	of := f.bundle(r.EndpointID.TrustDomain())
	if of == nil {
		return nil, errNoEndpointBundle
	}
	return tlsconfig.TLSClientConfig(of, tlsconfig.AuthorizeID(r.EndpointID)), nil
}

// explained adds what the usual mistake looks like.
func explained(r embedded.Relationship, err error) error {
	var name x509.HostnameError
	var authority x509.UnknownAuthorityError
	var cert *x509.Certificate
	switch {
	case !r.EndpointID.IsZero():
		return err
	case errors.As(err, &name):
		cert = name.Certificate
	case errors.As(err, &authority):
		cert = authority.Cert
	}
	if cert != nil && len(cert.URIs) == 1 {
		if id, e := spiffeid.FromURI(cert.URIs[0]); e == nil {
			return fmt.Errorf("%w: the endpoint presents the SPIFFE ID %q; is it https_spiffe instead of https_web?", err, id)
		}
	}
	return err
}

var errRedirect = errors.New("the endpoint sends us to another place, which is not followed: name the final URL in the relationship")

// checkRedirect lets an endpoint send us on within itself only: another host
// would be one that nobody has vouched for.
func checkRedirect(next *http.Request, via []*http.Request) error {
	first := via[0].URL
	if next.URL.Scheme != "https" || !strings.EqualFold(next.URL.Host, first.Host) || next.URL.User != nil || len(via) > maxRedirects {
		return errRedirect
	}
	return nil
}

// controlDial refuses addresses at which no bundle endpoint can be, but which
// answer to whoever runs on this host, such as the metadata service of a cloud.
func controlDial(_ context.Context, _, address string, _ syscall.RawConn) error {
	at, err := netip.ParseAddrPort(address)
	if err != nil {
		return err
	}
	ip := at.Addr().Unmap()
	if ip.IsLinkLocalUnicast() || ip.IsMulticast() || ip.IsUnspecified() || ip == metadataV6 {
		return fmt.Errorf("%s is a link-local, multicast or metadata address; no bundle is fetched from there", ip)
	}
	return nil
}

// metadataV6 is the metadata service of AWS over IPv6, which is no link-local
// address.
var metadataV6 = netip.MustParseAddr("fd00:ec2::254")
