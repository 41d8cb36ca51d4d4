package podinfo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"time"

	"github.com/spiffe-node/spiffe-node/internal/durable"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

const (
	// stateVersion is the format of the file; another one is not read.
	stateVersion = 1
	// saveAfter is how long changes are gathered before they are written.
	saveAfter = 2 * time.Second
	// maxState bounds the file, in bytes.
	maxState = 64 << 20
)

// saved is the file of facts that outlives the process: what was known when the
// API server was last there. It holds no secrets. The first complete answer of
// the server or the kubelet replaces it all.
type saved struct {
	Version int        `json:"version"`
	Node    string     `json:"node"`
	Pods    []savedPod `json:"pods"`
}

type savedPod struct {
	Key            string           `json:"key"`
	UID            string           `json:"uid"`
	Static         bool             `json:"static,omitempty"`
	Namespace      string           `json:"namespace"`
	Name           string           `json:"name"`
	ServiceAccount string           `json:"serviceAccount,omitempty"`
	Witness        string           `json:"witness"`
	Selectors      []string         `json:"selectors,omitempty"`
	Containers     []savedContainer `json:"containers,omitempty"`
}

type savedContainer struct {
	ID        string   `json:"id"`
	Name      string   `json:"name"`
	Selectors []string `json:"selectors,omitempty"`
}

// restore takes over what an earlier process saved. A file that cannot be read
// is as good as none: the server knows better anyway.
func (s *Source) restore() {
	all, err := load(s.cfg.StateFile, s.cfg.Node)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return
	case err != nil:
		s.log.Warn("saved pod facts are not used", slog.Any("error", err))
		return
	}
	for _, f := range all {
		s.store.put(f.key, f, time.Time{})
	}
	s.log.Info("pod facts restored", slog.Int("pods", len(all)))
}

func load(path, node string) ([]*facts, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxState {
		return nil, fmt.Errorf("%s has %d bytes, the most is %d", path, info.Size(), maxState)
	}
	if err := durable.CheckOwnerFile(path); err != nil {
		return nil, err
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var in saved
	if err := json.Unmarshal(data, &in); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if in.Version != stateVersion || in.Node != node {
		return nil, fmt.Errorf("%s is of version %d and node %q, not %d and %q", path, in.Version, in.Node, stateVersion, node)
	}
	out := make([]*facts, 0, len(in.Pods))
	for _, p := range in.Pods {
		f := &facts{key: p.Key, uid: p.UID, static: p.Static, pod: attest.Pod{
			UID: p.UID, Namespace: p.Namespace, Name: p.Name, ServiceAccount: p.ServiceAccount, NodeName: node, Witness: p.Witness,
		}}
		if p.Key == "" || p.UID == "" || (p.Witness != witnessWatch && p.Witness != witnessKubelet) {
			return nil, fmt.Errorf("%s: a pod without a UID or a witness", path)
		}
		if f.pod.Selectors, err = parse(p.Selectors); err != nil {
			return nil, fmt.Errorf("%s: pod %s: %w", path, p.UID, err)
		}
		for _, c := range p.Containers {
			sel, err := parse(c.Selectors)
			if err != nil {
				return nil, fmt.Errorf("%s: pod %s: %w", path, p.UID, err)
			}
			f.containers = append(f.containers, attest.Container{ID: c.ID, Name: c.Name, Selectors: sel})
		}
		if !slices.IsSortedFunc(f.containers, byID) {
			return nil, fmt.Errorf("%s: pod %s: its containers are not in order", path, p.UID)
		}
		out = append(out, f)
	}
	return out, nil
}

func parse(list []string) ([]attest.Selector, error) {
	out := make([]attest.Selector, len(list))
	var err error
	for i, text := range list {
		if out[i], err = attest.ParseSelector(text); err != nil {
			return nil, err
		}
	}
	return out, nil
}

func format(list []attest.Selector) []string {
	out := make([]string, len(list))
	for i, s := range list {
		out[i] = s.String()
	}
	return out
}

// save writes what is known.
func (s *Source) save() error {
	out := saved{Version: stateVersion, Node: s.cfg.Node}
	for _, f := range s.store.all() {
		p := savedPod{
			Key: f.key, UID: f.uid, Static: f.static, Namespace: f.pod.Namespace, Name: f.pod.Name,
			ServiceAccount: f.pod.ServiceAccount, Witness: f.pod.Witness, Selectors: format(f.pod.Selectors),
		}
		for _, c := range f.containers {
			p.Containers = append(p.Containers, savedContainer{ID: c.ID, Name: c.Name, Selectors: format(c.Selectors)})
		}
		out.Pods = append(out.Pods, p)
	}
	data, err := json.Marshal(out)
	if err != nil {
		return err
	}
	return durable.WriteFile(s.cfg.StateFile, data, 0o600)
}

// keep saves changes until ctx ends, and once more then.
func (s *Source) keep(ctx context.Context) {
	failed := false
	write := func() {
		err := s.save()
		if err != nil && !failed {
			s.log.Warn("pod facts cannot be saved for the next start", slog.Any("error", err))
		}
		failed = err != nil
	}
	for {
		select {
		case <-ctx.Done():
			select {
			case <-s.dirty:
				write()
			default:
			}
			return
		case <-s.dirty:
		}
		select {
		case <-ctx.Done():
		case <-time.After(saveAfter):
		}
		write()
	}
}
