package config

import (
	"net"
)

// Where pod facts come from.
const (
	// PodsAuto is PodsWatch where an API server is configured, in a pod or by a
	// kubeconfig, else PodsNone.
	PodsAuto = "auto"
	// PodsWatch watches this node's pods at the API server.
	PodsWatch = "watch"
	// PodsKubelet asks the kubelet while somebody's facts are missing.
	PodsKubelet = "kubelet"
	// PodsNone is the publish ledger alone.
	PodsNone = "none"
)

// Pods says how the agent learns of labels, owners, images and containers of
// pods. Namespace, name and service account come from the publish ledger too.
type Pods struct {
	Source          string      `yaml:"source" doc:"Where labels, owners, images and containers of pods come from: watch (API server, this node's pods only), kubelet (asked while a caller's are missing), none, or auto (watch where an API server is configured, else none)."`
	Kubeconfig      string      `yaml:"kubeconfig" doc:"Kubeconfig file for watch; empty: the pod's own service account."`
	NamespaceLabels bool        `yaml:"namespaceLabels" doc:"Add k8s:ns-label selectors; needs source watch, and list and watch of namespaces."`
	Kubelet         KubeletPods `yaml:"kubelet"`
	CRISocket       string      `yaml:"criSocket" doc:"Socket of the container runtime, such as /run/containerd/containerd.sock, for container selectors as soon as the container runs; its owner is root of the node, so it is opt-in. Empty: they come when the pod's status shows the container."`
}

// KubeletPods is how the kubelet is asked.
type KubeletPods struct {
	Address            string `yaml:"address" doc:"host:port of the kubelet; empty: NODE:10250."`
	TokenPath          string `yaml:"tokenPath" doc:"File with the token for the kubelet, read for every question; empty: the service account's."`
	CAPath             string `yaml:"caPath" doc:"File with the certificates that vouch for the kubelet's; empty: the cluster's."`
	InsecureSkipVerify bool   `yaml:"insecureSkipVerify" doc:"Believe any kubelet certificate. Whoever can answer at the address gets the token and says which pods there are."`
}

func (a *Agent) checkPods(c *collector) {
	const key = "attestation.kubernetes.pods."
	p := &a.Attestation.Kubernetes.Pods
	c.oneOf(key+"source", p.Source, PodsAuto, PodsWatch, PodsKubelet, PodsNone)
	for name, path := range map[string]string{
		"kubeconfig": p.Kubeconfig, "criSocket": p.CRISocket, "kubelet.tokenPath": p.Kubelet.TokenPath, "kubelet.caPath": p.Kubelet.CAPath,
	} {
		if path != "" {
			c.absolute(key+name, path)
		}
	}
	if p.NamespaceLabels && (p.Source == PodsKubelet || p.Source == PodsNone) {
		c.add(key+"namespaceLabels", "only the API server knows labels of namespaces; set source: watch, or leave them out")
	}
	if p.Kubelet.Address == "" {
		p.Kubelet.Address = net.JoinHostPort(a.Node.Name, "10250")
	} else if host, _, err := net.SplitHostPort(p.Kubelet.Address); err != nil || host == "" {
		c.add(key+"kubelet.address", "%q is not host:port", p.Kubelet.Address)
	}
}
