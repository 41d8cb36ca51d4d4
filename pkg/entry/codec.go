package entry

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// The stored form of an entry is one JSON object, for stores that are read by
// this program only (and, in need, by a person):
//
//	{"v":1,"id":"...","spiffe_id":"spiffe://...","parent_id":"spiffe://...",
//	 "selectors":["type:value",...],"x509_svid_ttl":3600,...}
//
// TTLs are seconds, expires_at is seconds since 1970 (clients may send any
// number), created_at is RFC 3339; members with a zero value are left out.
// Another version, an unknown member or anything behind the object is an
// error: whoever adds a member raises the version, so that an older program
// refuses what it would lose.

const codecVersion = 1

// ErrCodec marks stored bytes that are no entry this program can read.
var ErrCodec = errors.New("not a stored entry")

type stored struct {
	Version         int                    `json:"v"`
	ID              string                 `json:"id,omitempty"`
	SPIFFEID        spiffeid.ID            `json:"spiffe_id,omitzero"`
	ParentID        spiffeid.ID            `json:"parent_id,omitzero"`
	Selectors       []selector.Selector    `json:"selectors,omitempty"`
	X509SVIDTTL     int64                  `json:"x509_svid_ttl,omitempty"`
	JWTSVIDTTL      int64                  `json:"jwt_svid_ttl,omitempty"`
	FederatesWith   []spiffeid.TrustDomain `json:"federates_with,omitempty"`
	DNSNames        []string               `json:"dns_names,omitempty"`
	Hint            string                 `json:"hint,omitempty"`
	Admin           bool                   `json:"admin,omitempty"`
	Downstream      bool                   `json:"downstream,omitempty"`
	StoreSVID       bool                   `json:"store_svid,omitempty"`
	ExpiresAt       int64                  `json:"expires_at,omitempty"`
	Revision        int64                  `json:"revision,omitempty"`
	CreatedAt       time.Time              `json:"created_at,omitzero"`
	DisablePrefetch bool                   `json:"disable_x509_svid_prefetch,omitempty"`
	IncludeJTI      bool                   `json:"jwt_svid_include_jti,omitempty"`
	Fallback        bool                   `json:"fallback,omitempty"`
	Suspended       bool                   `json:"suspended,omitempty"`
}

// MarshalBinary is the stored form. Fractions of seconds in TTLs and
// ExpiresAt are lost.
func (e *Entry) MarshalBinary() ([]byte, error) {
	s := stored{
		Version:         codecVersion,
		ID:              e.ID,
		SPIFFEID:        e.SPIFFEID,
		ParentID:        e.ParentID,
		X509SVIDTTL:     int64(e.X509SVIDTTL / time.Second),
		JWTSVIDTTL:      int64(e.JWTSVIDTTL / time.Second),
		FederatesWith:   e.FederatesWith,
		DNSNames:        e.DNSNames,
		Hint:            e.Hint,
		Admin:           e.Admin,
		Downstream:      e.Downstream,
		StoreSVID:       e.StoreSVID,
		Revision:        e.Revision,
		CreatedAt:       e.CreatedAt,
		DisablePrefetch: e.DisableX509SVIDPrefetch,
		IncludeJTI:      e.JWTSVIDIncludeJTI,
		Fallback:        e.Fallback,
		Suspended:       e.Suspended,
	}
	if !e.ExpiresAt.IsZero() {
		s.ExpiresAt = e.ExpiresAt.Unix()
	}
	for sel := range e.Selectors.All() {
		s.Selectors = append(s.Selectors, sel)
	}
	out, err := json.Marshal(s)
	if err != nil {
		return nil, fmt.Errorf("entry %s: encode: %w", e.ID, err)
	}
	return out, nil
}

// maxTTL keeps stored TTLs within time.Duration.
const maxTTL = 1 << 32

// UnmarshalBinary reads the stored form; errors wrap ErrCodec. Only the form is
// checked, not what Validate checks.
func (e *Entry) UnmarshalBinary(data []byte) error {
	var s stored
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		// An unknown member is most likely a newer version's.
		if v := versionOf(data); v != codecVersion && v != 0 {
			return fmt.Errorf("%w: version %d, this program reads version %d", ErrCodec, v, codecVersion)
		}
		return fmt.Errorf("%w: %w", ErrCodec, err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: bytes behind the object", ErrCodec)
	}
	if s.Version != codecVersion {
		return fmt.Errorf("%w: version %d, this program reads version %d", ErrCodec, s.Version, codecVersion)
	}
	for _, ttl := range []int64{s.X509SVIDTTL, s.JWTSVIDTTL} {
		if ttl > maxTTL || ttl < -maxTTL {
			return fmt.Errorf("%w: TTL of %d s", ErrCodec, ttl)
		}
	}
	*e = Entry{
		ID:                      s.ID,
		SPIFFEID:                s.SPIFFEID,
		ParentID:                s.ParentID,
		Selectors:               selector.NewSet(s.Selectors...),
		X509SVIDTTL:             time.Duration(s.X509SVIDTTL) * time.Second,
		JWTSVIDTTL:              time.Duration(s.JWTSVIDTTL) * time.Second,
		FederatesWith:           s.FederatesWith,
		DNSNames:                s.DNSNames,
		Hint:                    s.Hint,
		Admin:                   s.Admin,
		Downstream:              s.Downstream,
		StoreSVID:               s.StoreSVID,
		ExpiresAt:               fromUnix(s.ExpiresAt),
		Revision:                s.Revision,
		CreatedAt:               s.CreatedAt,
		DisableX509SVIDPrefetch: s.DisablePrefetch,
		JWTSVIDIncludeJTI:       s.IncludeJTI,
		Fallback:                s.Fallback,
		Suspended:               s.Suspended,
	}
	return nil
}

func versionOf(data []byte) int {
	var head struct {
		Version int `json:"v"`
	}
	// An error leaves 0, which is no version.
	_ = json.Unmarshal(data, &head)
	return head.Version
}
