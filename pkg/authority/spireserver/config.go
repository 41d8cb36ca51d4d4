package spireserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Config is what a Client is built from. The zero value of a field means what
// its comment says.
type Config struct {
	// TrustDomain of the server and this node. Required.
	TrustDomain spiffeid.TrustDomain
	// Addresses of the server, host:port, tried in turn. At least one.
	Addresses []string
	// Bootstrap gives the trust bundle for the first contact. Required unless
	// InsecureBootstrap is set.
	Bootstrap Bootstrap
	// InsecureBootstrap takes the trust bundle from whoever answers first.
	InsecureBootstrap bool
	// Rebootstrap says whether Bootstrap counts again when the server does not
	// stand up to the trust bundle any more. "" = RebootstrapAuto.
	Rebootstrap Rebootstrap
	// RebootstrapDelay is how long that must last. 0 = 1 min.
	RebootstrapDelay time.Duration
	// RequirePQKEM refuses a server that agrees on no key with the post-quantum
	// hybrid X25519MLKEM768.
	RequirePQKEM bool
	// Attestor proves to the server which node this is. Required.
	Attestor NodeAttestor
	// StateDir is an owner-only directory on tmpfs for the agent's SVID and key
	// and the trust bundle. Empty = nothing is kept, and an agent that was
	// attested by a join token needs a new one after a restart.
	StateDir string
	// StateOf is the server that the state is from, in one line: that of another
	// is erased. "" = whatever is there is loaded.
	StateOf string
	// Version is told to the server once. Empty = nothing is told.
	Version string

	// SyncInterval is the time between polls when nobody waits, give or take a
	// tenth. 0 = 5 s.
	SyncInterval time.Duration
	// WithdrawConfirm is how long an entry must have been missing from the
	// server's answers, two at least and a second apart, before it is
	// withdrawn. 0 withdraws it at the first, as SPIRE Agent does.
	WithdrawConfirm time.Duration
	// RPCTimeout bounds one call. 0 = 30 s.
	RPCTimeout time.Duration

	// Logger: nil = discard.
	Logger *slog.Logger
	// Metrics: nil = unregistered ones.
	Metrics *Metrics

	// dial opens a connection; nil = TCP. Tests replace it.
	dial func(ctx context.Context, address string) (net.Conn, error)
	// anyFilesystem lets tests keep state outside tmpfs.
	anyFilesystem bool
	// noWatch lets tests poll a server that would push.
	noWatch bool
}

// Rebootstrap is what a client does when the server has lost its keys, or was
// installed anew, and the trust bundle it gave does not know it.
type Rebootstrap string

const (
	// RebootstrapNever stays with the trust bundle; an operator has to remove
	// the agent's state.
	RebootstrapNever Rebootstrap = "never"
	// RebootstrapAuto takes the bootstrap bundle, and attests anew if that is
	// possible.
	RebootstrapAuto Rebootstrap = "auto"
	// RebootstrapAlways is RebootstrapAuto for those who rely on it: a node
	// attestation that cannot be repeated is refused.
	RebootstrapAlways Rebootstrap = "always"
)

// Intervals that nobody has needed to configure.
const (
	// hurryMin is the shortest time between two syncs; hurryGrowth stretches
	// it while the hurry lasts, until it is the normal interval. A SPIRE Server
	// knows a new entry after up to 5 s; pauses are below 1 s until then.
	hurryMin    = 250 * time.Millisecond
	hurryGrowth = 1.1
	// confirmMin is the shortest time between the two answers that withdraw an
	// entry.
	confirmMin = time.Second
	// retryMin and retryMax bound the pause after a failed step; a server that
	// cannot be reached at all is knocked at every probeEvery.
	retryMin   = 500 * time.Millisecond
	retryMax   = 15 * time.Second
	probeEvery = time.Second
	// knockMin and knockMax bound the pause between two attempts to connect, and
	// returnSpread is the time over which nodes come back to a server that has
	// returned, so that they do not all come at once.
	knockMin     = 400 * time.Millisecond
	knockMax     = 600 * time.Millisecond
	returnSpread = 400 * time.Millisecond
	awaitMax     = 3 * time.Second
	// bannedRetry is the pause before a banned agent asks again.
	bannedRetry = 5 * time.Minute
	// refusedFor is how long servers may refuse the agent's certificate in the
	// handshake, without a word why, before the node attests anew.
	refusedFor = 3 * time.Second
	// tokenPoll is how often a used join token is compared with its file.
	tokenPoll = 2 * time.Second
	// federatedParallel bounds the calls for them.
	federatedParallel = 10
	// maxBatch is what a SPIRE Server signs in one call.
	maxBatch = 500
	// maxBatches is how many such calls run at a time.
	maxBatches = 4
	// maxMessage is the largest answer accepted, bytes: GetAuthorizedEntries
	// does not page.
	maxMessage = 64 << 20
	// maxEntries bounds what one server can make this node hold.
	maxEntries = 1_000_000
)

func (c Config) withDefaults() (Config, error) {
	switch {
	case c.TrustDomain.IsZero():
		return c, errors.New("spireserver: Config.TrustDomain is missing")
	case len(c.Addresses) == 0:
		return c, errors.New("spireserver: Config.Addresses is empty")
	case c.Bootstrap == nil && !c.InsecureBootstrap:
		return c, errors.New("spireserver: Config.Bootstrap is missing; name a trust bundle or set InsecureBootstrap")
	case c.Bootstrap != nil && c.InsecureBootstrap:
		return c, errors.New("spireserver: Config.Bootstrap and InsecureBootstrap exclude each other")
	case c.Attestor == nil:
		return c, errors.New("spireserver: Config.Attestor is missing")
	}
	switch c.Rebootstrap {
	case "":
		c.Rebootstrap = RebootstrapAuto
	case RebootstrapNever, RebootstrapAuto:
	case RebootstrapAlways:
		if c.InsecureBootstrap || c.Attestor.Type() == (JoinToken{}).Type() {
			return c, errors.New("spireserver: Config.Rebootstrap is always, but there is nothing to begin with anew: " +
				"it needs a bootstrap bundle and a node attestation that can be repeated")
		}
	default:
		return c, fmt.Errorf("spireserver: Config.Rebootstrap %q is none of never, auto, always", c.Rebootstrap)
	}
	for _, a := range c.Addresses {
		if _, _, err := net.SplitHostPort(a); err != nil {
			return c, fmt.Errorf("spireserver: address %q is not host:port: %w", a, err)
		}
	}
	for _, d := range []struct {
		value *time.Duration
		def   time.Duration
		name  string
	}{
		{&c.SyncInterval, 5 * time.Second, "SyncInterval"},
		{&c.WithdrawConfirm, 0, "WithdrawConfirm"},
		{&c.RebootstrapDelay, time.Minute, "RebootstrapDelay"},
		{&c.RPCTimeout, 30 * time.Second, "RPCTimeout"},
	} {
		if *d.value < 0 {
			return c, fmt.Errorf("spireserver: Config.%s is %s; it cannot be negative", d.name, *d.value)
		}
		if *d.value == 0 {
			*d.value = d.def
		}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = NewMetrics(nil)
	}
	if c.dial == nil {
		c.dial = dialTCP
	}
	return c, nil
}
