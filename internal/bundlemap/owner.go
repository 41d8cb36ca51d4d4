package bundlemap

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// OwnerOf is the service account that a token of Kubernetes names, as an owner
// for what should go when the account goes. The token's signature does not
// matter: the API server takes anybody's word on owners.
func OwnerOf(token string) (*metav1.OwnerReference, error) {
	parts := strings.Split(strings.TrimSpace(token), ".")
	if len(parts) != 3 {
		return nil, errors.New("the service account's token is not a JWT")
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err != nil {
		return nil, fmt.Errorf("read the service account's token: %w", err)
	}
	var claims struct {
		Kubernetes struct {
			ServiceAccount struct {
				Name string    `json:"name"`
				UID  types.UID `json:"uid"`
			} `json:"serviceaccount"`
		} `json:"kubernetes.io"`
	}
	if err := json.Unmarshal(payload, &claims); err != nil {
		return nil, fmt.Errorf("read the service account's token: %w", err)
	}
	account := claims.Kubernetes.ServiceAccount
	if account.Name == "" || account.UID == "" {
		return nil, errors.New("the token names no service account")
	}
	return &metav1.OwnerReference{APIVersion: "v1", Kind: "ServiceAccount", Name: account.Name, UID: account.UID}, nil
}

// owners are those of a ConfigMap made now. The token is read each time: an
// account that was made again has another UID.
func (p *Publisher) owners() []metav1.OwnerReference {
	token, err := os.ReadFile(p.cfg.TokenPath)
	if err != nil {
		return nil // not a pod: the ConfigMap stays until somebody deletes it
	}
	owner, err := OwnerOf(string(token))
	if err != nil {
		p.log.Debug("the ConfigMap gets no owner", slog.Any("error", err))
		return nil
	}
	return []metav1.OwnerReference{*owner}
}
