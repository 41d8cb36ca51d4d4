package agentconf

import (
	"maps"
	"slices"
	"strconv"
	"strings"
)

const (
	noKubelet = "the kubelet is not asked: the API server's watch of this node's pods and the driver's records say which pod calls " +
		"(attestation.kubernetes.pods.source: kubelet would ask it)"
	noCgroupOption = "the pod is the first one in the cgroup's path, whatever is below it"
)

// plugin says what becomes of a plugin of SPIRE Agent.
type plugin struct {
	outcome Outcome
	text    string
	to      []string
	apply   func(t *translation)
	data    map[string]rule // keys of plugin_data, in lower case; nil: all of it goes with the plugin
}

// builtIn are the plugins of SPIRE Agent 1.15, as type/name.
var builtIn = map[string]plugin{
	"NodeAttestor/k8s_psat": {
		outcome: Translated, to: []string{attestation + "type"},
		apply: func(t *translation) { t.set[attestation+"type"] = "k8s_psat" },
		data: map[string]rule{
			"cluster": {outcome: Translated, to: []string{attestation + "cluster"}, apply: func(t *translation, v *node, _ *Item) error {
				t.Facts.Cluster = v.text
				t.set[attestation+"cluster"] = v.text
				return nil
			}},
			"token_path": text(attestation+"tokenPath", nil),
		},
	},
	"NodeAttestor/join_token": {outcome: Translated, to: []string{attestation + "type"}, apply: func(t *translation) {
		t.set[attestation+"type"] = "join_token"
	}, data: map[string]rule{}},
	"NodeAttestor/x509pop": {
		outcome: Translated, to: []string{attestation + "type"},
		apply: func(t *translation) { t.set[attestation+"type"] = "x509pop" },
		data: map[string]rule{
			"certificate_path":       text(attestation+"certificatePath", nil),
			"private_key_path":       text(attestation+"privateKeyPath", nil),
			"intermediates_path":     text(attestation+"intermediatesPath", nil),
			"spiffe_endpoint_socket": socket(attestation + "workloadAPISocket"),
		},
	},
	"NodeAttestor/aws_iid":        otherNode("an AWS instance identity document"),
	"NodeAttestor/azure_imds":     otherNode("Azure's metadata service"),
	"NodeAttestor/azure_msi":      otherNode("an Azure managed identity"),
	"NodeAttestor/gcp_iit":        otherNode("a GCP instance identity token"),
	"NodeAttestor/http_challenge": otherNode("an HTTP challenge"),
	"NodeAttestor/sshpop":         otherNode("an SSH host certificate"),
	"NodeAttestor/tpm_devid":      otherNode("a TPM"),

	"KeyManager/memory": {outcome: NotNeeded, text: "the node's key and the SVIDs in use are kept on the host's tmpfs for a restart (identity.stateDirectory; empty: in memory only)"},
	"KeyManager/disk":   {outcome: NotNeeded, text: "no key touches a disk; for a restart they are kept on the host's tmpfs (identity.stateDirectory), and after a reboot the agent attests anew"},

	"WorkloadAttestor/k8s": {
		outcome: Translated, to: []string{"mode"}, text: "pods get the unix selectors too, and all their k8s selectors",
		apply: func(t *translation) { t.set["mode"] = "kubernetes" },
		data: map[string]rule{
			"kubelet_read_only_port": notNeeded(noKubelet), "kubelet_secure_port": notNeeded(noKubelet), "disable_kubelet_client": notNeeded(noKubelet),
			"max_poll_attempts": notNeeded(noKubelet), "poll_retry_interval": notNeeded(noKubelet), "reload_interval": notNeeded(noKubelet),
			"kubelet_ca_path": notNeeded(noKubelet), "skip_kubelet_verification": notNeeded(noKubelet), "token_path": notNeeded(noKubelet),
			"certificate_path": notNeeded(noKubelet), "private_key_path": notNeeded(noKubelet), "use_anonymous_authentication": notNeeded(noKubelet),
			"node_name_env":                  notNeeded("the node's name is MY_NODE_NAME, which the chart sets, or node.name"),
			"node_name":                      text("node.name", nil),
			"disable_container_selectors":    notNeeded("nobody waits for container selectors: a caller has the pod's at once and the container's when they are known"),
			"use_new_container_locator":      notNeeded(noCgroupOption),
			"verbose_container_locator_logs": notNeeded(noCgroupOption + "; kubectl spiffe explain says by which witnesses a caller was told"),
			"enable_namespace_labels":        boolean("attestation.kubernetes.pods.namespaceLabels"),
			"sigstore":                       unsupported("image signatures are not verified, so entries with k8s:image-signature or k8s:image-attestations selectors match nobody: verify at admission and drop these selectors"),
			"experimental":                   experimentalK8s(),
		},
	},
	"WorkloadAttestor/unix": {
		outcome: NotNeeded, text: "callers always have their unix selectors",
		data: map[string]rule{
			"discover_workload_path": boolean("attestation.unix.discoverWorkloadPath"),
			"workload_size_limit": text("attestation.unix.workloadSizeLimit", func(s string) (any, error) {
				return strconv.ParseInt(s, 10, 64)
			}),
		},
	},
	"WorkloadAttestor/docker":  {outcome: Unsupported, text: "there are no docker selectors: register containers outside Kubernetes by unix selectors, or keep SPIRE Agent for them"},
	"WorkloadAttestor/systemd": {outcome: Unsupported, text: "there are no systemd selectors: register services by unix:uid, with a user of their own (systemd's DynamicUser or User)"},
	"WorkloadAttestor/slurm":   {outcome: Unsupported, text: "there are no slurm selectors: keep SPIRE Agent on these machines"},
	"WorkloadAttestor/windows": {outcome: Unsupported, text: windowsOnly},

	"SVIDStore/aws_secretsmanager": noStore(),
	"SVIDStore/gcp_secretmanager":  noStore(),
}

func otherNode(by string) plugin {
	return plugin{outcome: Unsupported, text: "nodes do not attest by " + by + ": on Kubernetes enable k8s_psat at the server and here (" + attestation + "type), elsewhere use join_token"}
}

func noStore() plugin {
	return plugin{outcome: Unsupported, text: "SVIDs are not pushed to secret stores: keep a SPIRE Agent for entries with store_svid"}
}

// experimentalK8s looks for the Broker API, which is all that matters there.
func experimentalK8s() rule {
	return rule{outcome: NotNeeded, text: "the watch of pods is the cache", apply: func(t *translation, v *node, i *Item) error {
		for _, o := range v.objects() {
			for _, f := range o.fields {
				switch {
				case strings.EqualFold(f.name, "broker"):
					t.Facts.Broker = true
					i.Outcome, i.Text = Unsupported, noBroker
				case !strings.EqualFold(f.name, "api_server"):
					t.add(Item{Key: i.Key + "." + f.name, Line: f.line, Outcome: Unknown, Text: "is no key of SPIRE Agent 1.15; it would refuse the file"})
				}
			}
		}
		return nil
	}}
}

// plugins accounts for the block of that name: types, then names.
func (t *translation) plugins(n *node) {
	for _, kind := range n.fields {
		for _, o := range kind.value.objects() {
			for _, name := range o.fields {
				configs := name.value.objects()
				if len(configs) == 0 {
					configs = []*node{{kind: isObject}}
				}
				for _, c := range configs {
					t.plugin(kind.name, name.name, name.line, c)
				}
			}
		}
	}
}

var pluginTypes = []string{"NodeAttestor", "KeyManager", "WorkloadAttestor", "SVIDStore"}

func (t *translation) plugin(kind, name string, line int, n *node) {
	key := "plugins." + kind + "." + name
	data, common := sortOut(n)
	item := Item{Key: key, Line: line}
	p, known := builtIn[kind+"/"+name]
	switch {
	case common["enabled"] != nil && strings.EqualFold(common["enabled"].text, "false"):
		item.Outcome, item.Text = NotNeeded, "is not enabled"
		t.add(item)
		return
	case !slices.Contains(pluginTypes, kind):
		item.Outcome, item.Text = Unknown, "is no kind of plugin of SPIRE Agent 1.15"
	case common["plugin_cmd"] != nil && !common["plugin_cmd"].off():
		item.Outcome, item.Text = Unsupported, "external plugins are not run; what it does must be done by a built-in attestor, or stays with SPIRE Agent"
		p, known = plugin{}, true
	case !known:
		item.Outcome, item.Text = Unknown, "is no built-in plugin of SPIRE Agent 1.15, and has no plugin_cmd"
	default:
		item.Outcome, item.Text, item.To = p.outcome, p.text, strings.Join(p.to, ", ")
	}
	switch kind {
	case "NodeAttestor":
		t.Facts.NodeAttestor = name
	case "WorkloadAttestor":
		t.Facts.WorkloadAttestors = append(t.Facts.WorkloadAttestors, name)
	}
	if p.apply != nil {
		p.apply(t)
	}
	t.add(item)
	t.common(key, common)
	if !known {
		return
	}
	for _, f := range data {
		t.pluginKey(key+".plugin_data."+f.name, f, p.data, item)
	}
}

// pluginKeys are those every plugin has.
var pluginKeys = []string{"plugin_cmd", "plugin_args", "plugin_checksum", "plugin_data", "plugin_data_file", "enabled"}

// sortOut parts a plugin's own data from what every plugin has. Keys that are
// neither are in common too.
func sortOut(n *node) (data []field, common map[string]*node) {
	common = map[string]*node{}
	for _, f := range n.fields {
		if strings.EqualFold(f.name, "plugin_data") {
			for _, o := range f.value.objects() {
				data = append(data, o.fields...)
			}
		}
		f.value.line = f.line
		common[strings.ToLower(f.name)] = f.value
	}
	return data, common
}

func (t *translation) common(key string, common map[string]*node) {
	for _, name := range slices.Sorted(maps.Keys(common)) {
		v := common[name]
		item := Item{Key: key + "." + name, Line: v.line}
		switch {
		case !slices.Contains(pluginKeys, name):
			item.Outcome, item.Text = Unknown, "is no key of a plugin of SPIRE Agent 1.15"
		case name == "plugin_data_file" && !v.off():
			item.Outcome, item.Text = Unsupported, "is not read: put what is in it under plugin_data and translate again"
		case name == "plugin_cmd", name == "plugin_args", name == "plugin_checksum":
			item.Outcome, item.Text = NotNeeded, "goes with the plugin"
		default:
			continue // said by the plugin and its data
		}
		t.add(item)
	}
}

func (t *translation) pluginKey(key string, f field, known map[string]rule, of Item) {
	item := Item{Key: key, Line: f.line}
	if known == nil {
		item.Outcome, item.Text = of.Outcome, "goes with the plugin"
		t.add(item)
		return
	}
	r, ok := known[strings.ToLower(f.name)]
	switch {
	case !ok:
		item.Outcome, item.Text = Unknown, "is no key of this plugin in SPIRE Agent 1.15"
	case r.outcome == Unsupported && f.value.off():
		item.Outcome, item.Text = NotNeeded, "is off"
	default:
		item.Outcome, item.To, item.Text = r.outcome, strings.Join(r.to, ", "), r.text
		if r.apply != nil {
			if err := r.apply(t, f.value, &item); err != nil {
				item.Outcome, item.Text, item.To = Unsupported, err.Error(), ""
			}
		}
	}
	t.add(item)
}
