package rendertest_test

import (
	"strings"
	"testing"

	"helm.sh/helm/v3/pkg/lint"
	"helm.sh/helm/v3/pkg/lint/support"
)

func TestLint(t *testing.T) {
	values := map[string]any{"global": map[string]any{"spire": map[string]any{"trustDomain": "example.org"}}}
	for _, m := range lint.AllWithKubeVersion(chartDir, values, namespace, nil).Messages {
		if m.Severity >= support.WarningSev {
			t.Errorf("%s: %v", m.Path, m.Err)
		} else {
			t.Logf("%s: %v", m.Path, m.Err)
		}
	}
}

// TestRefused: wrong values end with a text that says what to do.
func TestRefused(t *testing.T) {
	const td = "global.spire.trustDomain=example.org"
	for name, c := range map[string]struct {
		sets []string
		want string
	}{
		"no trust domain":         {nil, "global.spire.trustDomain is missing"},
		"trust domain upper case": {[]string{"global.spire.trustDomain=Example.ORG"}, "trustDomain"},
		"typo":                    {[]string{td, "kubeletpath=/var/lib/kubelet"}, "kubeletpath"},
		"typo below":              {[]string{td, "node.agent.loglevel=debug"}, "loglevel"},
		"relative path":           {[]string{td, "kubeletPath=var/lib/kubelet"}, "kubeletPath"},
		"trailing slash":          {[]string{td, "socket.directory=/run/spire/agent-sockets/"}, "directory"},
		"mode":                    {[]string{td, "authority.mode=nested"}, "mode"},
		"no address":              {[]string{td, "authority.mode=external"}, "authority.external.address is missing"},
		"address without mode":    {[]string{td, "authority.external.address=a:1"}, "authority.mode=external"},
		"address without port":    {[]string{td, "authority.mode=external", "authority.external.address=spire"}, "address"},
		"bundle over http":        {[]string{td, "authority.mode=external", "authority.external.address=a:1", "authority.external.trustBundle.url=http://a/b"}, "url"},
		"odd attestation":         {[]string{td, "authority.mode=external", "authority.external.address=a:1", "authority.external.nodeAttestation.type=join_token"}, "type"},
		"state on disk":           {[]string{td, "stateDirectory=/var/lib/spiffe-node"}, "tmpfs"},
		"state in sockets":        {[]string{td, "stateDirectory=/run/spire/agent-sockets/state"}, "every pod can read"},
		"no update possible":      {[]string{td, "node.rollingUpdate.maxSurge=0"}, "must allow an update"},
		"digest as tag":           {[]string{td, "image.tag=sha256:00"}, "digest"},
		"values of another chart": {[]string{td, "spire-agent.socketPath=/x"}, "docs/kubernetes.md"},
		"plugin name":             {[]string{td, "pluginName=csi.spiffe.io1"}, "pluginName"},
		"duration":                {[]string{td, "authority.embedded.caTTL=1d"}, "caTTL"},
		"unknown CR field":        {[]string{td, "clusterSPIFFEIDs.x.spiffeIdTemplate=a"}, "spiffeIdTemplate"},
		"socket with a slash":     {[]string{td, "socket.name=a/b"}, "name"},
		"two certificates":        {[]string{td, "authority.embedded.federation.enabled=true", "authority.embedded.federation.tls.externalSecret.enabled=true"}, "enable either spire or externalSecret"},
		"no secret name":          {[]string{td, "authority.embedded.federation.enabled=true", "authority.embedded.federation.tls.spire.enabled=false", "authority.embedded.federation.tls.externalSecret.enabled=true"}, "secretName is missing"},
		"federation elsewhere":    {[]string{td, "authority.mode=external", "authority.external.address=a.b:1", "authority.embedded.federation.enabled=true"}, "has its own bundle endpoint"},
		"nobody to federate":      {[]string{td, "registration.enabled=false", "clusterFederatedTrustDomains.a.trustDomain=a", "clusterFederatedTrustDomains.a.bundleEndpointURL=https://a", "clusterFederatedTrustDomains.a.bundleEndpointProfile.type=https_web"}, "nobody else acts on them"},
		"http endpoint":           {[]string{td, "clusterFederatedTrustDomains.a.trustDomain=a", "clusterFederatedTrustDomains.a.bundleEndpointURL=http://a", "clusterFederatedTrustDomains.a.bundleEndpointProfile.type=https_web"}, "bundleEndpointURL"},
		"two CAs above":           {[]string{td, "authority.embedded.upstreamAuthority.disk.enabled=true", "authority.embedded.upstreamAuthority.spire.enabled=true"}, "there is one CA above"},
		"no Secret":               {[]string{td, "authority.embedded.upstreamAuthority.disk.enabled=true", "authority.embedded.upstreamAuthority.disk.secret.name="}, "disk.secret.name is missing"},
		"no parent":               {[]string{td, "authority.embedded.upstreamAuthority.spire.enabled=true"}, "needs server.address"},
		"own driver":              {[]string{td, "authority.embedded.upstreamAuthority.spire.enabled=true", "authority.embedded.upstreamAuthority.spire.upstreamDriver=csi.spiffe.io", "authority.embedded.upstreamAuthority.spire.server.address=a"}, "ask itself"},
		"taint of nobody":         {[]string{td, "authority.mode=external", "authority.external.address=a:1", "startupTaint.enabled=true"}, "embedded authority"},
		"persistence":             {[]string{td, "authority.embedded.persistence.type=nfs"}, "type"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := tryRender(c.sets...)
			if err == nil {
				t.Fatal("rendered")
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v\ndoes not say %q", err, c.want)
			}
		})
	}
}
