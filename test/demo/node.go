package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// daemonProcess is one of our commands, running.
type daemonProcess struct {
	cmd *exec.Cmd
	log *bytes.Buffer
}

// startDaemon starts a command and waits until its health endpoint says ready.
func (d *demo) startDaemon(ctx context.Context, name, health string, args ...string) (*daemonProcess, time.Duration, error) {
	begin := time.Now()
	p := &daemonProcess{cmd: exec.Command(filepath.Join(d.bin, name), args...), log: new(bytes.Buffer)}
	p.cmd.Stdout, p.cmd.Stderr = p.log, p.log
	if d.verbose {
		p.cmd.Stdout, p.cmd.Stderr = os.Stderr, os.Stderr
	}
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, 0, fmt.Errorf("start %s: %w", name, err)
	}
	d.daemons = append(d.daemons, p)
	exited := make(chan error, 1)
	go func() { exited <- p.cmd.Wait() }()
	p.cmd.Cancel = func() error {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		return <-exited
	}
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+health+"/readyz", nil)
		if err != nil {
			return nil, 0, err
		}
		if res, err := http.DefaultClient.Do(req); err == nil {
			_ = res.Body.Close()
			if res.StatusCode == http.StatusOK {
				return p, time.Since(begin), nil
			}
		}
		select {
		case err := <-exited:
			return nil, 0, fmt.Errorf("%s ended before it was ready: %w\n%s", name, err, p.log)
		case <-ctx.Done():
			return nil, 0, fmt.Errorf("%s never became ready: %w\n%s", name, ctx.Err(), p.log)
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// pod is what the kubelet knows of a pod with one of our volumes.
type pod struct {
	name, namespace, serviceAccount, uid string

	target  string // where the volume is published
	volume  string // the kubelet's volume id
	cgroups []string
	process *workloadProcess
}

const volumeName = "spiffe-workload-api"

// publish does what the kubelet does before a pod's containers start.
func (d *demo) publish(ctx context.Context, p *pod) (time.Duration, error) {
	p.target = filepath.Join(d.kubelet(), "pods", p.uid, "volumes", "kubernetes.io~csi", volumeName, "mount")
	p.volume = fmt.Sprintf("csi-%x", sha256.Sum256([]byte(p.uid+volumeName)))
	if err := os.MkdirAll(filepath.Dir(p.target), 0o750); err != nil {
		return 0, err
	}
	// The kubelet's directories are 0750; a container sees the volume through
	// its own mounts, this demo's workloads through the host's.
	for dir := filepath.Dir(p.target); dir != d.kubelet(); dir = filepath.Dir(dir) {
		if err := os.Chmod(dir, 0o755); err != nil {
			return 0, err
		}
	}
	begin := time.Now()
	err := d.csi(func(c csi.NodeClient) error {
		_, err := c.NodePublishVolume(ctx, &csi.NodePublishVolumeRequest{
			VolumeId:   p.volume,
			TargetPath: p.target,
			Readonly:   true,
			VolumeCapability: &csi.VolumeCapability{
				AccessType: &csi.VolumeCapability_Mount{Mount: &csi.VolumeCapability_MountVolume{}},
				AccessMode: &csi.VolumeCapability_AccessMode{Mode: csi.VolumeCapability_AccessMode_SINGLE_NODE_WRITER},
			},
			VolumeContext: map[string]string{
				"csi.storage.k8s.io/ephemeral":           "true",
				"csi.storage.k8s.io/pod.name":            p.name,
				"csi.storage.k8s.io/pod.namespace":       p.namespace,
				"csi.storage.k8s.io/pod.uid":             p.uid,
				"csi.storage.k8s.io/serviceAccount.name": p.serviceAccount,
			},
		})
		return err
	})
	return time.Since(begin), err
}

func (d *demo) unpublish(ctx context.Context, p *pod) error {
	return d.csi(func(c csi.NodeClient) error {
		_, err := c.NodeUnpublishVolume(ctx, &csi.NodeUnpublishVolumeRequest{VolumeId: p.volume, TargetPath: p.target})
		return err
	})
}

func (d *demo) csi(call func(csi.NodeClient) error) error {
	conn, err := grpc.NewClient("unix:"+d.path("csi.sock"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	return call(csi.NewNodeClient(conn))
}

// cli runs kubectl-spiffe as an operator would and gives back what it printed.
func (d *demo) cli(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(d.bin, "kubectl-spiffe"), append(args, "-socketPath", d.path("admin", "api.sock"))...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("kubectl-spiffe %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return strings.TrimRight(string(out), "\n"), nil
}

// copyProgram gives a workload an executable of its own, so that its path can
// tell it from others.
func copyProgram(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, in); err != nil {
		_ = out.Close()
		return err
	}
	return out.Close()
}
