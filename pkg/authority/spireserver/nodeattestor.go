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
	// Prove begins an attestation. It reads what it needs anew each time.
	Prove(ctx context.Context) (Proof, error)
}

// Proof is one attestation.
type Proof struct {
	// Payload opens it.
	Payload []byte
	// Respond answers a challenge of the server; nil = there are none.
	Respond func(challenge []byte) ([]byte, error)
}

// ErrNothingNew is wrapped by a NodeAttestor that has nothing to show that was
// not shown before: a join token is good for one attestation.
var ErrNothingNew = errors.New("the join token has been used")

// DefaultTokenPath is where the service account token of an agent is expected,
// as with SPIRE Agent.
const DefaultTokenPath = "/var/run/secrets/tokens/spire-agent" //nolint:gosec // a path

// maxFile bounds a file with a token, key or certificates, bytes.
const maxFile = 64 << 10

var errChallenge = errors.New("the server asks for more, which this attestation does not know")

// PSAT attests a Kubernetes node with the agent's projected service account
// token (k8s_psat). The token is read each time: the kubelet renews it.
type PSAT struct {
	Cluster   string // the cluster's name in the server's configuration
	TokenPath string // "" = DefaultTokenPath
}

// Type is k8s_psat.
func (PSAT) Type() string { return "k8s_psat" }

// Prove shows the cluster's name and the token.
func (p PSAT) Prove(context.Context) (Proof, error) {
	path := p.TokenPath
	if path == "" {
		path = DefaultTokenPath
	}
	token, err := readToken(path)
	if err != nil {
		return Proof{}, err
	}
	payload, err := json.Marshal(struct {
		Cluster string `json:"cluster"`
		Token   string `json:"token"`
	}{p.Cluster, token})
	return Proof{Payload: payload}, err
}

// JoinToken attests with a token that the server made for one agent and one
// use (join_token).
type JoinToken struct {
	Token string // the token, or
	Path  string // a file that holds it, read for each attestation
}

// Type is join_token.
func (JoinToken) Type() string { return "join_token" }

// Prove shows the token.
func (j JoinToken) Prove(context.Context) (Proof, error) {
	if j.Path == "" {
		return Proof{Payload: []byte(j.Token)}, nil
	}
	token, err := readToken(j.Path)
	return Proof{Payload: []byte(token)}, err
}

func readToken(path string) (string, error) {
	data, err := readSmall("token", path)
	if err != nil {
		return "", err
	}
	token := strings.TrimSpace(string(data))
	if token == "" {
		return "", fmt.Errorf("token %s is empty", path)
	}
	return token, nil
}

// readSmall reads a file of at most maxFile bytes. It never puts the content
// into an error.
func readSmall(what, path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	if info.Size() > maxFile || !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s %s is no file of at most %d bytes", what, path, maxFile)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", what, err)
	}
	return data, nil
}
