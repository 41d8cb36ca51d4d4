package main

import (
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// idToWire is the message for an ID. The conversions of internal/spirewire know
// the node's types, which exist on Linux only; people's own machines run other
// systems too.
func idToWire(id spiffeid.ID) *typespb.SPIFFEID {
	if id.IsZero() {
		return nil
	}
	return &typespb.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}
