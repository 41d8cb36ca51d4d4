package spireserver

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/latest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Client is the authority of an agent whose authority is elsewhere. It
// implements authority.Authority and is a source of entries. Safe for
// concurrent use. New builds it, Run makes it work.
type Client struct {
	cfg    Config
	log    *slog.Logger
	met    *Metrics
	server spiffeid.ID     // who the server must be
	life   context.Context // ends with Close
	stop   context.CancelFunc
	tasks  sync.WaitGroup // batches and the like, which outlive their callers

	links    links
	identity *latest.Value[*nodeSVID]            // nil until attested
	set      *latest.Value[*entry.Set]           // nil until heard of
	bundles  *latest.Value[*authority.BundleSet] // nil until heard of
	state    *stateFile                          // nil = nothing is kept

	trustMu   sync.Mutex
	trust     *x509bundle.Bundle // to verify the server with; nil = not known yet
	confirmed bool               // trust was heard of in this process
	boot      attempt            // to bootstrap; zero = none under way
	spent     [sha256.Size]byte  // the join token that was used last

	rejectedMu sync.Mutex
	rejected   *rejection               // of the current SVID
	wakeID     chan struct{}            // the identity loop has something to do
	rotating   atomic.Bool              // a new SVID is being asked for
	tainted    atomic.Pointer[nodeSVID] // hangs on a tainted authority
	untrusted  lapse                    // the server does not stand up to trust
	refused    lapse                    // the server does not take the agent's certificate
	verified   atomic.Int64             // when a server proved itself last, Unix nanoseconds

	hurry  chan struct{}
	asked  atomic.Uint64                         // syncs asked for by resync
	synced *latest.Value[syncOutcome]            // what became of them
	first  atomic.Int64                          // address to begin with
	follow follower                              // belongs to the sync loop
	store  bundleStore                           // own and federated bundles
	ledger ledger                                // entries, and those that went missing
	batch  batcher                               // X.509-SVIDs waiting to be signed
	report report                                // for Status
	told   atomic.Pointer[authority.TrustReport] // the newest report on the trust bundle
	tell   chan struct{}                         // it has to be sent
}

// rejection is the server's refusal of one SVID.
type rejection struct {
	svid   *nodeSVID
	reason reason
}

// New builds a Client and loads its state, if there is a usable one. Nothing is
// sent before Run. The error names the setting to change.
func New(cfg Config) (*Client, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	server, err := spiffeid.FromPath(cfg.TrustDomain, "/spire/server")
	if err != nil {
		return nil, err
	}
	c := &Client{
		cfg: cfg, log: cfg.Logger, met: cfg.Metrics, server: server,
		identity: latest.New[*nodeSVID](nil),
		set:      latest.New[*entry.Set](nil),
		bundles:  latest.New[*authority.BundleSet](nil),
		synced:   latest.New(syncOutcome{}),
		wakeID:   make(chan struct{}, 1),
		hurry:    make(chan struct{}, 1),
		tell:     make(chan struct{}, 1),
	}
	c.life, c.stop = context.WithCancel(context.Background())
	c.batch.limit = maxBatch
	c.follow.init(c)
	c.ledger = ledger{confirm: cfg.WithdrawConfirm, missing: map[string]absence{}, denied: map[string]bool{}}
	if cfg.StateDir != "" {
		if c.state, err = openState(cfg.StateDir, cfg.StateOf, cfg.anyFilesystem); err != nil {
			c.stop()
			return nil, err
		}
		c.restore()
	}
	return c, nil
}

// Run attests, follows entries and bundles and renews the agent's SVID until
// ctx ends; then it returns nil after its goroutines have ended. It may be
// called once; the Client is closed afterwards.
func (c *Client) Run(ctx context.Context) error {
	var loops sync.WaitGroup
	loops.Go(func() { c.keepIdentity(ctx) })
	loops.Go(func() { c.keepUp(ctx) })
	loops.Go(func() { c.keepReports(ctx) })
	if c.state != nil {
		loops.Go(func() { c.keepState(ctx) })
	}
	select {
	case <-ctx.Done():
	case <-c.life.Done():
	}
	c.stop()
	loops.Wait()
	return c.Close()
}

// Close ends calls under way and closes the connections. It may be called more
// than once.
func (c *Client) Close() error {
	c.batch.mu.Lock()
	c.stop() // no batch starts after this
	c.batch.mu.Unlock()
	c.links.close()
	c.tasks.Wait()
	return nil
}

// Hurry has entries asked for at once and then often for a while: somebody
// waits for an identity, or a pod is about to. It never blocks.
func (c *Client) Hurry() { signal(c.hurry) }

// Entries waits until the set of entries this agent is authorized for is newer
// than after, or ctx ends.
func (c *Client) Entries(ctx context.Context, after uint64) (*entry.Set, error) {
	return c.set.Wait(ctx, nil, func(s *entry.Set) bool { return s != nil && s.Version() > after })
}

// Bundles waits until the trust bundles are newer than after, or ctx ends.
func (c *Client) Bundles(ctx context.Context, after uint64) (*authority.BundleSet, error) {
	return c.bundles.Wait(ctx, nil, func(s *authority.BundleSet) bool { return s != nil && s.Version > after })
}

func (c *Client) trusted() (*x509bundle.Bundle, bool) {
	c.trustMu.Lock()
	defer c.trustMu.Unlock()
	return c.trust, c.confirmed
}

func (c *Client) setTrust(b *x509bundle.Bundle, confirmed bool) {
	c.trustMu.Lock()
	defer c.trustMu.Unlock()
	c.trust, c.confirmed = b, confirmed
}

// call makes one call as the attested agent. A call that met a change of the
// agent's SVID is made once more with the new one; if the server turns the SVID
// away, getting another is set in motion.
func (c *Client) call(ctx context.Context, method string, f func(ctx context.Context, cc grpc.ClientConnInterface) error) error {
	for try := 0; ; try++ {
		if c.life.Err() != nil {
			return errClosed
		}
		l := c.links.acquire()
		if l == nil {
			return errNotAttested
		}
		if c.isRejected(l.svid) && !c.rotating.Load() {
			c.links.release(l)
			return errTurnedAway
		}
		err := c.callOn(ctx, l, method, f)
		r := deniedReason(err)
		again := r != none && try == 0 && c.replaced(ctx, l, r)
		c.links.release(l)
		switch {
		case again:
			continue
		case r != none:
			c.reject(l.svid, r)
		case err == nil:
		case ctx.Err() == nil:
			c.recycle(l, err)
		}
		return err
	}
}

// replaced says whether the SVID that the server turned away was about to be
// replaced anyway; it waits for that.
func (c *Client) replaced(ctx context.Context, l *link, r reason) bool {
	if r == notActive && c.rotating.Load() {
		timer := time.NewTimer(c.cfg.RPCTimeout)
		defer timer.Stop()
		select {
		case <-l.retired:
		case <-timer.C:
		case <-ctx.Done():
		}
	}
	return !c.links.isCurrent(l)
}

func (c *Client) callOn(ctx context.Context, l *link, method string, f func(ctx context.Context, cc grpc.ClientConnInterface) error) error {
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RPCTimeout)
	defer cancel()
	defer context.AfterFunc(c.life, cancel)() //nolint:contextcheck // the client ends calls, whoever makes them
	start := time.Now()
	err := f(ctx, l.cc)
	c.met.called(method, start, err)
	return err
}

// recycle gives up a connection on which the server is there but does not
// work: the next address may.
func (c *Client) recycle(l *link, err error) {
	switch status.Code(err) {
	case codes.DeadlineExceeded:
	case codes.Internal, codes.Unavailable, codes.Unknown:
		// Without a connection, the addresses are being tried already.
		if len(c.cfg.Addresses) < 2 || l.cc.GetState() != connectivity.Ready {
			return
		}
	default:
		return
	}
	if !c.links.isCurrent(l) {
		return
	}
	first := int(c.first.Add(1) % int64(len(c.cfg.Addresses)))
	if err := c.relink(l.svid, first); err != nil {
		c.log.Error("no new connection", slog.Any("error", err))
	}
}

// reject notes that the server turned an SVID away.
func (c *Client) reject(svid *nodeSVID, r reason) {
	c.rejectedMu.Lock()
	defer c.rejectedMu.Unlock()
	if c.identity.Get() == svid && c.rejected == nil {
		c.rejected = &rejection{svid, r}
		signal(c.wakeID)
	}
}

// Status is what an operator may want to know. Times are zero for what has not
// happened.
type Status struct {
	AgentID     spiffeid.ID // zero until attested
	SVIDExpires time.Time
	Attested    bool      // the agent has an SVID that has not expired
	Banned      bool      // the server has banned this agent
	Watching    bool      // the server pushes changes
	LastSync    time.Time // entries and bundles were complete
	Missing     int       // entries whose withdrawal is not confirmed
	Err         error     // what keeps the client from working now, nil if nothing does
}

// Status is a picture of the moment.
func (c *Client) Status() Status {
	s := c.report.status()
	if id := c.identity.Get(); id != nil {
		s.AgentID, s.SVIDExpires = id.ID, id.expires()
		s.Attested = time.Now().Before(s.SVIDExpires)
	}
	return s
}

// report collects what Status tells.
type report struct {
	mu          sync.Mutex
	s           Status
	identityErr error
	syncErr     error
}

func (r *report) status() Status {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.s
	s.Err = errors.Join(r.identityErr, r.syncErr)
	return s
}

// edit changes the report.
func (r *report) edit(f func(*report)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(r)
}

// watching notes whether changes are pushed; the result is whether they were.
func (r *report) watching(now bool) (before bool) {
	r.edit(func(r *report) { before, r.s.Watching = r.s.Watching, now })
	return before
}

// Certificate is the agent's own SVID with its key, for servers of this process.
func (c *Client) Certificate() (*tls.Certificate, error) {
	svid := c.identity.Get()
	if svid == nil {
		return nil, errors.New("the node is not attested yet")
	}
	return certificateOf(svid.SVID), nil
}

// Ready is nil when the server would be asked for signatures and is thought to
// answer: the agent is attested and has heard of entries and bundles.
func (c *Client) Ready() error {
	s := c.Status()
	switch {
	case s.Banned:
		return errors.New("the server has banned this agent")
	case !s.Attested && s.Err != nil:
		return fmt.Errorf("the node is not attested: %w", s.Err)
	case !s.Attested:
		return errors.New("the node is not attested yet")
	case s.Err != nil:
		return s.Err
	case s.LastSync.IsZero():
		return errors.New("waiting for entries and bundles from the server")
	}
	return nil
}
