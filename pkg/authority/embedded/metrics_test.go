package embedded_test

import (
	"context"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// series are all values of a registry, by name and labels.
func series(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += "," + l.GetName() + "=" + l.GetValue()
			}
			switch {
			case m.GetCounter() != nil:
				out[name] = m.GetCounter().GetValue()
			case m.GetGauge() != nil:
				out[name] = m.GetGauge().GetValue()
			case m.GetHistogram() != nil:
				out[name] = float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return out
}

func TestMetrics(t *testing.T) {
	reg := prometheus.NewRegistry()
	s := embedded.NewMemoryStore()
	a := inMemory(t, s, embedded.Config{Metrics: embedded.NewMetrics(reg)})
	e := mustCreate(t, a, newEntry("/w"))
	sign(t, a, e)
	if _, err := a.SignJWT(t.Context(), authority.JWTRequest{EntryID: "nobody"}); err == nil {
		t.Error("signed for nobody")
	}
	s.Fail(errDisk)
	if err := a.RotateNow(context.Background()); err == nil {
		t.Error("rotated without a disk")
	}
	x509, err := a.X509Authorities()
	if err != nil {
		t.Fatal(err)
	}
	got := series(t, reg)
	for name, want := range map[string]float64{
		"spiffe_node_authority_svids_signed_total,kind=x509,outcome=ok":                 1,
		"spiffe_node_authority_svids_signed_total,kind=jwt,outcome=refused":             1,
		"spiffe_node_authority_svids_signed_total,kind=jwt,outcome=ok":                  0,
		"spiffe_node_authority_state_write_seconds,outcome=ok":                          3,
		"spiffe_node_authority_state_write_seconds,outcome=error":                       1,
		"spiffe_node_authority_entries":                                                 1,
		"spiffe_node_authority_bundle_sequence":                                         1,
		"spiffe_node_authority_ca_rotations_total,kind=x509,outcome=ok,step=replace":    1,
		"spiffe_node_authority_ca_rotations_total,kind=x509,outcome=error,step=prepare": 1,
		"spiffe_node_authority_ca_expiry_timestamp_seconds,kind=x509":                   float64(x509.Active.ExpiresAt.Unix()),
	} {
		if v, ok := got[name]; !ok || v != want {
			t.Errorf("%s = %v, want %v", name, v, want)
		}
	}
}
