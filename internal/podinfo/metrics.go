package podinfo

import "github.com/prometheus/client_golang/prometheus"

// Metrics count what a Source does.
type Metrics struct {
	pods      prometheus.Gauge
	connected *prometheus.GaugeVec
	errors    *prometheus.CounterVec
	requests  *prometheus.CounterVec
}

// NewMetrics registers the metrics with reg; a nil reg leaves them
// unregistered.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const ns, sub = "spiffe_node", "podinfo"
	m := &Metrics{
		pods: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: ns, Subsystem: sub, Name: "pods", Help: "Pods of this node whose facts are held.",
		}),
		connected: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Namespace: ns, Subsystem: sub, Name: "connected", Help: "1 if the last attempt to learn of pods this way succeeded.",
		}, []string{"link"}),
		errors: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "errors_total", Help: "Attempts to learn of pods that failed.",
		}, []string{"link"}),
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "requests_total", Help: "Requests made to learn of pods.",
		}, []string{"link"}),
	}
	if reg != nil {
		reg.MustRegister(m.pods, m.connected, m.errors, m.requests)
	}
	return m
}
