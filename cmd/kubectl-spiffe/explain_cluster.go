package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/kube"
	"github.com/spiffe-node/spiffe-node/internal/adminapi/inspectpb"
)

// maxEvents is how many of a pod's warnings are shown.
const maxEvents = 5

// podView is what is known of a pod and its identity from all sides.
type podView struct {
	pod    corev1.Pod
	agent  kube.Part
	status *inspectpb.StatusResponse // nil: not told
	// explanations of its processes; none if the agent knows none.
	explanations []*inspectpb.Explanation
	silent       string // why the agent says nothing
	rules        []rule
	rulesUnknown string
	events       []corev1.Event
	registered   error // nil: the driver is on the pod's node
}

// explainPod puts together what the API server, the agent of the pod's node
// and the rules of registration say about a pod.
func (a *app) explainPod(ctx context.Context, arg string) error {
	cluster, err := a.openCluster()
	if err != nil {
		return err
	}
	ref, err := podArgument(arg, cluster.Namespace)
	if err != nil {
		return err
	}
	v := &podView{}
	if err := a.viewPod(ctx, cluster, ref, v); err != nil {
		return err
	}
	v.rules, err = rulesFor(ctx, cluster, &v.pod)
	if err != nil {
		v.rulesUnknown = err.Error()
	}
	if !v.connected() {
		v.registered = driverOnNode(ctx, cluster, &v.pod)
		v.events = warnings(ctx, cluster, &v.pod)
	}
	if a.output == formatJSON || a.output == formatYAML {
		out, err := v.plain()
		if err != nil {
			return err
		}
		return a.print(answer{value: out})
	}
	return a.printPod(v)
}

// viewPod reads the pod and what its node's agent says of it.
func (a *app) viewPod(ctx context.Context, cluster *kube.Cluster, ref podRef, v *podView) error {
	if err := cluster.Get(ctx, kube.PodsPath(ref.namespace)+"/"+url.PathEscape(ref.name), &v.pod); err != nil {
		return err
	}
	if v.pod.Spec.NodeName == "" {
		v.silent = "the pod is not scheduled yet"
		return nil
	}
	var err error
	if v.agent, err = cluster.AgentOf(ctx, a.place.installed, v.pod.Spec.NodeName); err != nil {
		v.silent = err.Error()
		return nil //nolint:nilerr // that there is no agent is the explanation
	}
	return a.connectAgent(ctx, cluster, v.agent, func(conn grpc.ClientConnInterface) error {
		client := inspectpb.NewInspectClient(conn)
		resp, err := client.Explain(ctx, podRequest(ref))
		switch {
		case status.Code(err) == codes.NotFound:
			v.silent = status.Convert(err).Message()
		case err != nil:
			return err
		}
		for _, x := range resp.GetExplanations() {
			// A pod of the same name may have been here before this one.
			if uid := x.GetCaller().GetPodUid(); uid == "" || uid == string(v.pod.UID) || isStatic(&v.pod) {
				v.explanations = append(v.explanations, x)
			}
		}
		if len(v.explanations) == 0 && v.silent == "" {
			v.silent = "the agent knows an earlier pod of this name only"
		}
		// Those who may only ask about their own pods are not told more.
		v.status, err = client.Status(ctx, &inspectpb.StatusRequest{})
		if status.Code(err) == codes.PermissionDenied {
			return nil
		}
		return err
	})
}

// isStatic says whether the pod's UID in the API is not the one on the node.
func isStatic(pod *corev1.Pod) bool {
	_, mirror := pod.Annotations[corev1.MirrorPodAnnotationKey]
	return mirror
}

// driverOnNode is an error if the kubelet of the pod's node does not know the
// driver, or nil if that cannot be told.
func driverOnNode(ctx context.Context, cluster *kube.Cluster, pod *corev1.Pod) error {
	driver, _ := workloadVolume(&pod.Spec)
	if driver == "" || pod.Spec.NodeName == "" {
		return nil
	}
	var node storagev1.CSINode
	if err := cluster.Get(ctx, "/apis/storage.k8s.io/v1/csinodes/"+url.PathEscape(pod.Spec.NodeName), &node); err != nil {
		return nil //nolint:nilerr // those who may not read it are told less
	}
	for _, d := range node.Spec.Drivers {
		if d.Name == driver {
			return nil
		}
	}
	return fmt.Errorf("the kubelet of node %s does not know the driver %s: does the spiffe-node pod run there?", pod.Spec.NodeName, driver)
}

func warnings(ctx context.Context, cluster *kube.Cluster, pod *corev1.Pod) []corev1.Event {
	all, err := kube.List[corev1.Event](ctx, cluster, "/api/v1/namespaces/"+pod.Namespace+"/events", "", "involvedObject.uid="+string(pod.UID)+",type=Warning")
	if err != nil {
		return nil
	}
	slices.SortStableFunc(all, func(x, y corev1.Event) int { return eventTime(x).Compare(eventTime(y)) })
	return all[max(0, len(all)-maxEvents):]
}

func eventTime(e corev1.Event) time.Time {
	switch {
	case !e.LastTimestamp.IsZero():
		return e.LastTimestamp.Time
	case e.Series != nil:
		return e.Series.LastObservedTime.Time
	}
	return e.EventTime.Time
}

// workloadVolume is the driver of the pod's SPIFFE volume, "" if it has none,
// and the containers that mount it.
func workloadVolume(spec *corev1.PodSpec) (driver string, containers []string) {
	for i := range spec.Volumes {
		csi := spec.Volumes[i].CSI
		if csi == nil || !isDriver(csi.Driver) {
			continue
		}
		driver = csi.Driver
		for _, c := range slices.Concat(spec.InitContainers, spec.Containers) {
			for _, m := range c.VolumeMounts {
				if m.Name == spec.Volumes[i].Name && !slices.Contains(containers, c.Name) {
					containers = append(containers, c.Name)
				}
			}
		}
	}
	return driver, containers
}

// verdict is one word and what to do next, for a pod whose processes the agent
// does not know.
func (v *podView) verdict() (word, next string) {
	if v.connected() {
		x := slices.MinFunc(v.explanations, func(x, y *inspectpb.Explanation) int {
			return cmp.Compare(severity(x.GetVerdict()), severity(y.GetVerdict()))
		})
		return x.GetVerdict(), x.GetNextStep()
	}
	driver, mounts := workloadVolume(&v.pod.Spec)
	started := slices.ContainsFunc(slices.Concat(v.pod.Status.InitContainerStatuses, v.pod.Status.ContainerStatuses), func(s corev1.ContainerStatus) bool {
		return s.State.Running != nil
	})
	switch {
	case v.pod.Status.Phase == corev1.PodSucceeded || v.pod.Status.Phase == corev1.PodFailed:
		return "ended", "the pod has ended; an ended pod needs no identity"
	case driver == "":
		return "no volume", "give the pod a volume {csi: {driver: csi.spiffe.io, readOnly: true}} and mount it, or have it injected; kubectl spiffe check istio knows the usual reasons"
	case len(mounts) == 0:
		return "not mounted", "no container mounts the volume: add a volumeMount"
	case v.pod.Spec.NodeName == "":
		return "not scheduled", "see kubectl describe pod for what the scheduler says"
	case v.registered != nil:
		return "no driver", v.registered.Error()
	case v.agent.Pod == "":
		return "no agent", v.silent
	case !started:
		return "not started", "no container runs yet; the warnings below, if any, say why"
	}
	if len(v.explanations) > 0 {
		return v.explanations[0].GetVerdict(), v.explanations[0].GetNextStep()
	}
	return notConnected, "the containers run but none has opened the socket: is the client's path that of the mount?"
}

// notConnected is the agent's word for a pod whose volume is mounted and none
// of whose processes has called.
const notConnected = "not connected"

// connected says whether the agent knows a process of the pod.
func (v *podView) connected() bool {
	return slices.ContainsFunc(v.explanations, func(x *inspectpb.Explanation) bool { return x.GetVerdict() != notConnected })
}

// severity orders verdicts, what needs attention first.
func severity(verdict string) int {
	return slices.Index([]string{"issued", "late", "over limit", "denied"}, verdict) * -1
}

// phases are the pod's steps as the API server tells them, to the second.
func (v *podView) phases() []*inspectpb.Explanation_Phase {
	var out []*inspectpb.Explanation_Phase
	add := func(name string, at time.Time, detail string) {
		if !at.IsZero() {
			out = append(out, &inspectpb.Explanation_Phase{Name: name, At: timestamppb.New(at), Detail: detail})
		}
	}
	add("created", v.pod.CreationTimestamp.Time, "")
	names := map[corev1.PodConditionType]string{
		corev1.PodScheduled: "scheduled", corev1.PodReadyToStartContainers: "sandbox made, volumes mounted", corev1.PodReady: "ready",
	}
	for _, c := range v.pod.Status.Conditions {
		if name := names[c.Type]; name != "" && c.Status == corev1.ConditionTrue {
			detail := ""
			if c.Type == corev1.PodScheduled {
				detail = "node " + v.pod.Spec.NodeName
			}
			add(name, c.LastTransitionTime.Time, detail)
		}
	}
	for _, s := range slices.Concat(v.pod.Status.InitContainerStatuses, v.pod.Status.ContainerStatuses) {
		switch {
		case s.State.Running != nil:
			add("container started", s.State.Running.StartedAt.Time, s.Name)
		case s.State.Terminated != nil:
			add("container started", s.State.Terminated.StartedAt.Time, s.Name+", has ended: "+s.State.Terminated.Reason)
		case s.State.Waiting != nil:
			out = append(out, &inspectpb.Explanation_Phase{Name: "container waits", Detail: s.Name + ": " + s.State.Waiting.Reason})
		}
	}
	slices.SortStableFunc(out, func(x, y *inspectpb.Explanation_Phase) int {
		return cmp.Or(cmp.Compare(untimed(x), untimed(y)), x.GetAt().AsTime().Compare(y.GetAt().AsTime()))
	})
	return out
}

func (v *podView) plain() (map[string]any, error) {
	word, next := v.verdict()
	out := map[string]any{
		"pod": v.pod.Namespace + "/" + v.pod.Name, "pod_uid": string(v.pod.UID), "node": v.pod.Spec.NodeName,
		"service_account": v.pod.Spec.ServiceAccountName, "verdict": word, "next_step": next,
	}
	if v.agent.Pod != "" {
		out["agent_pod"] = v.agent.Namespace + "/" + v.agent.Pod
	}
	resp, err := plain(answer{message: &inspectpb.ExplainResponse{Explanations: v.explanations}})
	if err != nil {
		return nil, err
	}
	phases, err := plain(answer{message: &inspectpb.Explanation{Phases: v.phases()}})
	if err != nil {
		return nil, err
	}
	m, ok := resp.(map[string]any)
	p, also := phases.(map[string]any)
	if !ok || !also {
		return nil, errors.New("the agent's answer cannot be shown in this format")
	}
	out["explanations"], out["phases"] = m["explanations"], p["phases"]
	out["rules"] = v.rules
	if v.rulesUnknown != "" {
		out["rules_unknown"] = v.rulesUnknown
	}
	var texts []string
	for _, e := range v.events {
		texts = append(texts, e.Reason+": "+e.Message)
	}
	out["warnings"] = texts
	return out, nil
}

func (a *app) printPod(v *podView) error {
	w := a.stdout
	word, next := v.verdict()
	fmt.Fprintf(w, "Pod %s/%s, service account %s, node %s\n", v.pod.Namespace, v.pod.Name,
		cmp.Or(v.pod.Spec.ServiceAccountName, "default"), cmp.Or(v.pod.Spec.NodeName, "(none)"))
	fmt.Fprintf(w, "Verdict: %s\n", word)
	if next != "" {
		fmt.Fprintln(w, "Next step:", clean(next))
	}
	if len(v.explanations) == 0 && v.silent != "" && v.silent != next {
		fmt.Fprintln(w, "The agent says:", clean(v.silent))
	}
	if err := printPhases(w, v.phases()); err != nil {
		return err
	}
	if len(v.events) > 0 {
		fmt.Fprint(w, "\nWarnings:\n")
		for _, e := range v.events {
			fmt.Fprintf(w, "  %s %s: %s\n", eventTime(e).Local().Format("15:04:05"), clean(e.Reason), clean(e.Message))
		}
	}
	if err := printRules(w, v.rules, v.rulesUnknown); err != nil {
		return err
	}
	if len(v.explanations) == 0 {
		return nil
	}
	fmt.Fprintln(w)
	return a.printExplanations(v.explanations)
}
