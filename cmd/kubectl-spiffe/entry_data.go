package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// entryFile is the document that -data names. The member names are those of
// spire-server, odd ones included.
type entryFile struct {
	Entries []*RegistrationEntry `json:"entries"`
}

// RegistrationEntry is one entry of the document. It is exported, and named as
// it is, because the name appears in the messages of encoding/json that
// scripts of spire-server's users know. Revision and time of creation may be
// in the document and do not count.
type RegistrationEntry struct {
	Selectors []struct {
		Type  string `json:"type"`
		Value string `json:"value"`
	} `json:"selectors"`
	ParentID             string   `json:"parent_id"`
	SPIFFEID             string   `json:"spiffe_id"`
	X509SVIDTTL          int32    `json:"x509_svid_ttl"`
	JWTSVIDTTL           int32    `json:"jwt_svid_ttl"`
	FederatesWith        []string `json:"federates_with"`
	EntryID              string   `json:"entry_id"`
	Admin                bool     `json:"admin"`
	Downstream           bool     `json:"downstream"`
	EntryExpiry          int64    `json:"entryExpiry"`
	DNSNames             []string `json:"dns_names"`
	RevisionNumber       int64    `json:"revision_number"`
	StoreSVID            bool     `json:"store_svid"`
	Hint                 string   `json:"hint"`
	CreatedAt            int64    `json:"created_at"`
	AdditionalAttributes *struct {
		DisableX509SVIDPrefetch bool `json:"disable_x509_svid_prefetch"`
		JWTSVIDIncludeJTI       bool `json:"jwt_svid_include_jti"`
	} `json:"additional_attributes"`
}

// readFile reads a file, or standard input for "-".
func (a *app) readFile(path string) ([]byte, error) {
	if path == "-" {
		return io.ReadAll(a.stdin)
	}
	return os.ReadFile(path)
}

// parseEntries reads the document.
func parseEntries(data []byte) ([]*typespb.Entry, error) {
	var doc entryFile
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	out := make([]*typespb.Entry, 0, len(doc.Entries))
	for i, in := range doc.Entries {
		if in == nil {
			return nil, fmt.Errorf("entry %d is null", i)
		}
		e, err := in.wire()
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	return out, nil
}

func (in *RegistrationEntry) wire() (*typespb.Entry, error) {
	id, err := spiffeid.FromString(in.SPIFFEID)
	if err != nil {
		return nil, fmt.Errorf("invalid SPIFFE ID: %w", err)
	}
	parent, err := spiffeid.FromString(in.ParentID)
	if err != nil {
		return nil, fmt.Errorf("invalid parent ID: %w", err)
	}
	e := &typespb.Entry{
		Id:            in.EntryID,
		SpiffeId:      idToWire(id),
		ParentId:      idToWire(parent),
		X509SvidTtl:   in.X509SVIDTTL,
		JwtSvidTtl:    in.JWTSVIDTTL,
		FederatesWith: in.FederatesWith,
		Admin:         in.Admin,
		Downstream:    in.Downstream,
		ExpiresAt:     in.EntryExpiry,
		DnsNames:      in.DNSNames,
		StoreSvid:     in.StoreSVID,
		Hint:          in.Hint,
	}
	for _, s := range in.Selectors {
		e.Selectors = append(e.Selectors, &typespb.Selector{Type: s.Type, Value: s.Value})
	}
	if x := in.AdditionalAttributes; x != nil {
		e.AdditionalAttributes = &typespb.Entry_AdditionalAttributes{
			DisableX509SvidPrefetch: x.DisableX509SVIDPrefetch, JwtSvidIncludeJti: x.JWTSVIDIncludeJTI,
		}
	}
	return e, nil
}

// parseSelector reads type:value. Empty parts are the server's to refuse.
func parseSelector(s string) (*typespb.Selector, error) {
	kind, value, ok := strings.Cut(s, ":")
	if !ok {
		return nil, fmt.Errorf("selector %q must be formatted as type:value", s)
	}
	return &typespb.Selector{Type: kind, Value: value}, nil
}

func parseSelectors(in []string) ([]*typespb.Selector, error) {
	var out []*typespb.Selector
	for _, s := range in {
		sel, err := parseSelector(s)
		if err != nil {
			return nil, err
		}
		out = append(out, sel)
	}
	return out, nil
}
