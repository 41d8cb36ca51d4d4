package podinfo

import (
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// LinkStatus is the state of one way to learn of pods.
type LinkStatus struct {
	// Name is "pods", "namespaces" (watches of the API server), "pod" (reading
	// one by name), "kubelet" or "runtime".
	Name string
	// Synced: a complete answer has been seen since the start.
	Synced bool
	// Connected: the last attempt succeeded. Since is when that last changed.
	Connected bool
	Since     time.Time
	// LastError is why the last attempt that failed did so; it stays after it has
	// been overcome. Empty: none ever did.
	LastError string
}

// link follows one way to learn of pods and says when it breaks and heals.
type link struct {
	name    string
	metrics *Metrics
	log     *slog.Logger
	gauge   prometheus.Gauge
	errors  prometheus.Counter

	mu    sync.Mutex
	tried bool
	stat  LinkStatus
}

func newLink(name string, log *slog.Logger, m *Metrics) *link {
	return &link{
		name:    name,
		metrics: m,
		log:     log.With(slog.String("link", name)),
		gauge:   m.connected.WithLabelValues(name),
		errors:  m.errors.WithLabelValues(name),
		stat:    LinkStatus{Name: name, Since: time.Now()},
	}
}

func (l *link) status() LinkStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.stat
}

func (l *link) synced() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stat.Synced = true
	l.setLocked(true)
}

func (l *link) up() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.setLocked(true)
}

func (l *link) down(err error) {
	l.errors.Inc()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stat.LastError = err.Error()
	if l.stat.Connected || !l.tried {
		l.log.Warn("pod facts cannot be had; what is known stays in use, the attempt is repeated", slog.Any("error", err))
	}
	l.setLocked(false)
}

func (l *link) setLocked(connected bool) {
	if l.stat.Connected != connected || !l.tried {
		l.stat.Since = time.Now()
		if connected {
			l.log.Info("pod facts can be had")
			l.gauge.Set(1)
		} else {
			l.gauge.Set(0)
		}
	}
	l.tried, l.stat.Connected = true, connected
}
