// Command demo shows the product's main job on one machine, without a cluster:
// it plays the kubelet and two pods against the real sds-agent, csi-driver and
// kubectl-spiffe, prints what happens, and leaves nothing behind.
//
// As root, the pods are cgroups as the kubelet makes them and identities follow
// namespace and service account. Without root the same runs in a user
// namespace, where no cgroup can be made: identities follow the program's
// path instead.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		if _, told := errors.AsType[*exec.ExitError](err); !told {
			fmt.Fprintln(os.Stderr, "demo:", err)
		}
		os.Exit(1)
	}
}

func run(args []string) error {
	if len(args) > 1 && args[0] == "workload" {
		return runWorkload(context.Background(), args[1])
	}
	if len(args) > 3 && args[0] == "container" {
		uid, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		return joinAndExec(strings.Fields(args[2]), uid, args[3:])
	}
	flags := flag.NewFlagSet("demo", flag.ContinueOnError)
	bin := flags.String("bin", "bin", "directory with the built commands")
	verbose := flags.Bool("v", false, "print the logs of agent and driver too")
	if err := flags.Parse(args); err != nil {
		return err
	}
	scratch := os.Getenv(inNamespace)
	if scratch == "" {
		dir, err := os.MkdirTemp("", "spiffe-node-demo-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		if err := os.Chmod(dir, 0o755); err != nil {
			return err
		}
		return enter(dir)
	}
	if err := prepare(scratch); err != nil {
		return err
	}
	abs, err := filepath.Abs(*bin)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	d := &demo{bin: abs, dir: scratch, verbose: *verbose, start: time.Now()}
	defer d.cleanup()
	return d.play(ctx)
}
