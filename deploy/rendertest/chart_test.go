package rendertest_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/chart/loader"
	"helm.sh/helm/v3/pkg/chartutil"
	"helm.sh/helm/v3/pkg/engine"
	"helm.sh/helm/v3/pkg/strvals"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/kubernetes/scheme"
)

const (
	chartDir  = "../helm/spiffe-node"
	release   = "spire"
	namespace = "spire-server"
)

// rendered is what a set of values makes of the chart.
type rendered struct {
	files   texts
	objects []object
}

// texts are what templates rendered to, by file name.
type texts map[string]string

// sorted are the objects' texts in the order of their files.
func (f texts) sorted() []string {
	var out []string
	for _, name := range slices.Sorted(maps.Keys(f)) {
		if filepath.Ext(name) == ".yaml" {
			out = append(out, f[name])
		}
	}
	return out
}

type object struct {
	file string
	text []byte
	raw  *unstructured.Unstructured
}

// render renders the chart as helm install would; sets are --set arguments.
func render(t *testing.T, sets ...string) *rendered {
	t.Helper()
	r, err := tryRender(sets...)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func tryRender(sets ...string) (*rendered, error) {
	values := map[string]any{}
	for _, s := range sets {
		if err := strvals.ParseInto(s, values); err != nil {
			return nil, err
		}
	}
	return renderChart(chartDir, values)
}

func renderChart(dir string, values map[string]any) (*rendered, error) {
	chart, err := loader.Load(dir)
	if err != nil {
		return nil, err
	}
	caps := chartutil.DefaultCapabilities.Copy()
	caps.KubeVersion = chartutil.KubeVersion{Version: "v1.34.4", Major: "1", Minor: "34"}
	options := chartutil.ReleaseOptions{Name: release, Namespace: namespace, Revision: 1, IsInstall: true}
	all, err := chartutil.ToRenderValues(chart, values, options, caps)
	if err != nil {
		return nil, err
	}
	files, err := engine.Render(chart, all)
	if err != nil {
		return nil, err
	}
	r := &rendered{files: texts{}}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		base := filepath.Base(name)
		r.files[base] = files[name]
		if filepath.Ext(name) != ".yaml" {
			continue
		}
		if err := r.split(base, files[name]); err != nil {
			return nil, fmt.Errorf("%s: %w\n%s", base, err, files[name])
		}
	}
	return r, nil
}

func (r *rendered) split(file, text string) error {
	reader := utilyaml.NewYAMLReader(bufio.NewReader(strings.NewReader(text)))
	for {
		doc, err := reader.Read()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		js, err := utilyaml.ToJSON(doc)
		if err != nil {
			return err
		}
		if string(bytes.TrimSpace(js)) == "null" {
			continue
		}
		u := &unstructured.Unstructured{}
		if err := u.UnmarshalJSON(js); err != nil {
			return err
		}
		r.objects = append(r.objects, object{file, js, u})
	}
}

// decode gives an object as its Go type and refuses unknown and repeated
// fields, as kubectl apply does.
func decode(o object) (runtime.Object, error) {
	codecs := serializer.NewCodecFactory(scheme.Scheme, serializer.EnableStrict)
	obj, _, err := codecs.UniversalDeserializer().Decode(o.text, nil, nil)
	return obj, err
}

// find is the one object of a type and name.
func find[T metav1.Object](t *testing.T, r *rendered, name string) T {
	t.Helper()
	v, ok := lookup[T](t, r, name)
	if !ok {
		t.Fatalf("no %T named %q among %q", v, name, r.names())
	}
	return v
}

func lookup[T metav1.Object](t *testing.T, r *rendered, name string) (T, bool) {
	t.Helper()
	var zero T
	for _, o := range r.objects {
		if !scheme.Scheme.Recognizes(o.raw.GroupVersionKind()) {
			continue
		}
		obj, err := decode(o)
		if err != nil {
			t.Fatalf("%s: %v", o.file, err)
		}
		if v, ok := obj.(T); ok && v.GetName() == name {
			return v, true
		}
	}
	return zero, false
}

func (r *rendered) kind(kind string) []*unstructured.Unstructured {
	var out []*unstructured.Unstructured
	for _, o := range r.objects {
		if o.raw.GetKind() == kind {
			out = append(out, o.raw)
		}
	}
	return out
}

func (r *rendered) names() []string {
	var out []string
	for _, o := range r.objects {
		out = append(out, o.raw.GetKind()+"/"+o.raw.GetName())
	}
	slices.Sort(out)
	return out
}

// variants are ways to install; every test of all objects runs on each.
var variants = map[string][]string{
	"default":  {"global.spire.trustDomain=example.org"},
	"one node": {"global.spire.trustDomain=example.org", "authority.embedded.persistence.type=hostPath"},
	"emptyDir": {"global.spire.trustDomain=example.org", "authority.embedded.persistence.type=emptyDir"},
	"external": {"global.spire.trustDomain=example.org", "authority.mode=external", "authority.external.address=spire.example.com:8081"},
	"external, tuned": {
		"global.spire.trustDomain=example.org", "authority.mode=external", "authority.external.address=spire.example.com:8081",
		"authority.external.trustBundle.namespace=spire", "authority.external.trustBundle.key=bundle.crt", "authority.external.trustBundle.format=pem",
		"authority.external.nodeAttestation.type=x509pop", "authority.external.nodeAttestation.x509pop.intermediates=ca.crt",
		"authority.external.rebootstrap.mode=always", "authority.external.rebootstrap.delay=10m", "authority.external.requirePQKEM=true",
		"authority.external.syncInterval=10s", "authority.external.withdrawConfirm=0s",
	},
	"external, https": {
		"global.spire.trustDomain=example.org", "authority.mode=external", "authority.external.address=spire.example.com:8081",
		"authority.external.trustBundle.url=https://bundles.example.org/bundle.json",
	},
	"openshift": {"global.spire.trustDomain=example.org", "global.openshift=true", "selinux.relabel.image=registry.example/ubi-minimal:9"},
	"everything": {
		"global.spire.trustDomain=example.org", "global.telemetry.prometheus.enabled=true",
		"global.imagePullSecrets[0].name=pull", "networkPolicy.metricsFrom[0].namespaceSelector.matchLabels.name=monitoring",
		"node.agent.capabilities={SYS_PTRACE}", "node.agent.extraEnv[0].name=A", "node.agent.extraEnv[0].value=b", "node.podLabels.a=b",
		"node.hostAliases[0].ip=192.0.2.1", "node.hostAliases[0].hostnames={spire}", "authority.embedded.podAnnotations.a=b",
		"authority.embedded.persistence.storageClass=fast", "csiDriverObject.annotations.a=b", "csiDriverObject.labels.c=d",
		"clusterSPIFFEIDs.mine.spiffeIDTemplate=spiffe://example.org/x", "clusterSPIFFEIDs.mine.podSelector.matchLabels.a=b",
	},
	"pods": {
		"global.spire.trustDomain=example.org", "node.agent.pods.namespaceLabels=true", "node.agent.pods.criSocket=/run/containerd/containerd.sock",
	},
	"federation": {
		"global.spire.trustDomain=example.org", "authority.embedded.federation.enabled=true",
		"clusterFederatedTrustDomains.other.trustDomain=other.org", "clusterFederatedTrustDomains.other.bundleEndpointURL=https://other.org:8443",
		"clusterFederatedTrustDomains.other.bundleEndpointProfile.type=https_spiffe",
		"clusterFederatedTrustDomains.other.bundleEndpointProfile.endpointSPIFFEID=spiffe://other.org/spire/server",
	},
	"federation by a Secret": {
		"global.spire.trustDomain=example.org", "authority.embedded.federation.enabled=true", "authority.embedded.federation.tls.spire.enabled=false",
		"authority.embedded.federation.tls.externalSecret.enabled=true", "authority.embedded.federation.tls.externalSecret.secretName=bundle-tls",
		"authority.embedded.federation.bundleEndpoint.port=9443", "authority.embedded.federation.from[0].ipBlock.cidr=192.0.2.0/24",
	},
	"machines": {
		"global.spire.trustDomain=example.org", "authority.embedded.nodeAttestation.x509pop.enabled=true", "authority.embedded.nodeAttestation.x509pop.configMap=machines-ca",
		"authority.embedded.nodeAttestation.x509pop.key=roots.pem", "authority.embedded.service.type=LoadBalancer", "authority.embedded.service.from[0].ipBlock.cidr=192.0.2.0/24", "networkPolicy.enabled=true",
	},
	"company": {"global.spire.trustDomain=example.org", "authority.embedded.upstreamAuthority.disk.enabled=true"},
	"child": {
		"global.spire.trustDomain=example.org", "authority.embedded.upstreamAuthority.spire.enabled=true",
		"authority.embedded.upstreamAuthority.spire.upstreamDriver=upstream.csi.spiffe.io", "authority.embedded.upstreamAuthority.spire.server.address=spire-root.example.org",
	},
	"kubelet":        {"global.spire.trustDomain=example.org", "node.agent.pods.source=kubelet"},
	"start-up taint": {"global.spire.trustDomain=example.org", "startupTaint.enabled=true"},
	"other places": {
		"global.spire.trustDomain=example.org", "kubeletPath=/var/snap/microk8s/common/var/lib/kubelet", "pluginName=b.csi.spiffe.io",
		"socket.directory=/run/b/sockets", "stateDirectory=/run/b/state", "csiDriverObject.create=false", "networkPolicy.enabled=false", "node.agent.inspect.enabled=false",
	},
}

func eachVariant(t *testing.T, check func(*testing.T, *rendered)) {
	t.Helper()
	for _, name := range slices.Sorted(maps.Keys(variants)) {
		t.Run(name, func(t *testing.T) { check(t, render(t, variants[name]...)) })
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(b), "\r\n", "\n")
}
