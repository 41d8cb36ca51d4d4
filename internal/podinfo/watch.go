package podinfo

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/tools/cache"
	"k8s.io/klog/v2"
	"k8s.io/utils/clock"
)

type watchInterface = watch.Interface

const (
	// maxFetches is how many pods or containers are asked for at a time.
	maxFetches = 4
	// fetchTimeout bounds one of these questions.
	fetchTimeout = 5 * time.Second
	// unconfirmed is how long a pod read by name is believed to exist without a
	// list or a watch that says so; expiryEvery is how often that is looked at.
	unconfirmed = time.Minute
	expiryEvery = 30 * time.Second
)

// reflect follows a list and watch until ctx ends. The reflector of client-go
// is what stands below its informers; without the informer on top there is no
// second copy of every object.
func reflect(ctx context.Context, lw cache.ListerWatcherWithContext, l *link, m *Metrics, expected runtime.Object, into cache.ReflectorStore) {
	quiet := logr.Discard() // link says what there is to say, once
	ctx = klog.NewContext(ctx, quiet)
	r := cache.NewReflectorWithOptions(&linked{lw, l, m}, expected, into, cache.ReflectorOptions{
		Logger: &quiet,
		Name:   l.name,
		Clock:  endingClock{ctx: ctx},
		// A node must not wait for half a minute once the server is back; a
		// thousand nodes must not all come at the same moment.
		Backoff: &wait.Backoff{Duration: 500 * time.Millisecond, Cap: 8 * time.Second, Steps: 5, Factor: 2, Jitter: 1},
	})
	r.RunWithContext(ctx)
}

// linked tells a link how lists and watches fare.
type linked struct {
	cache.ListerWatcherWithContext
	link    *link
	metrics *Metrics
}

// ListWithContext lists.
func (w *linked) ListWithContext(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
	w.metrics.requests.WithLabelValues(w.link.name).Inc()
	out, err := w.ListerWatcherWithContext.ListWithContext(ctx, o)
	w.heard(ctx, err)
	return out, err
}

// WatchWithContext watches.
func (w *linked) WatchWithContext(ctx context.Context, o metav1.ListOptions) (watch.Interface, error) {
	w.metrics.requests.WithLabelValues(w.link.name).Inc()
	out, err := w.ListerWatcherWithContext.WatchWithContext(ctx, o)
	w.heard(ctx, err)
	return out, err
}

// List is ListWithContext for callers that have no context; the reflector is not
// one of them.
func (w *linked) List(o metav1.ListOptions) (runtime.Object, error) {
	return w.ListWithContext(context.Background(), o)
}

// Watch is WatchWithContext for callers that have no context.
func (w *linked) Watch(o metav1.ListOptions) (watch.Interface, error) {
	return w.WatchWithContext(context.Background(), o)
}

// endingClock is the real clock, but nobody waits on it past the end of ctx: the
// reflector backs off without looking at its context.
type endingClock struct {
	clock.RealClock
	ctx context.Context
}

// After fires after d or when the context ends.
func (c endingClock) After(d time.Duration) <-chan time.Time {
	ch := make(chan time.Time, 1)
	timer := time.NewTimer(d)
	go func() {
		defer timer.Stop()
		select {
		case now := <-timer.C:
			ch <- now
		case <-c.ctx.Done():
			close(ch)
		}
	}()
	return ch
}

// IsWatchListSemanticsUnSupported says whether lists can be had as a watch, the
// way that does not need them in memory at once.
func (w *linked) IsWatchListSemanticsUnSupported() bool {
	u, ok := w.ListerWatcherWithContext.(interface{ IsWatchListSemanticsUnSupported() bool })
	return ok && u.IsWatchListSemanticsUnSupported()
}

func (w *linked) heard(ctx context.Context, err error) {
	switch {
	case err == nil:
		w.link.up()
	case ctx.Err() != nil,
		apierrors.IsInvalid(err),         // a server without streaming lists; a list follows
		apierrors.IsResourceExpired(err), // a new list follows
		apierrors.HasStatusCause(err, metav1.CauseTypeResourceVersionTooLarge): // likewise
	default:
		w.link.down(err)
	}
}

func (s *Source) runWatch(ctx context.Context) {
	reflect(ctx, s.cfg.API.Pods(s.cfg.Node), s.pods, s.cfg.Metrics, &corev1.Pod{}, &podStore{s: s, started: time.Now()})
}

// podStore is the reflector's view of the store.
type podStore struct {
	s       *Source
	started time.Time
}

var _ cache.TransformingStore = (*podStore)(nil)

// Transformer strips pods while a list is still incomplete.
func (p *podStore) Transformer() cache.TransformFunc {
	return func(obj any) (any, error) {
		if pod, ok := obj.(*corev1.Pod); ok && pod != nil {
			return strip(pod), nil
		}
		return obj, nil
	}
}

// Add takes over a pod.
func (p *podStore) Add(obj any) error {
	if pod, ok := obj.(*corev1.Pod); ok && pod != nil {
		p.s.store.put(string(pod.UID), p.facts(pod), time.Time{})
	}
	return nil
}

// Update takes over a pod's new state.
func (p *podStore) Update(obj any) error { return p.Add(obj) }

// Delete lets a pod go.
func (p *podStore) Delete(obj any) error {
	if gone, ok := obj.(cache.DeletedFinalStateUnknown); ok {
		obj = gone.Obj
	}
	if pod, ok := obj.(*corev1.Pod); ok && pod != nil {
		p.s.store.remove(string(pod.UID))
	}
	return nil
}

// Replace takes over a complete list.
func (p *podStore) Replace(list []any, _ string) error {
	facts := make([]*facts, 0, len(list))
	for _, obj := range list {
		if pod, ok := obj.(*corev1.Pod); ok && pod != nil {
			if f := p.facts(pod); f != nil {
				facts = append(facts, f)
			}
		}
	}
	// A list can be as old as the server's cache; what was read by name within
	// the last minute is newer than any.
	p.s.store.replace(facts, time.Now().Add(-unconfirmed))
	p.s.pods.synced()
	return nil
}

// Resync has nothing to do.
func (*podStore) Resync() error { return nil }

func (p *podStore) facts(pod *corev1.Pod) *facts {
	return p.s.newFacts(pod, witnessWatch)
}

func (s *Source) newFacts(pod *corev1.Pod, witness string) *facts {
	f := newFacts(pod, s.cfg.Node, witness)
	if f != nil && f.cut {
		s.log.Debug("a pod has more text in labels and images than is kept; some of its selectors are missing",
			slog.String("pod_uid", f.uid), slog.String("namespace", f.pod.Namespace), slog.String("pod", f.pod.Name))
	}
	return f
}

// fetch reads a pod by name. Its UID decides whether it is the one meant.
func (s *Source) fetch(ctx context.Context, n podName) {
	if s.store.get(n.uid) != nil {
		return // the watch has caught up
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	s.cfg.Metrics.requests.WithLabelValues("pod").Inc()
	started := time.Now()
	pod, err := s.cfg.API.Pod(ctx, n.namespace, n.name)
	switch {
	case err == nil:
		s.get.up()
	case apierrors.IsNotFound(err), errors.Is(err, context.Canceled):
		return
	default:
		s.get.down(fmt.Errorf("pod %s/%s: %w", n.namespace, n.name, err))
		return
	}
	if string(pod.UID) != n.uid {
		return // its successor of the same name; the watch will tell
	}
	if f := s.newFacts(pod, witnessWatch); f != nil {
		s.store.put(f.key, f, started)
	}
}

func (s *Source) runExpiry(ctx context.Context) {
	t := time.NewTicker(expiryEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-t.C:
			// Away from the server nothing is confirmed and nothing let go.
			if st := s.pods.status(); st.Connected && now.Sub(st.Since) > unconfirmed {
				s.store.expire(now.Add(-unconfirmed))
			}
		}
	}
}
