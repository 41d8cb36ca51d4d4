package registration

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

// kube is the way to the API server: one client for each group, so that only
// the types watched here are linked.
type kube struct {
	core, discovery, spire, status rest.Interface
}

func newKube(c *rest.Config) (*kube, error) {
	scheme := runtime.NewScheme()
	for _, add := range []func(*runtime.Scheme) error{corev1.AddToScheme, discoveryv1.AddToScheme, v1alpha1.AddToScheme} {
		if err := add(scheme); err != nil {
			return nil, fmt.Errorf("register API types: %w", err)
		}
	}
	metav1.AddToGroupVersion(scheme, schema.GroupVersion{Version: "v1"})
	codecs := serializer.NewCodecFactory(scheme)
	client := func(gv schema.GroupVersion, path, content string, qps float32) (rest.Interface, error) {
		cfg := rest.CopyConfig(c)
		cfg.GroupVersion, cfg.APIPath, cfg.ContentType = &gv, path, content
		cfg.AcceptContentTypes = content + "," + runtime.ContentTypeJSON
		cfg.NegotiatedSerializer = codecs.WithoutConversion()
		cfg.QPS, cfg.Burst, cfg.RateLimiter = qps, 2*int(qps), nil
		if cfg.UserAgent == "" {
			cfg.UserAgent = "spiffe-node-registration"
		}
		out, err := rest.RESTClientFor(cfg)
		if err != nil {
			return nil, fmt.Errorf("build client for %s: %w", gv, err)
		}
		return out, nil
	}
	const unlimited, statusQPS = -1, 25
	var k kube
	var err error
	if k.core, err = client(corev1.SchemeGroupVersion, "/api", runtime.ContentTypeProtobuf, unlimited); err != nil {
		return nil, err
	}
	if k.discovery, err = client(discoveryv1.SchemeGroupVersion, "/apis", runtime.ContentTypeProtobuf, unlimited); err != nil {
		return nil, err
	}
	if k.spire, err = client(v1alpha1.GroupVersion(), "/apis", runtime.ContentTypeJSON, unlimited); err != nil {
		return nil, err
	}
	if k.status, err = client(v1alpha1.GroupVersion(), "/apis", runtime.ContentTypeJSON, statusQPS); err != nil {
		return nil, err
	}
	return &k, nil
}

// patchStatus is the statusWriter.
func (k *kube) patchStatus(ctx context.Context, kind, name string, patch []byte) error {
	resource := map[string]string{
		kindSPIFFEID:  v1alpha1.ResourceClusterSPIFFEIDs,
		kindStatic:    v1alpha1.ResourceClusterStaticEntries,
		kindFederated: v1alpha1.ResourceClusterFederatedTrustDomains,
	}[kind]
	return k.status.Patch(types.MergePatchType).Resource(resource).Name(name).SubResource("status").Body(patch).Do(ctx).Error()
}

// watch is one kind of objects to follow.
type watch struct {
	resource  string
	client    rest.Interface
	fields    fields.Selector
	object    runtime.Object
	transform func(any) (any, error)
	set       func(any)
	remove    func(name string)
	remedy    string
}

const (
	remedyCRDs = "install the CRDs (chart spiffe-node-crds) and allow get, list and watch on them"
	remedyRBAC = "allow get, list and watch on it"
)

func (x *engine) watches(k *kube) []watch {
	// Finished pods have no identity; the API server shows their end as a
	// deletion.
	unfinished := fields.ParseSelectorOrDie("status.phase!=Succeeded,status.phase!=Failed")
	return []watch{
		{
			resource: "namespaces", client: k.core, object: &corev1.Namespace{}, transform: trim, remedy: remedyRBAC,
			set:    func(o any) { x.setNamespace(&o.(*corev1.Namespace).ObjectMeta) },
			remove: x.deleteNamespace,
		},
		{
			resource: "nodes", client: k.core, object: &corev1.Node{}, transform: trim, remedy: remedyRBAC,
			set:    func(o any) { x.setNode(o.(*corev1.Node)) },
			remove: x.deleteNode,
		},
		{
			resource: "pods", client: k.core, fields: unfinished, object: &corev1.Pod{}, transform: trim, remedy: remedyRBAC,
			set:    func(o any) { x.setPod(o.(*corev1.Pod)) },
			remove: x.deletePod,
		},
		{
			resource: "endpointslices", client: k.discovery, object: &discoveryv1.EndpointSlice{}, transform: trim, remedy: remedyRBAC,
			set: func(o any) {
				s := o.(*discoveryv1.EndpointSlice)
				x.setSlice(s.Namespace+"/"+s.Name, s)
			},
			remove: func(name string) { x.setSlice(name, nil) },
		},
		{
			resource: v1alpha1.ResourceClusterSPIFFEIDs, client: k.spire, object: &v1alpha1.ClusterSPIFFEID{}, transform: trim, remedy: remedyCRDs,
			set:    func(o any) { x.setRule(o.(*v1alpha1.ClusterSPIFFEID)) },
			remove: func(name string) { x.deleteResource(kindSPIFFEID, name) },
		},
		{
			resource: v1alpha1.ResourceClusterStaticEntries, client: k.spire, object: &v1alpha1.ClusterStaticEntry{}, transform: trim, remedy: remedyCRDs,
			set:    func(o any) { x.setStatic(o.(*v1alpha1.ClusterStaticEntry)) },
			remove: func(name string) { x.deleteResource(kindStatic, name) },
		},
		{
			resource: v1alpha1.ResourceClusterFederatedTrustDomains, client: k.spire, object: &v1alpha1.ClusterFederatedTrustDomain{}, transform: trim, remedy: remedyCRDs,
			set:    func(o any) { x.setFederated(o.(*v1alpha1.ClusterFederatedTrustDomain)) },
			remove: func(name string) { x.deleteResource(kindFederated, name) },
		},
	}
}

// trim drops what nothing here looks at, before it is kept.
func trim(o any) (any, error) {
	if m, ok := o.(metav1.Object); ok {
		m.SetManagedFields(nil)
	}
	switch o := o.(type) {
	case *corev1.Pod:
		o.Status = corev1.PodStatus{Phase: o.Status.Phase}
	case *corev1.Node:
		o.Status = corev1.NodeStatus{}
	case *discoveryv1.EndpointSlice:
		for i := range o.Endpoints {
			o.Endpoints[i] = discoveryv1.Endpoint{TargetRef: o.Endpoints[i].TargetRef}
		}
	}
	return o, nil
}

// follow starts an informer that posts events until ctx ends, and adds its
// goroutine to wg. The result says whether all objects there were at the start
// have been posted.
func (x *engine) follow(ctx context.Context, wg *sync.WaitGroup, w *watch) (cache.InformerSynced, error) {
	selector := w.fields
	if selector == nil {
		selector = fields.Everything()
	}
	inf := cache.NewSharedIndexInformerWithOptions(
		cache.NewListWatchFromClient(w.client, w.resource, metav1.NamespaceAll, selector), w.object, cache.SharedIndexInformerOptions{})
	if err := inf.SetTransform(w.transform); err != nil {
		return nil, fmt.Errorf("watch %s: %w", w.resource, err)
	}
	if err := inf.SetWatchErrorHandlerWithContext(x.watchError(w)); err != nil {
		return nil, fmt.Errorf("watch %s: %w", w.resource, err)
	}
	events := x.Metrics.events.WithLabelValues(w.resource)
	set := func(o any) {
		events.Inc()
		x.post(func() { w.set(o) })
	}
	reg, err := inf.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    set,
		UpdateFunc: func(_, o any) { set(o) },
		DeleteFunc: func(o any) {
			name, err := cache.DeletionHandlingMetaNamespaceKeyFunc(o)
			if err != nil {
				return // not an object; cannot be
			}
			events.Inc()
			x.post(func() { w.remove(name) })
		},
	})
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", w.resource, err)
	}
	wg.Go(func() { inf.RunWithContext(ctx) })
	return reg.HasSynced, nil
}

// watchPause is the least time between two lines about one watch.
const watchPause = time.Minute

// watchError says why a watch does not work, with what to do about it. The
// client tries again by itself, with growing pauses.
func (x *engine) watchError(w *watch) cache.WatchErrorHandlerWithContext {
	var mu sync.Mutex
	var said time.Time
	return func(ctx context.Context, _ *cache.Reflector, err error) {
		if ctx.Err() != nil || apierrors.IsResourceExpired(err) || apierrors.IsGone(err) {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		if time.Since(said) < watchPause {
			return
		}
		said = time.Now()
		remedy := "check the API server; the last state seen stays in force"
		if apierrors.IsNotFound(err) || apierrors.IsForbidden(err) {
			remedy = w.remedy
		}
		x.Logger.Warn("cannot watch; trying again", slog.String("resource", w.resource), slog.Any("error", err), slog.String("remedy", remedy))
	}
}
