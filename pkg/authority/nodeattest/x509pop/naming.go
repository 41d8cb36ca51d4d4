package x509pop

import (
	"crypto/sha1" //nolint:gosec // selectors and agent IDs of this type are SHA-1 fingerprints; nothing rests on it
	"crypto/x509"
	"encoding/hex"
	"fmt"
	"maps"
	"math/big"
	"slices"
	"strings"
	"text/template"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/nodeattest"
)

// naming is what a template for an agent's path can use.
type naming struct {
	*x509.Certificate
	SerialNumberHex string
	Fingerprint     string // SHA-1 of the certificate, in hex
	PluginName      string
	TrustDomain     string
	SVIDPathTrimmed string            // in mode spiffe the SVID's path without the prefix
	URISanSelectors map[string]string // of SANs such as x509pop://example.org/key/value
}

func parseAgentPath(cfg Config) (*template.Template, error) {
	text := cfg.AgentPath
	switch {
	case text != "":
	case cfg.Mode == SPIFFE:
		text = "/{{ .PluginName }}/{{ .SVIDPathTrimmed }}"
	default:
		text = "/{{ .PluginName }}/{{ .Fingerprint }}"
	}
	t, err := template.New("agent path").Option("missingkey=error").Parse(text)
	if err != nil {
		return nil, fmt.Errorf("x509pop: agent path template: %w", err)
	}
	return t, nil
}

// name is the agent that a proven certificate stands for.
func (a *Attestor) name(leaf *x509.Certificate, chains [][]*x509.Certificate) (*nodeattest.Result, error) {
	trimmed := ""
	if a.cfg.Mode == SPIFFE {
		id, err := spiffeid.FromURI(leaf.URIs[0]) // verified to be there
		if err != nil {
			return nil, nodeattest.Denied("valid SVID x509 cert not found")
		}
		var ok bool
		if trimmed, ok = strings.CutPrefix(id.Path(), a.cfg.SVIDPrefix); !ok {
			return nil, nodeattest.Denied("x509 cert doesnt match SVID prefix")
		}
	}
	sans := a.sans(leaf)
	var path strings.Builder
	if err := a.path.Execute(&path, &naming{
		Certificate: leaf, SerialNumberHex: serialHex(leaf.SerialNumber), Fingerprint: fingerprint(leaf),
		PluginName: Type, TrustDomain: a.cfg.TrustDomain.Name(), SVIDPathTrimmed: trimmed, URISanSelectors: sans,
	}); err != nil {
		return nil, fmt.Errorf("failed to make spiffe id: %w", err)
	}
	id, err := spiffeid.FromPath(a.cfg.TrustDomain, "/spire/agent"+path.String())
	if err != nil {
		return nil, fmt.Errorf("failed to make spiffe id: %w", err)
	}
	return &nodeattest.Result{AgentID: id, Selectors: selectors(leaf, chains, sans), Reattestable: true}, nil
}

// sans are those that stand for selectors.
func (a *Attestor) sans(leaf *x509.Certificate) map[string]string {
	out := map[string]string{}
	for _, uri := range leaf.URIs {
		if !strings.HasPrefix(uri.String(), "x509pop://"+a.cfg.TrustDomain.Name()+"/") {
			continue
		}
		if key, value, ok := strings.Cut(strings.Trim(uri.Path, "/"), "/"); ok {
			out[key] = value
		}
	}
	return out
}

func selectors(leaf *x509.Certificate, chains [][]*x509.Certificate, sans map[string]string) attest.Selectors {
	var values []string
	if leaf.Subject.CommonName != "" {
		values = append(values, "subject:cn:"+leaf.Subject.CommonName)
	}
	for _, c := range chains {
		for _, issuer := range c[1:] {
			values = append(values, "ca:fingerprint:"+fingerprint(issuer))
		}
	}
	values = append(values, "serialnumber:"+serialHex(leaf.SerialNumber))
	for _, key := range slices.Sorted(maps.Keys(sans)) {
		values = append(values, "san:"+key+":"+sans[key])
	}
	out := make([]attest.Selector, 0, len(values))
	for _, v := range values {
		// Neither type nor value can be empty, which is all that is checked.
		if s, err := attest.NewSelector(Type, v); err == nil {
			out = append(out, s)
		}
	}
	return attest.NewSelectors(out...)
}

func fingerprint(cert *x509.Certificate) string {
	sum := sha1.Sum(cert.Raw) //nolint:gosec // see the import
	return hex.EncodeToString(sum[:])
}

// serialHex has an even number of digits, as other tools print it.
func serialHex(n *big.Int) string {
	s := n.Text(16)
	if len(s)%2 == 1 {
		s = "0" + s
	}
	return s
}
