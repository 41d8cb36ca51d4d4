package spireserver

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"github.com/spiffe-node/spiffe-node/internal/memstate"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// The agent's state is one file, agent.state, replaced whole:
//
//	spiffe-node agent 1 <sha256 of the rest, hex>\n
//	{"trust_domain": ..., "chain": [...], "key": ..., "reattestable": ..., "bundle": [...],
//	 "entries": [...]}
//
// A file that is of another version, does not match its checksum or says
// anything that cannot be true is renamed to agent.state.bad; one of another
// trust domain is ignored.
const (
	stateName   = "agent.state"
	stateHeader = "spiffe-node agent 1 "
	stateLimit  = 1 << 30 // bytes; more cannot be ours

	// stateDelay gathers changes into one write.
	stateDelay = 250 * time.Millisecond
)

// ErrOnDisk refuses a Config.StateDir that is not in memory.
var ErrOnDisk = memstate.ErrOnDisk

type stateFile struct {
	changed chan struct{}

	mu   sync.Mutex // one write at a time
	file *memstate.File
	id   *nodeSVID // the newest SVID
}

type agentState struct {
	TrustDomain  string   `json:"trust_domain"`
	Chain        [][]byte `json:"chain"`        // DER, leaf first
	Key          []byte   `json:"key"`          // PKCS#8
	Reattestable bool     `json:"reattestable"` // else the SVID is renewed
	Bundle       [][]byte `json:"bundle"`       // DER, to verify the server with
	Entries      [][]byte `json:"entries"`      // what the server listed last
}

// openState checks that a key may be put into dir.
func openState(dir, of string, anyFilesystem bool) (*stateFile, error) {
	file, err := memstate.Open(memstate.Config{
		Dir: dir, Name: stateName, Header: stateHeader, Limit: stateLimit, Of: of, AnyFilesystem: anyFilesystem,
	})
	if err != nil {
		return nil, fmt.Errorf("agent state: %w", err)
	}
	return &stateFile{file: file, changed: make(chan struct{}, 1)}, nil
}

// stateChanged has the state written soon.
func (c *Client) stateChanged() {
	if c.state != nil {
		signal(c.state.changed)
	}
}

// keepState writes the state whenever it changed.
func (c *Client) keepState(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			select {
			case <-c.state.changed:
				c.saveState(nil)
			default:
			}
			return
		case <-c.state.changed:
			start := time.Now()
			c.saveState(nil)
			// However much there is to write, it takes a tenth of the time.
			rest := time.NewTimer(max(stateDelay, 9*time.Since(start)))
			select {
			case <-ctx.Done():
			case <-rest.C:
			}
			rest.Stop()
		}
	}
}

// saveState writes the state, with a new SVID unless id is nil.
func (c *Client) saveState(id *nodeSVID) {
	if c.state == nil {
		return
	}
	c.state.mu.Lock()
	defer c.state.mu.Unlock()
	if id != nil {
		c.state.id = id
	}
	if c.state.id == nil {
		return
	}
	body, err := encodeState(c.cfg.TrustDomain.Name(), c.state.id, c.trustNow(), c.ledger.known())
	if err == nil {
		err = c.state.file.Write(body)
	}
	if err != nil {
		c.log.Error("agent state was not written; an agent restarted now has to attest anew", slog.Any("error", err))
	}
}

func (c *Client) trustNow() *x509bundle.Bundle {
	trust, _ := c.trusted()
	return trust
}

func encodeState(td string, id *nodeSVID, trust *x509bundle.Bundle, entries *entry.Set) ([]byte, error) {
	key, err := x509.MarshalPKCS8PrivateKey(id.PrivateKey)
	if err != nil {
		return nil, err
	}
	defer clear(key)
	s := agentState{TrustDomain: td, Key: key, Reattestable: id.reattestable}
	for _, cert := range id.Certificates {
		s.Chain = append(s.Chain, cert.Raw)
	}
	if trust != nil {
		for _, root := range trust.X509Authorities() {
			s.Bundle = append(s.Bundle, root.Raw)
		}
	}
	if entries != nil {
		for e := range entries.All() {
			data, err := e.MarshalBinary()
			if err != nil {
				return nil, err
			}
			s.Entries = append(s.Entries, data)
		}
	}
	return json.Marshal(s)
}

var errState = memstate.ErrUnusable

func decodeState(body []byte) (*agentState, error) {
	var s agentState
	dec := json.NewDecoder(bytes.NewReader(body))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&s); err != nil {
		// The decoder's error may quote what it read.
		return nil, fmt.Errorf("%w: malformed", errState)
	}
	return &s, nil
}

// restore takes over what the process before left. Whatever is wrong with it,
// the agent starts; what cannot be used is set aside.
func (c *Client) restore() {
	body, err := c.state.file.Read()
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if errors.Is(err, memstate.ErrOthers) {
		c.log.Warn("the agent's state was that of another server and is erased; the agent attests anew", slog.Any("error", err))
		return
	}
	if err == nil {
		err = c.adopt(body)
		clear(body)
	}
	if err == nil {
		return
	}
	bad, rename := c.state.file.SetAside()
	c.log.Error("agent state is not usable and was set aside; the agent attests anew",
		slog.String("kept_as", bad), slog.Any("error", errors.Join(err, rename)))
}

func (c *Client) adopt(body []byte) error {
	s, err := decodeState(body)
	if err != nil {
		return err
	}
	defer clear(s.Key)
	if s.TrustDomain != c.cfg.TrustDomain.Name() {
		c.log.Warn("agent state is of another trust domain and is ignored", slog.String("trust_domain", s.TrustDomain))
		return nil
	}
	parsed, err := x509.ParsePKCS8PrivateKey(s.Key)
	if err != nil {
		return fmt.Errorf("%w: key", errState)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return fmt.Errorf("%w: key", errState)
	}
	id, err := c.newNodeSVID(s.Chain, key, s.Reattestable)
	if err != nil {
		return err
	}
	var roots []*x509.Certificate
	for _, der := range s.Bundle {
		root, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("%w: bundle: %w", errState, err)
		}
		roots = append(roots, root)
	}
	var entries []*entry.Entry
	for _, data := range s.Entries {
		e := new(entry.Entry)
		if err := e.UnmarshalBinary(data); err != nil {
			return fmt.Errorf("%w: %w", errState, err)
		}
		if e.ID == "" || !e.SPIFFEID.MemberOf(c.cfg.TrustDomain) {
			return fmt.Errorf("%w: entry %q", errState, e.ID)
		}
		entries = append(entries, e)
	}
	c.ledger.restore(entries)
	if len(roots) > 0 {
		c.setTrust(x509bundle.FromX509Authorities(c.cfg.TrustDomain, roots), false)
	}
	if !time.Now().Before(id.expires()) {
		c.log.Warn("the agent's SVID of the process before has expired", slog.String("agent_id", id.ID.String()), slog.Time("expired", id.expires()))
	}
	if err := c.relink(id, 0); err != nil {
		return err
	}
	c.state.id = id
	c.identity.Set(id)
	c.met.expiry.Set(float64(id.expires().Unix()))
	c.log.Info("agent state loaded", slog.String("agent_id", id.ID.String()), slog.Time("expires", id.expires()))
	return nil
}
