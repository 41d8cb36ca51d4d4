package attest

import (
	"errors"
	"log/slog"
)

// Caller is the process at the other end of a connection, as the kernel
// recorded it when the process called connect(2). PIDs are numbers in the
// agent's PID namespace and mean something only while Process is alive.
type Caller struct {
	PID     int32
	UID     uint32
	GID     uint32
	Process Process
}

// Process is a hold on one process that cannot be confused with a later one of
// the same number. Safe for concurrent use.
type Process interface {
	// Alive is nil while the process that called connect(2) still runs;
	// otherwise the error wraps ErrDenied.
	Alive() error
}

// ErrDenied is the refusal of a caller for good: witnesses that disagree, a
// dead caller, policy. What is merely late is never ErrDenied.
var ErrDenied = errors.New("denied")

// Pod is what is known of the pod a caller belongs to. Empty fields are not
// known yet.
type Pod struct {
	UID            string
	Namespace      string
	Name           string
	ServiceAccount string
	NodeName       string
	// Selectors are further k8s selectors of the pod as a whole (labels,
	// owners, images), from sources that know them.
	Selectors []Selector
	// Witness names the source of these facts: "ledger", "watch".
	Witness string
}

// PodSource is a witness of the pods on this node. Safe for concurrent use.
type PodSource interface {
	// Pod is what is known of the pod with this UID now; false if nothing is.
	Pod(uid string) (Pod, bool)
	// Watch calls notify, from any goroutine and possibly more than once,
	// after what Pod answers for uid has changed, until stop is called.
	// notify must not block.
	Watch(uid string, notify func()) (stop func())
}

// Subject is the bound caller as consumers see it: the binding is decided once
// per connection, the selectors follow the pod. *Binding implements it. Safe
// for concurrent use.
type Subject interface {
	// Selectors are the caller's selectors now.
	Selectors() Selectors
	// Watch calls notify after Selectors may have changed, until stop is
	// called. notify must not block.
	Watch(notify func()) (stop func())
	// LimitKey groups callers that share a limit: the pod UID, or the user
	// outside pods.
	LimitKey() string
	// LogAttrs are the facts about the caller that are safe to log: never a
	// selector value a user can put a secret into.
	LogAttrs() []slog.Attr
}
