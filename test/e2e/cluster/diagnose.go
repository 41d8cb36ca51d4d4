package cluster

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// Diagnose writes what one wants to see after a failure: objects, events,
// container logs, the end of each component's log, mounts and processes. It
// does what it can when the API server is away.
func (c *Cluster) Diagnose(ctx context.Context, w io.Writer) {
	section := func(title, text string, err error) {
		fmt.Fprintf(w, "===== %s\n%s\n", title, strings.TrimRight(text, "\n"))
		if err != nil {
			fmt.Fprintln(w, "(incomplete:", err, ")")
		}
	}
	for _, args := range []string{"get nodes,csinodes,csidrivers,pods -A -o wide", "describe pods -A", "get events -A --sort-by=.lastTimestamp"} {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		text, err := c.Kubectl(ctx, append(strings.Fields(args), "--request-timeout=5s")...)
		cancel()
		section("kubectl "+args, text, err)
	}
	root := c.NodePath("/var/log/pods")
	logs, err := filepath.Glob(filepath.Join(root, "*", "*", "*.log"))
	section("container logs, of deleted pods too while the kubelet keeps them", "", err)
	for _, file := range logs {
		text, err := os.ReadFile(file)
		section(strings.TrimPrefix(file, root), string(tail(text, 60)), err)
	}
	for _, name := range []string{"supervisor", "kubelet", "containerd"} {
		text, err := os.ReadFile(c.LogFile(name))
		section("end of "+name+".log", string(tail(text, 60)), err)
	}
	mounts, err := c.Mounts()
	var text strings.Builder
	for _, m := range mounts {
		if strings.HasPrefix(m.Point, "/var/lib/kubelet") {
			fmt.Fprintf(&text, "%s on %s type %s ro=%t\n", m.Root, m.Point, m.Type, m.ReadOnly)
		}
	}
	section("mounts below /var/lib/kubelet", text.String(), err)
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	ps, err := c.OnNode(ctx, "ps", "axfo", "pid,ppid,rss,etimes,args")
	section("processes", ps, err)
}
