package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
)

// Join gives a running cluster one more node and returns when it is Ready: a
// kubelet, containerd and kube-proxy in namespaces of their own, with a network
// for its pods and a link to the first node's. number is 1 for the second node,
// and so on. Methods of the result that concern a node, such as
// [Cluster.OnNode] and [Cluster.Mounts], are about the new one; those that
// concern the API are the same for both. It must be closed before the first.
func Join(ctx context.Context, first *Cluster, number int) (*Cluster, error) {
	cfg := first.cfg
	cfg.Joins, cfg.Number, cfg.Detach = first.cfg.Dir, number, false
	cfg.Dir += "-" + strconv.Itoa(number)
	cfg.NodeName += "-" + strconv.Itoa(number)
	// What an earlier one has left; it ended with its cluster.
	if err := cfg.clean(ctx); err != nil {
		return nil, err
	}
	// The machine's place is the first node's. init expects a file all the same.
	lock, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	return cfg.up(ctx, lock, func(c *Cluster) error { return c.link(first) })
}

// link connects a node's network namespace with the first one's.
func (c *Cluster) link(first *Cluster) error {
	name := fmt.Sprintf("node%d", c.cfg.Number)
	type command struct {
		in   *Cluster
		args string
	}
	for _, cmd := range []command{
		{first, fmt.Sprintf("link add %s type veth peer name uplink netns %d", name, c.state.Init)},
		{first, "addr add " + c.cfg.uplink(1) + "/30 dev " + name},
		{first, "link set " + name + " up"},
		{c, "addr add " + c.cfg.uplink(2) + "/30 dev uplink"},
		{c, "link set uplink up"},
		{first, "route add " + c.cfg.podCIDR() + " via " + c.cfg.uplink(2)},
		{c, "route add " + first.cfg.podCIDR() + " via " + c.cfg.uplink(1)},
		// The first node has the addresses of the API server and of DNS; those of
		// services only need a route before kube-proxy's rules turn them into endpoints.
		{c, "route add " + serviceCIDR + " via " + c.cfg.uplink(1)},
	} {
		// Only the network: process IDs are the machine's.
		args := append([]string{"--target", strconv.Itoa(cmd.in.state.Init), "--net", "--", "ip"}, strings.Fields(cmd.args)...)
		if out, err := exec.Command("nsenter", args...).CombinedOutput(); err != nil {
			return fmt.Errorf("linking node %s: ip %s: %w: %s", c.cfg.NodeName, cmd.args, err, strings.TrimSpace(string(out)))
		}
	}
	return nil
}
