package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
	"github.com/spiffe-node/spiffe-node/test/e2e/probe"
)

// socketBack waits until the agent's socket takes connections and returns how
// long that took: the server's part of an outage, without the clients' waits.
func socketBack(t *testing.T) time.Duration {
	t.Helper()
	begun := time.Now()
	err := cluster.Poll(within(t, time.Minute), 5*time.Millisecond, func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, "unix", node.NodePath(on.sockets+"/socket"))
		if err != nil {
			return err
		}
		return conn.Close()
	})
	if err != nil {
		t.Fatal(err)
	}
	return time.Since(begun).Round(time.Millisecond)
}

// explainSlow prints what a probe went through if a stream of it was down for
// longer than a fresh start and Envoy's first waits explain.
func explainSlow(t *testing.T, pod *cluster.Pod, log probe.Log, outages []time.Duration) {
	t.Helper()
	if len(outages) > 0 && (len(outages) != 2 || slices.Max(outages) > 8*time.Second) {
		for _, ev := range log[max(0, len(log)-15):] {
			t.Logf("pod %s: %s %s %s attempt %d %s %s", pod.Metadata.Name, ev.Time.Format("15:04:05.000"), ev.Kind, ev.Name, ev.Attempt, ev.Code, ev.Message)
		}
	}
}

// findProcess is the process on the node that runs the agent or the driver.
func findProcess(t *testing.T, name string) string {
	t.Helper()
	program := map[string]string{"agent": "/sds-agent", "driver": "/csi-driver", "authority": "/authority"}[name]
	pid, err := node.OnNode(within(t, 30*time.Second), "pgrep", "-o", "-f", "^"+program)
	if err != nil {
		t.Fatalf("finding the %s: %v", name, err)
	}
	return strings.TrimSpace(pid)
}

// killProcess returns when the process is gone.
func killProcess(t *testing.T, pid string) {
	t.Helper()
	ctx := within(t, 30*time.Second)
	if _, err := node.OnNode(ctx, "kill", "-KILL", pid); err != nil {
		t.Fatal(err)
	}
	err := cluster.Poll(ctx, time.Millisecond, func(context.Context) error {
		if _, err := os.Stat(node.NodePath("/proc/" + pid)); errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("process %s is still there", pid)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// killContainer kills the process of one of the product's containers; the
// kubelet starts it again, at once the first time, then with a back-off.
func killContainer(t *testing.T, name string) {
	t.Helper()
	killProcess(t, findProcess(t, name))
	kills[on.containers[name]]++
}

// kills are how often these tests have killed which container of the product's
// present pod.
var kills = map[string]int{}

// newProductPod says that the product's pod is a new one, or has been through a reboot.
func newProductPod(t *testing.T) {
	t.Helper()
	clear(kills)
	for _, cs := range agentPod(t).Status.ContainerStatuses {
		kills[cs.Name] = cs.RestartCount
	}
}

// noOtherRestarts checks that the product ended only when it was killed.
func noOtherRestarts(t *testing.T) {
	t.Helper()
	err := cluster.Poll(within(t, 30*time.Second), 100*time.Millisecond, func(context.Context) error {
		for _, cs := range agentPod(t).Status.ContainerStatuses {
			if cs.RestartCount != kills[cs.Name] {
				return fmt.Errorf("container %s has been started again %d times, and was killed %d times", cs.Name, cs.RestartCount, kills[cs.Name])
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// settled waits until every stream of the running pods is up, and returns how
// many outages each pod has had so far.
func settled(t *testing.T) map[string]int {
	t.Helper()
	outages := map[string]int{}
	for _, pod := range pods(t) {
		log := nodeLog(t, &pod, 2*time.Minute, func(log probe.Log) error {
			if n := log.Down(); n > 0 {
				return fmt.Errorf("%d streams are down", n)
			}
			return has("default", "ROOTCA")(log)
		})
		outages[pod.Metadata.Name] = len(log.Outages())
	}
	return outages
}

// outagesOver waits until at least n streams have ended and come back.
func outagesOver(n int) func(probe.Log) error {
	return func(log probe.Log) error {
		if have := len(log.Outages()); have < n {
			return fmt.Errorf("%d of %d streams are back: %v", have, n, log.Errors())
		}
		return nil
	}
}

// driverPublishes is how many NodePublishVolume calls the driver has answered.
func driverPublishes(t *testing.T) int {
	t.Helper()
	text, err := node.HTTP(within(t, 10*time.Second), "http://"+agentPod(t).Status.PodIP+on.driverHealth+"/metrics")
	if err != nil {
		t.Fatal(err)
	}
	total := 0
	for line := range strings.Lines(text) {
		if strings.HasPrefix(line, "spiffe_node_csi_") && strings.Contains(line, "NodePublishVolume") && strings.Contains(line, "_total") {
			fields := strings.Fields(line)
			if n, err := strconv.ParseFloat(fields[len(fields)-1], 64); err == nil {
				total += int(n)
			}
		}
	}
	return total
}
