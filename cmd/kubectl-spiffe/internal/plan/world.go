package plan

import (
	"path"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	nodev1 "k8s.io/api/node/v1"
	storagev1 "k8s.io/api/storage/v1"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/check"
	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/spire"
	"github.com/spiffe-node/spiffe-node/internal/migrate/agentconf"
)

// workload is something that makes pods.
type workload struct {
	kind, namespace, name string
	labels                map[string]string
	template              corev1.PodTemplateSpec
}

func (w workload) String() string { return w.kind + " " + w.namespace + "/" + w.name }

// world is the input, sorted by kind.
type world struct {
	in   Input
	plan Plan

	workloads   []workload
	pods        []corev1.Pod
	nodeObjects []corev1.Node
	configMaps  []corev1.ConfigMap
	csiDrivers  []storagev1.CSIDriver
	handlers    map[string]string // of runtime classes

	agent     *workload
	container *corev1.Container
	driver    *workload
	config    *agentconf.Result
	server    *agentconf.Server
	registers bool        // our authority registers pods
	old       []*workload // every SPIRE Agent and driver
}

func newWorld(in Input) *world {
	w := &world{in: in, handlers: map[string]string{}}
	w.plan = Plan{Blockers: []Remark{}, Warnings: []Remark{}, Nodes: []Node{}, Steps: []Step{}, Differs: []string{}}
	for i := range in.Objects {
		w.take(&in.Objects[i])
	}
	return w
}

func (w *world) take(o *check.Object) {
	var err error
	switch o.Kind {
	case "DaemonSet":
		var d appsv1.DaemonSet
		if d, err = check.Typed[appsv1.DaemonSet](o); err == nil {
			w.workloads = append(w.workloads, workload{o.Kind, d.Namespace, d.Name, d.Labels, d.Spec.Template})
		}
	case "StatefulSet":
		var s appsv1.StatefulSet
		if s, err = check.Typed[appsv1.StatefulSet](o); err == nil {
			w.workloads = append(w.workloads, workload{o.Kind, s.Namespace, s.Name, s.Labels, s.Spec.Template})
		}
	case "Deployment":
		var d appsv1.Deployment
		if d, err = check.Typed[appsv1.Deployment](o); err == nil {
			w.workloads = append(w.workloads, workload{o.Kind, d.Namespace, d.Name, d.Labels, d.Spec.Template})
		}
	case "Pod":
		err = add(&w.pods, o)
	case "Node":
		err = add(&w.nodeObjects, o)
	case "ConfigMap":
		w.registers = w.registers || o.Registers()
		err = add(&w.configMaps, o)
	case "CSIDriver":
		err = add(&w.csiDrivers, o)
	case "RuntimeClass":
		var r nodev1.RuntimeClass
		if r, err = check.Typed[nodev1.RuntimeClass](o); err == nil {
			w.handlers[r.Name] = r.Handler
		}
	case "ClusterSPIFFEID":
		w.plan.Found.ClusterSPIFFEIDs++
		type spec struct {
			Spec struct {
				ClassName string `json:"className"`
			} `json:"spec"`
		}
		var s spec
		if s, err = check.Typed[spec](o); err == nil && !slices.Contains(w.plan.Found.Classes, s.Spec.ClassName) {
			w.plan.Found.Classes = append(w.plan.Found.Classes, s.Spec.ClassName)
		}
	}
	if err != nil {
		w.warn(o.String()+" does not fit its kind: "+err.Error(), "Correct the field that is named.")
	}
}

func add[T any](to *[]T, o *check.Object) error {
	v, err := check.Typed[T](o)
	if err == nil {
		*to = append(*to, v)
	}
	return err
}

// Reference names a ConfigMap.
type Reference struct{ Namespace, Name string }

// ConfigMaps are those that SPIRE's parts among the objects are configured by.
func ConfigMaps(objects []check.Object) []Reference {
	w := newWorld(Input{Objects: objects})
	var out []Reference
	for i := range w.workloads {
		k := &w.workloads[i]
		for _, part := range []spire.Part{spire.Agent, spire.Server, spire.ControllerManager} {
			if spire.Container(k.template.Labels, &k.template.Spec, part) == nil {
				continue
			}
			for _, v := range k.template.Spec.Volumes {
				if v.ConfigMap == nil {
					continue
				}
				if r := (Reference{k.namespace, v.ConfigMap.Name}); !slices.Contains(out, r) {
					out = append(out, r)
				}
			}
		}
	}
	return out
}

// configOf is the text a container is configured by: the file of its -config
// flag, as a ConfigMap has it. The second result names the ConfigMap.
func (w *world) configOf(k *workload, c *corev1.Container, usual string) (text, from string) {
	file := spire.Argument(c, "config")
	if file == "" {
		file = usual
	}
	for _, m := range c.VolumeMounts {
		at := strings.TrimSuffix(m.MountPath, "/")
		if file != at && !strings.HasPrefix(file, at+"/") {
			continue
		}
		key := path.Base(file)
		if m.SubPath != "" {
			key = path.Base(m.SubPath)
		}
		for _, v := range k.template.Spec.Volumes {
			if v.Name != m.Name || v.ConfigMap == nil {
				continue
			}
			for _, item := range v.ConfigMap.Items {
				if item.Path == key {
					key = item.Key
				}
			}
			from = k.namespace + "/" + v.ConfigMap.Name
			for i := range w.configMaps {
				cm := &w.configMaps[i]
				if cm.Namespace == k.namespace && cm.Name == v.ConfigMap.Name {
					return cm.Data[key], from
				}
			}
		}
	}
	return "", from
}

func (w *world) isOldAgent(p *corev1.Pod) bool {
	return spire.Container(p.Labels, &p.Spec, spire.Agent) != nil
}

func (w *world) isDriver(p *corev1.Pod) bool {
	return spire.Container(p.Labels, &p.Spec, spire.CSIDriver) != nil || p.Labels[spire.OwnLabel] == spire.OwnName
}

func isOurAgent(p *corev1.Pod) bool {
	return p.Labels[spire.OwnLabel] == spire.OwnName && slices.ContainsFunc(p.Spec.Containers, func(c corev1.Container) bool { return c.Name == "sds-agent" })
}

func (w *world) hasVolume(p *corev1.Pod) bool {
	return slices.ContainsFunc(p.Spec.Volumes, func(v corev1.Volume) bool {
		return v.CSI != nil && (v.CSI.Driver == w.plan.Found.PluginName || w.plan.Found.PluginName == "" && v.CSI.Driver == "csi.spiffe.io")
	})
}

// mountsSocket says whether a pod mounts the host's socket directory, or what it
// is in.
func (w *world) mountsSocket(p *corev1.Pod) bool {
	dir := w.plan.Found.SocketDirectory
	return dir != "" && slices.ContainsFunc(p.Spec.Volumes, func(v corev1.Volume) bool {
		if v.HostPath == nil {
			return false
		}
		at := strings.TrimSuffix(v.HostPath.Path, "/")
		return at == dir || strings.HasPrefix(at, dir+"/")
	})
}

// controllerConfig reads a ControllerManagerConfig out of a ConfigMap.
func controllerConfig(data map[string]string) (className string, classless bool, ok bool) {
	for _, key := range sortedKeys(data) {
		var c struct {
			Kind           string `yaml:"kind"`
			ClassName      string `yaml:"className"`
			WatchClassless bool   `yaml:"watchClassless"`
		}
		if yaml.Unmarshal([]byte(data[key]), &c) == nil && c.Kind == "ControllerManagerConfig" {
			return c.ClassName, c.WatchClassless, true
		}
	}
	return "", false, false
}
