package config_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe-node/spiffe-node/internal/config"
)

const serverHead = head + "authority:\n  spireServer:\n    address: a:8081, b:8082\n"

const (
	trusted  = "    trustBundle: {path: /b.pem}\n"
	attested = "    nodeAttestation: {type: join_token, joinTokenFile: /t}\n"
)

func TestSpireServer(t *testing.T) {
	c, err := config.Parse("agent.yaml", []byte(serverHead+trusted+attested), nil)
	if err != nil {
		t.Fatal(err)
	}
	s := c.Authority.SpireServer
	if !s.Enabled() || !slices.Equal(s.Addresses(), []string{"a:8081", "b:8082"}) || s.WithdrawConfirm == 0 || s.TrustBundle.Format != "pem" {
		t.Errorf("%+v", s)
	}
}

func TestSpireServerSources(t *testing.T) {
	for name, doc := range map[string]string{
		"through a socket": "    trustBundle: {url: 'http://bundles/b', unixSocket: /s}\n" + attested,
		"workload API":     "    trustBundle: {workloadAPISocket: /s}\n" + attested,
		"config map":       "    trustBundle: {configMap: {namespace: spire, name: spire-bundle}}\n" + attested,
		"x509pop files":    trusted + "    nodeAttestation: {type: x509pop, certificatePath: /c, privateKeyPath: /k}\n    rebootstrap: {mode: always}\n",
		"x509pop socket":   trusted + "    nodeAttestation: {type: x509pop, workloadAPISocket: /s}\n",
		"other settings":   trusted + attested + "    requirePQKEM: true\n    rebootstrap: {mode: never, delay: 10m}\nidentity: {availabilityTarget: 24h}\n",
	} {
		if _, err := config.Parse("agent.yaml", []byte(serverHead+doc), nil); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestSpireServerRefusals(t *testing.T) {
	for name, tc := range map[string]struct{ doc, want string }{
		"both":             {serverHead + trusted + attested + "  embedded: {caTTL: 1h}\n", "agent.yaml:9: authority.embedded: and authority.spireServer exclude each other"},
		"no address":       {head + "authority: {spireServer: {syncInterval: 9s}}\n", "authority.spireServer.address: is missing"},
		"no port":          {strings.Replace(serverHead, "b:8082", "b", 1) + trusted + attested, "agent.yaml:6: authority.spireServer.address: \"b\" is not host:port"},
		"only a comma":     {strings.Replace(serverHead, "a:8081, b:8082", "','", 1) + trusted + attested, "authority.spireServer.address:"},
		"no trust":         {serverHead + attested, "set exactly one of path, url, workloadAPISocket, configMap.name and insecure"},
		"two trusts":       {serverHead + "    trustBundle: {path: /b, insecure: true}\n" + attested, "set exactly one of path, url, workloadAPISocket, configMap.name and insecure"},
		"http":             {serverHead + "    trustBundle: {url: 'http://a/b'}\n" + attested, "agent.yaml:7: authority.spireServer.trustBundle.url:"},
		"format":           {serverHead + "    trustBundle: {path: /b, format: der}\n" + attested, "trustBundle.format: \"der\" is none of pem, spiffe"},
		"no cluster":       {serverHead + trusted, "nodeAttestation.cluster: is missing"},
		"attestor":         {serverHead + trusted + "    nodeAttestation: {type: tpm}\n", "agent.yaml:8: authority.spireServer.nodeAttestation.type: \"tpm\" is none of"},
		"no token":         {serverHead + trusted + "    nodeAttestation: {type: join_token}\n", "set exactly one of joinToken and joinTokenFile"},
		"relative":         {serverHead + trusted + "    nodeAttestation: {type: join_token, joinTokenFile: t}\n", "joinTokenFile: \"t\" is not an absolute path"},
		"interval":         {serverHead + trusted + attested + "    syncInterval: 1ms\n", "agent.yaml:9: authority.spireServer.syncInterval:"},
		"socket alone":     {serverHead + "    trustBundle: {path: /b, unixSocket: /s}\n" + attested, "trustBundle.url: is missing"},
		"relative socket":  {serverHead + "    trustBundle: {workloadAPISocket: 's'}\n" + attested, "trustBundle.workloadAPISocket: \"s\" is not an absolute path"},
		"odd scheme":       {serverHead + "    trustBundle: {url: 'ftp://a/b', unixSocket: /s}\n" + attested, "trustBundle.url: \"ftp://a/b\" is not"},
		"no namespace":     {serverHead + "    trustBundle: {configMap: {name: a}}\n" + attested, "agent.yaml:7: authority.spireServer.trustBundle.configMap.namespace: is missing"},
		"no map":           {serverHead + "    trustBundle: {path: /b, configMap: {namespace: a}}\n" + attested, "trustBundle.configMap.name: is missing"},
		"no key":           {serverHead + "    trustBundle: {configMap: {name: a, namespace: b, key: ''}}\n" + attested, "trustBundle.configMap.key: is missing"},
		"rebootstrap":      {serverHead + trusted + attested + "    rebootstrap: {mode: maybe}\n", "rebootstrap.mode: \"maybe\" is none of"},
		"token always":     {serverHead + trusted + attested + "    rebootstrap: {mode: always}\n", "rebootstrap.mode: always needs a node attestation that can be repeated"},
		"insecure always":  {serverHead + "    trustBundle: {insecure: true}\n    rebootstrap: {mode: always}\n    nodeAttestation: {cluster: c}\n", "rebootstrap.mode: always needs a trust bundle"},
		"no delay":         {serverHead + trusted + attested + "    rebootstrap: {delay: 0s}\n", "rebootstrap.delay: 0s is shorter"},
		"half a pair":      {serverHead + trusted + "    nodeAttestation: {type: x509pop, certificatePath: /c}\n", "x509pop needs either certificatePath and privateKeyPath or workloadAPISocket"},
		"pair and socket":  {serverHead + trusted + "    nodeAttestation: {type: x509pop, certificatePath: /c, privateKeyPath: /k, workloadAPISocket: /s}\n", "x509pop needs either"},
		"no proof":         {serverHead + trusted + "    nodeAttestation: {type: x509pop}\n", "x509pop needs either"},
		"relative key":     {serverHead + trusted + "    nodeAttestation: {type: x509pop, certificatePath: /c, privateKeyPath: k}\n", "privateKeyPath: \"k\" is not an absolute path"},
		"short target":     {head + "identity: {availabilityTarget: 1h}\n", "agent.yaml:4: identity.availabilityTarget: 1h0m0s is shorter than 24h"},
		"negative confirm": {serverHead + trusted + attested + "    withdrawConfirm: -1s\n", "withdrawConfirm: -1s is negative"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := config.Parse("agent.yaml", []byte(tc.doc), nil)
			if !errors.Is(err, config.ErrInvalid) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got  %v\nwant it to hold %s", err, tc.want)
			}
		})
	}
}
