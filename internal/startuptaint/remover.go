package startuptaint

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

const (
	// A node is looked at again after a wait that doubles, beginning anew when
	// the node changes.
	firstWait = 250 * time.Millisecond
	lastWait  = 15 * time.Second
	// sayAfter is how long a node may lack something before the log says so.
	sayAfter = time.Minute
	// callTimeout bounds one look at a node.
	callTimeout = 10 * time.Second
	// maxLooks is how many nodes are looked at at a time.
	maxLooks = 8
)

// API is what is needed of the API server.
type API interface {
	// Watch tells of every node until ctx ends: set when it is there or has
	// changed, gone when it is not any more. Failures are overcome.
	Watch(ctx context.Context, set func(*corev1.Node), gone func(name string))
	// Node reads a node.
	Node(ctx context.Context, name string) (*corev1.Node, error)
	// PatchNode sends a merge patch.
	PatchNode(ctx context.Context, name string, patch []byte) error
	// Registered says whether the node's kubelet has the driver registered.
	Registered(ctx context.Context, node, driver string) (bool, error)
	// AgentPods are the pods of a service account on a node.
	AgentPods(ctx context.Context, node, namespace, account string) ([]corev1.Pod, error)
}

// Config is what a Remover needs; all of it but Logger and Metrics is required.
type Config struct {
	API API
	// Key of the taint.
	Key string
	// Driver is the name of the CSI driver.
	Driver string
	// Agents are the service accounts of agents, as namespace:name.
	Agents []string
	// Serving is nil when the agent of the node with this UID is attested and
	// connected, else what it lacks.
	Serving func(nodeUID string) error
	Logger  *slog.Logger
	Metrics *Metrics
}

// Remover removes the taint. Run it once.
type Remover struct {
	cfg  Config
	look chan struct{} // as many as look at nodes now

	mu    sync.Mutex
	nodes map[string]*watched // tainted ones by name
	wg    sync.WaitGroup
}

// watched is a node with the taint.
type watched struct {
	since   time.Time
	changed chan struct{} // one slot
	stop    context.CancelFunc
}

// New checks the configuration.
func New(cfg Config) (*Remover, error) {
	if cfg.API == nil || cfg.Key == "" || cfg.Driver == "" || len(cfg.Agents) == 0 || cfg.Serving == nil {
		return nil, errors.New("start-up taint: API, Key, Driver, Agents and Serving are required")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.Logger = cfg.Logger.With(slog.String("taint", cfg.Key))
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics(nil)
	}
	return &Remover{cfg: cfg, look: make(chan struct{}, maxLooks), nodes: map[string]*watched{}}, nil
}

// Run works until ctx ends. Failures of the API server are overcome, logged
// once a minute for each node, and never returned.
func (r *Remover) Run(ctx context.Context) error {
	r.cfg.API.Watch(ctx,
		func(n *corev1.Node) { r.set(ctx, n) },
		func(name string) { r.gone(name) })
	<-ctx.Done()
	r.mu.Lock()
	for name := range r.nodes {
		r.forgetLocked(name)
	}
	r.mu.Unlock()
	r.wg.Wait()
	return nil
}

// set begins or ends to care for a node.
func (r *Remover) set(ctx context.Context, n *corev1.Node) {
	r.mu.Lock()
	defer r.mu.Unlock()
	w := r.nodes[n.Name]
	switch {
	case !r.tainted(n):
		r.forgetLocked(n.Name)
	case w != nil:
		select {
		case w.changed <- struct{}{}:
		default:
		}
	case ctx.Err() == nil:
		w = &watched{since: time.Now(), changed: make(chan struct{}, 1)}
		ctx, w.stop = context.WithCancel(ctx)
		r.nodes[n.Name] = w
		r.cfg.Metrics.tainted.Inc()
		r.wg.Go(func() { r.care(ctx, n.Name, w) })
	}
}

func (r *Remover) gone(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forgetLocked(name)
}

func (r *Remover) forgetLocked(name string) {
	if w := r.nodes[name]; w != nil {
		w.stop()
		delete(r.nodes, name)
		r.cfg.Metrics.tainted.Dec()
	}
}

func (r *Remover) tainted(n *corev1.Node) bool {
	return slices.ContainsFunc(n.Spec.Taints, r.ours)
}

func (r *Remover) ours(t corev1.Taint) bool { return t.Key == r.cfg.Key }

// care looks at a node until its taint is off or somebody else has removed it.
func (r *Remover) care(ctx context.Context, name string, w *watched) {
	wait, said := firstWait, w.since
	for {
		err := r.once(ctx, name)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			// The watch will say that it is gone, and again if it comes back.
			wait = lastWait
		} else if now := time.Now(); now.Sub(said) >= sayAfter {
			r.cfg.Logger.Warn("a node keeps its start-up taint", slog.String("node", name), slog.Duration("since", now.Sub(w.since)), slog.Any("error", err))
			said = now
		}
		t := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			t.Stop()
			return
		case <-w.changed:
			t.Stop()
			wait = firstWait
		case <-t.C:
			wait = min(2*wait, lastWait)
		}
	}
}

// once removes the taint if the node is ready for pods; the error says what is
// in the way.
func (r *Remover) once(ctx context.Context, name string) error {
	select {
	case r.look <- struct{}{}:
		defer func() { <-r.look }()
	case <-ctx.Done():
		return ctx.Err()
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	n, err := r.cfg.API.Node(ctx, name)
	switch {
	case apierrors.IsNotFound(err):
		return nil // the watch will say so
	case err != nil:
		return fmt.Errorf("read the node: %w", err)
	case !r.tainted(n):
		return nil
	}
	if err := r.ready(ctx, n); err != nil {
		return err
	}
	patch, err := r.patch(n)
	if err != nil {
		return err
	}
	switch err := r.cfg.API.PatchNode(ctx, name, patch); {
	case apierrors.IsConflict(err):
		return errors.New("the node was changed by somebody else at the same moment; tried again")
	case apierrors.IsForbidden(err):
		return fmt.Errorf("patch the node: %w; the chart gives the right with startupTaint.enabled", err)
	case err != nil:
		return fmt.Errorf("patch the node: %w", err)
	}
	r.cfg.Metrics.removed.Inc()
	r.cfg.Logger.Info("start-up taint removed", slog.String("node", name), slog.Duration("node_age", time.Since(n.CreationTimestamp.Time).Round(time.Second)))
	return nil
}

// ready is nil if a pod on the node would get its volume and its identity. What
// this process knows itself comes first, so that a node whose agent has not
// come yet costs the API server one read.
func (r *Remover) ready(ctx context.Context, n *corev1.Node) error {
	if err := r.cfg.Serving(string(n.UID)); err != nil {
		return err
	}
	switch ok, err := r.cfg.API.Registered(ctx, n.Name, r.cfg.Driver); {
	case err != nil:
		return fmt.Errorf("read the node's CSI drivers: %w", err)
	case !ok:
		return fmt.Errorf("the kubelet does not know driver %s yet", r.cfg.Driver)
	}
	return r.agentReady(ctx, n.Name)
}

// agentReady is nil if one of the agents' pods on the node is Ready: its probe
// asks the agent whether it can issue.
func (r *Remover) agentReady(ctx context.Context, node string) error {
	for _, account := range r.cfg.Agents {
		namespace, name := split(account)
		pods, err := r.cfg.API.AgentPods(ctx, node, namespace, name)
		if err != nil {
			return fmt.Errorf("list the agents' pods on the node: %w", err)
		}
		if slices.ContainsFunc(pods, isReady) {
			return nil
		}
	}
	return errors.New("no pod of the agents is Ready on the node")
}

func isReady(p corev1.Pod) bool {
	return p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// patch is the node without the taint, for this version of this node only.
func (r *Remover) patch(n *corev1.Node) ([]byte, error) {
	// Not nil: a merge patch would take null for "remove the field", which an
	// empty list says as well and is what the API server stores.
	rest := []corev1.Taint{}
	for _, t := range n.Spec.Taints {
		if !r.ours(t) {
			rest = append(rest, t)
		}
	}
	return json.Marshal(map[string]any{
		"metadata": map[string]any{"uid": n.UID, "resourceVersion": n.ResourceVersion},
		"spec":     map[string]any{"taints": rest},
	})
}
