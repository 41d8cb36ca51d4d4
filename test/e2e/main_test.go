// Package e2e_test runs the bundle on a real kubelet. It needs root and what
// run.sh installs and builds.
package e2e_test

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
)

const (
	productImage = "spiffe-node.test/spiffe-node:e2e"
	probeImage   = "spiffe-node.test/probe:e2e"
)

// node is the cluster that all tests share.
var node *cluster.Cluster

// plugin is the file of kubectl-spiffe.
var plugin string

func TestMain(m *testing.M) {
	if code, ran := cluster.Main(); ran {
		os.Exit(code)
	}
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (int, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Minute)
	defer cancel()
	cfg := cluster.Config{Log: slog.New(slog.NewTextHandler(os.Stderr, nil)), Dir: os.Getenv("E2E_CLUSTER_DIR"), KubeProxy: true}
	if err := cluster.BuildAll(ctx, cfg, "."); err != nil {
		return 1, err
	}
	built, err := cluster.CacheDir(cfg, "images")
	if err != nil {
		return 1, err
	}
	if cfg.Images, err = buildImages(ctx, built); err != nil {
		return 1, err
	}
	if node, err = cluster.Up(ctx, cfg); err != nil {
		return 1, err
	}
	code := m.Run()
	if keep := os.Getenv("E2E_KEEP"); keep != "" {
		fmt.Fprintf(os.Stderr, "e2e: keeping the cluster for %s; KUBECONFIG=%s\n", keep, node.Kubeconfig())
		if wait, err := time.ParseDuration(keep); err == nil {
			time.Sleep(wait)
		}
	}
	return code, node.Close(context.WithoutCancel(ctx))
}

// rigOnly is for work on the rig: the product is neither built nor tested.
func rigOnly() bool { return os.Getenv("E2E_RIG_ONLY") != "" }

// buildImages builds the product and the probe and returns their archives: one
// image with all commands, for plain manifests, and the images that the chart names.
func buildImages(ctx context.Context, dir string) ([]string, error) {
	product := cluster.Image{Name: productImage, Files: map[string]string{}}
	commands := []string{"sds-agent", "csi-driver", "kubectl-spiffe", "authority"}
	if rigOnly() {
		commands = nil
	}
	platform := "linux-" + runtime.GOARCH
	for _, name := range commands {
		bin := filepath.Join(dir, platform, name)
		if err := cluster.BuildStatic(ctx, "../..", "./cmd/"+name, bin); err != nil {
			return nil, err
		}
		product.Files["/"+name] = bin
	}
	plugin = product.Files["/kubectl-spiffe"]
	if err := cluster.BuildStatic(ctx, ".", "./cmd/probe", filepath.Join(dir, "probe")); err != nil {
		return nil, err
	}
	workload := cluster.Image{Name: probeImage, Files: map[string]string{"/probe": filepath.Join(dir, "probe")}, Entrypoint: []string{"/probe"}, User: "1337:1337"}
	var files []string
	for _, img := range []cluster.Image{product, workload} {
		file := filepath.Join(dir, fmt.Sprintf("image-%d.tar", len(files)))
		if err := cluster.WriteImage(file, img); err != nil {
			return nil, err
		}
		files = append(files, file)
	}
	if rigOnly() {
		return files, nil
	}
	out := filepath.Join(dir, "oci")
	if err := os.RemoveAll(out); err != nil {
		return nil, err
	}
	pack := exec.CommandContext(ctx, "go", "run", ".", "-bin", dir, "-out", out, "-tag", chartTag, "-platforms", "linux/"+runtime.GOARCH)
	pack.Dir = "../../deploy/images"
	if text, err := pack.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("packing images in %s: %w\n%s", pack.Dir, err, text)
	}
	archives, err := filepath.Glob(filepath.Join(out, "*.tar"))
	return append(files, archives...), err
}
