package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	"github.com/spiffe-node/spiffe-node/internal/adminapi/inspectpb"
)

func (a *app) explainCommand() *cobra.Command {
	var pid int32
	var pod string
	cmd := &cobra.Command{
		Use:   "explain [pod/NAME]",
		Short: "Explains which identity a process or pod gets, or what it lacks",
		Example: "  kubectl spiffe explain pod/web-0 -n shop\n" +
			"  kubectl-spiffe explain -pid 4711 -socketPath /run/spiffe-node/admin/api.sock",
		Args:              cobra.MaximumNArgs(1),
		ValidArgsFunction: a.completePods,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				if pod != "" || pid != 0 {
					return errors.New("name one process or one pod")
				}
				pod = args[0]
			}
			return a.explain(cmd.Context(), pid, pod)
		},
	}
	cmd.Flags().Int32Var(&pid, "pid", 0, "A process, by its number in the agent's PID namespace")
	cmd.Flags().StringVar(&pod, "pod", "", "A pod, as namespace/name")
	return cmd
}

func (a *app) explain(ctx context.Context, pid int32, pod string) error {
	switch {
	case pid != 0 && pod != "":
		return errors.New("name one process or one pod")
	case pid == 0 && pod == "":
		return errors.New("name a pod with pod/NAME or -pod namespace/name, or a process with -pid")
	case pid != 0 && a.inCluster():
		return a.explainFar(ctx, pid)
	case pid != 0:
		return a.explainHere(ctx, &inspectpb.ExplainRequest{Target: &inspectpb.ExplainRequest_Pid{Pid: pid}})
	case a.inCluster():
		return a.explainPod(ctx, pod)
	}
	ref, err := podArgument(pod, a.place.kube.Namespace)
	if err != nil {
		return err
	}
	return a.explainHere(ctx, podRequest(ref))
}

func podRequest(ref podRef) *inspectpb.ExplainRequest {
	return &inspectpb.ExplainRequest{Target: &inspectpb.ExplainRequest_Pod{Pod: &inspectpb.ExplainRequest_PodRef{Namespace: ref.namespace, Name: ref.name}}}
}

// explainHere asks the agent of this machine.
func (a *app) explainHere(ctx context.Context, req *inspectpb.ExplainRequest) error {
	return a.connect(func(conn grpc.ClientConnInterface) error { return a.explainOver(ctx, conn, req) })
}

// explainFar asks the agent of another node for one of its processes.
func (a *app) explainFar(ctx context.Context, pid int32) error {
	if a.place.onNode == "" {
		return errors.New("a process is of a node: name it with --on-node")
	}
	cluster, err := a.openCluster()
	if err != nil {
		return err
	}
	part, err := cluster.AgentOf(ctx, a.place.installed, a.place.onNode)
	if err != nil {
		return err
	}
	return a.connectAgent(ctx, cluster, part, func(conn grpc.ClientConnInterface) error {
		return a.explainOver(ctx, conn, &inspectpb.ExplainRequest{Target: &inspectpb.ExplainRequest_Pid{Pid: pid}})
	})
}

func (a *app) explainOver(ctx context.Context, conn grpc.ClientConnInterface, req *inspectpb.ExplainRequest) error {
	resp, err := inspectpb.NewInspectClient(conn).Explain(ctx, req)
	if err != nil {
		return err
	}
	return a.print(answer{message: resp, pretty: func() error { return a.printExplanations(resp.GetExplanations()) }})
}

func (a *app) printExplanations(all []*inspectpb.Explanation) error {
	now := time.Now()
	for i, x := range all {
		if i > 0 {
			fmt.Fprintln(a.stdout)
		}
		if err := printExplanation(a.stdout, x, now); err != nil {
			return err
		}
	}
	return nil
}
