package spireserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
)

// NodeAttestor proves to a server which node this is. Safe for concurrent use.
type NodeAttestor interface {
	// Type is the name of the server's attestor, such as k8s_psat.
	Type() string
	// Payload opens an attestation. It reads what it needs anew each time.
	Payload(ctx context.Context) ([]byte, error)
	// Respond answers a challenge of the server.
	Respond(ctx context.Context, challenge []byte) ([]byte, error)
}

// ErrNothingNew is wrapped by a NodeAttestor that has nothing to show that was
// not shown before: a join token is good for one attestation.
var ErrNothingNew = errors.New("the join token has been used")

// DefaultTokenPath is where the service account token of an agent is expected,
// as with SPIRE Agent.
const DefaultTokenPath = "/var/run/secrets/tokens/spire-agent" //nolint:gosec // a path

// maxToken bounds a token file, bytes.
const maxToken = 64 << 10

var errChallenge = errors.New("the server asks for more, which this attestation does not know")

// PSAT attests a Kubernetes node with the agent's projected service account
// token (k8s_psat). The token is read each time: the kubelet renews it.
type PSAT struct {
	Cluster   string // the cluster's name in the server's configuration
	TokenPath string // "" = DefaultTokenPath
}

// Type is k8s_psat.
func (PSAT) Type() string { return "k8s_psat" }

// Payload holds the cluster's name and the token.
func (p PSAT) Payload(context.Context) ([]byte, error) {
	path := p.TokenPath
	if path == "" {
		path = DefaultTokenPath
	}
	token, err := readToken(path)
	if err != nil {
		return nil, err
	}
	return json.Marshal(struct {
		Cluster string `json:"cluster"`
		Token   string `json:"token"`
	}{p.Cluster, token})
}

// Respond fails: k8s_psat has no challenges.
func (PSAT) Respond(context.Context, []byte) ([]byte, error) { return nil, errChallenge }

// JoinToken attests with a token that the server made for one agent and one
// use (join_token).
type JoinToken struct {
	Token string // the token, or
	Path  string // a file that holds it, read for each attestation
}

// Type is join_token.
func (JoinToken) Type() string { return "join_token" }

// Payload is the token.
func (j JoinToken) Payload(context.Context) ([]byte, error) {
	if j.Path == "" {
		return []byte(j.Token), nil
	}
	token, err := readToken(j.Path)
	return []byte(token), err
}

// Respond fails: join_token has no challenges.
func (JoinToken) Respond(context.Context, []byte) ([]byte, error) { return nil, errChallenge }

// readToken never puts the content into an error.
func readToken(path string) (string, error) {
	info, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("token: %w", err)
	}
	if info.Size() > maxToken || !info.Mode().IsRegular() {
		return "", fmt.Errorf("token %s is no file of at most %d bytes", path, maxToken)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("token: %w", err)
	}
	token := strings.TrimSpace(string(data))
	if token == "" {
		return "", fmt.Errorf("token %s is empty", path)
	}
	return token, nil
}
