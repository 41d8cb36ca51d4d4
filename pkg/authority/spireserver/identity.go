package spireserver

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
)

// nodeSVID is the agent's own SVID. Immutable.
type nodeSVID struct {
	*x509svid.SVID
	reattestable bool
	renewAt      time.Time
}

func (n *nodeSVID) expires() time.Time { return n.Certificates[0].NotAfter }

// newNodeSVID puts a chain and its key together; it fails unless they belong
// together and to an agent of this trust domain.
func (c *Client) newNodeSVID(chain [][]byte, key crypto.Signer, reattestable bool) (*nodeSVID, error) {
	if len(chain) == 0 {
		return nil, errors.New("agent SVID: the chain is empty")
	}
	svid := &x509svid.SVID{PrivateKey: key}
	for i, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("agent SVID: certificate %d: %w", i, err)
		}
		svid.Certificates = append(svid.Certificates, cert)
	}
	leaf := svid.Certificates[0]
	id, err := x509svid.IDFromCert(leaf)
	switch {
	case err != nil:
		return nil, fmt.Errorf("agent SVID: %w", err)
	case !id.MemberOf(c.cfg.TrustDomain) || !strings.HasPrefix(id.Path(), "/spire/agent/"):
		return nil, fmt.Errorf("agent SVID: %s is no agent of %s", id, c.cfg.TrustDomain)
	case leaf.IsCA:
		return nil, fmt.Errorf("agent SVID: the certificate for %s is a CA", id)
	}
	if pub, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(leaf.PublicKey) {
		return nil, fmt.Errorf("agent SVID: the certificate for %s has another public key than was asked for", id)
	}
	svid.ID = id
	// Half of what is left, give or take a tenth of that, so that nodes which
	// started together do not renew together.
	now := time.Now()
	left := leaf.NotAfter.Sub(now)
	return &nodeSVID{SVID: svid, reattestable: reattestable, renewAt: now.Add(left*9/20 + jitter(max(left/10, 0)))}, nil
}

// keepIdentity keeps the agent attested until ctx ends.
func (c *Client) keepIdentity(ctx context.Context) {
	failures := 0
	for ctx.Err() == nil {
		id := c.identity.Get()
		step, how := c.nextStep(id)
		var wait time.Duration
		if step == nil {
			wait = time.Until(id.renewAt)
		} else {
			err := c.takeStep(ctx, id, step, how)
			if ctx.Err() != nil {
				return
			}
			if err == nil {
				failures = 0
				continue
			}
			wait = c.stepFailed(ctx, id, how, err, failures)
			failures++
		}
		timer := time.NewTimer(max(wait, 0))
		select {
		case <-ctx.Done():
		case <-timer.C:
		case <-c.wakeID:
			if step != nil {
				// Being told again that the SVID is no good shortens no pause.
				select {
				case <-ctx.Done():
				case <-timer.C:
				}
			}
		}
		timer.Stop()
	}
}

// rejectedFor is why the server turned the agent's SVID away; none if it did
// not.
func (c *Client) rejectedFor() reason {
	c.rejectedMu.Lock()
	defer c.rejectedMu.Unlock()
	if c.rejected == nil {
		return none
	}
	return c.rejected.reason
}

// step asks for a new SVID.
type step func(ctx context.Context, old *nodeSVID) (*nodeSVID, error)

// nextStep is what has to be done now; nil = nothing.
func (c *Client) nextStep(id *nodeSVID) (step, string) {
	now := time.Now()
	switch {
	case id == nil || c.rejectedFor() != none || !now.Before(id.expires()):
		return c.attest, "attest"
	case now.Before(id.renewAt) && c.tainted.Load() != id:
		return nil, ""
	case id.reattestable:
		return c.attest, "attest"
	}
	return c.renew, "renew"
}

func (c *Client) takeStep(ctx context.Context, old *nodeSVID, step step, how string) error {
	if c.rejectedFor() == banned && !c.report.status().Banned {
		return errBanned // said once; asked again after a long pause
	}
	c.rotating.Store(true)
	defer c.rotating.Store(false)
	ctx, cancel := context.WithTimeout(ctx, c.cfg.RPCTimeout)
	defer cancel()
	svid, err := step(ctx, old)
	c.met.identity(how, err)
	if err != nil {
		return err
	}
	return c.install(svid, how)
}

// install makes an SVID the agent's.
func (c *Client) install(svid *nodeSVID, how string) error {
	// Before it is used: the server forgets the old SVID when it sees the new
	// one, and an agent that is killed in between must have that.
	c.saveState(svid)
	if err := c.relink(svid, int(c.first.Load())); err != nil {
		return err
	}
	c.rejectedMu.Lock()
	c.rejected = nil
	c.rejectedMu.Unlock()
	c.identity.Set(svid)
	c.met.expiry.Set(float64(svid.expires().Unix()))
	c.report.edit(func(r *report) { r.identityErr, r.s.Banned = nil, false })
	c.log.Info("agent SVID received", slog.String("agent_id", svid.ID.String()), slog.String("how", how),
		slog.Time("expires", svid.expires()), slog.Time("renew_at", svid.renewAt))
	return nil
}

var errBanned = errors.New("the server has banned this agent; lift the ban by evicting it")

// stepFailed notes a failure; the result is the time to wait.
func (c *Client) stepFailed(ctx context.Context, id *nodeSVID, how string, err error, failures int) time.Duration {
	isBanned := errors.Is(err, errBanned) || deniedReason(err) == banned ||
		status.Code(err) == codes.PermissionDenied && strings.Contains(status.Convert(err).Message(), "agent is banned")
	if errors.Is(err, ErrNothingNew) && c.rejectedFor() == banned {
		isBanned = true // and there is no other way in
	}
	wait := pause(failures)
	switch r := deniedReason(err); {
	case errors.Is(err, ErrNothingNew):
		wait = around(tokenPoll) // nobody is asked but the file
	case isBanned:
		wait = around(bannedRetry)
	case r != none && id != nil:
		c.reject(id, r) // renewing is no use; attest instead
		wait = 0
	case unreachable(err) && !handshakeFailed(err):
		wait = around(probeEvery)
	}
	if isBanned {
		c.ban()
	}
	level := slog.LevelWarn
	switch {
	case failures > 0 && failures%100 != 0: // said before
		level = slog.LevelDebug
	case isBanned, errors.Is(err, ErrNothingNew), status.Code(err) == codes.PermissionDenied, status.Code(err) == codes.InvalidArgument:
		level = slog.LevelError
	}
	serves := "until they expire"
	if id == nil {
		serves = "those of the process before, until they expire"
	}
	c.report.edit(func(r *report) { r.identityErr = fmt.Errorf("%s: %w", how, err); r.s.Banned = isBanned })
	c.log.Log(ctx, level, "agent SVID not received", slog.String("how", how), slog.Int("failures", failures+1),
		slog.Duration("retry_in", wait), slog.String("identities_are_served", serves), slog.Any("error", err))
	return wait
}

// newAgentKey is a fresh key with a CSR for it.
func newAgentKey() (*ecdsa.PrivateKey, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("agent key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{Country: []string{"US"}, Organization: []string{"SPIRE"}},
	}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("agent CSR: %w", err)
	}
	return key, csr, nil
}

// renew asks for the next SVID with the present one; both work until the new
// one is first used.
func (c *Client) renew(ctx context.Context, old *nodeSVID) (*nodeSVID, error) {
	l := c.links.acquire()
	if l == nil {
		return nil, errNotAttested
	}
	defer c.links.release(l)
	key, csr, err := newAgentKey()
	if err != nil {
		return nil, err
	}
	var res *agentpb.RenewAgentResponse
	err = c.callOn(ctx, l, "RenewAgent", func(ctx context.Context, cc grpc.ClientConnInterface) error {
		res, err = agentpb.NewAgentClient(cc).RenewAgent(ctx, &agentpb.RenewAgentRequest{Params: &agentpb.AgentX509SVIDParams{Csr: csr}})
		return err
	})
	if err != nil {
		return nil, err
	}
	return c.newNodeSVID(res.GetSvid().GetCertChain(), key, old.reattestable)
}

// attest proves to the server which node this is, over a connection without a
// client certificate.
func (c *Client) attest(ctx context.Context, _ *nodeSVID) (*nodeSVID, error) {
	attestor := c.cfg.Attestor
	proof, err := attestor.Prove(ctx)
	if err != nil {
		return nil, fmt.Errorf("attest node (%s): %w", attestor.Type(), err)
	}
	once := attestor.Type() == JoinToken{}.Type()
	sum := sha256.Sum256(proof.Payload)
	if once && c.isSpent(proof.Payload, sum) {
		return nil, fmt.Errorf("attest node (%s): %w; give the agent a new one", attestor.Type(), ErrNothingNew)
	}
	insecure := &firstContact{client: c}
	cc, err := c.connect(c.serverTLS(nil, insecure.verify), int(c.first.Load()))
	if err != nil {
		return nil, err
	}
	defer cc.Close()
	// The bundle first: whatever comes next is verified with it, and a join
	// token that has been taken is not lost because this failed.
	bundle, err := c.fetchOwn(ctx, cc)
	if err != nil {
		c.first.Add(1)
		return nil, fmt.Errorf("attest node (%s): get trust bundle: %w", attestor.Type(), err)
	}
	if err := insecure.confirm(bundle.X509Bundle()); err != nil {
		return nil, err
	}
	c.setTrust(bundle.X509Bundle(), true)
	key, csr, err := newAgentKey()
	if err != nil {
		return nil, err
	}
	start := time.Now()
	result, err := c.attestOn(ctx, cc, proof, csr)
	c.met.called("AttestAgent", start, err)
	if once && (err == nil || status.Code(err) == codes.InvalidArgument) {
		c.setSpent(sum)
	}
	if err != nil {
		return nil, fmt.Errorf("attest node (%s): %w", attestor.Type(), err)
	}
	if c.cfg.Rebootstrap == RebootstrapAlways && !result.GetReattestable() {
		return nil, fmt.Errorf("attest node (%s): the server attests this node once only, so the agent could not bootstrap anew; "+
			"allow it to attest again, or set authority.spireServer.rebootstrap.mode to auto", attestor.Type())
	}
	return c.newNodeSVID(result.GetSvid().GetCertChain(), key, result.GetReattestable())
}

// maxChallenges bounds the rounds of one attestation.
const maxChallenges = 16

func (c *Client) attestOn(ctx context.Context, cc grpc.ClientConnInterface, proof Proof, csr []byte) (*agentpb.AttestAgentResponse_Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := agentpb.NewAgentClient(cc).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	req := &agentpb.AttestAgentRequest{Step: &agentpb.AttestAgentRequest_Params_{Params: &agentpb.AttestAgentRequest_Params{
		Data:   newAttestationData(c.cfg.Attestor.Type(), proof.Payload),
		Params: &agentpb.AgentX509SVIDParams{Csr: csr},
	}}}
	for range maxChallenges {
		// A failed Send means that the stream has ended; Recv says why.
		if err := stream.Send(req); err != nil && !isEOF(err) {
			return nil, err
		}
		res, err := stream.Recv()
		if err != nil {
			return nil, noEOF(err)
		}
		switch step := res.GetStep().(type) {
		case *agentpb.AttestAgentResponse_Result_:
			_ = stream.CloseSend()
			return step.Result, nil
		case *agentpb.AttestAgentResponse_Challenge:
			if proof.Respond == nil {
				return nil, errChallenge
			}
			answer, err := proof.Respond(step.Challenge)
			if err != nil {
				return nil, err
			}
			req = &agentpb.AttestAgentRequest{Step: &agentpb.AttestAgentRequest_ChallengeResponse{ChallengeResponse: answer}}
		default:
			return nil, fmt.Errorf("%w: an answer to AttestAgent is neither challenge nor result", errProtocol)
		}
	}
	return nil, fmt.Errorf("%w: more than %d challenges", errProtocol, maxChallenges)
}

// isSpent says whether a join token has been used: by this process, or by the
// one before, whose agent ID ends in it.
func (c *Client) isSpent(payload []byte, sum [sha256.Size]byte) bool {
	if id := c.identity.Get(); id != nil && id.ID == c.joinTokenID(payload) {
		return true
	}
	c.trustMu.Lock()
	defer c.trustMu.Unlock()
	return c.spent == sum
}

func (c *Client) joinTokenID(token []byte) spiffeid.ID {
	id, err := spiffeid.FromSegments(c.cfg.TrustDomain, "spire", "agent", "join_token", string(token))
	if err != nil {
		return spiffeid.ID{}
	}
	return id
}

func (c *Client) setSpent(sum [sha256.Size]byte) {
	c.trustMu.Lock()
	defer c.trustMu.Unlock()
	c.spent = sum
}
