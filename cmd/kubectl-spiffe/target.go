package main

import (
	"cmp"
	"fmt"
	"strings"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/kube"
)

// podRef names a pod.
type podRef struct{ namespace, name string }

func (r podRef) String() string { return r.namespace + "/" + r.name }

// podArgument reads pod/NAME, pods/NAME, po/NAME, NAMESPACE/NAME or NAME.
func podArgument(arg, namespace string) (podRef, error) {
	kind, name, ok := strings.Cut(arg, "/")
	switch {
	case !ok:
		name = arg
	case kind != "pod" && kind != "pods" && kind != "po":
		namespace = kind // as -pod takes it
	}
	if name == "" || namespace == "" || strings.Contains(name, "/") {
		return podRef{}, fmt.Errorf("%q names no pod: write pod/NAME, and the namespace with -n", arg)
	}
	return podRef{namespace, name}, nil
}

// completePods offers the pods of the namespace, as pod/NAME if that is how
// the word begins.
func (a *app) completePods(cmd *cobra.Command, args []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	if len(args) > 0 || !a.inCluster() {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	cluster, err := a.openCluster()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	pods, err := kube.List[corev1.Pod](cmd.Context(), cluster, kube.PodsPath(cluster.Namespace), "", "")
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var out []cobra.Completion
	for i := range pods {
		if name := "pod/" + pods[i].Name; strings.HasPrefix(name, word) {
			out = append(out, cobra.CompletionWithDesc(name, cmp.Or(string(pods[i].Status.Phase), "Unknown")))
		} else if word != "" && strings.HasPrefix(pods[i].Name, word) {
			out = append(out, pods[i].Name)
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}

// completeNamespaces offers the namespaces of the cluster.
func (a *app) completeNamespaces(cmd *cobra.Command, _ []string, word string) ([]cobra.Completion, cobra.ShellCompDirective) {
	cluster, err := a.openCluster()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	all, err := kube.List[corev1.Namespace](cmd.Context(), cluster, "/api/v1/namespaces", "", "")
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	var out []cobra.Completion
	for i := range all {
		if strings.HasPrefix(all[i].Name, word) {
			out = append(out, all[i].Name)
		}
	}
	return out, cobra.ShellCompDirectiveNoFileComp
}
