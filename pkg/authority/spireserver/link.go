package spireserver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/resolver"
	"google.golang.org/grpc/resolver/manual"
)

// connect makes a connection that is opened when it is first used and again
// whenever the server ends it: the addresses in turn, each round after about
// knockMax. first is the address to begin with.
func (c *Client) connect(tlsConfig *tls.Config, first int) (*grpc.ClientConn, error) {
	r := manual.NewBuilderWithScheme("spireserver")
	addresses := make([]resolver.Address, len(c.cfg.Addresses))
	for i := range addresses {
		addresses[i].Addr = c.cfg.Addresses[(first+i)%len(addresses)]
	}
	r.InitialState(resolver.State{Addresses: addresses})
	cc, err := grpc.NewClient(r.Scheme()+":///server",
		grpc.WithResolvers(r),
		grpc.WithAuthority(addresses[0].Addr),
		grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig)),
		grpc.WithContextDialer(c.cfg.dial),
		grpc.WithIdleTimeout(0),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: knockMin, Multiplier: 1.2, Jitter: 0.2, MaxDelay: knockMax},
			MinConnectTimeout: 5 * time.Second,
		}),
	)
	if err != nil {
		return nil, fmt.Errorf("connect to %v: %w", c.cfg.Addresses, err)
	}
	return cc, nil
}

// serverTLS verifies the server and presents svid, if there is one.
func (c *Client) serverTLS(svid *x509svid.SVID, verify func(raw [][]byte) error) *tls.Config {
	config := &tls.Config{
		MinVersion: tls.VersionTLS12,
		// The peer proves a SPIFFE ID, not a host name; verify below does what
		// this flag switches off, and no session is ever resumed without it.
		InsecureSkipVerify: true, //nolint:gosec // see above
		VerifyPeerCertificate: func(raw [][]byte, _ [][]*x509.Certificate) error { //nolint:gosec // G123: sessions are not cached
			return verify(raw)
		},
	}
	if c.cfg.RequirePQKEM {
		config.MinVersion, config.CurvePreferences = tls.VersionTLS13, []tls.CurveID{tls.X25519MLKEM768}
	}
	if svid != nil {
		cert := certificateOf(svid)
		config.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
	}
	return config
}

// certificateOf is the SVID as crypto/tls wants it.
func certificateOf(svid *x509svid.SVID) *tls.Certificate {
	cert := &tls.Certificate{PrivateKey: svid.PrivateKey, Leaf: svid.Certificates[0]}
	for _, crt := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, crt.Raw)
	}
	return cert
}

// verifyServer is nil for a chain of spiffe://TD/spire/server below the trust
// bundle. Unless that is switched off, the bootstrap bundle counts too until the
// server's own was heard of in this process, as the one in the state may be too
// old, and again when no server has stood up to that for RebootstrapDelay: the
// server may have lost its keys, and whoever keeps the bootstrap bundle has put
// the new one there.
func (c *Client) verifyServer(raw [][]byte) error {
	trust, confirmed := c.trusted()
	err := errNoTrust
	if trust != nil {
		err = c.verifyWith(trust, raw)
		lasts := c.untrusted.note(err)
		if err == nil {
			c.verified.Store(time.Now().UnixNano())
		}
		if err == nil || c.cfg.Rebootstrap == RebootstrapNever || confirmed && lasts < c.cfg.RebootstrapDelay {
			return err
		}
	}
	if c.cfg.Bootstrap == nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.life, c.cfg.RPCTimeout)
	defer cancel()
	again := trust != nil
	trust, berr := c.cfg.Bootstrap(c.attempt(ctx, again), c.cfg.TrustDomain)
	if berr != nil {
		if errors.Is(err, errNoTrust) {
			return berr
		}
		return errors.Join(err, berr)
	}
	if err = c.verifyWith(trust, raw); err != nil {
		return err
	}
	c.verified.Store(time.Now().UnixNano())
	c.bootstrapped(trust, confirmed)
	return nil
}

// attempt notes one more use of the bootstrap bundle, and tells its source.
func (c *Client) attempt(ctx context.Context, again bool) context.Context {
	c.trustMu.Lock()
	defer c.trustMu.Unlock()
	if c.boot.since.IsZero() {
		c.boot = attempt{since: time.Now(), address: c.cfg.Addresses[0]}
	}
	c.boot.again = again
	c.boot.number++
	return context.WithValue(ctx, attemptKey{}, c.boot)
}

// bootstrapped is told that a server stands up to the bootstrap bundle. If it
// has not stood up to its own for a while, an SVID that hangs on that is of no
// use to it; where none can be had anew, the server has to say so itself.
func (c *Client) bootstrapped(trust *x509bundle.Bundle, again bool) {
	c.trustMu.Lock()
	c.boot = attempt{}
	c.trustMu.Unlock()
	id := c.identity.Get()
	if !again || id == nil || !id.reattestable || c.isRejected(id) {
		return
	}
	if _, _, err := x509svid.Verify(id.Certificates, trust); err != nil {
		c.log.Warn("the server stands up to the bootstrap bundle only; the node attests anew", slog.String("agent_id", id.ID.String()))
		c.reject(id, notAttested)
	}
}

func (c *Client) verifyWith(trust *x509bundle.Bundle, raw [][]byte) error {
	id, _, err := x509svid.ParseAndVerify(raw, trust)
	if err != nil {
		return fmt.Errorf("the server's certificate: %w", err)
	}
	return c.requireServer(id)
}

// lapse is how long something has been failing. Safe for concurrent use.
type lapse struct {
	mu    sync.Mutex
	since time.Time
}

// note takes one more outcome; the result is how long there was no good one.
func (l *lapse) note(err error) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err == nil:
		l.since = time.Time{}
		return 0
	case l.since.IsZero():
		l.since = time.Now()
	}
	return time.Since(l.since)
}

func (c *Client) requireServer(id spiffeid.ID) error {
	if id != c.server {
		return fmt.Errorf("the server is %s, not %s", id, c.server)
	}
	return nil
}

// link is a connection that presents one SVID. Counted by links.
type link struct {
	cc      *grpc.ClientConn
	svid    *nodeSVID
	retired chan struct{} // closed when another link has taken over
	uses    int
}

// links hands out the newest link; an older one is closed when its last call
// has ended.
type links struct {
	mu      sync.Mutex
	current *link
	closed  bool
}

// acquire is the newest link, nil if there is none; release it after use.
func (s *links) acquire() *link {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.current != nil {
		s.current.uses++
	}
	return s.current
}

func (s *links) release(l *link) {
	s.mu.Lock()
	l.uses--
	over := l.uses == 0 && l != s.current
	s.mu.Unlock()
	if over {
		_ = l.cc.Close()
	}
}

// replace makes l, which may be nil, the newest link.
func (s *links) replace(l *link) {
	s.mu.Lock()
	old := s.current
	if s.closed && l != nil {
		old, l = l, nil
	}
	s.current = l
	over := old != nil && old.uses == 0
	if old != nil {
		close(old.retired)
	}
	s.mu.Unlock()
	if over {
		_ = old.cc.Close()
	}
}

func (s *links) close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.replace(nil)
}

func (s *links) isCurrent(l *link) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current == l
}

// relink makes a new link for the agent's SVID. first is the address to begin
// with.
func (c *Client) relink(svid *nodeSVID, first int) error {
	cc, err := c.connect(c.serverTLS(svid.SVID, c.verifyServer), first)
	if err != nil {
		return err
	}
	c.links.replace(&link{cc: cc, svid: svid, retired: make(chan struct{})})
	return nil
}

// reachable waits until the server answers to a TLS handshake, another link has
// taken over, or ctx ends.
func (c *Client) reachable(ctx context.Context) {
	l := c.links.acquire()
	if l == nil {
		return
	}
	defer c.links.release(l)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-l.retired:
			cancel()
		case <-ctx.Done():
		}
	}()
	for {
		state := l.cc.GetState()
		switch state {
		case connectivity.Ready, connectivity.Shutdown:
			return
		case connectivity.Idle:
			l.cc.Connect()
		case connectivity.Connecting, connectivity.TransientFailure:
		}
		if !l.cc.WaitForStateChange(ctx, state) {
			return
		}
	}
}
