package check

import (
	"slices"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
)

// drivers judges CSIDriver objects.
func (w *world) drivers() {
	for i := range w.drvs {
		w.driver(&w.drvs[i], w.drvsAt[i])
	}
	if !w.in.Cluster || w.in.Unread["CSIDrivers"] != "" {
		return
	}
	missing := map[string]bool{}
	for i := range w.carriers {
		c := &w.carriers[i]
		v := w.volume(&c.spec)
		if v == nil || missing[v.CSI.Driver] || slices.ContainsFunc(w.drvs, func(d storagev1.CSIDriver) bool { return d.Name == v.CSI.Driver }) {
			continue
		}
		missing[v.CSI.Driver] = true
		w.add(Error, "csidriver-missing", c.object, "Install the chart spiffe-node, or its CSIDriver object.",
			"uses the driver %s, for which there is no CSIDriver object: the kubelet does not say which pod a volume is for", v.CSI.Driver)
	}
}

func (w *world) driver(d *storagev1.CSIDriver, o *Object) {
	s := d.Spec
	if s.PodInfoOnMount == nil || !*s.PodInfoOnMount {
		w.add(Error, "csidriver-pod-info", o, "Set spec.podInfoOnMount: true.", "podInfoOnMount is not true: the driver is not told which pod a volume is for and refuses to mount")
	}
	if !slices.Contains(s.VolumeLifecycleModes, storagev1.VolumeLifecycleEphemeral) {
		w.add(Error, "csidriver-ephemeral", o, "Delete the object and make it again with spec.volumeLifecycleModes: [Ephemeral]; the field cannot be changed.",
			"volumeLifecycleModes lacks Ephemeral: the kubelet refuses inline volumes of this driver")
	}
	if s.AttachRequired == nil || *s.AttachRequired {
		w.add(Warning, "csidriver-attach", o, "Delete the object and make it again with spec.attachRequired: false; the field cannot be changed.",
			"attachRequired is not false, although nothing can be attached")
	}
	if s.FSGroupPolicy == nil || *s.FSGroupPolicy != storagev1.NoneFSGroupPolicy {
		severity := Warning
		if s.FSGroupPolicy != nil && *s.FSGroupPolicy == storagev1.FileFSGroupPolicy {
			severity = Error
		}
		w.add(severity, "csidriver-fsgroup", o, "Set spec.fsGroupPolicy: None.",
			"fsGroupPolicy is not None: for a pod with an fsGroup the kubelet may change the owner of the directory that all pods of the node share")
	}
}

// registered judges whether the kubelets know the driver.
func (w *world) registered() {
	used := map[string]map[string]*Object{} // driver -> node -> a pod that waits for it
	for i := range w.carriers {
		c := &w.carriers[i]
		v := w.volume(&c.spec)
		if v == nil || !c.isPod || c.spec.NodeName == "" || c.status.Phase == corev1.PodSucceeded || c.status.Phase == corev1.PodFailed {
			continue
		}
		if used[v.CSI.Driver] == nil {
			used[v.CSI.Driver] = map[string]*Object{}
		}
		used[v.CSI.Driver][c.spec.NodeName] = c.object
	}
	for _, d := range w.drvs {
		for i := range w.nodes {
			n := &w.nodes[i]
			if slices.ContainsFunc(n.Spec.Drivers, func(x storagev1.CSINodeDriver) bool { return x.Name == d.Name }) {
				continue
			}
			if pod := used[d.Name][n.Name]; pod != nil {
				w.add(Error, "driver-not-registered", w.nodesAt[i], "See why the spiffe-node pod of that node is not ready: kubectl get pods -l app.kubernetes.io/name=spiffe-node -o wide.",
					"the kubelet of node %s does not know the driver %s, and %s waits for it", n.Name, d.Name, pod)
				continue
			}
			w.add(Warning, "driver-not-registered", w.nodesAt[i], "If pods there shall have identities, let the DaemonSet spiffe-node tolerate the node's taints and match its labels.",
				"the kubelet of node %s does not know the driver %s", n.Name, d.Name)
		}
	}
}

// identities judges what the agents say of the pods.
func (w *world) identities() {
	for i := range w.carriers {
		c := &w.carriers[i]
		if v := w.volume(&c.spec); v == nil || !c.isPod || c.status.Phase != corev1.PodRunning || !w.in.Asked[c.spec.NodeName] {
			continue
		}
		name := c.object.Namespace + "/" + c.object.Name
		fix := "kubectl spiffe explain pod/" + c.object.Name + " -n " + c.object.Namespace + " says why."
		switch id, known := w.in.Identities[name]; {
		case !known:
			w.add(Warning, "not-connected", c.object, fix, "has the volume, but none of its processes is connected to the agent")
		case id.Denied != "":
			w.add(Error, "denied", c.object, fix, "is refused by the agent: %s", id.Denied)
		case !id.Served:
			w.add(Error, "no-identity", c.object, fix, "has the volume and waits for an identity that no entry gives it")
		}
	}
}
