package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/check"
	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/kube"
)

// checkFlags are the flags of check.
type checkFlags struct {
	files          []string
	driver         string
	trustDomain    string
	istioNamespace string
}

func (a *app) checkCommand() *cobra.Command {
	var f checkFlags
	cmd := &cobra.Command{
		Use:   "check [istio | uninstall]",
		Short: "Finds what keeps pods from their identities, in a cluster or in files",
		Long: "Finds what keeps pods from their identities: in the cluster of the kubeconfig, or with -f in files that were not applied yet " +
			"(manifests, the output of helm template, values files of Istio and of spiffe-node, an IstioOperator).\n\n" +
			"check looks at the driver, the nodes and the pods; check istio also at the mesh, its injection templates and the pods' annotations. " +
			"check uninstall names the pods that would hang if the driver went now, and says what stays. " +
			"It changes nothing. The exit code is 1 if there are errors.",
		Example: "  kubectl spiffe check istio\n  kubectl spiffe check istio -f istio-values.yaml -f spiffe-values.yaml -f app.yaml\n" +
			"  helm template app ./chart | kubectl spiffe check istio -f -\n  kubectl spiffe check uninstall && helm delete -n spire-server spire",
		Args:      cobra.MatchAll(cobra.MaximumNArgs(1), cobra.OnlyValidArgs),
		ValidArgs: []cobra.Completion{cobra.CompletionWithDesc("istio", "the rules of Istio too"), cobra.CompletionWithDesc("uninstall", "what would hang without the driver")},
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.check(cmd.Context(), &f, strings.Join(args, ""))
		},
	}
	flags := cmd.Flags()
	flags.StringArrayVarP(&f.files, "filename", "f", nil, "File to check instead of the cluster; - is standard input. Can be used more than once")
	flags.StringVar(&f.driver, "driver", "", "Name of the CSI driver (default: every name that is csi.spiffe.io or ends in .csi.spiffe.io)")
	flags.StringVar(&f.trustDomain, "trust-domain", "", "Trust domain of the identities (default: what the agents or the files say)")
	flags.StringVar(&f.istioNamespace, "istio-namespace", "istio-system", "Namespace of istiod")
	return cmd
}

func (a *app) check(ctx context.Context, f *checkFlags, what string) error {
	in := check.Input{Driver: f.driver, TrustDomain: f.trustDomain, Istio: what == "istio"}
	rules := check.Run
	if what == "uninstall" {
		rules = check.Uninstall
	}
	var err error
	switch {
	case len(f.files) > 0:
		err = a.readFiles(f.files, &in)
	case !a.place.local && a.hasCluster():
		err = a.readCluster(ctx, f, &in, what)
	default:
		err = errors.New("there is no kubeconfig to find a cluster by; files are named with -f")
	}
	if err != nil {
		return err
	}
	findings := rules(in)
	errs, warns := 0, 0
	for _, x := range findings {
		switch x.Severity {
		case check.Error:
			errs++
		case check.Warning:
			warns++
		case check.Note:
		}
	}
	err = a.print(answer{
		value: map[string]any{"findings": append([]check.Finding{}, findings...), "errors": errs, "warnings": warns},
		pretty: func() error {
			for _, x := range findings {
				where := cmp.Or(clean(x.Where), "Cluster")
				if x.Source != "" {
					where += " (" + clean(x.Source) + ")"
				}
				fmt.Fprintf(a.stdout, "%s [%s] %s\n  %s\n  Fix: %s\n", x.Severity, x.Rule, where, clean(x.What), clean(x.Fix))
			}
			fmt.Fprintf(a.stdout, "%s, %s in %s.\n", count(errs, "error", "errors"), count(warns, "warning", "warnings"), count(len(in.Objects), "object", "objects"))
			return nil
		},
		table: func(t *table, wide bool) {
			t.columns("SEVERITY", "RULE", "WHERE", "WHAT", "FIX")
			if wide {
				t.columns("SOURCE")
			}
			for _, x := range findings {
				cells := []string{string(x.Severity), x.Rule, x.Where, x.What, x.Fix}
				if wide {
					cells = append(cells, x.Source)
				}
				t.row(cells...)
			}
		},
	})
	if err == nil && errs > 0 {
		err = fmt.Errorf("%s found", count(errs, "error", "errors"))
	}
	return err
}

func (a *app) readFiles(files []string, in *check.Input) error {
	for _, name := range files {
		err := func() error {
			if name == "-" {
				objects, err := check.Parse("-", a.stdin)
				in.Objects = append(in.Objects, objects...)
				return err
			}
			file, err := os.Open(name)
			if err != nil {
				return err
			}
			defer file.Close()
			objects, err := check.Parse(name, io.Reader(file))
			in.Objects = append(in.Objects, objects...)
			return err
		}()
		if err != nil {
			return err
		}
	}
	if len(in.Objects) == 0 {
		return errors.New("there is no object in these files")
	}
	return nil
}

// collections are what check reads of a cluster.
func collections(namespace, istioNamespace string, istio bool) []collection {
	in := ""
	if namespace != "" {
		in = "/namespaces/" + namespace
	}
	out := []collection{
		{"Pod", "Pods", "/api/v1" + in + "/pods", "", true},
		{"Deployment", "Deployments", "/apis/apps/v1" + in + "/deployments", "", true},
		{"StatefulSet", "StatefulSets", "/apis/apps/v1" + in + "/statefulsets", "", true},
		{"DaemonSet", "DaemonSets", "/apis/apps/v1" + in + "/daemonsets", "", true},
		{"Namespace", "Namespaces", "/api/v1/namespaces", "", false},
		{"CSIDriver", "CSIDrivers", "/apis/storage.k8s.io/v1/csidrivers", "", true},
		{"CSINode", "CSINodes", "/apis/storage.k8s.io/v1/csinodes", "", true},
		{"ClusterSPIFFEID", "ClusterSPIFFEIDs", clusterSPIFFEIDsPath, "", true},
		{"ConfigMap", "ConfigMaps of spiffe-node", "/api/v1/configmaps", "app.kubernetes.io/name=spiffe-node", false},
	}
	if istio {
		out = append(out, collection{"ConfigMap", "ConfigMaps of Istio", "/api/v1/namespaces/" + istioNamespace + "/configmaps", "", true})
		if namespace != "" {
			out = append(out, collection{"Deployment", "Deployments of Istio", "/apis/apps/v1/namespaces/" + istioNamespace + "/deployments", "", true})
		}
	}
	return out
}

// collection is one kind of object and where it is listed.
type collection struct {
	kind, title, path, labels string
	// needed says whether findings are missed without it.
	needed bool
}

func (a *app) readCluster(ctx context.Context, f *checkFlags, in *check.Input, what string) error {
	cluster, err := a.openCluster()
	if err != nil {
		return err
	}
	in.Cluster, in.Unread = true, map[string]string{}
	// Only a namespace that was asked for: what is wrong is seldom where one is.
	all := collections(a.place.kube.Namespace, f.istioNamespace, in.Istio)
	if what == "uninstall" {
		all = []collection{
			{"Pod", "Pods", kube.PodsPath(a.place.kube.Namespace), "", true},
			{"StatefulSet", "StatefulSets of spiffe-node", "/apis/apps/v1/statefulsets", "app.kubernetes.io/name=spiffe-node", false},
		}
	}
	if in.Objects, err = listAll(ctx, cluster, all, in.Unread); err != nil {
		return err
	}
	if what != "uninstall" {
		a.askAgents(ctx, cluster, in)
	}
	return nil
}

// listAll reads collections side by side. Those that the user may not read and
// that matter go to unread; kinds that do not exist are empty.
func listAll(ctx context.Context, cluster *kube.Cluster, all []collection, unread map[string]string) ([]check.Object, error) {
	found := make([][]map[string]any, len(all))
	errs := make([]error, len(all))
	var group errgroup.Group
	group.SetLimit(4)
	for i, c := range all {
		group.Go(func() error {
			found[i], errs[i] = kube.List[map[string]any](ctx, cluster, c.path, c.labels, "")
			return nil
		})
	}
	_ = group.Wait() // each has its own error
	var out []check.Object
	for i, c := range all {
		switch err := errs[i]; {
		case kube.IsAbsent(err):
		case kube.IsForbidden(err):
			if c.needed {
				unread[c.title] = err.Error()
			}
		case err != nil:
			return nil, fmt.Errorf("%s: %w", c.title, err)
		}
		for _, fields := range found[i] {
			out = append(out, check.NewObject(c.kind, fields))
		}
	}
	return out, nil
}

// askAgents adds what the agents know: the trust domain, and who has been
// served. Agents that cannot be asked leave their pods unjudged.
func (a *app) askAgents(ctx context.Context, cluster *kube.Cluster, in *check.Input) {
	parts, err := cluster.Agents(ctx, a.place.installed)
	if err != nil {
		in.Unread["the agents"] = err.Error()
		return
	}
	nodes := a.nodeStatuses(ctx, cluster, kube.Current(parts))
	identities, asked := map[string]check.Identity{}, map[string]bool{}
	for _, n := range nodes {
		if n.err != nil {
			in.Unread["the agent of node "+n.part.Node] = n.err.Error()
			continue
		}
		asked[n.part.Node] = true
		in.TrustDomain = cmp.Or(in.TrustDomain, n.status.GetTrustDomain())
		for _, c := range n.connections {
			caller := c.GetCaller()
			name := caller.GetPodNamespace() + "/" + caller.GetPodName()
			id := identities[name]
			id.Denied = cmp.Or(id.Denied, caller.GetDenied())
			for _, s := range c.GetStreams() {
				for _, v := range s.GetServed() {
					id.Served = id.Served || v.GetSerial() != ""
				}
			}
			identities[name] = id
		}
	}
	in.Identities, in.Asked = identities, asked
}
