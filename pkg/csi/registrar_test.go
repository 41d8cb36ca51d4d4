package csi_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

// shortDir is a temporary directory whose path leaves room for a socket's.
func shortDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "h") //nolint:usetesting // tb.TempDir is too long for a socket
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// runRegistrar runs one until the test or stop ends it.
func runRegistrar(t *testing.T, dir string, change ...func(*csi.RegistrarConfig)) (r *csi.Registrar, stop func()) {
	t.Helper()
	cfg := csi.RegistrarConfig{Dir: dir, Endpoint: "/var/lib/kubelet/plugins/csi.spiffe.io/csi.sock", Check: 20 * time.Millisecond, Logger: testLog(t)}
	for _, c := range change {
		c(&cfg)
	}
	r, err := csi.NewRegistrar(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			t.Errorf("run: %v", err)
		}
	}
	t.Cleanup(stop)
	return r, stop
}

// register does what the kubelet does when it finds the socket.
func register(t *testing.T, path string, verdict *registration.RegistrationStatus) *registration.PluginInfo {
	t.Helper()
	info, err := tryRegister(t, path, verdict)
	if err != nil {
		t.Fatal(err)
	}
	return info
}

// tryRegister is register while the socket may change hands.
func tryRegister(t *testing.T, path string, verdict *registration.RegistrationStatus) (*registration.PluginInfo, error) {
	t.Helper()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	c := registration.NewRegistrationClient(conn)
	info, err := c.GetInfo(ctx, &registration.InfoRequest{}, grpc.WaitForReady(true))
	if err != nil {
		return nil, err
	}
	_, err = c.NotifyRegistrationStatus(ctx, verdict)
	return info, err
}

// leadsTo says whether the driver the kubelet would register now has this
// endpoint.
func leadsTo(t *testing.T, path, endpoint string) func() bool {
	t.Helper()
	return func() bool {
		info, err := tryRegister(t, path, accepted)
		return err == nil && info.GetEndpoint() == endpoint
	}
}

// series are the values of a counter or gauge.
func series(t *testing.T, g prometheus.Gatherer, name string) []float64 {
	t.Helper()
	families, err := g.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var out []float64
	for _, f := range families {
		for _, m := range f.GetMetric() {
			if f.GetName() == name {
				out = append(out, m.GetCounter().GetValue()+m.GetGauge().GetValue())
			}
		}
	}
	return out
}

var accepted = &registration.RegistrationStatus{PluginRegistered: true}

// eventually waits for something another goroutine does.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-deadline:
			t.Fatal("never: " + what)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func answers(path string) bool {
	c, err := net.Dial("unix", path)
	if err != nil {
		return false
	}
	_ = c.Close()
	return true
}

func TestRegistration(t *testing.T) {
	dir := shortDir(t)
	reg := prometheus.NewRegistry()
	m := csi.NewMetrics(reg)
	r, stop := runRegistrar(t, dir, func(c *csi.RegistrarConfig) { c.Metrics = m })
	if want := filepath.Join(dir, "csi.spiffe.io-reg.sock"); r.Path() != want {
		t.Errorf("path %s, want %s", r.Path(), want)
	}
	if r.Registered() == nil {
		t.Error("registered before the kubelet has come")
	}
	info := register(t, r.Path(), accepted)
	want := []string{"CSIPlugin", "csi.spiffe.io", "/var/lib/kubelet/plugins/csi.spiffe.io/csi.sock", "1.0.0"}
	if d := cmp.Diff(want, append([]string{info.GetType(), info.GetName(), info.GetEndpoint()}, info.GetSupportedVersions()...)); d != "" {
		t.Errorf("info (-want +got):\n%s", d)
	}
	if err := r.Registered(); err != nil {
		t.Error(err)
	}
	register(t, r.Path(), &registration.RegistrationStatus{Error: "no CSIDriver object"})
	if err := r.Registered(); err == nil || !strings.Contains(err.Error(), "no CSIDriver object") {
		t.Errorf("status %v", err)
	}
	register(t, r.Path(), accepted) // a kubelet that starts again, or tries again
	if err := r.Registered(); err != nil {
		t.Error(err)
	}
	if calls, up := series(t, reg, "spiffe_node_csi_calls_total"), series(t, reg, "spiffe_node_csi_registered"); len(calls) != 2 || len(up) != 1 || up[0] != 1 {
		t.Errorf("calls %v, registered %v", calls, up)
	}
	fi, err := os.Lstat(r.Path())
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", fi.Mode(), err)
	}
	stop()
	if _, err := os.Lstat(r.Path()); !os.IsNotExist(err) {
		t.Errorf("the socket stays behind: %v", err)
	}
}

// Whatever happens to the registry, the kubelet finds a socket there again.
func TestRegistrationComesBack(t *testing.T) {
	for name, harm := range map[string]func(t *testing.T, dir, path string){
		"socket removed": func(t *testing.T, _, path string) {
			t.Helper()
			remove(t, path)
		},
		"directory made anew": func(t *testing.T, dir, _ string) {
			t.Helper()
			moveAway(t, dir)
			mkdir(t, dir)
		},
		"directory away for a while": func(t *testing.T, dir, _ string) {
			t.Helper()
			moveAway(t, dir)
			<-time.After(50 * time.Millisecond)
			mkdir(t, dir)
		},
		"dead socket in its place": func(t *testing.T, _, path string) {
			t.Helper()
			tmp := path + ".x"
			l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
			if err != nil {
				t.Fatal(err)
			}
			l.SetUnlinkOnClose(false)
			_ = l.Close()
			if err := os.Rename(tmp, path); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(shortDir(t), "registry")
			mkdir(t, dir)
			r, _ := runRegistrar(t, dir)
			register(t, r.Path(), accepted)
			harm(t, dir, r.Path())
			eventually(t, "a new socket", func() bool { return answers(r.Path()) })
			register(t, r.Path(), accepted)
			if err := r.Registered(); err != nil {
				t.Error(err)
			}
		})
	}
}

// moveAway removes a directory in one step, so that nobody makes anything in it
// meanwhile.
func moveAway(t *testing.T, dir string) {
	t.Helper()
	if err := os.Rename(dir, dir+".gone"); err != nil {
		t.Fatal(err)
	}
	removeAll(t, dir+".gone")
}

func TestRegistrationStartsBeforeTheRegistry(t *testing.T) {
	dir := filepath.Join(shortDir(t), "registry")
	r, _ := runRegistrar(t, dir)
	mkdir(t, dir)
	register(t, r.Path(), accepted)
}

func TestRegistrationReplacesAStaleSocket(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "csi.spiffe.io-reg.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	r, _ := runRegistrar(t, dir)
	eventually(t, "a live socket", func() bool { return answers(path) })
	register(t, r.Path(), accepted)
}

// Two instances, as during an update: the new one has the name at once, the old
// one neither takes it back nor removes it.
func TestRegistrationHandOver(t *testing.T) {
	dir := shortDir(t)
	old, stopOld := runRegistrar(t, dir)
	register(t, old.Path(), accepted)
	young, stopYoung := runRegistrar(t, dir, func(c *csi.RegistrarConfig) { c.Endpoint = "/new/csi.sock" })
	eventually(t, "the new instance answers", leadsTo(t, young.Path(), "/new/csi.sock"))
	eventually(t, "the old instance has noticed", func() bool { return old.Registered() != nil })
	<-time.After(100 * time.Millisecond) // several rounds of the old one's checks
	if got := register(t, young.Path(), accepted).GetEndpoint(); got != "/new/csi.sock" {
		t.Errorf("the old instance has taken the name back: %s", got)
	}
	stopOld()
	if !answers(young.Path()) {
		t.Fatal("the old instance has taken the name with it")
	}
	stopYoung()
	if answers(young.Path()) {
		t.Fatal("somebody still answers")
	}
}

// If the new one goes first, the old one serves again.
func TestRegistrationFallsBack(t *testing.T) {
	dir := shortDir(t)
	old, _ := runRegistrar(t, dir)
	register(t, old.Path(), accepted)
	_, stopYoung := runRegistrar(t, dir, func(c *csi.RegistrarConfig) { c.Endpoint = "/new/csi.sock" })
	eventually(t, "the new instance answers", leadsTo(t, old.Path(), "/new/csi.sock"))
	eventually(t, "the old instance has noticed", func() bool { return old.Registered() != nil })
	stopYoung()
	eventually(t, "the old instance is back", func() bool { return answers(old.Path()) })
	if got := register(t, old.Path(), accepted).GetEndpoint(); got == "/new/csi.sock" {
		t.Errorf("endpoint %s", got)
	}
}

func TestNewRegistrarNamesWhatIsWrong(t *testing.T) {
	if _, err := csi.NewRegistrar(csi.RegistrarConfig{Dir: "here", Endpoint: "/x"}); err == nil {
		t.Error("a relative registry")
	}
	if _, err := csi.NewRegistrar(csi.RegistrarConfig{Dir: "/x", Endpoint: "csi.sock"}); err == nil {
		t.Error("a relative endpoint")
	}
}
