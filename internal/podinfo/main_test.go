package podinfo_test

import (
	"testing"

	"go.uber.org/goleak"
)

// Client-go keeps idle connections to a real server for all of a process.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("golang.org/x/net/http2.(*ClientConn).readLoop"))
}
