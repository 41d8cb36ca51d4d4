// Package bundlemap keeps a ConfigMap equal to a trust bundle. Agents mount it
// and know the authority by it at their first contact.
//
// # Promise
//
// Publisher writes when the bundle changes or when somebody else has changed or
// deleted what it wrote, and at no other time. Only its own keys are touched.
// An API server that is away delays the ConfigMap and nothing else: signing
// does not wait for it. A ConfigMap made here is owned by the authority's
// service account, so uninstalling leaves none.
//
// # Threats
//
// Whoever may write the ConfigMap decides whom new agents trust, for a time.
// That is the right to update one named ConfigMap in the authority's namespace,
// which nobody but the authority should have. The bundle holds no secrets.
package bundlemap

import (
	"cmp"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	coreclient "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

// Keys of the ConfigMap.
const (
	// KeySPIFFE holds the bundle as SPIFFE defines it, JSON.
	KeySPIFFE = "bundle.spiffe"
	// KeyPEM holds its X.509 authorities.
	KeyPEM = "bundle.crt"
)

const (
	// recheck is how often the ConfigMap is looked at when nothing changes here.
	recheck = 30 * time.Second
	// callTimeout bounds one call to the API server.
	callTimeout = 10 * time.Second

	firstRetry = 250 * time.Millisecond
	lastRetry  = 15 * time.Second
)

// ConfigMaps are those of one namespace; client-go's ConfigMapInterface is one.
type ConfigMaps interface {
	Get(ctx context.Context, name string, opts metav1.GetOptions) (*corev1.ConfigMap, error)
	Create(ctx context.Context, m *corev1.ConfigMap, opts metav1.CreateOptions) (*corev1.ConfigMap, error)
	Patch(ctx context.Context, name string, pt types.PatchType, data []byte, opts metav1.PatchOptions, subresources ...string) (*corev1.ConfigMap, error)
}

// DefaultName is the ConfigMap that charts and command lines know.
const DefaultName = "spire-bundle"

// Where Kubernetes says in which namespace this pod runs, and as whom.
const (
	namespaceFile = "/var/run/secrets/kubernetes.io/serviceaccount/namespace"
	tokenFile     = "/var/run/secrets/kubernetes.io/serviceaccount/token" //nolint:gosec // a path
)

// Config says what is published where.
type Config struct {
	// Client reaches the API server; required unless ConfigMaps is set.
	Client *rest.Config
	// Namespace of the ConfigMap; empty = the one this pod runs in.
	Namespace string
	// Name of the ConfigMap, which is made if it is missing; empty = DefaultName.
	Name string
	// ConfigMaps of a namespace, instead of Client and Namespace.
	ConfigMaps ConfigMaps
	// TokenPath is this pod's service account token, whose account owns the
	// ConfigMap: it goes when the account goes. Empty = where Kubernetes has it.
	TokenPath string
	// Bundles gives the newest bundles, after waiting until they are newer than
	// after; required. It is authority.Authority's method.
	Bundles func(ctx context.Context, after uint64) (*authority.BundleSet, error)
	// Logger gets what happens; nil = nothing is logged.
	Logger *slog.Logger
}

// Publisher keeps one ConfigMap. Run it once.
type Publisher struct {
	cfg Config
	log *slog.Logger
}

// New checks the configuration; it connects to nothing.
func New(c Config) (*Publisher, error) {
	if c.Bundles == nil {
		return nil, errors.New("bundlemap: Config.Bundles is missing")
	}
	c.Name = cmp.Or(c.Name, DefaultName)
	c.TokenPath = cmp.Or(c.TokenPath, tokenFile)
	if c.ConfigMaps == nil {
		maps, err := connect(c.Client, c.Namespace)
		if err != nil {
			return nil, fmt.Errorf("bundlemap: %w", err)
		}
		c.ConfigMaps = maps
	}
	log := c.Logger
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Publisher{c, log.With(slog.String("configmap", c.Name))}, nil
}

func connect(client *rest.Config, namespace string) (ConfigMaps, error) {
	if client == nil {
		return nil, errors.New("Config.Client is missing")
	}
	if namespace == "" {
		own, err := os.ReadFile(namespaceFile)
		if err != nil {
			return nil, fmt.Errorf("find out the namespace this pod runs in: %w; outside a pod set Config.Namespace", err)
		}
		namespace = strings.TrimSpace(string(own))
	}
	core, err := coreclient.NewForConfig(client)
	if err != nil {
		return nil, fmt.Errorf("client for ConfigMaps: %w", err)
	}
	return core.ConfigMaps(namespace), nil
}

// Run publishes until ctx ends, and returns nil then. Errors of the API server
// are logged once each and tried again.
func (p *Publisher) Run(ctx context.Context) error {
	var (
		after uint64
		want  map[string]string
		said  string
		retry = firstRetry
	)
	for {
		wait := recheck
		if err := p.next(ctx, &after, &want, wait); err != nil {
			return untilDone(ctx, err)
		}
		for want != nil {
			err := p.ensure(ctx, want)
			if err == nil {
				said, retry = "", firstRetry
				break
			}
			if ctx.Err() != nil {
				return untilDone(ctx, err)
			}
			if err.Error() != said {
				p.log.Warn("trust bundle not published; new agents cannot find the authority", slog.Any("error", err))
				said = err.Error()
			}
			// A newer bundle need not be waited for here: what is published
			// then is the newest at the next turn.
			if !sleep(ctx, retry) {
				return nil
			}
			retry = min(2*retry, lastRetry)
		}
	}
}

// untilDone is err, unless it only says that ctx has ended.
func untilDone(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	return nil
}

// next waits for newer bundles, but no longer than wait once there are some.
func (p *Publisher) next(ctx context.Context, after *uint64, want *map[string]string, wait time.Duration) error {
	asked := ctx
	if *want != nil {
		var cancel context.CancelFunc
		asked, cancel = context.WithTimeout(ctx, wait)
		defer cancel()
	}
	set, err := p.cfg.Bundles(asked, *after)
	switch {
	case err != nil && asked.Err() != nil && ctx.Err() == nil:
		return nil // nothing newer: look at the ConfigMap again
	case err != nil:
		return fmt.Errorf("bundles to publish: %w", err)
	}
	*after = set.Version
	if set.Own == nil || set.Own.Empty() {
		return nil // nothing that an agent could use
	}
	data, err := encode(set.Own)
	if err != nil {
		return err
	}
	*want = data
	return nil
}

// ensure makes the ConfigMap hold want.
func (p *Publisher) ensure(ctx context.Context, want map[string]string) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	have, err := p.cfg.ConfigMaps.Get(ctx, p.cfg.Name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		m := &corev1.ConfigMap{
			ObjectMeta: metav1.ObjectMeta{Name: p.cfg.Name, Labels: map[string]string{"app.kubernetes.io/part-of": "spiffe-node"}, OwnerReferences: p.owners()},
			Data:       want,
		}
		if _, err = p.cfg.ConfigMaps.Create(ctx, m, metav1.CreateOptions{}); err != nil {
			return fmt.Errorf("create ConfigMap %s: %w", p.cfg.Name, err)
		}
	case err != nil:
		return fmt.Errorf("get ConfigMap %s: %w", p.cfg.Name, err)
	case holds(have.Data, want):
		return nil
	default:
		patch, err := json.Marshal(map[string]any{"data": want})
		if err != nil {
			return err
		}
		if _, err = p.cfg.ConfigMaps.Patch(ctx, p.cfg.Name, types.MergePatchType, patch, metav1.PatchOptions{}); err != nil {
			return fmt.Errorf("patch ConfigMap %s: %w", p.cfg.Name, err)
		}
	}
	p.log.Info("trust bundle published")
	return nil
}

func holds(have, want map[string]string) bool {
	for k, v := range want {
		if have[k] != v {
			return false
		}
	}
	return true
}

func encode(b *spiffebundle.Bundle) (map[string]string, error) {
	js, err := b.Marshal()
	if err != nil {
		return nil, fmt.Errorf("encode the trust bundle: %w", err)
	}
	var text strings.Builder
	for _, c := range b.X509Authorities() {
		if err := pem.Encode(&text, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}); err != nil {
			return nil, fmt.Errorf("encode the trust bundle: %w", err)
		}
	}
	return map[string]string{KeySPIFFE: string(js), KeyPEM: text.String()}, nil
}

// sleep is false if ctx ended first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
