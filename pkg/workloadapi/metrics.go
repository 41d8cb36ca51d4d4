package workloadapi

import "github.com/prometheus/client_golang/prometheus"

// Metrics are the package's series, under spiffe_node_workload_api_.
type Metrics struct {
	streams *prometheus.GaugeVec     // method
	parked  prometheus.Gauge         // callers held
	calls   *prometheus.CounterVec   // method, outcome
	sent    *prometheus.CounterVec   // method
	first   *prometheus.HistogramVec // method
	jwt     *prometheus.CounterVec   // outcome
	panics  prometheus.Counter
}

// Outcomes in logs, status and metrics. Late, denied, over limit are different
// words everywhere.
const (
	outcomeServed      = "served"
	outcomeClient      = "client"       // the client left
	outcomeLate        = "late"         // held, and still nothing
	outcomeDenied      = "denied"       // refused for good
	outcomeOverLimit   = "over_limit"   // too many callers wait
	outcomeWithdrawn   = "withdrawn"    // last identity taken away on purpose
	outcomeBadRequest  = "bad_request"  // malformed
	outcomeNoHeader    = "no_header"    // security header missing
	outcomeUnavailable = "unavailable"  // a passing fault of ours
	outcomeInvalid     = "invalid_svid" // a token that does not validate
)

// NewMetrics builds the series and registers them; a nil registerer leaves
// them unregistered.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const ns, sub = "spiffe_node", "workload_api"
	m := &Metrics{
		streams: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: ns, Subsystem: sub, Name: "streams", Help: "Open streams by method.",
		}, []string{"method"}),
		parked: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: ns, Subsystem: sub, Name: "parked_calls", Help: "Calls held for something that is late.",
		}),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "calls_total", Help: "Ended calls by method and outcome.",
		}, []string{"method", "outcome"}),
		sent: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "responses_total", Help: "Responses sent on streams by method.",
		}, []string{"method"}),
		first: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: ns, Subsystem: sub, Name: "first_response_seconds",
			Help:    "Time from the start of a call to its first response, waiting included.",
			Buckets: []float64{.0005, .001, .002, .005, .01, .02, .05, .1, .5, 1, 5},
		}, []string{"method"}),
		jwt: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "jwt_svids_total", Help: "JWT-SVIDs asked of the layers below by outcome.",
		}, []string{"outcome"}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "panics_total", Help: "Calls that panicked and were contained.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m.streams, m.parked, m.calls, m.sent, m.first, m.jwt, m.panics)
	}
	return m
}
