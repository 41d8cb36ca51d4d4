package spire_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/spire"
)

func TestOf(t *testing.T) {
	t.Parallel()
	for image, want := range map[string]spire.Part{
		"ghcr.io/spiffe/spire-agent:1.15.3":                        spire.Agent,
		"spire-agent":                                              spire.Agent,
		"mirror:5000/x/spire-agent-fips@sha256:abc":                spire.Agent,
		"ghcr.io/spiffe/spiffe-csi-driver:0.2.7":                   spire.CSIDriver,
		"ghcr.io/spiffe/spire-controller-manager:0.7.0":            spire.ControllerManager,
		"ghcr.io/spiffe/spire-server:1.15.3":                       spire.Server,
		"ghcr.io/spiffe-node/sds-agent:v1":                         "",
		"registry.k8s.io/sig-storage/csi-node-driver-registrar:v2": "",
		"": "",
	} {
		if got := spire.Of(image); got != want {
			t.Errorf("%s is %q, want %q", image, got, want)
		}
	}
}

func TestHostDirectory(t *testing.T) {
	t.Parallel()
	spec := &corev1.PodSpec{Volumes: []corev1.Volume{
		{Name: "tmp"},
		{Name: "sockets", VolumeSource: corev1.VolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: "/run/spire/agent-sockets/"}}},
	}}
	c := &corev1.Container{
		Args:         []string{"-config", "/etc/agent.conf", "--socketPath=/x"},
		VolumeMounts: []corev1.VolumeMount{{Name: "tmp", MountPath: "/tmp"}, {Name: "sockets", MountPath: "/tmp/spire-agent/public"}},
	}
	for dir, want := range map[string][2]string{
		"/tmp/spire-agent/public":     {"/run/spire/agent-sockets", ""},
		"/tmp/spire-agent/public/sub": {"/run/spire/agent-sockets/sub", ""},
		"/tmp/spire-agent/publican":   {"", "the volume tmp"},
		"/run":                        {"", ""},
	} {
		if host, instead := spire.HostDirectory(spec, c, dir); host != want[0] || instead != want[1] {
			t.Errorf("%s: %q, %q", dir, host, instead)
		}
	}
	for name, want := range map[string]string{"config": "/etc/agent.conf", "socketPath": "/x", "none": ""} {
		if got := spire.Argument(c, name); got != want {
			t.Errorf("-%s is %q", name, got)
		}
	}
}
