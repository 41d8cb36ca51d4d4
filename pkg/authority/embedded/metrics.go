package embedded

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts what an Authority does.
type Metrics struct {
	signed    *prometheus.CounterVec
	writes    *prometheus.HistogramVec
	entries   prometheus.Gauge
	expiry    *prometheus.GaugeVec
	rotations *prometheus.CounterVec
	version   prometheus.Gauge

	upstreamCalls   *prometheus.CounterVec
	upstreamFailing prometheus.Gauge
}

// NewMetrics builds the metrics and registers them, unless reg is nil. It
// panics, as MustRegister does, when reg has them already.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const namespace, subsystem = "spiffe_node", "authority"
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help}
	}
	m := &Metrics{
		signed: prometheus.NewCounterVec(prometheus.CounterOpts(opts("svids_signed_total",
			"SVIDs asked for, by kind (x509, jwt) and outcome (ok, refused, not_ready, error).")), []string{"kind", "outcome"}),
		writes: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "state_write_seconds",
			Help:    "Time to make a change of the state durable, by outcome (ok, error).",
			Buckets: prometheus.ExponentialBuckets(0.0001, 2.5, 11),
		}, []string{"outcome"}),
		entries: prometheus.NewGauge(prometheus.GaugeOpts(opts("entries", "Registration entries."))),
		expiry: prometheus.NewGaugeVec(prometheus.GaugeOpts(opts("ca_expiry_timestamp_seconds",
			"When the active signing key expires, by kind (x509, jwt).")), []string{"kind"}),
		rotations: prometheus.NewCounterVec(prometheus.CounterOpts(opts("ca_rotations_total",
			"Steps of key rotation, by kind (x509, jwt), step (prepare, activate, replace, taint, revoke) and outcome (ok, error).")), []string{"kind", "step", "outcome"}),
		upstreamCalls: prometheus.NewCounterVec(prometheus.CounterOpts(opts("upstream_calls_total",
			"Calls to the upstream authority, by call (sign, bundle, publish) and outcome (ok, error).")), []string{"call", "outcome"}),
		upstreamFailing: prometheus.NewGauge(prometheus.GaugeOpts(opts("upstream_failing",
			"1 while the upstream authority does not answer as it should, else 0."))),
		version: prometheus.NewGauge(prometheus.GaugeOpts(opts("bundle_sequence", "Sequence number of the own trust bundle."))),
	}
	if reg != nil {
		reg.MustRegister(m.signed, m.writes, m.entries, m.expiry, m.rotations, m.version, m.upstreamCalls, m.upstreamFailing)
	}
	return m
}

func (m *Metrics) wrote(start time.Time, err error) {
	m.writes.WithLabelValues(outcome(err)).Observe(time.Since(start).Seconds())
}

func outcome(err error) string {
	if err != nil {
		return "error"
	}
	return "ok"
}
