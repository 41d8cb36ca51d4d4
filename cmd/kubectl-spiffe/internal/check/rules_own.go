package check

import (
	"fmt"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/spire"
)

// own judges whether spiffe-node's own containers run, and says why they do not
// in their own words.
func (w *world) own() {
	for i := range w.carriers {
		c := &w.carriers[i]
		if !c.isPod || c.meta.Labels[spire.OwnLabel] != spire.OwnName || c.meta.DeletionTimestamp != nil {
			continue
		}
		for _, s := range slices.Concat(c.status.InitContainerStatuses, c.status.ContainerStatuses) {
			why := notRunning(s)
			if why == "" {
				continue
			}
			if c.spec.NodeName != "" {
				why += " (node " + c.spec.NodeName + ")"
			}
			w.add(Error, "not-running", c.object, fmt.Sprintf("kubectl logs -n %s %s -c %s --previous; kubectl describe pod -n %[1]s %[2]s.", c.object.Namespace, c.object.Name, s.Name), "container %s %s", s.Name, why)
		}
	}
}

// notRunning says why a container does not run; "" for one that does, or is on
// its way.
func notRunning(s corev1.ContainerStatus) string {
	ended := s.LastTerminationState.Terminated
	switch waiting := s.State.Waiting; {
	case s.State.Terminated != nil && s.State.Terminated.ExitCode != 0:
		ended = s.State.Terminated
	case waiting == nil || waiting.Reason == "ContainerCreating" || waiting.Reason == "PodInitializing":
		return ""
	case ended == nil:
		return strings.TrimSuffix("waits: "+waiting.Reason+": "+waiting.Message, ": ")
	}
	why := fmt.Sprintf("ends again and again, %d times so far, with exit code %d", s.RestartCount, ended.ExitCode)
	if s.RestartCount == 0 {
		why = fmt.Sprintf("ended with exit code %d", ended.ExitCode)
	}
	if last := lastLine(ended.Message); last != "" {
		return why + ": " + last
	}
	if ended.Reason != "" && ended.Reason != "Error" {
		return why + ": " + ended.Reason
	}
	return why
}

// lastLine is the last line of a termination message, which is the end of the
// log: there the daemons say why they end.
func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}
