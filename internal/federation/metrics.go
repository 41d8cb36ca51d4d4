package federation

import (
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const (
	namespace = "spiffe_node"
	subsystem = "federation"
)

// Metrics counts fetches and says how each relationship is doing.
type Metrics struct {
	fetches *prometheus.CounterVec
	seconds prometheus.Histogram
	poller  atomic.Pointer[Poller]
}

var (
	success = prometheus.NewDesc(prometheus.BuildFQName(namespace, subsystem, "last_success_timestamp_seconds"),
		"When the bundle of a foreign trust domain was last fetched; 0 = not since the start.", []string{"trust_domain"}, nil)
	failures = prometheus.NewDesc(prometheus.BuildFQName(namespace, subsystem, "failures"),
		"Attempts to fetch the bundle of a foreign trust domain that failed since the last success.", []string{"trust_domain"}, nil)
	stale = prometheus.NewDesc(prometheus.BuildFQName(namespace, subsystem, "bundle_stale"),
		"1 = the bundle of a foreign trust domain was not fetched for twice its refresh hint.", []string{"trust_domain"}, nil)
)

// NewMetrics builds the metrics and registers them, unless reg is nil. It
// panics, as MustRegister does, when reg has them already.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		fetches: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "fetches_total",
			Help: "Fetches of foreign bundles, by outcome (stored, unchanged, error).",
		}, []string{"outcome"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "fetch_seconds",
			Help: "Time to fetch and store a foreign bundle.", Buckets: prometheus.ExponentialBuckets(0.005, 3, 9),
		}),
	}
	if reg != nil {
		reg.MustRegister(m.fetches, m.seconds, perRelationship{m})
	}
	return m
}

func (m *Metrics) follow(p *Poller) { m.poller.Store(p) }

func (m *Metrics) fetched(start time.Time, stored bool, err error) {
	outcome := "unchanged"
	switch {
	case err != nil:
		outcome = "error"
	case stored:
		outcome = "stored"
	}
	m.fetches.WithLabelValues(outcome).Inc()
	m.seconds.Observe(time.Since(start).Seconds())
}

// perRelationship reads what is true at the moment, so that the series of a
// deleted relationship end.
type perRelationship struct{ of *Metrics }

// Describe implements prometheus.Collector.
func (perRelationship) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{success, failures, stale} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c perRelationship) Collect(ch chan<- prometheus.Metric) {
	p := c.of.poller.Load()
	if p == nil {
		return
	}
	for _, s := range p.Status() {
		td := s.TrustDomain.Name()
		var at, old float64
		if !s.LastSuccess.IsZero() {
			at = float64(s.LastSuccess.Unix())
		}
		if !s.StaleSince.IsZero() {
			old = 1
		}
		ch <- prometheus.MustNewConstMetric(success, prometheus.GaugeValue, at, td)
		ch <- prometheus.MustNewConstMetric(failures, prometheus.GaugeValue, float64(s.Failures), td)
		ch <- prometheus.MustNewConstMetric(stale, prometheus.GaugeValue, old, td)
	}
}
