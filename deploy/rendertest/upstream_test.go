package rendertest_test

import (
	"slices"
	"strings"
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"

	"github.com/spiffe-node/spiffe-node/internal/config"
)

// TestUpstream: the files that the configuration names are where the pod mounts
// them, and a Secret can be changed under a running authority.
func TestUpstream(t *testing.T) {
	for name, want := range map[string]config.Upstream{
		"default": {},
		"company": {Disk: config.UpstreamDisk{
			CertFile: "/run/spire/upstream_ca/tls.crt", KeyFile: "/run/spire/upstream_ca/tls.key", BundleFile: "/run/spire/upstream_ca/bundle.crt",
		}},
		"child": {Parent: config.UpstreamParent{Address: "spire-root.example.org:443", WorkloadAPISocket: "/run/spire/upstream_agent/spire-agent.sock"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := render(t, variants[name]...)
			a, err := config.ParseAuthority("authority.yaml", []byte(find[*corev1.ConfigMap](t, r, "spire-server").Data["authority.yaml"]), nil)
			if err != nil {
				t.Fatal(err)
			}
			if a.Embedded.Upstream != want {
				t.Errorf("%+v", a.Embedded.Upstream)
			}
			pod := find[*appsv1.StatefulSet](t, r, "spire-server").Spec.Template.Spec
			mounts := pod.Containers[0].VolumeMounts
			mount := slices.IndexFunc(mounts, func(m corev1.VolumeMount) bool { return strings.HasPrefix(m.MountPath, "/run/spire/upstream") })
			if want == (config.Upstream{}) {
				if mount >= 0 {
					t.Errorf("mounts %+v", mounts[mount])
				}
				return
			}
			if mount < 0 || !mounts[mount].ReadOnly || mounts[mount].SubPath != "" {
				t.Fatalf("mounts %+v", mounts)
			}
			volume := pod.Volumes[slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == mounts[mount].Name })]
			switch {
			case name == "company" && (volume.Secret == nil || volume.Secret.SecretName != "spiffe-upstream-ca" || *volume.Secret.DefaultMode != 0o440):
				t.Errorf("volume %+v", volume)
			case name == "child" && (volume.CSI == nil || volume.CSI.Driver != "upstream.csi.spiffe.io"):
				t.Errorf("volume %+v", volume)
			}
		})
	}
	r := render(t, append(slices.Clone(variants["company"]), "authority.embedded.upstreamAuthority.disk.secret.bundleKey=")...)
	if text := find[*corev1.ConfigMap](t, r, "spire-server").Data["authority.yaml"]; strings.Contains(text, "bundleFile") {
		t.Error("a root in tls.crt needs no bundle file")
	}
}
