package authoritytest

import (
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// jwtVerifies: the token verifies against the bundle of the same moment, as any
// SPIFFE peer does it.
func (s suite) jwtVerifies() {
	t, h := s.T, s.Harness
	e := h.register(t, "/w", nil)
	issued, err := h.Authority.SignJWT(t.Context(), jwtRequest(e, "db", "cache"))
	if err != nil {
		t.Fatal(err)
	}
	svid, err := jwtsvid.ParseAndValidate(issued.Token, bundles(t, h).Own.JWTBundle(), []string{"cache"})
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID != e.SPIFFEID {
		t.Errorf("SPIFFE ID %s, want %s", svid.ID, e.SPIFFEID)
	}
	if !slices.Equal(svid.Audience, []string{"db", "cache"}) {
		t.Errorf("audience %q", svid.Audience)
	}
	if !svid.Expiry.Equal(issued.ExpiresAt) {
		t.Errorf("answer says expiry %s, token %s", issued.ExpiresAt, svid.Expiry)
	}
	if issued.ExpiresAt.Sub(issued.IssuedAt) <= 0 {
		t.Errorf("lives from %s to %s", issued.IssuedAt, issued.ExpiresAt)
	}
}

// jwtOptions: header and claims are as SPIRE Server writes them, and the
// entry's TTL and jti flag decide.
func (s suite) jwtOptions() {
	t, h := s.T, s.Harness
	const ttl = 2 * time.Minute
	for name, jti := range map[string]bool{"/plain": false, "/jti": true} {
		e := h.register(t, name, func(e *entry.Entry) { e.JWTSVIDTTL, e.JWTSVIDIncludeJTI = ttl, jti })
		issued, err := h.Authority.SignJWT(t.Context(), jwtRequest(e, "one", ""))
		if err != nil {
			t.Fatal(err)
		}
		token, err := jwt.ParseSigned(issued.Token, []jose.SignatureAlgorithm{jose.ES256, jose.ES384, jose.RS256})
		if err != nil {
			t.Fatal(err)
		}
		header := token.Headers[0]
		if header.KeyID == "" || header.ExtraHeaders[jose.HeaderType] != "JWT" {
			t.Errorf("header %+v", header)
		}
		var claims map[string]any
		if err := token.UnsafeClaimsWithoutVerification(&claims); err != nil {
			t.Fatal(err)
		}
		if aud, ok := claims["aud"].([]any); !ok || len(aud) != 1 || aud[0] != "one" {
			t.Errorf("aud %v, want an array without empty strings", claims["aud"])
		}
		if _, ok := claims["jti"]; ok != jti {
			t.Errorf("jti present: %v, want %v", ok, jti)
		}
		if _, ok := claims["nbf"]; ok {
			t.Error("nbf is set")
		}
		if life := issued.ExpiresAt.Sub(issued.IssuedAt); life != ttl {
			t.Errorf("lives %s, want %s", life, ttl)
		}
	}
}

// jwtRefused: what will never be signed is ErrRefused.
func (s suite) jwtRefused() {
	t, h := s.T, s.Harness
	e := h.register(t, "/w", nil)
	gone := h.register(t, "/gone", nil)
	h.Unregister(t, gone)
	for name, req := range map[string]authority.JWTRequest{
		"no entry":        {SPIFFEID: e.SPIFFEID, Audience: []string{"a"}},
		"unknown entry":   {EntryID: "nobody", SPIFFEID: e.SPIFFEID, Audience: []string{"a"}},
		"deleted entry":   jwtRequest(gone, "a"),
		"other SPIFFE ID": {EntryID: e.ID, SPIFFEID: h.id("/admin"), Audience: []string{"a"}},
		"no audience":     jwtRequest(e),
		"empty audience":  jwtRequest(e, ""),
	} {
		issued, err := h.Authority.SignJWT(t.Context(), req)
		wantRefused(t, name, issued != nil, err)
	}
}
