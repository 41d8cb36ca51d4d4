package podevent

import (
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
)

// component is who the events are from.
const component = "spiffe-node"

// Kube writes events to the API server. It needs create of events.
type Kube struct {
	client rest.Interface
	node   string
}

var _ Writer = (*Kube)(nil)

// NewKube is a client of the API server of a kubeconfig, or with an empty one of
// the pod this process runs in. It does not connect.
func NewKube(kubeconfig, userAgent, node string) (*Kube, error) {
	var cfg *rest.Config
	var err error
	if kubeconfig == "" {
		cfg, err = rest.InClusterConfig()
	} else {
		cfg, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("configure the API server's client: %w", err)
	}
	scheme := runtime.NewScheme()
	if err := corev1.AddToScheme(scheme); err != nil {
		return nil, fmt.Errorf("configure the API server's client: %w", err)
	}
	cfg.APIPath, cfg.GroupVersion = "/api", &corev1.SchemeGroupVersion
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.ContentType = runtime.ContentTypeProtobuf
	cfg.AcceptContentTypes = runtime.ContentTypeProtobuf + "," + runtime.ContentTypeJSON
	cfg.UserAgent, cfg.WarningHandler = userAgent, rest.NoWarnings{}
	client, err := rest.RESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("configure the API server's client: %w", err)
	}
	return &Kube{client, node}, nil
}

// Write creates an event on the pod.
func (k *Kube) Write(ctx context.Context, e Event, at time.Time) error {
	now := metav1.NewTime(at)
	kind := corev1.EventTypeWarning
	if e.Reason == ReasonConflict {
		kind = corev1.EventTypeNormal
	}
	event := &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: e.Namespace, Name: eventName(e.Name)},
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: e.Namespace, Name: e.Name, UID: types.UID(e.UID)},
		Reason:         e.Reason, Message: e.Note, Type: kind,
		Source:         corev1.EventSource{Component: component, Host: k.node},
		FirstTimestamp: now, LastTimestamp: now, Count: 1,
		ReportingController: component, ReportingInstance: k.node,
	}
	return k.client.Post().Namespace(e.Namespace).Resource("events").Body(event).Do(ctx).Error()
}

// eventName is unique, and no longer than a name may be.
func eventName(pod string) string {
	const most = 253 - 1 - 26
	return pod[:min(len(pod), most)] + "." + strings.ToLower(rand.Text())
}
