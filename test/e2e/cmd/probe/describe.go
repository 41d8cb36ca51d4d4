package main

import (
	"crypto/x509"
	"encoding/pem"

	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"

	"github.com/spiffe-node/spiffe-node/test/e2e/probe"
)

// describe says what is in a secret, never the key.
func describe(secret *tlsv3.Secret) probe.Event {
	var ev probe.Event
	if cert := secret.GetTlsCertificate(); cert != nil {
		block, _ := pem.Decode(cert.GetCertificateChain().GetInlineBytes())
		if block == nil {
			ev.Message = "no PEM in the certificate chain"
			return ev
		}
		leaf, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			ev.Message = err.Error()
			return ev
		}
		if len(leaf.URIs) == 1 {
			ev.SPIFFEID = leaf.URIs[0].String()
		}
		ev.Serial, ev.NotAfter = leaf.SerialNumber.String(), leaf.NotAfter
	}
	if ctx := secret.GetValidationContext(); ctx != nil {
		if ctx.GetTrustedCa() != nil {
			ev.TrustDomains = []string{""}
		}
		var validator tlsv3.SPIFFECertValidatorConfig
		if custom := ctx.GetCustomValidatorConfig(); custom != nil {
			if err := custom.GetTypedConfig().UnmarshalTo(&validator); err != nil {
				ev.Message = err.Error()
				return ev
			}
			for _, td := range validator.GetTrustDomains() {
				ev.TrustDomains = append(ev.TrustDomains, td.GetName())
			}
		}
	}
	return ev
}
