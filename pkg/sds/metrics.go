package sds

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the package's series, under spiffe_node_sds_.
type Metrics struct {
	streams   *prometheus.GaugeVec     // kind
	parked    prometheus.Gauge         // streams with late names
	responses *prometheus.CounterVec   // kind, cause
	verdicts  *prometheus.CounterVec   // kind, verdict
	ends      *prometheus.CounterVec   // kind, reason
	fetches   *prometheus.CounterVec   // outcome
	unknown   prometheus.Counter       // unknown names seen
	encoded   prometheus.Counter       // secrets encoded
	panics    prometheus.Counter       //
	first     *prometheus.HistogramVec // secret: seconds from stream open to the first of its kind
}

// Reasons in logs, status and metrics. Late, denied, over limit and unknown
// name are different words everywhere.
const (
	reasonClient     = "client"      // the client left
	reasonDenied     = "denied"      // refused for good
	reasonOverLimit  = "over_limit"  // too many callers or names
	reasonWithdrawn  = "withdrawn"   // identity taken away on purpose
	reasonBadRequest = "bad_request" // malformed
	reasonPassing    = "unavailable" // a passing fault of ours
	reasonPanic      = "panic"
	reasonLate       = "late"
	reasonUnknown    = "unknown_name"
	reasonServed     = "served"
)

// NewMetrics builds the series and registers them; a nil registerer leaves
// them unregistered.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const ns, sub = "spiffe_node", "sds"
	vec := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help}, labels)
	}
	one := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help})
	}
	m := &Metrics{
		streams: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: ns, Subsystem: sub, Name: "streams", Help: "Open streams by kind.",
		}, []string{"kind"}),
		parked: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: ns, Subsystem: sub, Name: "parked_streams", Help: "Open streams that wait for a secret that is late.",
		}),
		responses: vec("responses_total", "Responses sent by kind and cause.", "kind", "cause"),
		verdicts:  vec("verdicts_total", "What clients said about responses: ack, nack, or stale (about an older one).", "kind", "verdict"),
		ends:      vec("stream_ends_total", "Ended streams by kind and reason.", "kind", "reason"),
		fetches:   vec("fetches_total", "FetchSecrets calls by outcome.", "outcome"),
		unknown:   one("unknown_names_total", "Requested names that are no secret of this agent."),
		encoded:   one("secrets_encoded_total", "Secrets encoded; equal secrets are encoded once for all streams."),
		panics:    one("panics_total", "Calls that panicked and were contained."),
		first: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: ns, Subsystem: sub, Name: "first_secret_seconds",
			Help:    "Time from the opening of a stream to the first secret of a kind on it, waiting included.",
			Buckets: []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .5, 1, 5, 30},
		}, []string{"secret"}),
	}
	if reg != nil {
		reg.MustRegister(m.streams, m.parked, m.responses, m.verdicts, m.ends, m.fetches, m.unknown, m.encoded, m.panics, m.first)
	}
	return m
}

func (m *Metrics) observeFirst(secret string, since time.Time) {
	m.first.WithLabelValues(secret).Observe(max(0, time.Since(since).Seconds()))
}
