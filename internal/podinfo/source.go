package podinfo

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// Config is what a Source needs. Only Node is required: without API and Kubelet
// the ledger alone speaks.
type Config struct {
	// Node is the name of this node in the API server.
	Node string
	// Ledger is the publish ledger; nil: none.
	Ledger attest.PodSource
	// API is the API server, whose watch of this node's pods is followed; nil:
	// none. At most one of API and Kubelet.
	API API
	// Kubelet asks the kubelet instead, but only while a caller's pod or
	// container is unknown; nil: it is not asked.
	Kubelet *Kubelet
	// Runtime asks the container runtime for containers that no status shows
	// yet; nil: callers wait for the status.
	Runtime *Runtime
	// NamespaceLabels adds k8s:ns-label selectors, for which API watches all
	// namespaces.
	NamespaceLabels bool
	// StateFile is where what is known outlives this process, in an owner-only
	// directory on tmpfs: a Source that starts while the API server is away
	// goes on from there. Empty: nothing is kept.
	StateFile string
	// OnPod is told of pods that may call soon, whenever something new is
	// known of them: those in the ledger, or all if there is no ledger. It is
	// called from any goroutine and must not block; nil: nobody is told.
	OnPod func(attest.Pod)
	// Logger may be nil.
	Logger *slog.Logger
	// Metrics may be nil.
	Metrics *Metrics
}

// Source is the witness of the pods on this node. Safe for concurrent use.
type Source struct {
	cfg   Config
	log   *slog.Logger
	store *store

	namespaces *namespaces // nil unless their labels are wanted
	pods, get  *link       // nil without API
	kubelet    *link
	runtime    *link
	fetches    *queue[podName]
	containers *queue[containerName]
	// kick wakes the kubelet's poller; one slot.
	kick chan struct{}
	// dirty says that there is something to save; one slot.
	dirty chan struct{}
}

var _ interface {
	attest.ContainerSource
	attest.JoinedSource
} = (*Source)(nil)

type podName struct{ namespace, name, uid string }

type containerName struct{ pod, id string }

// New checks the configuration and restores what StateFile holds. Nothing is
// asked of anybody before Run.
func New(cfg Config) (*Source, error) {
	switch {
	case cfg.Node == "":
		return nil, errors.New("podinfo: the name of this node is missing; set node.name or MY_NODE_NAME")
	case cfg.API != nil && cfg.Kubelet != nil:
		return nil, errors.New("podinfo: pods come from the API server or from the kubelet, not from both")
	case cfg.NamespaceLabels && cfg.API == nil:
		return nil, errors.New("podinfo: only the API server knows the labels of namespaces; use the watch, or do without namespace labels")
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics(nil)
	}
	s := &Source{
		cfg:        cfg,
		log:        cfg.Logger,
		fetches:    newQueue[podName](),
		containers: newQueue[containerName](),
		kick:       make(chan struct{}, 1),
		dirty:      make(chan struct{}, 1),
	}
	s.store = newStore(s.changed)
	if cfg.API != nil {
		s.pods, s.get = newLink("pods", s.log, cfg.Metrics), newLink("pod", s.log, cfg.Metrics)
	}
	if cfg.Kubelet != nil {
		s.kubelet = newLink("kubelet", s.log, cfg.Metrics)
	}
	if cfg.Runtime != nil {
		s.runtime = newLink("runtime", s.log, cfg.Metrics)
	}
	if cfg.NamespaceLabels {
		s.namespaces = newNamespaces(newLink("namespaces", s.log, cfg.Metrics), s.namespacesChanged)
	}
	if s.remembers() {
		s.restore()
	}
	return s, nil
}

// remembers says whether there is anything to save and somewhere to save it.
func (s *Source) remembers() bool {
	return s.cfg.StateFile != "" && (s.cfg.API != nil || s.cfg.Kubelet != nil)
}

// Run follows the pods until ctx ends, once. Failures of others are overcome, shown
// in Status and never returned.
func (s *Source) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	if s.cfg.API != nil {
		wg.Go(func() { s.runWatch(ctx) })
		wg.Go(func() { s.fetches.run(ctx, maxFetches, s.fetch) })
		wg.Go(func() { s.runExpiry(ctx) })
	}
	if s.namespaces != nil {
		wg.Go(func() { s.namespaces.run(ctx, s.cfg.API) })
	}
	if s.cfg.Kubelet != nil {
		wg.Go(func() { s.poll(ctx) })
	}
	if s.cfg.Runtime != nil {
		defer s.cfg.Runtime.Close()
		wg.Go(func() { s.containers.run(ctx, maxFetches, s.askRuntime) })
	}
	if s.remembers() {
		wg.Go(func() { s.keep(ctx) })
	}
	<-ctx.Done()
	return nil
}

// Pod is what the witnesses know of the pod together. The name of the node is
// set even if they know nothing.
func (s *Source) Pod(uid string) (attest.Pod, bool) {
	pod := attest.Pod{UID: uid, NodeName: s.cfg.Node}
	said := s.Testimony(uid)
	for _, p := range said {
		fill(&pod.Namespace, p.Namespace)
		fill(&pod.Name, p.Name)
		fill(&pod.ServiceAccount, p.ServiceAccount)
		fill(&pod.Witness, p.Witness)
		if pod.Witness != p.Witness {
			pod.Witness += "," + p.Witness
		}
		pod.Selectors = append(pod.Selectors, p.Selectors...)
	}
	if s.namespaces != nil && pod.Namespace != "" {
		pod.Selectors = append(pod.Selectors, s.namespaces.selectors(pod.Namespace)...)
	}
	return pod, len(said) > 0
}

func fill(dst *string, v string) {
	if *dst == "" {
		*dst = v
	}
}

// Testimony is what each witness says of the pod, the ledger first.
func (s *Source) Testimony(uid string) []attest.Pod {
	var out []attest.Pod
	if s.cfg.Ledger != nil {
		if p, ok := s.cfg.Ledger.Pod(uid); ok {
			out = append(out, p)
		}
	}
	if f := s.store.get(uid); f != nil {
		out = append(out, f.pod)
	}
	return out
}

// Container is what is known of a container of a pod. If nothing is, and
// somebody watches the pod, the runtime or the kubelet is asked where that is
// configured.
func (s *Source) Container(podUID, containerID string) (attest.Container, bool) {
	c, ok, first := s.store.container(podUID, containerID)
	if first {
		if s.cfg.Runtime != nil {
			s.containers.add(containerName{podUID, containerID})
		}
		s.wakeKubelet()
	}
	return c, ok
}

// Watch calls notify after the answer of Pod, Testimony or Container for the
// pod has changed, until stop is called.
func (s *Source) Watch(uid string, notify func()) (stop func()) {
	stopStore := s.store.watch(uid, notify)
	stopLedger := func() {}
	if s.cfg.Ledger != nil {
		stopLedger = s.cfg.Ledger.Watch(uid, notify)
		if p, ok := s.cfg.Ledger.Pod(uid); ok {
			s.lookUp(p)
		}
	}
	// Even if the pod is known: a kubelet tells nobody what has changed since.
	s.wakeKubelet()
	return func() {
		stopLedger()
		stopStore()
	}
}

// Published is to be called when the ledger has learned of a pod: it is told to
// OnPod, and if the watch does not know it yet the API server is asked.
func (s *Source) Published(pod attest.Pod) {
	s.lookUp(pod)
	s.announce(pod.UID)
}

// lookUp has a pod that the ledger knows read by name if the watch is behind.
// Before the first list there is no being behind: it is on its way.
func (s *Source) lookUp(p attest.Pod) {
	if s.cfg.API == nil || !s.pods.status().Synced || s.store.get(p.UID) != nil {
		return
	}
	s.fetches.add(podName{p.Namespace, p.Name, p.UID})
}

func (s *Source) wakeKubelet() {
	if s.cfg.Kubelet == nil {
		return
	}
	select {
	case s.kick <- struct{}{}:
	default:
	}
}

// changed tells OnPod of pods that may call. Who is bound to a pod already is
// told by itself.
func (s *Source) changed(uids []string) {
	s.cfg.Metrics.pods.Set(float64(s.store.len()))
	select {
	case s.dirty <- struct{}{}:
	default:
	}
	for _, uid := range uids {
		if s.store.get(uid) == nil || s.store.bound(uid) {
			continue
		}
		if s.cfg.Ledger != nil {
			if _, ok := s.cfg.Ledger.Pod(uid); !ok {
				continue
			}
		}
		s.announce(uid)
	}
}

func (s *Source) announce(uid string) {
	if s.cfg.OnPod == nil {
		return
	}
	if pod, ok := s.Pod(uid); ok {
		s.cfg.OnPod(pod)
	}
}

func (s *Source) namespacesChanged(names map[string]bool) {
	s.store.tell(slices.DeleteFunc(s.store.uids(), func(uid string) bool {
		pod, ok := s.Pod(uid)
		return !ok || !names[pod.Namespace]
	}))
}

// Status is what a Source knows of itself.
type Status struct {
	// Pods is the number of pods whose facts are held.
	Pods int
	// Links are the ways in use to learn of them.
	Links []LinkStatus
}

// HasAPI says whether pods come from the API server.
func (s *Source) HasAPI() bool { return s.cfg.API != nil }

// Status says how the Source is doing.
func (s *Source) Status() Status {
	out := Status{Pods: s.store.len()}
	for _, l := range []*link{s.pods, s.get, s.kubelet, s.runtime} {
		if l != nil {
			out.Links = append(out.Links, l.status())
		}
	}
	if s.namespaces != nil {
		out.Links = append(out.Links, s.namespaces.link.status())
	}
	return out
}

// Problems are sentences for an operator about what is away; empty if all is
// well.
func (s *Source) Problems() []string {
	var out []string
	for _, l := range s.Status().Links {
		if !l.Connected && l.LastError != "" {
			out = append(out, fmt.Sprintf("%s since %s: %s", trouble[l.Name], l.Since.UTC().Format(time.RFC3339), l.LastError))
		}
	}
	return slices.Clip(out)
}

var trouble = map[string]string{
	"pods":       "the API server's watch of this node's pods is away (labels, owners, images and containers of new pods are missing)",
	"pod":        "pods cannot be read from the API server by name",
	"namespaces": "the API server's watch of namespaces is away (labels of namespaces are those known before)",
	"kubelet":    "the kubelet does not list its pods (labels, owners, images and containers of new pods are missing)",
	"runtime":    "the container runtime does not answer (container selectors come when the pod's status has them)",
}
