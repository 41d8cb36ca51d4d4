package check

import (
	"encoding/json"
	"strings"

	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
)

// mesh is a mesh configuration and where it is from.
type mesh struct {
	object      *Object
	trustDomain string
	aliases     []string
}

// template is an injection template.
type template struct {
	object *Object
	name   string
	text   string
}

// nativeSidecars is what is known of whether the proxy is an init container.
type nativeSidecars struct {
	on  bool
	why string
}

// defaultTrustDomain is Istio's, if none is set.
const defaultTrustDomain = "cluster.local"

func (w *world) takeMesh(o *Object, m map[string]any) {
	if m == nil {
		return
	}
	x := mesh{object: o, trustDomain: str(m, "trustDomain")}
	aliases, _ := m["trustDomainAliases"].([]any)
	for _, a := range aliases {
		if s, ok := a.(string); ok {
			x.aliases = append(x.aliases, s)
		}
	}
	w.mesh = append(w.mesh, x)
}

func (w *world) takeTemplates(o *Object, m map[string]any) {
	for name, v := range m {
		if text, ok := v.(string); ok {
			w.templates = append(w.templates, template{o, name, text})
		}
	}
}

// takeConfigMap knows those of istiod, of this product and of SPIRE's agent.
func (w *world) takeConfigMap(o *Object) {
	data := dict(o.fields, "data")
	component := str(o.fields, "metadata", "labels", "app.kubernetes.io/name")
	switch {
	case o.Name == "istio" || strings.HasPrefix(o.Name, "istio-") && data["mesh"] != nil:
		if m, ok := w.inner(o, "mesh", str(data, "mesh")); ok {
			w.takeMesh(o, m)
		}
	case strings.HasPrefix(o.Name, "istio-sidecar-injector"):
		if m, ok := w.inner(o, "config", str(data, "config")); ok {
			w.takeTemplates(o, dict(m, "templates"))
		}
	case component == "spiffe-node" && data["agent.yaml"] != nil:
		if m, ok := w.inner(o, "agent.yaml", str(data, "agent.yaml")); ok {
			w.setDomain(str(m, "trustDomain"), o)
		}
	case data["agent.conf"] != nil:
		var m map[string]any
		if json.Unmarshal([]byte(str(data, "agent.conf")), &m) == nil { // HCL is not read
			w.setDomain(str(m, "agent", "trust_domain"), o)
		}
	}
}

// inner reads a document inside a ConfigMap.
func (w *world) inner(o *Object, key, text string) (map[string]any, bool) {
	if text == "" {
		return nil, false
	}
	var node yaml.Node
	var m map[string]any
	err := yaml.Unmarshal([]byte(text), &node)
	if err == nil && node.Kind != 0 {
		err = decode(&node, &m)
	}
	if err != nil {
		w.add(Error, "unreadable", o, "Correct it.", "data.%s is no YAML: %v", key, err)
	}
	return m, err == nil && m != nil
}

// takeOperator reads an IstioOperator, which wraps values.
func (w *world) takeOperator(o *Object) {
	spec := dict(o.fields, "spec")
	m := dict(spec, "meshConfig")
	if m == nil {
		m = dict(spec, "values", "meshConfig")
	}
	w.takeMesh(o, m)
	if m == nil && spec != nil {
		w.takeMesh(o, map[string]any{})
	}
	w.takeIstioValues(o, dict(spec, "values"))
	for _, e := range list(spec, "components", "pilot", "k8s", "env") {
		w.learnEnv(str(e, "name"), str(e, "value"), o.String())
	}
	for _, group := range []string{"ingressGateways", "egressGateways"} {
		for _, g := range list(spec, "components", group) {
			w.overlays(o, str(g, "name"), list(g, "k8s", "overlays"))
		}
	}
}

// takeValues reads a values file: Istio's, or this product's.
func (w *world) takeValues(o *Object) {
	w.setDomain(str(o.fields, "global", "spire", "trustDomain"), o)
	w.takeMesh(o, dict(o.fields, "meshConfig"))
	w.takeIstioValues(o, o.fields)
}

func (w *world) takeIstioValues(o *Object, values map[string]any) {
	w.takeTemplates(o, dict(values, "sidecarInjectorWebhook", "templates"))
	for name, v := range dict(values, "pilot", "env") {
		value, isText := v.(string)
		if b, isBool := v.(bool); isBool && b {
			value, isText = "true", true
		}
		if isText {
			w.learnEnv(name, value, o.String())
		}
	}
}

func (w *world) learnEnv(name, value, where string) {
	if name == "ENABLE_NATIVE_SIDECARS" && value != "" {
		w.native = &nativeSidecars{on: value == "true", why: "ENABLE_NATIVE_SIDECARS is " + value + " in " + where}
	}
}

// learnNative sees from istiod's environment, else from a running pod, which
// kind of sidecar is injected.
func (w *world) learnNative(c *carrier) {
	for _, ctr := range c.spec.Containers {
		if ctr.Name != "discovery" {
			continue
		}
		for _, e := range ctr.Env {
			w.learnEnv(e.Name, e.Value, c.object.String())
		}
	}
	if !c.isPod || w.native != nil {
		return
	}
	for _, ctr := range c.spec.InitContainers {
		if ctr.Name == proxy && ctr.RestartPolicy != nil && *ctr.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			w.native = &nativeSidecars{on: true, why: c.object.String() + " has a native sidecar"}
		}
	}
}
