package spireserver_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/internal/watchpb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
)

// root is a CA.
type root struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

func newRoot() *root {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	point, err := key.PublicKey.Bytes()
	must(err)
	skid := sha256.Sum256(point)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign, SubjectKeyId: skid[:20],
		URIs: []*url.URL{td.ID().URL()},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	must(err)
	cert, err := x509.ParseCertificate(der)
	must(err)
	return &root{key, cert}
}

func (r *root) issue(serial int64, id spiffeid.ID, pub any, ttl time.Duration) []byte {
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(ttl),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true, URIs: []*url.URL{id.URL()},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, r.cert, pub, r.key)
	must(err)
	return der
}

// record is an attested agent.
type record struct {
	serial, next string
	banned       bool
}

// fake is a SPIRE Server by the book, whose every answer a test can change.
type fake struct {
	agentpb.UnimplementedAgentServer
	entrypb.UnimplementedEntryServer
	svidpb.UnimplementedSVIDServer
	bundlepb.UnimplementedBundleServer
	watchpb.UnimplementedWatchServer

	mu           sync.Mutex
	root         *root
	roots        []*typespb.X509Certificate
	jwtKey       *ecdsa.PrivateKey
	kid          string
	name         spiffeid.ID // of the server's certificate
	agentTTL     time.Duration
	reattestable bool
	tokens       map[string]bool // unused join tokens
	agents       map[spiffeid.ID]*record
	entries      []*typespb.Entry
	pageSize     int
	noSync       bool
	federated    map[string]*typespb.Bundle
	fail         map[string]error // by method name
	calls        map[string]int
	batches      []int      // sizes
	wanted       [][]string // IDs asked for in SyncAuthorizedEntries
	version      string     // from PostStatus
	sequence     uint64
	serials      int64

	// challenge, if set, is asked of whoever attests; it gets the payload.
	challenge func(payload []byte) (ask []byte, verify func([]byte) bool)
	kex       tls.CurveID // the only one the server agrees on; 0 = any

	sync  func(stream entrypb.Entry_SyncAuthorizedEntriesServer) error // nil = by the book
	sign  func(p *svidpb.NewX509SVIDParams) *svidpb.BatchNewX509SVIDResponse_Result
	watch func(req *watchpb.WatchRequest, stream watchpb.Watch_WatchServer) error // nil = unimplemented
	told  func(r *watchpb.TrustReport)                                            // nil = unimplemented

	lis  *bufconn.Listener // nil = down
	grpc *grpc.Server
}

func newFake() *fake {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(err)
	f := &fake{
		root: newRoot(), jwtKey: key, kid: "key-1", name: spiffeid.RequireFromPath(td, "/spire/server"), agentTTL: time.Hour,
		tokens: map[string]bool{}, agents: map[spiffeid.ID]*record{}, pageSize: 500,
		federated: map[string]*typespb.Bundle{}, fail: map[string]error{}, calls: map[string]int{},
	}
	f.roots = []*typespb.X509Certificate{{Asn1: f.root.cert.Raw}}
	return f
}

// edit changes the server's state.
func (f *fake) edit(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.sequence++
	change()
}

func (f *fake) count(method string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[method]
}

// up starts the server; the end of the test stops it.
func (f *fake) up(t *testing.T) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	f.lis = bufconn.Listen(1 << 16)
	config := &tls.Config{
		MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"}, ClientAuth: tls.RequestClientCert,
		GetCertificate: f.certificate, VerifyPeerCertificate: f.verify,
	}
	if f.kex != 0 {
		config.CurvePreferences = []tls.CurveID{f.kex}
	}
	f.grpc = grpc.NewServer(grpc.Creds(credentials.NewTLS(config)), grpc.UnaryInterceptor(f.unary), grpc.StreamInterceptor(f.stream))
	agentpb.RegisterAgentServer(f.grpc, f)
	entrypb.RegisterEntryServer(f.grpc, f)
	svidpb.RegisterSVIDServer(f.grpc, f)
	bundlepb.RegisterBundleServer(f.grpc, f)
	if f.watch != nil {
		watchpb.RegisterWatchServer(f.grpc, f)
	}
	srv, lis := f.grpc, f.lis
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(lis)
	}()
	t.Cleanup(func() { srv.Stop(); <-done })
}

func (f *fake) down() {
	f.mu.Lock()
	srv := f.grpc
	f.lis = nil
	f.mu.Unlock()
	srv.Stop()
}

func (f *fake) dial(ctx context.Context, address string) (net.Conn, error) {
	f.mu.Lock()
	lis := f.lis
	f.mu.Unlock()
	if address == "silent:1" {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	if lis == nil || address == "dead:1" {
		return nil, errors.New("connection refused")
	}
	return lis.DialContext(ctx)
}

func (f *fake) certificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	f.serials++
	return &tls.Certificate{Certificate: [][]byte{f.root.issue(f.serials, f.name, key.Public(), time.Hour)}, PrivateKey: key}, err
}

// verify ends the handshake with whoever has a certificate of another root, as
// a SPIRE Server does.
func (f *fake) verify(raw [][]byte, _ [][]*x509.Certificate) error {
	if len(raw) == 0 {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	trust := x509bundle.New(td)
	for _, r := range f.roots {
		certs, err := x509.ParseCertificates(r.GetAsn1())
		must(err)
		trust.AddX509Authority(certs[0])
	}
	_, _, err := x509svid.ParseAndVerify(raw, trust)
	return err
}

func (f *fake) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := f.enter(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (f *fake) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := f.enter(ss.Context(), info.FullMethod); err != nil {
		return err
	}
	return next(srv, ss)
}

// enter counts a call, fails it as the test wants, and lets only attested
// agents to what is for them.
func (f *fake) enter(ctx context.Context, full string) error {
	method := full[slices.Index([]byte(full[1:]), '/')+2:]
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls[method]++
	if err := f.fail[method]; err != nil {
		return err
	}
	if method == "AttestAgent" || method == "GetBundle" {
		return nil
	}
	return f.checkAgentLocked(ctx)
}

func denied(r typespb.PermissionDeniedDetails_Reason) error {
	s, err := status.New(codes.PermissionDenied, "authorization denied").WithDetails(&typespb.PermissionDeniedDetails{Reason: r})
	must(err)
	return s.Err()
}

func (f *fake) checkAgentLocked(ctx context.Context) error {
	id, serial, notAfter := caller(ctx)
	r := f.agents[id]
	switch {
	case id.IsZero():
		return status.Error(codes.PermissionDenied, "authorization denied")
	case !time.Now().Before(notAfter):
		return denied(typespb.PermissionDeniedDetails_AGENT_EXPIRED)
	case r == nil:
		return denied(typespb.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	case r.banned:
		return denied(typespb.PermissionDeniedDetails_AGENT_BANNED)
	case serial == r.serial:
		return nil
	case serial == r.next:
		r.serial, r.next = r.next, ""
		return nil
	}
	return denied(typespb.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
}

func caller(ctx context.Context) (id spiffeid.ID, serial string, notAfter time.Time) {
	p, _ := peer.FromContext(ctx)
	certs := p.AuthInfo.(credentials.TLSInfo).State.PeerCertificates
	if len(certs) == 0 {
		return id, "", notAfter
	}
	id, err := spiffeid.FromURI(certs[0].URIs[0])
	must(err)
	return id, certs[0].SerialNumber.String(), certs[0].NotAfter
}

func (f *fake) agentSVID(id spiffeid.ID, csr []byte) (*typespb.X509SVID, string) {
	req, err := x509.ParseCertificateRequest(csr)
	must(err)
	f.serials++
	return &typespb.X509SVID{CertChain: [][]byte{f.root.issue(f.serials, id, req.PublicKey, f.agentTTL)}}, fmt.Sprint(f.serials)
}

func (f *fake) AttestAgent(stream agentpb.Agent_AttestAgentServer) error {
	req, err := stream.Recv()
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	token := string(req.GetParams().GetData().GetPayload())
	if kind := req.GetParams().GetData().GetType(); kind == "join_token" {
		if !f.tokens[token] {
			return status.Error(codes.InvalidArgument, "failed to attest: join token does not exist or has already been used")
		}
		delete(f.tokens, token)
	} else {
		token = kind
	}
	if f.challenge != nil {
		ask, verify := f.challenge(req.GetParams().GetData().GetPayload())
		must(stream.Send(&agentpb.AttestAgentResponse{Step: &agentpb.AttestAgentResponse_Challenge{Challenge: ask}}))
		answer, err := stream.Recv()
		if err != nil {
			return err
		}
		if !verify(answer.GetChallengeResponse()) {
			return status.Error(codes.PermissionDenied, "challenge response verification failed")
		}
	}
	id := spiffeid.RequireFromPath(td, "/spire/agent/join_token/"+token)
	if r := f.agents[id]; r != nil && r.banned {
		return status.Error(codes.PermissionDenied, "failed to attest: agent is banned")
	}
	svid, serial := f.agentSVID(id, req.GetParams().GetParams().GetCsr())
	f.agents[id] = &record{serial: serial}
	return stream.Send(&agentpb.AttestAgentResponse{Step: &agentpb.AttestAgentResponse_Result_{
		Result: &agentpb.AttestAgentResponse_Result{Svid: svid, Reattestable: f.reattestable},
	}})
}

func (f *fake) RenewAgent(ctx context.Context, req *agentpb.RenewAgentRequest) (*agentpb.RenewAgentResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.reattestable {
		return nil, denied(typespb.PermissionDeniedDetails_AGENT_MUST_REATTEST)
	}
	id, _, _ := caller(ctx)
	svid, serial := f.agentSVID(id, req.GetParams().GetCsr())
	f.agents[id].next = serial
	return &agentpb.RenewAgentResponse{Svid: svid}, nil
}

func (f *fake) PostStatus(_ context.Context, req *agentpb.PostStatusRequest) (*agentpb.PostStatusResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.version = req.GetAgentVersion()
	return &agentpb.PostStatusResponse{}, nil
}

func (f *fake) bundleLocked() *typespb.Bundle {
	pub, err := x509.MarshalPKIXPublicKey(f.jwtKey.Public())
	must(err)
	return &typespb.Bundle{
		TrustDomain: td.Name(), X509Authorities: f.roots, SequenceNumber: f.sequence,
		JwtAuthorities: []*typespb.JWTKey{{KeyId: f.kid, PublicKey: pub}},
	}
}

func (f *fake) GetBundle(context.Context, *bundlepb.GetBundleRequest) (*typespb.Bundle, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.bundleLocked(), nil
}

func (f *fake) GetFederatedBundle(_ context.Context, req *bundlepb.GetFederatedBundleRequest) (*typespb.Bundle, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.fail["bundle of "+req.GetTrustDomain()]; err != nil {
		return nil, err
	}
	if b := f.federated[req.GetTrustDomain()]; b != nil {
		return b, nil
	}
	return nil, status.Error(codes.NotFound, "bundle not found")
}

func (f *fake) GetAuthorizedEntries(context.Context, *entrypb.GetAuthorizedEntriesRequest) (*entrypb.GetAuthorizedEntriesResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &entrypb.GetAuthorizedEntriesResponse{Entries: f.entries}, nil
}

func (f *fake) SyncAuthorizedEntries(stream entrypb.Entry_SyncAuthorizedEntriesServer) error {
	f.mu.Lock()
	entries, page, script, noSync := slices.Clone(f.entries), f.pageSize, f.sync, f.noSync
	f.mu.Unlock()
	switch {
	case noSync:
		return status.Error(codes.Unimplemented, "unknown method SyncAuthorizedEntries")
	case script != nil:
		return script(stream)
	}
	if req, err := stream.Recv(); err != nil || len(req.GetIds()) > 0 {
		return status.Error(codes.InvalidArgument, "specifying IDs on initial request is not supported")
	}
	if len(entries) <= page {
		return stream.Send(&entrypb.SyncAuthorizedEntriesResponse{Entries: entries})
	}
	for chunk := range slices.Chunk(entries, page) {
		res := &entrypb.SyncAuthorizedEntriesResponse{More: chunk[len(chunk)-1] != entries[len(entries)-1]}
		for _, e := range chunk {
			res.EntryRevisions = append(res.EntryRevisions, &entrypb.EntryRevision{Id: e.Id, RevisionNumber: e.RevisionNumber, CreatedAt: e.CreatedAt})
		}
		if err := stream.Send(res); err != nil {
			return err
		}
	}
	for {
		req, err := stream.Recv()
		if err != nil {
			return nil
		}
		f.edit(func() { f.wanted = append(f.wanted, req.GetIds()) })
		res := &entrypb.SyncAuthorizedEntriesResponse{}
		for _, e := range entries {
			if slices.Contains(req.GetIds(), e.Id) {
				res.Entries = append(res.Entries, e)
			}
		}
		if err := stream.Send(res); err != nil {
			return err
		}
	}
}

func (f *fake) BatchNewX509SVID(_ context.Context, req *svidpb.BatchNewX509SVIDRequest) (*svidpb.BatchNewX509SVIDResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.batches = append(f.batches, len(req.GetParams()))
	res := &svidpb.BatchNewX509SVIDResponse{}
	for _, p := range req.GetParams() {
		if f.sign != nil {
			res.Results = append(res.Results, f.sign(p))
			continue
		}
		res.Results = append(res.Results, f.signLocked(p))
	}
	return res, nil
}

func result(code codes.Code, text string) *svidpb.BatchNewX509SVIDResponse_Result {
	return &svidpb.BatchNewX509SVIDResponse_Result{Status: &typespb.Status{Code: int32(code), Message: text}}
}

func (f *fake) signLocked(p *svidpb.NewX509SVIDParams) *svidpb.BatchNewX509SVIDResponse_Result {
	i := slices.IndexFunc(f.entries, func(e *typespb.Entry) bool { return e.Id == p.GetEntryId() })
	if i < 0 {
		return result(codes.NotFound, "entry not found or not authorized")
	}
	csr, err := x509.ParseCertificateRequest(p.GetCsr())
	if err != nil {
		return result(codes.InvalidArgument, "malformed CSR")
	}
	f.serials++
	out := result(codes.OK, "OK")
	id := spiffeid.RequireFromPath(td, f.entries[i].GetSpiffeId().GetPath())
	out.Svid = &typespb.X509SVID{CertChain: [][]byte{f.root.issue(f.serials, id, csr.PublicKey, time.Hour)}}
	return out
}

func (f *fake) NewJWTSVID(_ context.Context, req *svidpb.NewJWTSVIDRequest) (*svidpb.NewJWTSVIDResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	i := slices.IndexFunc(f.entries, func(e *typespb.Entry) bool { return e.Id == req.GetEntryId() })
	if i < 0 {
		return nil, status.Error(codes.NotFound, "entry not found or not authorized")
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: f.jwtKey, KeyID: f.kid}}, nil)
	must(err)
	now := time.Now()
	token, err := jwt.Signed(signer).Claims(jwt.Claims{
		Subject: "spiffe://" + td.Name() + f.entries[i].GetSpiffeId().GetPath(), Audience: req.GetAudience(),
		IssuedAt: jwt.NewNumericDate(now), Expiry: jwt.NewNumericDate(now.Add(5 * time.Minute)),
	}).Serialize()
	must(err)
	return &svidpb.NewJWTSVIDResponse{Svid: &typespb.JWTSVID{Token: token, IssuedAt: now.Unix(), ExpiresAt: now.Add(5 * time.Minute).Unix()}}, nil
}

func (f *fake) Watch(req *watchpb.WatchRequest, stream watchpb.Watch_WatchServer) error {
	return f.watch(req, stream)
}

func (f *fake) ReportTrust(ctx context.Context, r *watchpb.TrustReport) (*watchpb.TrustReportResponse, error) {
	if f.told == nil {
		return f.UnimplementedWatchServer.ReportTrust(ctx, r)
	}
	f.edit(func() { f.told(r) })
	return &watchpb.TrustReportResponse{}, nil
}

// wireEntry is an entry as the server sends it.
func wireEntry(id string, edit ...func(*typespb.Entry)) *typespb.Entry {
	e := &typespb.Entry{
		Id: id, SpiffeId: &typespb.SPIFFEID{TrustDomain: td.Name(), Path: "/" + id},
		ParentId:  &typespb.SPIFFEID{TrustDomain: td.Name(), Path: "/node"},
		Selectors: []*typespb.Selector{{Type: "unix", Value: "uid:" + id}}, CreatedAt: 946684800,
	}
	for _, f := range edit {
		f(e)
	}
	return e
}

func wireEntries(n int) []*typespb.Entry {
	out := make([]*typespb.Entry, n)
	for i := range out {
		out[i] = wireEntry(fmt.Sprintf("e%03d", i))
	}
	return out
}

// config is for a client of the fake with an unused join token.
func (f *fake) config(t *testing.T) spireserver.Config {
	t.Helper()
	f.edit(func() { f.tokens["token-1"] = true })
	cfg := spireserver.Config{
		TrustDomain: td, Addresses: []string{"fake:1"}, Attestor: spireserver.JoinToken{Token: "token-1"},
		Version: "1.2.3", Logger: testLog(t), WithdrawConfirm: 10 * time.Second, SyncInterval: 5 * time.Second,
		Bootstrap: func(context.Context, spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
			return x509bundle.FromX509Authorities(td, []*x509.Certificate{f.root.cert}), nil
		},
	}
	cfg.ForTests(f.dial, false)
	return cfg
}
