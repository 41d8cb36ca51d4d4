// Command csi-driver is the CSI node plugin csi.spiffe.io: it mounts the
// socket directory of the node's agent into pods.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"

	"github.com/spiffe-node/spiffe-node/internal/daemon"
)

func main() {
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
