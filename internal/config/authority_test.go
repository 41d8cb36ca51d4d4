package config_test

import (
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/doctest"
)

const authorityHead = "apiVersion: config.spiffe-node.io/v1alpha1\nkind: AuthorityConfiguration\ntrustDomain: example.org\n"

func TestAuthorityFileNamesEveryKey(t *testing.T) {
	if _, err := config.LoadAuthority("authority.yaml", nil); err != nil {
		t.Error(err)
	}
	data, err := os.ReadFile("authority.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.SplitSeq(config.AuthorityReference(), "\n") {
		key, _, ok := strings.Cut(strings.TrimPrefix(line, "| `"), "`")
		if !ok || !strings.HasPrefix(line, "| `") {
			continue
		}
		leaf := key[strings.LastIndex(key, ".")+1:]
		if !strings.Contains(string(data), leaf+":") {
			t.Errorf("authority.yaml does not show %s", key)
		}
	}
}

func TestAuthorityReferenceIsPublished(t *testing.T) {
	doctest.Block(t, "../../docs/configuration.md", "authority-keys", config.AuthorityReference(), *update)
}

func TestAuthorityRefusals(t *testing.T) {
	const psat = "nodeAttestation:\n  k8sPSAT:\n    cluster: c\n    serviceAccountAllowList: [a:b]\n"
	for name, tc := range map[string]struct{ doc, want string }{
		"unknown key":       {authorityHead + "server:\n  port: 1\n", "a.yaml:5: port: is not a key here"},
		"agent's kind":      {head, "a.yaml:2: kind: \"AgentConfiguration\" is not"},
		"no kind":           {strings.Replace(authorityHead, "kind: AuthorityConfiguration\n", "", 1), "kind: \"\" is not"},
		"bad trust domain":  {strings.Replace(authorityHead, "example.org", "Exa mple", 1), "a.yaml:3: trustDomain:"},
		"bad address":       {authorityHead + "server: {address: nowhere}\n", "a.yaml:4: server.address:"},
		"bad admin":         {authorityHead + "server:\n  adminIDs: [\"spiffe://td/x\", x]\n", "a.yaml:5: server.adminIDs[1]:"},
		"relative socket":   {authorityHead + "admin: {socketPath: x}\n", "admin.socketPath: \"x\" is not an absolute path"},
		"half a disk":       {authorityHead + "embedded:\n  upstream:\n    disk: {certFile: /x}\n", "a.yaml:6: embedded.upstream.disk.keyFile: is missing"},
		"relative CA":       {authorityHead + "embedded:\n  upstream:\n    disk:\n      certFile: x\n      keyFile: /y\n", "a.yaml:7: embedded.upstream.disk.certFile: \"x\" is not an absolute path"},
		"relative roots":    {authorityHead + "embedded:\n  upstream:\n    disk: {certFile: /x, keyFile: /y, bundleFile: z}\n", "embedded.upstream.disk.bundleFile: \"z\""},
		"two CAs":           {authorityHead + "embedded:\n  upstream:\n    disk: {certFile: /x, keyFile: /y}\n    parent: {address: \"p:1\", workloadAPISocket: /s}\n", "a.yaml:7: embedded.upstream.parent: is set beside disk"},
		"half a parent":     {authorityHead + "embedded:\n  upstream:\n    parent: {address: p}\n", "embedded.upstream.parent.address: \"p\" is not host:port"},
		"parent, no socket": {authorityHead + "embedded:\n  upstream:\n    parent: {address: \"p:1\"}\n", "embedded.upstream.parent.workloadAPISocket: \"\" is not an absolute path"},
		"ttl over ca":       {authorityHead + "embedded:\n  defaultX509SVIDTTL: 48h\n", "a.yaml:5: embedded.defaultX509SVIDTTL: 48h0m0s is longer than caTTL"},
		"no cluster":        {authorityHead + "nodeAttestation:\n  k8sPSAT:\n    serviceAccountAllowList: [a:b]\n", "nodeAttestation.k8sPSAT.cluster: is missing"},
		"bad cluster":       {authorityHead + strings.Replace(psat, "cluster: c", "cluster: a/b", 1), "a.yaml:6: nodeAttestation.k8sPSAT.cluster:"},
		"nobody allowed":    {authorityHead + strings.Replace(psat, "[a:b]", "[]", 1), "a.yaml:7: nodeAttestation.k8sPSAT.serviceAccountAllowList: is empty"},
		"bad account":       {authorityHead + strings.Replace(psat, "[a:b]", "[a:b, ab]", 1), "serviceAccountAllowList[1]: \"ab\" is not namespace:name"},
		"any audience":      {authorityHead + psat + "    audience: []\n", "nodeAttestation.k8sPSAT.audience: must name"},
		"relative config":   {authorityHead + psat + "    kubeConfigFile: x\n", "nodeAttestation.k8sPSAT.kubeConfigFile:"},
		"x509pop mode":      {authorityHead + "nodeAttestation:\n  x509pop:\n    mode: pki\n", "a.yaml:6: nodeAttestation.x509pop.mode:"},
		"x509pop, no CA":    {authorityHead + "nodeAttestation:\n  x509pop: {mode: external_pki}\n", "nodeAttestation.x509pop.caBundlePaths: is empty"},
		"x509pop, no mode":  {authorityHead + "nodeAttestation:\n  x509pop: {caBundlePaths: [/ca]}\n", "nodeAttestation.x509pop.mode: is missing"},
		"x509pop, two CAs":  {authorityHead + "nodeAttestation:\n  x509pop: {mode: spiffe, caBundlePaths: [/ca]}\n", "does not count in mode spiffe"},
		"x509pop, relative": {authorityHead + "nodeAttestation:\n  x509pop: {mode: external_pki, caBundlePaths: [ca]}\n", "nodeAttestation.x509pop.caBundlePaths[0]:"},
		"x509pop, anybody":  {authorityHead + "nodeAttestation:\n  x509pop: {mode: spiffe, svidPrefix: /}\n", "nodeAttestation.x509pop.svidPrefix: \"/\" is not a path set aside"},
		"x509pop, no limit": {authorityHead + "nodeAttestation:\n  x509pop: {mode: spiffe, maxIntermediates: 0}\n", "nodeAttestation.x509pop.maxIntermediates:"},
		"registrar alone":   {authorityHead + "registration: {enabled: true}\n", "a.yaml:4: registration.enabled: needs nodeAttestation.k8sPSAT.cluster"},
		"bad pattern":       {authorityHead + "registration:\n  ignoreNamespaces: [a, \"(\"]\n", "a.yaml:5: registration.ignoreNamespaces[1]:"},
		"bad endpoint":      {authorityHead + "federation: {bundleEndpoint: {address: x}}\n", "federation.bundleEndpoint.address: \"x\" is not host:port"},
		"bad profile":       {authorityHead + "federation: {bundleEndpoint: {profile: web}}\n", "federation.bundleEndpoint.profile: \"web\" is none of"},
		"no certificate":    {authorityHead + "federation: {bundleEndpoint: {address: \":1\", profile: https_web}}\n", "profile: is https_web, but there is neither"},
		"key alone":         {authorityHead + "federation: {bundleEndpoint: {profile: https_web, keyFile: /k}}\n", "certFile: \"\" is not an absolute path"},
		"unused files":      {authorityHead + "federation: {bundleEndpoint: {certFile: /c, keyFile: /k}}\n", "profile: is https_spiffe, which uses"},
		"files and acme":    {authorityHead + "federation: {bundleEndpoint: {profile: https_web, certFile: /c, keyFile: /k, acme: {domain: x.org, tosAccepted: true}}}\n", "certFile: and acme.domain are both set"},
		"terms":             {authorityHead + "federation: {bundleEndpoint: {profile: https_web, acme: {domain: x.org}}}\n", "acme.tosAccepted: is not true"},
		"acme server":       {authorityHead + "federation: {bundleEndpoint: {profile: https_web, acme: {domain: x.org, tosAccepted: true, directoryURL: \"http://x\"}}}\n", "acme.directoryURL: \"http://x\" is not"},
		"slow hint":         {authorityHead + "federation: {bundleEndpoint: {address: \":1\", refreshHint: 5h}}\n", "refreshHint: 5h0m0s is more than a sixth"},
		"no hint":           {authorityHead + "federation: {bundleEndpoint: {refreshHint: 0s}}\n", "refreshHint: 0s is shorter"},
		"bad health":        {authorityHead + "health: {address: nine}\n", "health.address:"},
		"bad level":         {authorityHead + "log: {level: loud}\n", "log.level:"},
		"agent's own key":   {authorityHead + "socket: {}\n", "a.yaml:4: socket: is not a key here"},
		"repeated key":      {authorityHead + "log: {}\nlog: {}\n", "already defined"},
		"two documents":     {authorityHead + "---\n" + authorityHead, "more than one document"},
		"bad key type":      {authorityHead + "embedded: {caKeyType: dsa}\n", "embedded.caKeyType: \"dsa\" is none of"},
		"relative state":    {authorityHead + "embedded: {statePath: x}\n", "embedded.statePath: \"x\" is not an absolute path"},
		"no trust domain":   {strings.Replace(authorityHead, "trustDomain: example.org\n", "", 1), "trustDomain: is missing"},
		"admin id in other": {authorityHead + "server:\n  adminIDs: [\"\"]\n", "server.adminIDs[0]:"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := config.ParseAuthority("a.yaml", []byte(tc.doc), nil)
			if err == nil {
				t.Fatal("accepted")
			}
			if !errors.Is(err, config.ErrInvalid) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got  %v\nwant it to hold %s", err, tc.want)
			}
		})
	}
}

func TestAuthorityOverride(t *testing.T) {
	c, err := config.LoadAuthority("", func(a *config.AuthorityProcess) { a.TrustDomain = "flags.example" })
	if err != nil {
		t.Fatal(err)
	}
	if c.TrustDomain != "flags.example" || c.Embedded.JWTKeyType != "ec-p256" || !c.RateLimits.Signing {
		t.Errorf("not filled in: %+v", c)
	}
	if _, err := config.LoadAuthority("missing.yaml", nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

func FuzzParseAuthority(f *testing.F) {
	data, err := os.ReadFile("authority.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte(authorityHead))
	f.Add([]byte("nodeAttestation: {k8sPSAT: {serviceAccountAllowList: [{}]}}"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := config.ParseAuthority("fuzz.yaml", data, nil)
		if (c == nil) == (err == nil) {
			t.Fatal("neither or both of configuration and error")
		}
	})
}
