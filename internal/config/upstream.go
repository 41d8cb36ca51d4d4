package config

import (
	"net"
)

// Upstream is a CA above the embedded authority; at most one kind is set.
type Upstream struct {
	Disk   UpstreamDisk   `yaml:"disk"`
	Parent UpstreamParent `yaml:"parent"`
}

// UpstreamDisk is a CA whose certificate and key lie in files.
type UpstreamDisk struct {
	CertFile   string `yaml:"certFile" doc:"File with the certificate of a CA that signs this authority's CA, and after it those of its issuers, PEM. Empty: no CA on disk. Read anew at each use, as the next two."`
	KeyFile    string `yaml:"keyFile" doc:"File with its private key, PEM, without a passphrase."`
	BundleFile string `yaml:"bundleFile" doc:"File with the roots, PEM, which become the trust bundle; empty: certFile is one."`
}

// UpstreamParent is another authority of the same trust domain.
type UpstreamParent struct {
	Address           string `yaml:"address" doc:"host:port of a SPIRE Server or authority of the same trust domain that signs this authority's CA and publishes its JWT keys. Empty: no parent."`
	WorkloadAPISocket string `yaml:"workloadAPISocket" doc:"Workload API socket of an agent of the parent's, which gives this process an identity whose entry there says downstream."`
}

// DiskEnabled and ParentEnabled say which kind of CA is above, if any.
func (u *Upstream) DiskEnabled() bool { return u.Disk != UpstreamDisk{} }

// ParentEnabled is explained above.
func (u *Upstream) ParentEnabled() bool { return u.Parent != UpstreamParent{} }

func (u *Upstream) check(c *collector, key string) {
	if u.DiskEnabled() && u.ParentEnabled() {
		c.add(key+"parent", "is set beside disk; there is one CA above, choose one")
	}
	if u.DiskEnabled() {
		for name, path := range map[string]string{"certFile": u.Disk.CertFile, "keyFile": u.Disk.KeyFile} {
			if path == "" {
				c.add(key+"disk."+name, "is missing; the CA above needs certFile and keyFile")
			} else {
				c.absolute(key+"disk."+name, path)
			}
		}
		c.ifSetAbsolute(key+"disk.bundleFile", u.Disk.BundleFile)
	}
	if u.ParentEnabled() {
		if host, port, err := net.SplitHostPort(u.Parent.Address); err != nil || host == "" || port == "" {
			c.add(key+"parent.address", "%q is not host:port", u.Parent.Address)
		}
		c.absolute(key+"parent.workloadAPISocket", u.Parent.WorkloadAPISocket)
	}
}
