package sds_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/spiffe-node/spiffe-node/pkg/sds"
)

func TestConfig(t *testing.T) {
	l := newLayer(nil)
	ok := sds.Config{Subscribe: l.subscribe, Snapshot: l.snapshot}
	with := func(n sds.Names) sds.Config {
		c := ok
		c.Names = n
		return c
	}
	tests := []struct {
		name   string
		config sds.Config
		fails  string
		warns  bool
	}{
		{"no Subscribe", sds.Config{Snapshot: l.snapshot}, "Subscribe", false},
		{"no Snapshot", sds.Config{Subscribe: l.subscribe}, "Snapshot", false},
		{"all off", with(sds.Names{}), "", false},
		{"usual", with(sds.DefaultNames()), "", false},
		{"istio federation", with(sds.Names{SVID: "default", Bundle: "null", AllBundles: "ROOTCA"}), "", false},
		{"colliding bundles", with(sds.Names{Bundle: "ROOTCA", AllBundles: "ROOTCA"}), "", true},
		{"svid is bundle", with(sds.Names{SVID: "x", Bundle: "x"}), "also the name", false},
		{"svid is all", with(sds.Names{SVID: "x", AllBundles: "x"}), "also the name", false},
		{"star", with(sds.Names{SVID: "*"}), "meaning of its own", false},
		{"spiffe id", with(sds.Names{Bundle: "spiffe://td"}), "meaning of its own", false},
		{"endless", with(sds.Names{Bundle: strings.Repeat("x", 5000)}), "longer than", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var log bytes.Buffer
			tt.config.Logger = slog.New(slog.NewTextHandler(&log, nil))
			_, err := sds.New(tt.config)
			if (err == nil) != (tt.fails == "") || err != nil && !strings.Contains(err.Error(), tt.fails) {
				t.Errorf("error %v, want %q", err, tt.fails)
			}
			if warned := strings.Contains(log.String(), "collide"); warned != tt.warns {
				t.Errorf("warned = %v:\n%s", warned, &log)
			}
		})
	}
}

// series is the value of each series with labels, summed where there are more.
func series(t *testing.T, reg *prometheus.Registry) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	out := make(map[string]float64)
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := strings.TrimPrefix(f.GetName(), "spiffe_node_sds_")
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			out[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
		}
	}
	return out
}

func TestMetrics(t *testing.T) {
	w := newWorld(t)
	l := newLayer(w.has())
	reg := prometheus.NewRegistry()
	srv, conn := serve(t, l, func(c *sds.Config) { c.Metrics = sds.NewMetrics(reg); c.FetchWait = -1 })
	e := openStream(t, conn)
	names := []string{"default", "ROOTCA", "file-root:system"}
	e.send(ask(names...))
	r := e.recv()
	e.ack(r, names...)
	eventually(t, "parked and acknowledged", func() bool {
		got := series(t, reg)
		return got["parked_streams"] == 1 && got["verdicts_total sotw ack"] == 1
	})
	l.set(w.has(w.web))
	r = e.recv()
	q := nack(names...)
	q.ResponseNonce = r.GetNonce()
	e.send(q)
	eventually(t, "rejected", func() bool { return series(t, reg)["verdicts_total sotw nack"] == 1 })
	l.set(w.has())
	e.ends()
	eventually(t, "gone", func() bool { return len(srv.Streams()) == 0 && series(t, reg)["streams sotw"] == 0 })
	for _, names := range [][]string{{"default"}, {"ROOTCA"}, {"x"}} {
		_, _ = fetchOnce(t, conn, names...)
	}
	got := series(t, reg)
	want := map[string]float64{
		"streams sotw": 0, "parked_streams": 0, "responses_total first sotw": 1, "responses_total change sotw": 1,
		"verdicts_total sotw ack": 1, "verdicts_total sotw nack": 1, "stream_ends_total sotw withdrawn": 1,
		"unknown_names_total": 1, "secrets_encoded_total": 2, "panics_total": 0,
		"first_secret_seconds identity": 1, "first_secret_seconds bundle": 1,
		"fetches_total late": 1, "fetches_total served": 1, "fetches_total unknown_name": 1,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("series (-want +got):\n%s", diff)
	}
}
