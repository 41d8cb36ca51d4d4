package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/google/uuid"
)

const (
	trustDomain  = "example.org"
	agentHealth  = "127.0.0.1:29982"
	driverHealth = "127.0.0.1:29983"
	workloadUID  = 1337 // the user Istio's proxies run as
)

type demo struct {
	bin, dir string
	verbose  bool
	start    time.Time

	step    int
	byPod   bool // identities follow pods, not program paths
	daemons []*daemonProcess
	pods    []*pod
}

func (d *demo) path(parts ...string) string {
	return filepath.Join(append([]string{d.dir}, parts...)...)
}
func (d *demo) kubelet() string { return d.path("kubelet") }

func (d *demo) heading(text string) {
	d.step++
	fmt.Printf("\n%d. %s\n", d.step, text)
}

func say(format string, args ...any) { fmt.Printf("   "+format+"\n", args...) }

func show(text string) {
	for line := range strings.Lines(text) {
		fmt.Print("   | " + strings.TrimRight(line, "\n") + "\n")
	}
}

func ms(t time.Duration) string { return fmt.Sprintf("%.1f ms", float64(t.Microseconds())/1000) }

func (d *demo) play(ctx context.Context) error {
	for _, step := range []func(context.Context) error{
		d.startNode, d.register, d.publishVolumes, d.startWorkloads, d.handshake, d.rotate, d.status, d.remove,
	} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	fmt.Printf("\nDone in %.1f s; nothing is left behind.\n", time.Since(d.start).Seconds())
	return nil
}

func (d *demo) startNode(ctx context.Context) error {
	d.pods = []*pod{
		{name: "frontend-5d9c", namespace: "shop", serviceAccount: "frontend", uid: uuid.NewString()},
		{name: "backend-7f6b", namespace: "shop", serviceAccount: "backend", uid: uuid.NewString()},
	}
	mode := "kubernetes"
	d.byPod = true
	for i, p := range d.pods {
		var err error
		if p.cgroups, err = podCgroups(p.uid, strings.Repeat(fmt.Sprintf("%x", i+10), 64)); err != nil {
			d.byPod, mode = false, "standalone"
		}
	}
	fmt.Printf("spiffe-node on one machine: trust domain %s, embedded authority, no cluster.\n", trustDomain)
	if d.byPod {
		fmt.Println("Running as root: pods are cgroups as the kubelet makes them, identities follow the pod.")
	} else {
		fmt.Println("Running without root, in a user namespace: pods cannot be made here,\nidentities follow the program's path instead.")
	}
	d.heading("Start the node: agent and CSI driver")
	if err := os.MkdirAll(filepath.Join(d.kubelet(), "pods"), 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(d.path("agent.yaml"), []byte(d.agentConfig(mode)), 0o600); err != nil {
		return err
	}
	agent, took, err := d.startDaemon(ctx, "sds-agent", agentHealth, "--config", d.path("agent.yaml"))
	if err != nil {
		return err
	}
	say("sds-agent   pid %-7d ready after %s, serving %s", agent.cmd.Process.Pid, ms(took), d.path("public", "socket"))
	driver, took, err := d.startDaemon(ctx, "csi-driver", driverHealth,
		"--node-id=demo-node", "--csi-socket-path="+d.path("csi.sock"), "--workload-api-socket-dir="+d.path("public"),
		"--kubelet-root="+d.kubelet(), "--ledger-dir="+d.path("ledger"), "--register=false", "--health-address="+driverHealth)
	if err != nil {
		return err
	}
	say("csi-driver  pid %-7d ready after %s, serving %s", driver.cmd.Process.Pid, ms(took), d.path("csi.sock"))
	return nil
}

func (d *demo) agentConfig(mode string) string {
	return fmt.Sprintf(`apiVersion: config.spiffe-node.io/v1alpha1
kind: AgentConfiguration
trustDomain: %s
mode: %s
node: {name: demo-node}
socket: {directory: %s}
admin: {socketPath: %s}
authority: {embedded: {statePath: %s}}
identity: {stateDirectory: %s}
attestation:
  unix: {discoverWorkloadPath: %t}
  kubernetes: {ledgerDirectory: %s, cgroupRoot: /kubepods}
health: {address: "%s"}
`, trustDomain, mode, d.path("public"), d.path("admin", "api.sock"), d.path("authority", "authority.db"),
		d.path("state"), !d.byPod, d.path("ledger"), agentHealth)
}

func (d *demo) spiffeID(p *pod) string {
	return fmt.Sprintf("spiffe://%s/ns/%s/sa/%s", trustDomain, p.namespace, p.serviceAccount)
}

func (d *demo) register(ctx context.Context) error {
	d.heading("Register two workloads")
	for i, p := range d.pods {
		args := []string{"entry", "create", "-parentID", "spiffe://" + trustDomain + "/spire/agent/local/demo-node", "-spiffeID", d.spiffeID(p)}
		if d.byPod {
			args = append(args, "-selector", "k8s:ns:"+p.namespace, "-selector", "k8s:sa:"+p.serviceAccount)
		} else {
			args = append(args, "-selector", "unix:path:"+d.program(p))
		}
		out, err := d.cli(ctx, args...)
		if err != nil {
			return err
		}
		say("$ kubectl-spiffe %s", strings.Join(args, " "))
		if i == 0 {
			show(out)
		}
	}
	return nil
}

func (d *demo) program(p *pod) string { return d.path(p.serviceAccount) }

func (d *demo) publishVolumes(ctx context.Context) error {
	d.heading("Publish a csi.spiffe.io volume for each pod, as the kubelet does before containers start")
	for _, p := range d.pods {
		took, err := d.publish(ctx, p)
		if err != nil {
			return err
		}
		say("%s/%s  NodePublishVolume in %s", p.namespace, p.name, ms(took))
	}
	say("mounted at .../pods/%s/volumes/kubernetes.io~csi/%s/mount", d.pods[0].uid, volumeName)
	return nil
}

// workloadProcess is a started workload and what it has said so far.
type workloadProcess struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	events chan event
}

func (d *demo) startWorkloads(ctx context.Context) error {
	d.heading("Start the workloads: each opens Envoy-style SDS streams for default and ROOTCA")
	self, err := os.Executable()
	if err != nil {
		return err
	}
	for _, p := range d.pods {
		if err := copyProgram(self, d.program(p)); err != nil {
			return err
		}
		uid := 0
		if d.byPod {
			uid = workloadUID
		}
		if p.process, err = startContainer(self, p.cgroups, uid, d.program(p), p.target); err != nil {
			return err
		}
		for range 2 {
			e, err := p.process.next(ctx, "secret")
			if err != nil {
				return fmt.Errorf("%s: %w", p.name, err)
			}
			say("%-14s got %-8s %s  %.1f ms after it started", p.name, e.Name, e.SPIFFEID, e.AfterMS)
		}
	}
	return nil
}

// startContainer runs a program in a pod's cgroups. Its working directory is the
// volume: seen from the host, the volume's path is longer than a socket's may be.
func startContainer(self string, cgroups []string, uid int, program, volume string) (*workloadProcess, error) {
	cmd := exec.Command(self, "container", fmt.Sprint(uid), strings.Join(cgroups, " "), program, "workload", "socket")
	cmd.Dir = volume
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	w := &workloadProcess{cmd: cmd, stdin: in, events: make(chan event, 64)}
	go func() {
		defer close(w.events)
		lines := bufio.NewScanner(out)
		for lines.Scan() {
			var e event
			if json.Unmarshal(lines.Bytes(), &e) == nil {
				w.events <- e
			}
		}
	}()
	return w, nil
}

// next waits for the next event of one kind; an error event ends the wait.
func (w *workloadProcess) next(ctx context.Context, kind string) (event, error) {
	for {
		select {
		case e, ok := <-w.events:
			switch {
			case !ok:
				return event{}, errors.New("the workload ended")
			case e.Event == "error":
				return event{}, errors.New(e.Text)
			case e.Event == kind:
				return e, nil
			}
		case <-ctx.Done():
			return event{}, fmt.Errorf("waiting for %s: %w", kind, ctx.Err())
		}
	}
}

func (d *demo) handshake(ctx context.Context) error {
	d.heading("Mutual TLS between them, with nothing but what SDS served")
	front, back := d.pods[0], d.pods[1]
	listening, err := back.process.next(ctx, "listening")
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintf(front.process.stdin, "%s %s\n", listening.Address, d.spiffeID(back)); err != nil {
		return err
	}
	e, err := front.process.next(ctx, "handshake")
	if err != nil {
		return err
	}
	say("frontend -> backend  %s, peer %s", e.Version, e.SPIFFEID)
	say("backend answered: %s", e.Text)
	return nil
}

func (d *demo) rotate(ctx context.Context) error {
	d.heading("Change the frontend's entry: its SVID is replaced on the open stream")
	front := d.pods[0]
	shown, err := d.cli(ctx, "entry", "show", "-spiffeID", d.spiffeID(front), "-output", "json")
	if err != nil {
		return err
	}
	var list struct {
		Entries []struct {
			ID        string `json:"id"`
			Selectors []struct {
				Type  string `json:"type"`
				Value string `json:"value"`
			} `json:"selectors"`
		} `json:"entries"`
	}
	if err := json.Unmarshal([]byte(shown), &list); err != nil || len(list.Entries) != 1 {
		return fmt.Errorf("read entry show -output json: %w\n%s", err, shown)
	}
	args := []string{
		"entry", "update", "-entryID", list.Entries[0].ID, "-spiffeID", d.spiffeID(front),
		"-parentID", "spiffe://" + trustDomain + "/spire/agent/local/demo-node", "-x509SVIDTTL", "600", "-dns", "frontend.shop.svc",
	}
	for _, s := range list.Entries[0].Selectors {
		args = append(args, "-selector", s.Type+":"+s.Value)
	}
	begin := time.Now()
	if _, err := d.cli(ctx, args...); err != nil {
		return err
	}
	say("$ kubectl-spiffe entry update -entryID %s ... -x509SVIDTTL 600 -dns frontend.shop.svc", list.Entries[0].ID)
	e, err := front.process.next(ctx, "secret")
	if err != nil {
		return err
	}
	say("%-14s got %s again, new serial ...%s, %s after the command started", front.name, e.Name, e.Serial[max(0, len(e.Serial)-8):], ms(time.Since(begin)))
	return nil
}

func (d *demo) status(ctx context.Context) error {
	d.heading("Ask the agent what it knows")
	out, err := d.cli(ctx, "status")
	if err != nil {
		return err
	}
	say("$ kubectl-spiffe status")
	show(out)
	pid := fmt.Sprint(d.pods[0].process.cmd.Process.Pid)
	if out, err = d.cli(ctx, "explain", "--pid", pid); err != nil {
		return err
	}
	say("$ kubectl-spiffe explain --pid %s", pid)
	show(out)
	return nil
}

func (d *demo) remove(ctx context.Context) error {
	d.heading("Delete the pods: processes end, volumes are unpublished")
	d.stopWorkloads()
	for _, p := range d.pods {
		if err := d.unpublish(ctx, p); err != nil {
			return err
		}
		if _, err := os.Lstat(p.target); !os.IsNotExist(err) {
			return fmt.Errorf("%s is still there", p.target)
		}
	}
	left, err := os.ReadDir(d.path("ledger"))
	if err != nil {
		return err
	}
	say("mounts gone, %d publish records left", len(left))
	return nil
}

func (d *demo) stopWorkloads() {
	for _, p := range d.pods {
		if p.process != nil {
			_ = p.process.cmd.Process.Kill()
			_ = p.process.cmd.Wait()
			p.process = nil
		}
	}
}

func (d *demo) cleanup() {
	d.stopWorkloads()
	for _, p := range d.daemons {
		_ = p.cmd.Cancel()
	}
	for _, p := range d.pods {
		removeCgroups(p.cgroups)
	}
}
