// Command cluster brings a Kubernetes of one node up and down by hand.
package main

import (
	"cmp"
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
)

const usage = `usage: cluster [-dir DIR] [-proxy] COMMAND

  build              build Kubernetes and the pause program into the cache
  up [IMAGE.tar...]  build if needed, start a cluster that stays, import images
  down               end it and remove all it left
  status             which components run
  restart NAME       restart a component (kubelet, kube-apiserver, containerd, ...)
  kubectl ARGS...    kubectl as administrator
  reboot             cut the power of the node; the control plane stays
  node COMMAND...    run a command on the node
  diagnose           print objects, events, logs, mounts
`

func main() {
	if code, ran := cluster.Main(); ran {
		os.Exit(code)
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "cluster:", err)
		os.Exit(1)
	}
}

func run() error {
	cfg := cluster.Config{Detach: true, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	flag.StringVar(&cfg.Dir, "dir", os.Getenv("E2E_CLUSTER_DIR"), "scratch directory of the cluster (default spiffe-node-e2e below the temporary directory)")
	flag.BoolVar(&cfg.KubeProxy, "proxy", false, "run kube-proxy too")
	source := flag.String("source", "", "directory of this module, test/e2e (default: found from the working directory)")
	flag.Usage = func() { fmt.Fprint(os.Stderr, usage) }
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	args := flag.Args()
	switch cmp.Or(flag.Arg(0), "help") {
	case "build":
		return cluster.BuildAll(ctx, cfg, cmp.Or(*source, "."))
	case "up":
		if err := cluster.BuildAll(ctx, cfg, cmp.Or(*source, ".")); err != nil {
			return err
		}
		for _, image := range args[1:] {
			abs, err := filepath.Abs(image)
			if err != nil {
				return err
			}
			cfg.Images = append(cfg.Images, abs)
		}
		c, err := cluster.Up(ctx, cfg)
		if err != nil {
			return err
		}
		fmt.Printf("export KUBECONFIG=%s\n", c.Kubeconfig())
		return nil
	case "down":
		return cluster.Down(ctx, cfg)
	case "help":
		flag.Usage()
		return nil
	}
	c, err := cluster.Open(ctx, cfg)
	if err != nil {
		return err
	}
	switch args[0] {
	case "status":
		st, err := c.Status(ctx)
		if err != nil {
			return err
		}
		for name, pid := range st.Components {
			fmt.Printf("%-24s %d\n", name, pid)
		}
		return nil
	case "restart":
		return c.Restart(ctx, strings.Join(args[1:], " "))
	case "kubectl":
		return attached(c.KubectlCommand(ctx, args[1:]...))
	case "node":
		if len(args) < 2 {
			return fmt.Errorf("node needs a command to run")
		}
		return attached(c.Command(ctx, args[1], args[2:]...))
	case "reboot":
		return c.Reboot(ctx)
	case "diagnose":
		c.Diagnose(ctx, os.Stdout)
		return nil
	}
	return fmt.Errorf("unknown command %q\n%s", args[0], usage)
}

func attached(cmd *exec.Cmd) error {
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	return cmd.Run()
}
