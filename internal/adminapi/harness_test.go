package adminapi_test

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// The wire tests are written against a SPIRE Server: with the path of its
// private socket in this variable they run there instead of on our own server.
// Its trust domain must be td; the tests leave it as it was.
const realSocket = "SPIFFE_NODE_TEST_SPIRE_SOCKET"

var (
	td      = spiffeid.RequireTrustDomainFromString("td")
	localID = spiffeid.RequireFromString("spiffe://td/spire/agent/local/node1")
)

// openAuthority is an embedded authority in a scratch directory, with the
// local agent in it.
func openAuthority(tb testing.TB) *embedded.Authority {
	tb.Helper()
	a, err := embedded.Open(embedded.Config{TrustDomain: td, StatePath: filepath.Join(tb.TempDir(), "state", "authority.db")})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := a.Close(); err != nil {
			tb.Error(err)
		}
	})
	_, err = a.UpsertAgent(tb.Context(), &embedded.Agent{
		ID: localID, AttestationType: "local", Serial: "42", ExpiresAt: time.Now().Add(time.Hour),
		Selectors: attest.MustSelectors("local:node:node1"), Version: "test",
	})
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

// start runs a server until the test ends and returns its socket.
func start(tb testing.TB, cfg adminapi.Config) string {
	tb.Helper()
	if cfg.SocketPath == "" {
		cfg.SocketPath = filepath.Join(shortDir(tb), "admin", "api.sock")
	}
	if cfg.TrustDomain.IsZero() {
		cfg.TrustDomain = td
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.NewTextHandler(tb.Output(), &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	s, err := adminapi.New(tb.Context(), cfg)
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Error(err)
		}
	})
	return cfg.SocketPath
}

// shortDir is a scratch directory whose path leaves room in a socket address.
func shortDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "sn") //nolint:usetesting // its paths are too long for a socket
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func dial(tb testing.TB, socket string) *grpc.ClientConn {
	tb.Helper()
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = conn.Close() })
	return conn
}

// wire is a connection to our server, or to a real one if there is one.
func wire(t *testing.T) *grpc.ClientConn {
	t.Helper()
	if socket := os.Getenv(realSocket); socket != "" {
		return dial(t, socket)
	}
	return ours(t)
}

func ours(t *testing.T) *grpc.ClientConn {
	t.Helper()
	return dial(t, start(t, adminapi.Config{Authority: openAuthority(t), LocalAgent: localID, LogLevel: new(slog.LevelVar)}))
}

func onRealServer() bool { return os.Getenv(realSocket) != "" }

// want is a code and a text as clients see them.
type want struct {
	code int32
	text string
}

var ok = want{0, "OK"}

func (w want) checkStatus(t *testing.T, got *typespb.Status) {
	t.Helper()
	if got == nil {
		t.Fatal("no status in the result")
	}
	w.check(t, got.GetCode(), got.GetMessage())
}

func (w want) checkError(t *testing.T, err error) {
	t.Helper()
	st := status.Convert(err)
	text := st.Message()
	if err == nil {
		text = "OK"
	}
	w.check(t, int32(st.Code()), text)
}

func (w want) check(t *testing.T, code int32, text string) {
	t.Helper()
	prefix, open := strings.CutSuffix(w.text, "*")
	if code != w.code || text != w.text && (!open || !strings.HasPrefix(text, prefix)) {
		t.Errorf("got %d %q\nwant %d %q", code, text, w.code, w.text)
	}
}

func id(td, path string) *typespb.SPIFFEID { return &typespb.SPIFFEID{TrustDomain: td, Path: path} }

func selectors(in ...string) []*typespb.Selector {
	var out []*typespb.Selector
	for _, s := range in {
		kind, value, _ := strings.Cut(s, ":")
		out = append(out, &typespb.Selector{Type: kind, Value: value})
	}
	return out
}

// ctx is for clean-up, when the test's own context has ended.
func ctx() context.Context { return context.Background() }
