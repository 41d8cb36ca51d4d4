package embedded_test

import (
	"context"
	"crypto/x509"
	"testing"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

func BenchmarkSignX509(b *testing.B) {
	a := start(b, testConfig(b))
	e := mustCreate(b, a, newEntry("/w"))
	req := authority.X509Request{EntryID: e.ID, SPIFFEID: e.SPIFFEID, CSR: newCSR(b, newKey(b), x509.CertificateRequest{})}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := a.SignX509(context.Background(), req); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSignJWT(b *testing.B) {
	a := start(b, testConfig(b))
	e := mustCreate(b, a, newEntry("/w"))
	req := authority.JWTRequest{EntryID: e.ID, SPIFFEID: e.SPIFFEID, Audience: []string{"a"}}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := a.SignJWT(context.Background(), req); err != nil {
			b.Fatal(err)
		}
	}
}
