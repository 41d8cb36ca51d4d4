package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/spiffe-node/spiffe-node/internal/mount"
	"github.com/spiffe-node/spiffe-node/internal/mount/mounttest"
	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

// buffer is a log that is read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// process is the command, running on a node of its own.
type process struct {
	t      *testing.T
	dir    string
	socket string
	log    buffer
	stop   func() error
}

func startProcess(t *testing.T, dir string, args ...string) *process {
	t.Helper()
	for _, p := range []string{"k/pods", "k/plugins_registry", "k/plugins/csi.spiffe.io", "agent"} {
		if err := os.MkdirAll(filepath.Join(dir, p), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	d := &process{t: t, dir: dir, socket: filepath.Join(dir, "k/plugins/csi.spiffe.io/csi.sock")}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	args = append([]string{
		"-node-id=n", "-csi-socket-path", d.socket, "-workload-api-socket-dir", filepath.Join(dir, "agent"),
		"-kubelet-root", filepath.Join(dir, "k"), "-ledger-dir", filepath.Join(dir, "ledger"), "-health-address", "127.0.0.1:0",
	}, args...)
	go func() { done <- run(ctx, args, env(), io.Discard, &d.log) }()
	var once sync.Once
	var err error
	d.stop = func() error {
		once.Do(func() {
			cancel()
			err = <-done
		})
		return err
	}
	t.Cleanup(func() {
		if err := d.stop(); err != nil {
			t.Errorf("run: %v", err)
		}
		if t.Failed() {
			t.Log(d.log.String())
		}
	})
	return d
}

func (d *process) eventually(what string, ok func() bool) {
	d.t.Helper()
	deadline := time.After(10 * time.Second)
	for !ok() {
		select {
		case <-deadline:
			d.t.Fatal("never: " + what)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

var healthAt = regexp.MustCompile(`"address":"([^"]+)"`)

// get reads one page of the health endpoint.
func (d *process) get(page string) (int, string) {
	d.t.Helper()
	d.eventually("the health endpoint", func() bool { return healthAt.MatchString(d.log.String()) })
	tr := &http.Transport{DisableKeepAlives: true}
	resp, err := (&http.Client{Transport: tr}).Get("http://" + healthAt.FindStringSubmatch(d.log.String())[1] + page)
	if err != nil {
		d.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		d.t.Fatal(err)
	}
	return resp.StatusCode, string(body)
}

func (d *process) dial(path string) *grpc.ClientConn {
	d.t.Helper()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.WaitForReady(true)))
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = conn.Close() })
	return conn
}

func (d *process) agent() {
	d.t.Helper()
	l, err := net.Listen("unix", filepath.Join(d.dir, "agent/socket"))
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { _ = l.Close() })
}

const uid = "0c7a6dbd-6d4a-4f52-8c4a-9c1f3b2a7e10"

func (d *process) request() *csipb.NodePublishVolumeRequest {
	d.t.Helper()
	dir := filepath.Join(d.dir, "k/pods", uid, "volumes/kubernetes.io~csi/spiffe")
	if err := os.MkdirAll(dir, 0o750); err != nil {
		d.t.Fatal(err)
	}
	return &csipb.NodePublishVolumeRequest{
		VolumeId:   csi.VolumeID(uid, "spiffe"),
		TargetPath: filepath.Join(dir, "mount"),
		Readonly:   true,
		VolumeCapability: &csipb.VolumeCapability{
			AccessType: &csipb.VolumeCapability_Mount{Mount: &csipb.VolumeCapability_MountVolume{}},
			AccessMode: &csipb.VolumeCapability_AccessMode{Mode: csipb.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
		},
		VolumeContext: map[string]string{
			"csi.storage.k8s.io/ephemeral":           "true",
			"csi.storage.k8s.io/pod.name":            "web-0",
			"csi.storage.k8s.io/pod.namespace":       "default",
			"csi.storage.k8s.io/pod.uid":             uid,
			"csi.storage.k8s.io/serviceAccount.name": "web",
		},
	}
}

func (d *process) mounts(target string) int {
	d.t.Helper()
	table, err := mount.ReadTable()
	if err != nil {
		d.t.Fatal(err)
	}
	return len(table.At(target))
}

// The whole life of a driver on a node: up before the agent, registered, not
// ready, ready, publishing, stopped without a trace but the mount, up again.
func TestLife(t *testing.T) {
	dir := mounttest.Tmpfs(t, "")
	d := startProcess(t, dir)
	if code, body := d.get("/livez"); code != http.StatusOK {
		t.Errorf("livez: %d %s", code, body)
	}
	reg := registration.NewRegistrationClient(d.dial(filepath.Join(dir, "k/plugins_registry/csi.spiffe.io-reg.sock")))
	info, err := reg.GetInfo(t.Context(), &registration.InfoRequest{})
	if err != nil || info.GetEndpoint() != d.socket {
		t.Fatalf("%v, %v", info, err)
	}
	node := csipb.NewNodeClient(d.dial(info.GetEndpoint()))
	if id, err := node.NodeGetInfo(t.Context(), &csipb.NodeGetInfoRequest{}); err != nil || id.GetNodeId() != "n" {
		t.Fatalf("%v, %v", id, err)
	}
	if _, err := reg.NotifyRegistrationStatus(t.Context(), &registration.RegistrationStatus{PluginRegistered: true}); err != nil {
		t.Fatal(err)
	}
	if code, body := d.get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "agent") {
		t.Errorf("readyz without an agent: %d %s", code, body)
	}
	d.agent()
	d.eventually("ready", func() bool { code, _ := d.get("/readyz"); return code == http.StatusOK })
	r := d.request()
	if _, err := node.NodePublishVolume(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	_, metrics := d.get("/metrics")
	for _, want := range []string{
		`spiffe_node_csi_calls_total{code="OK",method="NodePublishVolume"} 1`,
		`spiffe_node_csi_registered 1`,
		`spiffe_node_csi_volumes 1`,
		`process_resident_memory_bytes`,
	} {
		if !strings.Contains(metrics, want) {
			t.Errorf("no %s in the metrics", want)
		}
	}
	if err := d.stop(); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{d.socket, filepath.Join(dir, "k/plugins_registry/csi.spiffe.io-reg.sock")} {
		if _, err := os.Lstat(p); !os.IsNotExist(err) {
			t.Errorf("%s stays behind: %v", p, err)
		}
	}
	if d.mounts(r.GetTargetPath()) != 1 {
		t.Error("the mount ended with the driver")
	}
	for line := range strings.Lines(d.log.String()) {
		if !json.Valid([]byte(line)) {
			t.Errorf("a line that is not JSON: %s", line)
		}
	}
	again := startProcess(t, dir)
	if _, err := csipb.NewNodeClient(again.dial(again.socket)).NodeUnpublishVolume(t.Context(), &csipb.NodeUnpublishVolumeRequest{VolumeId: r.GetVolumeId(), TargetPath: r.GetTargetPath()}); err != nil {
		t.Fatal(err)
	}
	if got := again.mounts(r.GetTargetPath()); got != 0 {
		t.Errorf("%d mounts", got)
	}
}

// A driver that starts beside another takes over, and the other may go.
func TestHandOver(t *testing.T) {
	dir := mounttest.Tmpfs(t, "")
	old := startProcess(t, dir)
	old.agent()
	ids := csipb.NewIdentityClient(old.dial(old.socket))
	if _, err := ids.GetPluginInfo(t.Context(), &csipb.GetPluginInfoRequest{}); err != nil {
		t.Fatal(err)
	}
	young := startProcess(t, dir)
	young.eventually("the new one serves", func() bool { return strings.Contains(young.log.String(), "waiting for the kubelet") })
	if err := old.stop(); err != nil {
		t.Fatal(err)
	}
	r := young.request()
	if _, err := csipb.NewNodeClient(young.dial(young.socket)).NodePublishVolume(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	if got := young.mounts(r.GetTargetPath()); got != 1 {
		t.Errorf("%d mounts", got)
	}
}

func TestWithoutRegistration(t *testing.T) {
	dir := mounttest.Tmpfs(t, "")
	d := startProcess(t, dir, "-register=false", "-health-address=")
	if _, err := csipb.NewIdentityClient(d.dial(d.socket)).GetPluginInfo(t.Context(), &csipb.GetPluginInfoRequest{}); err != nil {
		t.Fatal(err)
	}
	if names, err := os.ReadDir(filepath.Join(dir, "k/plugins_registry")); err != nil || len(names) != 0 {
		t.Errorf("%v, %v", names, err)
	}
}

func TestRunSaysWhatIsWrong(t *testing.T) {
	dir := t.TempDir()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	for want, change := range map[string][]string{
		"-log-level":                {"-log-level=loud"},
		"-log-format":               {"-log-format=xml"},
		taken.Addr().String():       {"-health-address=" + taken.Addr().String()},
		"kubelet root":              {"-kubelet-root=" + filepath.Join(dir, "none")},
		"plugin name":               {"-plugin-name=a/b"},
		"agent check":               {"-agent-check=perhaps"},
		"ledger":                    {"-ledger-dir=/proc/none"},
		"no such file or directory": {"-csi-socket-path=" + filepath.Join(dir, "none/csi.sock")},
		"plugin registry":           {"-registry-dir=here"},
	} {
		args := append([]string{
			"-node-id=n", "-workload-api-socket-dir=" + dir, "-kubelet-root=" + dir, "-ledger-dir=" + filepath.Join(dir, "ledger"),
			"-csi-socket-path=" + filepath.Join(dir, "c"), "-health-address=",
		}, change...)
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		err := run(ctx, args, env(), io.Discard, io.Discard)
		cancel()
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not say %q", err, want)
		}
	}
	if names, _ := filepath.Glob(filepath.Join(dir, "c*")); len(names) != 0 {
		t.Errorf("left behind: %s", fmt.Sprint(names))
	}
}
