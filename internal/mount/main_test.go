package mount_test

import (
	"os"
	"testing"

	"github.com/spiffe-node/spiffe-node/internal/mount/mounttest"
)

func TestMain(m *testing.M) {
	if code, done := mounttest.Enter(); done {
		os.Exit(code)
	}
	os.Exit(m.Run())
}
