package spireserver

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/status"
)

// Metrics counts what a Client does.
type Metrics struct {
	calls    *prometheus.HistogramVec
	batch    prometheus.Histogram
	synced   prometheus.Gauge
	entries  prometheus.Gauge
	missing  prometheus.Gauge
	expiry   prometheus.Gauge
	attested *prometheus.CounterVec
}

// NewMetrics builds the metrics and registers them, unless reg is nil. It
// panics, as MustRegister does, when reg has them already.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const namespace, subsystem = "spiffe_node", "server"
	opts := func(name, help string) prometheus.Opts {
		return prometheus.Opts{Namespace: namespace, Subsystem: subsystem, Name: name, Help: help}
	}
	m := &Metrics{
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "call_seconds",
			Help:    "Time of calls to the SPIRE Server API, by method and gRPC code.",
			Buckets: prometheus.ExponentialBuckets(0.001, 3, 10),
		}, []string{"method", "code"}),
		batch: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "sign_batch_size",
			Help:    "X.509-SVIDs asked for in one call.",
			Buckets: prometheus.ExponentialBuckets(1, 2, 10),
		}),
		synced:  prometheus.NewGauge(prometheus.GaugeOpts(opts("last_sync_timestamp_seconds", "When entries and bundles were last known to be complete."))),
		entries: prometheus.NewGauge(prometheus.GaugeOpts(opts("authorized_entries", "Entries this agent is authorized for."))),
		missing: prometheus.NewGauge(prometheus.GaugeOpts(opts("missing_entries", "Entries the server has stopped listing and whose withdrawal is not confirmed yet."))),
		expiry:  prometheus.NewGauge(prometheus.GaugeOpts(opts("agent_svid_expiry_timestamp_seconds", "When the agent's own SVID expires."))),
		attested: prometheus.NewCounterVec(prometheus.CounterOpts(opts("agent_svids_total",
			"The agent's own SVIDs, by how they were asked for (attest, renew) and outcome (ok, error).")), []string{"how", "outcome"}),
	}
	if reg != nil {
		reg.MustRegister(m.calls, m.batch, m.synced, m.entries, m.missing, m.expiry, m.attested)
	}
	return m
}

func (m *Metrics) called(method string, start time.Time, err error) {
	m.calls.WithLabelValues(method, status.Code(err).String()).Observe(time.Since(start).Seconds())
}

func (m *Metrics) identity(how string, err error) {
	outcome := "ok"
	if err != nil {
		outcome = "error"
	}
	m.attested.WithLabelValues(how, outcome).Inc()
}
