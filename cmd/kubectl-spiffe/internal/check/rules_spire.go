package check

import (
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/spire"
)

// beside judges what of SPIRE runs beside spiffe-node: on one node there must be
// one agent and one driver, and in a cluster one registrar.
func (w *world) beside() {
	ours := map[string]bool{} // nodes with an sds-agent
	old := map[string]map[spire.Part]*Object{}
	for i := range w.carriers {
		c := &w.carriers[i]
		if !c.isPod || c.spec.NodeName == "" || c.status.Phase != corev1.PodRunning {
			continue
		}
		if c.meta.Labels[spire.OwnLabel] == spire.OwnName && slices.ContainsFunc(c.spec.Containers, func(x corev1.Container) bool { return x.Name == "sds-agent" }) {
			ours[c.spec.NodeName] = true
		}
		for _, part := range []spire.Part{spire.Agent, spire.CSIDriver} {
			if spire.Container(c.meta.Labels, &c.spec, part) != nil {
				if old[c.spec.NodeName] == nil {
					old[c.spec.NodeName] = map[spire.Part]*Object{}
				}
				old[c.spec.NodeName][part] = c.object
			}
		}
	}
	for node, parts := range old {
		if !ours[node] {
			continue
		}
		for part, o := range parts {
			w.add(Error, "two-agents", o, "Keep one of them on a node: kubectl spiffe migrate plan has the labels and affinities.",
				"is a %s on node %s, where spiffe-node runs as well: both take the same socket", part, node)
		}
	}
	w.registrars()
}

// registrars finds SPIRE's controller manager beside our own registration. Both
// would write the status of the same custom resources, and each the entries of
// its own server.
func (w *world) registrars() {
	if !w.registers {
		return
	}
	for i := range w.carriers {
		c := &w.carriers[i]
		if spire.Container(c.meta.Labels, &c.spec, spire.ControllerManager) == nil || w.in.Cluster && (!c.isPod || c.status.Phase != corev1.PodRunning) {
			continue // in a cluster, what runs counts
		}
		w.add(Error, "two-registrars", c.object, "Stop one: registration.enabled=false here, or scale SPIRE Controller Manager to zero.",
			"runs SPIRE Controller Manager while spiffe-node's authority registers pods too: both write the status of the same resources, and pods get entries at two servers")
	}
}

// Registers says whether a ConfigMap is that of an authority of spiffe-node that
// registers pods.
func (o *Object) Registers() bool {
	if o.Kind != "ConfigMap" || str(o.fields, "metadata", "labels", spire.OwnLabel) != spire.OwnName {
		return false
	}
	for _, v := range dict(o.fields, "data") {
		text, _ := v.(string)
		var c struct {
			Kind         string `yaml:"kind"`
			Registration struct {
				Enabled bool `yaml:"enabled"`
			} `yaml:"registration"`
		}
		if strings.Contains(text, "AuthorityConfiguration") && yaml.Unmarshal([]byte(text), &c) == nil && c.Kind == "AuthorityConfiguration" && c.Registration.Enabled {
			return true
		}
	}
	return false
}
