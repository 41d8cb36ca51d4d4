package embedded

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"log/slog"
	"time"

	iradix "github.com/hashicorp/go-immutable-radix/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// Agent is an attested node. Immutable once handed to or by the authority.
type Agent struct {
	Row             int64 // place in the listing; set by the authority
	ID              spiffeid.ID
	AttestationType string
	Serial          string // decimal; empty when banned
	ExpiresAt       time.Time
	// NewSerial is that of a renewed SVID the agent has not used yet; the old
	// one counts until it does. Empty = none.
	NewSerial    string
	NewExpiresAt time.Time
	Selectors    attest.Selectors
	Banned       bool
	CanReattest  bool
	Version      string // empty = not known
}

// agentBook is all agents at one moment. Immutable.
type agentBook struct {
	byRow   *iradix.Tree[*Agent]
	byID    *iradix.Tree[*Agent]
	lastRow int64
}

func newAgentBook() *agentBook {
	return &agentBook{byRow: iradix.New[*Agent](), byID: iradix.New[*Agent]()}
}

func (b *agentBook) with(a *Agent) *agentBook {
	out := &agentBook{lastRow: max(b.lastRow, a.Row)}
	out.byRow, _, _ = b.byRow.Insert([]byte(rowKey(a.Row)), a)
	out.byID, _, _ = b.byID.Insert([]byte(a.ID.String()), a)
	return out
}

func (b *agentBook) without(a *Agent) *agentBook {
	out := &agentBook{lastRow: b.lastRow}
	out.byRow, _, _ = b.byRow.Delete([]byte(rowKey(a.Row)))
	out.byID, _, _ = b.byID.Delete([]byte(a.ID.String()))
	return out
}

func (b *agentBook) get(id spiffeid.ID) (*Agent, error) {
	a, ok := b.byID.Get([]byte(id.String()))
	if !ok {
		return nil, notFound("agent not found")
	}
	return a, nil
}

// Agents yields the attested nodes in the order of their first attestation.
func (a *Authority) Agents() iter.Seq[*Agent] {
	book := a.agents.Get()
	return func(yield func(*Agent) bool) {
		book.byRow.Root().Walk(func(_ []byte, agent *Agent) bool { return !yield(agent) })
	}
}

// AgentCount is the number of attested nodes.
func (a *Authority) AgentCount() int { return a.agents.Get().byRow.Len() }

// Agent is one attested node. Error: ErrNotFound.
func (a *Authority) Agent(id spiffeid.ID) (*Agent, error) { return a.agents.Get().get(id) }

// UpsertAgent records an attestation or a renewal. A ban stays: only
// DeleteAgent lifts it. A version that is not given stays as it was. Errors:
// ErrInvalid, ErrPrecondition (banned).
func (a *Authority) UpsertAgent(ctx context.Context, agent *Agent) (*Agent, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if !agent.ID.MemberOf(a.cfg.TrustDomain) || agent.ID.Path() == "" {
		return nil, invalid(fmt.Sprintf("%q is not an agent in trust domain %q", agent.ID, a.cfg.TrustDomain), nil)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	book := a.agents.Get()
	c := *agent
	c.Row = book.lastRow + 1
	if old, err := book.get(agent.ID); err == nil {
		if old.Banned {
			return nil, &kindError{ErrPrecondition, "agent is banned", nil}
		}
		c.Row, c.Version = old.Row, cmp.Or(c.Version, old.Version)
	}
	c.Banned = false
	return a.storeAgent(book, &c)
}

// BanAgent takes the agent's serial and entries away and keeps its record.
// Error: ErrNotFound.
func (a *Authority) BanAgent(ctx context.Context, id spiffeid.ID) (*Agent, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	book := a.agents.Get()
	old, err := book.get(id)
	if err != nil {
		return nil, err
	}
	c := *old
	c.Banned, c.Serial, c.NewSerial, c.NewExpiresAt = true, "", "", time.Time{}
	banned, err := a.storeAgent(book, &c)
	if err != nil {
		return nil, err
	}
	a.nudge()
	a.log.Warn("agent banned", slog.String("agent_id", id.String()))
	return banned, nil
}

// UpdateAgent lets edit change a copy of an agent's record; ID and row are not
// its business. An error ends the update and is returned as it is. Errors: those
// of edit, ErrNotFound.
func (a *Authority) UpdateAgent(ctx context.Context, id spiffeid.ID, edit func(*Agent) error) (*Agent, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	book := a.agents.Get()
	old, err := book.get(id)
	if err != nil {
		return nil, err
	}
	c := *old
	if err := edit(&c); err != nil {
		return nil, err
	}
	c.ID, c.Row = old.ID, old.Row
	return a.storeAgent(book, &c)
}

// storeAgent stores and publishes an agent. The caller holds mu.
func (a *Authority) storeAgent(book *agentBook, agent *Agent) (*Agent, error) {
	content, err := encodeAgent(agent)
	if err != nil {
		return nil, err
	}
	if err := a.commit(put(bucketAgents, rowKey(agent.Row), content)); err != nil {
		return nil, fmt.Errorf("store agent %s: %w", agent.ID, err)
	}
	a.agents.Set(book.with(agent))
	return agent, nil
}

// DeleteAgent forgets an agent; it may attest again. The alias that came with
// its join token goes too. Error: ErrNotFound.
func (a *Authority) DeleteAgent(ctx context.Context, id spiffeid.ID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	book := a.agents.Get()
	old, err := book.get(id)
	if err != nil {
		return err
	}
	if err := a.storeEntries(nil, a.aliasesOf(old), remove(bucketAgents, rowKey(old.Row))); err != nil {
		return fmt.Errorf("delete agent %s: %w", id, err)
	}
	a.agents.Set(book.without(old))
	return nil
}

// agentRecord is the stored form.
type agentRecord struct {
	ID              spiffeid.ID       `json:"id"`
	AttestationType string            `json:"attestation_type"`
	Serial          string            `json:"serial,omitempty"`
	ExpiresAt       time.Time         `json:"expires_at,omitzero"`
	NewSerial       string            `json:"new_serial,omitempty"`
	NewExpiresAt    time.Time         `json:"new_expires_at,omitzero"`
	Selectors       []attest.Selector `json:"selectors,omitempty"`
	Banned          bool              `json:"banned,omitempty"`
	CanReattest     bool              `json:"can_reattest,omitempty"`
	Version         string            `json:"version,omitempty"`
}

func encodeAgent(a *Agent) ([]byte, error) {
	rec := agentRecord{
		ID: a.ID, AttestationType: a.AttestationType, Serial: a.Serial, ExpiresAt: a.ExpiresAt.UTC(),
		Banned: a.Banned, CanReattest: a.CanReattest, Version: a.Version,
		NewSerial: a.NewSerial, NewExpiresAt: a.NewExpiresAt.UTC(),
	}
	for s := range a.Selectors.All() {
		rec.Selectors = append(rec.Selectors, s)
	}
	out, err := json.Marshal(rec)
	if err != nil {
		return nil, fmt.Errorf("encode agent %s: %w", a.ID, err)
	}
	return out, nil
}

func decodeAgent(row int64, content []byte) (*Agent, error) {
	var rec agentRecord
	if err := unmarshalStrict(content, &rec); err != nil {
		return nil, err
	}
	if rec.ID.IsZero() {
		return nil, errors.New("agent without ID")
	}
	return &Agent{
		Row: row, ID: rec.ID, AttestationType: rec.AttestationType, Serial: rec.Serial, ExpiresAt: rec.ExpiresAt,
		NewSerial: rec.NewSerial, NewExpiresAt: rec.NewExpiresAt,
		Selectors: attest.NewSelectors(rec.Selectors...), Banned: rec.Banned, CanReattest: rec.CanReattest, Version: rec.Version,
	}, nil
}
