package embedded

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/google/uuid"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// joinTokenType names the attestation type in agent IDs.
const joinTokenType = "join_token"

// maxJoinToken bounds what an administrator may choose as a token, in bytes: it
// becomes a part of the agent's SPIFFE ID.
const maxJoinToken = 1024

// tokenGrace is how long a token that nobody used stays after it has expired,
// so that who comes late is told that he is late.
const tokenGrace = time.Hour

// JoinToken lets one agent attest once.
type JoinToken struct {
	Value     string
	ExpiresAt time.Time
}

// JoinTokenAgentID is the ID of the agent that attests with a token.
func JoinTokenAgentID(td spiffeid.TrustDomain, token string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, "spire", "agent", joinTokenType, token)
}

// CreateJoinToken stores a token; value "" makes a random one. If alias is not
// zero, an entry that gives this ID to the agent is stored in the same durable
// step, so that entries below the alias reach the agent. Errors: ErrInvalid,
// ErrExists, *SimilarError.
func (a *Authority) CreateJoinToken(ctx context.Context, value string, ttl time.Duration, alias spiffeid.ID) (*JoinToken, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if ttl < time.Second {
		return nil, invalid("ttl is required, you must provide one", nil)
	}
	if value == "" {
		random, err := uuid.NewRandom()
		if err != nil {
			return nil, fmt.Errorf("make a join token: %w", err)
		}
		value = random.String()
	}
	if len(value) > maxJoinToken {
		return nil, invalid(fmt.Sprintf("join token is longer than %d bytes", maxJoinToken), nil)
	}
	agent, err := JoinTokenAgentID(a.cfg.TrustDomain, value)
	if err != nil {
		return nil, invalid("join token cannot be part of a SPIFFE ID", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, taken := a.tokens[value]; taken {
		return nil, exists("datastore-sql: UNIQUE constraint failed: join_tokens.token")
	}
	token := &JoinToken{Value: value, ExpiresAt: time.Now().Add(ttl).UTC().Truncate(time.Second)}
	change, err := token.change()
	if err != nil {
		return nil, err
	}
	var entries []*entry.Entry
	if !alias.IsZero() {
		e, err := a.aliasEntry(agent, alias)
		if err != nil {
			return nil, err
		}
		entries = append(entries, e)
	}
	if err := a.storeEntries(entries, nil, change); err != nil {
		return nil, fmt.Errorf("store join token: %w", err)
	}
	a.tokens[value] = token.ExpiresAt
	return token, nil
}

// aliasEntry is the entry that gives a join-token agent another ID. The caller
// holds mu.
func (a *Authority) aliasEntry(agent, alias spiffeid.ID) (*entry.Entry, error) {
	own, err := attest.NewSelector("spiffe_id", agent.String())
	if err != nil {
		return nil, invalid("join token cannot be a selector", err)
	}
	e := &entry.Entry{SPIFFEID: alias, ParentID: agent, Selectors: attest.NewSelectors(own)}
	if err := a.admit(newBatch(a.Set()), e); err != nil {
		return nil, err
	}
	random, err := uuid.NewRandom()
	if err != nil {
		return nil, fmt.Errorf("make an entry ID: %w", err)
	}
	e.ID, e.CreatedAt = random.String(), time.Now().UTC().Round(time.Second)
	return e, nil
}

// aliasesOf are the IDs of the entries that CreateJoinToken made for an agent.
func (a *Authority) aliasesOf(agent *Agent) []string {
	if agent.AttestationType != joinTokenType {
		return nil
	}
	own, err := attest.NewSelector("spiffe_id", agent.ID.String())
	if err != nil {
		return nil
	}
	var out []string
	for e := range a.Set().ByParent(agent.ID) {
		if e.Selectors.Equal(attest.NewSelectors(own)) {
			out = append(out, e.ID)
		}
	}
	return out
}

// UseJoinToken takes a token out of the store and returns it, expired or not.
// Of several callers with the same token one succeeds: when this returns, the
// token is gone from the disk. Error: ErrNotFound.
func (a *Authority) UseJoinToken(ctx context.Context, value string) (*JoinToken, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	expires, ok := a.tokens[value]
	if !ok {
		return nil, notFound("join token does not exist or has already been used")
	}
	if err := a.commit(remove(bucketTokens, value)); err != nil {
		return nil, fmt.Errorf("delete join token: %w", err)
	}
	delete(a.tokens, value)
	return &JoinToken{Value: value, ExpiresAt: expires}, nil
}

// pruneTokens deletes tokens that expired some time ago.
func (a *Authority) pruneTokens(now time.Time) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	var gone []string
	var changes []change
	for value, expires := range a.tokens {
		if now.After(expires.Add(tokenGrace)) {
			gone = append(gone, value)
			changes = append(changes, remove(bucketTokens, value))
		}
	}
	if len(gone) == 0 {
		return nil
	}
	if err := a.commit(changes...); err != nil {
		return fmt.Errorf("delete expired join tokens: %w", err)
	}
	for _, value := range gone {
		delete(a.tokens, value)
	}
	a.log.Info("expired join tokens deleted", slog.Int("count", len(gone)))
	return nil
}

// tokenRecord is the stored form; the token is the key.
type tokenRecord struct {
	ExpiresAt time.Time `json:"expires_at"`
}

func (t *JoinToken) change() (change, error) {
	content, err := json.Marshal(tokenRecord{t.ExpiresAt})
	if err != nil {
		return change{}, fmt.Errorf("encode join token: %w", err)
	}
	return put(bucketTokens, t.Value, content), nil
}

func (l *loading) addToken(key string, content []byte) error {
	var rec tokenRecord
	if err := unmarshalStrict(content, &rec); err != nil {
		return err
	}
	if rec.ExpiresAt.IsZero() {
		return errors.New("join token without an end")
	}
	l.tokens[key] = rec.ExpiresAt
	return nil
}
