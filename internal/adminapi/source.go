package adminapi

import (
	"context"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

// Source is what the agent knows of itself and its callers, for the Inspect
// service. Its structs have no place for private keys and must not be given
// any. Safe for concurrent use; each call answers with a picture of the
// moment and must not wait for anything outside the process.
type Source interface {
	// Status is the agent at a glance.
	Status(ctx context.Context) (*Status, error)
	// Connections are those of the public socket, oldest first.
	Connections(ctx context.Context) ([]Connection, error)
	// Explain says what each process of the target gets or lacks. The error
	// wraps ErrNotFound, with a text for the user, if nothing is known of it.
	Explain(ctx context.Context, target Target) ([]Explanation, error)
}

// Status is the agent at a glance.
type Status struct {
	TrustDomain        string
	AgentID            string
	Version            string
	StartedAt          time.Time
	Mode               string // kubernetes or unix
	PeerIdentification string // pidfd, or the fallback and why
	Authority          AuthorityStatus
	Entries            int64
	Connections        int64
	Streams            int64
	Parked             int64
	Limits             []Limit
	Sockets            []string
	Warnings           []string // what an operator should know, one sentence each
	// Trust is how far the own trust bundle has got on this node.
	Trust authority.TrustReport
}

// AuthorityStatus says who signs and for how long.
type AuthorityStatus struct {
	Kind              string // embedded or spire-server
	State             string // ready, starting, degraded
	Detail            string
	X509AuthorityID   string // lowercase hex subject key ID
	X509AuthorityEnds time.Time
	JWTAuthorityID    string
	JWTAuthorityEnds  time.Time
}

// Limit is one limit with how much of it is used.
type Limit struct {
	Name string
	Used int64
	Max  int64
}

// CallerInfo is a process as it was bound.
type CallerInfo struct {
	PID            int32
	UID            uint32
	GID            uint32
	PodUID         string
	PodNamespace   string
	PodName        string
	ServiceAccount string
	ContainerID    string
	Witnesses      []string
	Selectors      attest.Selectors
	// Denied is the reason if the caller was refused for good, else empty.
	Denied string
}

// Connection is one connection to the public socket.
type Connection struct {
	ID      uint64
	Caller  CallerInfo
	Since   time.Time
	Streams []Stream
}

// Stream is one stream or waiting call of a connection. Zero times are things
// that have not happened.
type Stream struct {
	API         string // sds, sds-delta, x509-svid, x509-bundles, jwt-bundles
	Since       time.Time
	Names       []string // asked for; empty = all
	Late        []string // exist for this caller but have no value yet
	Unknown     []string // mean nothing to this caller
	ParkedSince time.Time
	Served      []Served
	Version     string
	LastPush    time.Time
	LastACK     time.Time
	LastNACK    time.Time
	NACKText    string
}

// Served is one secret a stream has been given. Bundles have no serial.
type Served struct {
	Name      string
	SPIFFEID  string
	Serial    string
	ExpiresAt time.Time
}

// Target names a process by its PID in the agent's namespace, or a pod.
type Target struct {
	PID          int32
	PodNamespace string
	PodName      string
}

// The verdicts of an Explanation.
const (
	VerdictIssued    = "issued"
	VerdictLate      = "late"
	VerdictDenied    = "denied"
	VerdictOverLimit = "over limit"
	// VerdictNotConnected: the pod's volume is mounted, and no process of it
	// has opened the socket.
	VerdictNotConnected = "not connected"
)

// Explanation says what one process gets and why.
type Explanation struct {
	Caller      CallerInfo
	Verdict     string
	NextStep    string // what the reader can do, one sentence; empty if nothing needs doing
	Phases      []Phase
	Matches     []Match // default identity first
	Nearest     []Near  // only if nothing matches
	Connections []Connection
}

// Phase is a step on the way from connecting to being served.
type Phase struct {
	Name   string // connected, bound, selectors, matched, signed, served
	At     time.Time
	Detail string
}

// Match is an entry the caller matches, with its SVID or why there is none.
type Match struct {
	EntryID   string
	SPIFFEID  string
	ParentID  string
	Selectors attest.Selectors
	Hint      string
	Default   bool
	Serial    string // decimal; empty = not signed yet
	NotBefore time.Time
	ExpiresAt time.Time
	LastError string
}

// Near is an entry the caller almost matches.
type Near struct {
	EntryID   string
	SPIFFEID  string
	Selectors attest.Selectors
	Missing   []attest.Selector
}
