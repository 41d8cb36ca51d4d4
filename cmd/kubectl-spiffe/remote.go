package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/kube"
)

// dialTimeout bounds how long a connection through the cluster may take.
const dialTimeout = 20 * time.Second

// tunnelHello is what the far end of a tunnel says once it is through. What a
// container prints instead is no answer of a server.
const tunnelHello = "kubectl-spiffe tunnel 1"

// farCommands is where this program is in the images of spiffe-node, which may
// have no PATH.
var farCommands = []string{"/kubectl-spiffe", "kubectl-spiffe", "/opt/spire/bin/kubectl-spiffe"}

// place is which machine or cluster a command means.
type place struct {
	local        bool
	kube         kube.Config
	installed    string // namespace of spiffe-node
	onNode       string
	inspectAs    string
	socketChosen func() bool

	once    sync.Once
	cluster *kube.Cluster
	err     error

	lookOnce sync.Once
	answers  bool // the socket of this machine
}

func (p *place) register(flags *pflag.FlagSet) {
	flags.BoolVar(&p.local, "local", false, "Use the admin socket of this machine although there is a kubeconfig")
	flags.StringVar(&p.kube.Kubeconfig, "kubeconfig", "", "Path to the kubeconfig of the cluster")
	flags.StringVar(&p.kube.Context, "context", "", "Context of the kubeconfig")
	flags.StringVar(&p.kube.As, "as", "", "User to impersonate at the API server")
	flags.StringArrayVar(&p.kube.AsGroups, "as-group", nil, "Group to impersonate. Can be used more than once")
	flags.StringVar(&p.installed, "spiffe-namespace", "", "Namespace in which spiffe-node is installed (default: looked for)")
	flags.StringVar(&p.onNode, "on-node", "", "Talk to the agent of this node instead of the authority")
	flags.StringVar(&p.inspectAs, "inspect-service-account", "", "Service account (namespace/name) whose token an agent's Inspect port is shown (default: "+defaultInspectAccount+" beside the agent); none: use exec")
	p.socketChosen = func() bool { return flags.Changed("socketPath") }
}

// ofPods adds the flag of commands that are about pods. Others do without, or
// a mistyped -node would be the namespace "ode".
func (a *app) ofPods(cmd *cobra.Command) *cobra.Command {
	cmd.Flags().StringVarP(&a.place.kube.Namespace, "namespace", "n", "", "Namespace of the pods (default: the context's)")
	_ = cmd.RegisterFlagCompletionFunc("namespace", a.completeNamespaces) // the flag is there
	return cmd
}

// inCluster decides between this machine's socket and a cluster: a socket that
// was named wins, then a cluster that was named, by KUBECONFIG too. Where only
// the home directory has a kubeconfig, a socket that this user may open comes
// first: whoever is the owner of an agent on this machine means that one.
func (a *app) inCluster() bool {
	switch {
	case a.place.local || a.place.socketChosen() || a.instance != "" || a.getenv(envSocket) != "":
		return false
	case !a.hasCluster():
		return false
	case a.place.kube.Context != "" || a.place.kube.Kubeconfig != "" || a.getenv("KUBECONFIG") != "":
		return true
	}
	a.place.lookOnce.Do(func() {
		conn, err := net.DialTimeout("unix", a.socketPath, time.Second) //nolint:noctx // one look at a file
		if a.place.answers = err == nil; a.place.answers {
			_ = conn.Close()
		}
	})
	return !a.place.answers
}

// hasCluster says whether there is a cluster to speak to, for commands that are
// about nothing else.
func (a *app) hasCluster() bool {
	a.place.kube.Getenv = a.getenv
	return a.place.kube.Context != "" || a.place.kube.Kubeconfig != "" || len(a.place.kube.Files()) > 0
}

// openCluster reads the kubeconfig once.
func (a *app) openCluster() (*kube.Cluster, error) {
	p := &a.place
	p.once.Do(func() {
		p.kube.Getenv, p.kube.UserAgent = a.getenv, "kubectl-spiffe/"+version
		p.cluster, p.err = kube.Open(p.kube)
	})
	return p.cluster, p.err
}

// connectFar is connect through the cluster: to the authority, or with
// --on-node to an agent.
func (a *app) connectFar(ctx context.Context, use func(grpc.ClientConnInterface) error) error {
	cluster, err := a.openCluster()
	if err != nil {
		return err
	}
	var part kube.Part
	if a.place.onNode != "" {
		part, err = cluster.AgentOf(ctx, a.place.installed, a.place.onNode)
	} else {
		part, err = cluster.Authority(ctx, a.place.installed)
	}
	if err != nil {
		return err
	}
	conn, err := a.tunnel(ctx, cluster, part)
	if err != nil {
		return err
	}
	return errors.Join(use(conn), conn.Close())
}

// tunnel is a connection to the admin socket of a part, by exec.
func (a *app) tunnel(ctx context.Context, cluster *kube.Cluster, part kube.Part) (*grpc.ClientConn, error) {
	if !part.Running {
		return nil, fmt.Errorf("container %s of pod %s/%s does not run: see kubectl describe pod", part.Container, part.Namespace, part.Pod)
	}
	dial := func(ctx context.Context) (net.Conn, error) {
		var err error
		for _, command := range farCommands {
			var conn net.Conn
			if conn, err = openTunnel(ctx, cluster, part, command); !errors.Is(err, kube.ErrNoCommand) {
				return conn, err
			}
		}
		return nil, err
	}
	first, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	return grpc.NewClient("passthrough:///"+part.Pod, grpc.WithTransportCredentials(insecure.NewCredentials()), boundCalls(), onceThen(first, dial))
}

// onceThen has the first connection, made where its error can be shown as it
// is, used before others are.
func onceThen(first net.Conn, dial func(context.Context) (net.Conn, error)) grpc.DialOption {
	var mu sync.Mutex
	return grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		mu.Lock()
		conn := first
		first = nil
		mu.Unlock()
		if conn != nil {
			return conn, nil
		}
		return dial(ctx)
	})
}

func openTunnel(ctx context.Context, cluster *kube.Cluster, part kube.Part, command string) (net.Conn, error) {
	// The dialler's context ends with the dial, the connection outlives it.
	conn, err := cluster.Exec(context.WithoutCancel(ctx), part.Namespace, part.Pod, part.Container, command, "tunnel", "--local")
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	_ = conn.SetReadDeadline(time.Now().Add(dialTimeout)) // of a connection that has ended, Read knows why
	line, err := readLine(conn, 256)
	switch {
	case err != nil:
		return nil, errors.Join(err, conn.Close())
	case line != tunnelHello:
		return nil, errors.Join(fmt.Errorf("pod %s/%s answers %q, which is no kubectl-spiffe of this kind", part.Namespace, part.Pod, line), conn.Close())
	}
	_ = conn.SetReadDeadline(time.Time{})
	return conn, nil
}

// readLine reads byte by byte: what follows the line belongs to others.
func readLine(r io.Reader, limit int) (string, error) {
	var line []byte
	b := make([]byte, 1)
	for len(line) < limit {
		if _, err := io.ReadFull(r, b); err != nil {
			if errors.Is(err, io.EOF) && len(line) == 0 {
				err = errors.New("the connection was closed before a word was said")
			}
			return string(line), err
		}
		if b[0] == '\n' {
			return string(line), nil
		}
		line = append(line, b[0])
	}
	return string(line), nil
}

// tunnelCommand is the far end of tunnel, run in a container by exec.
func (a *app) tunnelCommand() *cobra.Command {
	cmd := command("tunnel", "Joins standard input and output to the admin socket", func(ctx context.Context) error {
		path, err := a.socket()
		if err != nil {
			return err
		}
		conn, err := (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "unix", strings.TrimPrefix(path, "unix://"))
		if err != nil {
			return err
		}
		stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
		defer stop()
		defer conn.Close()
		if _, err := fmt.Fprintln(a.stdout, tunnelHello); err != nil {
			return err
		}
		go func() {
			_, _ = io.Copy(conn, bufio.NewReader(a.stdin))
			// The caller is gone; nobody reads what would still come.
			_ = conn.Close()
		}()
		if _, err := io.Copy(a.stdout, conn); err != nil && !errors.Is(err, net.ErrClosed) {
			return err
		}
		return nil
	})
	cmd.Hidden = true
	return cmd
}
