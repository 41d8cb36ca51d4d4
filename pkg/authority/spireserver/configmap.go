package spireserver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ConfigMap names one key of a ConfigMap.
type ConfigMap struct {
	Namespace string
	Name      string
	Key       string
}

// kubeName is what may stand in the path of a request for a ConfigMap.
var kubeName = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]*[a-z0-9])?$`)

// serviceAccountDir is where the kubelet puts a pod's service account.
const serviceAccountDir = "/var/run/secrets/kubernetes.io/serviceaccount"

// BundleConfigMap reads the bundle from a ConfigMap with the service account of
// this pod, which must be allowed to get it.
func BundleConfigMap(from ConfigMap, format string) Bootstrap {
	return bundleConfigMap(from, format, serviceAccountDir, os.Getenv)
}

func bundleConfigMap(from ConfigMap, format, account string, getenv func(string) string) Bootstrap {
	return func(ctx context.Context, td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
		data, err := readConfigMap(ctx, from, account, getenv)
		if err != nil {
			return nil, fmt.Errorf("trust bundle from ConfigMap %s/%s: %w", from.Namespace, from.Name, err)
		}
		b, err := ParseBundle(td, data, format)
		if err != nil {
			return nil, fmt.Errorf("trust bundle from ConfigMap %s/%s, key %s: %w", from.Namespace, from.Name, from.Key, err)
		}
		return b, nil
	}
}

func readConfigMap(ctx context.Context, from ConfigMap, account string, getenv func(string) string) ([]byte, error) {
	if !kubeName.MatchString(from.Namespace) || !kubeName.MatchString(from.Name) {
		return nil, errors.New("these are no names of Kubernetes")
	}
	host, port := getenv("KUBERNETES_SERVICE_HOST"), getenv("KUBERNETES_SERVICE_PORT")
	if host == "" || port == "" {
		return nil, errors.New("this is no pod of a cluster (KUBERNETES_SERVICE_HOST is not set); name a file or URL instead")
	}
	token, err := readToken(filepath.Join(account, "token"))
	if err != nil {
		return nil, err
	}
	ca, err := os.ReadFile(filepath.Join(account, "ca.crt"))
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(ca) {
		return nil, fmt.Errorf("%s holds no certificate", filepath.Join(account, "ca.crt"))
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, DisableKeepAlives: true}
	client := &http.Client{
		Transport: transport,
		Timeout:   fetchTimeout,
		// The token is for the API server alone.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	address := "https://" + net.JoinHostPort(host, port) + "/api/v1/namespaces/" + from.Namespace + "/configmaps/" + from.Name
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Accept", "application/json")
	res, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	switch res.StatusCode {
	case http.StatusOK:
	case http.StatusForbidden, http.StatusUnauthorized:
		return nil, fmt.Errorf("the API server answers %s; let this service account get it", res.Status)
	default:
		return nil, fmt.Errorf("the API server answers %s", res.Status)
	}
	body, err := readLimited(res.Body)
	if err != nil {
		return nil, err
	}
	return configMapKey(body, from.Key)
}

// configMapKey is the value of a key in a ConfigMap.
func configMapKey(body []byte, key string) ([]byte, error) {
	var m struct {
		Data       map[string]string `json:"data"`
		BinaryData map[string][]byte `json:"binaryData"`
	}
	if err := json.Unmarshal(body, &m); err != nil {
		return nil, errors.New("the API server's answer is no ConfigMap")
	}
	if text, ok := m.Data[key]; ok {
		return []byte(text), nil
	}
	if data, ok := m.BinaryData[key]; ok {
		return data, nil
	}
	return nil, fmt.Errorf("it has no key %s", key)
}
