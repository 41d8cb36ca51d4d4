package embedded

import (
	"cmp"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded/internal/issue"
)

// KeyType is the kind of a signing key: ec-p256, ec-p384, rsa-2048, rsa-4096.
type KeyType = issue.KeyType

// The key types.
const (
	ECP256  = issue.ECP256
	ECP384  = issue.ECP384
	RSA2048 = issue.RSA2048
	RSA4096 = issue.RSA4096
)

// Defaults, all of them SPIRE Server's.
const (
	DefaultCATTL       = 24 * time.Hour
	DefaultX509SVIDTTL = time.Hour
	DefaultJWTSVIDTTL  = 5 * time.Minute
	// DefaultLockTimeout is how long Open waits for the process before it.
	DefaultLockTimeout = 5 * time.Second
)

// minCATTL leaves room for back-dating and for the rotation job.
const minCATTL = 30 * time.Second

// Config says how to run an Authority.
type Config struct {
	// TrustDomain is required.
	TrustDomain spiffeid.TrustDomain
	// StatePath is the state file; required. It and its directory are created
	// if missing; an existing directory must be owner-only.
	StatePath string
	// LockTimeout is how long to wait while another process has the state file
	// open; 0 = 5 s.
	LockTimeout time.Duration

	// CAKeyType is that of new CA keys; empty = ec-p256.
	CAKeyType KeyType
	// JWTKeyType is that of new JWT keys; empty = CAKeyType.
	JWTKeyType KeyType
	// CATTL is the life of a new CA and of a new JWT key; 0 = 24 h.
	CATTL time.Duration
	// CASubject is the C, O and CN of a new CA; empty = C=US, O=SPIFFE.
	CASubject pkix.Name

	// Upstream signs the CA certificates; nil = they are self-signed.
	Upstream Upstream

	// DefaultX509SVIDTTL is for entries that give none; 0 = 1 h.
	DefaultX509SVIDTTL time.Duration
	// DefaultJWTSVIDTTL is for entries that give none; 0 = 5 min.
	DefaultJWTSVIDTTL time.Duration
	// JWTIssuer is the iss claim; empty = none.
	JWTIssuer string

	// Logger gets what the authority does on its own; nil = nothing is logged.
	Logger *slog.Logger
	// Metrics counts; nil = unregistered ones.
	Metrics *Metrics
}

func (c Config) withDefaults() Config {
	c.LockTimeout = cmp.Or(c.LockTimeout, DefaultLockTimeout)
	c.CAKeyType = cmp.Or(c.CAKeyType, ECP256)
	c.JWTKeyType = cmp.Or(c.JWTKeyType, c.CAKeyType)
	c.CATTL = cmp.Or(c.CATTL, DefaultCATTL)
	c.DefaultX509SVIDTTL = cmp.Or(c.DefaultX509SVIDTTL, DefaultX509SVIDTTL)
	c.DefaultJWTSVIDTTL = cmp.Or(c.DefaultJWTSVIDTTL, DefaultJWTSVIDTTL)
	if len(c.CASubject.ToRDNSequence()) == 0 {
		c.CASubject = pkix.Name{Country: []string{"US"}, Organization: []string{"SPIFFE"}}
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		c.Metrics = NewMetrics(nil)
	}
	return c
}

func (c Config) validate() error {
	var errs []error
	if c.TrustDomain.IsZero() {
		errs = append(errs, errors.New("TrustDomain is required"))
	}
	if c.StatePath == "" {
		errs = append(errs, errors.New("StatePath is required"))
	}
	for name, k := range map[string]KeyType{"CAKeyType": c.CAKeyType, "JWTKeyType": c.JWTKeyType} {
		if err := k.Validate(); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
		}
	}
	if c.CATTL < minCATTL {
		errs = append(errs, fmt.Errorf("CATTL %s is shorter than %s", c.CATTL, minCATTL))
	}
	for name, ttl := range map[string]time.Duration{"DefaultX509SVIDTTL": c.DefaultX509SVIDTTL, "DefaultJWTSVIDTTL": c.DefaultJWTSVIDTTL} {
		if ttl < time.Second {
			errs = append(errs, fmt.Errorf("%s %s is shorter than a second", name, ttl))
		}
	}
	return errors.Join(errs...)
}
