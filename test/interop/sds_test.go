package interop_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

func secrets(t *testing.T, res *discovery.DiscoveryResponse) map[string]*tlsv3.Secret {
	t.Helper()
	if res.GetTypeUrl() != secretType {
		t.Errorf("type_url %q", res.GetTypeUrl())
	}
	out := map[string]*tlsv3.Secret{}
	for _, r := range res.GetResources() {
		var s tlsv3.Secret
		if err := r.UnmarshalTo(&s); err != nil {
			t.Fatal(err)
		}
		out[s.GetName()] = &s
	}
	return out
}

func leaf(t *testing.T, s *tlsv3.Secret) *x509.Certificate {
	t.Helper()
	b, _ := pem.Decode(s.GetTlsCertificate().GetCertificateChain().GetInlineBytes())
	if b == nil {
		t.Fatalf("%s holds no certificate", s.GetName())
	}
	cert, err := x509.ParseCertificate(b.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// envoy is one stream, used as Envoy uses it: node on the first message only,
// every answer acknowledged.
type envoy struct {
	t      *testing.T
	s      secret.SecretDiscoveryService_StreamSecretsClient
	names  []string
	answer chan *discovery.DiscoveryResponse
	end    chan error
}

func openEnvoy(ctx context.Context, a *agent, names ...string) *envoy {
	a.t.Helper()
	s, err := secret.NewSecretDiscoveryServiceClient(a.dial()).StreamSecrets(ctx)
	if err != nil {
		a.t.Fatal(err)
	}
	e := &envoy{t: a.t, s: s, names: names, answer: make(chan *discovery.DiscoveryResponse, 16), end: make(chan error, 1)}
	e.send(&discovery.DiscoveryRequest{Node: &core.Node{Id: "sidecar~10.0.0.1~a.b~b.svc.cluster.local"}, TypeUrl: secretType, ResourceNames: names})
	go func() {
		for {
			res, err := s.Recv()
			if err != nil {
				e.end <- err
				return
			}
			e.answer <- res
		}
	}()
	return e
}

func (e *envoy) send(req *discovery.DiscoveryRequest) {
	e.t.Helper()
	if err := e.s.Send(req); err != nil {
		e.t.Fatalf("send: %v", err)
	}
}

func (e *envoy) next() *discovery.DiscoveryResponse {
	e.t.Helper()
	select {
	case res := <-e.answer:
		e.send(&discovery.DiscoveryRequest{TypeUrl: secretType, ResourceNames: e.names, VersionInfo: res.GetVersionInfo(), ResponseNonce: res.GetNonce()})
		return res
	case err := <-e.end:
		e.t.Fatalf("the stream ended: %v", err)
	case <-time.After(patience):
		e.t.Fatal("no answer")
	}
	return nil
}

// quiet fails the test if the agent says anything within a moment.
func (e *envoy) quiet() {
	e.t.Helper()
	select {
	case res := <-e.answer:
		e.t.Errorf("an answer nobody asked for: %v", slices.Collect(maps.Keys(secrets(e.t, res))))
	case err := <-e.end:
		e.t.Errorf("the stream ended: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
}

func TestStreamWaitsForItsIdentity(t *testing.T) {
	a := startAgent(t, "")
	ctx := withTimeout(t)
	svid := openEnvoy(ctx, a, "default")
	root := openEnvoy(ctx, a, "ROOTCA")
	if got := secrets(t, root.next()); got["ROOTCA"] == nil {
		t.Errorf("ROOTCA before registration: %v", got)
	}
	svid.quiet()

	id := a.createEntry("/late", "-selector", self(), "-x509SVIDTTL", "600")
	first := svid.next()
	cert := leaf(t, secrets(t, first)["default"])
	if got := cert.URIs[0].String(); got != "spiffe://example.org/late" {
		t.Errorf("SPIFFE ID %s", got)
	}
	if got := cert.Subject.String(); got != "O=SPIRE,C=US" {
		t.Errorf("subject %s", got)
	}
	svid.quiet() // an ACK is not answered

	a.cli("entry", "update", "-entryID", id, "-parentID", agentID, "-spiffeID", "spiffe://example.org/late", "-selector", self(), "-dns", "late.example.org")
	second := svid.next()
	if second.GetVersionInfo() == first.GetVersionInfo() || second.GetNonce() == first.GetNonce() {
		t.Error("new content under an old version or nonce")
	}
	if got := leaf(t, secrets(t, second)["default"]); got.Subject.CommonName != "late.example.org" {
		t.Errorf("CN %q", got.Subject.CommonName)
	}
	root.quiet() // the bundle did not change

	a.createEntry("/other", "-selector", "unix:uid:424242")
	svid.quiet() // nor did anything this caller gets
}

func TestStreamEndsOnceOnWithdrawal(t *testing.T) {
	a := startAgent(t, "")
	ctx := withTimeout(t)
	id := a.createEntry("/short", "-selector", self())
	e := openEnvoy(ctx, a, "default")
	e.next()
	a.cli("entry", "delete", "-entryID", id)
	select {
	case err := <-e.end:
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("ended with %v", err)
		}
	case <-ctx.Done():
		t.Fatal("the stream lives on without its identity")
	}
	again := openEnvoy(ctx, a, "default")
	again.quiet()
	a.createEntry("/short", "-selector", self())
	again.next()
}

func TestIstioNamesDoNotEndAStream(t *testing.T) {
	a := startAgent(t, "")
	a.createEntry("/proxy", "-selector", self())
	e := openEnvoy(withTimeout(t), a, "default", "file-root:system", "file-cert:/etc/certs/tls.crt~/etc/certs/tls.key", "ROOTCA", "ALL", "spiffe://example.org", "spiffe://example.org/proxy")
	// What is known comes at once; the SVID may be a signature away.
	got := secrets(t, e.next())
	if len(got) < 5 {
		got = secrets(t, e.next())
	}
	for _, want := range []string{"default", "ROOTCA", "ALL", "spiffe://example.org", "spiffe://example.org/proxy"} {
		if got[want] == nil {
			t.Errorf("%s was not answered", want)
		}
	}
	if len(got) != 5 {
		t.Errorf("answered: %v", slices.Collect(maps.Keys(got)))
	}
	e.quiet()
}

func TestReconnectIsAnsweredInFull(t *testing.T) {
	a := startAgent(t, "")
	a.createEntry("/again", "-selector", self())
	ctx := withTimeout(t)
	first := openEnvoy(ctx, a, "default").next()
	s, err := secret.NewSecretDiscoveryServiceClient(a.dial()).StreamSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&discovery.DiscoveryRequest{TypeUrl: secretType, ResourceNames: []string{"default"}, VersionInfo: first.GetVersionInfo()}); err != nil {
		t.Fatal(err)
	}
	res, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if res.GetVersionInfo() != first.GetVersionInfo() || len(res.GetResources()) != 1 {
		t.Errorf("version %s, %d resources", res.GetVersionInfo(), len(res.GetResources()))
	}
}

func TestDelta(t *testing.T) {
	a := startAgent(t, "")
	id := a.createEntry("/delta", "-selector", self())
	ctx := withTimeout(t)
	s, err := secret.NewSecretDiscoveryServiceClient(a.dial()).DeltaSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: secretType, ResourceNamesSubscribe: []string{"default", "ROOTCA"}}); err != nil {
		t.Fatal(err)
	}
	versions := map[string]string{}
	for len(versions) < 2 {
		res, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range res.GetResources() {
			versions[r.GetName()] = r.GetVersion()
		}
		if err := s.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: secretType, ResponseNonce: res.GetNonce()}); err != nil {
			t.Fatal(err)
		}
	}
	// A reconnecting client that has everything gets only what changed.
	a.cli("entry", "update", "-entryID", id, "-parentID", agentID, "-spiffeID", "spiffe://example.org/delta", "-selector", self(), "-dns", "d.example.org")
	for {
		res, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		if len(res.GetResources()) == 1 && res.GetResources()[0].GetName() == "default" {
			break
		}
		t.Errorf("answered: %v", res.GetResources())
	}
	again, err := secret.NewSecretDiscoveryServiceClient(a.dial()).DeltaSecrets(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Send(&discovery.DeltaDiscoveryRequest{TypeUrl: secretType, ResourceNamesSubscribe: []string{"default", "ROOTCA"}, InitialResourceVersions: versions}); err != nil {
		t.Fatal(err)
	}
	res, err := again.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if len(res.GetResources()) != 1 || res.GetResources()[0].GetName() != "default" {
		t.Errorf("initial versions were ignored: %v", res.GetResources())
	}
}

func TestFetch(t *testing.T) {
	a := startAgent(t, "")
	a.createEntry("/fetch", "-selector", self())
	client := secret.NewSecretDiscoveryServiceClient(a.dial())
	res, err := client.FetchSecrets(withTimeout(t), &discovery.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := secrets(t, res); got["default"] == nil || got["ROOTCA"] == nil {
		t.Errorf("got %v", got)
	}
}

func TestPlainValidationContextByMetadata(t *testing.T) {
	a := startAgent(t, "")
	meta, err := structpb.NewStruct(map[string]any{"disable_spiffe_cert_validation": "true"})
	if err != nil {
		t.Fatal(err)
	}
	client := secret.NewSecretDiscoveryServiceClient(a.dial())
	res, err := client.FetchSecrets(withTimeout(t), &discovery.DiscoveryRequest{Node: &core.Node{Metadata: meta}, ResourceNames: []string{"ROOTCA"}})
	if err != nil {
		t.Fatal(err)
	}
	root := secrets(t, res)["ROOTCA"].GetValidationContext()
	if len(root.GetTrustedCa().GetInlineBytes()) == 0 || root.GetCustomValidatorConfig() != nil {
		t.Errorf("got %v", root)
	}
	if res, err = client.FetchSecrets(withTimeout(t), &discovery.DiscoveryRequest{ResourceNames: []string{"ROOTCA"}}); err != nil {
		t.Fatal(err)
	}
	if v := secrets(t, res)["ROOTCA"].GetValidationContext(); v.GetCustomValidatorConfig().GetName() != "envoy.tls.cert_validator.spiffe" || v.GetTrustedCa() != nil {
		t.Errorf("got %v", v)
	}
}

func TestOpenSSLVerifiesWhatSDSServed(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("SKIPPED: openssl is not installed; nothing here verifies the chain with a second implementation")
	}
	a := startAgent(t, "sds: {disableSPIFFECertValidation: true}\n")
	a.createEntry("/openssl", "-selector", self(), "-dns", "a.example.org")
	res, err := secret.NewSecretDiscoveryServiceClient(a.dial()).FetchSecrets(withTimeout(t), &discovery.DiscoveryRequest{ResourceNames: []string{"default", "ROOTCA"}})
	if err != nil {
		t.Fatal(err)
	}
	got := secrets(t, res)
	dir := t.TempDir()
	chain, root, key := filepath.Join(dir, "svid.pem"), filepath.Join(dir, "root.pem"), filepath.Join(dir, "key.pem")
	for path, data := range map[string][]byte{
		chain: got["default"].GetTlsCertificate().GetCertificateChain().GetInlineBytes(),
		key:   got["default"].GetTlsCertificate().GetPrivateKey().GetInlineBytes(),
		root:  got["ROOTCA"].GetValidationContext().GetTrustedCa().GetInlineBytes(),
	} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, purpose := range []string{"sslclient", "sslserver"} {
		out, err := exec.CommandContext(t.Context(), openssl, "verify", "-x509_strict", "-purpose", purpose, "-CAfile", root, chain).CombinedOutput()
		if err != nil || !strings.Contains(string(out), "OK") {
			t.Errorf("openssl verify -purpose %s: %v\n%s", purpose, err, out)
		}
	}
	pub, err := exec.CommandContext(t.Context(), openssl, "pkey", "-in", key, "-pubout").Output()
	if err != nil {
		t.Fatal(err)
	}
	fromCert, err := exec.CommandContext(t.Context(), openssl, "x509", "-in", chain, "-noout", "-pubkey").Output()
	if err != nil || !bytes.Equal(pub, fromCert) {
		t.Errorf("key and certificate do not belong together: %v", err)
	}
	text, err := exec.CommandContext(t.Context(), openssl, "x509", "-in", chain, "-noout", "-subject", "-ext", "subjectAltName,keyUsage,extendedKeyUsage,basicConstraints").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"O = SPIRE", "CN = a.example.org", "URI:spiffe://example.org/openssl", "DNS:a.example.org", "CA:FALSE", "TLS Web Server Authentication, TLS Web Client Authentication", "Digital Signature, Key Encipherment, Key Agreement"} {
		if !strings.Contains(string(text), want) {
			t.Errorf("openssl does not show %q:\n%s", want, text)
		}
	}
}
