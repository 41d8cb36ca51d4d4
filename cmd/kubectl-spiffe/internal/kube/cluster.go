package kube

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"k8s.io/klog/v2"
)

// requestTimeout bounds one read or write of objects.
const requestTimeout = 30 * time.Second

// pageSize is how many objects of a list come in one answer.
const pageSize = 500

// Config says which cluster, as whom and where.
type Config struct {
	// Kubeconfig is a file; "" = what KUBECONFIG lists, else ~/.kube/config.
	Kubeconfig string
	// Context of the kubeconfig; "" = the current one.
	Context string
	// Namespace; "" = the context's.
	Namespace string
	// As is a user to impersonate; "" = nobody.
	As string
	// AsGroups are the groups of As.
	AsGroups []string
	// Getenv reads the environment; nil = os.Getenv.
	Getenv func(string) string
	// UserAgent is what the API server's audit log shows.
	UserAgent string
}

// Cluster is an API server and a user. Safe for concurrent use.
type Cluster struct {
	// Namespace is the one meant where none is named.
	Namespace string

	config *rest.Config
	client rest.Interface
}

// Files are the kubeconfigs that would be read and exist.
func (c Config) Files() []string {
	var out []string
	for _, path := range c.precedence() {
		if _, err := os.Stat(path); err == nil {
			out = append(out, path)
		}
	}
	return out
}

func (c Config) precedence() []string {
	getenv := c.Getenv
	if getenv == nil {
		getenv = os.Getenv
	}
	switch {
	case c.Kubeconfig != "":
		return []string{c.Kubeconfig}
	case getenv(clientcmd.RecommendedConfigPathEnvVar) != "":
		return filepath.SplitList(getenv(clientcmd.RecommendedConfigPathEnvVar))
	case getenv("HOME") != "":
		return []string{filepath.Join(getenv("HOME"), clientcmd.RecommendedHomeDir, clientcmd.RecommendedFileName)}
	}
	return nil
}

// Open reads the kubeconfig. It does not connect.
func Open(c Config) (*Cluster, error) {
	rules := &clientcmd.ClientConfigLoadingRules{Precedence: c.precedence()}
	if c.Kubeconfig != "" {
		rules = &clientcmd.ClientConfigLoadingRules{ExplicitPath: c.Kubeconfig}
	}
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{
		CurrentContext: c.Context,
		Context:        clientcmdapi.Context{Namespace: c.Namespace},
		AuthInfo:       clientcmdapi.AuthInfo{Impersonate: c.As, ImpersonateGroups: c.AsGroups},
	})
	namespace, _, err := loader.Namespace()
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	config, err := loader.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	config.UserAgent = cmp.Or(c.UserAgent, config.UserAgent)
	config.WarningHandler = rest.NoWarnings{}
	config.QPS, config.Burst = 50, 100
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, metav1.Unversioned)
	config.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	client, err := rest.UnversionedRESTClientFor(config)
	if err != nil {
		return nil, fmt.Errorf("kubeconfig: %w", err)
	}
	return &Cluster{Namespace: cmp.Or(namespace, metav1.NamespaceDefault), config: config, client: client}, nil
}

// Quiet keeps client-go's own log lines off the terminal: what matters comes
// back as errors.
func Quiet() {
	klog.SetSlogLogger(slog.New(slog.DiscardHandler))
}

// Get reads one object. The path is the API server's, such as
// /api/v1/namespaces/shop/pods/web-0.
func (c *Cluster) Get(ctx context.Context, path string, into any) error {
	return c.read(ctx, path, nil, into)
}

func (c *Cluster) read(ctx context.Context, path string, query url.Values, into any) error {
	req := c.client.Get().AbsPath(path).Timeout(requestTimeout)
	for k, values := range query {
		for _, v := range values {
			req.Param(k, v)
		}
	}
	data, err := answer(req.Do(ctx))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("the API server's answer to %s: %w", path, err)
	}
	return nil
}

// answer is the body, or the API server's own words for what went wrong.
func answer(r rest.Result) ([]byte, error) {
	if err := r.Error(); err != nil {
		return nil, err
	}
	return r.Raw()
}

// Create posts an object and reads the answer.
func (c *Cluster) Create(ctx context.Context, path string, object, into any) error {
	body, err := json.Marshal(object)
	if err != nil {
		return err
	}
	data, err := answer(c.client.Post().AbsPath(path).SetHeader("Content-Type", runtime.ContentTypeJSON).Body(body).Timeout(requestTimeout).Do(ctx))
	if err != nil {
		return err
	}
	return json.Unmarshal(data, into)
}

// List reads all objects at a path, page by page. The selectors may be empty.
func List[T any](ctx context.Context, c *Cluster, path, labels, fields string) ([]T, error) {
	var out []T
	next := ""
	for {
		query := url.Values{"limit": {fmt.Sprint(pageSize)}}
		for k, v := range map[string]string{"labelSelector": labels, "fieldSelector": fields, "continue": next} {
			if v != "" {
				query.Set(k, v)
			}
		}
		var page struct {
			Metadata metav1.ListMeta `json:"metadata"`
			Items    []T             `json:"items"`
		}
		if err := c.read(ctx, path, query, &page); err != nil {
			return nil, err
		}
		out = append(out, page.Items...)
		if next = page.Metadata.Continue; next == "" {
			return out, nil
		}
	}
}

// IsAbsent says whether the object or its whole kind does not exist.
func IsAbsent(err error) bool { return apierrors.IsNotFound(err) }

// IsForbidden says whether the user may not do this.
func IsForbidden(err error) bool {
	return apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err)
}
