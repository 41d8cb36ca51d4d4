package adminapi

import (
	"github.com/prometheus/client_golang/prometheus"
)

// Metrics counts what is done for agents.
type Metrics struct {
	attestations *prometheus.CounterVec
	renewals     prometheus.Counter
	watching     prometheus.Gauge
	pushed       prometheus.Counter
}

// NewMetrics builds the metrics and registers them, unless reg is nil. It
// panics, as MustRegister does, when reg has them already.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const namespace, subsystem = "spiffe_node", "authority"
	m := &Metrics{
		attestations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "attestations_total",
			Help: "Attestations of agents, by type (other = none that is configured) and outcome (ok, invalid, denied, error).",
		}, []string{"type", "outcome"}),
		renewals: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "agent_renewals_total",
			Help: "SVIDs of agents that were renewed without attesting again.",
		}),
		watching: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "watching_agents",
			Help: "Streams that changes are pushed to.",
		}),
		pushed: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: namespace, Subsystem: subsystem, Name: "changes_pushed_total",
			Help: "Changes of entries or bundles pushed to agents.",
		}),
	}
	if reg != nil {
		reg.MustRegister(m.attestations, m.renewals, m.watching, m.pushed)
	}
	return m
}
