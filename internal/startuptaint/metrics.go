package startuptaint

import "github.com/prometheus/client_golang/prometheus"

// Metrics count what a Remover does.
type Metrics struct {
	tainted prometheus.Gauge
	removed prometheus.Counter
}

// NewMetrics registers them; nil: nowhere.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{
		tainted: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: "spiffe_node", Subsystem: "startup_taint", Name: "nodes",
			Help: "Nodes that have the start-up taint.",
		}),
		removed: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: "spiffe_node", Subsystem: "startup_taint", Name: "removed_total",
			Help: "Start-up taints removed.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m.tainted, m.removed)
	}
	return m
}
