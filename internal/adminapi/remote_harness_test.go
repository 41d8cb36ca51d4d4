package adminapi_test

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest/jointoken"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// knock attests whoever answers a challenge with the same bytes and names the
// node in the payload. Its agents may attest again.
type knock struct{}

func (knock) Type() string { return "knock" }

func (knock) Attest(_ context.Context, payload []byte, challenge func([]byte) ([]byte, error)) (*nodeattest.Result, error) {
	switch node := string(payload); node {
	case "panic":
		panic("attestor fell over")
	case "denied":
		return nil, nodeattest.Denied("not you")
	case "broken":
		return nil, errors.New("no answer")
	case "stranger":
		return &nodeattest.Result{AgentID: spiffeid.RequireFromString("spiffe://td/spire/agent/other/x")}, nil
	default:
		answer, err := challenge([]byte("who is there?"))
		if err != nil {
			return nil, err
		}
		if string(answer) != "who is there?" {
			return nil, nodeattest.Invalid("wrong answer")
		}
		id, err := spiffeid.FromSegments(td, "spire", "agent", "knock", node)
		return &nodeattest.Result{AgentID: id, Selectors: attest.MustSelectors("knock:node:" + node), Reattestable: true}, err
	}
}

// server is a TLS listener over an authority, until the test ends.
type server struct {
	*embedded.Authority
	nodes   *adminapi.Nodes
	address string
	stop    func()
}

type settings struct {
	embedded embedded.Config
	nodes    adminapi.NodesConfig
	remote   adminapi.RemoteConfig
	disk     *fullDisk // between the services and the authority, if set
}

func serve(t *testing.T, edit ...func(*settings)) *server {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	s := settings{
		embedded: embedded.Config{TrustDomain: td, StatePath: filepath.Join(t.TempDir(), "state", "authority.db"), Logger: log},
		nodes:    adminapi.NodesConfig{TrustDomain: td, NoAttestationLimit: true, Logger: log},
		remote:   adminapi.RemoteConfig{TrustDomain: td, Address: "127.0.0.1:0", Logger: log},
	}
	for _, e := range edit {
		e(&s)
	}
	a, err := embedded.Open(s.embedded)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	s.nodes.Authority, s.remote.Authority = a, a
	if s.disk != nil {
		s.disk.Authority = a
		s.nodes.Authority = s.disk
	}
	s.nodes.Attestors = append(s.nodes.Attestors, jointoken.New(td, a), knock{})
	out := &server{Authority: a}
	if out.nodes, err = adminapi.NewNodes(s.nodes); err != nil {
		t.Fatal(err)
	}
	s.remote.Nodes = out.nodes
	if s.remote.Certificate, err = adminapi.ServerCertificate(a, log); err != nil {
		t.Fatal(err)
	}
	r, err := adminapi.NewRemote(t.Context(), s.remote)
	if err != nil {
		t.Fatal(err)
	}
	out.address = r.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stopped := false
	out.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(out.stop)
	return out
}

// identity is an SVID with its key; the zero identity is anonymous.
type identity struct {
	id    spiffeid.ID
	chain [][]byte
	key   crypto.Signer
}

func keyAndCSR(tb testing.TB) (crypto.Signer, []byte) {
	tb.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		tb.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		tb.Fatal(err)
	}
	return key, der
}

// clientTLS trusts the server by its bundle and ID, as agents do.
func (s *server) clientTLS(as identity) *tls.Config {
	cfg := &tls.Config{
		NextProtos:         []string{"h2"},
		InsecureSkipVerify: true,
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error {
			return s.verifyServer(raw)
		},
	}
	if as.key != nil {
		cfg.Certificates = []tls.Certificate{{Certificate: as.chain, PrivateKey: as.key}}
	}
	return cfg
}

func (s *server) dial(t *testing.T, as identity) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(s.address, grpc.WithTransportCredentials(credentials.NewTLS(s.clientTLS(as))))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// attestWith attests over an anonymous connection.
func (s *server) attestWith(t *testing.T, kind, payload string) (identity, bool, error) {
	t.Helper()
	key, csr := keyAndCSR(t)
	stream, err := agentpb.NewAgentClient(s.dial(t, identity{})).AttestAgent(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	err = stream.Send(&agentpb.AttestAgentRequest{Step: &agentpb.AttestAgentRequest_Params_{Params: &agentpb.AttestAgentRequest_Params{
		Data:   &typespb.AttestationData{Type: kind, Payload: []byte(payload)},
		Params: &agentpb.AgentX509SVIDParams{Csr: csr},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	for {
		resp, err := stream.Recv()
		if err != nil {
			return identity{}, false, err
		}
		if result := resp.GetResult(); result != nil {
			if err := stream.CloseSend(); err != nil {
				t.Error(err)
			}
			return identity{spiffeid.RequireFromString("spiffe://" + result.GetSvid().GetId().GetTrustDomain() + result.GetSvid().GetId().GetPath()), result.GetSvid().GetCertChain(), key}, result.GetReattestable(), nil
		}
		err = stream.Send(&agentpb.AttestAgentRequest{Step: &agentpb.AttestAgentRequest_ChallengeResponse{ChallengeResponse: resp.GetChallenge()}})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// joined is an agent that attested with a token of this name.
func (s *server) joined(t *testing.T, name string) identity {
	t.Helper()
	if _, err := s.CreateJoinToken(t.Context(), name, time.Minute, spiffeid.ID{}); err != nil {
		t.Fatal(err)
	}
	out, _, err := s.attestWith(t, "join_token", name)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// entry stores an entry with a parent.
func (s *server) entry(t *testing.T, parent spiffeid.ID, path string, edit ...func(*entry.Entry)) *entry.Entry {
	t.Helper()
	e := &entry.Entry{SPIFFEID: spiffeid.RequireFromPath(td, path), ParentID: parent, Selectors: attest.MustSelectors("unix:uid:0")}
	for _, f := range edit {
		f(e)
	}
	stored, err := s.CreateEntry(t.Context(), e)
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

// workload is a workload's SVID for an entry.
func (s *server) workload(t *testing.T, e *entry.Entry) identity {
	t.Helper()
	key, csr := keyAndCSR(t)
	issued, err := s.SignX509(t.Context(), authority.X509Request{EntryID: e.ID, SPIFFEID: e.SPIFFEID, CSR: csr})
	if err != nil {
		t.Fatal(err)
	}
	return identity{e.SPIFFEID, issued.Chain, key}
}

// wantDenied checks a denial and its details; reason 0 = none at all.
func wantDenied(t *testing.T, err error, method string, reason typespb.PermissionDeniedDetails_Reason) {
	t.Helper()
	st := status.Convert(err)
	if st.Code() != codes.PermissionDenied || st.Message() != "authorization denied for method "+method {
		t.Errorf("got %s %q", st.Code(), st.Message())
	}
	details := st.Proto().GetDetails()
	if reason == 0 {
		if len(details) != 0 {
			t.Errorf("details %v", details)
		}
		return
	}
	if len(details) != 1 || details[0].GetTypeUrl() != "type.googleapis.com/spire.api.types.PermissionDeniedDetails" ||
		string(details[0].GetValue()) != "\x08"+string(rune(reason)) {
		t.Errorf("details %v, want reason %s", details, reason)
	}
}

func shortName(method string) string { return method[strings.LastIndex(method, "/")+1:] }

var localSelectors = attest.MustSelectors("unix:uid:0")
