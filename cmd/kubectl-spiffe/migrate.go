package main

import (
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"go.yaml.in/yaml/v3"

	"github.com/spiffe-node/spiffe-node/internal/migrate/agentconf"
)

func (a *app) migrateCommand() *cobra.Command {
	return group("migrate", "Moves a cluster or a machine from SPIRE Agent", a.migrateConfigCommand(), a.migratePlanCommand())
}

func (a *app) migrateConfigCommand() *cobra.Command {
	var expand bool
	cmd := &cobra.Command{
		Use:   "config FILE",
		Short: "Translates a SPIRE Agent's configuration into an sds-agent's",
		Long: "Translates a SPIRE Agent's configuration (HCL, or JSON as its Helm chart writes it) into an sds-agent's.\n\n" +
			"The configuration goes to standard output, the account of every key to standard error: what it became, why it is not needed, " +
			"or what to do instead. -o json prints both in one object, -o table the account alone. The exit code is 1 if a key is unknown " +
			"or the sds-agent would refuse the result as it is. FILE may be - for standard input.",
		Example: "  kubectl spiffe migrate config agent.conf > sds-agent.yaml\n" +
			"  kubectl get configmap -n spire-system spire-agent -o jsonpath='{.data.agent\\.conf}' | kubectl spiffe migrate config -",
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return a.migrateConfig(args[0], expand) },
	}
	cmd.Flags().BoolVar(&expand, "expandEnv", false, "Expand $NAME and ${NAME} in the file from the environment, as SPIRE Agent's -expandEnv does")
	return cmd
}

func (a *app) migrateConfig(name string, expand bool) error {
	data, err := a.readFile(name)
	if err != nil {
		return err
	}
	var opt agentconf.Options
	if expand {
		opt.Getenv = func(name string) (string, bool) {
			v := a.getenv(name)
			return v, v != ""
		}
	}
	r, err := agentconf.Translate(data, opt)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	var configuration any
	if err := yaml.Unmarshal(r.YAML, &configuration); err != nil {
		return err
	}
	value := map[string]any{"configuration": configuration, "account": r.Items, "unset": r.Unset}
	if r.Refused != nil {
		value["refused"] = r.Refused.Error()
	}
	if a.output == formatYAML {
		a.output = formatPretty // it is YAML that pretty prints
	}
	err = a.print(answer{
		value: value,
		pretty: func() error {
			if err := printAccount(a.stderr, name, r); err != nil {
				return err
			}
			_, err := a.stdout.Write(r.YAML)
			return err
		},
		table: func(t *table, _ bool) {
			t.columns("LINE", "KEY", "OUTCOME", "BECOMES", "WHY, OR WHAT TO DO")
			for _, i := range r.Items {
				t.row(line(i), i.Key, string(i.Outcome), i.To, i.Text)
			}
		},
	})
	return errors.Join(err, judgeAccount(r))
}

func line(i agentconf.Item) string {
	if i.Line == 0 {
		return ""
	}
	return fmt.Sprint(i.Line)
}

// printAccount is for people, the worst first.
func printAccount(w io.Writer, name string, r *agentconf.Result) error {
	for _, v := range r.Unset {
		fmt.Fprintf(w, "%s: $%s is not set in this environment and became empty.\n", clean(name), clean(v))
	}
	for _, part := range []struct {
		outcome agentconf.Outcome
		title   string
	}{
		{agentconf.Unknown, "Unknown keys"},
		{agentconf.Unsupported, "Not supported, and what to do"},
		{agentconf.NotNeeded, "Not needed"},
		{agentconf.Translated, "Translated"},
	} {
		t, n := &table{}, 0
		t.columns("LINE", "KEY", "BECOMES", "REMARK")
		for _, i := range r.Items {
			if i.Outcome == part.outcome {
				t.row(line(i), i.Key, i.To, i.Text)
				n++
			}
		}
		if n == 0 {
			continue
		}
		fmt.Fprintf(w, "%s:\n", part.title)
		if err := t.write(w); err != nil {
			return err
		}
		fmt.Fprintln(w)
	}
	return nil
}

// judgeAccount is the error for what an operator must see to.
func judgeAccount(r *agentconf.Result) error {
	var errs []error
	unknown := 0
	for _, i := range r.Items {
		if i.Outcome == agentconf.Unknown {
			unknown++
		}
	}
	if unknown > 0 {
		errs = append(errs, fmt.Errorf("%s: see the account", count(unknown, "unknown key", "unknown keys")))
	}
	if r.Refused != nil {
		errs = append(errs, fmt.Errorf("the sds-agent would not take this yet: %s", strings.ReplaceAll(r.Refused.Error(), "\n", "; ")))
	}
	return errors.Join(errs...)
}
