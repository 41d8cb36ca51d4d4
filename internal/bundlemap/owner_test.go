package bundlemap_test

import (
	"encoding/base64"
	"testing"

	"github.com/google/go-cmp/cmp"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/spiffe-node/spiffe-node/internal/bundlemap"
)

func TestOwnerOf(t *testing.T) {
	token := func(claims string) string {
		return "e30." + base64.RawURLEncoding.EncodeToString([]byte(claims)) + ".c2ln\n"
	}
	for name, tc := range map[string]struct {
		token string
		want  *metav1.OwnerReference
	}{
		"bound token": {
			token(`{"sub":"x","kubernetes.io":{"namespace":"spire-server","serviceaccount":{"name":"spire-server","uid":"u-1"}}}`),
			&metav1.OwnerReference{APIVersion: "v1", Kind: "ServiceAccount", Name: "spire-server", UID: "u-1"},
		},
		"legacy token": {token(`{"kubernetes.io/serviceaccount/namespace":"spire-server"}`), nil},
		"not JSON":     {token(`}`), nil},
		"not base64":   {"a.!.c", nil},
		"not a JWT":    {"secret", nil},
		"empty":        {"", nil},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := bundlemap.OwnerOf(tc.token)
			if (err == nil) != (tc.want != nil) {
				t.Fatalf("error is %v, want an owner: %v", err, tc.want != nil)
			}
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func FuzzOwnerOf(f *testing.F) {
	f.Add("e30.e30.e30")
	f.Add("a.b")
	f.Fuzz(func(t *testing.T, token string) {
		if got, err := bundlemap.OwnerOf(token); err == nil && (got.Name == "" || got.UID == "") {
			t.Errorf("an owner without name or UID: %+v", got)
		}
	})
}
