package embedded_test

import (
	"context"
	"testing"

	"github.com/spiffe-node/spiffe-node/pkg/authority/authoritytest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

func TestContract(t *testing.T) {
	for _, keys := range []embedded.KeyType{embedded.ECP256, embedded.ECP384, embedded.RSA2048} {
		t.Run(string(keys), func(t *testing.T) {
			authoritytest.Run(t, func(t *testing.T) authoritytest.Harness {
				t.Helper()
				cfg := testConfig(t)
				cfg.CAKeyType = keys
				a := start(t, cfg)
				return authoritytest.Harness{
					Authority: a, TrustDomain: td, Agent: node,
					Register: func(tb testing.TB, e *entry.Entry) *entry.Entry {
						tb.Helper()
						return mustCreate(tb, a, e)
					},
					Unregister: func(tb testing.TB, e *entry.Entry) {
						tb.Helper()
						if err := a.DeleteEntry(context.Background(), e.ID); err != nil {
							tb.Error(err)
						}
					},
					ChangeBundle: func(tb testing.TB) {
						tb.Helper()
						if err := a.RotateNow(context.Background()); err != nil {
							tb.Error(err)
						}
					},
					Stop: func(tb testing.TB) {
						tb.Helper()
						if err := a.Close(); err != nil {
							tb.Error(err)
						}
					},
				}
			})
		})
	}
}
