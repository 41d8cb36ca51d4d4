package cluster

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"time"
)

// writePKI makes one CA and a certificate for each component in pki/, and
// the key pair that signs service account tokens. A cluster lives for minutes;
// the certificates for two days.
func (c Config) writePKI() error {
	if err := os.MkdirAll(c.pki(""), 0o700); err != nil {
		return fmt.Errorf("making the certificate directory: %w", err)
	}
	ca, err := newCA()
	if err != nil {
		return err
	}
	if err := writePEM(c.pki("ca.crt"), "CERTIFICATE", ca.cert.Raw); err != nil {
		return err
	}
	if err := writeKey(c.pki("ca.key"), ca.key); err != nil {
		return err
	}
	if err := c.issueAll(ca, []leaf{
		{file: "apiserver", name: "kube-apiserver", server: true},
		{file: "apiserver-kubelet", name: "kube-apiserver-kubelet-client", group: "system:masters"},
		{file: "admin", name: "admin", group: "system:masters"},
		{file: "controller-manager", name: "system:kube-controller-manager"},
		{file: "scheduler", name: "system:kube-scheduler"},
		{file: "proxy", name: "system:kube-proxy"},
	}); err != nil {
		return err
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return fmt.Errorf("making the service account key: %w", err)
	}
	if err := writeKey(c.pki("service-accounts.key"), key); err != nil {
		return err
	}
	pub, err := x509.MarshalPKIXPublicKey(key.Public())
	if err != nil {
		return fmt.Errorf("encoding the service account key: %w", err)
	}
	return writePEM(c.pki("service-accounts.pub"), "PUBLIC KEY", pub)
}

// leaf is a certificate of one component.
type leaf struct {
	file, name, group string
	server            bool
}

func (c Config) issueAll(ca *certAuthority, leaves []leaf) error {
	for _, l := range leaves {
		if err := ca.issue(c.pki(l.file), l, c.nodeIP()); err != nil {
			return fmt.Errorf("issuing the %s certificate: %w", l.file, err)
		}
	}
	return nil
}

// writeNodePKI makes the certificates of one node's kubelet.
func (c Config) writeNodePKI() error {
	pair, err := tls.LoadX509KeyPair(c.pki("ca.crt"), c.pki("ca.key"))
	if err != nil {
		return fmt.Errorf("loading the cluster's CA: %w", err)
	}
	return c.issueAll(&certAuthority{cert: pair.Leaf, key: pair.PrivateKey.(*ecdsa.PrivateKey)}, []leaf{
		{file: c.own("kubelet-server"), name: c.NodeName, server: true},
		{file: c.own("kubelet-client"), name: "system:node:" + c.NodeName, group: "system:nodes"},
	})
}

type certAuthority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA() (*certAuthority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("making the CA key: %w", err)
	}
	tmpl := template("e2e-ca", "")
	tmpl.IsCA = true
	tmpl.BasicConstraintsValid = true
	tmpl.KeyUsage = x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("signing the CA certificate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parsing the CA certificate: %w", err)
	}
	return &certAuthority{cert: cert, key: key}, nil
}

// issue writes path.crt and path.key.
func (ca *certAuthority) issue(path string, l leaf, nodeIP string) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	tmpl := template(l.name, l.group)
	tmpl.KeyUsage = x509.KeyUsageDigitalSignature
	tmpl.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}
	if l.server {
		tmpl.ExtKeyUsage = append(tmpl.ExtKeyUsage, x509.ExtKeyUsageServerAuth)
		tmpl.DNSNames = []string{l.name, "localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"}
		tmpl.IPAddresses = []net.IP{net.IPv4(127, 0, 0, 1), net.ParseIP(apiIP), net.ParseIP(nodeIP)}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, key.Public(), ca.key)
	if err != nil {
		return err
	}
	if err := writePEM(path+".crt", "CERTIFICATE", der); err != nil {
		return err
	}
	return writeKey(path+".key", key)
}

func template(name, group string) *x509.Certificate {
	serial, _ := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)) // never fails since Go 1.24
	t := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: name},
		NotBefore:    time.Now().Add(-time.Minute),
		NotAfter:     time.Now().Add(48 * time.Hour),
	}
	if group != "" {
		t.Subject.Organization = []string{group}
	}
	return t
}

func writeKey(path string, key crypto.PrivateKey) error {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return fmt.Errorf("encoding %s: %w", path, err)
	}
	return writePEM(path, "PRIVATE KEY", der)
}

func writePEM(path, kind string, der []byte) error {
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}
