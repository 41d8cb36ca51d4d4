package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	core "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secret "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const secretType = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

// event is what a workload tells the demo, one JSON object per line.
type event struct {
	Event    string  `json:"event"` // secret, listening, handshake, error
	Name     string  `json:"name,omitempty"`
	SPIFFEID string  `json:"spiffeID,omitempty"`
	Serial   string  `json:"serial,omitempty"`
	Version  string  `json:"version,omitempty"`
	AfterMS  float64 `json:"afterMS,omitempty"`
	Address  string  `json:"address,omitempty"`
	Text     string  `json:"text,omitempty"`
}

// workload is a process inside a pod: it knows nothing but the socket in its
// volume. It opens one SDS stream per secret, as Envoy does, and uses what it
// gets for mutual TLS.
type workload struct {
	started time.Time
	out     *json.Encoder
	outMu   sync.Mutex

	mu     sync.Mutex
	svid   *x509svid.SVID
	bundle *x509bundle.Bundle
	ready  chan struct{} // closed once both are there
}

func runWorkload(ctx context.Context, socket string) error {
	w := &workload{started: time.Now(), out: json.NewEncoder(os.Stdout), ready: make(chan struct{})}
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	client := secret.NewSecretDiscoveryServiceClient(conn)
	errs := make(chan error, 4)
	for _, name := range []string{"default", "ROOTCA"} {
		go func() { errs <- w.stream(ctx, client, name) }()
	}
	go func() { errs <- w.serve(ctx) }()
	go func() { errs <- w.commands(ctx) }()
	return <-errs
}

func (w *workload) tell(e event) {
	w.outMu.Lock()
	defer w.outMu.Unlock()
	// The demo reads until the end; if it has gone, so will this process.
	_ = w.out.Encode(e)
}

// stream follows one secret: request, acknowledge, wait for the next version.
func (w *workload) stream(ctx context.Context, client secret.SecretDiscoveryServiceClient, name string) error {
	s, err := client.StreamSecrets(ctx)
	if err != nil {
		return err
	}
	req := &discovery.DiscoveryRequest{
		Node:          &core.Node{Id: "demo-workload", UserAgentName: "envoy"},
		TypeUrl:       secretType,
		ResourceNames: []string{name},
	}
	for {
		if err := s.Send(req); err != nil {
			return fmt.Errorf("request %s: %w", name, err)
		}
		res, err := s.Recv()
		if err != nil {
			return fmt.Errorf("receive %s: %w", name, err)
		}
		for _, r := range res.GetResources() {
			var sec tlsv3.Secret
			if err := r.UnmarshalTo(&sec); err != nil {
				return err
			}
			if err := w.take(&sec, res.GetVersionInfo()); err != nil {
				return err
			}
		}
		req = &discovery.DiscoveryRequest{
			TypeUrl: secretType, ResourceNames: []string{name},
			VersionInfo: res.GetVersionInfo(), ResponseNonce: res.GetNonce(),
		}
	}
}

func (w *workload) take(sec *tlsv3.Secret, version string) error {
	e := event{Event: "secret", Name: sec.GetName(), Version: version, AfterMS: float64(time.Since(w.started).Microseconds()) / 1000}
	w.mu.Lock()
	defer w.mu.Unlock()
	had := w.svid != nil && w.bundle != nil
	switch {
	case sec.GetTlsCertificate() != nil:
		c := sec.GetTlsCertificate()
		svid, err := x509svid.Parse(c.GetCertificateChain().GetInlineBytes(), c.GetPrivateKey().GetInlineBytes())
		if err != nil {
			return err
		}
		w.svid = svid
		e.SPIFFEID, e.Serial = svid.ID.String(), svid.Certificates[0].SerialNumber.String()
	default:
		var v tlsv3.SPIFFECertValidatorConfig
		if err := sec.GetValidationContext().GetCustomValidatorConfig().GetTypedConfig().UnmarshalTo(&v); err != nil {
			return err
		}
		d := v.GetTrustDomains()[0]
		td, err := spiffeid.TrustDomainFromString(d.GetName())
		if err != nil {
			return err
		}
		if w.bundle, err = x509bundle.Parse(td, d.GetTrustBundle().GetInlineBytes()); err != nil {
			return err
		}
		e.SPIFFEID = td.IDString()
	}
	if !had && w.svid != nil && w.bundle != nil {
		close(w.ready)
	}
	w.tell(e)
	return nil
}

// GetX509SVID gives the newest SVID to each handshake.
func (w *workload) GetX509SVID() (*x509svid.SVID, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.svid, nil
}

// GetX509BundleForTrustDomain gives the newest bundle to each handshake.
func (w *workload) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.bundle.GetX509BundleForTrustDomain(td)
}

func (w *workload) serve(ctx context.Context) error {
	select {
	case <-w.ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	l, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(w, w, tlsconfig.AuthorizeAny()))
	if err != nil {
		return err
	}
	defer l.Close()
	w.tell(event{Event: "listening", Address: l.Addr().String()})
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer c.Close()
			peer, err := peerID(ctx, c)
			if err != nil {
				w.tell(event{Event: "error", Text: err.Error()})
				return
			}
			fmt.Fprintf(c, "hello %s\n", peer)
		}()
	}
}

// commands dials who it is told to on standard input.
func (w *workload) commands(ctx context.Context) error {
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		addr, want, _ := strings.Cut(in.Text(), " ")
		if err := w.dial(ctx, addr, want); err != nil {
			w.tell(event{Event: "error", Text: err.Error()})
		}
	}
	return errors.Join(in.Err(), io.EOF)
}

func (w *workload) dial(ctx context.Context, addr, want string) error {
	id, err := spiffeid.FromString(want)
	if err != nil {
		return err
	}
	c, err := tls.Dial("tcp", addr, tlsconfig.MTLSClientConfig(w, w, tlsconfig.AuthorizeID(id)))
	if err != nil {
		return fmt.Errorf("handshake with %s: %w", want, err)
	}
	defer c.Close()
	peer, err := peerID(ctx, c)
	if err != nil {
		return err
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return fmt.Errorf("read from %s: %w", want, err)
	}
	state := c.ConnectionState()
	w.tell(event{Event: "handshake", SPIFFEID: peer.String(), Text: strings.TrimSpace(answer), Version: tls.VersionName(state.Version)})
	return nil
}

func peerID(ctx context.Context, c net.Conn) (spiffeid.ID, error) {
	t, ok := c.(*tls.Conn)
	if !ok {
		return spiffeid.ID{}, errors.New("not a TLS connection")
	}
	if err := t.HandshakeContext(ctx); err != nil {
		return spiffeid.ID{}, err
	}
	return x509svid.IDFromCert(t.ConnectionState().PeerCertificates[0])
}
