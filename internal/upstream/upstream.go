// Package upstream builds the CA above an embedded authority that a
// configuration names, for the programs that have one.
//
// Promise: nothing is asked of files or servers here, so a CA above that is
// away does not keep a program from starting. Threats are those of the kinds of
// CA, in pkg/authority/upstream.
package upstream

import (
	"fmt"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/authority/upstream/disk"
	"github.com/spiffe-node/spiffe-node/pkg/authority/upstream/parent"
)

// Open gives the CA above, or nil where there is none, and a function that
// closes it when the authority below has ended.
func Open(td spiffeid.TrustDomain, cfg config.Upstream, log *slog.Logger) (embedded.Upstream, func() error, error) {
	none := func() error { return nil }
	switch {
	case cfg.DiskEnabled():
		u, err := disk.New(disk.Config{
			TrustDomain: td, CertFile: cfg.Disk.CertFile, KeyFile: cfg.Disk.KeyFile, BundleFile: cfg.Disk.BundleFile, Logger: log,
		})
		if err != nil {
			return nil, none, fmt.Errorf("upstream.disk: %w", err)
		}
		return u, none, nil
	case cfg.ParentEnabled():
		u, err := parent.New(parent.Config{
			TrustDomain: td, Address: cfg.Parent.Address, WorkloadAPISocket: cfg.Parent.WorkloadAPISocket, Logger: log,
		})
		if err != nil {
			return nil, none, fmt.Errorf("upstream.parent: %w", err)
		}
		return u, u.Close, nil
	}
	return nil, none, nil
}
