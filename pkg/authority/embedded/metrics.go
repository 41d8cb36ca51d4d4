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

	lagging, behind   *prometheus.GaugeVec
	delayed, nextStep *prometheus.GaugeVec
	passed            *prometheus.CounterVec
	outdated          prometheus.Gauge
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
	gauges := func(name, help string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts(opts(name, help)), []string{"kind"})
	}
	m.lagging = gauges("rotation_lagging_agents", "Live agents that have not acknowledged the prepared authority (the active one without it), by kind (x509, jwt).")
	m.behind = gauges("rotation_lagging_consumers", "Streams of workloads that have not acknowledged it, by kind (x509, jwt).")
	m.delayed = gauges("rotation_delayed", "1 while an activation is due and waits for acknowledgements, by kind (x509, jwt).")
	m.nextStep = gauges("rotation_next_step_timestamp_seconds", "When the next step of rotation is due, by kind (x509, jwt).")
	m.passed = prometheus.NewCounterVec(prometheus.CounterOpts(opts("rotation_laggards_passed_total",
		"Agents that lagged when an authority was activated nevertheless, by kind (x509, jwt) and cause (deadline, forced).")), []string{"kind", "cause"})
	m.outdated = prometheus.NewGauge(prometheus.GaugeOpts(opts("outdated_svids", "X.509-SVIDs in use at agents that hang on a tainted or revoked authority.")))
	if reg != nil {
		reg.MustRegister(m.signed, m.writes, m.entries, m.expiry, m.rotations, m.version, m.upstreamCalls, m.upstreamFailing,
			m.lagging, m.behind, m.delayed, m.nextStep, m.passed, m.outdated)
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
