package cluster

import (
	"bytes"
	"context"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func podPath(namespace, name string) string {
	path := "/api/v1/namespaces/" + url.PathEscape(namespace) + "/pods"
	if name != "" {
		path += "/" + url.PathEscape(name)
	}
	return path
}

func queryEscape(s string) string { return url.QueryEscape(s) }

// Kubeconfig is the administrator's, for programs on this machine.
func (c *Cluster) Kubeconfig() string { return c.cfg.path("kubeconfig") }

// NodeName is the node's name in the API.
func (c *Cluster) NodeName() string { return c.cfg.NodeName }

// Dir is the cluster's scratch directory, the same path inside and outside.
func (c *Cluster) Dir() string { return c.cfg.Dir }

// LogFile is a component's log on this machine.
func (c *Cluster) LogFile(component string) string { return c.cfg.path("logs", component+".log") }

// NodePath is where a path of the node is found from outside, sockets included.
func (c *Cluster) NodePath(path string) string {
	return filepath.Join("/proc", strconv.Itoa(c.state.Init), "root", path)
}

// Mounts reads the node's mount table.
func (c *Cluster) Mounts() ([]Mount, error) {
	table, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(c.state.Init), "mountinfo"))
	if err != nil {
		return nil, fmt.Errorf("reading the node's mount table: %w", err)
	}
	return parseMounts(table)
}

// Command builds a command that runs on the node: in all the namespaces
// that the kubelet is in.
func (c *Cluster) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	all := append([]string{"--target", strconv.Itoa(c.state.Init), "--mount", "--pid", "--net", "--uts", "--ipc", "--", name}, args...)
	cmd := exec.CommandContext(ctx, "nsenter", all...)
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGKILL) }
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// OnNode runs a command on the node and returns its standard output.
func (c *Cluster) OnNode(ctx context.Context, name string, args ...string) (string, error) {
	return output(c.Command(ctx, name, args...))
}

// Kubectl runs kubectl as administrator and returns its standard output.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	return c.KubectlInput(ctx, "", args...)
}

// KubectlInput is Kubectl with standard input.
func (c *Cluster) KubectlInput(ctx context.Context, input string, args ...string) (string, error) {
	cmd := c.KubectlCommand(ctx, args...)
	cmd.Stdin = strings.NewReader(input)
	return output(cmd)
}

// KubectlCommand builds a kubectl command for callers that attach their own input and output.
func (c *Cluster) KubectlCommand(ctx context.Context, args ...string) *exec.Cmd {
	all := append([]string{"--kubeconfig", c.Kubeconfig(), "--cache-dir", c.cfg.path("kubectl-cache")}, args...)
	return exec.CommandContext(ctx, c.cfg.bin("kubectl"), all...)
}

// Apply applies manifests in YAML or JSON.
func (c *Cluster) Apply(ctx context.Context, manifests string) error {
	_, err := c.KubectlInput(ctx, manifests, "apply", "--server-side", "-f", "-")
	return err
}

// Delete deletes what is in the manifests and waits until it is gone. Kinds
// that are no longer known have no objects.
func (c *Cluster) Delete(ctx context.Context, manifests string) error {
	_, err := c.KubectlInput(ctx, manifests, "delete", "--ignore-not-found", "--wait", "-f", "-")
	return err
}

// Exec runs a command in a container through the API server and the kubelet.
func (c *Cluster) Exec(ctx context.Context, namespace, pod, container string, command ...string) (string, error) {
	args := []string{"exec", "--namespace", namespace, pod}
	if container != "" {
		args = append(args, "--container", container)
	}
	return c.Kubectl(ctx, append(append(args, "--"), command...)...)
}

// ImportImage imports an archive that [WriteImage] made.
func (c *Cluster) ImportImage(ctx context.Context, file string) error {
	_, err := c.OnNode(ctx, "ctr", "--address", containerdSocket, "--namespace", "k8s.io", "images", "import", file)
	return err
}

// Restart ends a component with SIGTERM, starts it again and, for the kubelet
// and the API server, returns when it answers on its health port.
func (c *Cluster) Restart(ctx context.Context, name string) error {
	if err := c.Stop(ctx, name); err != nil {
		return err
	}
	if err := c.Start(ctx, name); err != nil {
		return err
	}
	health := map[string]string{"kubelet": "http://127.0.0.1:10248/healthz"}[name]
	return Poll(ctx, 100*time.Millisecond, func(ctx context.Context) error {
		switch {
		case name == "kube-apiserver":
			return c.API(ctx, http.MethodGet, "/readyz", nil, nil)
		case health != "":
			_, err := c.HTTP(ctx, health)
			return err
		}
		return nil
	})
}

// HTTP gets url as a process on the node would, pods' addresses included.
func (c *Cluster) HTTP(ctx context.Context, url string) (string, error) {
	var text string
	return text, c.control(ctx, http.MethodGet, "/probe?url="+queryEscape(url), &text)
}

func output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, tail(append(stderr.Bytes(), stdout.Bytes()...), 15))
	}
	return stdout.String(), nil
}
