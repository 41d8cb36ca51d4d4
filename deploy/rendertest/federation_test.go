package rendertest_test

import (
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	netv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"github.com/spiffe-node/spiffe-node/internal/config"
)

// istioFederation renders the values that docs/istio.md names.
func istioFederation(t *testing.T) {
	var values map[string]any
	if err := yaml.Unmarshal([]byte(readFile(t, "../istio/values-federation.yaml")), &values); err != nil {
		t.Fatal(err)
	}
	values["global"] = map[string]any{"spire": map[string]any{"trustDomain": "example.org"}}
	r, err := renderChart(chartDir, values)
	if err != nil {
		t.Fatal(err)
	}
	agent, err := config.Parse("agent.yaml", []byte(find[*corev1.ConfigMap](t, r, "spiffe-node").Data["agent.yaml"]), nil)
	if err != nil {
		t.Fatal(err)
	}
	s := agent.SDS
	if diff := cmp.Diff([]string{"default", "null", "ROOTCA"}, []string{*s.DefaultSVIDName, *s.DefaultBundleName, *s.DefaultAllBundlesName}); diff != "" {
		t.Errorf("names (-want +got):\n%s", diff)
	}
}

// TestFederation: port, Service, policy, volume and configuration of the bundle
// endpoint fit together, and are not there when it is off.
func TestFederation(t *testing.T) {
	t.Run("values for Istio", istioFederation)
	for variant, want := range map[string]struct {
		port    int32
		profile string
		secret  string
		from    int
	}{
		"default":                {},
		"federation":             {port: 8443, profile: config.ProfileSPIFFE},
		"federation by a Secret": {port: 9443, profile: config.ProfileWeb, secret: "bundle-tls", from: 1},
	} {
		t.Run(variant, func(t *testing.T) {
			r := render(t, variants[variant]...)
			text := find[*corev1.ConfigMap](t, r, "spire-server").Data["authority.yaml"]
			a, err := config.ParseAuthority("authority.yaml", []byte(text), nil)
			if err != nil {
				t.Fatal(err)
			}
			endpoint := a.Federation.BundleEndpoint
			ports := find[*corev1.Service](t, r, "spire-server").Spec.Ports
			if want.port == 0 {
				if endpoint.Address != "" || len(ports) != 1 {
					t.Errorf("served at %q, ports %v", endpoint.Address, ports)
				}
				return
			}
			if endpoint.Profile != want.profile {
				t.Errorf("profile %q", endpoint.Profile)
			}
			if len(ports) != 2 || ports[1].Name != "federation" || ports[1].Port != want.port || ports[1].TargetPort.StrVal != "federation" {
				t.Errorf("Service: %v", ports)
			}
			spec := find[*appsv1.StatefulSet](t, r, "spire-server").Spec.Template.Spec
			c := spec.Containers[0]
			if !slices.ContainsFunc(c.Ports, func(p corev1.ContainerPort) bool { return p.Name == "federation" && p.ContainerPort == want.port }) {
				t.Errorf("container: %v", c.Ports)
			}
			var secret string
			for _, v := range spec.Volumes {
				if v.Secret != nil {
					secret = v.Secret.SecretName
				}
			}
			mounted := slices.ContainsFunc(c.VolumeMounts, func(m corev1.VolumeMount) bool {
				return m.ReadOnly && m.MountPath+"/tls.crt" == endpoint.CertFile && m.MountPath+"/tls.key" == endpoint.KeyFile
			})
			if secret != want.secret || mounted != (want.secret != "") {
				t.Errorf("secret %q, mounted %t", secret, mounted)
			}
			var open []netv1.NetworkPolicyIngressRule
			for _, in := range find[*netv1.NetworkPolicy](t, r, "spire-server").Spec.Ingress {
				if in.Ports[0].Port.StrVal == "federation" {
					open = append(open, in)
				}
			}
			if len(open) != 1 || len(open[0].From) != want.from {
				t.Errorf("NetworkPolicy: %v", open)
			}
		})
	}
}
