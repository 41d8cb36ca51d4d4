package check

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
)

const (
	// managedLabel is what the rules of Istio's guide select pods by.
	managedLabel = "spiffe.io/spire-managed-identity"
	// socketVolume is the name Istio's templates give the volume.
	socketVolume = "workload-socket"
	proxy        = "istio-proxy"
	waitForIt    = "wait-for-spire-socket"
)

// pods judges pods and what makes them.
func (w *world) pods() {
	for i := range w.carriers {
		c := &w.carriers[i]
		w.sources(c)
		if v := w.volume(&c.spec); v != nil {
			w.mount(c, v)
			w.selected(c)
		}
		if c.isPod && metav1.GetControllerOf(&c.meta) != nil && w.in.Cluster {
			continue // told of what makes it
		}
		for _, ctr := range c.spec.InitContainers {
			if ctr.Name == waitForIt {
				w.add(Note, "wait-container", c.object, "Remove the init container: the driver mounts the volume only when the agent answers.", "has the init container %s, which is not needed", waitForIt)
			}
		}
	}
}

// sources finds volumes with two sources, the result of merging a csi volume
// over an emptyDir.
func (w *world) sources(c *carrier) {
	for _, v := range c.spec.Volumes {
		if v.CSI != nil && w.isDriver(v.CSI.Driver) && v.EmptyDir != nil {
			w.add(Error, "volume-clash", c.object, "Remove emptyDir, or write emptyDir: null where an overlay is merged.", "volume %s has both emptyDir and csi: the API server refuses the pod", v.Name)
		}
		if v.Name == socketVolume && v.EmptyDir != nil && v.CSI == nil && wantsTemplate(c, "spire") && c.isPod {
			w.add(Error, "volume-empty", c.object, "Have the template define the volume "+socketVolume+" with csi: {driver: csi.spiffe.io, readOnly: true}.",
				"asks for the template spire, but its volume %s is an emptyDir: Istio's own CA serves it", v.Name)
		}
	}
}

func (w *world) mount(c *carrier, v *corev1.Volume) {
	if v.CSI.ReadOnly == nil || !*v.CSI.ReadOnly {
		w.add(Error, "volume-writable", c.object, "Add readOnly: true to the csi volume "+v.Name+".",
			"volume %s is not readOnly: the driver refuses it, since a pod could remove the node's socket", v.Name)
	}
	mounted := slices.ContainsFunc(slices.Concat(c.spec.InitContainers, c.spec.Containers), func(ctr corev1.Container) bool {
		return slices.ContainsFunc(ctr.VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == v.Name })
	})
	// What is injected mounts it later.
	if !mounted && (c.isPod || !injected(c)) {
		w.add(Error, "volume-not-mounted", c.object, "Add a volumeMount of "+v.Name+" to the container that needs the identity.", "no container mounts the volume %s", v.Name)
	}
}

// injected says whether Istio will add to the pod.
func injected(c *carrier) bool {
	return c.meta.Annotations["inject.istio.io/templates"] != "" || c.meta.Labels["sidecar.istio.io/inject"] == "true" || c.meta.Annotations["sidecar.istio.io/inject"] == "true"
}

// selected judges whether a rule gives the pod an entry.
func (w *world) selected(c *carrier) {
	if c.isPod && metav1.GetControllerOf(&c.meta) != nil && w.in.Cluster {
		return
	}
	if len(w.rules) == 0 {
		if w.in.Istio && !w.in.Cluster && c.meta.Labels[managedLabel] != "true" {
			w.add(Warning, "label-missing", c.object, "Label the pod (not only what makes it) "+managedLabel+`: "true".`, "uses the SPIFFE volume without the label %s, by which the rules of Istio's guide select pods", managedLabel)
		}
		return
	}
	namespace := labels.Set{}
	known := false
	if l, ok := w.namespace[c.meta.Namespace]; ok {
		namespace, known = l, true
	}
	var almost []string
	labelled := false
	for _, r := range w.rules {
		// Without the namespace's labels, only rules on pods can say no.
		ns := !known || matches(r.namespaceSel, namespace)
		if ns && matches(r.podsSel, c.meta.Labels) {
			return
		}
		if ns {
			almost = append(almost, r.object.Name)
		}
		labelled = labelled || ns && r.podsSel != nil && r.podsSel.MatchLabels[managedLabel] == "true" && c.meta.Labels[managedLabel] != "true"
	}
	if labelled {
		w.add(Error, "label-missing", c.object, "Label the pod (metadata.labels of the pod template) "+managedLabel+`: "true".`, "has the SPIFFE volume, but lacks the label %s that a ClusterSPIFFEID asks for", managedLabel)
		return
	}
	text := "no ClusterSPIFFEID selects it"
	if len(almost) > 0 {
		text += "; by namespace alone these would: " + strings.Join(almost, ", ")
	}
	w.add(Warning, "not-selected", c.object, "Add labels that a ClusterSPIFFEID selects, a ClusterSPIFFEID that selects the pod, or an entry by hand.", "has the SPIFFE volume, but %s", text)
}

// matches says whether a selector selects; one that is not there selects all,
// a bad one nothing.
func matches(s *metav1.LabelSelector, set map[string]string) bool {
	if s == nil {
		return true
	}
	sel, err := metav1.LabelSelectorAsSelector(s)
	return err == nil && sel.Matches(labels.Set(set))
}

// wantedTemplates is the pod's list of injection templates.
func wantedTemplates(c *carrier) []string {
	var out []string
	for name := range strings.SplitSeq(c.meta.Annotations["inject.istio.io/templates"], ",") {
		if name = strings.TrimSpace(name); name != "" {
			out = append(out, name)
		}
	}
	return out
}

func wantsTemplate(c *carrier, name string) bool { return slices.Contains(wantedTemplates(c), name) }
