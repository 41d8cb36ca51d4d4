package spireserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// BundleSocket fetches the bundle over http from whoever listens at a unix
// socket; address names the resource there. The socket's owner is trusted. It is
// told what SPIRE Agent tells it, in the query: for whom the bundle is, whether
// the server was trusted once before, and how long this has been going on.
func BundleSocket(socket, address, format string) Bootstrap {
	transport := &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", socket)
		},
	}
	client := &http.Client{
		Transport: transport,
		Timeout:   fetchTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return errors.New("it was redirected; name the last address instead")
		},
	}
	return func(ctx context.Context, td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
		u, err := url.Parse(address)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
			return nil, fmt.Errorf("trust bundle: %q is not an http or https URL", address)
		}
		a, _ := ctx.Value(attemptKey{}).(attempt)
		u.RawQuery = a.query(u.Query(), td).Encode()
		b, err := fetchBundle(ctx, client, u, td, format)
		if err != nil {
			return nil, fmt.Errorf("%w (through %s)", err, socket)
		}
		return b, nil
	}
}

// attempt is what a Bootstrap may tell its source; it travels in the context.
type attempt struct {
	again   bool // the server was trusted before
	number  int  // of attempts since
	since   time.Time
	address string // of a server, host:port
}

type attemptKey struct{}

func (a attempt) query(q url.Values, td spiffeid.TrustDomain) url.Values {
	mode := "bootstrap"
	if a.again {
		mode = "rebootstrap"
	}
	host, port, _ := net.SplitHostPort(a.address)
	q.Set("spire-attest-mode", mode)
	q.Set("spire-connection-attempts", strconv.Itoa(a.number))
	q.Set("spire-attest-start-time", a.since.Format(time.RFC3339))
	q.Set("spire-server-address", host)
	q.Set("spire-server-port", port)
	q.Set("spiffe-trust-domain", td.Name())
	return q
}

// BundleWorkloadAPI takes the bundle from a Workload API that knows the trust
// domain.
func BundleWorkloadAPI(socket string) Bootstrap {
	return func(ctx context.Context, td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
		ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
		defer cancel()
		set, err := workloadapi.FetchX509Bundles(ctx, workloadapi.WithAddr("unix://"+socket))
		if err != nil {
			return nil, fmt.Errorf("trust bundle from the Workload API at %s: %w", socket, err)
		}
		b, err := set.GetX509BundleForTrustDomain(td)
		if err != nil || len(b.X509Authorities()) == 0 {
			return nil, fmt.Errorf("the Workload API at %s gives no trust bundle of %s", socket, td)
		}
		return b, nil
	}
}

// fetchTimeout bounds one attempt to get a bundle.
const fetchTimeout = 15 * time.Second

// fetchBundle gets a bundle from a URL.
func fetchBundle(ctx context.Context, client *http.Client, u *url.URL, td spiffeid.TrustDomain, format string) (*x509bundle.Bundle, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("trust bundle: %w", err)
	}
	res, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("trust bundle: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("trust bundle %s: the server answers %s", u.Redacted(), res.Status)
	}
	data, err := readLimited(res.Body)
	if err != nil {
		return nil, fmt.Errorf("trust bundle %s: %w", u.Redacted(), err)
	}
	b, err := ParseBundle(td, data, format)
	if err != nil {
		return nil, fmt.Errorf("trust bundle %s: %w", u.Redacted(), err)
	}
	return b, nil
}

func readLimited(r io.Reader) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxBootstrap+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxBootstrap {
		return nil, fmt.Errorf("is larger than %d bytes", maxBootstrap)
	}
	return data, nil
}
