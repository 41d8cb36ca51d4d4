package peersock

import "github.com/prometheus/client_golang/prometheus"

// The reasons for which a connection is closed before or after it was
// accepted; values of the label "reason".
const (
	reasonGlobal     = "limit_global"
	reasonUID        = "limit_uid"
	reasonKey        = "limit_key"
	reasonUnknown    = "not_identified"
	reasonNamespace  = "other_pid_namespace"
	reasonDead       = "caller_dead"
	reasonBindDenied = "denied"
	reasonBindError  = "error"
	reasonBindLate   = "timeout"
)

// Metrics are the counters of one or more listeners.
type Metrics struct {
	accepted prometheus.Counter
	refused  *prometheus.CounterVec
	open     prometheus.Gauge
	died     prometheus.Counter
	binds    *prometheus.CounterVec
	bindTime prometheus.Histogram
	mode     *prometheus.GaugeVec
}

// NewMetrics makes the metrics and registers them; a nil reg leaves them
// unregistered.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const ns, sub = "spiffe_node", "peer"
	m := &Metrics{
		accepted: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "connections_total",
			Help: "Connections that were identified and handed on.",
		}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "refused_total",
			Help: "Connections closed before a byte was read, by reason.",
		}, []string{"reason"}),
		open: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: ns, Subsystem: sub, Name: "connections",
			Help: "Open connections, including those being bound.",
		}),
		died: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "caller_exits_total",
			Help: "Connections closed because the process that made them ended.",
		}),
		binds: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "bind_failures_total",
			Help: "Callers that could not be bound, by reason: denied, error, timeout.",
		}, []string{"reason"}),
		bindTime: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: ns, Subsystem: sub, Name: "bind_seconds",
			Help:    "From accept to a bound caller.",
			Buckets: []float64{0.00005, 0.0001, 0.0005, 0.001, 0.005, 0.02, 0.1, 0.5, 2, 5},
		}),
		mode: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: ns, Subsystem: sub, Name: "identification_info",
			Help: "1 for the way in which peers are identified: pidfd, or the weaker fallback of old kernels.",
		}, []string{"mode"}),
	}
	if reg != nil {
		reg.MustRegister(m.accepted, m.refused, m.open, m.died, m.binds, m.bindTime, m.mode)
	}
	return m
}
