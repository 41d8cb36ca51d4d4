package rendertest_test

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"

	"github.com/spiffe-node/spiffe-node/internal/config"
)

// TestMachines: certificates of machines outside the cluster count where they
// are asked for, by the file that the pod mounts, and the port lets them in;
// the cluster's own agents attest as before.
func TestMachines(t *testing.T) {
	for _, name := range []string{"default", "machines"} {
		t.Run(name, func(t *testing.T) {
			r := render(t, variants[name]...)
			a, err := config.ParseAuthority("authority.yaml", []byte(find[*corev1.ConfigMap](t, r, "spire-server").Data["authority.yaml"]), nil)
			if err != nil {
				t.Fatal(err)
			}
			if a.NodeAttestation.K8sPSAT.Cluster == "" {
				t.Error("agents of the cluster cannot attest")
			}
			pod := find[*appsv1.StatefulSet](t, r, "spire-server").Spec.Template.Spec
			mount := slices.IndexFunc(pod.Containers[0].VolumeMounts, func(m corev1.VolumeMount) bool { return m.Name == "x509pop" })
			if name == "default" {
				if a.NodeAttestation.X509PoP.Mode != "" || mount >= 0 {
					t.Errorf("x509pop by default: %+v", a.NodeAttestation.X509PoP)
				}
				return
			}
			if got := a.NodeAttestation.X509PoP; got.Mode != "external_pki" || !slices.Equal(got.CABundlePaths, []string{"/etc/spiffe-node-x509pop/roots.pem"}) {
				t.Errorf("%+v", got)
			}
			if mount < 0 || pod.Containers[0].VolumeMounts[mount].MountPath != "/etc/spiffe-node-x509pop" || pod.Containers[0].VolumeMounts[mount].SubPath != "" {
				t.Errorf("mounts %+v", pod.Containers[0].VolumeMounts)
			}
			volume := pod.Volumes[slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == "x509pop" })]
			if volume.ConfigMap == nil || volume.ConfigMap.Name != "machines-ca" {
				t.Errorf("volume %+v", volume)
			}
			from := find[*networkingv1.NetworkPolicy](t, r, "spire-server").Spec.Ingress[0].From
			if len(from) != 2 || from[0].PodSelector == nil {
				t.Fatalf("peers %+v", from)
			}
			if diff := cmp.Diff(&networkingv1.IPBlock{CIDR: "192.0.2.0/24"}, from[1].IPBlock); diff != "" {
				t.Error(diff)
			}
		})
	}
}
