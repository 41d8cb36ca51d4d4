// Command kubectl-spiffe registers and inspects SPIFFE identities of a node:
// entries, bundles, agents, who is connected and why somebody has no identity
// yet. It speaks the SPIRE Server API, so it works against a SPIRE Server's
// socket as well, with the flags and the text of the spire-server command.
//
// It runs as `kubectl spiffe` when it is in the PATH.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	code := run(ctx, os.Args[1:], system{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, getenv: os.Getenv})
	stop()
	os.Exit(code)
}
