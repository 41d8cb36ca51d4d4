package x509pop_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/x509pop"
)

var td = spiffeid.RequireTrustDomainFromString("example.org")

// holder is a certificate, who signed it, and its key.
type holder struct {
	cert *x509.Certificate
	key  crypto.Signer
	up   []*holder // issuers, nearest first
}

var serial = big.NewInt(0xabc)

// sign makes a certificate; issuer nil = self-signed.
func sign(tb testing.TB, issuer *holder, key crypto.Signer, edit func(*x509.Certificate)) *holder {
	tb.Helper()
	serial = new(big.Int).Add(serial, big.NewInt(1))
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "machine"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}
	if edit != nil {
		edit(tmpl)
	}
	parent, signer, up := tmpl, key, []*holder(nil)
	if issuer != nil {
		parent, signer, up = issuer.cert, issuer.key, append([]*holder{issuer}, issuer.up...)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	if err != nil {
		tb.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		tb.Fatal(err)
	}
	return &holder{cert, key, up}
}

func ecKey(tb testing.TB) *ecdsa.PrivateKey {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func rsaKey(tb testing.TB) *rsa.PrivateKey {
	tb.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		tb.Fatal(err)
	}
	return key
}

func ca(tb testing.TB, issuer *holder, name string) *holder {
	tb.Helper()
	return sign(tb, issuer, ecKey(tb), func(c *x509.Certificate) {
		c.Subject.CommonName, c.IsCA, c.KeyUsage = name, true, x509.KeyUsageCertSign
	})
}

// caFile is the certificates as a PEM file.
func caFile(tb testing.TB, holders ...*holder) string {
	tb.Helper()
	var out []byte
	for _, h := range holders {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.cert.Raw})...)
	}
	name := filepath.Join(tb.TempDir(), "ca.pem")
	if err := os.WriteFile(name, out, 0o600); err != nil {
		tb.Fatal(err)
	}
	return name
}

// chain is the payload: the leaf and all issuers but the root.
func (h *holder) chain() []byte {
	certs := [][]byte{h.cert.Raw}
	for i, up := range h.up {
		if i < len(h.up)-1 {
			certs = append(certs, up.cert.Raw)
		}
	}
	return payload(certs...)
}

func payload(certs ...[]byte) []byte {
	out, err := json.Marshal(map[string]any{"certificates": certs})
	if err != nil {
		panic(err)
	}
	return out
}

// answer is what a SPIRE Agent with this key says to a challenge.
func answer(key crypto.Signer, challenge []byte) ([]byte, error) {
	var q map[string]*struct{ Nonce []byte }
	if err := json.Unmarshal(challenge, &q); err != nil {
		return nil, err
	}
	if len(q) != 2 {
		return nil, errors.New("a member of the challenge is missing: " + string(challenge))
	}
	own := make([]byte, 32)
	_, _ = rand.Read(own)
	switch key := key.(type) {
	case *rsa.PrivateKey:
		digest := sha256.Sum256(append(q["rsa_signature"].Nonce, own...))
		sig, err := rsa.SignPSS(rand.Reader, key, crypto.SHA256, digest[:], nil)
		if err != nil {
			return nil, err
		}
		return json.Marshal(map[string]any{"rsa_signature": map[string][]byte{"nonce": own, "signature": sig}})
	case *ecdsa.PrivateKey:
		digest := sha256.Sum256(append(q["ecdsa_signature"].Nonce, own...))
		r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
		if err != nil {
			return nil, err
		}
		return json.Marshal(map[string]any{"ecdsa_signature": map[string][]byte{"nonce": own, "r": r.Bytes(), "s": s.Bytes()}})
	}
	return nil, errors.New("no such key")
}

func (h *holder) prove(challenge []byte) ([]byte, error) { return answer(h.key, challenge) }

func attestor(tb testing.TB, cfg x509pop.Config) *x509pop.Attestor {
	tb.Helper()
	cfg.TrustDomain = td
	if cfg.Mode == "" {
		cfg.Mode = x509pop.ExternalPKI
	}
	a, err := x509pop.New(cfg)
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

func fingerprint(h *holder) string {
	sum := sha1.Sum(h.cert.Raw)
	return hex.EncodeToString(sum[:])
}

func TestMachinesOfACA(t *testing.T) {
	root := ca(t, nil, "root")
	middle := ca(t, root, "middle")
	uri := &url.URL{Scheme: "x509pop", Host: "example.org", Path: "/rack/r1/slot2"}
	other := &url.URL{Scheme: "x509pop", Host: "other.org", Path: "/rack/r2"}
	a := attestor(t, x509pop.Config{CAFiles: []string{caFile(t, root)}})
	if a.Type() != "x509pop" {
		t.Error(a.Type())
	}
	for name, key := range map[string]crypto.Signer{"ECDSA": ecKey(t), "RSA": rsaKey(t)} {
		t.Run(name, func(t *testing.T) {
			leaf := sign(t, middle, key, func(c *x509.Certificate) { c.URIs = []*url.URL{uri, other} })
			got, err := a.Attest(t.Context(), leaf.chain(), leaf.prove)
			if err != nil {
				t.Fatal(err)
			}
			if want := "spiffe://example.org/spire/agent/x509pop/" + fingerprint(leaf); got.AgentID.String() != want || !got.Reattestable {
				t.Errorf("got %s, %t, want %s", got.AgentID, got.Reattestable, want)
			}
			hexSerial := leaf.cert.SerialNumber.Text(16)
			if len(hexSerial)%2 == 1 {
				hexSerial = "0" + hexSerial
			}
			var values []string
			for s := range got.Selectors.All() {
				values = append(values, s.String())
			}
			have := " " + strings.Join(values, " ") + " "
			for _, want := range []string{"subject:cn:machine", "ca:fingerprint:" + fingerprint(middle), "ca:fingerprint:" + fingerprint(root), "serialnumber:" + hexSerial, "san:rack:r1/slot2"} {
				if !strings.Contains(have, " x509pop:"+want+" ") {
					t.Errorf("no %s in%s", want, have)
				}
			}
			if len(values) != 5 {
				t.Errorf("selectors%s", have)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	root := ca(t, nil, "root")
	a := attestor(t, x509pop.Config{CAFiles: []string{caFile(t, root)}, MaxRSAKeySize: 1536})
	good := sign(t, root, ecKey(t), nil)
	stranger := sign(t, ca(t, nil, "root"), ecKey(t), nil)
	expired := sign(t, root, ecKey(t), func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Second) })
	noUsage := sign(t, root, ecKey(t), func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement })
	large := sign(t, root, rsaKey(t), nil)
	_, edKey, _ := ed25519.GenerateKey(rand.Reader)
	ed := sign(t, root, edKey, nil)
	deep := root
	for range 6 {
		deep = ca(t, deep, "deep")
	}
	fixed := func(text string) func([]byte) ([]byte, error) {
		return func([]byte) ([]byte, error) { return []byte(text), nil }
	}
	nobody := func([]byte) ([]byte, error) { t.Error("a challenge was sent"); return nil, errors.New("no") }
	gone := errors.New("the stream broke")
	for name, tc := range map[string]struct {
		payload []byte
		prove   func([]byte) ([]byte, error)
		kind    error
		text    string
	}{
		"no JSON":            {[]byte("x"), nobody, nodeattest.ErrInvalid, "failed to unmarshal data: "},
		"no certificate":     {[]byte(`{}`), nobody, nodeattest.ErrInvalid, "no certificate to attest"},
		"null":               {[]byte(`null`), nobody, nodeattest.ErrInvalid, "no certificate to attest"},
		"no DER":             {payload([]byte{1}), nobody, nodeattest.ErrInvalid, "unable to parse leaf certificate: "},
		"intermediate":       {payload(good.cert.Raw, []byte{1}), nobody, nodeattest.ErrInvalid, "unable to parse intermediate certificate 0: "},
		"too many":           {sign(t, deep, ecKey(t), nil).chain(), nobody, nodeattest.ErrInvalid, "too many intermediate certificates"},
		"too large a key":    {large.chain(), nobody, nodeattest.ErrInvalid, "leaf certificate key size too large"},
		"large intermediate": {payload(good.cert.Raw, large.cert.Raw), nobody, nodeattest.ErrInvalid, "intermediate certificate 0 key size too large"},
		"too large":          {make([]byte, 256<<10+1), nobody, nodeattest.ErrInvalid, "attestation data of 262145 bytes"},
		"another CA":         {stranger.chain(), nobody, nodeattest.ErrDenied, "certificate verification failed: "},
		"expired":            {expired.chain(), nobody, nodeattest.ErrDenied, "certificate verification failed: "},
		"no signatures":      {noUsage.chain(), nobody, nil, "unable to generate challenge: certificate not intended for digital signature use"},
		"Ed25519":            {ed.chain(), nobody, nil, "unable to generate challenge: unsupported public key type ed25519.PublicKey"},
		"another key":        {good.chain(), stranger.prove, nodeattest.ErrDenied, "challenge response verification failed: ECDSA signature verify failed"},
		"the other kind":     {good.chain(), fixed(`{"rsa_signature":{}}`), nodeattest.ErrDenied, "challenge response verification failed: expecting ECDSA response"},
		"short nonce":        {good.chain(), fixed(`{"ecdsa_signature":{"nonce":"AA=="}}`), nodeattest.ErrDenied, "challenge response verification failed: invalid response nonce"},
		"silent answer":      {good.chain(), fixed(``), nodeattest.ErrInvalid, "unable to unmarshal challenge response: "},
		"endless answer":     {good.chain(), fixed(strings.Repeat(" ", 1<<20)), nodeattest.ErrInvalid, "challenge response of 1048576 bytes"},
		"broken stream":      {good.chain(), func([]byte) ([]byte, error) { return nil, gone }, gone, "the stream broke"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := a.Attest(t.Context(), tc.payload, tc.prove)
			if err == nil || !strings.HasPrefix(err.Error(), tc.text) {
				t.Fatalf("got %v, want %s", err, tc.text)
			}
			if tc.kind != nil && !errors.Is(err, tc.kind) || tc.kind == nil && (errors.Is(err, nodeattest.ErrDenied) || errors.Is(err, nodeattest.ErrInvalid)) {
				t.Errorf("%v is of another kind", err)
			}
		})
	}
	// An answer is good for one challenge.
	var heard []byte
	if _, err := a.Attest(t.Context(), good.chain(), func(q []byte) (_ []byte, err error) { heard, err = good.prove(q); return heard, err }); err != nil {
		t.Fatal(err)
	}
	if _, err := a.Attest(t.Context(), good.chain(), fixed(string(heard))); !errors.Is(err, nodeattest.ErrDenied) {
		t.Errorf("an old answer: %v", err)
	}
}

func TestSVIDsOfTheTrustDomain(t *testing.T) {
	root := ca(t, nil, "root")
	a := attestor(t, x509pop.Config{Mode: x509pop.SPIFFE, Bundle: func() *x509bundle.Bundle {
		return x509bundle.FromX509Authorities(td, []*x509.Certificate{root.cert})
	}})
	svid := func(ids ...string) *holder {
		return sign(t, root, ecKey(t), func(c *x509.Certificate) {
			for _, id := range ids {
				c.URIs = append(c.URIs, spiffeid.RequireFromString(id).URL())
			}
		})
	}
	h := svid("spiffe://example.org/spire-exchange/rack/1")
	got, err := a.Attest(t.Context(), h.chain(), h.prove)
	if err != nil || got.AgentID.String() != "spiffe://example.org/spire/agent/x509pop/rack/1" {
		t.Errorf("%v, %v", got, err)
	}
	for name, tc := range map[string]struct {
		h    *holder
		text string
	}{
		"workload":      {svid("spiffe://example.org/web"), "x509 cert doesnt match SVID prefix"},
		"prefix alone":  {svid("spiffe://example.org/spire-exchange"), "x509 cert doesnt match SVID prefix"},
		"another agent": {svid("spiffe://example.org/spire/agent/x509pop/rack/1"), "x509 cert doesnt match SVID prefix"},
		"another trust": {svid("spiffe://other.org/spire-exchange/rack/1"), "certificate verification failed: "},
		"two IDs":       {svid("spiffe://example.org/spire-exchange/a", "spiffe://example.org/spire-exchange/b"), "certificate verification failed: "},
		"no ID":         {svid(), "certificate verification failed: "},
		"CA": {sign(t, root, ecKey(t), func(c *x509.Certificate) {
			c.IsCA, c.URIs = true, []*url.URL{spiffeid.RequireFromString("spiffe://example.org/spire-exchange/a").URL()}
		}), "certificate verification failed: "},
	} {
		_, err := a.Attest(t.Context(), tc.h.chain(), tc.h.prove)
		if !errors.Is(err, nodeattest.ErrDenied) || !strings.HasPrefix(err.Error(), tc.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAgentPath(t *testing.T) {
	root := ca(t, nil, "root")
	files := []string{caFile(t, root)}
	h := sign(t, root, ecKey(t), func(c *x509.Certificate) {
		c.URIs = []*url.URL{{Scheme: "x509pop", Host: "example.org", Path: "/env/prod"}}
	})
	for text, want := range map[string]string{
		"/x509pop/{{ .Subject.CommonName }}":                      "/spire/agent/x509pop/machine",
		"/{{ .PluginName }}/{{ .TrustDomain }}":                   "/spire/agent/x509pop/example.org",
		"/x509pop/{{ .URISanSelectors.env }}":                     "/spire/agent/x509pop/prod",
		"/x509pop/{{ .SerialNumberHex }}":                         "/spire/agent/x509pop/0" + h.cert.SerialNumber.Text(16),
		"/x509pop/{{ .URISanSelectors.rack }}":                    "",
		"/x509pop/{{ .SVIDPathTrimmed }}":                         "",
		"/x509pop/{{ .Subject.Nobody }}":                          "",
		`/x509pop/{{ printf "%s/../x" .Subject.CommonName }}`:     "",
		"/x509pop/{{ if .IsCA }}ca{{ else }}machine{{ end }}/own": "/spire/agent/x509pop/machine/own",
	} {
		got, err := attestor(t, x509pop.Config{CAFiles: files, AgentPath: text}).Attest(t.Context(), h.chain(), h.prove)
		switch {
		case want == "" && (err == nil || !strings.HasPrefix(err.Error(), "failed to make spiffe id: ")):
			t.Errorf("%s: %v, %v", text, got, err)
		case want != "" && (err != nil || got.AgentID.Path() != want):
			t.Errorf("%s: %v, %v", text, got, err)
		}
	}
}

func TestCallerIP(t *testing.T) {
	root := ca(t, nil, "root")
	a := attestor(t, x509pop.Config{CAFiles: []string{caFile(t, root)}, VerifyCallerIP: true})
	h := sign(t, root, ecKey(t), func(c *x509.Certificate) {
		c.IPAddresses = []net.IP{net.ParseIP("192.0.2.7"), net.ParseIP("fe80::1")}
	})
	for address, want := range map[string]string{
		"192.0.2.7": "", "::ffff:192.0.2.7": "", "fe80::1%eth0": "",
		"192.0.2.8": "client IP 192.0.2.8 does not match any certificate IP SAN",
		"":          "client IP not available for verification",
	} {
		ctx := t.Context()
		if address != "" {
			ctx = nodeattest.WithCaller(ctx, netip.MustParseAddr(address))
		}
		_, err := a.Attest(ctx, h.chain(), h.prove)
		if want == "" && err != nil || want != "" && (err == nil || err.Error() != want) {
			t.Errorf("%q: %v", address, err)
		}
	}
}

// A CA file may be exchanged while the authority runs; a broken one lets
// nobody in.
func TestCAFileIsReadAnew(t *testing.T) {
	old, next := ca(t, nil, "old"), ca(t, nil, "next")
	name := caFile(t, old)
	a := attestor(t, x509pop.Config{CAFiles: []string{name}})
	ofOld, ofNext := sign(t, old, ecKey(t), nil), sign(t, next, ecKey(t), nil)
	try := func(h *holder) error { _, err := a.Attest(t.Context(), h.chain(), h.prove); return err }
	if err := try(ofOld); err != nil {
		t.Error(err)
	}
	if err := os.Rename(caFile(t, next), name); err != nil {
		t.Fatal(err)
	}
	if err := try(ofNext); err != nil {
		t.Error(err)
	}
	if err := try(ofOld); !errors.Is(err, nodeattest.ErrDenied) {
		t.Errorf("the old CA: %v", err)
	}
	for content, want := range map[string]string{
		"": "holds no PEM certificate",
		"-----BEGIN KEY-----\n-----END KEY-----\n": "holds a KEY, not only certificates",
	} {
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := try(ofNext); err == nil || errors.Is(err, nodeattest.ErrDenied) || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", content, err)
		}
	}
}

func TestNew(t *testing.T) {
	file := caFile(t, ca(t, nil, "root"))
	bundle := func() *x509bundle.Bundle { return x509bundle.New(td) }
	for want, cfg := range map[string]x509pop.Config{
		"trust domain missing":           {Mode: x509pop.ExternalPKI, CAFiles: []string{file}},
		"no CA files":                    {TrustDomain: td, Mode: x509pop.ExternalPKI},
		"trust bundle missing":           {TrustDomain: td, Mode: x509pop.SPIFFE},
		"do not count in mode spiffe":    {TrustDomain: td, Mode: x509pop.SPIFFE, Bundle: bundle, CAFiles: []string{file}},
		"is neither external_pki":        {TrustDomain: td, Mode: "pki"},
		"agent path template":            {TrustDomain: td, Mode: x509pop.SPIFFE, Bundle: bundle, AgentPath: "{{"},
		"no such file or directory":      {TrustDomain: td, Mode: x509pop.ExternalPKI, CAFiles: []string{"/does/not/exist"}},
		"a limit is negative":            {TrustDomain: td, Mode: x509pop.ExternalPKI, CAFiles: []string{file}, MaxIntermediates: -1},
		"function \"lower\" not defined": {TrustDomain: td, Mode: x509pop.SPIFFE, Bundle: bundle, AgentPath: "/x509pop/{{ lower .PluginName }}"},
	} {
		if _, err := x509pop.New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

// FuzzAttest: nobody gets in without the key, whatever is sent.
func FuzzAttest(f *testing.F) {
	root := ca(f, nil, "root")
	good := sign(f, root, ecKey(f), nil)
	a := attestor(f, x509pop.Config{CAFiles: []string{caFile(f, root)}})
	signed, err := good.prove([]byte(`{"rsa_signature":null,"ecdsa_signature":{"nonce":"` + strings.Repeat("A", 43) + `="}}`))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good.chain(), signed)
	f.Add(payload(good.cert.Raw, root.cert.Raw), []byte(`{"ecdsa_signature":{"nonce":null,"r":"","s":""}}`))
	f.Add([]byte(`{"certificates":[null]}`), []byte(`{}`))
	f.Add([]byte(`{"certificates":"AA=="}`), []byte(`null`))
	f.Fuzz(func(t *testing.T, sent, response []byte) {
		got, err := a.Attest(t.Context(), sent, func([]byte) ([]byte, error) { return response, nil })
		if err == nil {
			t.Errorf("%q got in as %s", sent, got.AgentID)
		}
	})
}
