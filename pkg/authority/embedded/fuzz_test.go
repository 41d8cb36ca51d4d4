package embedded_test

import (
	"testing"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// seeds are real stored values of every kind.
func seeds(f *testing.F, add func(bucket, key string, value []byte)) {
	f.Helper()
	s := embedded.NewMemoryStore()
	a := inMemory(f, s, embedded.Config{})
	mustCreate(f, a, newEntry("/w"))
	if err := a.SetFederatedBundle(f.Context(), &embedded.Bundle{TrustDomain: other, X509: a.OwnBundle().X509, JWT: a.OwnBundle().JWT}); err != nil {
		f.Fatal(err)
	}
	if _, err := a.UpsertAgent(f.Context(), &embedded.Agent{ID: node, Serial: "1"}); err != nil {
		f.Fatal(err)
	}
	if _, err := a.CreateRelationship(f.Context(), embedded.Relationship{TrustDomain: other, EndpointURL: "https://other.org:8443/bundle"}, nil); err != nil {
		f.Fatal(err)
	}
	if err := a.RotateNow(f.Context()); err != nil {
		f.Fatal(err)
	}
	for bucket, values := range s.Values {
		for key, value := range values {
			add(bucket, key, value)
		}
	}
}

// FuzzLoadValue feeds raw values, as on the disk, to the start.
func FuzzLoadValue(f *testing.F) {
	seeds(f, func(bucket, key string, value []byte) { f.Add(bucket, key, value) })
	cfg := embedded.Config{TrustDomain: td}
	f.Fuzz(func(_ *testing.T, bucket, key string, value []byte) {
		_ = embedded.LoadValue(cfg, bucket, key, value)
	})
}

// FuzzLoadContent feeds contents with a good frame to the start, which then
// must decode or refuse them.
func FuzzLoadContent(f *testing.F) {
	seeds(f, func(bucket, key string, value []byte) {
		content, err := embedded.Content(bucket, key, value)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(bucket, key, content)
	})
	f.Add("ca", "x509", []byte(`{"current":{"id":"x","state":"ACTIVE","key":"AA=="}}`))
	f.Add("bundles", "\x00\x00\x00\x00\x00\x00\x00\x00", []byte(`{"trust_domain":"example.org","sequence":1,"x509":[{"der":""}]}`))
	f.Add("relationships", "\x00\x00\x00\x00\x00\x00\x00\x01", []byte(`{"trust_domain":"other.org","endpoint_url":"https://u@other.org","endpoint_id":"spiffe://"}`))
	cfg := embedded.Config{TrustDomain: td}
	f.Fuzz(func(_ *testing.T, bucket, key string, content []byte) {
		_ = embedded.LoadContent(cfg, bucket, key, content)
	})
}
