package k8spsat

import (
	"context"
	"errors"
	"fmt"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	authenticationclient "k8s.io/client-go/kubernetes/typed/authentication/v1"
	coreclient "k8s.io/client-go/kubernetes/typed/core/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// apiTimeout bounds one question to the API server.
const apiTimeout = 10 * time.Second

// Client asks a real cluster. It needs the rights to create tokenreviews and
// to get pods and nodes. Safe for concurrent use.
type Client struct {
	tokens authenticationclient.TokenReviewsGetter
	core   coreclient.CoreV1Interface
}

// RESTConfig is how to reach a cluster: by a kubeconfig file or, if path is
// empty, as the pod this process runs in.
func RESTConfig(path string) (*rest.Config, error) {
	if path == "" {
		cfg, err := rest.InClusterConfig()
		if err != nil {
			return nil, fmt.Errorf("find the cluster this pod runs in: %w; outside a pod name a kubeconfig file", err)
		}
		return cfg, nil
	}
	cfg, err := clientcmd.BuildConfigFromFlags("", path)
	if err != nil {
		return nil, fmt.Errorf("read kubeconfig: %w", err)
	}
	return cfg, nil
}

// NewClient connects to nothing yet.
func NewClient(cfg *rest.Config) (*Client, error) {
	c := rest.CopyConfig(cfg)
	c.Timeout = apiTimeout
	// A whole cluster may attest at once; the API server protects itself.
	c.QPS = -1
	tokens, err := authenticationclient.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("client for token reviews: %w", err)
	}
	core, err := coreclient.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("client for pods and nodes: %w", err)
	}
	return &Client{tokens, core}, nil
}

// ReviewToken is the TokenReview of a token.
func (c *Client) ReviewToken(ctx context.Context, token string, audiences []string) (*Review, error) {
	got, err := c.tokens.TokenReviews().Create(ctx, &authenticationv1.TokenReview{
		Spec: authenticationv1.TokenReviewSpec{Token: token, Audiences: audiences},
	}, metav1.CreateOptions{})
	if err != nil {
		return nil, err
	}
	// An error in the status means both "not a good token" and "could not
	// tell"; the API has no more to say.
	out := &Review{
		Authenticated: got.Status.Authenticated && got.Status.Error == "",
		Audiences:     got.Status.Audiences,
		Username:      got.Status.User.Username,
		Extra:         make(map[string][]string, len(got.Status.User.Extra)),
	}
	for key, values := range got.Status.User.Extra {
		out.Extra[key] = values
	}
	return out, nil
}

// Pod is a pod by name.
func (c *Client) Pod(ctx context.Context, namespace, name string) (*Pod, error) {
	got, err := c.core.Pods(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, gone(err)
	}
	return &Pod{
		UID:            string(got.UID),
		ServiceAccount: got.Spec.ServiceAccountName,
		NodeName:       got.Spec.NodeName,
		HostIP:         got.Status.HostIP,
		Labels:         got.Labels,
	}, nil
}

// Node is a node by name.
func (c *Client) Node(ctx context.Context, name string) (*Node, error) {
	got, err := c.core.Nodes().Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return nil, gone(err)
	}
	return &Node{UID: string(got.UID), Labels: got.Labels}, nil
}

func gone(err error) error {
	if apierrors.IsNotFound(err) {
		return errors.Join(ErrGone, err)
	}
	return err
}
