package config

import (
	"net/url"
	"time"
)

// Profiles of a bundle endpoint.
const (
	ProfileSPIFFE = "https_spiffe"
	ProfileWeb    = "https_web"
)

// Federation is what other trust domains get from this one. Where their bundles
// come from is no configuration but data: relationships.
type Federation struct {
	BundleEndpoint BundleEndpoint `yaml:"bundleEndpoint"`
}

// BundleEndpoint serves the own trust bundle.
type BundleEndpoint struct {
	Address     string   `yaml:"address" doc:"host:port at which the own trust bundle is served to other trust domains; empty: off."`
	Profile     string   `yaml:"profile" doc:"How the endpoint says who it is: https_spiffe (the server's own X.509-SVID) or https_web (a certificate that browsers accept, from certFile and keyFile or by ACME)."`
	RefreshHint Duration `yaml:"refreshHint" doc:"How often others should look, as the bundle tells them. At most a sixth of embedded.caTTL, so that new keys are known before they sign."`
	CertFile    string   `yaml:"certFile" doc:"PEM certificate chain for https_web; read anew when it changes."`
	KeyFile     string   `yaml:"keyFile" doc:"PEM private key for certFile."`
	ACME        ACME     `yaml:"acme"`
}

// ACME gets the certificate for https_web by itself.
type ACME struct {
	Domain         string `yaml:"domain" doc:"Name to get a certificate for; it must lead to this endpoint on port 443. Empty: no ACME."`
	Email          string `yaml:"email" doc:"Contact for the ACME server; may be empty."`
	DirectoryURL   string `yaml:"directoryURL" doc:"Directory of the ACME server; empty: Let's Encrypt."`
	TOSAccepted    bool   `yaml:"tosAccepted" doc:"Says that you accept the terms of the ACME server. Required with domain."`
	CacheDirectory string `yaml:"cacheDirectory" doc:"Owner-only directory for account key and certificates; must outlive restarts."`
}

func (b *BundleEndpoint) check(c *collector, caTTL time.Duration) {
	const key = "federation.bundleEndpoint."
	c.hostPort(key+"address", b.Address)
	c.oneOf(key+"profile", b.Profile, ProfileSPIFFE, ProfileWeb)
	files := b.CertFile != "" || b.KeyFile != ""
	switch hint := time.Duration(b.RefreshHint); {
	case hint < time.Second:
		c.add(key+"refreshHint", "%s is shorter than 1s", b.RefreshHint)
	case b.Address != "" && hint > caTTL/6:
		c.add(key+"refreshHint", "%s is more than a sixth of embedded.caTTL (%s): other trust domains would not know new keys when they begin to sign", b.RefreshHint, caTTL)
	}
	if files {
		c.absolute(key+"certFile", b.CertFile)
		c.absolute(key+"keyFile", b.KeyFile)
	}
	b.ACME.check(c, key+"acme.")
	if b.Profile != ProfileWeb {
		if files || b.ACME.Domain != "" {
			c.add(key+"profile", "is %s, which uses the server's own SVID; certFile, keyFile and acme are for %s", b.Profile, ProfileWeb)
		}
		return
	}
	switch acme := b.ACME.Domain != ""; {
	case files && acme:
		c.add(key+"certFile", "and acme.domain are both set; choose one")
	case !files && !acme && b.Address != "":
		c.add(key+"profile", "is %s, but there is neither certFile with keyFile nor acme.domain", ProfileWeb)
	}
}

func (a *ACME) check(c *collector, key string) {
	if a.Domain == "" {
		return
	}
	if !a.TOSAccepted {
		c.add(key+"tosAccepted", "is not true: read the terms of the ACME server and say that you accept them")
	}
	c.absolute(key+"cacheDirectory", a.CacheDirectory)
	if a.DirectoryURL != "" {
		if u, err := url.Parse(a.DirectoryURL); err != nil || u.Scheme != "https" || u.Host == "" {
			c.add(key+"directoryURL", "%q is not an https URL", a.DirectoryURL)
		}
	}
}
