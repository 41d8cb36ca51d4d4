package check

import (
	corev1 "k8s.io/api/core/v1"
)

// Uninstall finds what stands in the way of removing spiffe-node from the
// cluster: pods whose volumes only its driver can unmount. What stays after it
// is noted.
func Uninstall(in Input) []Finding {
	w := newWorld(in)
	for i := range w.carriers {
		c := &w.carriers[i]
		v := w.volume(&c.spec)
		if !c.isPod || v == nil {
			continue
		}
		what, severity := "uses volume %s of %s: without the driver it would hang in Terminating", Error
		if c.status.Phase == corev1.PodSucceeded || c.status.Phase == corev1.PodFailed {
			what, severity = "has ended; its volume %s of %s is unmounted by now, or will be soon", Note
		}
		w.add(severity, "volume-in-use", c.object, "Delete the pod, or what makes it, or take the volume out; then uninstall.", what, v.Name, v.CSI.Driver)
	}
	for i := range in.Objects {
		o := &in.Objects[i]
		if o.Kind != "StatefulSet" || dict(o.fields, "metadata", "labels")["app.kubernetes.io/name"] != "spiffe-node" {
			continue
		}
		w.state(o)
	}
	for kind, why := range in.Unread {
		w.add(Warning, "not-checked", nil, "Ask for permission to read them, or check with an account that may.", "%s could not be read: %s", kind, why)
	}
	return w.sorted()
}

// state notes where the authority's keys and entries stay.
func (w *world) state(o *Object) {
	for _, claim := range list(o.fields, "spec", "volumeClaimTemplates") {
		w.add(Note, "state-stays", o, "Delete the claim when the CA is not wanted any more.",
			"its CA and entries stay in the claim %s-%s-0", str(claim, "metadata", "name"), str(o.fields, "metadata", "name"))
	}
	for _, v := range list(o.fields, "spec", "template", "spec", "volumes") {
		if path := str(v, "hostPath", "path"); path != "" {
			w.add(Note, "state-stays", o, "Delete the directory on the node when the CA is not wanted any more.", "its CA and entries stay in %s of the node it runs on", path)
		}
	}
}
