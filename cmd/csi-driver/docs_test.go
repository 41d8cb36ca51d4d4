package main

import (
	"flag"
	"io"
	"testing"

	"github.com/spiffe-node/spiffe-node/internal/doctest"
)

var update = flag.Bool("update", false, "rewrite the flag table in docs/configuration.md")

func TestFlagsAreDocumented(t *testing.T) {
	doctest.Block(t, "../../docs/configuration.md", "driver-flags", doctest.Flags(flagSet(&options{}, io.Discard)), *update)
}
