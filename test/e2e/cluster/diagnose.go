package cluster

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"time"
)

// Diagnose writes what one wants to see after a failure: objects, events,
// container logs, the end of each component's log, mounts and processes.
func (c *Cluster) Diagnose(ctx context.Context, w io.Writer) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	section := func(title, text string, err error) {
		fmt.Fprintf(w, "===== %s\n%s\n", title, strings.TrimRight(text, "\n"))
		if err != nil {
			fmt.Fprintln(w, "(incomplete:", err, ")")
		}
	}
	for _, args := range []string{"get nodes,csinodes,csidrivers,pods -A -o wide", "describe pods -A", "get events -A --sort-by=.lastTimestamp"} {
		text, err := c.Kubectl(ctx, strings.Fields(args)...)
		section("kubectl "+args, text, err)
	}
	pods, err := c.Pods(ctx, "", "")
	if err != nil {
		section("pods", "", err)
	}
	for _, pod := range pods {
		for _, cs := range pod.Status.ContainerStatuses {
			text, err := c.Logs(ctx, pod.Metadata.Namespace, pod.Metadata.Name, cs.Name)
			section(fmt.Sprintf("log of %s/%s %s (restarts %d)", pod.Metadata.Namespace, pod.Metadata.Name, cs.Name, cs.RestartCount), string(tail([]byte(text), 100)), err)
		}
	}
	for _, name := range []string{"supervisor", "kubelet", "containerd"} {
		text, err := os.ReadFile(c.LogFile(name))
		section("end of "+name+".log", string(tail(text, 40)), err)
	}
	mounts, err := c.Mounts()
	var text strings.Builder
	for _, m := range mounts {
		if strings.HasPrefix(m.Point, "/var/lib/kubelet") {
			fmt.Fprintf(&text, "%s on %s type %s ro=%t\n", m.Root, m.Point, m.Type, m.ReadOnly)
		}
	}
	section("mounts below /var/lib/kubelet", text.String(), err)
	ps, err := c.OnNode(ctx, "ps", "axfo", "pid,ppid,rss,etimes,args")
	section("processes", ps, err)
}
