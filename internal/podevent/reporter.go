package podevent

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
)

// Reasons of events, as kubectl describe shows them.
const (
	// ReasonLate: a process of the pod has waited long for its identity.
	ReasonLate = "SpiffeIdentityLate"
	// ReasonConflict: several entries could be the default identity, and only
	// their age decided.
	ReasonConflict = "SpiffeIdentityAmbiguous"
)

const (
	// again is how long the same is not said again of a pod.
	again = 10 * time.Minute
	// maxQueue bounds what waits to be written, maxKnown what was.
	maxQueue = 64
	maxKnown = 4096
	// perSecond and burst are the node's rate.
	perSecond = 1
	burst     = 20
	// maxNote is the longest text the API server takes of an event, in bytes.
	maxNote = 1024
	// callTimeout bounds one write.
	callTimeout = 5 * time.Second
)

// Pod is whom an event is about.
type Pod struct{ Namespace, Name, UID string }

// Event is what is said of a pod.
type Event struct {
	Pod
	Reason, Note string
}

// Writer writes an event.
type Writer interface {
	Write(ctx context.Context, e Event, at time.Time) error
}

// Reporter writes events. Report may be called from any goroutine; Run once.
type Reporter struct {
	writer Writer
	log    *slog.Logger
	queue  chan job
	limit  *rate.Limiter
	lost   prometheus.Counter

	mu   sync.Mutex
	said map[about]time.Time
}

// about is what an event is about.
type about struct{ uid, reason string }

// job is an event whose text is still to be found.
type job struct {
	event Event
	note  func() string
}

// New needs a writer; log and reg may be nil.
func New(w Writer, log *slog.Logger, reg prometheus.Registerer) (*Reporter, error) {
	if w == nil {
		return nil, errors.New("pod events: the writer is missing")
	}
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	r := &Reporter{
		writer: w, log: log, queue: make(chan job, maxQueue), limit: rate.NewLimiter(perSecond, burst), said: map[about]time.Time{},
		lost: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: "spiffe_node", Subsystem: "pod_events", Name: "dropped_total",
			Help: "Events on pods that were not written: too many at once, or the API server did not take them.",
		}),
	}
	if reg != nil {
		if err := reg.Register(r.lost); err != nil {
			return nil, err
		}
	}
	return r, nil
}

// Report has an event written, unless there was one for that reason lately or
// there are too many. note finds the text when it is written, in the goroutine
// of Run; with an empty one there is nothing to say. An event without a pod is
// nobody's.
func (r *Reporter) Report(pod Pod, reason string, note func() string) {
	if pod.Namespace == "" || pod.Name == "" || pod.UID == "" {
		return
	}
	now, key := time.Now(), about{pod.UID, reason}
	r.mu.Lock()
	defer r.mu.Unlock()
	if at, ok := r.said[key]; ok && now.Sub(at) < again {
		return
	}
	select {
	case r.queue <- job{Event{Pod: pod, Reason: reason}, note}:
	default:
		r.lost.Inc()
		return
	}
	if len(r.said) >= maxKnown {
		for old, at := range r.said {
			if now.Sub(at) >= again {
				delete(r.said, old)
			}
		}
		if len(r.said) >= maxKnown {
			clear(r.said)
		}
	}
	r.said[key] = now
}

// Run writes until ctx ends. It never fails.
func (r *Reporter) Run(ctx context.Context) error {
	failing := false
	for {
		if r.limit.Wait(ctx) != nil {
			return nil //nolint:nilerr // ctx has ended
		}
		var j job
		select {
		case <-ctx.Done():
			return nil
		case j = <-r.queue:
		}
		e := j.event
		if e.Note = j.note(); e.Note == "" {
			continue
		}
		if len(e.Note) > maxNote {
			e.Note = strings.ToValidUTF8(e.Note[:maxNote-3], "") + "..."
		}
		err := r.write(ctx, e)
		switch {
		case ctx.Err() != nil:
			return nil //nolint:nilerr // ctx has ended
		case err == nil:
			failing = false
			continue
		case !failing:
			r.log.Warn("no event could be written on a pod; only those who watch have less to read",
				slog.String("pod", e.Namespace+"/"+e.Name), slog.String("reason", e.Reason), slog.Any("error", err))
		}
		failing = true
		r.lost.Inc()
	}
}

func (r *Reporter) write(ctx context.Context, e Event) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	return r.writer.Write(ctx, e, time.Now())
}
