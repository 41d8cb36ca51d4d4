package sanity_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"github.com/kubernetes-csi/csi-test/v5/pkg/sanity"
	"github.com/onsi/ginkgo/v2"
	"github.com/onsi/ginkgo/v2/types"
	"github.com/onsi/gomega"
	"google.golang.org/grpc"

	"github.com/spiffe-node/spiffe-node/internal/mount"
	"github.com/spiffe-node/spiffe-node/internal/mount/mounttest"
)

// Environment of a run of the suite: csi-sanity runs once per process, so each
// run is this test binary again.
const (
	envNode       = "SANITY_NODE"       // address of the node service
	envController = "SANITY_CONTROLLER" // address of the controller
	envTarget     = "SANITY_TARGET"     // where to publish
	envReport     = "SANITY_REPORT"     // where to write ginkgo's report
)

func TestMain(m *testing.M) {
	if code, done := mounttest.Enter(); done {
		os.Exit(code)
	}
	os.Exit(m.Run())
}

// TestSanity runs the Identity and Node specs against the driver with both
// helpers. None may fail, and none may be left out but those of capabilities
// the driver does not have.
func TestSanity(t *testing.T) {
	d := startDriver(t)
	node, ctl := serveProxy(t, d.dir, d.socket), serveController(t, d.dir)
	t.Logf("driver:     %s (the real binary, real mounts) on %s", d.binary, d.socket)
	t.Logf("controller: throw-away; CreateVolume answers the kubelet's volume ID and volume context of an inline volume")
	t.Logf("node proxy: %s", proxyChanges)
	specs := runSuite(t, d, node, ctl)
	count := map[types.SpecState]int{}
	health := 0
	for _, s := range specs {
		count[s.State]++
		switch {
		case s.State == types.SpecStateSkipped:
			t.Logf("left out:   %s (%s)", s.FullText(), s.Failure.Message)
		case s.State != types.SpecStatePassed:
			t.Errorf("FAILED:     %s: %s", s.FullText(), s.Failure.Message)
		case strings.Contains(s.FullText(), "NodeGetVolumeHealth"):
			health++
			fallthrough
		default:
			t.Logf("passed:     %s", s.FullText())
		}
	}
	ran := len(specs) - count[types.SpecStateSkipped]
	passed := count[types.SpecStatePassed]
	t.Logf("csi-sanity \"Node Service|Identity Service\": %d of %d passed, and %d of %d of NodeGetVolumeHealth (CSI 1.13)", passed-health, ran-health, health, health)
	if passed != ran || passed-health != 15 || health != 2 {
		t.Errorf("%d of %d specs passed, %d of health; want 17 of 17 and 2", passed, ran, health)
	}
	d.wantNothingLeft(t)
}

// TestSanityWithoutProxy runs the same specs as the suite sends them: those
// that publish must fail because the volume is not read-only, and no other.
func TestSanityWithoutProxy(t *testing.T) {
	d := startDriver(t)
	t.Log("no node proxy: the suite asks for a read-write volume")
	for _, s := range runSuite(t, d, d.socket, serveController(t, d.dir)) {
		publishes := slices.ContainsFunc([]string{"should remove target path", "does not exist on the specified path", "health for a valid volume"}, func(p string) bool {
			return strings.Contains(s.FullText(), p)
		})
		switch {
		case s.State == types.SpecStateSkipped:
		case !publishes && s.State != types.SpecStatePassed:
			t.Errorf("%s: %s", s.FullText(), s.Failure.Message)
		case publishes && s.State != types.SpecStateFailed:
			t.Errorf("%s: %s, want a refusal", s.FullText(), s.State)
		case publishes:
			if m := s.Failure.Message; !strings.Contains(m, "InvalidArgument") || !strings.Contains(m, "spec.volumes[].csi.readOnly: true") {
				t.Errorf("%s failed for another reason: %s", s.FullText(), m)
			}
			t.Logf("refused:    %s", s.FullText())
		}
	}
	d.wantNothingLeft(t)
}

// TestSuite is one run of csi-sanity; the tests above start it.
func TestSuite(t *testing.T) {
	if os.Getenv(envNode) == "" {
		t.Skip("started by TestSanity and TestSanityWithoutProxy")
	}
	dir := os.Getenv(envTarget)
	cfg := sanity.NewTestConfig()
	cfg.Address = "unix:" + os.Getenv(envNode)
	cfg.ControllerAddress = "unix:" + os.Getenv(envController)
	cfg.TargetPath = dir
	cfg.StagingPath = ""
	cfg.CreateTargetDir = func(path string) (string, error) { return path, os.MkdirAll(path, 0o750) }
	// As the kubelet: only empty directories go.
	cfg.RemoveTargetPath = os.Remove
	cfg.CheckPath = func(path string) (sanity.PathKind, error) {
		fi, err := os.Lstat(kubeletSpelling(path))
		switch {
		case errors.Is(err, os.ErrNotExist):
			return sanity.PathIsNotFound, nil
		case err != nil:
			return "", err
		case fi.IsDir():
			return sanity.PathIsDir, nil
		}
		return sanity.PathIsFile, nil
	}
	sc := sanity.GinkgoTest(&cfg)
	defer sc.Finalize()
	gomega.RegisterFailHandler(ginkgo.Fail)
	suite, reporter := ginkgo.GinkgoConfiguration()
	suite.FocusStrings = []string{"Node Service|Identity Service"}
	reporter.JSONReport = os.Getenv(envReport)
	reporter.NoColor = true
	ginkgo.RunSpecs(t, "csi-sanity", suite, reporter)
}

// runSuite runs csi-sanity in a process of its own and returns the specs that
// were in focus.
func runSuite(t *testing.T, d *driver, node, ctl string) types.SpecReports {
	t.Helper()
	report := filepath.Join(d.dir, "report.json")
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestSuite$", "-test.v")
	cmd.Env = append(os.Environ(), envNode+"="+node, envController+"="+ctl, envTarget+"="+target(d.root), envReport+"="+report)
	out, err := cmd.CombinedOutput()
	if exit := (*exec.ExitError)(nil); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	data, rerr := os.ReadFile(report)
	if rerr != nil {
		t.Fatalf("the suite wrote no report (%v):\n%s", rerr, out)
	}
	var reports []types.Report
	if err := json.Unmarshal(data, &reports); err != nil || len(reports) != 1 {
		t.Fatalf("the suite's report cannot be read: %v", err)
	}
	var in types.SpecReports
	for _, s := range reports[0].SpecReports.WithLeafNodeType(types.NodeTypeIt) {
		text := s.FullText()
		focus := strings.Contains(text, "Node Service") || strings.Contains(text, "Identity Service")
		// What is out of focus is skipped without a reason.
		if focus && (s.State != types.SpecStateSkipped || s.Failure.Message != "") {
			in = append(in, s)
		}
	}
	if len(in) == 0 {
		t.Fatalf("no spec ran:\n%s", out)
	}
	return in
}

// driver is the real binary on a machine of its own.
type driver struct {
	binary string
	dir    string // sockets, short
	agent  string // the agent's socket directory
	root   string // the kubelet's
	ledger string
	socket string
}

// startDriver is a driver that runs for the time of the test.
func startDriver(t *testing.T) *driver {
	t.Helper()
	d := newDriver(t)
	d.run(t)
	return d
}

// newDriver builds the binary and makes the machine: a kubelet's directories
// and an agent that listens.
func newDriver(t *testing.T) *driver {
	t.Helper()
	mounttest.Require(t)
	tmp := mounttest.Tmpfs(t, "")
	dir, err := os.MkdirTemp("", "s") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	d := &driver{
		binary: filepath.Join(dir, "csi-driver"), dir: dir, agent: filepath.Join(tmp, "agent"),
		root: filepath.Join(tmp, "kubelet"), ledger: filepath.Join(tmp, "ledger"), socket: filepath.Join(dir, "csi.sock"),
	}
	build := exec.Command("go", "build", "-o", d.binary, "./cmd/csi-driver")
	build.Dir = "../.."
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the driver: %v\n%s", err, out)
	}
	for _, p := range []string{filepath.Join(d.root, "pods"), filepath.Join(d.root, "plugins_registry"), d.agent} {
		if err := os.MkdirAll(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	startAgent(t, filepath.Join(d.agent, "socket"))
	return d
}

// start starts the binary and returns at once; its log is shown if the test
// fails.
func (d *driver) start(t *testing.T) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(d.binary, "-node-id", "sanity-node", "-csi-socket-path", d.socket, "-workload-api-socket-dir", d.agent,
		"-kubelet-root", d.root, "-ledger-dir", d.ledger, "-health-address", "127.0.0.1:0")
	var log bytes.Buffer
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the log of driver %d:\n%s", cmd.Process.Pid, &log)
		}
	})
	return cmd
}

// run starts the binary, waits until it is ready, and stops it gracefully when
// the test ends.
func (d *driver) run(t *testing.T) {
	t.Helper()
	cmd := d.start(t)
	t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Errorf("stop the driver: %v", err)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("the driver ended: %v", err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	probe, err := csipb.NewIdentityClient(dial(t, d.socket)).Probe(ctx, &csipb.ProbeRequest{}, grpc.WaitForReady(true))
	if err != nil || !probe.GetReady().GetValue() {
		t.Fatalf("the driver is not ready: %v, %v", probe, err)
	}
}

// startAgent listens as the agent does: the driver publishes nothing while
// nobody answers.
func startAgent(t *testing.T, path string) {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_ = c.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
}

// wantNothingLeft checks the mount table and the ledger after the suite.
func (d *driver) wantNothingLeft(t *testing.T) {
	t.Helper()
	table, err := mount.ReadTable()
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range table {
		if strings.HasPrefix(e.MountPoint, d.root) {
			t.Errorf("still mounted: %s", e.MountPoint)
		}
	}
	if names, err := os.ReadDir(d.ledger); err != nil || len(names) != 0 {
		t.Errorf("left in the ledger: %v, %v", names, err)
	}
}
