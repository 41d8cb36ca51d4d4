package plan

import (
	"cmp"
	"maps"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/spiffe-node/spiffe-node/internal/migrate/agentconf"
)

// values are what the chart spiffe-node is installed with, for good. What holds
// only while the old parts are there is on the command line of a step.
func (w *world) values() {
	f := &w.plan.Found
	agent := map[string]any{"config": map[string]any{"identity": map[string]any{"defaultOrder": "spire"}}}
	trust := map[string]any{}
	if configMap, key, ok := strings.Cut(f.BundleConfigMap, "/"); ok {
		trust = map[string]any{"configMap": configMap, "key": key, "format": "pem"}
	}
	if w.config != nil {
		if format, ok := w.config.Value("authority.spireServer.trustBundle.format").(string); ok && len(trust) > 0 {
			trust["format"] = format
		}
		if level, ok := w.config.Value("log.level").(string); ok {
			agent["logLevel"] = level
		}
		if v, ok := w.config.Value("attestation.kubernetes.pods.namespaceLabels").(bool); ok && v {
			agent["pods"] = map[string]any{"namespaceLabels": true} // with the permission it takes
		}
		agent["config"] = rest(w.config)
	}
	if sc := w.agent.template.Spec.SecurityContext; sc != nil && sc.RunAsUser != nil && *sc.RunAsUser != 0 {
		agent["capabilities"] = []any{"DAC_OVERRIDE"}
	}
	external := map[string]any{"address": f.ServerAddress}
	if len(trust) > 0 {
		external["trustBundle"] = trust
	}
	names := slices.DeleteFunc([]string{"socket", "spire-agent.sock", "api.sock"}, func(n string) bool { return n == f.SocketName })
	v := map[string]any{
		"global":      map[string]any{"spire": without(map[string]any{"trustDomain": f.TrustDomain, "clusterName": f.ClusterName})},
		"pluginName":  f.PluginName,
		"kubeletPath": f.KubeletPath,
		"socket": map[string]any{
			"directory": f.SocketDirectory, "name": names[0], "alternateNames": append([]any{f.SocketName}, anys(names[1:])...),
		},
		"authority": map[string]any{"mode": "external", "external": external},
		"node": map[string]any{
			"serviceAccount": map[string]any{"name": w.account()},
			"agent":          agent,
		},
	}
	w.plan.Values = v
}

// account is the service account that the server knows agents by.
func (w *world) account() string { return cmp.Or(w.plan.Found.AgentAccount, "default") }

func anys(in []string) []any {
	out := make([]any, len(in))
	for i, s := range in {
		out[i] = s
	}
	return out
}

// without leaves out what is empty.
func without(m map[string]any) map[string]any {
	maps.DeleteFunc(m, func(_ string, v any) bool { return v == "" })
	return m
}

// rest is the translated configuration without what the chart writes by itself.
func rest(r *agentconf.Result) map[string]any {
	var c map[string]any
	if yaml.Unmarshal(r.YAML, &c) != nil {
		return nil
	}
	for _, key := range []string{"apiVersion", "kind", "trustDomain", "mode", "node", "socket", "admin", "health", "log"} {
		delete(c, key)
	}
	drop(c, "attestation", "kubernetes", "pods", "namespaceLabels")
	drop(c, "authority", "spireServer", "address")
	drop(c, "authority", "spireServer", "trustBundle") // the chart's is a ConfigMap
	if r.Facts.NodeAttestor == "k8s_psat" {
		drop(c, "authority", "spireServer", "nodeAttestation")
	}
	return c
}

// drop removes a key, and what it leaves empty.
func drop(m map[string]any, key string, below ...string) {
	if len(below) == 0 {
		delete(m, key)
		return
	}
	next, ok := m[key].(map[string]any)
	if !ok {
		return
	}
	drop(next, below[0], below[1:]...)
	if len(next) == 0 {
		delete(m, key)
	}
}
