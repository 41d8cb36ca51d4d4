package podinfo

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
)

// Where a pod finds its credentials.
const (
	DefaultTokenPath = "/var/run/secrets/kubernetes.io/serviceaccount/token" //nolint:gosec // a path, not a token
	DefaultCAPath    = "/var/run/secrets/kubernetes.io/serviceaccount/ca.crt"
)

const (
	// pollEvery is the least time between two starts of a list.
	pollEvery = 500 * time.Millisecond
	// pollEager is how long somebody who lacks facts is polled for that often;
	// after that ever more seldom, down to pollSeldom. A container held back by
	// a postStart hook lacks its facts for as long as it likes.
	pollEager  = 30 * time.Second
	pollSeldom = 15 * time.Second
	// kubeletTimeout bounds one list, maxList its size in bytes.
	kubeletTimeout = 10 * time.Second
	maxList        = 256 << 20
)

// KubeletConfig is what NewKubelet needs. The permission is nodes/pods, or
// nodes/proxy before Kubernetes 1.33.
type KubeletConfig struct {
	// Address is host:port of the kubelet of this node.
	Address string
	// TokenPath is the bearer token, read anew for every list; "" is
	// DefaultTokenPath.
	TokenPath string
	// CAPath has the certificates that vouch for the kubelet's, read anew for
	// every connection; "" is DefaultCAPath.
	CAPath string
	// SkipVerify believes any certificate: whoever can answer at Address gets
	// the token and says which pods there are.
	SkipVerify bool
}

// Kubelet lists the pods of the kubelet. Safe for concurrent use.
type Kubelet struct {
	cfg    KubeletConfig
	url    string
	client *http.Client
}

// NewKubelet checks the configuration; nothing is read yet.
func NewKubelet(cfg KubeletConfig) (*Kubelet, error) {
	host, _, err := net.SplitHostPort(cfg.Address)
	if err != nil || host == "" {
		return nil, fmt.Errorf("podinfo: kubelet address %q is not host:port", cfg.Address)
	}
	cfg.TokenPath, cfg.CAPath = cmp.Or(cfg.TokenPath, DefaultTokenPath), cmp.Or(cfg.CAPath, DefaultCAPath)
	k := &Kubelet{cfg: cfg, url: "https://" + cfg.Address + "/pods"}
	transport := &http.Transport{
		Proxy: nil, // a node talks to itself
		DialTLSContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
			return k.dial(ctx, network, addr, host)
		},
		MaxIdleConns:        1,
		MaxIdleConnsPerHost: 1,
		IdleConnTimeout:     time.Minute,
	}
	k.client = &http.Client{
		Transport: transport,
		Timeout:   kubeletTimeout,
		// The token goes to the kubelet and to nobody it names.
		CheckRedirect: func(*http.Request, []*http.Request) error { return errors.New("the kubelet redirects") },
	}
	return k, nil
}

func (k *Kubelet) dial(ctx context.Context, network, addr, host string) (net.Conn, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12, ServerName: host, InsecureSkipVerify: k.cfg.SkipVerify} //nolint:gosec // an explicit option
	if !k.cfg.SkipVerify {
		pem, err := os.ReadFile(k.cfg.CAPath)
		if err != nil {
			return nil, fmt.Errorf("certificates that vouch for the kubelet: %w", err)
		}
		cfg.RootCAs = x509.NewCertPool()
		if !cfg.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("certificates that vouch for the kubelet: %s holds none", k.cfg.CAPath)
		}
	}
	d := tls.Dialer{Config: cfg}
	return d.DialContext(ctx, network, addr)
}

// list calls each for every pod.
func (k *Kubelet) list(ctx context.Context, log *slog.Logger, each func(*corev1.Pod)) error {
	token, err := os.ReadFile(k.cfg.TokenPath)
	if err != nil {
		return fmt.Errorf("token for the kubelet: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, k.url, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Authorization", "Bearer "+string(bytes.TrimSpace(token)))
	req.Header.Set("Accept", "application/json")
	resp, err := k.client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 512))
		return fmt.Errorf("the kubelet at %s answers %s: %s", k.cfg.Address, resp.Status, strings.TrimSpace(string(text)))
	}
	if err := decodePods(io.LimitReader(resp.Body, maxList), log, each); err != nil {
		return fmt.Errorf("pods of the kubelet at %s: %w", k.cfg.Address, err)
	}
	return nil
}

// decodePods reads a PodList pod by pod, so that one at a time is in memory. A
// pod that does not fit its type is left out; a list that breaks off is an
// error.
func decodePods(r io.Reader, log *slog.Logger, each func(*corev1.Pod)) error {
	dec := json.NewDecoder(r)
	if t, err := dec.Token(); err != nil || t != json.Delim('{') {
		return fmt.Errorf("not a list: %w", cmp.Or(err, errors.New("no object")))
	}
	for dec.More() {
		key, err := dec.Token()
		if err != nil {
			return err
		}
		if key != "items" {
			var skip json.RawMessage
			if err := dec.Decode(&skip); err != nil {
				return err
			}
			continue
		}
		t, err := dec.Token()
		if err != nil {
			return err
		}
		if t == nil {
			continue // "items": null
		}
		if t != json.Delim('[') {
			return errors.New("not a list: items is no array")
		}
		for dec.More() {
			pod := &corev1.Pod{}
			err := dec.Decode(pod)
			var wrong *json.UnmarshalTypeError
			switch {
			case err == nil:
				each(pod)
			case errors.As(err, &wrong):
				log.Debug("a pod of the kubelet cannot be read and is left out", slog.Any("error", err))
			default:
				return err
			}
		}
		if _, err := dec.Token(); err != nil {
			return err
		}
	}
	_, err := dec.Token()
	return err
}

// poll lists the kubelet's pods while somebody lacks facts. One list serves all.
func (s *Source) poll(ctx context.Context) {
	defer s.cfg.Kubelet.client.CloseIdleConnections()
	timer := time.NewTimer(pollEvery)
	timer.Stop() // nobody lacks anything yet
	defer timer.Stop()
	var last time.Time // start of the last list
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.kick:
			// Soon, but never sooner than pollEvery after the last one.
			timer.Reset(max(0, time.Until(last.Add(pollEvery))))
		case <-timer.C:
			last = time.Now()
			s.askKubelet(ctx)
			if since, lacking := s.store.wanting(); lacking {
				timer.Reset(max(0, time.Until(last.Add(pollDelay(time.Since(since))))))
			}
		}
	}
}

// pollDelay is the time between two lists for somebody who has lacked facts for
// that long.
func pollDelay(lacking time.Duration) time.Duration {
	if lacking < pollEager {
		return pollEvery
	}
	return min(lacking/10, pollSeldom)
}

func (s *Source) askKubelet(ctx context.Context) {
	s.cfg.Metrics.requests.WithLabelValues("kubelet").Inc()
	var all []*facts
	err := s.cfg.Kubelet.list(ctx, s.log, func(p *corev1.Pod) {
		if f := s.newFacts(p, witnessKubelet); f != nil {
			all = append(all, f)
		}
	})
	switch {
	case err == nil:
		s.kubelet.synced()
		s.store.replace(all, time.Now())
	case ctx.Err() == nil:
		s.kubelet.down(err)
	}
}
