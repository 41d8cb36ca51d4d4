package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) {
	// The workloads of create are this binary.
	if len(os.Args) > 1 && os.Args[1] == "probe" {
		main()
		return
	}
	goleak.VerifyTestMain(m)
}

// openToAll lets other uids through to a file in a test's directory.
func openToAll(t *testing.T, path string) {
	t.Helper()
	if err := os.Chmod(path, 0o777); err != nil {
		t.Fatal(err)
	}
	for dir := filepath.Dir(path); strings.Contains(dir, "Test"); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
}

// load runs the program and returns its table and, if it got that far, its
// report.
func load(t *testing.T, args ...string) (string, *Report, error) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "r.json")
	if len(args) > 0 && args[0] != "compare" {
		args = append(args, "-o", out)
	}
	var stdout, stderr bytes.Buffer
	err := run(t.Context(), args, strings.NewReader(""), &stdout, &stderr)
	t.Logf("load %s\n%s%s%v", strings.Join(args, " "), &stdout, &stderr, err)
	data, readErr := os.ReadFile(out)
	if readErr != nil {
		return stdout.String(), nil, err
	}
	r := &Report{}
	if err := json.Unmarshal(data, r); err != nil {
		t.Fatal(err)
	}
	return stdout.String(), r, err
}

func (r *Report) need(t *testing.T, name string, low, high float64) {
	t.Helper()
	if v, ok := r.value(name); !ok || v < low || v > high {
		t.Errorf("%s = %v (there: %v), want %v to %v", name, v, ok, low, high)
	}
}

func TestStreams(t *testing.T) {
	f := startServer(t)
	f.open = true
	metrics := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		f.mu.Lock()
		defer f.mu.Unlock()
		fmt.Fprintf(w, "# TYPE go_goroutines gauge\ngo_goroutines %d\n", 10+3*f.streams)
	}))
	defer metrics.Close()
	defer http.DefaultClient.CloseIdleConnections()
	table, r, err := load(t, "streams", "-socket", f.socket, "-n", "20", "-settle", "10ms",
		"-idle", "50ms", "-server-pid", fmt.Sprint(os.Getpid()), "-metrics", metrics.URL)
	if err != nil {
		t.Fatal(err)
	}
	r.need(t, "first secret default, p50", 0.001, 10_000)
	r.need(t, "first secret ROOTCA, p99", 0.001, 10_000)
	r.need(t, "server CPU per connection", 1, 1e6)
	r.need(t, "server goroutines per connection", 6, 6)
	r.need(t, "client CPU, whole run", 0.0001, 1000)
	if len(r.Errors) != 0 || !strings.Contains(table, "server RSS per connection") {
		t.Errorf("table:\n%s", table)
	}
	if f.streams != 40 || f.acks != 40 {
		t.Errorf("%d streams, %d acknowledgements, want 40", f.streams, f.acks)
	}
}

func TestStreamsRefusedAtFirst(t *testing.T) {
	f := startServer(t)
	f.refuse = true
	go func() {
		for {
			f.mu.Lock()
			n := f.refusals
			f.mu.Unlock()
			if n > 4 {
				f.update(func() { f.open = true })
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	_, r, err := load(t, "streams", "-socket", f.socket, "-n", "3", "-settle", "1ms", "-retry", "5ms")
	if err != nil {
		t.Fatal(err)
	}
	if r.Errors["rpc error: code = PermissionDenied desc = no identity issued"] < 5 {
		t.Errorf("errors: %v", r.Errors)
	}
}

func TestTimeoutEndsIt(t *testing.T) {
	f := startServer(t)
	for _, args := range [][]string{
		{"streams", "-n", "2"},
		{"fanout", "-n", "2", "-cmd", "true"},
		{"create", "-as", "id", "-cmd", "true", "-spread", "1ms", "-lead", "1ms", "-count", "1"},
	} {
		args = append(args, "-socket", f.socket, "-timeout", "600ms")
		_, r, err := load(t, args...)
		if err == nil || !strings.Contains(err.Error(), "-timeout of 600ms is over") || r == nil {
			t.Errorf("%v: %v", args, err)
		}
	}
}

func TestFetch(t *testing.T) {
	f := startServer(t)
	if _, _, err := load(t, "fetch", "-socket", f.socket, "-duration", "100ms"); err == nil {
		t.Error("nothing to fetch, no error")
	}
	f.open = true
	_, r, err := load(t, "fetch", "-socket", f.socket, "-clients", "2", "-duration", "100ms", "-names", "default,ROOTCA",
		"-idle", "50ms", "-server-pid", fmt.Sprint(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	r.need(t, "fetches", 10, 1e6)
	r.need(t, "server CPU per fetch", 1, 1e6)
	r.need(t, "fetch, p99", 0.001, 1e4)
}

// commands returns a shell command that passes a line to the test, which
// answers it before the command returns.
func commands(t *testing.T, line string, do func(string)) string {
	t.Helper()
	dir := t.TempDir()
	ask, answer := filepath.Join(dir, "ask"), filepath.Join(dir, "answer")
	for _, path := range []string{ask, answer} {
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// Open for both directions: the reader never sees an end, opening never
	// waits, and closing ends the read.
	in, err := os.OpenFile(ask, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	out, err := os.OpenFile(answer, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		lines := bufio.NewScanner(in)
		for lines.Scan() {
			do(lines.Text())
			fmt.Fprintln(out, "done")
		}
	}()
	t.Cleanup(func() {
		in.Close()
		<-done
		out.Close()
	})
	return fmt.Sprintf("echo %s > %s; read x < %s", line, ask, answer)
}

func TestFanout(t *testing.T) {
	f := startServer(t)
	f.open = true
	var asked []string
	cmd := commands(t, "round {round}", func(line string) {
		asked = append(asked, line)
		f.update(func() {}) // the same secret again: not an update
		f.update(func() { f.version++ })
	})
	_, r, err := load(t, "fanout", "-socket", f.socket, "-n", "10", "-rounds", "3", "-pause", "20ms", "-settle", "1ms",
		"-cmd", cmd, "-idle", "50ms", "-server-pid", fmt.Sprint(os.Getpid()))
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(asked, ", "); got != "round 0, round 1, round 2" {
		t.Errorf("commands: %s", got)
	}
	r.need(t, "last stream after the command's start, max", 0.001, 1e4)
	r.need(t, "stream after the command's return, p50", 0, 1e4)
	r.need(t, "server CPU per update and stream", 0, 1e6)
	if _, _, err = load(t, "fanout", "-socket", f.socket, "-n", "1", "-settle", "1ms", "-pause", "1ms", "-cmd", "echo no; exit 3"); err == nil ||
		!strings.Contains(err.Error(), "exit status 3: no") {
		t.Errorf("a failing command: %v", err)
	}
}

func TestCreate(t *testing.T) {
	const parent = "spiffe://example.org/spire/agent/x"
	for _, as := range []string{"id", "uid"} {
		for _, refuse := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s refuse=%v", as, refuse), func(t *testing.T) {
				if as == "uid" && os.Geteuid() != 0 {
					t.Skip("only root can start workloads with other uids")
				}
				f := startServer(t)
				f.refuse = refuse
				_, r, err := load(t, "create", "-socket", f.socket, "-admin", f.socket, "-parent", parent, "-as", as,
					"-count", "4", "-parallel", "2", "-spread", "20ms", "-lead", "20ms", "-retry", "10ms")
				if err != nil {
					t.Fatal(err)
				}
				r.need(t, "workloads served", 4, 4)
				r.need(t, "secret after the entry's creation began, mean", 0.001, 1e4)
				r.need(t, "secret after creation returned, p99", 0, 1e4)
				if got := len(r.Errors) > 0; got != refuse {
					t.Errorf("refusals: %v", r.Errors)
				}
				f.mu.Lock()
				defer f.mu.Unlock()
				if len(f.created) != 4 || f.deleted != 4 {
					t.Errorf("%d entries created, %d deleted", len(f.created), f.deleted)
				}
				for _, id := range f.created {
					if !strings.HasPrefix(id, "spiffe://example.org/load/") {
						t.Errorf("entry for %s", id)
					}
				}
			})
		}
	}
}

func TestCreateByCommand(t *testing.T) {
	f := startServer(t)
	cmd := commands(t, "{i} {id} {selector} {uid}", func(line string) {
		var i, uid int
		var id, selector string
		if _, err := fmt.Sscan(line, &i, &id, &selector, &uid); err != nil || selector != fmt.Sprintf("unix:uid:%d", uid) {
			t.Errorf("%q: %v", line, err)
		}
		f.update(func() { f.ids[id] = true })
	})
	_, r, err := load(t, "create", "-socket", f.socket, "-as", "id", "-cmd", cmd, "-count", "2", "-spread", "1ms", "-lead", "1ms")
	if err != nil {
		t.Fatal(err)
	}
	r.need(t, "workloads served", 2, 2)
	f.update(func() { f.open = true })
	if _, _, err := load(t, "create", "-socket", f.socket, "-as", "id", "-cmd", cmd, "-count", "1", "-spread", "1ms", "-lead", "1ms"); err == nil ||
		!strings.Contains(err.Error(), "before its entry existed") {
		t.Errorf("a workload that has an entry already: %v", err)
	}
}

func TestSteady(t *testing.T) {
	_, r, err := load(t, "steady", "-server-pid", fmt.Sprint(os.Getpid()), "-duration", "20ms")
	if err != nil {
		t.Fatal(err)
	}
	r.need(t, "RSS", 1, 1e5)
	r.need(t, "threads", 1, 1e4)
}

func TestCompare(t *testing.T) {
	dir := t.TempDir()
	write := func(name string, r *Report) string {
		path := filepath.Join(dir, name)
		if err := r.save(path); err != nil {
			t.Fatal(err)
		}
		return path
	}
	a := write("a", &Report{Mode: "fetch", Label: "ours", Rows: []Row{{"fetches", 20000, "1/s"}, {"only here", 1, "ms"}}})
	b := write("b", &Report{Mode: "fetch", Label: "theirs", Rows: []Row{{"fetches", 4000, "1/s"}}})
	c := write("c", &Report{Mode: "steady"})
	table, _, err := load(t, "compare", a, b)
	if err != nil {
		t.Fatal(err)
	}
	want := "fetch           ours   theirs  2:1\nfetches (1/s)   20000  4000    0.20\nonly here (ms)  1      -       -\n"
	if table != want {
		t.Errorf("got\n%swant\n%s", table, want)
	}
	for _, args := range [][]string{{a}, {a, c}, {a, filepath.Join(dir, "none")}} {
		if _, _, err := load(t, append([]string{"compare"}, args...)...); err == nil {
			t.Errorf("compare %v: no error", args)
		}
	}
}

func TestBadUsage(t *testing.T) {
	f := startServer(t)
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ok := []string{"-socket", f.socket}
	for want, args := range map[string][]string{
		"bad usage":                  {},
		"no mode":                    {"stream"},
		"-socket is required":        {"streams"},
		"is not a unix socket":       {"streams", "-socket", file},
		"no such file":               {"fetch", "-socket", file + "x"},
		"-n: 0 is not within":        append(ok, "-n", "0"),
		"-n: 20001 is not within":    append(ok, "-n", "20001"),
		"-server-pid: \"x\"":         append(ok, "-server-pid", "x"),
		"is not within 0 and 1h":     append(ok, "-timeout", "2h"),
		"-metrics: http://10.0.0.1/": append(ok, "-metrics", "http://10.0.0.1/"),
		"-metrics: https://[::1]":    append(ok, "-metrics", "https://[::1]"),
		"-retry":                     append(ok, "-retry", "often"),
		"-names":                     append(ok, "-names", ","),
		"not defined":                append(ok, "-cmd", "true"),
		"argument \"more\"":          append(ok, "more"),
		"-cmd is required":           {"fanout", "-socket", f.socket},
		"one of -admin and -cmd":     {"create", "-socket", f.socket},
		"-parent is required":        {"create", "-socket", f.socket, "-admin", f.socket},
		"-as":                        {"create", "-socket", f.socket, "-cmd", "true", "-as", "pid"},
		"-server-pid is required":    {"steady"},
		"process 999999999":          {"steady", "-server-pid", "999999999"},
	} {
		if len(args) > 0 && args[0] == "-socket" {
			args = append([]string{"streams"}, args...)
		}
		var out bytes.Buffer
		if err := run(t.Context(), args, strings.NewReader(""), &out, &out); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("load %v: %v, want %q", args, err, want)
		}
	}
	for _, args := range [][]string{{"-h"}, {"streams", "-h"}} {
		var out bytes.Buffer
		if err := run(t.Context(), args, strings.NewReader(""), &out, &out); err != nil || out.Len() == 0 {
			t.Errorf("load %v: %v", args, err)
		}
	}
}

// TestBackoffIsEnvoys: uniform below 0.5 s, 1 s, 2 s and so on to 30 s.
func TestBackoffIsEnvoys(t *testing.T) {
	t.Parallel()
	bounds := []time.Duration{
		500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second,
		8 * time.Second, 16 * time.Second, 30 * time.Second, 30 * time.Second,
	}
	highest := make([]time.Duration, len(bounds))
	for range 2000 {
		var b backoff
		for i := range bounds {
			highest[i] = max(highest[i], b.pause())
		}
		b.reset()
		if d := b.pause(); d >= envoyFirst {
			t.Fatalf("%v after a response", d)
		}
	}
	for i, bound := range bounds {
		if highest[i] >= bound || highest[i] < bound*9/10 {
			t.Errorf("pause %d: up to %v, want nearly %v", i, highest[i], bound)
		}
	}
	fixed := backoff{retry: retry{fixed: time.Second}}
	for range 3 {
		if d := fixed.pause(); d != time.Second {
			t.Errorf("a fixed pause of %v", d)
		}
	}
}

func TestSleepEndsWithContext(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeoutCause(t.Context(), time.Second, fmt.Errorf("why"))
		defer cancel()
		start := time.Now()
		if err := sleep(ctx, time.Minute); err == nil || err.Error() != "why" || time.Since(start) != time.Second {
			t.Errorf("%v after %v", err, time.Since(start))
		}
	})
}

func TestFindGoroutines(t *testing.T) {
	t.Parallel()
	for page, want := range map[string]int{
		"# HELP go_goroutines x\ngo_goroutines 12\n": 12,
		"go_goroutines{host=\"a b\"} 1.2e+01":        12,
		"go_goroutines_created 5":                    -1,
		"":                                           -1,
		"go_goroutines many":                         -1,
	} {
		got, err := findGoroutines(strings.NewReader(page))
		if want < 0 && err == nil || want >= 0 && got != want {
			t.Errorf("%q: %d %v", page, got, err)
		}
	}
}

func TestQuantile(t *testing.T) {
	t.Parallel()
	var d []time.Duration
	for i := range 100 {
		d = append(d, time.Duration(i+1))
	}
	if p50, p99 := quantile(d, 0.5), quantile(d, 0.99); p50 != 50 || p99 != 99 {
		t.Errorf("p50 %d, p99 %d", p50, p99)
	}
	if got := quantile(d[:1], 0.99); got != 1 {
		t.Errorf("of one: %d", got)
	}
}
