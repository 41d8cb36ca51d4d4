package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/kube"
	"github.com/spiffe-node/spiffe-node/internal/adminapi/inspectpb"
)

// agentsAtOnce is how many agents are asked at the same time.
const agentsAtOnce = 8

// nodeStatus is one node's agent as it was found.
type nodeStatus struct {
	part        kube.Part
	status      *inspectpb.StatusResponse
	connections []*inspectpb.Connection
	err         error
}

// clusterStatus shows every node's agent, and the callers from the namespace
// meant or from all.
func (a *app) clusterStatus(ctx context.Context, everywhere bool) error {
	cluster, err := a.openCluster()
	if err != nil {
		return err
	}
	parts, err := cluster.Agents(ctx, a.place.installed)
	if err != nil {
		return err
	}
	parts = slices.DeleteFunc(kube.Current(parts), func(p kube.Part) bool { return a.place.onNode != "" && p.Node != a.place.onNode })
	if len(parts) == 0 {
		return errors.New("no agent of spiffe-node runs in this cluster; a socket of this machine is meant with --local or -socketPath")
	}
	nodes := a.nodeStatuses(ctx, cluster, parts)
	namespace := cluster.Namespace
	if everywhere {
		namespace = ""
	}
	var failed []error
	for i := range nodes {
		nodes[i].connections = slices.DeleteFunc(nodes[i].connections, func(c *inspectpb.Connection) bool {
			return namespace != "" && c.GetCaller().GetPodNamespace() != namespace
		})
		if nodes[i].err != nil {
			failed = append(failed, fmt.Errorf("node %s: %w", nodes[i].part.Node, nodes[i].err))
		}
	}
	keys, problem := a.clusterRotation(ctx)
	if err := a.printNodes(nodes, namespace, keys, problem); err != nil {
		return err
	}
	return errors.Join(failed...)
}

// nodeStatuses asks several agents at a time.
func (a *app) nodeStatuses(ctx context.Context, cluster *kube.Cluster, parts []kube.Part) []nodeStatus {
	nodes := make([]nodeStatus, len(parts))
	var group errgroup.Group
	group.SetLimit(agentsAtOnce)
	for i, part := range parts {
		group.Go(func() error {
			nodes[i] = a.nodeStatus(ctx, cluster, part)
			return nil
		})
	}
	_ = group.Wait() // each node has its own error
	return nodes
}

func (a *app) nodeStatus(ctx context.Context, cluster *kube.Cluster, part kube.Part) nodeStatus {
	n := nodeStatus{part: part}
	n.err = a.connectAgent(ctx, cluster, part, func(conn grpc.ClientConnInterface) error {
		client := inspectpb.NewInspectClient(conn)
		var err error
		if n.status, err = client.Status(ctx, &inspectpb.StatusRequest{}); err != nil {
			return err
		}
		list, err := client.ListConnections(ctx, &inspectpb.ListConnectionsRequest{})
		n.connections = list.GetConnections()
		return err
	})
	return n
}

// clusterRotation asks the authority in the cluster how its keys stand. Without
// one of ours, or the right to ask it, the rest of the status is shown alone.
func (a *app) clusterRotation(ctx context.Context) (keys *inspectpb.ShowRotationResponse, problem error) {
	if a.place.onNode != "" {
		return nil, nil //nolint:nilnil // one node was asked for
	}
	problem = a.connectFar(ctx, func(conn grpc.ClientConnInterface) (err error) {
		keys, err = rotation(ctx, conn)
		return err
	})
	return keys, problem
}

func (a *app) printNodes(nodes []nodeStatus, namespace string, keys *inspectpb.ShowRotationResponse, problem error) error {
	if a.output == formatJSON || a.output == formatYAML {
		out := make([]any, len(nodes))
		for i, n := range nodes {
			v, err := n.plain()
			if err != nil {
				return err
			}
			out[i] = v
		}
		all := map[string]any{"nodes": out}
		if keys != nil {
			v, err := plain(answer{message: keys})
			if err != nil {
				return err
			}
			if m, ok := v.(map[string]any); ok {
				all["rotations"] = m["rotations"]
			}
		}
		return a.print(answer{value: all})
	}
	now, wide := time.Now(), a.output == formatWide
	t := &table{}
	t.columns("NODE", "READY", "AUTHORITY", "CA EXPIRES IN", "ENTRIES", "CONNECTIONS", "PARKED", "UP", "VERSION")
	if wide {
		t.columns("AGENT ID", "POD", "CALLERS BY", "CA")
	}
	for _, n := range nodes {
		t.row(n.cells(now, wide)...)
	}
	if err := t.write(a.stdout); err != nil {
		return err
	}
	for _, n := range nodes {
		for _, w := range n.status.GetWarnings() {
			fmt.Fprintf(a.stdout, "Warning: node %s: %s\n", n.part.Node, clean(w))
		}
	}
	switch {
	case problem != nil:
		fmt.Fprintf(a.stdout, "The authority's keys are not shown: %s\n", clean(problem.Error()))
	case keys != nil:
		fmt.Fprintln(a.stdout)
		printRotation(a.stdout, keys, now)
	}
	t = &table{}
	connectionColumns(t, wide)
	for _, n := range nodes {
		connectionRows(t, n.connections, now, wide)
	}
	if len(t.rows) == 0 {
		where := "any namespace"
		if namespace != "" {
			where = "namespace " + namespace + "; -A shows all"
		}
		fmt.Fprintf(a.stdout, "\nNobody is connected from %s.\n", where)
		return nil
	}
	fmt.Fprintln(a.stdout)
	return t.write(a.stdout)
}

func (n nodeStatus) cells(now time.Time, wide bool) []string {
	st := n.status
	if n.err != nil {
		cells := []string{n.part.Node, "no: cannot be asked"}
		if wide {
			cells = append(cells, "", "", "", "", "", "", "", "", n.part.Namespace+"/"+n.part.Pod)
		}
		return cells
	}
	ready := "yes"
	if !n.part.Ready {
		ready = "no"
	}
	auth := st.GetAuthority()
	cells := []string{
		n.part.Node, ready, auth.GetKind() + " " + auth.GetState(), until(auth.GetX509AuthorityExpiresAt(), now), fmt.Sprint(st.GetEntries()),
		fmt.Sprint(st.GetConnections()), fmt.Sprint(st.GetParked()), since(st.GetStartedAt(), now), st.GetVersion(),
	}
	if wide {
		cells = append(cells, st.GetAgentId(), n.part.Namespace+"/"+n.part.Pod, st.GetPeerIdentification(), shorten(auth.GetX509AuthorityId()))
	}
	return cells
}

func (n nodeStatus) plain() (map[string]any, error) {
	out := map[string]any{"node": n.part.Node, "pod": n.part.Namespace + "/" + n.part.Pod, "ready": n.part.Ready}
	if n.err != nil {
		out["error"] = n.err.Error()
		return out, nil //nolint:nilerr // it is part of the answer
	}
	status, err := plain(answer{message: n.status})
	if err != nil {
		return nil, err
	}
	conns, err := plain(answer{message: &inspectpb.ListConnectionsResponse{Connections: n.connections}})
	if err != nil {
		return nil, err
	}
	out["status"] = status
	if m, ok := conns.(map[string]any); ok {
		out["connections"] = m["connections"]
	}
	return out, nil
}
