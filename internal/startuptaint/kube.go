package startuptaint

import (
	"context"
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"
)

// Kube is the API server. It needs get, list, watch and patch of nodes, get of
// csinodes, and list of pods.
type Kube struct {
	core, storage rest.Interface
	params        runtime.ParameterCodec
}

var _ API = (*Kube)(nil)

// NewKube builds clients for the types used here and no others. It does not
// connect.
func NewKube(c *rest.Config) (*Kube, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, storagev1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("register API types: %w", err)
		}
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	codecs := serializer.NewCodecFactory(scheme)
	client := func(gv schema.GroupVersion, path string) (rest.Interface, error) {
		cfg := rest.CopyConfig(c)
		cfg.GroupVersion, cfg.APIPath = &gv, path
		cfg.ContentType = runtime.ContentTypeProtobuf
		cfg.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
		cfg.NegotiatedSerializer = codecs.WithoutConversion()
		cfg.QPS, cfg.Burst, cfg.RateLimiter = 20, 40, nil
		if cfg.UserAgent == "" {
			cfg.UserAgent = "spiffe-node-startup-taint"
		}
		out, err := rest.RESTClientFor(cfg)
		if err != nil {
			return nil, fmt.Errorf("build client for %s: %w", gv, err)
		}
		return out, nil
	}
	k := &Kube{params: runtime.NewParameterCodec(scheme)}
	var err error
	if k.core, err = client(corev1.SchemeGroupVersion, "/api"); err != nil {
		return nil, err
	}
	if k.storage, err = client(storagev1.SchemeGroupVersion, "/apis"); err != nil {
		return nil, err
	}
	return k, nil
}

// Watch implements API with an informer, which keeps of a node what is looked
// at here.
func (k *Kube) Watch(ctx context.Context, set func(*corev1.Node), gone func(name string)) {
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.NewListWatchFromClient(k.core, "nodes", "", fields.Everything()),
		ObjectType:    &corev1.Node{},
		Transform:     trim,
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    func(o any) { set(o.(*corev1.Node)) },
			UpdateFunc: func(_, o any) { set(o.(*corev1.Node)) },
			DeleteFunc: func(o any) {
				if d, ok := o.(cache.DeletedFinalStateUnknown); ok {
					o = d.Obj
				}
				if n, ok := o.(*corev1.Node); ok {
					gone(n.Name)
				}
			},
		},
	})
	informer.RunWithContext(ctx)
}

// trim drops what nobody here looks at, which is nearly all of a node.
func trim(o any) (any, error) {
	n, ok := o.(*corev1.Node)
	if !ok {
		return o, nil
	}
	return &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: n.Name, UID: n.UID, ResourceVersion: n.ResourceVersion},
		Spec:       corev1.NodeSpec{Taints: n.Spec.Taints},
	}, nil
}

// Node implements API.
func (k *Kube) Node(ctx context.Context, name string) (*corev1.Node, error) {
	var n corev1.Node
	err := k.core.Get().Resource("nodes").Name(name).Do(ctx).Into(&n)
	return &n, err
}

// PatchNode implements API.
func (k *Kube) PatchNode(ctx context.Context, name string, patch []byte) error {
	return k.core.Patch(types.MergePatchType).Resource("nodes").Name(name).Body(patch).Do(ctx).Error()
}

// Registered implements API.
func (k *Kube) Registered(ctx context.Context, node, driver string) (bool, error) {
	var n storagev1.CSINode
	err := k.storage.Get().Resource("csinodes").Name(node).Do(ctx).Into(&n)
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	return slices.ContainsFunc(n.Spec.Drivers, func(d storagev1.CSINodeDriver) bool { return d.Name == driver }), err
}

// AgentPods implements API. There is a field selector for either.
func (k *Kube) AgentPods(ctx context.Context, node, namespace, account string) ([]corev1.Pod, error) {
	selector := fields.AndSelectors(
		fields.OneTermEqualSelector("spec.nodeName", node),
		fields.OneTermEqualSelector("spec.serviceAccountName", account))
	var pods corev1.PodList
	err := k.core.Get().Namespace(namespace).Resource("pods").
		VersionedParams(&metav1.ListOptions{FieldSelector: selector.String()}, k.params).Do(ctx).Into(&pods)
	return pods.Items, err
}

// split parts namespace:name.
func split(account string) (namespace, name string) {
	namespace, name, _ = strings.Cut(account, ":")
	return namespace, name
}
