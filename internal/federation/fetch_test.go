package federation_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"log"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/federation"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

var (
	other    = domain("other.org")
	serverID = spiffeid.RequireFromString("spiffe://other.org/spire/server")
)

// endpoint is a bundle endpoint under test.
func endpoint(t *testing.T, config *tls.Config, handler http.HandlerFunc) *httptest.Server {
	t.Helper()
	s := httptest.NewUnstartedServer(handler)
	s.TLS = config
	s.Config.ErrorLog = log.New(io.Discard, "", 0)
	s.StartTLS()
	t.Cleanup(s.Close)
	return s
}

func serveText(text []byte) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(text) }
}

func marshal(t *testing.T, b *spiffebundle.Bundle) []byte {
	t.Helper()
	text, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// spiffeIdentity is a server certificate with a SPIFFE ID, and its root.
func spiffeIdentity(t *testing.T, id string) (*tls.Config, *x509.Certificate) {
	t.Helper()
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caDER, err := x509.CreateCertificate(rand.Reader, template, template, caKey.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := x509.ParseCertificate(caDER)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(id)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: template.NotBefore, NotAfter: template.NotAfter, URIs: []*url.URL{u}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, BasicConstraintsValid: true,
	}, ca, key.Public(), caKey)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}, ca
}

func TestFetch(t *testing.T) {
	text := marshal(t, bundle(t, "other.org", 3, time.Minute))
	good := endpoint(t, nil, serveText(text))
	roots := x509.NewCertPool()
	roots.AddCert(good.Certificate())
	config, ca := spiffeIdentity(t, serverID.String())
	spiffe := endpoint(t, config, serveText(text))
	bundles := map[spiffeid.TrustDomain]*x509bundle.Bundle{other: x509bundle.FromX509Authorities(other, []*x509.Certificate{ca})}
	_, foreign := spiffeIdentity(t, serverID.String())
	redirect := func(to string) *httptest.Server {
		return endpoint(t, nil, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, to, http.StatusFound) })
	}
	var self *httptest.Server
	self = endpoint(t, nil, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/there" {
			_, _ = w.Write(text)
			return
		}
		http.Redirect(w, r, self.URL+"/there", http.StatusFound)
	})
	for name, tc := range map[string]struct {
		at      *httptest.Server
		id      spiffeid.ID
		bundles map[spiffeid.TrustDomain]*x509bundle.Bundle
		want    string // part of the error; "" = it works
	}{
		"https_web":                {at: good},
		"https_spiffe":             {at: spiffe, id: serverID, bundles: bundles},
		"redirect within the host": {at: self},
		"another redirect":         {at: redirect(good.URL), want: "name the final URL"},
		"redirect to http":         {at: redirect(strings.Replace(good.URL, "https", "http", 1)), want: "name the final URL"},
		"endless redirects":        {at: redirect("/"), want: "name the final URL"},
		"unknown web certificate":  {at: spiffe, want: `the endpoint presents the SPIFFE ID "spiffe://other.org/spire/server"; is it https_spiffe`},
		"no bundle":                {at: spiffe, id: serverID, want: "local copy of bundle not found"},
		"another ID":               {at: spiffe, id: spiffeid.RequireFromString("spiffe://other.org/other"), bundles: bundles, want: `unexpected ID "spiffe://other.org/spire/server"`},
		"another root": {
			at: spiffe, id: serverID, bundles: map[spiffeid.TrustDomain]*x509bundle.Bundle{other: x509bundle.FromX509Authorities(other, []*x509.Certificate{foreign})},
			want: "signed by unknown authority",
		},
		"web certificate for SPIFFE": {at: good, id: serverID, bundles: bundles, want: "no URI SAN"},
		"not found":                  {at: endpoint(t, nil, http.NotFound), want: "status 404, not 200"},
		"no JSON":                    {at: endpoint(t, nil, serveText([]byte("<html>"))), want: "spiffebundle"},
		"huge":                       {at: endpoint(t, nil, serveText(bytes.Repeat([]byte(" "), federation.MaxDocument+1))), want: "larger than"},
		"compressed": {at: endpoint(t, nil, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write([]byte("x"))
		}), want: "EOF"},
		"long header": {at: endpoint(t, nil, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("X", strings.Repeat("x", 1<<20))
			_, _ = w.Write(text)
		}), want: "header"},
	} {
		t.Run(name, func(t *testing.T) {
			roots := x509.NewCertPool()
			if tc.at != spiffe {
				roots.AddCert(tc.at.Certificate())
			}
			got, err := federation.Fetch(t.Context(), embedded.Relationship{TrustDomain: other, EndpointURL: tc.at.URL, EndpointID: tc.id}, roots, tc.bundles)
			switch {
			case tc.want == "" && err != nil:
				t.Error(err)
			case tc.want == "":
				if n, _ := got.SequenceNumber(); n != 3 || got.TrustDomain() != other || len(got.X509Authorities()) != 1 {
					t.Errorf("got %v", got)
				}
			case err == nil || !strings.Contains(err.Error(), tc.want):
				t.Errorf("got %v, want %s", err, tc.want)
			}
		})
	}
}

// A caller that gives up is not held by an endpoint that hangs.
func TestFetchEndsWithItsContext(t *testing.T) {
	release := make(chan struct{})
	silent := endpoint(t, nil, func(http.ResponseWriter, *http.Request) { <-release })
	defer close(release)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	roots := x509.NewCertPool()
	roots.AddCert(silent.Certificate())
	if _, err := federation.Fetch(ctx, embedded.Relationship{TrustDomain: other, EndpointURL: silent.URL}, roots, nil); err == nil {
		t.Error("it answered")
	}
}

func TestAddressesThatAreNotFetchedFrom(t *testing.T) {
	for address, fine := range map[string]bool{
		"192.0.2.1:443": true, "[2001:db8::1]:443": true, "127.0.0.1:8443": true, "10.0.0.1:443": true,
		"169.254.169.254:443": false, "[::ffff:169.254.169.254]:443": false, "[fe80::1%eth0]:443": false, "[fd00:ec2::254]:80": false,
		"224.0.0.1:443": false, "0.0.0.0:443": false, "[::]:443": false,
	} {
		if err := federation.ControlDial(address); (err == nil) != fine {
			t.Errorf("%s: %v", address, err)
		}
	}
}

// FuzzDocument feeds what an endpoint may say to all that reads it: whatever is
// taken can be stored and compared.
func FuzzDocument(f *testing.F) {
	f.Add([]byte(`{"keys":[]}`))
	f.Add([]byte(`{"keys":[],"spiffe_sequence":18446744073709551615,"spiffe_refresh_hint":-1}`))
	f.Add([]byte(`{"keys":[{"use":"jwt-svid","kty":"EC","kid":"a","crv":"P-256","x":"fK-wKTnKL7KFLM27lqq5DC-bxrVaH6rDV-IcCSEOeL4","y":"wq-g3TQWxYlV51TCPH030yXsRxvujD4hUUaIQrXk4KI"}],"spiffe_refresh_hint":9223372036854775807}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		in, err := spiffebundle.Parse(other, data)
		if err != nil {
			if text := federation.OneLine(err); len(text) > 400 || strings.ContainsRune(text, '\n') {
				t.Errorf("shown as %q", text)
			}
			return
		}
		b, err := embedded.BundleOf(in)
		if err != nil {
			return
		}
		if b.TrustDomain != other || b.RefreshHint < 0 || b.RefreshHint%time.Second != 0 {
			t.Errorf("%+v", b)
		}
	})
}
