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

func TestSpireServerRefusals(t *testing.T) {
	for name, tc := range map[string]struct{ doc, want string }{
		"both":             {serverHead + trusted + attested + "  embedded: {caTTL: 1h}\n", "agent.yaml:9: authority.embedded: and authority.spireServer exclude each other"},
		"no address":       {head + "authority: {spireServer: {syncInterval: 9s}}\n", "authority.spireServer.address: is missing"},
		"no port":          {strings.Replace(serverHead, "b:8082", "b", 1) + trusted + attested, "agent.yaml:6: authority.spireServer.address: \"b\" is not host:port"},
		"only a comma":     {strings.Replace(serverHead, "a:8081, b:8082", "','", 1) + trusted + attested, "authority.spireServer.address:"},
		"no trust":         {serverHead + attested, "set exactly one of path, url and insecure"},
		"two trusts":       {serverHead + "    trustBundle: {path: /b, insecure: true}\n" + attested, "set exactly one of path, url and insecure"},
		"http":             {serverHead + "    trustBundle: {url: 'http://a/b'}\n" + attested, "agent.yaml:7: authority.spireServer.trustBundle.url:"},
		"format":           {serverHead + "    trustBundle: {path: /b, format: der}\n" + attested, "trustBundle.format: \"der\" is none of pem, spiffe"},
		"no cluster":       {serverHead + trusted, "nodeAttestation.cluster: is missing"},
		"attestor":         {serverHead + trusted + "    nodeAttestation: {type: tpm}\n", "agent.yaml:8: authority.spireServer.nodeAttestation.type: \"tpm\" is none of"},
		"no token":         {serverHead + trusted + "    nodeAttestation: {type: join_token}\n", "set exactly one of joinToken and joinTokenFile"},
		"relative":         {serverHead + trusted + "    nodeAttestation: {type: join_token, joinTokenFile: t}\n", "joinTokenFile: \"t\" is not an absolute path"},
		"interval":         {serverHead + trusted + attested + "    syncInterval: 1ms\n", "agent.yaml:9: authority.spireServer.syncInterval:"},
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
