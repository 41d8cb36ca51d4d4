// Command csi-driver is the CSI node plugin csi.spiffe.io: it mounts the
// socket directory of the node's agent into pods.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime/debug"

	"github.com/spiffe-node/spiffe-node/internal/daemon"
)

// gcPercent trades a little of the next to no CPU time the driver needs for
// memory, of which there is a process on every node.
const gcPercent = 25

func main() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(gcPercent)
	}
	ctx, cancel := daemon.SignalContext(context.Background())
	defer cancel()
	err := run(ctx, os.Args[1:], os.Getenv, os.Stdout, os.Stderr)
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return
	case errors.Is(err, errUsage):
		fmt.Fprintf(os.Stderr, "csi-driver: %v\n", err)
		os.Exit(2)
	}
	fmt.Fprintf(os.Stderr, "csi-driver: %v\n", err)
	os.Exit(1)
}
