package registration_test

import (
	"fmt"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/spiffe-node/spiffe-node/pkg/registration"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

const (
	benchPods       = 30_000
	benchRules      = 1_000
	benchNamespaces = 300
	benchNodes      = 300
)

func benchPod(i int) *corev1.Pod {
	return pod(fmt.Sprintf("ns%d/p%d", i%benchNamespaces, i), fmt.Sprintf("n%d", i%benchNodes), "app", fmt.Sprintf("app%d", i%benchRules), "spiffe.io/spire-managed-identity", "true")
}

func benchRule(i int) *v1alpha1.ClusterSPIFFEID {
	return spiffeID(fmt.Sprintf("r%d", i), i, func(s *v1alpha1.ClusterSPIFFEIDSpec) {
		s.SPIFFEIDTemplate = fmt.Sprintf("spiffe://{{ .TrustDomain }}/r%d/{{ .PodMeta.Namespace }}/{{ .PodSpec.ServiceAccountName }}", i)
		s.PodSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"app": fmt.Sprintf("app%d", i)}}
		if i == 0 { // the one for everybody
			s.PodSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"spiffe.io/spire-managed-identity": "true"}}
		}
	})
}

// benchEngine is a big cluster in step.
func benchEngine(tb testing.TB) (*registration.Engine, *fakeAuthority) {
	tb.Helper()
	a := newFake()
	e := newEngine(tb, a)
	for i := range benchNamespaces {
		e.SetNamespace(namespace(fmt.Sprintf("ns%d", i)))
	}
	for i := range benchNodes {
		e.SetNode(node(fmt.Sprintf("n%d", i)))
	}
	for i := range benchRules {
		e.SetSPIFFEID(benchRule(i))
	}
	for i := range benchPods {
		e.SetPod(benchPod(i))
	}
	start(tb, e)
	return e, a
}

// BenchmarkStart is the first computation: 30,000 pods, 1,000 resources.
func BenchmarkStart(b *testing.B) {
	for b.Loop() {
		_, a := benchEngine(b)
		b.ReportMetric(float64(a.Set().Len()), "entries")
	}
}

// BenchmarkPod is one pod that comes and goes in that cluster.
func BenchmarkPod(b *testing.B) {
	e, _ := benchEngine(b)
	b.ResetTimer()
	for b.Loop() {
		e.SetPod(pod("ns1/new", "n1", "app", "app7", "spiffe.io/spire-managed-identity", "true"))
		e.Step()
		e.DeletePod("ns1/new")
		e.Step()
	}
}

// BenchmarkPodStatus is a change that templates do not see.
func BenchmarkPodStatus(b *testing.B) {
	e, _ := benchEngine(b)
	p := benchPod(7)
	b.ResetTimer()
	for b.Loop() {
		e.SetPod(p)
		e.Step()
	}
}

// BenchmarkRule is a resource for 30 pods whose template changes.
func BenchmarkRule(b *testing.B) {
	e, _ := benchEngine(b)
	c := benchRule(7)
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		c.Generation++
		c.Spec.Hint = fmt.Sprint(i)
		e.SetSPIFFEID(c)
		e.Step()
	}
}

// BenchmarkRuleForAll is the resource for all 30,000.
func BenchmarkRuleForAll(b *testing.B) {
	e, _ := benchEngine(b)
	c := benchRule(0)
	b.ResetTimer()
	for i := 0; b.Loop(); i++ {
		c.Generation++
		c.Spec.Hint = fmt.Sprint(i)
		e.SetSPIFFEID(c)
		e.Step()
	}
}
