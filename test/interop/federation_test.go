package interop_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// site is a trust domain: an authority with a bundle endpoint, and an agent.
type site struct {
	*authority
	td       string
	endpoint string // host:port
	node     *agent
	parent   string
}

// startSite starts an authority. extra is appended to its configuration, below
// federation.bundleEndpoint; env is its environment beside ours.
func startSite(t *testing.T, td, caTTL, extra string, env ...string) *site {
	t.Helper()
	dir, err := os.MkdirTemp("", "sn-") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &site{
		authority: &authority{agent: &agent{t: t, name: "authority", dir: dir, health: freeAddress(t), log: &logBuffer{}, env: env}, address: freeAddress(t)},
		td:        td, endpoint: freeAddress(t),
	}
	doc := fmt.Sprintf(`apiVersion: config.spiffe-node.io/v1alpha1
kind: AuthorityConfiguration
trustDomain: %s
server: {address: "%s"}
admin: {socketPath: %s}
embedded: {statePath: %s, caTTL: %s, defaultX509SVIDTTL: 30s, defaultJWTSVIDTTL: 30s}
rateLimits: {attestation: false}
health: {address: "%s"}
log: {level: debug}
federation:
  bundleEndpoint:
    address: "%s"
    refreshHint: 10s
%s`, td, s.address, s.admin(), s.path("state/authority.db"), caTTL, s.health, s.endpoint, extra)
	if err := os.WriteFile(s.path("agent.yaml"), []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	s.start()
	t.Cleanup(s.stop)
	for form, name := range map[string]string{"pem": "bundle.pem", "spiffe": "bundle.json"} {
		if err := os.WriteFile(s.path(name), []byte(s.cli("bundle", "show", "-format", form)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// join starts an agent, with SDS names as Istio's federation needs them.
func (s *site) join() {
	t := s.t
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "sn-") // t.TempDir is no tmpfs and too long for a socket
	if err != nil {
		t.Skipf("no tmpfs at /dev/shm: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	out := s.cli("token", "generate", "-ttl", "60")
	token, _, _ := strings.Cut(strings.TrimPrefix(out, "Token: "), "\n")
	s.parent = "spiffe://" + s.td + "/spire/agent/join_token/" + token
	s.node = &agent{t: t, dir: dir, health: freeAddress(t), log: &logBuffer{}}
	doc := fmt.Sprintf(`apiVersion: config.spiffe-node.io/v1alpha1
kind: AgentConfiguration
trustDomain: %s
socket: {directory: %s}
admin: {socketPath: %s}
authority:
  spireServer:
    address: "%s"
    trustBundle: {path: %s}
    nodeAttestation: {type: join_token, joinToken: %s}
identity: {stateDirectory: %s}
sds: {defaultSVIDName: default, defaultBundleName: "null", defaultAllBundlesName: ROOTCA}
health: {address: "%s"}
log: {level: debug}
`, s.td, s.node.path("public"), s.node.admin(), s.address, s.path("bundle.pem"), token, s.node.path("state"), s.node.health)
	if err := os.WriteFile(s.node.path("agent.yaml"), []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	s.node.start()
	t.Cleanup(s.node.stop)
}

// workload registers this process and returns what it gets.
func (s *site) workload(federatesWith string) *workloadapi.X509Source {
	t := s.t
	t.Helper()
	s.cli("entry", "create", "-parentID", s.parent, "-spiffeID", "spiffe://"+s.td+"/w", "-selector", self(), "-federatesWith", federatesWith)
	source, err := workloadapi.NewX509Source(withTimeout(t), workloadapi.WithClientOptions(workloadapi.WithAddr("unix:"+s.node.socket())))
	if err != nil {
		t.Fatalf("workload of %s: %v\n%s", s.td, err, s.node.log)
	}
	t.Cleanup(func() { _ = source.Close() })
	return source
}

// webCertificate makes a certificate for 127.0.0.1 and its key in dir, and the
// file of the CA that signed it.
func webCertificate(t *testing.T, dir string) (cert, key, roots string) {
	t.Helper()
	issue := func(name string, template, parent *x509.Certificate, signer *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template.NotBefore, template.NotAfter = time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
		template.SerialNumber, template.Subject = big.NewInt(time.Now().UnixNano()), pkix.Name{CommonName: name}
		if signer == nil {
			parent, signer = template, priv
		}
		der, err := x509.CreateCertificate(rand.Reader, template, parent, priv.Public(), signer)
		if err != nil {
			t.Fatal(err)
		}
		out, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(priv)
		if err != nil {
			t.Fatal(err)
		}
		for suffix, block := range map[string]*pem.Block{".pem": {Type: "CERTIFICATE", Bytes: der}, ".key": {Type: "PRIVATE KEY", Bytes: keyDER}} {
			if err := os.WriteFile(filepath.Join(dir, name+suffix), pem.EncodeToMemory(block), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return out, priv
	}
	ca, caKey := issue("web-ca", &x509.Certificate{IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}, nil, nil)
	issue("web", &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, ca, caKey)
	return filepath.Join(dir, "web.pem"), filepath.Join(dir, "web.key"), filepath.Join(dir, "web-ca.pem")
}

// silence is an endpoint that takes connections and never says a word.
func silence(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { _ = c.Close() })
		}
	}()
	return "https://" + l.Addr().String()
}

// eventually tries until it succeeds.
func eventually(t *testing.T, within time.Duration, what string, try func() error) {
	t.Helper()
	start := time.Now()
	for {
		err := try()
		if err == nil {
			t.Logf("%s after %s", what, time.Since(start).Round(time.Millisecond))
			return
		}
		if time.Since(start) > within {
			t.Fatalf("%s: not within %s: %v", what, within, err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// shake has a workload of one trust domain serve another's.
func shake(t *testing.T, server, client *workloadapi.X509Source) error {
	t.Helper()
	id := func(s *workloadapi.X509Source) spiffeid.ID {
		svid, err := s.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		return svid.ID
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	l, err := spiffetls.ListenWithMode(ctx, "tcp", "127.0.0.1:0", spiffetls.MTLSServerWithSource(tlsconfig.AuthorizeID(id(client)), server))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	served := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err != nil {
			served <- err
			return
		}
		defer c.Close()
		_, err = io.WriteString(c, "hello")
		served <- err
	}()
	c, err := spiffetls.DialWithMode(ctx, "tcp", l.Addr().String(), spiffetls.MTLSClientWithSource(tlsconfig.AuthorizeID(id(server)), client))
	if err != nil {
		return err
	}
	defer c.Close()
	got, err := io.ReadAll(c)
	if err != nil || string(got) != "hello" {
		return fmt.Errorf("read %q, %w", got, err)
	}
	return <-served
}

// rootsOf are the X.509 authorities of a foreign trust domain that a workload
// knows.
func rootsOf(s *workloadapi.X509Source, td string) int {
	b, err := s.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString(td))
	if err != nil {
		return 0
	}
	return len(b.X509Authorities())
}

// Two trust domains federate by their bundle endpoints, one of each profile.
// Workloads shake hands in both directions, over the Workload API and with what
// Istio would get; a new key of one side reaches the other; an endpoint that
// hangs holds nobody up.
func TestFederation(t *testing.T) {
	cert, key, roots := webCertificate(t, t.TempDir())
	west := startSite(t, "west.test", "24h", "", "SSL_CERT_FILE="+roots)
	east := startSite(t, "east.test", "1m", fmt.Sprintf("    profile: https_web\n    certFile: %s\n    keyFile: %s\n", cert, key))

	// The one that hangs comes first.
	west.cli("federation", "create", "-trustDomain", "silent.test", "-bundleEndpointProfile", "https_web", "-bundleEndpointURL", silence(t))
	west.cli("federation", "create", "-trustDomain", east.td, "-bundleEndpointProfile", "https_web", "-bundleEndpointURL", "https://"+east.endpoint)
	east.cli("federation", "create", "-trustDomain", west.td, "-bundleEndpointProfile", "https_spiffe", "-bundleEndpointURL", "https://"+west.endpoint,
		"-endpointSpiffeID", "spiffe://"+west.td+"/spire/server", "-trustDomainBundlePath", west.path("bundle.pem"))
	eventually(t, 5*time.Second, "west has east's bundle", func() error {
		_, err := west.tryCLI("bundle", "list", "-id", east.td)
		return err
	})
	// The bundle given by hand has no JWT key; the fetched one has.
	eventually(t, 5*time.Second, "east has west's bundle", func() error {
		if out := east.cli("bundle", "list", "-id", west.td, "-format", "spiffe"); !strings.Contains(out, "jwt-svid") {
			return fmt.Errorf("it has %s", out)
		}
		return nil
	})

	west.join()
	east.join()
	w, e := west.workload(east.td), east.workload(west.td)
	for name, pair := range map[string][2]*workloadapi.X509Source{"west serves east": {w, e}, "east serves west": {e, w}} {
		if err := shake(t, pair[0], pair[1]); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}

	envoy := openEnvoy(withTimeout(t), west.node, "ROOTCA")
	if got := validated(t, secrets(t, envoy.next())["ROOTCA"]); !slices.Equal(got, []string{east.td, west.td}) {
		t.Errorf("Istio's ROOTCA validates %v", got)
	}

	if out := west.cli("federation", "list", "-o", "wide"); !strings.Contains(out, "east.test") || !strings.Contains(out, " ok ") || !strings.Contains(out, "silent.test") {
		t.Error(out)
	}
	out, err := west.tryCLI("federation", "refresh", "-id", east.td)
	if err != nil || strings.TrimSpace(out) != "Bundle refreshed" {
		t.Errorf("refresh: %v, %s", err, out)
	}

	// East's CA lives a minute: a new key is in its bundle after half of it, and
	// signs before the minute has passed.
	before := rootsOf(w, east.td)
	old, err := e.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, 90*time.Second, "the workload in west knows east's new key", func() error {
		if rootsOf(w, east.td) <= before {
			return fmt.Errorf("it knows %d", rootsOf(w, east.td))
		}
		return nil
	})
	eventually(t, 90*time.Second, "the workload in east has an SVID by the new key", func() error {
		svid, err := e.GetX509SVID()
		if err != nil {
			return err
		}
		if string(svid.Certificates[0].AuthorityKeyId) == string(old.Certificates[0].AuthorityKeyId) {
			return fmt.Errorf("it has the old one")
		}
		return nil
	})
	if err := shake(t, w, e); err != nil {
		t.Errorf("after the rotation: %v", err)
	}
	for _, a := range []*agent{west.agent, east.agent, west.node, east.node} {
		a.alive()
	}
}

// validated are the trust domains that a validation context has bundles of.
func validated(t *testing.T, s *tlsv3.Secret) []string {
	t.Helper()
	var config tlsv3.SPIFFECertValidatorConfig
	if err := s.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(&config); err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, td := range config.GetTrustDomains() {
		out = append(out, td.GetName())
	}
	return out
}
