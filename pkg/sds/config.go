package sds

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// Subscription is one caller's standing interest in what it may have. Safe for
// concurrent use; *svid.Subscription is one.
type Subscription interface {
	// Update is the newest picture; never modified.
	Update() *svid.Update
	// Park says that the caller now waits for something late. The error wraps
	// svid.ErrOverLimit if too many of its kind wait already.
	Park(what string) error
	// Unpark takes Park back.
	Unpark()
	// Close ends the subscription; notify may still be running.
	Close()
}

// Names are the resource names beside SPIFFE IDs. "" or "null" switches one
// off; the zero value switches all off.
type Names struct {
	// SVID names the caller's default identity.
	SVID string
	// Bundle names the own trust domain's bundle.
	Bundle string
	// AllBundles names the own and all federated bundles in one secret.
	AllBundles string
}

// DefaultNames are the names Envoy and Istio users know: default, ROOTCA, ALL.
func DefaultNames() Names { return Names{SVID: "default", Bundle: "ROOTCA", AllBundles: "ALL"} }

// Limits of one request or stream.
const (
	// MaxNames is how many resource names one stream may ask for.
	MaxNames = 1000
	// maxNameBytes is the longest name; a SPIFFE ID has at most 2048 bytes.
	maxNameBytes = 4096
	// maxNamesBytes is the length of all names of a request together.
	maxNamesBytes = 256 << 10
)

// DefaultFetchWait is how long FetchSecrets waits for what is late.
const DefaultFetchWait = 2 * time.Second

// Config says what a Server serves and to whom.
type Config struct {
	// Subscribe registers the caller in ctx. It does not block and being late
	// is no error. notify is called after Update may have changed; it does not
	// block. Errors wrapping attest.ErrDenied are refusals for good, those
	// wrapping svid.ErrOverLimit are limits, others are passing. Required.
	Subscribe func(ctx context.Context, notify func()) (Subscription, error)
	// Snapshot is what the caller in ctx may have now. Errors as Subscribe's.
	// Required.
	Snapshot func(ctx context.Context) (*svid.Update, error)
	// PeerID names the connection in ctx in StreamStatus; nil = always 0.
	PeerID func(ctx context.Context) uint64
	// LogAttrs are the facts about the caller in ctx for log lines; nil = none.
	LogAttrs func(ctx context.Context) []slog.Attr
	// Names are the special names; see DefaultNames.
	Names Names
	// DisableSPIFFECertValidation sends bundles as plain trusted_ca instead of
	// a configuration of Envoy's SPIFFE validator. Node metadata of the client
	// overrides it either way.
	DisableSPIFFECertValidation bool
	// FetchWait is how long FetchSecrets waits for what is late, never past
	// 80 % of the client's deadline; 0 = DefaultFetchWait, negative = not at
	// all.
	FetchWait time.Duration
	// Logger; nil = none.
	Logger *slog.Logger
	// Metrics; nil = unregistered ones.
	Metrics *Metrics
}

func (c Config) fetchWait() time.Duration {
	switch {
	case c.FetchWait == 0:
		return DefaultFetchWait
	case c.FetchWait < 0:
		return 0
	}
	return c.FetchWait
}

func (c Config) logger() *slog.Logger {
	if c.Logger == nil {
		return slog.New(slog.DiscardHandler)
	}
	return c.Logger
}

// parse resolves "null" and collisions. A bundle name that equals the
// all-bundles name wins over it, as in SPIRE; set the former to "null" to get
// all bundles under the name.
func (n Names) parse() (names Names, warning string, err error) {
	for _, p := range []*string{&n.SVID, &n.Bundle, &n.AllBundles} {
		if *p == "null" {
			*p = ""
		}
		if len(*p) > maxNameBytes {
			return Names{}, "", fmt.Errorf("secret name of %d bytes is longer than %d", len(*p), maxNameBytes)
		}
		if *p == wildcardName || strings.HasPrefix(*p, "spiffe://") {
			return Names{}, "", fmt.Errorf("secret name %q has a meaning of its own; choose another", *p)
		}
	}
	if n.SVID != "" && (n.SVID == n.Bundle || n.SVID == n.AllBundles) {
		return Names{}, "", fmt.Errorf("default_svid_name %q is also the name of a bundle; choose another", n.SVID)
	}
	if n.Bundle != "" && n.Bundle == n.AllBundles {
		n.AllBundles = ""
		warning = "default_bundle_name and default_all_bundles_name are equal: the own bundle alone is served; " +
			`set default_bundle_name to "null" for all bundles`
	}
	return n, warning, nil
}

func (c Config) validate() error {
	if c.Subscribe == nil {
		return errors.New("config has no Subscribe")
	}
	if c.Snapshot == nil {
		return errors.New("config has no Snapshot")
	}
	return nil
}
