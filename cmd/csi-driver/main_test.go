package main

import (
	"os"
	"testing"

	"go.uber.org/goleak"

	"github.com/spiffe-node/spiffe-node/internal/mount/mounttest"
)

func TestMain(m *testing.M) {
	if code, done := mounttest.Enter(); done {
		os.Exit(code)
	}
	goleak.VerifyTestMain(m)
}
