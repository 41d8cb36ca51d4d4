package main

import (
	"crypto"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// bundleFormat is the form of bundle contents: certificates alone, or all of it
// as a SPIFFE bundle document.
type bundleFormat string

const (
	bundlePEM    bundleFormat = "pem"
	bundleSPIFFE bundleFormat = "spiffe"
)

func parseBundleFormat(s string) (bundleFormat, error) {
	switch f := bundleFormat(strings.ToLower(s)); f {
	case bundlePEM, bundleSPIFFE:
		return f, nil
	}
	return "", fmt.Errorf("invalid format: %q", s)
}

// writeBundle writes the contents of a bundle. The form is looked at only here
// because it does not matter to the other outputs.
func writeBundle(w io.Writer, b *typespb.Bundle, form string) error {
	f, err := parseBundleFormat(form)
	if err != nil {
		return err
	}
	if f == bundlePEM {
		for _, c := range b.GetX509Authorities() {
			if err := pem.Encode(w, &pem.Block{Type: "CERTIFICATE", Bytes: c.GetAsn1()}); err != nil {
				return err
			}
		}
		return nil
	}
	doc, err := bundleDocument(b)
	if err != nil {
		return err
	}
	data, err := json.MarshalIndent(doc, "", "    ")
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", data)
	return err
}

// document is a SPIFFE bundle. Keys keep the order of the bundle, which
// go-spiffe's own encoder does not.
type document struct {
	jose.JSONWebKeySet
	Sequence    uint64 `json:"spiffe_sequence,omitempty"`
	RefreshHint int64  `json:"spiffe_refresh_hint,omitempty"`
}

func bundleDocument(b *typespb.Bundle) (*document, error) {
	out := &document{Sequence: b.GetSequenceNumber(), RefreshHint: b.GetRefreshHint()}
	for _, c := range b.GetX509Authorities() {
		certs, err := x509.ParseCertificates(c.GetAsn1())
		if err != nil {
			return nil, fmt.Errorf("unable to parse X.509 authority: %w", err)
		}
		for _, cert := range certs {
			out.Keys = append(out.Keys, jose.JSONWebKey{Key: cert.PublicKey, Certificates: []*x509.Certificate{cert}, Use: "x509-svid"})
		}
	}
	for _, k := range b.GetJwtAuthorities() {
		pub, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
		if err != nil {
			return nil, fmt.Errorf("unable to parse JWT authority %s: %w", k.GetKeyId(), err)
		}
		out.Keys = append(out.Keys, jose.JSONWebKey{Key: pub, KeyID: k.GetKeyId(), Use: "jwt-svid"})
	}
	return out, nil
}

// readBundle reads the contents of the bundle of trust domain id, whose name
// the server judges.
func readBundle(id string, data []byte, f bundleFormat) (*typespb.Bundle, error) {
	out := &typespb.Bundle{TrustDomain: id}
	if f == bundlePEM {
		certs, err := parsePEM(data)
		if err != nil {
			return nil, fmt.Errorf("unable to parse bundle data: %w", err)
		}
		for _, c := range certs {
			out.X509Authorities = append(out.X509Authorities, &typespb.X509Certificate{Asn1: c.Raw})
		}
		return out, nil
	}
	td, err := spiffeid.TrustDomainFromString(id)
	if err != nil {
		return nil, fmt.Errorf("unable to parse to spiffe bundle: %w", err)
	}
	b, err := spiffebundle.Parse(td, data)
	if err != nil {
		return nil, fmt.Errorf("unable to parse to spiffe bundle: %w", err)
	}
	for _, c := range b.X509Authorities() {
		out.X509Authorities = append(out.X509Authorities, &typespb.X509Certificate{Asn1: c.Raw})
	}
	if out.JwtAuthorities, err = jwtKeys(b.JWTAuthorities()); err != nil {
		return nil, err
	}
	if hint, ok := b.RefreshHint(); ok {
		out.RefreshHint = int64(hint / time.Second)
	}
	out.SequenceNumber, _ = b.SequenceNumber()
	return out, nil
}

func jwtKeys(keys map[string]crypto.PublicKey) ([]*typespb.JWTKey, error) {
	var out []*typespb.JWTKey
	for _, id := range sortedKeys(keys) {
		der, err := x509.MarshalPKIXPublicKey(keys[id])
		if err != nil {
			return nil, fmt.Errorf("unable to encode JWT authority %s: %w", id, err)
		}
		out = append(out, &typespb.JWTKey{KeyId: id, PublicKey: der})
	}
	return out, nil
}

// parsePEM reads certificates; other blocks are an error.
func parsePEM(data []byte) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for {
		var block *pem.Block
		if block, data = pem.Decode(data); block == nil {
			break
		}
		if block.Type != "CERTIFICATE" {
			return nil, fmt.Errorf("expected block type \"CERTIFICATE\"; got %q", block.Type)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		out = append(out, cert)
	}
	if len(out) == 0 {
		return nil, errors.New("no PEM blocks")
	}
	return out, nil
}

// lastExpiry is when the last X.509 authority of a bundle ends.
func lastExpiry(b *typespb.Bundle) string {
	var last time.Time
	for _, c := range b.GetX509Authorities() {
		certs, err := x509.ParseCertificates(c.GetAsn1())
		if err != nil {
			return "unreadable"
		}
		for _, cert := range certs {
			if cert.NotAfter.After(last) {
				last = cert.NotAfter
			}
		}
	}
	if last.IsZero() {
		return ""
	}
	return last.UTC().Format(time.RFC3339)
}
