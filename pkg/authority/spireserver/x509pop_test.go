package spireserver_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	workload "github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
)

// node is a node's certificate and key in files.
type node struct {
	t    *testing.T
	dir  string
	x509 spireserver.X509POP
}

func newNode(t *testing.T) *node {
	t.Helper()
	dir := t.TempDir()
	return &node{t, dir, spireserver.X509POP{
		CertificatePath: filepath.Join(dir, "node.crt"), PrivateKeyPath: filepath.Join(dir, "node.key"),
	}}
}

// renew writes a new certificate for a key; the result is the certificate.
func (n *node) renew(key crypto.Signer, ends time.Time) *x509.Certificate {
	n.t.Helper()
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "node"},
		NotBefore: ends.Add(-48 * time.Hour), NotAfter: ends, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	ca := newRoot()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, key.Public(), ca.key)
	must(err)
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	must(err)
	n.write("node.crt", "CERTIFICATE", der)
	n.write("node.key", "PRIVATE KEY", keyDER)
	cert, err := x509.ParseCertificate(der)
	must(err)
	return cert
}

func (n *node) write(name, kind string, der []byte) string {
	path := filepath.Join(n.dir, name)
	must(os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	return path
}

type popMessage struct {
	RSA *struct {
		Nonce, Signature []byte
	} `json:"rsa_signature"`
	ECDSA *struct {
		Nonce, R, S []byte
	} `json:"ecdsa_signature"`
}

// challenge is what a server asks of a key, and the check of the answer.
func challenge(pub crypto.PublicKey) (ask []byte, verify func([]byte) bool) {
	nonce := make([]byte, 32)
	_, _ = rand.Read(nonce)
	type ours struct {
		Nonce []byte `json:"nonce"`
	}
	m := map[string]*ours{"rsa_signature": nil, "ecdsa_signature": nil}
	switch pub.(type) {
	case *rsa.PublicKey:
		m["rsa_signature"] = &ours{nonce}
	case *ecdsa.PublicKey:
		m["ecdsa_signature"] = &ours{nonce}
	}
	ask, err := json.Marshal(m)
	must(err)
	return ask, func(answer []byte) bool {
		var got popMessage
		if json.Unmarshal(answer, &got) != nil {
			return false
		}
		switch pub := pub.(type) {
		case *rsa.PublicKey:
			if got.RSA == nil || got.ECDSA != nil || len(got.RSA.Nonce) != 32 {
				return false
			}
			digest := sha256.Sum256(append(nonce, got.RSA.Nonce...))
			return rsa.VerifyPSS(pub, crypto.SHA256, digest[:], got.RSA.Signature, nil) == nil
		case *ecdsa.PublicKey:
			if got.ECDSA == nil || got.RSA != nil || len(got.ECDSA.Nonce) != 32 {
				return false
			}
			digest := sha256.Sum256(append(nonce, got.ECDSA.Nonce...))
			return ecdsa.Verify(pub, digest[:], new(big.Int).SetBytes(got.ECDSA.R), new(big.Int).SetBytes(got.ECDSA.S))
		}
		return false
	}
}

func shown(payload []byte) [][]byte {
	var p struct {
		Certificates [][]byte `json:"certificates"`
	}
	must(json.Unmarshal(payload, &p))
	return p.Certificates
}

func TestX509POP(t *testing.T) {
	ec256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	ec384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	must(err)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	must(err)
	n := newNode(t)
	// The files are replaced; each attestation is with what is there then.
	for _, key := range []crypto.Signer{ec256, ec384, rsaKey} {
		cert := n.renew(key, time.Now().Add(24*time.Hour))
		proof, err := n.x509.Prove(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if got := shown(proof.Payload); len(got) != 1 || string(got[0]) != string(cert.Raw) {
			t.Errorf("%T: shows %d certificates", key, len(got))
		}
		ask, verify := challenge(key.Public())
		answer, err := proof.Respond(ask)
		if err != nil || !verify(answer) {
			t.Errorf("%T: %s %v", key, answer, err)
		}
		if _, err := proof.Respond(ask); err == nil {
			t.Errorf("%T: a second challenge was answered", key)
		}
	}
	n.x509.IntermediatesPath = n.write("ca.crt", "CERTIFICATE", newRoot().cert.Raw)
	proof, err := n.x509.Prove(t.Context())
	if err != nil || len(shown(proof.Payload)) != 2 {
		t.Errorf("with an intermediate: %v", err)
	}
	other, err := n.x509.Prove(t.Context())
	must(err)
	for name, ask := range map[string]string{
		"not json":    "{",
		"nothing":     "{}",
		"other kind":  `{"ecdsa_signature":{"nonce":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}}`,
		"short nonce": `{"rsa_signature":{"nonce":"AAAA"}}`,
	} {
		if answer, err := other.Respond([]byte(ask)); err == nil {
			t.Errorf("%s: answered %s", name, answer)
		}
		other, err = n.x509.Prove(t.Context())
		must(err)
	}
}

func TestX509POPRefusals(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	_, edKey, err := ed25519.GenerateKey(rand.Reader)
	must(err)
	for name, tc := range map[string]struct {
		edit func(n *node)
		want string
	}{
		"no certificate": {func(n *node) { must(os.Remove(n.x509.CertificatePath)) }, "no such file"},
		"no key":         {func(n *node) { must(os.Remove(n.x509.PrivateKeyPath)) }, "no such file"},
		"expired":        {func(n *node) { n.renew(key, time.Now().Add(-time.Hour)) }, "expired at"},
		"wrong key": {func(n *node) {
			other, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
			must(err)
			der, err := x509.MarshalPKCS8PrivateKey(other)
			must(err)
			n.write("node.key", "PRIVATE KEY", der)
		}, "does not match"},
		"Ed25519":          {func(n *node) { n.renew(edKey, time.Now().Add(time.Hour)) }, "RSA or ECDSA"},
		"no intermediates": {func(n *node) { n.x509.IntermediatesPath = n.write("x", "CERTIFICATE", nil) }, "intermediates"},
		"a key among them": {func(n *node) { n.x509.IntermediatesPath = n.x509.PrivateKeyPath }, `type "PRIVATE KEY"`},
		"too large": {func(n *node) {
			must(os.WriteFile(n.x509.CertificatePath, make([]byte, 1<<20), 0o600))
		}, "at most"},
	} {
		n := newNode(t)
		n.renew(key, time.Now().Add(time.Hour))
		tc.edit(n)
		if _, err := n.x509.Prove(t.Context()); err == nil || !strings.Contains(err.Error(), tc.want) {
			t.Errorf("%s: %v, want %q", name, err, tc.want)
		}
	}
}

// An attestation with a challenge goes over the wire, and is repeated with the
// certificate that is there by then.
func TestX509POPAttests(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newFake()
		f.entries, f.agentTTL, f.reattestable = wireEntries(1), 10*time.Minute, true
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(err)
		n := newNode(t)
		cert := n.renew(key, time.Now().Add(1000*time.Hour))
		var seen []string
		f.challenge = func(payload []byte) ([]byte, func([]byte) bool) {
			certs := shown(payload)
			seen = append(seen, string(certs[0]))
			leaf, err := x509.ParseCertificate(certs[0])
			must(err)
			return challenge(leaf.PublicKey)
		}
		f.up(t)
		cfg := f.config(t)
		cfg.Attestor, cfg.Rebootstrap = n.x509, spireserver.RebootstrapAlways
		c := run(t, cfg)
		pass(time.Minute)
		if err := c.Ready(); err != nil {
			t.Fatal(err)
		}
		renewed := n.renew(key, time.Now().Add(1000*time.Hour))
		pass(10 * time.Minute)
		if len(seen) < 2 || seen[0] != string(cert.Raw) || seen[len(seen)-1] != string(renewed.Raw) {
			t.Errorf("attested %d times", len(seen))
		}
	})
}

// workloadAPI serves one SVID and one bundle.
type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	root *root
	id   spiffeid.ID
	key  *ecdsa.PrivateKey
	deny bool
}

func (w *workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, stream workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	if w.deny {
		return status.Error(codes.PermissionDenied, "no identity issued")
	}
	key, err := x509.MarshalPKCS8PrivateKey(w.key)
	must(err)
	return stream.Send(&workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
		SpiffeId: w.id.String(), X509Svid: w.root.issue(9, w.id, w.key.Public(), time.Hour), X509SvidKey: key, Bundle: w.root.cert.Raw,
	}}})
}

func (w *workloadAPI) FetchX509Bundles(_ *workload.X509BundlesRequest, stream workload.SpiffeWorkloadAPI_FetchX509BundlesServer) error {
	return stream.Send(&workload.X509BundlesResponse{Bundles: map[string][]byte{w.id.TrustDomain().IDString(): w.root.cert.Raw}})
}

// serveWorkloadAPI is the path of a socket at which w answers.
func serveWorkloadAPI(t *testing.T, w *workloadAPI) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sn-") //nolint:usetesting // t.TempDir is too long for a socket
	must(err)
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "api.sock")
	lis, err := new(net.ListenConfig).Listen(t.Context(), "unix", path)
	must(err)
	srv := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(srv, w)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(lis)
	}()
	t.Cleanup(func() { srv.Stop(); <-done })
	return path
}

func TestX509POPWorkload(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	w := &workloadAPI{root: newRoot(), id: spiffeid.RequireFromPath(td, "/spire-exchange/node-1"), key: key}
	path := serveWorkloadAPI(t, w)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	attestor := spireserver.X509POPWorkload{Socket: path}
	proof, err := attestor.Prove(ctx)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(shown(proof.Payload)[0])
	must(err)
	if leaf.URIs[0].String() != w.id.String() || attestor.Type() != "x509pop" {
		t.Errorf("shows %s", leaf.URIs[0])
	}
	ask, verify := challenge(leaf.PublicKey)
	if answer, err := proof.Respond(ask); err != nil || !verify(answer) {
		t.Errorf("%s %v", answer, err)
	}
	w.deny = true
	if _, err := attestor.Prove(ctx); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("nobody known: %v", err)
	}
}
