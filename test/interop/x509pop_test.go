package interop_test

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// machineCA is a CA outside of SPIFFE, with its certificate in a file.
type machineCA struct {
	t    *testing.T
	cert *x509.Certificate
	key  crypto.Signer
	dir  string
	file string
	last int64
}

func newMachineCA(t *testing.T) *machineCA {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &machineCA{t: t, key: key, dir: t.TempDir()}
	c.cert = c.sign(key, func(cert *x509.Certificate) {
		cert.Subject.CommonName, cert.IsCA, cert.KeyUsage = "machines", true, x509.KeyUsageCertSign
	})
	c.file = c.write("ca.pem", "CERTIFICATE", c.cert.Raw)
	return c
}

func (c *machineCA) write(name, kind string, der []byte) string {
	c.t.Helper()
	path := filepath.Join(c.dir, name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		c.t.Fatal(err)
	}
	return path
}

func (c *machineCA) sign(key crypto.Signer, edit func(*x509.Certificate)) *x509.Certificate {
	c.t.Helper()
	c.last++
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(c.last), Subject: pkix.Name{CommonName: "rack-1"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	if edit != nil {
		edit(tmpl)
	}
	parent := c.cert
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), c.key)
	if err != nil {
		c.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		c.t.Fatal(err)
	}
	return cert
}

// machine is a certificate with its key.
type machine struct {
	chain [][]byte
	key   *ecdsa.PrivateKey
}

func (c *machineCA) machine(edit func(*x509.Certificate)) machine {
	c.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		c.t.Fatal(err)
	}
	return machine{[][]byte{c.sign(key, edit).Raw}, key}
}

func (m machine) agentID() string {
	sum := sha1.Sum(m.chain[0])
	return "spiffe://" + trustDomain + "/spire/agent/x509pop/" + hex.EncodeToString(sum[:])
}

// pop attests by x509pop with the chain of one machine and the key of another,
// or the same.
func (a *authority) pop(m machine, key *ecdsa.PrivateKey) (*x509svid.SVID, *agentpb.AttestAgentResponse_Result, error) {
	a.t.Helper()
	stream, err := agentpb.NewAgentClient(a.tls(nil)).AttestAgent(withTimeout(a.t))
	if err != nil {
		a.t.Fatal(err)
	}
	own, csr := keyAndCSR(a.t)
	payload, err := json.Marshal(map[string]any{"certificates": m.chain})
	if err != nil {
		a.t.Fatal(err)
	}
	if err := stream.Send(&agentpb.AttestAgentRequest{Step: &agentpb.AttestAgentRequest_Params_{Params: &agentpb.AttestAgentRequest_Params{
		Data: &typespb.AttestationData{Type: "x509pop", Payload: payload}, Params: &agentpb.AgentX509SVIDParams{Csr: csr},
	}}}); err != nil {
		a.t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil {
		return nil, nil, err
	}
	var challenge struct {
		ECDSA struct{ Nonce []byte } `json:"ecdsa_signature"`
	}
	if err := json.Unmarshal(resp.GetChallenge(), &challenge); err != nil || len(challenge.ECDSA.Nonce) != 32 || !strings.HasPrefix(string(resp.GetChallenge()), `{"rsa_signature":null,`) {
		a.t.Fatalf("challenge %s: %v", resp.GetChallenge(), err)
	}
	nonce := make([]byte, 32)
	digest := sha256.Sum256(append(challenge.ECDSA.Nonce, nonce...))
	r, s, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		a.t.Fatal(err)
	}
	answer, err := json.Marshal(map[string]any{"ecdsa_signature": map[string][]byte{"nonce": nonce, "r": r.Bytes(), "s": s.Bytes()}})
	if err != nil {
		a.t.Fatal(err)
	}
	if err := stream.Send(&agentpb.AttestAgentRequest{Step: &agentpb.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer}}); err != nil {
		a.t.Fatal(err)
	}
	if resp, err = stream.Recv(); err != nil {
		return nil, nil, err
	}
	return toSVID(a.t, own, resp.GetResult().GetSvid().GetCertChain()), resp.GetResult(), nil
}

func (a *authority) mustPop(m machine) *x509svid.SVID {
	a.t.Helper()
	svid, result, err := a.pop(m, m.key)
	if err != nil {
		a.t.Fatal(err)
	}
	if !result.GetReattestable() {
		a.t.Error("an agent by x509pop is told that it cannot attest again")
	}
	return svid
}

func wantCode(t *testing.T, err error, code codes.Code, text string) {
	t.Helper()
	if st := status.Convert(err); st.Code() != code || !strings.HasPrefix(st.Message(), text) {
		t.Errorf("got %v, want %s %s", err, code, text)
	}
}

func TestX509PoP(t *testing.T) {
	ca := newMachineCA(t)
	a := startAuthority(t, fmt.Sprintf("nodeAttestation: {x509pop: {mode: external_pki, caBundlePaths: [%s], verifyClientIP: true}}\n", ca.file))
	m, other := ca.machine(nil), ca.machine(func(c *x509.Certificate) { c.IPAddresses = nil })
	svid := a.mustPop(m)
	if svid.ID.String() != m.agentID() {
		t.Errorf("attested as %s, want %s", svid.ID, m.agentID())
	}
	out := a.cli("agent", "show", "-spiffeID", m.agentID())
	for _, want := range []string{"Attestation type  : x509pop", "Can re-attest     : true", "Selectors         : x509pop:subject:cn:rack-1", "Selectors         : x509pop:ca:fingerprint:", "Selectors         : x509pop:serialnumber:02"} {
		if !strings.Contains(out, want) {
			t.Errorf("agent show lacks %q:\n%s", want, out)
		}
	}
	_, _, err := a.pop(m, other.key)
	wantCode(t, err, codes.PermissionDenied, "nodeattestor(x509pop): challenge response verification failed: ECDSA signature verify failed")
	_, _, err = a.pop(other, other.key)
	wantCode(t, err, codes.PermissionDenied, "nodeattestor(x509pop): client IP 127.0.0.1 does not match any certificate IP SAN")
	stranger := newMachineCA(t).machine(nil)
	_, _, err = a.pop(stranger, stranger.key)
	wantCode(t, err, codes.PermissionDenied, "nodeattestor(x509pop): certificate verification failed: ")

	// Attesting again replaces the SVID; a banned agent stays out.
	list := func(as *x509svid.SVID) error {
		_, err := entrypb.NewEntryClient(a.tls(as)).GetAuthorizedEntries(withTimeout(t), &entrypb.GetAuthorizedEntriesRequest{})
		return err
	}
	if err := list(svid); err != nil {
		t.Error(err)
	}
	again := a.mustPop(m)
	if err := list(again); err != nil {
		t.Error(err)
	}
	wantReason(t, list(svid), typespb.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	a.cli("agent", "ban", "-spiffeID", m.agentID())
	_, _, err = a.pop(m, m.key)
	wantCode(t, err, codes.PermissionDenied, "failed to attest: agent is banned")
}

// In mode spiffe an X.509-SVID of the trust domain is the proof, if it is one
// of those set aside for that.
func TestX509PoPWithSVIDs(t *testing.T) {
	a := startAuthority(t, "nodeAttestation: {x509pop: {mode: spiffe}}\n")
	mint := func(path string) machine {
		t.Helper()
		dir := t.TempDir()
		a.cli("x509", "mint", "-spiffeID", "spiffe://"+trustDomain+path, "-write", dir)
		svid, err := x509svid.Load(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		var chain [][]byte
		for _, c := range svid.Certificates {
			chain = append(chain, c.Raw)
		}
		return machine{chain, svid.PrivateKey.(*ecdsa.PrivateKey)}
	}
	if got := a.mustPop(mint("/spire-exchange/rack/1")); got.ID != spiffeid.RequireFromString("spiffe://"+trustDomain+"/spire/agent/x509pop/rack/1") {
		t.Errorf("attested as %s", got.ID)
	}
	web := mint("/web")
	_, _, err := a.pop(web, web.key)
	wantCode(t, err, codes.PermissionDenied, "nodeattestor(x509pop): x509 cert doesnt match SVID prefix")
}

// A real SPIRE Agent attests to our authority and serves a workload, however it
// attests.
func TestSPIREAgentOfOurAuthority(t *testing.T) {
	if os.Getenv("SPIRE_AGENT") == "" {
		t.Skip("SPIRE_AGENT does not name a spire-agent binary")
	}
	ca := newMachineCA(t)
	a := startAuthority(t, fmt.Sprintf("nodeAttestation: {x509pop: {mode: external_pki, caBundlePaths: [%s]}, k8sPSAT: {cluster: demo, serviceAccountAllowList: ['spire-system:spire-agent'], kubeConfigFile: %s}}\n",
		ca.file, kubeAPI(t, "projected")))
	m := ca.machine(nil)
	projected := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(projected, []byte("projected"), 0o600); err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(m.key)
	if err != nil {
		t.Fatal(err)
	}
	token := a.token("")
	for name, tc := range map[string]struct{ agent, plugin, id string }{
		"join_token": {fmt.Sprintf("join_token = %q", token), `NodeAttestor "join_token" { plugin_data {} }`, "spiffe://" + trustDomain + "/spire/agent/join_token/" + token},
		"x509pop": {
			"", fmt.Sprintf(`NodeAttestor "x509pop" { plugin_data { private_key_path = %q certificate_path = %q } }`,
				ca.write("key.pem", "PRIVATE KEY", key), ca.write("cert.pem", "CERTIFICATE", m.chain[0])), m.agentID(),
		},
		"k8s_psat": {
			"", fmt.Sprintf(`NodeAttestor "k8s_psat" { plugin_data { cluster = "demo" token_path = %q } }`, projected),
			"spiffe://" + trustDomain + "/spire/agent/k8s_psat/demo/node-uid-1",
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := "/of/" + name
			a.register(tc.id, path)
			dir := t.TempDir()
			public := socketDir(t)
			spire := runSPIREAgent(t, a, public, dir, tc.agent, tc.plugin)
			addr := workloadapi.WithAddr("unix:" + public + "/spire-agent.sock")
			svid := waitForSVID(t, spire, public+"/spire-agent.sock")
			if _, _, err := x509svid.Verify(svid.Certificates, a.bundle); err != nil || svid.ID.Path() != path {
				t.Errorf("%s: %v", svid.ID, err)
			}
			jwt, err := workloadapi.FetchJWTSVID(withTimeout(t), jwtsvid.Params{Audience: "audience"}, addr)
			if err != nil || jwt.ID.Path() != path {
				t.Errorf("JWT-SVID: %v, %v", jwt, err)
			}
			out := a.cli("agent", "show", "-spiffeID", tc.id)
			for _, want := range []string{"Attestation type  : " + name, "Agent version     : 1."} {
				if !strings.Contains(out, want) {
					t.Errorf("agent show lacks %q:\n%s", want, out)
				}
			}
		})
	}
}
