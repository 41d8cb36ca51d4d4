package registration

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts what a Registrar does.
type Metrics struct {
	changes   *prometheus.CounterVec
	flushes   *prometheus.HistogramVec
	delay     prometheus.Histogram
	events    *prometheus.CounterVec
	resources *prometheus.GaugeVec
	pods      prometheus.Gauge
	foreign   prometheus.Gauge
	retrying  prometheus.Gauge
	statuses  *prometheus.CounterVec
	synced    prometheus.Gauge
}

// NewMetrics builds the metrics and registers them, unless reg is nil. It
// panics, as MustRegister does, when reg has them already.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const namespace, subsystem = "spiffe_node", "registration"
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help}
	}
	m := &Metrics{
		changes: prometheus.NewCounterVec(prometheus.CounterOpts(opts("entry_changes_total",
			"Changes of registration entries that were tried, by kind (create, update, delete).")), []string{"kind"}),
		flushes: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "write_seconds",
			Help:    "Time to find and write the entries of one batch of events, by outcome (ok, error).",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2.5, 12),
		}, []string{"outcome"}),
		delay: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "event_seconds",
			Help:    "Time from the arrival of an event to the end of the write it led to.",
			Buckets: prometheus.ExponentialBuckets(0.0005, 2.5, 12),
		}),
		events: prometheus.NewCounterVec(prometheus.CounterOpts(opts("events_total",
			"Events from the API server, by resource.")), []string{"resource"}),
		resources: prometheus.NewGaugeVec(prometheus.GaugeOpts(opts("resources",
			"Custom resources, by kind and state (valid, refused, other_class).")), []string{"kind", "state"}),
		pods:     prometheus.NewGauge(prometheus.GaugeOpts(opts("pods", "Unfinished pods known."))),
		foreign:  prometheus.NewGauge(prometheus.GaugeOpts(opts("foreign_pods", "Pods that have entries written by somebody else as well."))),
		retrying: prometheus.NewGauge(prometheus.GaugeOpts(opts("entries_retrying", "Entries that could not be written and are tried again."))),
		statuses: prometheus.NewCounterVec(prometheus.CounterOpts(opts("status_writes_total",
			"Writes of a resource's status, by outcome (ok, error).")), []string{"outcome"}),
		synced: prometheus.NewGauge(prometheus.GaugeOpts(opts("synced", "1 once everything has been seen and written once."))),
	}
	if reg != nil {
		reg.MustRegister(m.changes, m.flushes, m.delay, m.events, m.resources, m.pods, m.foreign, m.retrying, m.statuses, m.synced)
	}
	return m
}

func outcome(err error) string {
	if err != nil {
		return "error"
	}
	return "ok"
}

func (m *Metrics) flush(took time.Duration, created, updated, removed int, err error) {
	m.flushes.WithLabelValues(outcome(err)).Observe(took.Seconds())
	m.changes.WithLabelValues("create").Add(float64(created))
	m.changes.WithLabelValues("update").Add(float64(updated))
	m.changes.WithLabelValues("delete").Add(float64(removed))
}

// gauges shows the engine's state.
func (x *engine) gauges() {
	x.Metrics.pods.Set(float64(len(x.pods)))
	x.Metrics.foreign.Set(float64(x.foreignPods))
	x.Metrics.retrying.Set(float64(len(x.retry)))
}
