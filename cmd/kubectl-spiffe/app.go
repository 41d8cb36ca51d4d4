package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// system is what a command touches of the world besides files and sockets.
type system struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	getenv         func(string) string
}

// app is one invocation.
type app struct {
	system
	socketPath string
	instance   string
	output     format
	place      place
	ctx        context.Context // of the whole invocation
}

// run is the whole program; it returns the exit code.
func run(ctx context.Context, args []string, sys system) int {
	a := &app{system: sys, output: formatPretty, ctx: ctx}
	root := a.rootCommand() //nolint:contextcheck // commands get the context when they run
	root.SetArgs(normalizeArgs(root, args))
	root.SetIn(sys.stdin)
	root.SetOut(sys.stdout)
	root.SetErr(sys.stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return 0
	}
	fmt.Fprintln(sys.stderr, "Error:", err)
	a.hint(err)
	return 1
}

// hint adds what the server's text cannot know.
func (a *app) hint(err error) {
	var s interface{ GRPCStatus() *status.Status }
	if !errors.As(err, &s) {
		return
	}
	switch st := s.GRPCStatus(); {
	case a.inCluster():
		if st.Code() == codes.Unauthenticated || st.Code() == codes.PermissionDenied {
			fmt.Fprintln(a.stderr, "Administrators who may exec into the agent's pod can go without its Inspect port: --inspect-service-account none.")
		}
	case st.Code() == codes.Unavailable && strings.Contains(st.Message(), "permission denied"):
		fmt.Fprintln(a.stderr, "The admin socket is open to its owner only: run this as the agent's user, usually root.")
	case st.Code() == codes.Unavailable:
		fmt.Fprintln(a.stderr, "Nothing answers on the admin socket. Is sds-agent running on this node? Another socket is named with -socketPath.")
	case st.Code() == codes.Unimplemented && strings.Contains(st.Message(), "spiffe.node.inspect"):
		fmt.Fprintln(a.stderr, "This is not the admin socket of an sds-agent: a SPIRE Server does not know the node's callers.")
	}
}

func (a *app) rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "kubectl-spiffe",
		Short: "Register and inspect SPIFFE identities",
		Long: "Register and inspect SPIFFE identities.\n\n" +
			"With a kubeconfig, entry, bundle, agent and the like go to the authority in the cluster, explain, secret and status to the agents of its nodes. " +
			"With -socketPath, --local or no kubeconfig, all go to the admin socket of this machine.\n\n" +
			"Flags may be written with one dash or two: -spiffeID is --spiffeID.",
		SilenceErrors: true,
		SilenceUsage:  true,
		Annotations:   map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl spiffe"},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return fmt.Errorf("%w\nSee '%s -h'", err, cmd.CommandPath())
	})
	flags := root.PersistentFlags()
	flags.StringVar(&a.socketPath, "socketPath", defaultSocket, "Path to the admin API socket")
	flags.StringVar(&a.instance, "instance", "", "Instance name to substitute into socket templates (env "+envSocketTemplate+").")
	flags.VarP(&a.output, "output", "o", "Desired output format (pretty, json, yaml, table, wide)")
	a.place.register(flags)
	_ = root.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]cobra.Completion{"pretty", "json", "yaml", "table", "wide"}, cobra.ShellCompDirectiveNoFileComp)) // the flag is there
	root.AddCommand(
		a.entryCommand(), a.bundleCommand(), a.federationCommand(), a.agentCommand(), a.tokenCommand(), a.x509Command(), a.jwtCommand(),
		a.localAuthorityCommand(), a.upstreamAuthorityCommand(),
		a.healthcheckCommand(), a.loggerCommand(), a.debugCommand(), a.ofPods(a.statusCommand()), a.ofPods(a.explainCommand()),
		a.ofPods(a.secretCommand()), a.ofPods(a.checkCommand()), a.migrateCommand(), a.versionCommand(), a.tunnelCommand(),
	)
	return root
}

// group is a command that only holds others.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use, Short: short, Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		_ = cmd.Help()
		return errors.New("name one of the subcommands above")
	}}
	cmd.AddCommand(subs...)
	return cmd
}

// command is a leaf: it takes flags and no arguments.
func command(use, short string, run func(ctx context.Context) error) *cobra.Command {
	return &cobra.Command{Use: use, Short: short, RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return fmt.Errorf("unexpected argument %q: %s takes flags only", args[0], cmd.CommandPath())
		}
		return run(cmd.Context())
	}}
}
