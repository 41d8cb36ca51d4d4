package interop_test

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
)

// A killed agent comes back with its entries, its CA and the SVIDs in use, on
// the same directory inode.
func TestKilledAgentComesBack(t *testing.T) {
	a := startAgent(t, "")
	a.createEntry("/kept", "-selector", self())
	e := openEnvoy(withTimeout(t), a, "default")
	before := leaf(t, secrets(t, e.next())["default"])
	dir, err := os.Stat(a.path("public"))
	if err != nil {
		t.Fatal(err)
	}
	bundle := a.cli("bundle", "show")
	waitForState(t, a)

	a.kill()
	a.start()

	after, err := os.Stat(a.path("public"))
	if err != nil || !os.SameFile(dir, after) {
		t.Errorf("the public directory was replaced: %v", err)
	}
	if a.cli("bundle", "show") != bundle {
		t.Error("the trust bundle changed")
	}
	if out := a.cli("entry", "count"); strings.TrimSpace(out) != "1 registration entry" {
		t.Errorf("entries: %s", out)
	}
	got := leaf(t, secrets(t, openEnvoy(withTimeout(t), a, "default").next())["default"])
	if got.SerialNumber.Cmp(before.SerialNumber) != 0 {
		t.Error("the SVID was not kept across the restart")
	}
}

// waitForState waits until the restart state has been written.
func waitForState(t *testing.T, a *agent) {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if files, err := os.ReadDir(a.path("state")); err == nil && len(files) > 0 {
			return
		}
	}
	t.Fatal("no restart state was written")
}

func TestCorruptStateIsRefusedAndLeftAlone(t *testing.T) {
	a := startAgent(t, "")
	a.stop()
	garbage := []byte(strings.Repeat("not a database ", 1000))
	if err := os.WriteFile(a.path("authority/authority.db"), garbage, 0o600); err != nil {
		t.Fatal(err)
	}
	a.launch()
	select {
	case <-a.done:
	case <-time.After(patience):
		t.Fatal("the agent started on a corrupt state file")
	}
	if a.cmd.ProcessState.Success() || !strings.Contains(a.log.String(), "authority.db") {
		t.Errorf("the error does not name the file:\n%s", a.log)
	}
	if data, err := os.ReadFile(a.path("authority/authority.db")); err != nil || string(data) != string(garbage) {
		t.Error("the corrupt file was changed")
	}
}

func TestSecondAgentOnTheSameStateIsRefused(t *testing.T) {
	a := startAgent(t, "")
	b := &agent{t: t, dir: a.dir, health: a.health, log: &logBuffer{}}
	b.launch()
	select {
	case <-b.done:
	case <-time.After(patience):
		b.kill()
		t.Fatal("two agents share one state file")
	}
	if b.cmd.ProcessState.Success() {
		t.Error("the second agent ended without an error")
	}
	a.alive()
}

// bytesCodec sends raw bytes as the message.
type bytesCodec struct{ encoding.CodecV2 }

func (bytesCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(v.([]byte))}, nil
}

func (bytesCodec) Unmarshal(mem.BufferSlice, any) error { return nil }
func (bytesCodec) Name() string                         { return "proto" }

// Nothing a caller sends ends the process or harms another caller.
func TestHostileCallers(t *testing.T) {
	a := startAgent(t, "workloadAPI: {fetchWait: 50ms}\n")
	a.createEntry("/good", "-selector", self())
	good := openEnvoy(withTimeout(t), a, "default")
	good.next()

	rng := rand.New(rand.NewPCG(1, 2))
	methods := []string{
		"/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets",
		"/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets",
		"/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets",
		"/SpiffeWorkloadAPI/FetchX509SVID",
		"/SpiffeWorkloadAPI/ValidateJWTSVID",
		"/no.such.Service/Method",
	}
	conn := a.dial()
	for range 200 {
		junk := make([]byte, rng.IntN(64))
		for i := range junk {
			junk[i] = byte(rng.UintN(256))
		}
		s, err := conn.NewStream(withTimeout(t), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true},
			methods[rng.IntN(len(methods))], grpc.ForceCodecV2(bytesCodec{}))
		if err != nil {
			continue
		}
		_ = s.SendMsg(junk)
		_ = s.CloseSend()
	}
	for range 50 {
		c, err := net.Dial("unix", a.socket())
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte("GET / HTTP/1.1\r\n\r\n\x00\xff"))
		_ = c.Close()
	}
	client := secret.NewSecretDiscoveryServiceClient(a.dial())
	for name, req := range map[string]*discovery.DiscoveryRequest{
		"wrong type":  {TypeUrl: "type.googleapis.com/envoy.config.cluster.v3.Cluster", ResourceNames: []string{"default"}},
		"huge list":   {ResourceNames: make([]string, 500_000)},
		"huge name":   {ResourceNames: []string{strings.Repeat("x", 3<<20)}},
		"empty names": {ResourceNames: []string{"", ""}},
	} {
		_, err := client.FetchSecrets(withTimeout(t), req)
		if name == "wrong type" && status.Code(err) != codes.InvalidArgument {
			t.Errorf("%s: %v", name, err)
		}
		t.Logf("%s: %v", name, status.Code(err))
	}
	a.alive()
	good.quiet()
	a.createEntry("/good", "-selector", self(), "-selector", "unix:gid:"+gid())
	good.next()
}

func TestTooManyWaitingCallers(t *testing.T) {
	const limit, callers = 3, 5
	a := startAgent(t, fmt.Sprintf("limits: {parkedPerPod: %d}\n", limit))
	ctx := withTimeout(t)
	client := secret.NewSecretDiscoveryServiceClient(a.dial())
	ends := make(chan error, callers)
	for range callers {
		s, err := client.StreamSecrets(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Send(&discovery.DiscoveryRequest{ResourceNames: []string{"default"}}); err != nil {
			t.Fatal(err)
		}
		go func() { _, err := s.Recv(); ends <- err }()
	}
	for range callers - limit {
		if err := <-ends; status.Code(err) != codes.ResourceExhausted {
			t.Errorf("ended with %v", err)
		}
	}
	select {
	case err := <-ends:
		t.Errorf("a caller within the limit was ended: %v", err)
	case <-time.After(200 * time.Millisecond):
	}
}

// No private key the agent made leaves it but through SDS and Workload API.
func TestKeysStayHome(t *testing.T) {
	a := startAgent(t, "")
	a.createEntry("/secret", "-selector", self())
	got := secrets(t, openEnvoy(withTimeout(t), a, "default").next())
	key := string(got["default"].GetTlsCertificate().GetPrivateKey().GetInlineBytes())
	body := strings.Split(key, "\n")[1]
	for _, args := range [][]string{
		{"status"},
		{"status", "-o", "json"},
		{"explain", "--pid", pid()},
		{"explain", "--pid", pid(), "-o", "json"},
		{"entry", "show", "-output", "json"},
		{"bundle", "show"},
		{"agent", "list", "-output", "json"},
		{"debug", "getinfo"},
	} {
		if out := a.cli(args...); strings.Contains(out, "PRIVATE KEY") || strings.Contains(out, body) {
			t.Errorf("%v shows the key", args)
		}
	}
	if log := a.log.String(); strings.Contains(log, "PRIVATE KEY") || strings.Contains(log, body) {
		t.Error("the log shows the key")
	}
}

// An agent that is given another authority of the same trust domain hands out
// nothing of the one before, which nobody there would accept.
func TestStateOfAnotherAuthorityIsErased(t *testing.T) {
	a, b := startAuthority(t, ""), startAuthority(t, "")
	token := a.token("")
	n := joined(t, a, a.address, token)
	a.register("spiffe://"+trustDomain+"/spire/agent/join_token/"+token, "/w")
	before := leaf(t, secrets(t, openEnvoy(withTimeout(t), n, "default").next())["default"])
	waitForState(t, n)
	n.stop()

	edit(t, n.path("agent.yaml"), a.address, b.address)
	edit(t, n.path("agent.yaml"), a.path("bundle.pem"), b.path("bundle.pem"))
	token = b.token("")
	n.setToken(token)
	b.register("spiffe://"+trustDomain+"/spire/agent/join_token/"+token, "/w")
	n.start()
	after := leaf(t, secrets(t, openEnvoy(withTimeout(t), n, "default").next())["default"])
	if string(after.AuthorityKeyId) == string(before.AuthorityKeyId) {
		t.Error("the first SVID is one of the authority before")
	}
	if !strings.Contains(n.log.String(), "was that of another") {
		t.Error("the log does not say so")
	}
}
