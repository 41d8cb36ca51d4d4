package e2e_test

import (
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
)

// testBurst creates many registered pods at once.
func testBurst(t *testing.T) {
	t.Helper()
	count := 50
	if testing.Short() {
		count = 10
	}
	namespace(t, "burst", "web")
	register(t, "burst", "web")
	begun := time.Now()
	made := make([]*cluster.Pod, count)
	posted := make([]time.Time, count)
	var group sync.WaitGroup
	for i := range made {
		group.Go(func() {
			pod, err := node.CreatePod(t.Context(), "burst", probePod("web-"+strconv.Itoa(i), "web"))
			if err != nil {
				t.Error(err)
				return
			}
			made[i], posted[i] = pod, time.Now()
		})
	}
	group.Wait()
	if t.Failed() {
		return
	}
	var fromStart, fromPost []time.Duration
	var last time.Time
	refusals := 0
	for i, pod := range made {
		log := nodeLog(t, pod, 4*time.Minute, has("default", "ROOTCA"))
		own, _ := log.First("default")
		ca, _ := log.First("ROOTCA")
		both := own
		if ca.Time.After(own.Time) {
			both = ca
		}
		fromStart = append(fromStart, both.SinceStart)
		fromPost = append(fromPost, both.Time.Sub(posted[i]))
		refusals += len(log.Errors())
		if both.Time.After(last) {
			last = both.Time
		}
	}
	t.Logf("%d pods at once: all have both secrets after %s", count, last.Sub(begun).Round(time.Millisecond))
	t.Logf("container start -> both: %s", quantiles(fromStart))
	t.Logf("POST -> both:            %s", quantiles(fromPost))
	if refusals > 0 {
		t.Errorf("%d streams ended before they had their secret", refusals)
	}
	t.Logf("agent and driver: %s", memory(t))
	if n := len(volumeMounts(t, "")); n < count {
		t.Errorf("%d mounts for %d pods", n, count)
	}
	begun = time.Now()
	for _, pod := range made {
		group.Go(func() {
			if err := node.DeletePod(t.Context(), "burst", pod.Metadata.Name, -1); err != nil {
				t.Error(err)
			}
		})
	}
	group.Wait()
	for _, pod := range made {
		if err := node.WaitGone(within(t, 3*time.Minute), "burst", pod.Metadata.Name, pod.Metadata.UID); err != nil {
			t.Fatal(err)
		}
		gone(t, pod)
	}
	t.Logf("%d pods deleted at once: all gone after %s", count, time.Since(begun).Round(time.Millisecond))
}

// memory is the resident memory of the product's processes.
func memory(t *testing.T) string {
	t.Helper()
	out, err := node.OnNode(within(t, 30*time.Second), "sh", "-c",
		`for p in /sds-agent /csi-driver; do for n in $(pgrep -f "^$p"); do echo "$p $(grep -E 'VmRSS|RssAnon' /proc/$n/status | tr -s '\t ' ' ' | tr '\n' ' ')"; done; done | tr '\n' ' '`)
	if err != nil {
		t.Fatal(err)
	}
	return out
}
