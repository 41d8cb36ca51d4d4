package config_test

import (
	"errors"
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/doctest"
)

const head = "apiVersion: config.spiffe-node.io/v1alpha1\nkind: AgentConfiguration\ntrustDomain: example.org\n"

func TestShippedFilesParse(t *testing.T) {
	for _, name := range []string{"minimal.yaml", "full.yaml", "spireserver.yaml"} {
		if _, err := config.Load(name, nil); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestFullFileNamesEveryKey(t *testing.T) {
	data, err := os.ReadFile("full.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.SplitSeq(config.Reference(), "\n") {
		key, _, ok := strings.Cut(strings.TrimPrefix(line, "| `"), "`")
		if !ok || !strings.HasPrefix(line, "| `") {
			continue
		}
		leaf := key[strings.LastIndex(key, ".")+1:]
		if !strings.Contains(string(data), leaf+":") {
			t.Errorf("full.yaml does not show %s", key)
		}
	}
}

var update = flag.Bool("update", false, "rewrite the key table in docs/configuration.md")

func TestReferenceIsPublished(t *testing.T) {
	doctest.Block(t, "../../docs/configuration.md", "keys", config.Reference(), *update)
}

func TestRefusals(t *testing.T) {
	for name, tc := range map[string]struct{ doc, want string }{
		"unknown key":         {head + "socket:\n  dir: /x\n", "agent.yaml:5: dir: is not a key here"},
		"unknown top key":     {head + "sockets: {}\n", "agent.yaml:4: sockets: is not a key here"},
		"repeated key":        {head + "mode: standalone\nmode: kubernetes\n", "agent.yaml:5: mapping key \"mode\" already defined"},
		"wrong type":          {head + "limits:\n  connections: many\n", "agent.yaml:5: cannot unmarshal"},
		"bad duration":        {head + "workloadAPI:\n  fetchWait: soon\n", "agent.yaml:5: \"soon\" is not a duration"},
		"not yaml":            {head + "\t- x\n", "found a tab character"},
		"two documents":       {head + "---\n" + head, "more than one document"},
		"no version":          {"kind: AgentConfiguration\ntrustDomain: example.org\n", "apiVersion: \"\" is not"},
		"other version":       {strings.Replace(head, "v1alpha1", "v9", 1), "agent.yaml:1: apiVersion:"},
		"other kind":          {strings.Replace(head, "AgentConf", "ServerConf", 1), "agent.yaml:2: kind:"},
		"no trust domain":     {"apiVersion: config.spiffe-node.io/v1alpha1\nkind: AgentConfiguration\n", "trustDomain: is missing"},
		"bad trust domain":    {strings.Replace(head, "example.org", "Exa mple", 1), "agent.yaml:3: trustDomain:"},
		"bad mode":            {head + "mode: cluster\n", "agent.yaml:4: mode: \"cluster\" is none of"},
		"bad node selector":   {head + "node:\n  selectors:\n  - a:b\n  - nocolon\n", "agent.yaml:7: node.selectors[1]:"},
		"bad node name":       {head + "node: {name: 'a/b'}\n", "agent.yaml:4: node.name:"},
		"relative socket dir": {head + "socket: {directory: run}\n", "agent.yaml:4: socket.directory:"},
		"socket name path":    {head + "socket: {name: a/b}\n", "socket.name: \"a/b\" must be a bare file name"},
		"socket named twice":  {head + "socket: {alternateNames: [socket]}\n", "socket.alternateNames[0]: \"socket\" is named twice"},
		"admin in public":     {head + "admin: {socketPath: /run/spiffe-node/public/admin.sock}\n", "agent.yaml:4: admin.socketPath:"},
		"state in public":     {head + "identity: {stateDirectory: /run/spiffe-node/public/state}\n", "identity.stateDirectory:"},
		"key type":            {head + "identity: {x509SVIDKeyType: dsa}\n", "identity.x509SVIDKeyType: \"dsa\" is none of"},
		"ttl over ca":         {head + "authority:\n  embedded:\n    defaultX509SVIDTTL: 48h\n", "agent.yaml:6: authority.embedded.defaultX509SVIDTTL: 48h0m0s is longer than caTTL"},
		"limit":               {head + "limits: {parkedPerPod: 0}\n", "limits.parkedPerPod: 0 is less than 1"},
		"pods source":         {head + "attestation: {kubernetes: {pods: {source: api}}}\n", "attestation.kubernetes.pods.source: \"api\" is none of"},
		"pods ns labels":      {head + "attestation: {kubernetes: {pods: {source: none, namespaceLabels: true}}}\n", "pods.namespaceLabels: only the API server"},
		"pods kubelet":        {head + "attestation: {kubernetes: {pods: {kubelet: {address: node}}}}\n", "pods.kubelet.address: \"node\" is not host:port"},
		"pods cri":            {head + "attestation: {kubernetes: {pods: {criSocket: run/x.sock}}}\n", "pods.criSocket: \"run/x.sock\" is not an absolute path"},
		"health":              {head + "health: {address: nine}\n", "health.address:"},
		"nothing served":      {head + "sds: {disabled: true}\nworkloadAPI: {disabled: true}\n", "nothing would be served"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := config.Parse("agent.yaml", []byte(tc.doc), nil)
			if err == nil {
				t.Fatal("accepted")
			}
			if !errors.Is(err, config.ErrInvalid) || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got  %v\nwant it to hold %s", err, tc.want)
			}
		})
	}
}

func TestOverride(t *testing.T) {
	c, err := config.Load("", func(a *config.Agent) { a.TrustDomain = "flags.example" })
	if err != nil {
		t.Fatal(err)
	}
	if c.TrustDomain != "flags.example" || c.Authority.Embedded.JWTKeyType != "ec-p256" || c.Node.Name == "" {
		t.Errorf("not filled in: %+v", c)
	}
}

func TestNullNames(t *testing.T) {
	c, err := config.Parse("agent.yaml", []byte(head+"sds: {defaultBundleName: null, defaultAllBundlesName: ROOTCA}\n"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if c.SDS.DefaultBundleName != nil || *c.SDS.DefaultAllBundlesName != "ROOTCA" || *c.SDS.DefaultSVIDName != "default" {
		t.Errorf("names: %+v", c.SDS)
	}
}

func FuzzParse(f *testing.F) {
	for _, name := range []string{"minimal.yaml", "full.yaml"} {
		data, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte(head + "node: {selectors: [{}]}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := config.Parse("fuzz.yaml", data, nil)
		if (c == nil) == (err == nil) {
			t.Fatal("neither or both of configuration and error")
		}
	})
}
