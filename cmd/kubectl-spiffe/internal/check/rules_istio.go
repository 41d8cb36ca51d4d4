package check

import (
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// builtin are the templates that come with Istio. They are Go templates, of
// which only a few lines are looked at.
var builtin = []string{"sidecar", "gateway", "grpc-simple", "grpc-agent", "waypoint", "kube-gateway", "agentgateway"}

// bases are those that another template may be merged over.
var bases = []string{"sidecar", "gateway", "grpc-agent", "grpc-simple"}

// istioID is the only form of SPIFFE ID that Istio's peers accept.
var istioID = regexp.MustCompile(`^spiffe://[^/]+/ns/\{\{-?\s*\.PodMeta\.Namespace\s*-?\}\}/sa/\{\{-?\s*\.PodSpec\.ServiceAccountName\s*-?\}\}$`)

func (w *world) istio() {
	w.trustDomains()
	for _, t := range w.templates {
		if !slices.Contains(builtin, t.name) {
			w.template(t)
		}
	}
	for i := range w.carriers {
		c := &w.carriers[i]
		w.order(c)
		if c.isPod {
			w.sidecar(c)
		}
	}
	for _, r := range w.rules {
		if r.podsSel != nil && r.podsSel.MatchLabels[managedLabel] != "" && !istioID.MatchString(r.template) {
			w.add(Warning, "id-shape", r.object, `Use "spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}".`,
				"makes SPIFFE IDs of another form than spiffe://DOMAIN/ns/NAMESPACE/sa/ACCOUNT: Istio's proxies refuse such peers")
		}
	}
}

func (w *world) trustDomains() {
	if w.domain == "" {
		if len(w.mesh) > 0 {
			w.add(Note, "trust-domain", w.mesh[0].object, "Name it with --trust-domain, or add the values of spiffe-node to what is checked.",
				"the trust domain of the identities is not known here, so it was not compared with the mesh's")
		}
		return
	}
	for _, m := range w.mesh {
		have := m.trustDomain
		what := "meshConfig.trustDomain is " + have
		if have == "" {
			have, what = defaultTrustDomain, "meshConfig.trustDomain is not set, so it is "+defaultTrustDomain
		}
		if have != w.domain {
			w.add(Error, "trust-domain", m.object, "Set meshConfig.trustDomain: "+w.domain+" and restart istiod and the proxies.",
				"%s, but the identities are of %s: proxies refuse each other", what, w.domain)
		}
	}
}

// template judges one that users wrote.
func (w *world) template(t template) {
	if reversed := baseWithEmptyDir(w.templates); reversed != "" && strings.Contains(t.text, socketVolume) && strings.Contains(t.text, "csi:") && !strings.Contains(t.text, "emptyDir: null") {
		w.add(Error, "volume-clash", t.object, "Upgrade Istio (gateway template: 1.27, waypoint: 1.31), or add emptyDir: null beside csi in the template "+t.name+".",
			"template %s gives the volume %s a csi source, while Istio's template %s gives it emptyDir: {}: merged, the pod has both and is refused", t.name, socketVolume, reversed)
	}
	m, ok := plainTemplate(t.text)
	if !ok {
		return
	}
	if _, at := m["labels"]; at {
		w.add(Error, "labels-at-root", t.object, "Move labels below metadata: in the template "+t.name+", and label the workloads' own pod templates: entries are made by those.",
			"template %s has labels at its root, where they are silently dropped", t.name)
	}
	if _, at := m["annotations"]; at {
		w.add(Error, "labels-at-root", t.object, "Move annotations below metadata: in the template "+t.name+".", "template %s has annotations at its root, where they are silently dropped", t.name)
	}
	spec := dict(m, "spec")
	if spec == nil && (m["containers"] != nil || m["volumes"] != nil) {
		w.add(Error, "template-root", t.object, "Put containers and volumes below spec: in the template "+t.name+".", "template %s has no spec, so it changes nothing", t.name)
		return
	}
	w.patchesProxy(t, spec)
	for _, v := range list(spec, "volumes") {
		csi := dict(v, "csi")
		if csi == nil || !w.isDriver(str(csi, "driver")) {
			continue
		}
		if v["emptyDir"] != nil {
			w.add(Error, "volume-clash", t.object, "Remove emptyDir from the template "+t.name+".", "template %s gives the volume %s both emptyDir and csi", t.name, str(v, "name"))
		}
		if ro, _ := csi["readOnly"].(bool); !ro {
			w.add(Error, "volume-writable", t.object, "Add readOnly: true to the csi volume in the template "+t.name+".",
				"template %s mounts the driver's volume writable: the driver refuses it, and a proxy could remove the node's socket", t.name)
		}
		if name := str(v, "name"); name != socketVolume {
			w.add(Warning, "volume-name", t.object, "Call the volume "+socketVolume+": Istio's templates mount it by that name.", "template %s calls the volume %s", t.name, name)
		}
	}
}

// patchesProxy finds the trap of templates for the other kind of sidecar.
func (w *world) patchesProxy(t template, spec map[string]any) {
	named := func(field string) bool {
		return slices.ContainsFunc(list(spec, field), func(c map[string]any) bool { return str(c, "name") == proxy && str(c, "image") == "" })
	}
	const fix = "Leave the container out: a template with the volume alone works for both kinds, since Istio's templates mount it already. Else one template for each kind."
	switch classic, native := named("containers"), named("initContainers"); {
	case classic && w.native != nil && w.native.on:
		w.add(Error, "native-sidecar", t.object, fix, "template %s changes the container %s, but sidecars are init containers here (%s): pods get a second one without image and are refused", t.name, proxy, w.native.why)
	case classic && w.native == nil:
		w.add(Warning, "native-sidecar", t.object, fix, "template %s changes the container %s: with native sidecars, which current Istio uses on Kubernetes 1.33 and later, pods get a second one without image and are refused", t.name, proxy)
	case native && w.native != nil && !w.native.on:
		w.add(Error, "native-sidecar", t.object, fix, "template %s changes the init container %s, but sidecars are ordinary containers here (%s)", t.name, proxy, w.native.why)
	case native && w.native == nil && !classic:
		w.add(Note, "native-sidecar", t.object, fix, "template %s changes the init container %s: it fits native sidecars only", t.name, proxy)
	}
}

// order judges the list of templates a pod asks for.
func (w *world) order(c *carrier) {
	names := wantedTemplates(c)
	if len(names) == 0 {
		return
	}
	base := slices.IndexFunc(names, func(n string) bool { return slices.Contains(bases, n) })
	switch {
	case base < 0:
		w.add(Error, "template-order", c.object, `Name the base first: inject.istio.io/templates: "sidecar,`+strings.Join(names, ",")+`" ("gateway,..." for a gateway).`,
			"asks for the templates %s without sidecar or gateway: no proxy is injected", strings.Join(names, ","))
	case base > 0:
		rest := slices.Delete(slices.Clone(names), base, base+1)
		w.add(Error, "template-order", c.object, `Write inject.istio.io/templates: "`+names[base]+","+strings.Join(rest, ",")+`": later templates are merged over earlier ones.`,
			"asks for the template %s before %s, which is merged over it", strings.Join(names[:base], ","), names[base])
	}
	if len(w.templates) == 0 {
		return
	}
	for _, n := range names {
		if !slices.Contains(builtin, n) && !slices.ContainsFunc(w.templates, func(t template) bool { return t.name == n }) {
			w.add(Error, "template-unknown", c.object, "Define it in values.sidecarInjectorWebhook.templates, or correct the name.", "asks for the template %s, which is not defined: injection fails", n)
		}
	}
}

// sidecar judges what injection has made of a pod.
func (w *world) sidecar(c *carrier) {
	ordinary, native := false, false
	for _, ctr := range c.spec.Containers {
		if ctr.Name != proxy {
			continue
		}
		ordinary = true
		if ctr.Image == "" {
			w.add(Error, "native-sidecar", c.object, "Use a template that defines the volume alone.", "has a container %s without image, left by a template for the other kind of sidecar", proxy)
		}
	}
	for _, ctr := range c.spec.InitContainers {
		native = native || ctr.Name == proxy
	}
	if (ordinary || native) && wantsTemplate(c, "spire") && w.volume(&c.spec) == nil {
		w.add(Error, "volume-missing", c.object, "See the volumes of the template spire; the pod must be made anew after a change.", "asks for the template spire, but has no volume of the driver: Istio's own CA serves it")
	}
}

// overlays judges patches of an IstioOperator's gateway.
func (w *world) overlays(o *Object, gateway string, overlays []map[string]any) {
	for _, overlay := range overlays {
		for _, p := range list(overlay, "patches") {
			path := str(p, "path")
			value := dict(p, "value")
			switch {
			case strings.Contains(path, ".volumes.") && strings.HasSuffix(path, "["+"name:"+socketVolume+"].csi"):
				w.add(Error, "volume-clash", o, "Patch the whole element: path spec.template.spec.volumes.[name:"+socketVolume+"] with name and csi.",
					"gateway %s adds csi to the volume %s, whose emptyDir stays: the API server refuses the pod", gateway, socketVolume)
			case strings.Contains(path, ".volumes.") && value["csi"] != nil && value["name"] == nil:
				w.add(Warning, "volume-clash", o, "Add name: "+socketVolume+" to the value.", "gateway %s replaces a volume by one without a name", gateway)
			case strings.HasSuffix(path, "spec.template.spec.initContainers"):
				w.add(Note, "overlay-list", o, "Make sure nothing that Istio puts there is needed; waiting for the socket is not.", "gateway %s replaces the whole list of init containers", gateway)
			}
			if csi := dict(value, "csi"); csi != nil && w.isDriver(str(csi, "driver")) {
				if ro, _ := csi["readOnly"].(bool); !ro {
					w.add(Error, "volume-writable", o, "Add readOnly: true to the csi volume.", "gateway %s mounts the driver's volume writable: the driver refuses it", gateway)
				}
			}
		}
	}
}

// emptySocket is how Istio's older templates define the volume: a source that
// stays when another is merged over it. A bare emptyDir: is null and goes.
var emptySocket = regexp.MustCompile(`(?:name:\s*` + socketVolume + `\s*\n\s*emptyDir:\s*\{\s*\}|emptyDir:\s*\{\s*\}\s*\n\s*name:\s*` + socketVolume + `\b)`)

func baseWithEmptyDir(all []template) string {
	for _, t := range all {
		if slices.Contains(builtin, t.name) && emptySocket.MatchString(t.text) {
			return t.name
		}
	}
	return ""
}

var action = regexp.MustCompile(`\{\{[^}]*\}\}`)

// plainTemplate reads a template as if its actions were words; lines that are
// nothing but actions go. Not every template can be read so.
func plainTemplate(text string) (map[string]any, bool) {
	var lines []string
	for line := range strings.Lines(text) {
		rest := action.ReplaceAllString(line, "")
		if strings.TrimSpace(rest) == "" && rest != line {
			continue
		}
		lines = append(lines, action.ReplaceAllString(line, "x"))
	}
	var node yaml.Node
	if yaml.Unmarshal([]byte(strings.Join(lines, "")), &node) != nil || node.Kind == 0 {
		return nil, false
	}
	var m map[string]any
	if decode(&node, &m) != nil {
		return nil, false
	}
	return m, m != nil
}
