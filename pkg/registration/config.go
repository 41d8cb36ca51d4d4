package registration

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"regexp"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"k8s.io/client-go/rest"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// Authority is what registration needs of the embedded authority. All methods
// may run concurrently; changes are durable and visible when they return.
// Others may change entries and bundles at the same time.
type Authority interface {
	// Set is the newest snapshot of all entries.
	Set() *entry.Set
	// Entries waits until the set is newer than after, or ctx ends.
	Entries(ctx context.Context, after uint64) (*entry.Set, error)
	// Bundles waits until the bundles are newer than after, or ctx ends.
	Bundles(ctx context.Context, after uint64) (*authority.BundleSet, error)
	// CreateEntries creates entries under the IDs they have, each for itself.
	CreateEntries(ctx context.Context, in ...*entry.Entry) []embedded.Result
	// UpdateEntries changes entries, each for itself.
	UpdateEntries(ctx context.Context, updates ...embedded.EntryUpdate) []embedded.Result
	// DeleteEntries deletes entries, each for itself.
	DeleteEntries(ctx context.Context, ids ...string) []error
	// SetFederatedBundle stores the bundle of a foreign trust domain.
	SetFederatedBundle(ctx context.Context, b *embedded.Bundle) error
}

// Relationship says where the bundle of a foreign trust domain is served.
type Relationship struct {
	TrustDomain spiffeid.TrustDomain
	// URL is the https URL of the bundle endpoint.
	URL string
	// EndpointSPIFFEID is the endpoint's identity; zero = it is authenticated by
	// the web's PKI (https_web).
	EndpointSPIFFEID spiffeid.ID
}

// Relationships keeps bundles fresh from their endpoints. Those written here
// are the implementation's to mark as ours, durably: Registered lists only
// them, and others are neither replaced nor deleted.
type Relationships interface {
	// Registered lists the relationships that were set here.
	Registered(ctx context.Context) ([]Relationship, error)
	// SetRelationship creates or replaces one; an equal one changes nothing.
	SetRelationship(ctx context.Context, r Relationship) error
	// DeleteRelationship deletes one; without one it does nothing. The bundle
	// stays.
	DeleteRelationship(ctx context.Context, td spiffeid.TrustDomain) error
	// Refresh says how fetching a bundle goes; false while nothing is known.
	Refresh(td spiffeid.TrustDomain) (Refresh, bool)
	// Changed closes when Registered or some Refresh would answer otherwise.
	Changed() <-chan struct{}
}

// Refresh says how fetching a bundle from its endpoint goes.
type Refresh struct {
	// Error is why the last attempt failed; "" = it did not.
	Error string
	// Fetched: some attempt has succeeded since the authority started.
	Fetched bool
	// Stale: the last success is longer ago than the bundle's refresh hint
	// allows.
	Stale bool
}

// Config says what to register, where and how.
type Config struct {
	// Client reaches the API server; required. Its rate limits are not used.
	Client *rest.Config
	// Authority gets the entries; required.
	Authority Authority
	// Relationships gets where bundles are served; nil = nobody refreshes
	// bundles, and ClusterFederatedTrustDomains say so in their status.
	Relationships Relationships
	// TrustDomain is the authority's; required.
	TrustDomain spiffeid.TrustDomain
	// ClusterName is the cluster's name in k8s_psat; required.
	ClusterName string
	// ClusterDomain ends the DNS names of services, as cluster.local; empty =
	// names stop at .svc.
	ClusterDomain string
	// ParentTemplate is a template of the parent ID; it sees the node, not the
	// pod. Empty = DefaultParentTemplate.
	ParentTemplate string
	// IgnoreNamespaces are regular expressions; a namespace whose whole name
	// matches one gets nothing from ClusterSPIFFEIDs. nil =
	// DefaultIgnoreNamespaces, empty = none is ignored.
	IgnoreNamespaces []string
	// ClassName is the class of resources handled besides those without class.
	ClassName string
	// IgnoreClassless leaves resources without class to others.
	IgnoreClassless bool
	// StatusInterval is the least time between two writes of one resource's
	// status; 0 = 1 s.
	StatusInterval time.Duration
	// Logger gets what happens; nil = nothing is logged.
	Logger *slog.Logger
	// Metrics counts; nil = unregistered ones.
	Metrics *Metrics
}

// DefaultIgnoreNamespaces are those of the SPIRE controller manager.
func DefaultIgnoreNamespaces() []string {
	return []string{"kube-system", "kube-public", "spire-system"}
}

const (
	// maxBatch bounds the entries of one write.
	maxBatch      = 1000
	defaultStatus = time.Second
)

// settings is a checked Config.
type settings struct {
	Config
	parent *textTemplate
	ignore []*regexp.Regexp
}

func (c Config) check() (*settings, error) {
	s := &settings{Config: c}
	var errs []error
	if c.Client == nil {
		errs = append(errs, errors.New("missing Client"))
	}
	if c.Authority == nil {
		errs = append(errs, errors.New("missing Authority"))
	}
	if c.TrustDomain.IsZero() {
		errs = append(errs, errors.New("missing TrustDomain"))
	}
	if c.ClusterName == "" {
		errs = append(errs, errors.New("missing ClusterName"))
	}
	if c.StatusInterval < 0 {
		errs = append(errs, fmt.Errorf("StatusInterval %s is negative", c.StatusInterval))
	}
	if c.StatusInterval == 0 {
		s.StatusInterval = defaultStatus
	}
	if c.ParentTemplate == "" {
		s.ParentTemplate = DefaultParentTemplate
	}
	var err error
	if s.parent, err = parseParentTemplate(s.ParentTemplate); err != nil {
		errs = append(errs, err)
	}
	if c.IgnoreNamespaces == nil {
		s.IgnoreNamespaces = DefaultIgnoreNamespaces()
	}
	for _, expr := range s.IgnoreNamespaces {
		re, err := regexp.Compile(`\A(?:` + expr + `)\z`)
		if err != nil {
			errs = append(errs, fmt.Errorf("IgnoreNamespaces: %w", err))
			continue
		}
		s.ignore = append(s.ignore, re)
	}
	if c.Logger == nil {
		s.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Metrics == nil {
		s.Metrics = NewMetrics(nil)
	}
	return s, errors.Join(errs...)
}

// handles says whether resources of a class are ours.
func (s *settings) handles(class string) bool {
	if class == "" {
		return !s.IgnoreClassless
	}
	return class == s.ClassName
}

func (s *settings) ignores(namespace string) bool {
	for _, re := range s.ignore {
		if re.MatchString(namespace) {
			return true
		}
	}
	return false
}
