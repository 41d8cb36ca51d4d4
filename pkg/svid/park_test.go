package svid_test

import (
	"errors"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

func TestParkedCallerIsReported(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		type report struct {
			who  attest.Subject
			what string
			at   time.Time
		}
		var mu sync.Mutex
		var all []report
		reports := func() []report {
			mu.Lock()
			defer mu.Unlock()
			return slices.Clone(all)
		}
		w := run(t, newAuthority(), newEntries(), func(c *svid.Config) {
			c.OnLate = func(s attest.Subject, what string, since time.Time) {
				mu.Lock()
				defer mu.Unlock()
				all = append(all, report{s, what, since})
			}
		})
		c := newCaller("web", "unix:user:web")
		s, quick := w.subscribe(c), w.subscribe(newCaller("quick"))
		start := time.Now()
		must(s.Park("default"))
		must(quick.Park("default"))
		advance(9 * time.Second)
		quick.Unpark()
		must(s.Park("spiffe://example.org/web"))
		if in, _ := w.m.Inspect(c); len(in.Waiting) != 1 || in.Waiting[0].What != "spiffe://example.org/web" || !in.Waiting[0].Since.Equal(start) {
			t.Errorf("%+v", in.Waiting)
		}
		if got := reports(); len(got) != 0 {
			t.Fatalf("too early: %+v", got)
		}
		advance(time.Second)
		if got := reports(); len(got) != 1 || got[0].who != attest.Subject(c) || got[0].what != "spiffe://example.org/web" || !got[0].at.Equal(start) {
			t.Fatalf("%+v", got)
		}
		advance(time.Hour)
		if got := reports(); len(got) != 1 {
			t.Errorf("reported %d times", len(got))
		}
		s.Unpark()
		s.Unpark()
		must(s.Park("again"))
		advance(11 * time.Second)
		if got := reports(); len(got) != 2 {
			t.Errorf("%d reports of 2 waits", len(got))
		}
	})
}

func TestParkedCallersAreLimitedPerPod(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := run(t, newAuthority(), newEntries(), func(c *svid.Config) { c.MaxParked = 3 })
		var all []*stream
		for range 3 {
			s := w.subscribe(newCaller("web"))
			must(s.Park("x"))
			must(s.Park("x"))
			all = append(all, s)
		}
		over := w.subscribe(newCaller("web"))
		if err := over.Park("x"); !errors.Is(err, svid.ErrOverLimit) {
			t.Fatalf("got %v", err)
		}
		other := w.subscribe(newCaller("other"))
		must(other.Park("x"))
		all[0].Close()
		must(over.Park("x"))
		if n := w.m.Status().Parked; n != 4 {
			t.Errorf("%d parked", n)
		}
		for _, s := range append(all, over, other) {
			s.Close()
			must(s.Park("after close"))
		}
		if n := w.m.Status().Parked; n != 0 {
			t.Errorf("%d parked after all have gone", n)
		}
	})
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		reg := prometheus.NewPedanticRegistry()
		w := run(t, newAuthority(), newEntries(), func(c *svid.Config) { c.Metrics = svid.NewMetrics(reg) })
		synctest.Wait()
		s := w.subscribe(newCaller("web", "unix:user:web"))
		must(s.Park("default"))
		advance(3 * time.Second)
		if v := series(t, reg, "spiffe_node_svid_parked_callers"); v != 1 {
			t.Errorf("parked: %v", v)
		}
		w.entries.put(workload("web"))
		synctest.Wait()
		s.Unpark()
		for name, want := range map[string]float64{
			"spiffe_node_svid_parked_callers":                     0,
			"spiffe_node_svid_first_seconds":                      3,
			"spiffe_node_svid_first_expiry_seconds":               3600,
			"spiffe_node_svid_last_signed_timestamp_seconds":      float64(time.Now().Unix()),
			"spiffe_node_svid_x509_requests_total first ok":       1,
			"spiffe_node_svid_x509_requests_total renewal ok":     0,
			"spiffe_node_svid_expired_total":                      0,
			"spiffe_node_svid_x509_requests_total first refused":  0,
			"spiffe_node_svid_x509_requests_total renewal failed": 0,
			"spiffe_node_svid_park_over_limit_total":              0,
			"spiffe_node_svid_late_callers_total":                 0,
		} {
			if got := series(t, reg, name); got != want {
				t.Errorf("%s is %v, want %v", name, got, want)
			}
		}
		w.ca.set(func() { w.ca.fail = func(string) error { return errors.New("away") } })
		advance(2 * time.Hour)
		if v := series(t, reg, "spiffe_node_svid_expired_total"); v != 1 {
			t.Errorf("expired: %v", v)
		}
		if v := series(t, reg, "spiffe_node_svid_x509_requests_total renewal failed"); v < 10 {
			t.Errorf("failed renewals: %v", v)
		}
	})
}

// series is the value of one series: its name and label values; of a histogram
// the sum.
func series(t *testing.T, reg *prometheus.Registry, name string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			full := f.GetName()
			for _, l := range m.GetLabel() {
				full += " " + l.GetValue()
			}
			if full != name {
				continue
			}
			switch f.GetType() {
			case dto.MetricType_HISTOGRAM:
				return m.GetHistogram().GetSampleSum()
			case dto.MetricType_COUNTER:
				return m.GetCounter().GetValue()
			default:
				return m.GetGauge().GetValue()
			}
		}
	}
	t.Fatalf("no series %q", name)
	return 0
}
