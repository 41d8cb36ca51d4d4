package sds_test

import (
	"testing"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/testing/protocmp"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/spiffe-node/spiffe-node/pkg/sds"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

func mustAny(tb testing.TB, m proto.Message) *anypb.Any {
	tb.Helper()
	a, err := anypb.New(m)
	if err != nil {
		tb.Fatal(err)
	}
	return a
}

func tlsSecret(name string, s *svid.X509SVID) *tlsv3.Secret {
	return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
		CertificateChain: inline(chainPEM(s)), PrivateKey: inline(keyPEM(s)),
	}}}
}

func plainSecret(name string, c *ca) *tlsv3.Secret {
	return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
		TrustedCa: inline(c.pem()),
	}}}
}

func validatorSecret(tb testing.TB, name string, cas ...*ca) *tlsv3.Secret {
	tb.Helper()
	config := new(tlsv3.SPIFFECertValidatorConfig)
	for _, c := range cas {
		config.TrustDomains = append(config.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
			Name: c.td.Name(), TrustBundle: inline(c.pem()),
		})
	}
	return &tlsv3.Secret{Name: name, Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{
		CustomValidatorConfig: &corev3.TypedExtensionConfig{Name: "envoy.tls.cert_validator.spiffe", TypedConfig: mustAny(tb, config)},
	}}}
}

// The hand-written encoding gives the very message that the generated types
// give, in every form.
func TestEncodingEqualsTypes(t *testing.T) {
	own, other := newCA(t, "example.org"), newCA(t, "another.test")
	ident := own.identity(t, "e1", "/web")
	u := &svid.Update{
		Identities: []*svid.Identity{ident}, Synced: true, Own: own.bundle(),
		Federated: map[spiffeid.TrustDomain]*spiffebundle.Bundle{other.td: other.bundle()},
	}
	tests := []struct {
		name  string
		names []string
		plain bool
		want  []*tlsv3.Secret
	}{
		{"default", []string{"default"}, false, []*tlsv3.Secret{tlsSecret("default", ident.SVID)}},
		{"root", []string{"ROOTCA"}, false, []*tlsv3.Secret{validatorSecret(t, "ROOTCA", own)}},
		{"all bundles sorted", []string{"ALL"}, false, []*tlsv3.Secret{validatorSecret(t, "ALL", other, own)}},
		{"plain root", []string{"ROOTCA"}, true, []*tlsv3.Secret{plainSecret("ROOTCA", own)}},
		{"plain all is own", []string{"ALL"}, true, []*tlsv3.Secret{plainSecret("ALL", own)}},
		{"federated", []string{"spiffe://another.test"}, false, []*tlsv3.Secret{validatorSecret(t, "spiffe://another.test", other)}},
		{"everything", nil, false, []*tlsv3.Secret{
			validatorSecret(t, "spiffe://example.org", own), validatorSecret(t, "spiffe://another.test", other),
			tlsSecret("spiffe://example.org/web", ident.SVID),
		}},
		{"several", []string{"ALL", "spiffe://example.org/web", "ROOTCA", "spiffe://example.org", "default"}, false, []*tlsv3.Secret{
			validatorSecret(t, "ALL", other, own), tlsSecret("spiffe://example.org/web", ident.SVID), validatorSecret(t, "ROOTCA", own),
			validatorSecret(t, "spiffe://example.org", own), tlsSecret("default", ident.SVID),
		}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := sds.NewSotW(sds.DefaultNames(), tt.plain).Request(&discoveryv3.DiscoveryRequest{ResourceNames: tt.names}, u).SotW
			want := &discoveryv3.DiscoveryResponse{VersionInfo: got.GetVersionInfo(), Nonce: "1", TypeUrl: sds.TypeURL}
			for _, s := range tt.want {
				want.Resources = append(want.Resources, mustAny(t, s))
			}
			if diff := cmp.Diff(want, got, protocmp.Transform()); diff != "" {
				t.Errorf("response (-want +got):\n%s", diff)
			}
			if got.GetVersionInfo() == "" {
				t.Error("no version")
			}
			for _, a := range got.GetResources() {
				if err := a.UnmarshalTo(new(tlsv3.Secret)); err != nil {
					t.Error(err)
				}
			}

			delta := sds.NewDelta(sds.DefaultNames(), tt.plain).Request(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: tt.names}, u).Delta
			wantDelta := &discoveryv3.DeltaDiscoveryResponse{Nonce: "1", TypeUrl: sds.TypeURL}
			for i, s := range tt.want {
				wantDelta.Resources = append(wantDelta.Resources, &discoveryv3.Resource{
					Name: s.GetName(), Version: delta.GetResources()[i].GetVersion(), Resource: mustAny(t, s),
				})
			}
			if diff := cmp.Diff(wantDelta, delta, protocmp.Transform()); diff != "" {
				t.Errorf("delta response (-want +got):\n%s", diff)
			}
		})
	}
}
