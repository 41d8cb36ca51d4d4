package podinfo

import (
	"bytes"
	"log/slog"
	"net/http"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"

	"github.com/spiffe-node/spiffe-node/internal/podfacts"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// MaxText is the most text of a pod's selectors that is kept.
const MaxText = podfacts.MaxText

// Facts is what is kept of a pod.
func Facts(p *corev1.Pod, node string) (pod attest.Pod, containers []attest.Container, cut, ok bool) {
	f := newFacts(p, node, witnessWatch)
	if f == nil {
		return attest.Pod{}, nil, false, false
	}
	return f.pod, f.containers, f.cut, true
}

// Strip is a pod while a list is incomplete.
func Strip(p *corev1.Pod) *corev1.Pod { return strip(p) }

// NewRESTAPI is NewAPI of any server.
func NewRESTAPI(cfg *rest.Config) (API, error) { return newAPI(cfg, "test") }

// SetTransport has a Kubelet's requests answered by rt.
func (k *Kubelet) SetTransport(rt http.RoundTripper) { k.client.Transport = rt }

// DecodePods reads a kubelet's list.
func DecodePods(data []byte, each func(*corev1.Pod)) error {
	return decodePods(bytes.NewReader(data), slog.New(slog.DiscardHandler), each)
}

// ParseStatus reads a runtime's ContainerStatusResponse.
func ParseStatus(data []byte) (id, image, imageRef string, labels map[string]string, err error) {
	s, err := parseStatus(data)
	return s.id, s.image, s.imageRef, s.labels, err
}

// PollDelay is the time between two lists of the kubelet.
func PollDelay(lacking time.Duration) time.Duration { return pollDelay(lacking) }

// Held is how many pods, mirror pods and interests are held.
func (s *Source) Held() (pods, static, interests int) {
	s.store.mu.RLock()
	defer s.store.mu.RUnlock()
	return len(s.store.entries), len(s.store.static), len(s.store.interests)
}

// BytesCodec passes a runtime's messages through.
type BytesCodec = bytesCodec

// Put takes over a pod as the watch does.
func (s *Source) Put(p *corev1.Pod) { _ = (&podStore{s: s}).Add(p) }
