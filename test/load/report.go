package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"text/tabwriter"
	"time"
)

// Row is one figure.
type Row struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
}

// Report is the result of one run.
type Report struct {
	Mode     string            `json:"mode"`
	Label    string            `json:"label"`
	Started  time.Time         `json:"started"`
	Seconds  float64           `json:"seconds"`
	CPUs     int               `json:"cpus"`
	Settings map[string]string `json:"settings"`
	Rows     []Row             `json:"rows"`
	// Errors counts what streams and calls were refused with.
	Errors map[string]int `json:"errors,omitempty"`

	mu sync.Mutex
}

func newReport(name string, o *options) *Report {
	settings := map[string]string{}
	set := func(key string, v any, zero bool) {
		if !zero {
			settings[key] = fmt.Sprint(v)
		}
	}
	set("names", strings.Join(o.names, ","), len(o.names) == 0)
	set("n", o.n, o.n == 0)
	set("parallel", o.parallel, o.parallel == 0)
	set("clients", o.clients, o.clients == 0)
	set("count", o.count, o.count == 0)
	set("retry", o.retry, name != "create")
	set("lead", o.lead, name != "create")
	set("rounds", o.rounds, o.rounds == 0)
	set("as", o.as, o.as == "")
	return &Report{
		Mode: name, Label: o.label, Started: time.Now(), CPUs: runtime.NumCPU(),
		Settings: settings, Errors: map[string]int{},
	}
}

func (r *Report) add(name string, value float64, unit string) {
	if math.IsNaN(value) || math.IsInf(value, 0) {
		return // JSON cannot say it; a figure over nothing is no figure
	}
	r.Rows = append(r.Rows, Row{name, value, unit})
}

func (r *Report) addTimes(name string, d []time.Duration) {
	if len(d) == 0 {
		return
	}
	slices.Sort(d)
	var sum time.Duration
	for _, v := range d {
		sum += v
	}
	r.add(name+", mean", ms(sum)/float64(len(d)), "ms")
	r.add(name+", p50", ms(quantile(d, 0.50)), "ms")
	r.add(name+", p99", ms(quantile(d, 0.99)), "ms")
	r.add(name+", max", ms(d[len(d)-1]), "ms")
}

// quantile is the nearest rank in a sorted list that is not empty.
func quantile(sorted []time.Duration, q float64) time.Duration {
	i := int(math.Ceil(q*float64(len(sorted)))) - 1
	return sorted[min(max(i, 0), len(sorted)-1)]
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func us(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }

// fail counts a refusal. Safe for concurrent use.
func (r *Report) fail(err error) {
	text := err.Error()
	if len(text) > 200 {
		text = text[:200] + "..."
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, known := r.Errors[text]; !known && len(r.Errors) >= 20 {
		text = "(others)"
	}
	r.Errors[text]++
}

func (r *Report) finish(own time.Duration) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.Seconds = time.Since(r.Started).Seconds()
	r.add("client CPU, whole run", own.Seconds(), "s")
}

func (r *Report) print(w io.Writer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Fprintf(w, "%s  %s  (%d CPUs, %.1f s", r.Mode, r.Label, r.CPUs, r.Seconds)
	for _, key := range slices.Sorted(maps.Keys(r.Settings)) {
		fmt.Fprintf(w, ", %s %s", key, r.Settings[key])
	}
	fmt.Fprintln(w, ")")
	width := 0
	for _, row := range r.Rows {
		width = max(width, len(row.Name))
	}
	for _, row := range r.Rows {
		line := fmt.Sprintf("  %-*s  %10s %s", width, row.Name, number(row.Value), row.Unit)
		fmt.Fprintln(w, strings.TrimRight(line, " "))
	}
	for _, text := range slices.Sorted(maps.Keys(r.Errors)) {
		fmt.Fprintf(w, "  refused %d times: %s\n", r.Errors[text], text)
	}
}

// number has three digits or all before the point.
func number(v float64) string {
	switch a := math.Abs(v); {
	case a >= 100 || v == math.Trunc(v):
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}

func (r *Report) save(path string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	data, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("-o: %w", err)
	}
	if err := os.WriteFile(path, append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("-o: %w", err)
	}
	return nil
}

// compare prints the rows of several reports side by side; ratios are to the
// first.
func compare(paths []string, w io.Writer) error {
	if len(paths) < 2 {
		return fmt.Errorf("%w: compare needs two files or more", errUsage)
	}
	reports := make([]*Report, len(paths))
	for i, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("compare: %w", err)
		}
		reports[i] = &Report{}
		if err := json.Unmarshal(data, reports[i]); err != nil {
			return fmt.Errorf("compare %s: %w", path, err)
		}
		if reports[i].Mode != reports[0].Mode {
			return fmt.Errorf("compare: %s is of mode %s, %s of mode %s", paths[0], reports[0].Mode, path, reports[i].Mode)
		}
	}
	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprint(tw, reports[0].Mode)
	for _, r := range reports {
		fmt.Fprintf(tw, "\t%s", r.Label)
	}
	for i := range reports[1:] {
		fmt.Fprintf(tw, "\t%d:1", i+2)
	}
	fmt.Fprintln(tw)
	for _, row := range reports[0].Rows {
		fmt.Fprintf(tw, "%s (%s)", row.Name, row.Unit)
		var ratios strings.Builder
		for i := range reports {
			v, ok := reports[i].value(row.Name)
			if !ok {
				fmt.Fprint(tw, "\t-")
			} else {
				fmt.Fprintf(tw, "\t%s", number(v))
			}
			if i > 0 {
				ratios.WriteString("\t" + ratio(v, row.Value, ok))
			}
		}
		fmt.Fprintln(tw, ratios.String())
	}
	return tw.Flush()
}

func (r *Report) value(name string) (float64, bool) {
	for _, row := range r.Rows {
		if row.Name == name {
			return row.Value, true
		}
	}
	return 0, false
}

func ratio(v, first float64, ok bool) string {
	if !ok || first <= 0 || v <= 0 {
		return "-"
	}
	return fmt.Sprintf("%.2f", v/first)
}
