package interop_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// What an agent does against an unmodified SPIRE Server, driven with SPIRE's own
// command.

// real runs SPIRE's command.
func (s *spireServer) real(args ...string) string {
	s.t.Helper()
	out, err := exec.CommandContext(s.t.Context(), spireServerBinary(), append(args, "-socketPath", s.admin())...).CombinedOutput()
	if err != nil {
		s.t.Fatalf("spire-server %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// create makes an entry for this process below an agent.
func (s *spireServer) create(parent, path string, more ...string) string {
	s.t.Helper()
	args := []string{"entry", "create", "-output", "json", "-parentID", parent, "-spiffeID", "spiffe://" + trustDomain + path, "-selector", self()}
	var res struct {
		Results []struct{ Entry struct{ ID string } }
	}
	if err := json.Unmarshal([]byte(s.real(append(args, more...)...)), &res); err != nil || len(res.Results) != 1 {
		s.t.Fatalf("entry create: %v", err)
	}
	return res.Results[0].Entry.ID
}

// said waits until the agent's log holds a text.
func (a *agent) said(text string) {
	a.t.Helper()
	for deadline := time.Now().Add(patience); !strings.Contains(a.log.String(), text); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			a.t.Fatalf("the agent never said %q:\n%s", text, a.log)
		}
	}
}

// got is the certificate of one secret, and how long it took to come.
func got(ctx context.Context, t *testing.T, a *agent, name string) (*x509.Certificate, time.Duration) {
	t.Helper()
	start := time.Now()
	e := openEnvoy(ctx, a, name)
	cert := leaf(t, secrets(t, e.next())[name])
	return cert, time.Since(start)
}

func tokenAgent(token string) string {
	return "spiffe://" + trustDomain + "/spire/agent/join_token/" + token
}

func minutes(t *testing.T, n int) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Duration(n)*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func TestX509POPAtASPIREServer(t *testing.T) {
	ca := newMachineCA(t)
	s := startSPIREServer(t, "", fmt.Sprintf(`NodeAttestor "x509pop" { plugin_data { ca_bundle_path = %q } }`, ca.file))
	m := ca.machine(nil)
	cert := ca.write("node.crt", "CERTIFICATE", m.chain[0])
	keyDER, err := x509.MarshalPKCS8PrivateKey(m.key)
	if err != nil {
		t.Fatal(err)
	}
	key := ca.write("node.key", "PRIVATE KEY", keyDER)
	n := newJoined(t, s.address, fmt.Sprintf("{path: %s}", s.path("bundle.pem")),
		fmt.Sprintf("{type: x509pop, certificatePath: %s, privateKeyPath: %s}", cert, key), "    rebootstrap: {mode: always}")
	n.start()
	sum := sha1.Sum(m.chain[0])
	id := "spiffe://" + trustDomain + "/spire/agent/x509pop/" + hex.EncodeToString(sum[:])
	s.create(id, "/pop")
	ctx := minutes(t, 2)
	if cert, _ := got(ctx, t, n, "default"); cert.URIs[0].Path != "/pop" {
		t.Errorf("got %s", cert.URIs[0])
	}
	// Evicted, it attests anew by itself.
	before := strings.Count(n.log.String(), "agent SVID received")
	s.real("agent", "evict", "-spiffeID", id)
	for deadline := time.Now().Add(patience); strings.Count(n.log.String(), "agent SVID received") == before; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the agent did not attest anew:\n%s", n.log)
		}
	}
	n.waitReady()
	// Banned, it stays out and says so; what it has is served.
	s.real("agent", "ban", "-spiffeID", id)
	n.said("the server has banned this agent")
	if cert, _ := got(ctx, t, n, "default"); cert.URIs[0].Path != "/pop" {
		t.Errorf("got %s", cert.URIs[0])
	}
	n.alive()
}

// A node attests with the SVID that another agent's Workload API gives it, and
// takes its first bundle from there.
func TestX509POPWithAnSVIDAtASPIREServer(t *testing.T) {
	s := startSPIREServer(t, "", `NodeAttestor "x509pop" { plugin_data { mode = "spiffe" } }`)
	token := s.token("")
	first := joined(t, s, s.address, token)
	s.create(tokenAgent(token), "/spire-exchange/node-2")
	got(minutes(t, 1), t, first, "default")
	second := newJoined(t, s.address, fmt.Sprintf("{workloadAPISocket: %s}", first.socket()),
		fmt.Sprintf("{type: x509pop, workloadAPISocket: %s}", first.socket()), "")
	second.start()
	s.create("spiffe://"+trustDomain+"/spire/agent/x509pop/node-2", "/second")
	if cert, _ := got(minutes(t, 1), t, second, "default"); cert.URIs[0].Path != "/second" {
		t.Errorf("got %s", cert.URIs[0])
	}
}

// Keys of other kinds, on the server and for workloads, and the post-quantum
// key exchange.
func TestKeyTypesAtASPIREServer(t *testing.T) {
	for _, tc := range []struct{ ca, workload string }{{"ec-p384", "ec-p384"}, {"rsa-2048", "rsa-2048"}, {"rsa-4096", "ec-p256"}} {
		t.Run(tc.ca+" signs "+tc.workload, func(t *testing.T) {
			s := startSPIREServer(t, fmt.Sprintf("ca_key_type = %q\n\texperimental { require_pq_kem = true }", tc.ca))
			token := s.token("")
			n := newJoined(t, s.address, fmt.Sprintf("{path: %s}", s.path("bundle.pem")), "", "    requirePQKEM: true")
			n.setToken(token)
			edit(t, n.path("agent.yaml"), "identity: {", "identity: {x509SVIDKeyType: "+tc.workload+", ")
			n.start()
			s.create(tokenAgent(token), "/keys")
			cert, _ := got(minutes(t, 1), t, n, "default")
			switch key := cert.PublicKey.(type) {
			case *ecdsa.PublicKey:
				if want := "ec-p" + fmt.Sprint(key.Curve.Params().BitSize); want != tc.workload {
					t.Errorf("a key of %s", want)
				}
			case *rsa.PublicKey:
				if want := "rsa-" + fmt.Sprint(key.N.BitLen()); want != tc.workload {
					t.Errorf("a key of %s", want)
				}
			}
			source, err := workloadapi.FetchJWTSVID(minutes(t, 1), jwtsvid.Params{Audience: "a"}, workloadapi.WithAddr("unix://"+n.socket()))
			if err != nil || source.ID.Path() != "/keys" {
				t.Errorf("JWT-SVID: %v", err)
			}
		})
	}
}

func edit(t *testing.T, path, from, to string) {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil || !strings.Contains(string(data), from) {
		t.Fatalf("%s does not hold %q: %v", path, from, err)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(data), from, to, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
}

// authorityIDs are the IDs that `localauthority KIND show` prints, by slot.
func (s *spireServer) authorityIDs(kind string) map[string]string {
	s.t.Helper()
	var shown map[string]struct {
		AuthorityID string `json:"authority_id"`
	}
	if err := json.Unmarshal([]byte(s.real("localauthority", kind, "show", "-output", "json")), &shown); err != nil {
		s.t.Fatal(err)
	}
	out := map[string]string{}
	for slot, a := range shown {
		out[slot] = a.AuthorityID
	}
	return out
}

// The CA is replaced by hand: what hung on the old one is replaced on open
// streams, without a moment without identity, and the old one goes.
func TestTaintAndRevokeAtASPIREServer(t *testing.T) {
	s := startSPIREServer(t)
	token := s.token("")
	n := joined(t, s, s.address, token)
	s.create(tokenAgent(token), "/web")
	ctx := minutes(t, 3)
	e := openEnvoy(ctx, n, "default")
	old := leaf(t, secrets(t, e.next())["default"])
	jwt := func() *jwtsvid.SVID {
		t.Helper()
		svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "a"}, workloadapi.WithAddr("unix://"+n.socket()))
		if err != nil {
			t.Fatal(err)
		}
		return svid
	}
	before := jwt()
	if again := jwt(); again.Marshal() != before.Marshal() {
		t.Error("a fresh token was not taken from the cache")
	}

	for _, kind := range []string{"x509", "jwt"} {
		s.real("localauthority", kind, "prepare")
		slots := s.authorityIDs(kind)
		s.real("localauthority", kind, "activate", "-authorityID", slots["prepared"])
		start := time.Now()
		s.real("localauthority", kind, "taint", "-authorityID", slots["active"])
		if kind == "x509" {
			next := leaf(t, secrets(t, e.next())["default"])
			if hex.EncodeToString(next.AuthorityKeyId) != slots["prepared"] || next.SerialNumber.Cmp(old.SerialNumber) == 0 {
				t.Errorf("the SVID hangs on %x, want %s", next.AuthorityKeyId, slots["prepared"])
			}
		} else {
			for deadline := time.Now().Add(patience); jwt().Marshal() == before.Marshal(); time.Sleep(20 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("the token of a tainted key is handed out still")
				}
			}
		}
		t.Logf("%s taint to replacement: %s", kind, time.Since(start))
		start = time.Now()
		s.real("localauthority", kind, "revoke", "-authorityID", slots["active"])
		for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
			if kind == "jwt" {
				break
			}
			if set := roots(ctx, t, n); len(set) == 1 && hex.EncodeToString(set[0].SubjectKeyId) == slots["prepared"] {
				break
			}
			if time.Now().After(deadline) {
				t.Fatal("a revoked authority is in the bundle still")
			}
		}
		t.Logf("%s revoke to bundle: %s", kind, time.Since(start))
	}
	n.waitReady()
	n.alive()
}

func roots(ctx context.Context, t *testing.T, a *agent) []*x509.Certificate {
	t.Helper()
	set, err := workloadapi.FetchX509Bundles(ctx, workloadapi.WithAddr("unix://"+a.socket()))
	if err != nil {
		t.Fatal(err)
	}
	b := set.Bundles()
	if len(b) == 0 {
		return nil
	}
	return b[0].X509Authorities()
}

// Entries that federate bring the other trust domain's bundle, which follows
// its changes; flags and times of an entry change what is signed.
func TestFederationAtASPIREServer(t *testing.T) {
	s := startSPIREServer(t)
	token := s.token("")
	n := joined(t, s, s.address, token)
	other := newMachineCA(t)
	s.real("bundle", "set", "-id", "spiffe://other.example", "-path", other.file)
	id := s.create(tokenAgent(token), "/web", "-federatesWith", "spiffe://other.example", "-downstream", "-admin", "-x509SVIDTTL", "900", "-hint", "h")
	ctx := minutes(t, 3)
	const name = "spiffe://other.example"
	e := openEnvoy(ctx, n, name)
	e.next()
	cert, _ := got(ctx, t, n, "default")
	if life := cert.NotAfter.Sub(cert.NotBefore); life > 16*time.Minute {
		t.Errorf("lives %s", life)
	}
	next := newMachineCA(t)
	s.real("bundle", "set", "-id", "spiffe://other.example", "-path", next.file)
	start := time.Now()
	e.next()
	t.Logf("federated bundle to secret: %s", time.Since(start))

	// Envoy's stream of the SVID sees a new revision.
	d := openEnvoy(ctx, n, "default")
	d.next()
	s.real("entry", "update", "-entryID", id, "-parentID", tokenAgent(token), "-spiffeID", "spiffe://"+trustDomain+"/web",
		"-selector", self(), "-x509SVIDTTL", "1800")
	if cert := leaf(t, secrets(t, d.next())["default"]); cert.NotAfter.Sub(cert.NotBefore) < 29*time.Minute {
		t.Errorf("after the update it lives %s", cert.NotAfter.Sub(cert.NotBefore))
	}
}

// Figures of an agent of a SPIRE Server: SPIFFE_NODE_TEST_FIGURES asks for
// them.
func TestFiguresAtASPIREServer(t *testing.T) {
	if os.Getenv("SPIFFE_NODE_TEST_FIGURES") == "" {
		t.Skip("SPIFFE_NODE_TEST_FIGURES is not set")
	}
	s := startSPIREServer(t, os.Getenv("SPIFFE_NODE_TEST_SERVER_KEYS"))
	token := s.token("")
	n := joined(t, s, s.address, token)
	ctx := minutes(t, 9)
	const rounds = 20
	var sum, worst time.Duration
	for i := range rounds {
		path := fmt.Sprintf("/w%d", i)
		name := "spiffe://" + trustDomain + path
		e := openEnvoy(ctx, n, name)
		// Not in step with the server.
		time.Sleep(time.Duration(i) * 733 * time.Millisecond % (5 * time.Second))
		start := time.Now()
		s.create(tokenAgent(token), path)
		leaf(t, secrets(t, e.next())[name])
		took := time.Since(start)
		sum, worst = sum+took, max(worst, took)
		t.Logf("entry %d to secret: %s", i, took)
		_ = e.s.CloseSend()
	}
	t.Logf("entry created to secret: mean %s, worst %s of %d", sum/rounds, worst, rounds)

	time.Sleep(time.Second) // the state is written
	var away, back []time.Duration
	for range 5 {
		s.kill()
		n.kill()
		start := time.Now()
		n.launch()
		for {
			if _, err := os.Stat(n.socket()); err == nil {
				if took, ok := answers(ctx, n, start); ok {
					away = append(away, took)
					break
				}
			}
			if time.Since(start) > patience {
				t.Fatalf("nothing is served:\n%s", n.log)
			}
			time.Sleep(time.Millisecond)
		}
		time.Sleep(3 * time.Second)
		s.start()
		start = time.Now()
		n.waitReady()
		back = append(back, time.Since(start))
	}
	t.Logf("agent started with the server away to secret: %v", away)
	t.Logf("server healthy to agent ready: %v", back)
}

// answers is whether the agent answers with a secret.
func answers(ctx context.Context, a *agent, start time.Time) (time.Duration, bool) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c := discoveryClient(a)
	res, err := c.FetchSecrets(ctx, &discovery.DiscoveryRequest{Node: &core.Node{Id: "x"}, TypeUrl: secretType, ResourceNames: []string{"default"}})
	return time.Since(start), err == nil && len(res.GetResources()) == 1
}

// A first bundle from every source, by an agent that starts from nothing.
func TestBootstrapAtASPIREServer(t *testing.T) {
	s := startSPIREServer(t)
	if err := os.WriteFile(s.path("bundle.json"), []byte(s.real("bundle", "show", "-format", "spiffe")), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, source := range bootstrapSources(t, s) {
		t.Run(name, func(t *testing.T) {
			token := s.token("")
			n := newJoined(t, s.address, source.keys, "", "")
			n.setToken(token)
			if source.launch != nil {
				source.launch(n)
				n.waitReady()
			} else {
				n.start()
			}
			s.create(tokenAgent(token), "/"+filepath.Base(n.dir))
			if cert, _ := got(minutes(t, 1), t, n, "default"); cert.URIs[0].Path != "/"+filepath.Base(n.dir) {
				t.Errorf("got %s", cert.URIs[0])
			}
		})
	}
}
