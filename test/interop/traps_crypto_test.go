package interop_test

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/trustdomainpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

func trapServerCertificate(a *trapped) {
	t := a.t
	conn, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}, ServerName: "another.name"}}).DialContext(withTimeout(t), "tcp", a.address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	state := conn.(*tls.Conn).ConnectionState()
	leaf := state.PeerCertificates[0]
	if len(leaf.URIs) != 1 || leaf.URIs[0].String() != serverID.String() || len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) != 0 {
		t.Errorf("SANs %v %v %v", leaf.URIs, leaf.DNSNames, leaf.IPAddresses)
	}
	if state.NegotiatedProtocol != "h2" || leaf.Subject.String() != "O=SPIRE,C=US" {
		t.Errorf("%s, %s", state.NegotiatedProtocol, leaf.Subject)
	}
}

func trapKeyID(a *trapped) {
	t := a.t
	own := must(t, a.bundles.GetBundle, &bundlepb.GetBundleRequest{})
	for _, key := range own.GetJwtAuthorities() {
		if len(key.GetKeyId()) != 32 {
			t.Errorf("key ID %q", key.GetKeyId())
		}
	}
	nameless := []*typespb.JWTKey{{PublicKey: own.GetJwtAuthorities()[0].GetPublicKey()}}
	r := must(t, a.bundles.BatchSetFederatedBundle, &bundlepb.BatchSetFederatedBundleRequest{Bundle: []*typespb.Bundle{{TrustDomain: "t13.org", JwtAuthorities: nameless}}})
	if got := r.GetResults()[0].GetStatus(); got.GetCode() != int32(codes.InvalidArgument) || !strings.HasSuffix(got.GetMessage(), "missing key ID") {
		t.Errorf("a federated bundle: %v", got)
	}
	_, err := a.bundles.AppendBundle(withTimeout(t), &bundlepb.AppendBundleRequest{JwtAuthorities: nameless})
	wantCode(t, err, codes.InvalidArgument, "failed to convert JWT authority: missing key ID")
	down := a.downstream("/t13")
	_, err = bundlepb.NewBundleClient(down).PublishJWTAuthority(withTimeout(t), &bundlepb.PublishJWTAuthorityRequest{JwtAuthority: nameless[0]})
	wantCode(t, err, codes.InvalidArgument, "invalid JWT authority: missing key ID")
}

// downstream calls with an SVID of a downstream entry.
func (a *trapped) downstream(path string) *grpc.ClientConn {
	a.t.Helper()
	svid, conn := a.join(a.token(""))
	e := a.mustCreate(wireEntry(svid.ID.Path(), path, func(e *typespb.Entry) { e.Downstream = true }))[0]
	key, csr := keyAndCSR(a.t)
	r := must(a.t, svidpb.NewSVIDClient(conn).BatchNewX509SVID, &svidpb.BatchNewX509SVIDRequest{Params: []*svidpb.NewX509SVIDParams{{EntryId: e.GetId(), Csr: csr}}})
	return a.tls(toSVID(a.t, key, r.GetResults()[0].GetSvid().GetCertChain()))
}

func trapUnknownBundle(a *trapped) {
	t := a.t
	_, conn := a.join(a.token(""))
	get := bundlepb.NewBundleClient(conn).GetFederatedBundle
	_, err := get(withTimeout(t), &bundlepb.GetFederatedBundleRequest{TrustDomain: "t14.org"})
	wantCode(t, err, codes.NotFound, "bundle not found")
	must(t, a.bundles.BatchSetFederatedBundle, &bundlepb.BatchSetFederatedBundleRequest{Bundle: []*typespb.Bundle{{TrustDomain: "t14.org"}}})
	for _, name := range []string{"t14.org", "spiffe://t14.org"} {
		if b := must(t, get, &bundlepb.GetFederatedBundleRequest{TrustDomain: name}); b.GetTrustDomain() != "t14.org" {
			t.Errorf("%s: %v", name, b)
		}
	}
}

func trapChains(a *trapped) {
	t := a.t
	svid, conn := a.join(a.token(""))
	e := a.mustCreate(wireEntry(svid.ID.Path(), "/t15"))[0]
	_, csr := keyAndCSR(t)
	chains := map[string][][]byte{}
	for _, c := range svid.Certificates {
		chains["agent"] = append(chains["agent"], c.Raw)
	}
	signed := must(t, svidpb.NewSVIDClient(conn).BatchNewX509SVID, &svidpb.BatchNewX509SVIDRequest{Params: []*svidpb.NewX509SVIDParams{{EntryId: e.GetId(), Csr: csr}}})
	chains["workload"] = signed.GetResults()[0].GetSvid().GetCertChain()
	down := must(t, svidpb.NewSVIDClient(a.downstream("/t15/down")).NewDownstreamX509CA, &svidpb.NewDownstreamX509CARequest{Csr: csr})
	chains["downstream CA"] = down.GetCaCertChain()
	tlsConn, err := (&tls.Dialer{Config: &tls.Config{InsecureSkipVerify: true, NextProtos: []string{"h2"}}}).DialContext(withTimeout(t), "tcp", a.address)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range tlsConn.(*tls.Conn).ConnectionState().PeerCertificates {
		chains["server"] = append(chains["server"], c.Raw)
	}
	_ = tlsConn.Close()
	roots := x509.NewCertPool()
	for _, root := range a.bundle.X509Authorities() {
		roots.AddCert(root)
	}
	for name, chain := range chains {
		if len(chain) == 0 {
			t.Errorf("%s: no chain", name)
			continue
		}
		var certs []*x509.Certificate
		between := x509.NewCertPool()
		for i, der := range chain {
			cert, err := x509.ParseCertificate(der) // more than one in an element is trailing data
			if err != nil {
				t.Fatalf("%s: element %d: %v", name, i, err)
			}
			if cert.CheckSignatureFrom(cert) == nil {
				t.Errorf("%s: element %d is a self-signed root", name, i)
			}
			if certs = append(certs, cert); i > 0 {
				between.AddCert(cert)
			}
		}
		if _, err := certs[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}); err != nil {
			t.Errorf("%s: the chain is not complete: %v", name, err)
		}
	}
	if len(chains) != 4 || len(down.GetX509Authorities()) != len(a.bundle.X509Authorities()) {
		t.Errorf("%d chains, %d roots for a downstream server", len(chains), len(down.GetX509Authorities()))
	}
}

func trapOrder(a *trapped) {
	t := a.t
	svid, conn := a.join(a.token(""))
	two := func(values ...string) func(*typespb.Entry) {
		return func(e *typespb.Entry) {
			e.DnsNames, e.Selectors = []string{"z.example", "a.example"}, nil
			for _, v := range values {
				e.Selectors = append(e.Selectors, &typespb.Selector{Type: "trap", Value: v})
			}
		}
	}
	e := a.mustCreate(wireEntry(svid.ID.Path(), "/t17", two("17b", "17a")))[0]
	stored := must(t, a.entries.GetEntry, &entrypb.GetEntryRequest{Id: e.GetId()})
	if strings.Join(stored.GetDnsNames(), " ") != "z.example a.example" {
		t.Errorf("DNS names %v", stored.GetDnsNames())
	}
	_, csr := keyAndCSR(t)
	r := must(t, svidpb.NewSVIDClient(conn).BatchNewX509SVID, &svidpb.BatchNewX509SVIDRequest{Params: []*svidpb.NewX509SVIDParams{{EntryId: e.GetId(), Csr: csr}}})
	cert, err := x509.ParseCertificate(r.GetResults()[0].GetSvid().GetCertChain()[0])
	if err != nil {
		t.Fatal(err)
	}
	if cert.Subject.CommonName != "z.example" || strings.Join(cert.DNSNames, " ") != "z.example a.example" {
		t.Errorf("%s with %v", cert.Subject, cert.DNSNames)
	}
	if got := a.create(wireEntry(svid.ID.Path(), "/t17", two("17a", "17b")))[0].GetStatus().GetCode(); got != int32(codes.AlreadyExists) {
		t.Errorf("the same selectors in another order: code %d", got)
	}
}

func trapRounding(a *trapped) {
	t := a.t
	// In the second half of a second, rounding and truncating differ. A slow
	// machine may need another try.
	for i := range 20 {
		now := time.Now()
		time.Sleep(now.Truncate(time.Second).Add(1550 * time.Millisecond).Sub(now))
		before := time.Now()
		e := a.mustCreate(wireEntry("/t18", fmt.Sprintf("/t18/%d", i)))[0]
		after := time.Now()
		if before.Round(time.Second) != after.Round(time.Second) || before.Truncate(time.Second) != after.Truncate(time.Second) {
			continue
		}
		if e.GetCreatedAt() != before.Unix()+1 {
			t.Errorf("created at %s, says %d", before.Format(time.StampMilli), e.GetCreatedAt())
		}
		if got := must(t, a.entries.GetEntry, &entrypb.GetEntryRequest{Id: e.GetId()}).GetCreatedAt(); got != e.GetCreatedAt() {
			t.Errorf("created at %d, later at %d", e.GetCreatedAt(), got)
		}
		return
	}
	t.Skip("this machine is too slow to tell")
}

func trapEmptyMessage(a *trapped) {
	t := a.t
	r := must(t, a.federation.BatchCreateFederationRelationship, &trustdomainpb.BatchCreateFederationRelationshipRequest{FederationRelationships: []*typespb.FederationRelationship{{
		TrustDomain: "t16.org", BundleEndpointUrl: "https://127.0.0.1:1/", BundleEndpointProfile: &typespb.FederationRelationship_HttpsWeb{HttpsWeb: &typespb.HTTPSWebProfile{}},
	}}})
	if s := r.GetResults()[0].GetStatus(); s.GetCode() != 0 {
		t.Fatal(s)
	}
	got := must(t, a.federation.GetFederationRelationship, &trustdomainpb.GetFederationRelationshipRequest{TrustDomain: "t16.org"})
	list := must(t, a.federation.ListFederationRelationships, &trustdomainpb.ListFederationRelationshipsRequest{})
	for _, rel := range append(list.GetFederationRelationships(), got, r.GetResults()[0].GetFederationRelationship()) {
		wire, err := proto.Marshal(rel)
		if err != nil {
			t.Fatal(err)
		}
		// Field 3, length-delimited, with nothing in it.
		if !bytes.Contains(wire, []byte{3<<3 | 2, 0}) || rel.GetHttpsWeb() == nil {
			t.Errorf("no https_web in %x", wire)
		}
	}
}
