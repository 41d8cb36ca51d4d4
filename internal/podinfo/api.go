package podinfo

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

// API is what is needed of the API server. The permissions are get, list and
// watch of pods, and list and watch of namespaces if their labels are wanted.
type API interface {
	// Pods lists and watches the pods bound to the node.
	Pods(node string) cache.ListerWatcherWithContext
	// Pod reads one pod.
	Pod(ctx context.Context, namespace, name string) (*corev1.Pod, error)
	// Namespaces lists and watches all namespaces.
	Namespaces() cache.ListerWatcherWithContext
}

// ErrNoAPI is that this process is in no pod that has a service account.
var ErrNoAPI = errors.New("no API server is configured: this process is not in a pod with a service account, and there is no kubeconfig")

// NewAPI is a client for pods and namespaces and nothing else, which is a
// fraction of the size of one for everything. With an empty kubeconfig it is
// the client of a process in a pod, whose token is read again every minute;
// ErrNoAPI if it is none. It does not connect.
func NewAPI(kubeconfig, userAgent string) (API, error) {
	var cfg *rest.Config
	var err error
	if kubeconfig == "" {
		cfg, err = rest.InClusterConfig()
	} else {
		cfg, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	switch {
	case err == nil:
		return newAPI(cfg, userAgent)
	case kubeconfig == "" && (errors.Is(err, rest.ErrNotInCluster) || errors.Is(err, os.ErrNotExist)):
		return nil, ErrNoAPI
	}
	return nil, fmt.Errorf("configure the API server's client: %w", err)
}

func newAPI(cfg *rest.Config, userAgent string) (API, error) {
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("configure the API server's client: %w", err)
	}
	cfg = rest.CopyConfig(cfg)
	cfg.APIPath, cfg.GroupVersion = "/api", &corev1.SchemeGroupVersion
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.ContentType = runtime.ContentTypeProtobuf
	cfg.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	cfg.UserAgent = userAgent
	cfg.WarningHandler = rest.NoWarnings{}
	cfg.QPS, cfg.Burst = 50, 100
	client, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("configure the API server's client: %w", err)
	}
	return &restAPI{client: client, params: runtime.NewParameterCodec(scheme)}, nil
}

type restAPI struct {
	client rest.Interface
	params runtime.ParameterCodec
}

// Pods lists and watches the pods bound to the node.
func (a *restAPI) Pods(node string) cache.ListerWatcherWithContext {
	return a.listWatch("pods", fields.OneTermEqualSelector("spec.nodeName", node).String(), func() runtime.Object { return &corev1.PodList{} })
}

// Namespaces lists and watches all namespaces.
func (a *restAPI) Namespaces() cache.ListerWatcherWithContext {
	return a.listWatch("namespaces", "", func() runtime.Object { return &corev1.NamespaceList{} })
}

// Pod reads one pod.
func (a *restAPI) Pod(ctx context.Context, namespace, name string) (*corev1.Pod, error) {
	pod := &corev1.Pod{}
	err := a.client.Get().Namespace(namespace).Resource("pods").Name(name).Do(ctx).Into(pod)
	return pod, err
}

// listTimeout bounds a list; the watch after it has no bound but the server's.
const listTimeout = 30 * time.Second

func (a *restAPI) listWatch(resource, selector string, list func() runtime.Object) *cache.ListWatch {
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, o metav1.ListOptions) (runtime.Object, error) {
			ctx, cancel := context.WithTimeout(ctx, listTimeout)
			defer cancel()
			o.FieldSelector = selector
			out := list()
			err := a.client.Get().Resource(resource).VersionedParams(&o, a.params).Do(ctx).Into(out)
			return out, err
		},
		WatchFuncWithContext: func(ctx context.Context, o metav1.ListOptions) (watchInterface, error) {
			o.FieldSelector, o.Watch = selector, true
			var timeout time.Duration
			if o.TimeoutSeconds != nil {
				timeout = time.Duration(*o.TimeoutSeconds) * time.Second
			}
			return a.client.Get().Resource(resource).VersionedParams(&o, a.params).Timeout(timeout).Watch(ctx)
		},
	}
}
