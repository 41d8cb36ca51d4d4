// Command probe is the workload of the end-to-end tests: an SDS client with
// Envoy's habits (one StreamSecrets stream per secret over one channel, node on
// the first message, retry after a uniform share of 500 ms doubling to 30 s)
// that reports as JSON lines when it got which secret.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	secretv3 "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/test/e2e/probe"
)

const (
	typeURL    = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
	firstRetry = 500 * time.Millisecond
	lastRetry  = 30 * time.Second
)

func main() {
	start := time.Now()
	socket := flag.String("socket", "/run/secrets/workload-spiffe-uds/socket", "path of the SDS socket")
	names := flag.String("names", "default,ROOTCA", "secrets to ask for, one stream each")
	listen := flag.String("listen", "", "address to shake hands at, with the secrets received")
	peer := flag.String("dial", "", "address to shake hands with, with the secrets received")
	again := flag.Bool("dial-again", false, "shake hands five times a second instead of once")
	once := flag.Bool("once", false, "end with success when every secret has come")
	count := flag.Int("repeat", 1, "connections to hold, each with all names")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	out := &reporter{start: start, enc: json.NewEncoder(os.Stdout)}
	out.report(probe.Event{Kind: probe.Start})
	own := new(material)
	var group sync.WaitGroup
	if *listen != "" {
		group.Go(func() {
			if err := own.serve(ctx, *listen, out); err != nil {
				fmt.Fprintln(os.Stderr, "probe:", err)
			}
		})
	}
	if *peer != "" {
		group.Go(func() { own.dial(ctx, *peer, *again, out) })
	}
	for i := range *count {
		conn, err := grpc.NewClient("unix://"+*socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
			// The waits between attempts are ours; the channel must not add its own.
			grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{BaseDelay: time.Millisecond, Multiplier: 1, MaxDelay: time.Millisecond}, MinConnectTimeout: 5 * time.Second}))
		if err != nil {
			fmt.Fprintln(os.Stderr, "probe:", err)
			os.Exit(1)
		}
		defer conn.Close()
		for name := range strings.SplitSeq(*names, ",") {
			s := &subscription{client: secretv3.NewSecretDiscoveryServiceClient(conn), conn: i, name: name, once: *once, own: own, out: out}
			group.Go(func() { s.hold(ctx) })
		}
	}
	group.Wait()
}

// subscription holds one stream for one secret for as long as the process lives.
type subscription struct {
	client   secretv3.SecretDiscoveryServiceClient
	conn     int
	name     string
	once     bool // one secret is enough
	own      *material
	out      *reporter
	attempts int
	version  string
}

func (s *subscription) hold(ctx context.Context) {
	next := firstRetry
	for {
		s.attempts++
		got, err := s.stream(ctx)
		if ctx.Err() != nil || got && s.once {
			return
		}
		st := status.Convert(err)
		s.out.report(probe.Event{Kind: probe.Error, Name: s.name, Conn: s.conn, Attempt: s.attempts, Code: st.Code().String(), Message: st.Message(), Held: got})
		if got {
			next, s.attempts = firstRetry, 0
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(rand.N(next)):
		}
		next = min(2*next, lastRetry)
	}
}

// stream opens one stream and reads it to its end; got reports whether anything came.
func (s *subscription) stream(ctx context.Context) (got bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := s.client.StreamSecrets(ctx)
	if err != nil {
		return false, err
	}
	req := &discoveryv3.DiscoveryRequest{
		Node:          &corev3.Node{Id: "probe~" + cmp.Or(os.Getenv("POD_NAME"), "local"), UserAgentName: "envoy", UserAgentVersionType: &corev3.Node_UserAgentVersion{UserAgentVersion: "1.35.0"}},
		ResourceNames: []string{s.name},
		TypeUrl:       typeURL,
		VersionInfo:   s.version,
	}
	if err := stream.Send(req); err != nil {
		_, err = stream.Recv() // has the status
		return false, err
	}
	for {
		res, err := stream.Recv()
		if err != nil {
			return got, err
		}
		for _, packed := range res.GetResources() {
			var secret tlsv3.Secret
			if err := packed.UnmarshalTo(&secret); err != nil {
				return got, err
			}
			if secret.GetName() != s.name {
				continue
			}
			got = true
			s.own.take(&secret)
			ev := describe(&secret)
			ev.Kind, ev.Name, ev.Conn, ev.Attempt = probe.Secret, s.name, s.conn, s.attempts
			s.out.report(ev)
			if s.once {
				return true, nil
			}
		}
		s.version = res.GetVersionInfo()
		ack := &discoveryv3.DiscoveryRequest{ResourceNames: req.ResourceNames, TypeUrl: typeURL, VersionInfo: s.version, ResponseNonce: res.GetNonce()}
		if err := stream.Send(ack); err != nil {
			_, err = stream.Recv()
			return got, err
		}
	}
}

// reporter writes events; it may be used from any goroutine.
type reporter struct {
	start time.Time
	mu    sync.Mutex
	enc   *json.Encoder
}

func (r *reporter) report(ev probe.Event) {
	now := time.Now()
	ev.Time, ev.SinceStart = now, now.Sub(r.start)
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.enc.Encode(ev) // nowhere else to report to
}
