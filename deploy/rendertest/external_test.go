package rendertest_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"

	"github.com/spiffe-node/spiffe-node/internal/config"
)

// TestExternal: what the values say of a SPIRE Server is what the agent does,
// and what it needs for that is there, and no more.
func TestExternal(t *testing.T) {
	server := func(variant string) (config.SpireServer, *rendered) {
		t.Helper()
		r := render(t, variants[variant]...)
		c, err := config.Parse("agent.yaml", []byte(find[*corev1.ConfigMap](t, r, "spiffe-node").Data["agent.yaml"]), nil)
		if err != nil {
			t.Fatal(err)
		}
		return c.Authority.SpireServer, r
	}
	volumes := func(r *rendered) []string {
		t.Helper()
		var out []string
		for _, v := range find[*appsv1.DaemonSet](t, r, "spiffe-node").Spec.Template.Spec.Volumes {
			out = append(out, v.Name)
		}
		return out
	}

	s, r := server("external")
	if s.TrustBundle.Path != "/run/spire/bundle/bundle.spiffe" || s.NodeAttestation.Type != config.AttestPSAT || s.Rebootstrap.Mode != config.RebootstrapAuto {
		t.Errorf("by default: %+v", s)
	}
	if v := volumes(r); !slices.Contains(v, "bundle") || !slices.Contains(v, "token") || slices.Contains(v, "x509pop") {
		t.Errorf("by default: volumes %v", v)
	}
	for _, o := range r.objects {
		if o.raw.GetKind() == "Role" && strings.HasSuffix(o.raw.GetName(), "spire-agent-bundle") {
			t.Error("agents may read a ConfigMap they do not need")
		}
	}

	s, r = server("external, tuned")
	m := s.TrustBundle.ConfigMap
	if m.Namespace != "spire" || m.Name != "spire-bundle" || m.Key != "bundle.crt" || s.TrustBundle.Path != "" || s.TrustBundle.Format != "pem" {
		t.Errorf("trust bundle: %+v", s.TrustBundle)
	}
	a := s.NodeAttestation
	if a.Type != config.AttestX509POP || a.CertificatePath != "/run/spiffe-node-x509pop/node.crt" || a.IntermediatesPath != "/run/spiffe-node-x509pop/ca.crt" {
		t.Errorf("node attestation: %+v", a)
	}
	if !s.RequirePQKEM || s.Rebootstrap.Mode != config.RebootstrapAlways || time.Duration(s.Rebootstrap.Delay) != 10*time.Minute ||
		time.Duration(s.SyncInterval) != 10*time.Second || s.WithdrawConfirm != 0 {
		t.Errorf("settings: %+v", s)
	}
	if v := volumes(r); slices.Contains(v, "bundle") || slices.Contains(v, "token") || !slices.Contains(v, "x509pop") {
		t.Errorf("volumes %v", v)
	}
	for _, o := range r.objects {
		if o.raw.GetKind() == "Role" && o.raw.GetNamespace() == "spire" {
			role := find[*rbacv1.Role](t, r, o.raw.GetName())
			if len(role.Rules) != 1 || !slices.Equal(role.Rules[0].ResourceNames, []string{"spire-bundle"}) || !slices.Equal(role.Rules[0].Verbs, []string{"get"}) {
				t.Errorf("agents may %+v", role.Rules)
			}
			binding := find[*rbacv1.RoleBinding](t, r, o.raw.GetName())
			if binding.Namespace != "spire" || binding.Subjects[0].Namespace != namespace {
				t.Errorf("bound to %+v", binding.Subjects)
			}
			m.Name = ""
		}
	}
	if m.Name != "" {
		t.Error("nobody lets the agents read the ConfigMap")
	}

	s, r = server("external, https")
	if s.TrustBundle.URL != "https://bundles.example.org/bundle.json" || s.TrustBundle.Path != "" || s.TrustBundle.Format != "spiffe" {
		t.Errorf("https: %+v", s.TrustBundle)
	}
	if slices.Contains(volumes(r), "bundle") {
		t.Error("a bundle is mounted that nobody reads")
	}
}
