package main

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	corev1 "k8s.io/api/core/v1"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/kube"
)

const (
	// inspectAudience is what the token for an Inspect port is good for.
	inspectAudience       = "spiffe-node-inspect"
	defaultInspectAccount = "spiffe-inspect"
	// inspectNobody switches the Inspect port off.
	inspectNobody = "none"
	// bundleConfigMap is where the authority publishes the trust bundle.
	bundleConfigMap = "spire-bundle"
)

// connectAgent hands a connection to an agent to use: over its Inspect port if
// it has one and the user may use it, else by exec.
func (a *app) connectAgent(ctx context.Context, cluster *kube.Cluster, part kube.Part, use func(grpc.ClientConnInterface) error) error {
	var why error
	if part.InspectPort != 0 && a.place.inspectAs != inspectNobody {
		conn, err := a.inspectPort(ctx, cluster, part)
		if err == nil {
			return errors.Join(use(conn), conn.Close())
		}
		why = fmt.Errorf("over the Inspect port: %w", err)
	}
	conn, err := a.tunnel(ctx, cluster, part)
	if err != nil {
		return errors.Join(err, why)
	}
	return errors.Join(use(conn), conn.Close())
}

// inspectPort is a connection to an agent's Inspect port. The agent is shown a
// token that is good for nothing else, and must show an SVID of an agent.
func (a *app) inspectPort(ctx context.Context, cluster *kube.Cluster, part kube.Part) (*grpc.ClientConn, error) {
	namespace, account, ok := strings.Cut(cmp.Or(a.place.inspectAs, part.Namespace+"/"+defaultInspectAccount), "/")
	if !ok {
		return nil, fmt.Errorf("--inspect-service-account %q must be written as namespace/name", a.place.inspectAs)
	}
	bundle, err := trustBundle(ctx, cluster, part.Namespace)
	if err != nil {
		return nil, err
	}
	token, err := cluster.Token(ctx, namespace, account, inspectAudience)
	if err != nil {
		return nil, err
	}
	dial := func(ctx context.Context) (net.Conn, error) {
		return cluster.Forward(context.WithoutCancel(ctx), part.Namespace, part.Pod, part.InspectPort)
	}
	first, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	config := tlsconfig.TLSClientConfig(bundle, func(id spiffeid.ID, _ [][]*x509.Certificate) error {
		if !strings.HasPrefix(id.Path(), "/spire/agent/") {
			return fmt.Errorf("%s is no agent", id)
		}
		return nil
	})
	return grpc.NewClient("passthrough:///"+part.Pod, grpc.WithTransportCredentials(credentials.NewTLS(config)),
		grpc.WithPerRPCCredentials(bearer(token)), boundCalls(), onceThen(first, dial))
}

func trustBundle(ctx context.Context, cluster *kube.Cluster, namespace string) (*spiffebundle.Set, error) {
	var object corev1.ConfigMap
	if err := cluster.Get(ctx, "/api/v1/namespaces/"+namespace+"/configmaps/"+bundleConfigMap, &object); err != nil {
		return nil, fmt.Errorf("trust bundle: %w", err)
	}
	td, err := bundleDomain(object.Data)
	if err != nil {
		return nil, fmt.Errorf("ConfigMap %s/%s: %w", namespace, bundleConfigMap, err)
	}
	return spiffebundle.NewSet(td), nil
}

// bundleDomain reads the bundle under the key the chart uses. A bundle in
// SPIFFE's format does not name its trust domain: the key beside it may, else
// the certificates do.
func bundleDomain(data map[string]string) (*spiffebundle.Bundle, error) {
	text, ok := data["bundle.spiffe"]
	if !ok {
		return nil, errors.New("has no key bundle.spiffe")
	}
	bundle, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString("unknown"), []byte(text))
	if err != nil {
		return nil, err
	}
	for _, cert := range bundle.X509Authorities() {
		for _, u := range cert.URIs {
			td, err := spiffeid.TrustDomainFromURI(u)
			if err != nil {
				continue
			}
			return spiffebundle.Parse(td, []byte(text))
		}
	}
	return nil, errors.New("no certificate in it names its trust domain")
}

// bearer is a token shown with every call.
type bearer string

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(b)}, nil
}

// RequireTransportSecurity keeps the token off connections in the clear.
func (bearer) RequireTransportSecurity() bool { return true }

// boundCalls bounds each call, so that a stuck server cannot hold a script for
// ever.
func boundCalls() grpc.DialOption {
	return grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		ctx, cancel := context.WithTimeout(ctx, callTimeout)
		defer cancel()
		return invoke(ctx, method, req, reply, cc, opts...)
	})
}
