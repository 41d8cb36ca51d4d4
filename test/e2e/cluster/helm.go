package cluster

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
)

// BuildHelm makes the program that [Cluster.Helm] runs from the module of these
// tests, whose directory is module. It is no part of BuildAll: few tests need it.
func (c *Cluster) BuildHelm(ctx context.Context, module string) error {
	return BuildStatic(ctx, filepath.Join(module, "helm"), "helm.sh/helm/v3/cmd/helm", c.cfg.bin("helm"))
}

// Helm runs helm as administrator and returns its standard output. It finds no
// repositories: charts are directories.
func (c *Cluster) Helm(ctx context.Context, args ...string) (string, error) {
	home := c.cfg.path("helm")
	cmd := exec.CommandContext(ctx, c.cfg.bin("helm"), args...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+c.Kubeconfig(),
		"HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	return output(cmd)
}
