package csi

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Metrics are the driver's series, all of namespace spiffe_node, subsystem csi.
type Metrics struct {
	calls      *prometheus.CounterVec
	seconds    *prometheus.HistogramVec
	volumes    prometheus.Gauge
	reconciled *prometheus.CounterVec
	registered prometheus.Gauge
}

// NewMetrics builds the series and registers them; a nil registerer leaves them
// unregistered.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const ns, sub = "spiffe_node", "csi"
	m := &Metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "calls_total",
			Help: "CSI and registration calls answered, by method and gRPC code.",
		}, []string{"method", "code"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Namespace: ns, Subsystem: sub, Name: "call_seconds",
			Help:    "Time to answer a CSI call.",
			Buckets: []float64{.0001, .0002, .0003, .0005, .001, .0025, .01, .1, 1, 10},
		}, []string{"method"}),
		volumes: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: ns, Subsystem: sub, Name: "volumes",
			Help: "Published volumes in the ledger.",
		}),
		reconciled: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "reconciled_total",
			Help: "Volumes looked at by the reconciliation at start, by what was done.",
		}, []string{"result"}),
		registered: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: ns, Subsystem: sub, Name: "registered",
			Help: "1 while the kubelet has the driver registered, as far as it said.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m.calls, m.seconds, m.volumes, m.reconciled, m.registered)
	}
	return m
}
