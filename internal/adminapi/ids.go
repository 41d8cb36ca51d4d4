package adminapi

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/spirewire"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// memberID reads an ID of the own trust domain that has a path; agents and the
// server count.
func memberID(td spiffeid.TrustDomain, in *typespb.SPIFFEID) (spiffeid.ID, error) {
	id, err := spirewire.IDFromWire(in)
	if err != nil {
		return spiffeid.ID{}, err
	}
	return id, entry.CheckMember(td, id)
}

// workloadID reads an ID of the own trust domain outside the reserved paths.
func workloadID(td spiffeid.TrustDomain, in *typespb.SPIFFEID) (spiffeid.ID, error) {
	id, err := spirewire.IDFromWire(in)
	if err != nil {
		return spiffeid.ID{}, err
	}
	return id, entry.CheckWorkload(td, id)
}

// agentID reads an ID below /spire/agent/.
func agentID(td spiffeid.TrustDomain, in *typespb.SPIFFEID) (spiffeid.ID, error) {
	id, err := spirewire.IDFromWire(in)
	switch {
	case err != nil:
		return spiffeid.ID{}, err
	case !id.MemberOf(td):
		return spiffeid.ID{}, fmt.Errorf("%q is not a member of trust domain %q", id, td)
	case id.Path() == "":
		return spiffeid.ID{}, fmt.Errorf("%q is not an agent in trust domain %q; path is empty", id, td)
	case !strings.HasPrefix(id.Path(), "/spire/agent/"):
		return spiffeid.ID{}, fmt.Errorf("%q is not an agent in trust domain %q; path is not in the agent namespace", id, td)
	}
	return id, nil
}
