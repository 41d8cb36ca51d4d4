package check

import (
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Input is what is checked.
type Input struct {
	Objects []Object
	// Driver is the name of the CSI driver; "" = csi.spiffe.io, or any that
	// ends like it.
	Driver string
	// TrustDomain is the one of the identities; "" = from the objects.
	TrustDomain string
	// Cluster says that Objects is everything there is: what is missing is
	// missing.
	Cluster bool
	// Istio asks for the rules of Istio too.
	Istio bool
	// Unread are kinds that could not be read, with the reason.
	Unread map[string]string
	// Identities are how the pods stand, by namespace/name; those of nodes in Asked are complete.
	Identities map[string]Identity
	// Asked are the nodes whose agents told of them.
	Asked map[string]bool
}

// Identity is how a pod stands with its agent.
type Identity struct {
	Served bool
	Denied string // why, if it is refused for good
}

// Run applies the rules.
func Run(in Input) []Finding {
	w := newWorld(in)
	w.own()
	w.drivers()
	w.pods()
	w.registered()
	w.identities()
	w.beside()
	if in.Istio {
		w.istio()
	}
	for kind, why := range in.Unread {
		w.add(Note, "not-checked", nil, "Ask for permission to read them, or check with an account that may.", "%s could not be read: %s", kind, why)
	}
	return w.sorted()
}

// carrier is a pod, or an object that makes pods.
type carrier struct {
	object *Object
	meta   metav1.ObjectMeta
	spec   corev1.PodSpec
	isPod  bool
	status corev1.PodStatus
}

// world is the input, sorted by kind.
type world struct {
	report
	in        Input
	carriers  []carrier
	drvs      []storagev1.CSIDriver
	drvsAt    []*Object
	nodes     []storagev1.CSINode
	nodesAt   []*Object
	rules     []identityRule
	namespace map[string]map[string]string // labels
	mesh      []mesh
	templates []template
	native    *nativeSidecars
	registers bool   // our authority registers pods
	domain    string // of the identities, "" = unknown
	domainAt  *Object
}

// identityRule is a ClusterSPIFFEID.
type identityRule struct {
	object                *Object
	template              string
	fallback              bool
	namespaceSel, podsSel *metav1.LabelSelector
}

func newWorld(in Input) *world {
	w := &world{in: in, namespace: map[string]map[string]string{}, domain: in.TrustDomain}
	for i := range in.Objects {
		w.take(&in.Objects[i])
	}
	return w
}

// podTemplates is where each kind keeps its pod.
var podTemplates = map[string][]string{
	"Deployment": {"spec", "template"}, "StatefulSet": {"spec", "template"}, "DaemonSet": {"spec", "template"},
	"ReplicaSet": {"spec", "template"}, "ReplicationController": {"spec", "template"}, "Job": {"spec", "template"},
	"CronJob": {"spec", "jobTemplate", "spec", "template"}, "PodTemplate": {"template"}, "Pod": {},
}

func (w *world) take(o *Object) {
	if path, ok := podTemplates[o.Kind]; ok {
		w.takePod(o, dict(o.fields, path...))
		return
	}
	switch o.Kind {
	case "CSIDriver":
		if d, err := typed[storagev1.CSIDriver](o.fields); w.read(o, err) && w.isDriver(d.Name) {
			w.drvs, w.drvsAt = append(w.drvs, d), append(w.drvsAt, o)
		}
	case "CSINode":
		if n, err := typed[storagev1.CSINode](o.fields); w.read(o, err) {
			w.nodes, w.nodesAt = append(w.nodes, n), append(w.nodesAt, o)
		}
	case "Namespace":
		if n, err := typed[corev1.Namespace](o.fields); w.read(o, err) {
			w.namespace[n.Name] = n.Labels
		}
	case "ClusterSPIFFEID":
		w.takeRule(o)
	case "ConfigMap":
		w.registers = w.registers || o.Registers()
		w.takeConfigMap(o)
	case "IstioOperator":
		w.takeOperator(o)
	case "":
		w.takeValues(o)
	}
}

func (w *world) takePod(o *Object, fields map[string]any) {
	if fields == nil {
		return
	}
	p, err := typed[corev1.Pod](fields)
	if !w.read(o, err) {
		return
	}
	c := carrier{object: o, meta: p.ObjectMeta, spec: p.Spec, isPod: o.Kind == "Pod", status: p.Status}
	c.meta.Namespace = o.Namespace
	w.carriers = append(w.carriers, c)
	w.learnNative(&c)
}

func (w *world) takeRule(o *Object) {
	type spec struct {
		SPIFFEIDTemplate  string                `json:"spiffeIDTemplate"`
		Fallback          bool                  `json:"fallback"`
		NamespaceSelector *metav1.LabelSelector `json:"namespaceSelector"`
		PodSelector       *metav1.LabelSelector `json:"podSelector"`
	}
	s, err := typed[spec](dict(o.fields, "spec"))
	if w.read(o, err) {
		w.rules = append(w.rules, identityRule{object: o, template: s.SPIFFEIDTemplate, fallback: s.Fallback, namespaceSel: s.NamespaceSelector, podsSel: s.PodSelector})
	}
}

// read reports what does not fit its kind.
func (w *world) read(o *Object, err error) bool {
	if err != nil {
		w.add(Error, "unreadable", o, "Correct the field that is named.", "does not fit its kind: %v", err)
	}
	return err == nil
}

func (w *world) isDriver(name string) bool {
	if w.in.Driver != "" {
		return name == w.in.Driver
	}
	return name == "csi.spiffe.io" || strings.HasSuffix(name, ".csi.spiffe.io")
}

// volume is the pod's SPIFFE volume, nil if it has none.
func (w *world) volume(spec *corev1.PodSpec) *corev1.Volume {
	i := slices.IndexFunc(spec.Volumes, func(v corev1.Volume) bool { return v.CSI != nil && w.isDriver(v.CSI.Driver) })
	if i < 0 {
		return nil
	}
	return &spec.Volumes[i]
}

// setDomain keeps the first trust domain that is named for identities.
func (w *world) setDomain(td string, o *Object) {
	if w.domain == "" && td != "" {
		w.domain, w.domainAt = td, o
	}
}
