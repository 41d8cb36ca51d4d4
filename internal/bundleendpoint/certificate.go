package bundleendpoint

import (
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"golang.org/x/crypto/acme"
	"golang.org/x/crypto/acme/autocert"

	"github.com/spiffe-node/spiffe-node/internal/durable"
)

// lookPeriod is the least time between two looks at the certificate's files.
const lookPeriod = 5 * time.Second

// Files is a certificate of the web's PKI from PEM files, read anew when they
// change. The first read must succeed.
func Files(certFile, keyFile string, log *slog.Logger) (Certificate, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	f := &files{cert: certFile, key: keyFile, log: log}
	stamp, err := f.look()
	if err != nil {
		return Certificate{}, fmt.Errorf("bundle endpoint certificate: %w", err)
	}
	if f.current, err = f.read(); err != nil {
		return Certificate{}, fmt.Errorf("bundle endpoint certificate: %w", err)
	}
	f.stamp, f.looked = stamp, time.Now()
	return Certificate{Get: f.get, again: f.lookAgain}, nil
}

// files is a certificate with its key in two files. Safe for concurrent use.
type files struct {
	cert, key string
	log       *slog.Logger

	mu      sync.Mutex
	current *tls.Certificate
	stamp   stamp // of current, or of what could not be read
	looked  time.Time
}

// stamp tells versions of the two files apart.
type stamp [2]struct {
	modified time.Time
	size     int64
}

func (f *files) look() (out stamp, err error) {
	for i, path := range []string{f.cert, f.key} {
		info, err := os.Stat(path) // behind the links that Kubernetes swaps
		if err != nil {
			return out, err
		}
		out[i].modified, out[i].size = info.ModTime(), info.Size()
	}
	return out, nil
}

func (f *files) read() (*tls.Certificate, error) {
	cert, err := tls.LoadX509KeyPair(f.cert, f.key)
	if err != nil {
		return nil, err
	}
	return &cert, nil
}

func (f *files) lookAgain() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.looked = time.Time{}
}

func (f *files) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	if now.Sub(f.looked) < lookPeriod {
		return f.current, nil
	}
	f.looked = now
	next, err := f.look()
	if err == nil && next == f.stamp {
		return f.current, nil
	}
	var cert *tls.Certificate
	if err == nil {
		cert, err = f.read()
	}
	if err != nil {
		// Between the writing of one file and the other they do not match; the
		// next look says more.
		f.log.Error("the bundle endpoint's certificate could not be read anew; the old one is used on", slog.String("file", f.cert), slog.Any("error", err))
		return f.current, nil
	}
	f.current, f.stamp = cert, next
	f.log.Info("the bundle endpoint has a new certificate", slog.String("file", f.cert), slog.Time("expires_at", cert.Leaf.NotAfter))
	return cert, nil
}

// ACMEConfig says how to get a certificate from an ACME server.
type ACMEConfig struct {
	Domain    string // required
	Email     string // contact, may be empty
	Directory string // of the server; "" = Let's Encrypt
	// CacheDir keeps account key and certificates: made if missing, for the
	// owner only.
	CacheDir string
	// AcceptTOS must be true: somebody has agreed to the server's terms.
	AcceptTOS bool
}

// ACME is a certificate that is asked for at the first handshake and renewed in
// time. The challenge comes in on the endpoint's own port (tls-alpn-01), which
// must be reachable as port 443 of the domain.
func ACME(cfg ACMEConfig) (Certificate, error) {
	switch {
	case !cfg.AcceptTOS:
		return Certificate{}, errors.New("bundle endpoint certificate: the terms of the ACME server are not accepted")
	case cfg.Domain == "":
		return Certificate{}, errors.New("bundle endpoint certificate: no domain for ACME")
	}
	if err := durable.OwnerDir(cfg.CacheDir); err != nil {
		return Certificate{}, fmt.Errorf("bundle endpoint certificate: ACME cache: %w", err)
	}
	m := &autocert.Manager{
		Prompt:     autocert.AcceptTOS,
		Cache:      autocert.DirCache(cfg.CacheDir),
		HostPolicy: autocert.HostWhitelist(cfg.Domain),
		Email:      cfg.Email,
	}
	if cfg.Directory != "" {
		m.Client = &acme.Client{DirectoryURL: cfg.Directory, UserAgent: "spiffe-node"}
	}
	return Certificate{
		Get: func(hello *tls.ClientHelloInfo) (*tls.Certificate, error) {
			if hello.ServerName == "" {
				// Some clients name nobody; there is only one name here.
				named := *hello
				named.ServerName = cfg.Domain
				hello = &named
			}
			return m.GetCertificate(hello)
		},
		Protocols: []string{acme.ALPNProto},
	}, nil
}
