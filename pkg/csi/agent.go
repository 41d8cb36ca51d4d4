package csi

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/mount"
)

// AgentCheck says what must be true of the agent before a volume is published.
type AgentCheck string

// The checks. What a check does not find is answered Unavailable, so that the
// kubelet tries again and the pod's containers start with a socket that works.
const (
	// CheckConnect: a socket in the directory takes connections.
	CheckConnect AgentCheck = "connect"
	// CheckExists: a socket is in the directory.
	CheckExists AgentCheck = "exists"
	// CheckOff: the directory is enough, as with spiffe-csi.
	CheckOff AgentCheck = "off"
)

// answerFor is how long one answer of the agent counts for further publishes
// of the same directory. A refusal never does.
const answerFor = time.Second

type agentCheck struct {
	mode  AgentCheck
	names []string

	mu    sync.Mutex
	id    mount.FileID
	until time.Time
}

func newAgentCheck(mode AgentCheck, names []string) (*agentCheck, error) {
	switch mode {
	case "":
		mode = CheckConnect
	case CheckConnect, CheckExists, CheckOff:
	default:
		return nil, fmt.Errorf("agent check %q is none of %s, %s, %s", mode, CheckConnect, CheckExists, CheckOff)
	}
	if len(names) == 0 && mode != CheckOff {
		return nil, fmt.Errorf("agent check %s needs a socket name", mode)
	}
	return &agentCheck{mode: mode, names: names}, nil
}

// mountSource opens a socket directory whatever state it is in.
func mountSource(dir string) (*mount.Source, error) { return mount.OpenSource(dir) }

// openSource opens the live socket directory; errors are answers to the
// kubelet.
func (d *Driver) openSource() (*mount.Source, error) {
	src, err := mountSource(d.cfg.SourceDir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil, status.Errorf(codes.Unavailable, "the agent's socket directory %s does not exist yet: is sds-agent running on this node, and is the directory mounted into the driver?", d.cfg.SourceDir)
	case err != nil:
		return nil, status.Errorf(codes.Internal, "the agent's socket directory: %v", err)
	}
	if src.Deleted() {
		src.Close()
		return nil, status.Errorf(codes.Unavailable, "the agent's socket directory %s was deleted on the host after it was mounted into the driver: the driver's container must be started again", d.cfg.SourceDir)
	}
	src.UseCopies(&d.copies)
	return src, nil
}

// check asks of the directory what the configuration wants of the agent;
// errors are answers to the kubelet.
func (a *agentCheck) check(src *mount.Source) error {
	if a.mode == CheckOff {
		return nil
	}
	a.mu.Lock()
	fresh := a.id == src.ID() && time.Now().Before(a.until)
	a.mu.Unlock()
	if fresh {
		return nil
	}
	if err := a.answers(src); err != nil {
		return status.Errorf(codes.Unavailable, "the agent does not serve yet in %s: %v; the kubelet will try again", src.Path(), err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.id, a.until = src.ID(), time.Now().Add(answerFor)
	return nil
}

// answers is nil if one of the names is a socket that takes connections, or
// only a socket if that is enough.
func (a *agentCheck) answers(src *mount.Source) error {
	var reasons []string
	for _, name := range a.names {
		path := src.ProcPath() + "/" + name
		var err error
		if a.mode == CheckExists {
			err = isSocket(path)
		} else {
			err = connects(path)
		}
		if err == nil {
			return nil
		}
		reasons = append(reasons, name+": "+err.Error())
	}
	return errors.New(strings.Join(reasons, ", "))
}

func isSocket(path string) error {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFSOCK {
		return unix.ENOTSOCK
	}
	return nil
}

// connects opens a connection and closes it. The kernel completes it on its
// own, so this never waits; a full backlog counts as an answer, for somebody
// is listening.
func connects(path string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	err = unix.Connect(fd, &unix.SockaddrUnix{Name: path})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINPROGRESS) {
		return nil
	}
	return err
}
