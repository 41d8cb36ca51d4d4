package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/check"
	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/kube"
	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/plan"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// planFlags are the flags of migrate plan.
type planFlags struct {
	files   []string
	entries string
	agent   string
	values  bool
}

func (a *app) migratePlanCommand() *cobra.Command {
	var f planFlags
	cmd := command("plan", "Says, node by node, how to move from SPIRE Agent and the SPIFFE CSI driver", func(ctx context.Context) error {
		return a.migratePlan(ctx, &f)
	})
	cmd.Long = "Looks at the cluster of the kubeconfig, or with -f at files (manifests, the output of kubectl get -o yaml), and says what runs, " +
		"what stands in the way, what to do node by node and how to go back, and with which values to install the chart. It changes nothing.\n\n" +
		"With the server's entries it also names the pods whose default identity depends on whose order is used: from a file that " +
		"spire-server entry show -output json has written (--entries), or from the server's socket (-socketPath).\n\n" +
		"The exit code is 1 if something stands in the way."
	cmd.Example = "  kubectl spiffe migrate plan\n" +
		"  kubectl exec -n spire-server spire-server-0 -c spire-server -- spire-server entry show -output json > entries.json\n" +
		"  kubectl spiffe migrate plan --entries entries.json\n  kubectl spiffe migrate plan --values > values.yaml"
	flags := cmd.Flags()
	flags.StringArrayVarP(&f.files, "filename", "f", nil, "File or directory to look at instead of the cluster; - is standard input. Can be used more than once")
	flags.StringVar(&f.entries, "entries", "", "File with the server's entries (spire-server entry show -output json); - is standard input")
	flags.StringVar(&f.agent, "agent", "", "The SPIRE Agent to plan for, as NAMESPACE/NAME of its DaemonSet, if there are several")
	flags.BoolVar(&f.values, "values", false, "Print nothing but the values for the chart spiffe-node, as YAML")
	return cmd
}

func (a *app) migratePlan(ctx context.Context, f *planFlags) error {
	in := plan.Input{Agent: f.agent}
	var err error
	if len(f.files) > 0 {
		in.Objects, err = a.planFiles(f.files)
	} else {
		err = a.planCluster(ctx, &in)
	}
	if err != nil {
		return err
	}
	if in.Entries, err = a.planEntries(ctx, f.entries); err != nil {
		return err
	}
	p := plan.Make(in)
	if f.values {
		if p.Values == nil {
			return fmt.Errorf("no values without a SPIRE Agent: %s", p.Blockers[0].What)
		}
		return writeYAML(a.stdout, p.Values)
	}
	err = a.print(answer{value: p, pretty: func() error { return a.printPlan(p) }, table: planTable(p)})
	if err == nil && len(p.Blockers) > 0 {
		err = fmt.Errorf("%s in the way: see the top of the plan", count(len(p.Blockers), "thing stands", "things stand"))
	}
	return err
}

// planFiles reads files, and those in directories.
func (a *app) planFiles(names []string) ([]check.Object, error) {
	var out []check.Object
	for _, name := range names {
		files := []string{name}
		if info, err := os.Stat(name); err == nil && info.IsDir() {
			files = nil
			for _, pattern := range []string{"*.yaml", "*.yml", "*.json"} {
				found, err := filepath.Glob(filepath.Join(name, pattern))
				if err != nil {
					return nil, err
				}
				files = append(files, found...)
			}
			slices.Sort(files)
		}
		for _, file := range files {
			data, err := a.readFile(file)
			if err != nil {
				return nil, err
			}
			objects, err := check.Parse(file, bytes.NewReader(data))
			if err != nil {
				return nil, err
			}
			out = append(out, objects...)
		}
	}
	if len(out) == 0 {
		return nil, errors.New("there is no object in these files")
	}
	return out, nil
}

// planCollections are what a plan looks at.
var planCollections = []collection{
	{"DaemonSet", "DaemonSets", "/apis/apps/v1/daemonsets", "", true},
	{"StatefulSet", "StatefulSets", "/apis/apps/v1/statefulsets", "", true},
	{"Deployment", "Deployments", "/apis/apps/v1/deployments", "", true},
	{"Pod", "Pods", "/api/v1/pods", "", true},
	{"Node", "Nodes", "/api/v1/nodes", "", true},
	{"CSIDriver", "CSIDrivers", "/apis/storage.k8s.io/v1/csidrivers", "", true},
	{"ConfigMap", "ConfigMaps of spiffe-node", "/api/v1/configmaps", "app.kubernetes.io/name=spiffe-node", false},
	{"RuntimeClass", "RuntimeClasses", "/apis/node.k8s.io/v1/runtimeclasses", "", false},
	{"ClusterSPIFFEID", "ClusterSPIFFEIDs", clusterSPIFFEIDsPath, "", false},
}

func (a *app) planCluster(ctx context.Context, in *plan.Input) error {
	a.place.kube.Getenv = a.getenv
	if a.place.local || a.place.kube.Kubeconfig == "" && a.place.kube.Context == "" && len(a.place.kube.Files()) == 0 {
		return errors.New("there is no kubeconfig to find a cluster by; files are named with -f")
	}
	cluster, err := a.openCluster()
	if err != nil {
		return err
	}
	in.Cluster, in.Unread = true, map[string]string{}
	if in.Objects, err = listAll(ctx, cluster, planCollections, in.Unread); err != nil {
		return err
	}
	for _, r := range plan.ConfigMaps(in.Objects) {
		var fields map[string]any
		switch err := cluster.Get(ctx, "/api/v1/namespaces/"+r.Namespace+"/configmaps/"+r.Name, &fields); {
		case err == nil:
			in.Objects = append(in.Objects, check.NewObject("ConfigMap", fields))
		case !kube.IsAbsent(err):
			in.Unread["ConfigMap "+r.Namespace+"/"+r.Name] = err.Error()
		}
	}
	return nil
}

// planEntries reads the server's entries, from a file or from the socket that
// was named; nil if neither was.
func (a *app) planEntries(ctx context.Context, file string) ([]*entry.Entry, error) {
	resp := &entrypb.ListEntriesResponse{}
	switch {
	case file != "":
		data, err := a.readFile(file)
		if err != nil {
			return nil, err
		}
		// exec may have put other lines before it.
		if i := bytes.IndexByte(data, '{'); i > 0 {
			data = data[i:]
		}
		if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(data, resp); err != nil {
			return nil, fmt.Errorf("%s: not what spire-server entry show -output json prints: %w", file, err)
		}
	case a.place.socketChosen() || a.instance != "" || a.getenv(envSocket) != "":
		err := a.connect(func(conn grpc.ClientConnInterface) (err error) {
			resp.Entries, err = listEntries(ctx, entrypb.NewEntryClient(conn), nil)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("error fetching entries: %w", err)
		}
	default:
		return nil, nil
	}
	out := make([]*entry.Entry, 0, len(resp.GetEntries()))
	for _, w := range resp.GetEntries() {
		e, err := entryOf(w)
		if err != nil {
			return nil, fmt.Errorf("entry %q: %w", w.GetId(), err)
		}
		out = append(out, e)
	}
	return out, nil
}

// entryOf is as much of an entry as matching looks at.
func entryOf(w *typespb.Entry) (*entry.Entry, error) {
	e := &entry.Entry{ID: w.GetId(), Hint: w.GetHint(), CreatedAt: time.Unix(w.GetCreatedAt(), 0)}
	var err error
	for _, id := range []struct {
		to   *spiffeid.ID
		from *typespb.SPIFFEID
	}{{&e.SPIFFEID, w.GetSpiffeId()}, {&e.ParentID, w.GetParentId()}} {
		td, terr := spiffeid.TrustDomainFromString(id.from.GetTrustDomain())
		if terr != nil {
			return nil, terr
		}
		if *id.to, err = spiffeid.FromPath(td, id.from.GetPath()); err != nil {
			return nil, err
		}
	}
	all := make([]selector.Selector, 0, len(w.GetSelectors()))
	for _, s := range w.GetSelectors() {
		sel, err := selector.New(s.GetType(), s.GetValue())
		if err != nil {
			return nil, err
		}
		all = append(all, sel)
	}
	e.Selectors = selector.NewSet(all...)
	return e, nil
}

func planTable(p *plan.Plan) func(t *table, wide bool) {
	return func(t *table, wide bool) {
		t.columns("NODE", "AGENT", "PODS WITH THE VOLUME", "PODS WITH THE HOST'S DIRECTORY")
		if wide {
			t.columns("PODS")
		}
		for _, n := range p.Nodes {
			cells := []string{n.Name, n.Agent, fmt.Sprint(len(n.Volumes)), fmt.Sprint(len(n.HostPaths))}
			if wide {
				cells = append(cells, strings.Join(append(slices.Clone(n.Volumes), n.HostPaths...), ","))
			}
			t.row(cells...)
		}
	}
}

// red is for what stands in the way; only a terminal gets it.
func (a *app) red(s string) string {
	f, ok := a.stdout.(*os.File)
	if !ok || a.getenv("NO_COLOR") != "" {
		return s
	}
	if info, err := f.Stat(); err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return s
	}
	return "\x1b[31m" + s + "\x1b[0m"
}

func (a *app) printPlan(p *plan.Plan) error {
	w := a.stdout
	for _, r := range p.Blockers {
		fmt.Fprintf(w, "%s %s\n  %s\n", a.red("In the way:"), clean(r.What), clean(r.Do))
	}
	for _, r := range p.Warnings {
		fmt.Fprintf(w, "To know: %s\n  %s\n", clean(r.What), clean(r.Do))
	}
	if len(p.Blockers)+len(p.Warnings) > 0 {
		fmt.Fprintln(w)
	}
	if err := printFound(w, p.Found); err != nil {
		return err
	}
	if len(p.Nodes) > 0 {
		fmt.Fprintln(w)
		t := &table{}
		planTable(p)(t, false)
		if err := t.write(w); err != nil {
			return err
		}
	}
	if err := a.printIdentities(p.Identities); err != nil {
		return err
	}
	for i, s := range p.Steps {
		fmt.Fprintf(w, "\n%d. %s\n", i+1, clean(s.Title))
		if s.Text != "" {
			fmt.Fprintf(w, "   %s\n", clean(s.Text))
		}
		for _, c := range s.Commands {
			fmt.Fprintf(w, "     %s\n", clean(c))
		}
	}
	if p.Values != nil {
		fmt.Fprint(w, "\nValues (kubectl spiffe migrate plan --values):\n\n")
		if err := writeYAML(w, p.Values); err != nil {
			return err
		}
		fmt.Fprint(w, "\nWhat will differ:\n")
		for _, d := range p.Differs {
			fmt.Fprintf(w, "- %s\n", d)
		}
	}
	return nil
}

func printFound(w io.Writer, f plan.Found) error {
	t := &table{}
	t.columns("PART", "FOUND")
	for _, row := range [][2]string{
		{"SPIRE Agent", f.Agent},
		{"its configuration", f.AgentConfig},
		{"its service account", f.AgentAccount},
		{"its node attestor", f.NodeAttestor},
		{"trust domain", f.TrustDomain},
		{"cluster name", f.ClusterName},
		{"socket on the host", hostSocket(f)},
		{"SPIFFE CSI driver", f.Driver},
		{"driver name", f.PluginName},
		{"CSIDriver object", f.CSIDriverObject},
		{"kubelet directory", f.KubeletPath},
		{"SPIRE Server", f.Server},
		{"its address", f.ServerAddress},
		{"trust bundle", f.BundleConfigMap},
		{"controller manager", f.ControllerManager},
		{"its class", f.ClassName},
	} {
		if row[1] == "" {
			row[1] = "not found"
		}
		t.row(row[0], row[1])
	}
	t.row("ClusterSPIFFEIDs", fmt.Sprint(f.ClusterSPIFFEIDs))
	return t.write(w)
}

func hostSocket(f plan.Found) string {
	if f.SocketDirectory == "" {
		return ""
	}
	return f.SocketDirectory + "/" + f.SocketName
}

func (a *app) printIdentities(i plan.Identities) error {
	if !i.Judged {
		fmt.Fprint(a.stdout, "\nDefault identities were not compared: give the server's entries with --entries or -socketPath.\n")
		return nil
	}
	fmt.Fprintf(a.stdout, "\nDefault identities: %s compared; several entries match: %d; the default depends on the order: %d.\n",
		count(i.Callers, "container", "containers"), i.Several, len(i.Change))
	if len(i.NotJudged) > 0 {
		fmt.Fprintf(a.stdout, "%s with unix selectors could not be judged from pods.\n", count(len(i.NotJudged), "entry", "entries"))
	}
	if len(i.Change) == 0 {
		return nil
	}
	t := &table{}
	t.columns("POD", "CONTAINERS", "SPIRE'S DEFAULT", "SPIFFE-NODE'S", "OF")
	for _, c := range i.Change {
		t.row(c.Pod, strings.Join(c.Containers, ","), c.SPIRE, c.Node, count(c.Matches, "entry", "entries"))
	}
	return t.write(a.stdout)
}
