package interop_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/internal/watchpb"
)

var serverID = spiffeid.RequireFromString("spiffe://example.org/spire/server")

// authority is a running authority process.
type authority struct {
	*agent
	address string
	bundle  *x509bundle.Bundle
}

func startAuthority(t *testing.T, extra string) *authority {
	t.Helper()
	return startAuthorityWith(t, "", extra)
}

// startAuthorityWith is startAuthority with more keys below embedded.
func startAuthorityWith(t *testing.T, keys, extra string) *authority {
	t.Helper()
	dir, err := os.MkdirTemp("", "sn-") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	a := &authority{agent: &agent{t: t, name: "authority", dir: dir, health: freeAddress(t), log: &logBuffer{}}, address: freeAddress(t)}
	doc := fmt.Sprintf(`apiVersion: config.spiffe-node.io/v1alpha1
kind: AuthorityConfiguration
trustDomain: %s
server: {address: "%s"}
admin: {socketPath: %s}
embedded: {statePath: %s%s}
rateLimits: {attestation: false}
health: {address: "%s"}
log: {level: debug}
%s`, trustDomain, a.address, a.admin(), a.path("state/authority.db"), keys, a.health, extra)
	if err := os.WriteFile(a.path("agent.yaml"), []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	a.start()
	t.Cleanup(a.stop)
	if err := os.WriteFile(a.path("bundle.pem"), []byte(a.cli("bundle", "show")), 0o600); err != nil {
		t.Fatal(err)
	}
	if a.bundle, err = x509bundle.Load(serverID.TrustDomain(), a.path("bundle.pem")); err != nil {
		t.Fatal(err)
	}
	return a
}

// token has an administrator make a join token; path is that of an alias, or
// empty.
func (a *authority) token(path string) string {
	a.t.Helper()
	args := []string{"token", "generate", "-ttl", "60"}
	warning := "Warning: Missing SPIFFE ID.\n"
	if path != "" {
		args, warning = append(args, "-spiffeID", "spiffe://"+trustDomain+path), ""
	}
	out := a.cli(args...)
	token, ok := strings.CutPrefix(strings.TrimSuffix(out, "\n"+warning), "Token: ")
	if !ok || strings.Contains(token, "\n") {
		a.t.Fatalf("token generate printed %q", out)
	}
	return token
}

// tls dials the authority as go-spiffe's clients do; nil = without an SVID.
func (a *authority) tls(as x509svid.Source) *grpc.ClientConn {
	a.t.Helper()
	cfg := tlsconfig.TLSClientConfig(a.bundle, tlsconfig.AuthorizeID(serverID))
	if as != nil {
		cfg = tlsconfig.MTLSClientConfig(as, a.bundle, tlsconfig.AuthorizeID(serverID))
	}
	conn, err := grpc.NewClient(a.address, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func keyAndCSR(t *testing.T) (crypto.Signer, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, csr
}

func toSVID(t *testing.T, key crypto.Signer, chain [][]byte) *x509svid.SVID {
	t.Helper()
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	var raw []byte
	for _, c := range chain {
		raw = append(raw, c...)
	}
	svid, err := x509svid.ParseRaw(raw, keyDER)
	if err != nil {
		t.Fatal(err)
	}
	return svid
}

// join attests with a token and calls as the agent from then on.
func (a *authority) join(token string) (*x509svid.SVID, *grpc.ClientConn) {
	a.t.Helper()
	conn := a.tls(nil)
	if _, err := bundlepb.NewBundleClient(conn).GetBundle(withTimeout(a.t), &bundlepb.GetBundleRequest{}); err != nil {
		a.t.Fatalf("bundle for somebody without an SVID: %v", err)
	}
	stream, err := agentpb.NewAgentClient(conn).AttestAgent(withTimeout(a.t))
	if err != nil {
		a.t.Fatal(err)
	}
	key, csr := keyAndCSR(a.t)
	err = stream.Send(&agentpb.AttestAgentRequest{Step: &agentpb.AttestAgentRequest_Params_{Params: &agentpb.AttestAgentRequest_Params{
		Data: &typespb.AttestationData{Type: "join_token", Payload: []byte(token)}, Params: &agentpb.AgentX509SVIDParams{Csr: csr},
	}}})
	if err != nil {
		a.t.Fatal(err)
	}
	resp, err := stream.Recv()
	if err != nil {
		a.t.Fatal(err)
	}
	svid := toSVID(a.t, key, resp.GetResult().GetSvid().GetCertChain())
	if _, _, err := x509svid.Verify(svid.Certificates, a.bundle); err != nil {
		a.t.Fatal(err)
	}
	return svid, a.tls(svid)
}

// register has an administrator write an entry.
func (a *authority) register(parent, path string) string {
	a.t.Helper()
	return a.createEntry(path, "-parentID", parent, "-selector", self())
}

func TestAuthorityKeepsAgentsApart(t *testing.T) {
	a := startAuthority(t, "")
	svidA, connA := a.join(a.token(""))
	svidB, connB := a.join(a.token(""))
	ofA := a.register(svidA.ID.String(), "/wa")
	ofB := a.register(svidB.ID.String(), "/wb")
	_, csr := keyAndCSR(t)
	for name, c := range map[string]struct {
		conn         *grpc.ClientConn
		mine, theirs string
	}{"A": {connA, ofA, ofB}, "B": {connB, ofB, ofA}} {
		entries := entrypb.NewEntryClient(c.conn)
		stream, err := entries.SyncAuthorizedEntries(withTimeout(t))
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&entrypb.SyncAuthorizedEntriesRequest{}); err != nil {
			t.Fatal(err)
		}
		page, err := stream.Recv()
		if err != nil || len(page.GetEntries()) != 1 || page.GetEntries()[0].GetId() != c.mine {
			t.Errorf("agent %s is authorized for %v, %v", name, page.GetEntries(), err)
		}
		resp, err := svidpb.NewSVIDClient(c.conn).BatchNewX509SVID(withTimeout(t), &svidpb.BatchNewX509SVIDRequest{Params: []*svidpb.NewX509SVIDParams{
			{EntryId: c.mine, Csr: csr}, {EntryId: c.theirs, Csr: csr},
		}})
		if err != nil {
			t.Fatal(err)
		}
		got := [2]int32{resp.GetResults()[0].GetStatus().GetCode(), resp.GetResults()[1].GetStatus().GetCode()}
		if got != [2]int32{int32(codes.OK), int32(codes.NotFound)} {
			t.Errorf("agent %s signs with codes %v", name, got)
		}
		_, err = entries.BatchCreateEntry(withTimeout(t), &entrypb.BatchCreateEntryRequest{Entries: []*typespb.Entry{{
			SpiffeId: &typespb.SPIFFEID{TrustDomain: trustDomain, Path: "/own"}, ParentId: &typespb.SPIFFEID{TrustDomain: trustDomain, Path: svidA.ID.Path()},
			Selectors: []*typespb.Selector{{Type: "unix", Value: "uid:0"}},
		}}})
		if status.Code(err) != codes.PermissionDenied {
			t.Errorf("agent %s writes entries: %v", name, err)
		}
	}
	if out := a.cli("entry", "count"); strings.TrimSpace(out) != "2 registration entries" {
		t.Errorf("entries: %s", out)
	}
}

// What has been acknowledged survives kill -9: the CA, used and unused tokens,
// agents with their SVIDs, entries.
func TestKilledAuthorityComesBack(t *testing.T) {
	a := startAuthority(t, "")
	used, unused := a.token(""), a.token("/alias")
	svid, conn := a.join(used)
	a.register(svid.ID.String(), "/w1")
	watch := func() watchpb.Watch_WatchClient {
		t.Helper()
		w, err := watchpb.NewWatchClient(conn).Watch(withTimeout(t), &watchpb.WatchRequest{}, grpc.WaitForReady(true))
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	w := watch()
	if e, err := w.Recv(); err != nil || len(e.GetEntries()) != 1 || !e.GetReset_() {
		t.Fatalf("%v, %v", e, err)
	}
	start := time.Now()
	a.register(svid.ID.String(), "/w2")
	if e, err := w.Recv(); err != nil || len(e.GetEntries()) != 1 || e.GetEntries()[0].GetSpiffeId().GetPath() != "/w2" {
		t.Fatalf("%v, %v", e, err)
	}
	t.Logf("from the command line to the agent in %s", time.Since(start))

	a.kill()
	if _, err := w.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("the watch ended with %v", err)
	}
	a.start()
	if e, err := watch().Recv(); err != nil || len(e.GetEntries()) != 2 || !e.GetReset_() {
		t.Errorf("after the restart: %v, %v", e, err)
	}
	conn2 := a.tls(nil)
	stream, err := agentpb.NewAgentClient(conn2).AttestAgent(withTimeout(t))
	if err != nil {
		t.Fatal(err)
	}
	_, csr := keyAndCSR(t)
	err = stream.Send(&agentpb.AttestAgentRequest{Step: &agentpb.AttestAgentRequest_Params_{Params: &agentpb.AttestAgentRequest_Params{
		Data: &typespb.AttestationData{Type: "join_token", Payload: []byte(used)}, Params: &agentpb.AgentX509SVIDParams{Csr: csr},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("the token that was used: %v", err)
	}
	if late, _ := a.join(unused); late.ID.Path() != "/spire/agent/join_token/"+unused {
		t.Errorf("joined as %s", late.ID)
	}
	if out := a.cli("agent", "list"); !strings.Contains(out, "Found 2 attested agents:") {
		t.Error(out)
	}
}

// wantReason checks a denial that tells an agent what to do about it, down to
// the type URL that SPIRE Agents look for.
func wantReason(t *testing.T, err error, reason typespb.PermissionDeniedDetails_Reason) {
	t.Helper()
	st := status.Convert(err).Proto()
	if st.GetCode() != int32(codes.PermissionDenied) || len(st.GetDetails()) != 1 ||
		st.GetDetails()[0].GetTypeUrl() != "type.googleapis.com/spire.api.types.PermissionDeniedDetails" ||
		string(st.GetDetails()[0].GetValue()) != "\x08"+string(rune(reason)) {
		t.Errorf("got %v, want a denial for %s", st, reason)
	}
}

// The command line bans and evicts, and agents feel it on open connections.
func TestBanAndEvict(t *testing.T) {
	a := startAuthority(t, "")
	svid, conn := a.join(a.token("/alias"))
	get := func() *typespb.PermissionDeniedDetails {
		_, err := entrypb.NewEntryClient(conn).GetAuthorizedEntries(withTimeout(t), &entrypb.GetAuthorizedEntriesRequest{})
		for _, d := range status.Convert(err).Details() {
			if d, ok := d.(*typespb.PermissionDeniedDetails); ok {
				return d
			}
		}
		return nil
	}
	if d := get(); d != nil {
		t.Fatal(d)
	}
	a.cli("agent", "ban", "-spiffeID", svid.ID.String())
	if d := get(); d.GetReason() != typespb.PermissionDeniedDetails_AGENT_BANNED {
		t.Errorf("after the ban: %v", d)
	}
	if out := a.cli("agent", "show", "-spiffeID", svid.ID.String()); !strings.Contains(out, "Banned            : true") {
		t.Error(out)
	}
	a.cli("agent", "evict", "-spiffeID", svid.ID.String())
	if d := get(); d.GetReason() != typespb.PermissionDeniedDetails_AGENT_NOT_ATTESTED {
		t.Errorf("after the eviction: %v", d)
	}
	if out := a.cli("entry", "count"); strings.TrimSpace(out) != "0 registration entries" {
		t.Errorf("the alias is left: %s", out)
	}
}

// Our own agent joins our own authority and serves a workload.
func TestAgentOfAnAuthority(t *testing.T) {
	a := startAuthority(t, "")
	token := a.token("")
	// Its configuration names no embedded authority, so it is written here.
	dir, err := os.MkdirTemp("/dev/shm", "sn-") //nolint:usetesting // t.TempDir is no tmpfs and too long for a socket
	if err != nil {
		t.Skipf("no tmpfs at /dev/shm: %v", err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	n := &agent{t: t, dir: dir, health: freeAddress(t), log: &logBuffer{}}
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
health: {address: "%s"}
log: {level: debug}
`, trustDomain, n.path("public"), n.admin(), a.address, a.path("bundle.pem"), token, n.path("state"), n.health)
	if err := os.WriteFile(n.path("agent.yaml"), []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	n.start()
	t.Cleanup(n.stop)
	parent := "spiffe://" + trustDomain + "/spire/agent/join_token/" + token
	a.register(parent, "/first")
	source, err := workloadapi.NewX509Source(withTimeout(t), workloadapi.WithClientOptions(workloadapi.WithAddr("unix:"+n.socket())))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = source.Close() }()
	svid, err := source.GetX509SVID()
	if err != nil || svid.ID.Path() != "/first" {
		t.Fatalf("%v, %v", svid, err)
	}
	if _, _, err := x509svid.Verify(svid.Certificates, a.bundle); err != nil {
		t.Error(err)
	}
	// With the authority away, what is there is served on.
	a.kill()
	got, err := workloadapi.FetchX509SVID(withTimeout(t), workloadapi.WithAddr("unix:"+n.socket()))
	if err != nil || got.ID != svid.ID {
		t.Errorf("with the authority away: %v, %v", got, err)
	}
	a.start()
	// And when it is back, so are changes.
	a.register(parent, "/second")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		svids, err := workloadapi.FetchX509SVIDs(ctx, workloadapi.WithAddr("unix:"+n.socket()))
		if err == nil && len(svids) == 2 {
			break
		}
		if ctx.Err() != nil {
			t.Fatalf("the second identity never came: %v\n%s", err, n.log)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
