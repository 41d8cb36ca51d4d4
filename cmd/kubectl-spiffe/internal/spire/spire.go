// Package spire recognizes SPIRE's parts in a cluster: by their images, since
// names and labels are whatever the chart or a hand made them.
//
// It promises not to take spiffe-node's parts for SPIRE's. An image that was
// renamed is not recognized.
package spire

import (
	"strings"

	corev1 "k8s.io/api/core/v1"
)

// Part is a part of SPIRE.
type Part string

// The parts.
const (
	Agent             Part = "SPIRE Agent"
	CSIDriver         Part = "SPIFFE CSI driver"
	Server            Part = "SPIRE Server"
	ControllerManager Part = "SPIRE Controller Manager"
)

// images are the names that images of the parts have, whatever registry and
// suffix a mirror gave them.
var images = []struct {
	name string
	part Part
}{
	{"spire-controller-manager", ControllerManager},
	{"spiffe-csi-driver", CSIDriver},
	{"spire-agent", Agent},
	{"spire-server", Server},
}

// OwnLabel and OwnName are on everything of spiffe-node.
const (
	OwnLabel = "app.kubernetes.io/name"
	OwnName  = "spiffe-node"
)

// Of is the part of SPIRE an image is; "" = none.
func Of(image string) Part {
	image, _, _ = strings.Cut(image, "@")
	image = image[strings.LastIndex(image, "/")+1:]
	image, _, _ = strings.Cut(image, ":")
	for _, i := range images {
		if strings.HasPrefix(image, i.name) {
			return i.part
		}
	}
	return ""
}

// Container is the container of a pod that is the part; nil if it has none or
// the pod is spiffe-node's.
func Container(labels map[string]string, spec *corev1.PodSpec, part Part) *corev1.Container {
	if labels[OwnLabel] == OwnName {
		return nil
	}
	for i := range spec.Containers {
		if Of(spec.Containers[i].Image) == part {
			return &spec.Containers[i]
		}
	}
	return nil
}

// Argument is the value of a container's flag, written -name value, --name
// value or with =; "" = it is not given.
func Argument(c *corev1.Container, name string) string {
	all := append(append([]string{}, c.Command...), c.Args...)
	for i, a := range all {
		flag, value, joined := strings.Cut(strings.TrimLeft(a, "-"), "=")
		switch {
		case !strings.HasPrefix(a, "-") || flag != name:
		case joined:
			return value
		case i+1 < len(all):
			return all[i+1]
		}
	}
	return ""
}

// HostDirectory is the directory of the host that is mounted where dir is in a
// container. The second result says what is there instead, if it is not one of
// the host; "" = nothing is mounted there.
func HostDirectory(spec *corev1.PodSpec, c *corev1.Container, dir string) (host, instead string) {
	best := -1
	for _, m := range c.VolumeMounts {
		at := strings.TrimSuffix(m.MountPath, "/")
		if dir != at && !strings.HasPrefix(dir, at+"/") || len(at) <= best {
			continue
		}
		for _, v := range spec.Volumes {
			if v.Name != m.Name {
				continue
			}
			best = len(at)
			if v.HostPath == nil {
				host, instead = "", "the volume "+v.Name
				continue
			}
			host, instead = strings.TrimSuffix(v.HostPath.Path, "/")+strings.TrimPrefix(dir, at), ""
		}
	}
	return host, instead
}
