// Command kubectl-spiffe registers and inspects SPIFFE identities: entries,
// bundles, agents, who is connected and why a pod has this identity, or none.
//
// It runs as `kubectl spiffe` when it is in the PATH, and then reaches the
// authority and the right agent through the cluster of the kubeconfig, as its
// user. With -socketPath, --local or no kubeconfig it uses the admin socket of
// this machine. There it speaks the SPIRE Server API, so it works against a
// SPIRE Server's socket as well, with the flags and the text of the
// spire-server command.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/kube"
)

func main() {
	kube.Quiet()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], system{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv})
	stop()
	os.Exit(code)
}
