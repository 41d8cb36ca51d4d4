package adminapi

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	grpcpeer "google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/localauthoritypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/trustdomainpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/internal/watchpb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// callers are classes of callers over TLS.
type callers uint8

const (
	byAnyone callers = 1 << iota
	byAdmin
	byDownstream
	byAgent
)

// remotePolicy is SPIRE Server's default policy, and who may watch. What is not
// in it is denied.
var remotePolicy = map[string]callers{
	agentpb.Agent_CountAgents_FullMethodName:     byAdmin,
	agentpb.Agent_ListAgents_FullMethodName:      byAdmin,
	agentpb.Agent_GetAgent_FullMethodName:        byAdmin,
	agentpb.Agent_DeleteAgent_FullMethodName:     byAdmin,
	agentpb.Agent_BanAgent_FullMethodName:        byAdmin,
	agentpb.Agent_AttestAgent_FullMethodName:     byAnyone,
	agentpb.Agent_RenewAgent_FullMethodName:      byAgent,
	agentpb.Agent_CreateJoinToken_FullMethodName: byAdmin,
	agentpb.Agent_PostStatus_FullMethodName:      byAgent,

	bundlepb.Bundle_CountBundles_FullMethodName:               byAdmin,
	bundlepb.Bundle_GetBundle_FullMethodName:                  byAnyone,
	bundlepb.Bundle_AppendBundle_FullMethodName:               byAdmin,
	bundlepb.Bundle_PublishJWTAuthority_FullMethodName:        byDownstream,
	bundlepb.Bundle_PublishWITAuthority_FullMethodName:        byDownstream,
	bundlepb.Bundle_ListFederatedBundles_FullMethodName:       byAdmin,
	bundlepb.Bundle_GetFederatedBundle_FullMethodName:         byAdmin | byAgent,
	bundlepb.Bundle_BatchCreateFederatedBundle_FullMethodName: byAdmin,
	bundlepb.Bundle_BatchUpdateFederatedBundle_FullMethodName: byAdmin,
	bundlepb.Bundle_BatchSetFederatedBundle_FullMethodName:    byAdmin,
	bundlepb.Bundle_BatchDeleteFederatedBundle_FullMethodName: byAdmin,

	entrypb.Entry_CountEntries_FullMethodName:          byAdmin,
	entrypb.Entry_ListEntries_FullMethodName:           byAdmin,
	entrypb.Entry_GetEntry_FullMethodName:              byAdmin,
	entrypb.Entry_BatchCreateEntry_FullMethodName:      byAdmin,
	entrypb.Entry_BatchUpdateEntry_FullMethodName:      byAdmin,
	entrypb.Entry_BatchDeleteEntry_FullMethodName:      byAdmin,
	entrypb.Entry_GetAuthorizedEntries_FullMethodName:  byAgent,
	entrypb.Entry_SyncAuthorizedEntries_FullMethodName: byAgent,

	localauthoritypb.LocalAuthority_GetJWTAuthorityState_FullMethodName:        byAdmin,
	localauthoritypb.LocalAuthority_PrepareJWTAuthority_FullMethodName:         byAdmin,
	localauthoritypb.LocalAuthority_ActivateJWTAuthority_FullMethodName:        byAdmin,
	localauthoritypb.LocalAuthority_TaintJWTAuthority_FullMethodName:           byAdmin,
	localauthoritypb.LocalAuthority_RevokeJWTAuthority_FullMethodName:          byAdmin,
	localauthoritypb.LocalAuthority_GetX509AuthorityState_FullMethodName:       byAdmin,
	localauthoritypb.LocalAuthority_PrepareX509Authority_FullMethodName:        byAdmin,
	localauthoritypb.LocalAuthority_ActivateX509Authority_FullMethodName:       byAdmin,
	localauthoritypb.LocalAuthority_TaintX509Authority_FullMethodName:          byAdmin,
	localauthoritypb.LocalAuthority_RevokeX509Authority_FullMethodName:         byAdmin,
	localauthoritypb.LocalAuthority_TaintX509UpstreamAuthority_FullMethodName:  byAdmin,
	localauthoritypb.LocalAuthority_RevokeX509UpstreamAuthority_FullMethodName: byAdmin,
	localauthoritypb.LocalAuthority_GetWITAuthorityState_FullMethodName:        byAdmin,
	localauthoritypb.LocalAuthority_PrepareWITAuthority_FullMethodName:         byAdmin,
	localauthoritypb.LocalAuthority_ActivateWITAuthority_FullMethodName:        byAdmin,
	localauthoritypb.LocalAuthority_TaintWITAuthority_FullMethodName:           byAdmin,
	localauthoritypb.LocalAuthority_RevokeWITAuthority_FullMethodName:          byAdmin,

	svidpb.SVID_MintX509SVID_FullMethodName:        byAdmin,
	svidpb.SVID_MintJWTSVID_FullMethodName:         byAdmin,
	svidpb.SVID_MintWITSVID_FullMethodName:         byAdmin,
	svidpb.SVID_BatchNewX509SVID_FullMethodName:    byAgent,
	svidpb.SVID_NewJWTSVID_FullMethodName:          byAgent,
	svidpb.SVID_BatchNewWITSVID_FullMethodName:     byAgent,
	svidpb.SVID_NewDownstreamX509CA_FullMethodName: byDownstream,

	trustdomainpb.TrustDomain_ListFederationRelationships_FullMethodName:       byAdmin,
	trustdomainpb.TrustDomain_GetFederationRelationship_FullMethodName:         byAdmin,
	trustdomainpb.TrustDomain_BatchCreateFederationRelationship_FullMethodName: byAdmin,
	trustdomainpb.TrustDomain_BatchUpdateFederationRelationship_FullMethodName: byAdmin,
	trustdomainpb.TrustDomain_BatchDeleteFederationRelationship_FullMethodName: byAdmin,
	trustdomainpb.TrustDomain_RefreshBundle_FullMethodName:                     byAdmin,

	watchpb.Watch_Watch_FullMethodName:       byAgent,
	watchpb.Watch_ReportTrust_FullMethodName: byAgent,
}

// caller is who is at the other end of a TLS connection.
type caller struct {
	address netip.Addr
	id      spiffeid.ID // zero = no certificate
	cert    *x509.Certificate
	// agent is the record of an agent that passed the agent check of this call.
	agent *embedded.Agent
}

type callerKey struct{}

func callerOf(ctx context.Context) *caller {
	if c, ok := ctx.Value(callerKey{}).(*caller); ok {
		return c
	}
	return &caller{} // a call on the socket
}

// peerIdentity reads who is at the other end; the handshake has verified the
// certificate, if there is one.
func peerIdentity(p *grpcpeer.Peer) (*caller, error) {
	c := &caller{}
	if a, ok := p.Addr.(*net.TCPAddr); ok {
		c.address = a.AddrPort().Addr().Unmap()
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return c, nil
	}
	c.cert = info.State.PeerCertificates[0]
	if n := len(c.cert.URIs); n != 1 {
		return nil, status.Errorf(codes.Unauthenticated, "client certificate has %d URI SANs, not one", n)
	}
	id, err := spiffeid.FromURI(c.cert.URIs[0])
	if err != nil {
		return nil, status.Errorf(codes.Unauthenticated, "client certificate has a bad URI SAN: %v", err)
	}
	c.id = id
	return c, nil
}

// allow is the policy for callers over TLS, in SPIRE Server's order.
func (r *Remote) allow(ctx context.Context, method string) (context.Context, error) {
	p, ok := grpcpeer.FromContext(ctx)
	if !ok {
		return nil, errDenied(method)
	}
	c, err := peerIdentity(p)
	if err != nil {
		return nil, err
	}
	may := remotePolicy[method]
	with := context.WithValue(ctx, callerKey{}, c)
	switch {
	case may&byAnyone != 0:
		return with, nil
	case c.id.IsZero():
		return nil, errDenied(method)
	case may&byAdmin != 0 && slices.Contains(r.cfg.AdminIDs, c.id):
		return with, nil
	case may&r.entitled(c.id) != 0:
		return with, nil
	case may&byAgent != 0:
		if c.agent, err = r.cfg.Nodes.checkAgent(ctx, method, c); err != nil {
			return nil, err
		}
		r.cfg.Nodes.cfg.Authority.AgentSeen(c.agent.ID)
		return with, nil
	}
	return nil, errDenied(method)
}

// entitled is what the entries of an ID make of it.
func (r *Remote) entitled(id spiffeid.ID) (is callers) {
	for e := range r.cfg.Authority.Set().BySPIFFEID(id) {
		if e.Admin {
			is |= byAdmin
		}
		if e.Downstream {
			is |= byDownstream
		}
	}
	return is
}

// checkAgent says whether the caller is an agent in good standing, and makes a
// renewed SVID the current one when it is used for the first time.
func (n *Nodes) checkAgent(ctx context.Context, method string, c *caller) (*embedded.Agent, error) {
	if !time.Now().Before(c.cert.NotAfter) {
		return nil, errAgent(method, typespb.PermissionDeniedDetails_AGENT_EXPIRED)
	}
	agent, reason := n.standing(c)
	switch {
	case reason != 0:
		return nil, errAgent(method, reason)
	case agent.Serial == c.serial():
		return agent, nil
	}
	promoted, err := n.cfg.Authority.UpdateAgent(ctx, c.id, func(a *embedded.Agent) error {
		if !promote(a, c.serial()) {
			return errAgent(method, typespb.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
		}
		return nil
	})
	switch {
	case err == nil:
		return promoted, nil
	case status.Code(err) == codes.PermissionDenied:
		return nil, err
	}
	// A full disk must not lock agents out: until it can be stored that the new
	// SVID is in use, both count.
	n.cfg.Logger.ErrorContext(ctx, "the renewal of an agent's SVID could not be recorded", slog.String("agent_id", c.id.String()), slog.Any("error", err))
	return agent, nil
}

// promote makes the SVID that is in use the current one; false if it is neither
// that nor the renewed one.
func promote(a *embedded.Agent, serial string) bool {
	switch serial {
	case a.Serial: // or another call was faster
		return true
	case a.NewSerial:
		a.Serial, a.ExpiresAt, a.NewSerial, a.NewExpiresAt = a.NewSerial, a.NewExpiresAt, "", time.Time{}
		return true
	}
	return false
}

// standing is the record of an agent, or why its SVID does not count.
func (n *Nodes) standing(c *caller) (*embedded.Agent, typespb.PermissionDeniedDetails_Reason) {
	agent, err := n.cfg.Authority.Agent(c.id)
	switch {
	case err != nil:
		return nil, typespb.PermissionDeniedDetails_AGENT_NOT_ATTESTED
	case agent.Banned || agent.Serial == "":
		return nil, typespb.PermissionDeniedDetails_AGENT_BANNED
	case agent.Serial != c.serial() && agent.NewSerial != c.serial():
		return nil, typespb.PermissionDeniedDetails_AGENT_NOT_ACTIVE
	}
	return agent, 0
}

// serial is decimal, as it is stored.
func (c *caller) serial() string { return c.cert.SerialNumber.String() }

// errAgent is a denial that tells an agent what to do about it.
func errAgent(method string, reason typespb.PermissionDeniedDetails_Reason) error {
	return withReason(status.Convert(errDenied(method)), reason)
}

func withReason(st *status.Status, reason typespb.PermissionDeniedDetails_Reason) error {
	detailed, err := st.WithDetails(&typespb.PermissionDeniedDetails{Reason: reason})
	if err != nil {
		return st.Err()
	}
	return detailed.Err()
}
