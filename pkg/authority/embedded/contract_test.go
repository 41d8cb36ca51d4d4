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
				cfg := testConfig(t)
				cfg.CAKeyType = keys
				a := start(t, cfg)
				return authoritytest.Harness{
					Authority: a, TrustDomain: td, Agent: node,
					Register: func(t testing.TB, e *entry.Entry) *entry.Entry { return mustCreate(t, a, e) },
					Unregister: func(t testing.TB, e *entry.Entry) {
						if err := a.DeleteEntry(context.Background(), e.ID); err != nil {
							t.Error(err)
						}
					},
					ChangeBundle: func(t testing.TB) {
						if err := a.RotateNow(context.Background()); err != nil {
							t.Error(err)
						}
					},
					Stop: func(t testing.TB) {
						if err := a.Close(); err != nil {
							t.Error(err)
						}
					},
				}
			})
		})
	}
}
