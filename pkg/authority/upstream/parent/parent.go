// Package parent is an upstream CA that is another authority of the same trust
// domain: a SPIRE Server or an authority of this project. This process is a
// workload there, with an entry that says downstream, and is known by the SVID
// it gets from the Workload API of an agent of the parent's.
//
// Promise: JWT keys of the child are published before they are used, and the
// parent's whole bundle, siblings' keys included, is the child's. Nothing is
// asked of agent or parent before the first call, and their absence is an error
// of that call only.
//
// Threats: the parent must be spiffe://TRUST_DOMAIN/spire/server by the bundle
// that the agent gives; whoever owns the agent's socket directory decides that,
// so it must be root's. The key of the child's CA never leaves it. What comes
// back is bounded and parsed; package embedded judges it.
package parent

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Config says where the parent is.
type Config struct {
	// TrustDomain is that of both.
	TrustDomain spiffeid.TrustDomain
	// Address is host:port of the parent's SPIRE Server API.
	Address string
	// WorkloadAPISocket is the path of the Workload API socket of an agent of
	// the parent's on this machine.
	WorkloadAPISocket string
	// Logger gets what the connection to the agent has to say; nil = nothing.
	Logger *slog.Logger
}

// Upstream asks a parent. Safe for concurrent use.
type Upstream struct {
	cfg Config
	log *slog.Logger

	mu     sync.Mutex
	source *workloadapi.X509Source // nil until an agent gave an SVID
	conn   *grpc.ClientConn
	closed bool
}

var _ embedded.Upstream = (*Upstream)(nil)

// New asks nobody yet.
func New(cfg Config) (*Upstream, error) {
	switch {
	case cfg.TrustDomain.IsZero():
		return nil, errors.New("parent authority: no trust domain")
	case cfg.Address == "" || cfg.WorkloadAPISocket == "":
		return nil, errors.New("parent authority: address and Workload API socket are required")
	}
	u := &Upstream{cfg: cfg, log: cfg.Logger}
	if u.log == nil {
		u.log = slog.New(slog.DiscardHandler)
	}
	return u, nil
}

// Name is the parent's address.
func (u *Upstream) Name() string { return "parent " + u.cfg.Address }

var errClosed = errors.New("the connection to the parent is closed")

// connect gives the connection; it is made when an agent gives an SVID.
func (u *Upstream) connect(ctx context.Context) (*grpc.ClientConn, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	switch {
	case u.closed:
		return nil, errClosed
	case u.conn != nil:
		return u.conn, nil
	}
	if u.source == nil {
		source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(
			workloadapi.WithAddr("unix://"+u.cfg.WorkloadAPISocket), workloadapi.WithLogger(quiet{u.log})))
		if err != nil {
			return nil, fmt.Errorf("no SVID from the Workload API at %s: is an agent of the parent's there, and an entry with -downstream for this process? %w",
				u.cfg.WorkloadAPISocket, err)
		}
		u.source = source
	}
	conn, err := grpc.NewClient(u.cfg.Address,
		grpc.WithTransportCredentials(credentials.NewTLS(tlsconfig.MTLSClientConfig(u.source, u.source, tlsconfig.AuthorizeID(entry.ServerID(u.cfg.TrustDomain))))),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: time.Second, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 10 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}))
	if err != nil {
		return nil, fmt.Errorf("connect to %s: %w", u.cfg.Address, err)
	}
	u.conn = conn
	return conn, nil
}

// Close ends connections; later calls fail.
func (u *Upstream) Close() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.closed = true
	var errs []error
	if u.conn != nil {
		errs = append(errs, u.conn.Close())
	}
	if u.source != nil {
		errs = append(errs, u.source.Close())
	}
	u.conn, u.source = nil, nil
	return errors.Join(errs...)
}

// SignCA has the parent sign, and asks for its bundle: the answer to the first
// names no taints.
func (u *Upstream) SignCA(ctx context.Context, csr []byte, ttl time.Duration) (*embedded.UpstreamCA, error) {
	conn, err := u.connect(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := svidpb.NewSVIDClient(conn).NewDownstreamX509CA(ctx, &svidpb.NewDownstreamX509CARequest{
		Csr: csr, PreferredTtl: spirewire.SecondsToWire(ttl),
	})
	if err != nil {
		return nil, explain(err)
	}
	out := &embedded.UpstreamCA{}
	for i, der := range resp.GetCaCertChain() {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the chain: %w", i+1, err)
		}
		out.Chain = append(out.Chain, cert)
	}
	bundle, err := u.Bundle(ctx)
	if err != nil {
		return nil, err
	}
	out.UpstreamBundle = *bundle
	return out, nil
}

// Bundle is the parent's.
func (u *Upstream) Bundle(ctx context.Context) (*embedded.UpstreamBundle, error) {
	conn, err := u.connect(ctx)
	if err != nil {
		return nil, err
	}
	b, err := bundlepb.NewBundleClient(conn).GetBundle(ctx, &bundlepb.GetBundleRequest{})
	if err != nil {
		return nil, explain(err)
	}
	return fromWire(b)
}

// PublishJWTKey adds a key to the parent's bundle.
func (u *Upstream) PublishJWTKey(ctx context.Context, key embedded.JWTKey) ([]embedded.JWTKey, error) {
	conn, err := u.connect(ctx)
	if err != nil {
		return nil, err
	}
	resp, err := bundlepb.NewBundleClient(conn).PublishJWTAuthority(ctx, &bundlepb.PublishJWTAuthorityRequest{
		JwtAuthority: &typespb.JWTKey{KeyId: key.ID, PublicKey: key.PublicKey, ExpiresAt: spirewire.TimeToWire(key.ExpiresAt)},
	})
	if err != nil {
		return nil, explain(err)
	}
	return keysFromWire(resp.GetJwtAuthorities())
}

// explain adds to a refusal what most probably helps.
func explain(err error) error {
	switch status.Code(err) {
	case codes.PermissionDenied, codes.Unauthenticated:
		return fmt.Errorf("the parent refuses; the entry for this process there needs -downstream: %w", err)
	case codes.Unimplemented:
		return fmt.Errorf("the parent knows no such call; is it a server that may have others below it? %w", err)
	}
	return err
}

func fromWire(b *typespb.Bundle) (*embedded.UpstreamBundle, error) {
	out := &embedded.UpstreamBundle{}
	for i, a := range b.GetX509Authorities() {
		certs, err := x509.ParseCertificates(a.GetAsn1())
		if err != nil {
			return nil, fmt.Errorf("X.509 authority %d of the parent's bundle: %w", i+1, err)
		}
		for _, c := range certs {
			out.X509 = append(out.X509, embedded.Root{Certificate: c, Tainted: a.GetTainted()})
		}
	}
	var err error
	out.JWT, err = keysFromWire(b.GetJwtAuthorities())
	return out, err
}

func keysFromWire(in []*typespb.JWTKey) ([]embedded.JWTKey, error) {
	var out []embedded.JWTKey
	for i, k := range in {
		if k.GetKeyId() == "" {
			return nil, fmt.Errorf("JWT authority %d of the parent's bundle has no key ID", i+1)
		}
		if _, err := x509.ParsePKIXPublicKey(k.GetPublicKey()); err != nil {
			return nil, fmt.Errorf("JWT authority %q of the parent's bundle: %w", k.GetKeyId(), err)
		}
		out = append(out, embedded.JWTKey{
			ID: k.GetKeyId(), PublicKey: k.GetPublicKey(), ExpiresAt: spirewire.TimeFromWire(k.GetExpiresAt()), Tainted: k.GetTainted(),
		})
	}
	return out, nil
}

// quiet takes what go-spiffe logs of the connection to the agent: its errors
// come back with each call too.
type quiet struct{ log *slog.Logger }

func (q quiet) write(format string, args ...any) {
	q.log.Debug("Workload API of the parent's agent", slog.String("text", fmt.Sprintf(format, args...)))
}

// Debugf and the others write at level debug.
func (q quiet) Debugf(format string, args ...any) { q.write(format, args...) }

// Infof is Debugf.
func (q quiet) Infof(format string, args ...any) { q.write(format, args...) }

// Warnf is Debugf.
func (q quiet) Warnf(format string, args ...any) { q.write(format, args...) }

// Errorf is Debugf.
func (q quiet) Errorf(format string, args ...any) { q.write(format, args...) }
