package cluster

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// Packages are the Debian packages a cluster needs from the host.
var Packages = []string{"containerd", "runc", "containernetworking-plugins", "etcd-server", "iproute2", "iptables", "util-linux"}

// Commands are the Kubernetes programs that [Build] makes.
var Commands = []string{"kube-apiserver", "kube-controller-manager", "kube-proxy", "kube-scheduler", "kubectl", "kubelet"}

// checkHost says what is missing on this machine and how to get it.
func (c Config) checkHost() error {
	if os.Geteuid() != 0 {
		return errors.New("a cluster needs root: kubelet and containerd mount and make cgroups")
	}
	var missing []string
	for _, tool := range []string{"containerd", "containerd-shim-runc-v2", "ctr", "runc", "etcd", "ip", "iptables", "nsenter"} {
		if _, err := exec.LookPath(tool); err != nil {
			missing = append(missing, tool)
		}
	}
	if _, err := os.Stat("/usr/lib/cni/bridge"); err != nil {
		missing = append(missing, "/usr/lib/cni/bridge")
	}
	if len(missing) > 0 {
		return fmt.Errorf("missing on this machine: %s; run `apt-get install --no-install-recommends %s`", strings.Join(missing, ", "), strings.Join(Packages, " "))
	}
	return nil
}

// BuildAll makes everything Up needs from the module of these tests, whose directory is module.
func BuildAll(ctx context.Context, cfg Config, module string) error {
	if err := Build(ctx, cfg, filepath.Join(module, "kubernetes")); err != nil {
		return err
	}
	cfg, err := cfg.withDefaults()
	if err != nil {
		return err
	}
	return BuildStatic(ctx, module, "./cmd/pause", cfg.bin("pause"))
}

// Build makes the Kubernetes programs from the module in source (this
// repository's test/e2e/kubernetes) into cfg's cache, unless they are there
// already from the same source and Go release. Cold it takes minutes, so it
// runs at the lowest priority.
func Build(ctx context.Context, cfg Config, source string) error {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return err
	}
	stamp, err := buildStamp(source)
	if err != nil {
		return err
	}
	mark := filepath.Join(cfg.Cache, "stamp")
	if have, err := os.ReadFile(mark); err == nil && string(have) == stamp && cfg.haveCommands() {
		return nil
	}
	if err := os.MkdirAll(cfg.bin(""), 0o755); err != nil {
		return fmt.Errorf("making the cache for built binaries: %w", err)
	}
	cfg.Log.Info("building Kubernetes from the module proxy; minutes when cold", slog.String("version", Version), slog.String("into", cfg.bin("")))
	major, minor, _ := strings.Cut(strings.TrimPrefix(Version, "v"), ".")
	minor, _, _ = strings.Cut(minor, ".")
	const pkg = "k8s.io/component-base/version"
	ldflags := fmt.Sprintf("-s -w -X %[1]s.gitVersion=%[2]s -X %[1]s.gitMajor=%[3]s -X %[1]s.gitMinor=%[4]s", pkg, Version, major, minor)
	cmd := exec.CommandContext(ctx, "nice", "-n", "19", "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", ldflags, "-o", cfg.bin("")+"/", "tool")
	cmd.Dir = source
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS="+os.Getenv("E2E_KUBERNETES_GOFLAGS"))
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building Kubernetes in %s: %w\n%s", source, err, tail(out, 20))
	}
	if err := os.WriteFile(mark, []byte(stamp), 0o644); err != nil {
		return fmt.Errorf("marking the build as complete: %w", err)
	}
	return nil
}

func (c Config) haveCommands() bool {
	for _, name := range Commands {
		if _, err := os.Stat(c.bin(name)); errors.Is(err, fs.ErrNotExist) {
			return false
		}
	}
	return true
}

func buildStamp(source string) (string, error) {
	h := sha256.New()
	fmt.Fprintln(h, runtime.Version(), Version)
	for _, name := range []string{"go.mod", "go.sum"} {
		data, err := os.ReadFile(filepath.Join(source, name))
		if err != nil {
			return "", fmt.Errorf("reading the Kubernetes module: %w", err)
		}
		h.Write(data)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// BuildStatic builds the main package pkg of the module in dir without cgo
// and returns the binary's path, out.
func BuildStatic(ctx context.Context, dir, pkg, out string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", out, pkg)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if msg, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("building %s: %w\n%s", pkg, err, tail(msg, 20))
	}
	return nil
}

// tail is the last n lines of text.
func tail(text []byte, n int) []byte {
	lines := bytes.Split(bytes.TrimRight(text, "\n"), []byte("\n"))
	return bytes.Join(lines[max(0, len(lines)-n):], []byte("\n"))
}
