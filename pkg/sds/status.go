package sds

import "time"

// StreamStatus is what an operator may see of one open stream. It holds no key
// material.
type StreamStatus struct {
	// ID is unique within the process; Peer is what Config.PeerID said.
	ID   uint64
	Peer uint64
	// Kind is "sotw" or "delta".
	Kind     string
	OpenedAt time.Time
	// All says that everything was asked for; Names are those asked for by
	// name.
	All   bool
	Names []string
	// Late are names the client waits for, some since LateSince; zero if it
	// waits for nothing.
	Late      []string
	LateSince time.Time
	// Unknown are names that are no secret of ours.
	Unknown []string
	// Version (SotW only) and Nonce are those of the last response.
	Version string
	Nonce   string
	SentAt  time.Time
	// Served are the secrets the client has been sent.
	Served []Served
	// AckedAt and AckedNonce are the last acknowledgement.
	AckedAt    time.Time
	AckedNonce string
	// NackedAt, NackedNonce and NackText are the last rejection; the text is
	// the client's.
	NackedAt    time.Time
	NackedNonce string
	NackText    string
}

// Served is one secret a client has been sent.
type Served struct {
	Name    string
	Version string
	// EntryID and Serial are empty for bundles.
	EntryID string
	Serial  string
}

// state is the part of a status the protocol keeps.
func (c *core) state(out *StreamStatus) {
	out.All = c.wildcard && c.started
	out.Names, out.Late, out.Unknown = c.names(), c.late(), c.unknown()
	if c.nonces > 0 {
		out.Nonce = c.nonce()
	}
	for _, it := range c.items {
		out.Served = append(out.Served, Served{Name: it.name, Version: it.version, EntryID: it.entryID, Serial: it.serial})
	}
}

func (s *stream) state(out *StreamStatus) {
	s.core.state(out)
	out.Version = s.version
}

// Streams is the status of all open streams, in no order. It never waits for a
// client.
func (s *Server) Streams() []StreamStatus {
	s.mu.Lock()
	open := make([]*call, 0, len(s.open))
	for c := range s.open {
		open = append(open, c)
	}
	s.mu.Unlock()
	out := make([]StreamStatus, len(open))
	for i, c := range open {
		c.status(&out[i])
	}
	return out
}
