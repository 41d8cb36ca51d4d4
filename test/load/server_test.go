package main

import (
	"context"
	"fmt"
	"net"
	"path/filepath"
	"sync"
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// fakeServer is a small SDS server that checks its clients' manners, with the
// Entry service of an authority beside it.
type fakeServer struct {
	secretv3.UnimplementedSecretDiscoveryServiceServer
	entrypb.UnimplementedEntryServer

	t      *testing.T
	socket string
	refuse bool // like SPIRE Agent, instead of parking

	mu       sync.Mutex
	changed  chan struct{} // closed and replaced at every change
	open     bool          // everybody has an entry
	uids     map[uint32]bool
	ids      map[string]bool
	version  int
	acks     int
	streams  int
	created  map[string]string // entry ID -> SPIFFE ID
	deleted  int
	refusals int
}

func startServer(t *testing.T) *fakeServer {
	t.Helper()
	f := &fakeServer{
		t: t, socket: filepath.Join(t.TempDir(), "s"), changed: make(chan struct{}),
		uids: map[uint32]bool{}, ids: map[string]bool{}, created: map[string]string{}, version: 1,
	}
	lis, err := net.Listen("unix", f.socket)
	if err != nil {
		t.Fatal(err)
	}
	openToAll(t, f.socket)
	srv := grpc.NewServer(grpc.Creds(peerCreds{}))
	secretv3.RegisterSecretDiscoveryServiceServer(srv, f)
	entrypb.RegisterEntryServer(srv, f)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(lis)
	}()
	t.Cleanup(func() {
		srv.Stop()
		<-done
	})
	return f
}

// update changes the server's state and wakes its streams.
func (f *fakeServer) update(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
	close(f.changed)
	f.changed = make(chan struct{})
}

// secret is the current answer for a name, nil if the caller has no entry.
func (f *fakeServer) secret(ctx context.Context, names []string) (*discoveryv3.DiscoveryResponse, <-chan struct{}) {
	p, _ := peer.FromContext(ctx)
	uid := p.AuthInfo.(peerInfo).uid
	f.mu.Lock()
	defer f.mu.Unlock()
	resp := &discoveryv3.DiscoveryResponse{TypeUrl: secretType, VersionInfo: fmt.Sprint(f.version)}
	for _, name := range names {
		if !f.open && !f.uids[uid] && !f.ids[name] {
			return nil, f.changed
		}
		res, err := anypb.New(&tlsv3.Secret{Name: name, Type: &tlsv3.Secret_GenericSecret{
			GenericSecret: &tlsv3.GenericSecret{Secret: &corev3.DataSource{
				Specifier: &corev3.DataSource_InlineString{InlineString: resp.GetVersionInfo()},
			}},
		}})
		if err != nil {
			f.t.Error(err)
		}
		resp.Resources = append(resp.Resources, res)
	}
	return resp, f.changed
}

func (f *fakeServer) StreamSecrets(stream secretv3.SecretDiscoveryService_StreamSecretsServer) error {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	if first.GetNode().GetId() == "" || first.GetTypeUrl() != secretType || first.GetResponseNonce() != "" {
		f.t.Errorf("bad first request: %v", first)
	}
	f.mu.Lock()
	f.streams++
	f.mu.Unlock()
	for sent := 0; ; {
		resp, changed := f.secret(stream.Context(), first.GetResourceNames())
		if resp == nil && f.refuse {
			f.mu.Lock()
			f.refusals++
			f.mu.Unlock()
			return status.Error(codes.PermissionDenied, "no identity issued")
		}
		if resp != nil {
			sent++
			resp.Nonce = fmt.Sprintf("n%d", sent)
			if err := stream.Send(resp); err != nil {
				return err
			}
			ack, err := stream.Recv()
			if err != nil {
				return err
			}
			if ack.GetNode() != nil || ack.GetVersionInfo() != resp.GetVersionInfo() ||
				ack.GetResponseNonce() != resp.GetNonce() || ack.GetErrorDetail() != nil ||
				len(ack.GetResourceNames()) != 1 || ack.GetTypeUrl() != secretType {
				f.t.Errorf("bad acknowledgement of %v: %v", resp, ack)
			}
			f.mu.Lock()
			f.acks++
			f.mu.Unlock()
		}
		select {
		case <-changed:
		case <-stream.Context().Done():
			return nil
		}
	}
}

func (f *fakeServer) FetchSecrets(ctx context.Context, req *discoveryv3.DiscoveryRequest) (*discoveryv3.DiscoveryResponse, error) {
	resp, _ := f.secret(ctx, req.GetResourceNames())
	if resp == nil {
		return nil, status.Error(codes.PermissionDenied, "no identity issued")
	}
	return resp, nil
}

func (f *fakeServer) BatchCreateEntry(_ context.Context, req *entrypb.BatchCreateEntryRequest) (*entrypb.BatchCreateEntryResponse, error) {
	resp := &entrypb.BatchCreateEntryResponse{}
	f.update(func() {
		for _, e := range req.GetEntries() {
			var uid uint32
			if _, err := fmt.Sscanf(e.GetSelectors()[0].GetValue(), "uid:%d", &uid); err != nil || e.GetSelectors()[0].GetType() != "unix" {
				f.t.Errorf("bad selectors: %v", e)
			}
			if uid != uint32(unix.Getuid()) {
				f.uids[uid] = true
			}
			id := "spiffe://" + e.GetSpiffeId().GetTrustDomain() + e.GetSpiffeId().GetPath()
			f.ids[id] = true
			e.Id = fmt.Sprintf("entry-%d", len(f.created))
			f.created[e.GetId()] = id
			resp.Results = append(resp.Results, &entrypb.BatchCreateEntryResponse_Result{Status: &typespb.Status{Message: "OK"}, Entry: e})
		}
	})
	return resp, nil
}

func (f *fakeServer) BatchDeleteEntry(_ context.Context, req *entrypb.BatchDeleteEntryRequest) (*entrypb.BatchDeleteEntryResponse, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, id := range req.GetIds() {
		if f.created[id] != "" {
			f.deleted++
		}
	}
	return &entrypb.BatchDeleteEntryResponse{}, nil
}

// peerCreds tells the server its caller's uid.
type peerCreds struct{}

type peerInfo struct {
	credentials.CommonAuthInfo
	uid uint32
}

func (peerInfo) AuthType() string { return "peer" }

func (peerCreds) ServerHandshake(c net.Conn) (net.Conn, credentials.AuthInfo, error) {
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return nil, nil, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return nil, nil, err
	}
	if credErr != nil {
		return nil, nil, credErr
	}
	return c, peerInfo{uid: cred.Uid}, nil
}

func (peerCreds) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, net.ErrClosed
}
func (peerCreds) Info() credentials.ProtocolInfo            { return credentials.ProtocolInfo{} }
func (c peerCreds) Clone() credentials.TransportCredentials { return c }
func (peerCreds) OverrideServerName(string) error           { return nil }
