package plan

import (
	"fmt"
	"path"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/spire"
	"github.com/spiffe-node/spiffe-node/internal/migrate/agentconf"
)

// agents finds the SPIRE Agent and reads its configuration.
func (w *world) agents() {
	var found []*workload
	for i := range w.workloads {
		k := &w.workloads[i]
		if k.kind == "DaemonSet" && spire.Container(k.template.Labels, &k.template.Spec, spire.Agent) != nil {
			found, w.old = append(found, k), append(w.old, k)
		}
	}
	for _, k := range found {
		if w.in.Agent == "" || w.in.Agent == k.namespace+"/"+k.name {
			w.agent = k
			break
		}
	}
	switch {
	case len(found) == 0:
		w.block("no DaemonSet of SPIRE Agent was found", "If it is there, its image has a name of its own: see that kubectl can list DaemonSets of all namespaces, or translate its configuration alone: kubectl spiffe migrate config.")
		return
	case w.agent == nil:
		w.block("there is no SPIRE Agent "+w.in.Agent, "Name one of: "+names(found)+".")
		return
	case len(found) > 1 && w.in.Agent == "":
		w.block("there are several SPIRE Agents: "+names(found), "Plan for each by itself with --agent NAMESPACE/NAME; each becomes a release with its own pluginName, socket.directory and stateDirectory.")
	}
	w.container = spire.Container(w.agent.template.Labels, &w.agent.template.Spec, spire.Agent)
	w.plan.Found.Agent = w.agent.String()
	w.plan.Found.AgentAccount = w.agent.template.Spec.ServiceAccountName
	text, from := w.configOf(w.agent, w.container, "/opt/spire/conf/agent/agent.conf")
	w.plan.Found.AgentConfig = from
	if text == "" {
		w.block("the configuration of "+w.agent.String()+" could not be read", "Give its ConfigMap with -f, or see that you may read ConfigMaps of its namespace.")
		return
	}
	expand := func(n string) (string, bool) { return w.environment(n) }
	if !strings.Contains(strings.Join(append(w.container.Command, w.container.Args...), " "), "expandEnv") {
		expand = nil
	}
	r, err := agentconf.Translate([]byte(text), agentconf.Options{Getenv: expand})
	if err != nil {
		w.block("the configuration in ConfigMap "+from+" is not to be read: "+err.Error(), "Correct it, or give another with -f.")
		return
	}
	w.config = r
	w.judgeConfig(r, from)
	w.socket(r)
}

// environment is what the agent's container is given as plain values.
func (w *world) environment(name string) (string, bool) {
	for _, e := range w.container.Env {
		if e.Name == name && e.ValueFrom == nil {
			return e.Value, true
		}
	}
	return "", false
}

func names(all []*workload) string {
	var out []string
	for _, k := range all {
		out = append(out, k.namespace+"/"+k.name)
	}
	return strings.Join(out, ", ")
}

// judgeConfig turns the account of a configuration into remarks.
func (w *world) judgeConfig(r *agentconf.Result, from string) {
	f := &w.plan.Found
	f.TrustDomain, f.ClusterName, f.ServerAddress, f.NodeAttestor = r.Facts.TrustDomain, r.Facts.Cluster, r.Facts.ServerAddress, r.Facts.NodeAttestor
	for _, i := range r.Items {
		what := fmt.Sprintf("%s (ConfigMap %s, line %d)", i.Key, from, i.Line)
		switch {
		case i.Outcome == agentconf.Unknown:
			w.warn(what+" "+i.Text, "Look at it, and leave it out.")
		case i.Outcome != agentconf.Unsupported || i.Text == "goes with the plugin":
		case strings.HasPrefix(i.Key, "plugins.NodeAttestor."):
			w.block(what+": nodes could not attest", sentence(i.Text))
		case len(r.Facts.Delegates) > 0 && strings.EqualFold(i.Key, "agent.authorized_delegates"):
			w.block(fmt.Sprintf("%s: %s may use the Delegated Identity API", what, some(r.Facts.Delegates)), sentence(i.Text))
		case strings.Contains(i.Key, "broker"):
			w.block(what+": somebody may use the Broker API", sentence(i.Text))
		default:
			w.warn(what+" is not supported", sentence(i.Text))
		}
	}
	if f.NodeAttestor != "k8s_psat" && r.Value("authority.spireServer.nodeAttestation.type") != nil {
		w.warn("nodes attest by "+f.NodeAttestor, "The chart is made for k8s_psat: enable that at the server too, or mount what "+f.NodeAttestor+" needs with node.agent.extraVolumes; what is translated of it is in node.agent.config.")
	}
	for _, v := range r.Unset {
		w.warn("the configuration uses $"+v+", whose value is not in the DaemonSet", "Fill it in in the values below.")
	}
}

func sentence(s string) string {
	if s == "" {
		return s
	}
	return strings.ToUpper(s[:1]) + s[1:] + "."
}

// socket finds the host's directory of the agent's socket.
func (w *world) socket(r *agentconf.Result) {
	file := r.Facts.SocketPath
	if arg := spire.Argument(w.container, "socketPath"); arg != "" {
		file = arg
	}
	if file == "" {
		file = "/tmp/spire-agent/public/api.sock"
	}
	host, instead := spire.HostDirectory(&w.agent.template.Spec, w.container, path.Dir(file))
	w.plan.Found.SocketDirectory, w.plan.Found.SocketName = host, path.Base(file)
	switch {
	case host != "":
	case instead != "":
		w.block(fmt.Sprintf("the socket directory of %s is %s, not a directory of the host", w.agent, instead),
			"Running pods cannot keep such a mount: give SPIRE Agent a hostPath first and restart the pods, or restart them after each node has moved.")
	default:
		w.block(fmt.Sprintf("no volume holds %s in %s: pods cannot have its socket", path.Dir(file), w.agent), "See where pods get the socket from.")
	}
	if sc := w.agent.template.Spec.SecurityContext; sc != nil && sc.RunAsUser != nil && *sc.RunAsUser != 0 {
		w.warn(fmt.Sprintf("SPIRE Agent runs as user %d and owns the socket directory", *sc.RunAsUser),
			"The values below add DAC_OVERRIDE to the sds-agent, which is user 0 without capabilities; or chown the directory to root on each node.")
	}
}

// drivers finds the CSI driver.
func (w *world) drivers() {
	w.plan.Found.PluginName, w.plan.Found.KubeletPath = "csi.spiffe.io", "/var/lib/kubelet"
	var found []*workload
	for i := range w.workloads {
		k := &w.workloads[i]
		c := spire.Container(k.template.Labels, &k.template.Spec, spire.CSIDriver)
		if c == nil {
			continue
		}
		w.old = append(w.old, k)
		dir := spire.Argument(c, "workload-api-socket-dir")
		host, _ := spire.HostDirectory(&k.template.Spec, c, dir)
		if host != w.plan.Found.SocketDirectory && w.countDrivers() > 1 {
			continue // another agent's
		}
		found = append(found, k)
		w.driver = k
		w.plan.Found.Driver = k.String()
		if n := spire.Argument(c, "plugin-name"); n != "" {
			w.plan.Found.PluginName = n
		}
		w.kubelet(k, c)
		if want := w.plan.Found.SocketDirectory; want != "" && host != want {
			w.block(fmt.Sprintf("%s mounts %s into pods, but SPIRE Agent's socket is in %s", k, orNothing(host), want),
				"Pods get a directory without a live socket: make both the same first (agentSocketPath and socketPath in SPIRE's chart).")
		}
	}
	switch {
	case len(found) == 0 && w.agent != nil:
		w.warn("no DaemonSet of the SPIFFE CSI driver was found: pods have the socket from the host, or not at all",
			"Pods that mount the host's directory go on as they are. Give new ones the volume csi: {driver: csi.spiffe.io, readOnly: true}.")
	case len(found) > 1:
		w.block("there are several SPIFFE CSI drivers for one SPIRE Agent: "+names(found), "Plan for one at a time: give the objects of one with -f.")
	}
}

func (w *world) countDrivers() int {
	n := 0
	for i := range w.workloads {
		if k := &w.workloads[i]; spire.Container(k.template.Labels, &k.template.Spec, spire.CSIDriver) != nil {
			n++
		}
	}
	return n
}

func orNothing(s string) string {
	if s == "" {
		return "nothing of the host"
	}
	return s
}

// kubelet finds the kubelet's directory: what is above the pods it mounts.
func (w *world) kubelet(k *workload, c *corev1.Container) {
	for _, v := range k.template.Spec.Volumes {
		if v.HostPath == nil {
			continue
		}
		for _, m := range c.VolumeMounts {
			at := strings.TrimSuffix(v.HostPath.Path, "/")
			switch {
			case m.Name != v.Name || m.MountPropagation == nil || *m.MountPropagation != corev1.MountPropagationBidirectional:
			case path.Base(at) == "pods":
				w.plan.Found.KubeletPath = path.Dir(at)
			default:
				w.plan.Found.KubeletPath = at
			}
		}
	}
}

// servers finds the server and the controller manager, and what the server lets
// agents attest with.
func (w *world) servers() {
	f := &w.plan.Found
	for i := range w.workloads {
		k := &w.workloads[i]
		if c := spire.Container(k.template.Labels, &k.template.Spec, spire.Server); c != nil {
			text, _ := w.configOf(k, c, "/opt/spire/conf/server/server.conf")
			s, err := agentconf.ReadServer([]byte(text))
			if text == "" || err != nil {
				s = nil
			}
			// With several, the one of the trust domain.
			if f.Server == "" || s != nil && s.TrustDomain == f.TrustDomain {
				f.Server, w.server = k.String(), s
			}
		}
		if c := spire.Container(k.template.Labels, &k.template.Spec, spire.ControllerManager); c != nil && f.ControllerManager == "" {
			f.ControllerManager = k.String()
			for i := range w.configMaps {
				cm := &w.configMaps[i]
				if cm.Namespace != k.namespace {
					continue
				}
				if class, _, ok := controllerConfig(cm.Data); ok {
					f.ClassName = class
				}
			}
		}
	}
	if w.registers && f.ControllerManager != "" {
		w.block("the authority of spiffe-node and "+f.ControllerManager+" with SPIRE Controller Manager both register pods",
			"One of them must stop: set registration.enabled=false, or scale SPIRE Controller Manager down. With SPIRE Server as the authority, the chart's own is not installed (authority.mode=external).")
	}
	w.bundle()
}

// bundle finds the ConfigMap that the agent knows its server by.
func (w *world) bundle() {
	if w.config == nil {
		return
	}
	file, _ := w.config.Value("authority.spireServer.trustBundle.path").(string)
	for _, m := range w.container.VolumeMounts {
		at := strings.TrimSuffix(m.MountPath, "/")
		if file != at && !strings.HasPrefix(file, at+"/") {
			continue
		}
		for _, v := range w.agent.template.Spec.Volumes {
			if v.Name == m.Name && v.ConfigMap != nil {
				w.plan.Found.BundleConfigMap = v.ConfigMap.Name + "/" + path.Base(file)
			}
		}
	}
	if w.plan.Found.BundleConfigMap == "" {
		w.warn("SPIRE Agent does not have its trust bundle from a ConfigMap", "The chart does: put the bundle (spire-server bundle show -format spiffe) into one of the release's namespace and name it in authority.external.trustBundle.")
	}
}

// csiDriver looks at the CSIDriver object, which pods need at every start.
func (w *world) csiDriver() {
	if w.agent == nil {
		return
	}
	for i := range w.csiDrivers {
		d := &w.csiDrivers[i]
		if d.Name != w.plan.Found.PluginName {
			continue
		}
		owner := "nobody's"
		if rel := d.Annotations["meta.helm.sh/release-name"]; rel != "" {
			owner = "Helm release " + d.Annotations["meta.helm.sh/release-namespace"] + "/" + rel
		}
		w.plan.Found.CSIDriverObject = owner
		if d.Spec.PodInfoOnMount == nil || !*d.Spec.PodInfoOnMount {
			w.block("CSIDriver "+d.Name+" does not say podInfoOnMount: true, so the driver is not told which pod a volume is for",
				"kubectl patch csidriver "+d.Name+` --type merge -p '{"spec":{"podInfoOnMount":true}}'`)
		}
		return
	}
	if w.driver != nil && (w.in.Cluster && w.in.Unread["CSIDrivers"] == "") {
		w.warn("there is no CSIDriver object "+w.plan.Found.PluginName, "The values below have the chart make it.")
	}
}
