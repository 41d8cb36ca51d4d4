package svid

import (
	"errors"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

// Metrics are one Manager's numbers.
type Metrics struct {
	firstSVID   prometheus.Histogram
	signed      *prometheus.CounterVec
	jwt         *prometheus.CounterVec
	parked      prometheus.Gauge
	late        prometheus.Counter
	overLimit   prometheus.Counter
	expired     prometheus.Counter
	lastGood    prometheus.Gauge
	firstExpiry atomic.Pointer[func() float64]
}

// NewMetrics makes the metrics of one Manager and registers them with reg; a
// nil reg leaves them unregistered.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const namespace, subsystem = "spiffe_node", "svid"
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help})
	}
	gauge := func(name, help string) prometheus.GaugeOpts {
		return prometheus.GaugeOpts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help}
	}
	m := &Metrics{
		firstSVID: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "first_seconds",
			Help:    "Time from a caller's arrival until its first X.509-SVID was there.",
			Buckets: []float64{.0001, .0005, .001, .002, .005, .01, .02, .05, .1, .5, 1, 5, 30, 300},
		}),
		signed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "x509_requests_total",
			Help: "Requests for X.509-SVIDs to the authority, by kind (first, renewal) and outcome (ok, refused, failed).",
		}, []string{"kind", "outcome"}),
		jwt: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "jwt_total",
			Help: "JWT-SVIDs asked for by callers, by outcome (cached, signed, stale, denied, refused, failed).",
		}, []string{"outcome"}),
		parked:    prometheus.NewGauge(gauge("parked_callers", "Callers that wait for something late.")),
		late:      counter("late_callers_total", "Callers that waited long enough to be reported."),
		overLimit: counter("park_over_limit_total", "Callers not parked because too many of their pod were."),
		expired:   counter("expired_total", "X.509-SVIDs erased because they expired before they could be renewed."),
		lastGood:  prometheus.NewGauge(gauge("last_signed_timestamp_seconds", "Unix time of the authority's last signed X.509-SVID; 0 = none yet.")),
	}
	for _, kind := range []string{"first", "renewal"} {
		for _, outcome := range []string{"ok", "refused", "failed"} {
			m.signed.WithLabelValues(kind, outcome)
		}
	}
	if reg != nil {
		reg.MustRegister(m.firstSVID, m.signed, m.jwt, m.parked, m.late, m.overLimit, m.expired, m.lastGood,
			prometheus.NewGaugeFunc(gauge("first_expiry_seconds", "Seconds until the first X.509-SVID in use expires; 0 = there is none."), func() float64 {
				if f := m.firstExpiry.Load(); f != nil {
					return (*f)()
				}
				return 0
			}))
	}
	return m
}

// watch names the source of what is computed at each scrape.
func (m *Metrics) watch(firstExpiry func() float64) { m.firstExpiry.Store(&firstExpiry) }

func (m *Metrics) count(kind string, err error) {
	m.signed.WithLabelValues(kind, outcomeOf(err)).Inc()
}

func outcomeOf(err error) string {
	switch {
	case err == nil:
		return "ok"
	case errors.Is(err, authority.ErrRefused):
		return "refused"
	}
	return "failed"
}

// firstExpiry is the seconds until the first SVID in use expires, 0 without
// any.
func (m *Manager) firstExpiry() float64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	if at := m.firstExpiryLocked(); !at.IsZero() {
		return at.Sub(m.now()).Seconds()
	}
	return 0
}
