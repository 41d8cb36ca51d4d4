package main

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/pflag"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

const (
	profileWeb    = "https_web"
	profileSPIFFE = "https_spiffe"
)

// federationRelationships is the document that -data names. The names of both
// types appear in the messages of encoding/json that scripts of spire-server's
// users know.
type federationRelationships struct {
	FederationRelationships []*federationRelationshipConfig `json:"federationRelationships"`
}

// federationRelationshipConfig is one relationship, from the document or from
// flags.
type federationRelationshipConfig struct {
	TrustDomain             string          `json:"trustDomain"`
	BundleEndpointURL       string          `json:"bundleEndpointURL"`
	BundleEndpointProfile   string          `json:"bundleEndpointProfile"`
	EndpointSPIFFEID        string          `json:"endpointSPIFFEID"`
	TrustDomainBundle       json.RawMessage `json:"trustDomainBundle"`
	TrustDomainBundleFormat string          `json:"trustDomainBundleFormat"`
}

// federationFlags are the flags of federation create and update.
type federationFlags struct {
	federationRelationshipConfig
	bundlePath, data string
}

func (f *federationFlags) register(flags *pflag.FlagSet) {
	flags.StringVar(&f.TrustDomain, "trustDomain", "", "Name of the trust domain to federate with (e.g., example.org)")
	flags.StringVar(&f.BundleEndpointURL, "bundleEndpointURL", "", "URL of the SPIFFE bundle endpoint that provides the trust bundle (must use the HTTPS protocol)")
	flags.StringVar(&f.BundleEndpointProfile, "bundleEndpointProfile", "", `Endpoint profile type (either "https_web" or "https_spiffe")`)
	flags.StringVar(&f.EndpointSPIFFEID, "endpointSpiffeID", "", "SPIFFE ID of the SPIFFE bundle endpoint server. Only used for 'https_spiffe' profile.")
	flags.StringVar(&f.bundlePath, "trustDomainBundlePath", "", "Path to the trust domain bundle data (optional).")
	flags.StringVar(&f.TrustDomainBundleFormat, "trustDomainBundleFormat", "pem", `The format of the bundle data (optional). Either "pem" or "spiffe".`)
	flags.StringVar(&f.data, "data", "", "Path to a file containing federation relationships in JSON format (optional). If set to '-', read the JSON from stdin.")
}

func (f *federationFlags) empty() bool {
	return f.TrustDomain == "" && f.BundleEndpointURL == "" && f.BundleEndpointProfile == "" && f.EndpointSPIFFEID == "" &&
		f.bundlePath == "" && f.TrustDomainBundleFormat == string(bundlePEM)
}

// relationshipsOf are the relationships that flags or the file they name
// describe.
func (a *app) relationshipsOf(f *federationFlags) ([]*typespb.FederationRelationship, error) {
	if f.data == "" {
		r, td, err := f.wire()
		if err != nil {
			return nil, err
		}
		if f.bundlePath != "" {
			data, err := a.readFile(f.bundlePath)
			if err != nil {
				return nil, fmt.Errorf("cannot read bundle file: %w", err)
			}
			if r.TrustDomainBundle, err = readBundle(td, data, f.form()); err != nil {
				return nil, fmt.Errorf("cannot parse bundle file: %w", err)
			}
		}
		return []*typespb.FederationRelationship{r}, nil
	}
	if !f.empty() {
		return nil, errors.New("cannot use other flags to specify relationship fields when 'data' flag is set")
	}
	data, err := a.readFile(f.data)
	if err != nil {
		return nil, err
	}
	return parseRelationships(data)
}

func parseRelationships(data []byte) ([]*typespb.FederationRelationship, error) {
	var doc federationRelationships
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("failed to parse JSON: %w", err)
	}
	var out []*typespb.FederationRelationship
	for i, in := range doc.FederationRelationships {
		if in == nil {
			return nil, fmt.Errorf("could not parse item %d: it is null", i)
		}
		r, td, err := in.wire()
		if err == nil && in.TrustDomainBundle != nil {
			r.TrustDomainBundle, err = in.bundle(td)
		}
		if err != nil {
			return nil, fmt.Errorf("could not parse item %d: %w", i, err)
		}
		out = append(out, r)
	}
	return out, nil
}

// bundle reads the bundle inside a document: text for PEM, an object for a
// SPIFFE bundle.
func (in *federationRelationshipConfig) bundle(td string) (*typespb.Bundle, error) {
	data := []byte(in.TrustDomainBundle)
	switch bundleFormat(in.TrustDomainBundleFormat) {
	case bundlePEM:
		var text string
		if err := json.Unmarshal(data, &text); err != nil {
			return nil, fmt.Errorf("cannot parse bundle raw message: failed to unmarshal json: %w", err)
		}
		data = []byte(text)
	case bundleSPIFFE:
	default:
		return nil, fmt.Errorf("cannot parse bundle raw message: bundle format %q is unsupported", in.TrustDomainBundleFormat)
	}
	b, err := readBundle(td, data, in.form())
	if err != nil {
		return nil, fmt.Errorf("cannot parse bundle raw message: %w", err)
	}
	return b, nil
}

// form takes everything that is not PEM for a SPIFFE bundle, as spire-server
// does.
func (in *federationRelationshipConfig) form() bundleFormat {
	if in.TrustDomainBundleFormat == string(bundlePEM) {
		return bundlePEM
	}
	return bundleSPIFFE
}

// wire is the relationship without its bundle, and the trust domain that the
// bundle is labelled with.
func (in *federationRelationshipConfig) wire() (*typespb.FederationRelationship, string, error) {
	switch {
	case in.TrustDomain == "":
		return nil, "", errors.New("trust domain is required")
	case in.BundleEndpointURL == "":
		return nil, "", errors.New("bundle endpoint URL is required")
	}
	out := &typespb.FederationRelationship{TrustDomain: in.TrustDomain, BundleEndpointUrl: in.BundleEndpointURL}
	switch in.BundleEndpointProfile {
	case profileWeb:
		out.BundleEndpointProfile = &typespb.FederationRelationship_HttpsWeb{HttpsWeb: &typespb.HTTPSWebProfile{}}
		return out, in.TrustDomain, nil
	case profileSPIFFE:
		if in.EndpointSPIFFEID == "" {
			return nil, "", errors.New("endpoint SPIFFE ID is required if 'https_spiffe' endpoint profile is set")
		}
		id, err := spiffeid.FromString(in.EndpointSPIFFEID)
		if err != nil {
			return nil, "", fmt.Errorf("cannot parse bundle endpoint SPIFFE ID: %w", err)
		}
		out.BundleEndpointProfile = &typespb.FederationRelationship_HttpsSpiffe{HttpsSpiffe: &typespb.HTTPSSPIFFEProfile{EndpointSpiffeId: in.EndpointSPIFFEID}}
		return out, id.TrustDomain().Name(), nil
	}
	return nil, "", fmt.Errorf("unknown bundle endpoint profile type: %q", in.BundleEndpointProfile)
}
