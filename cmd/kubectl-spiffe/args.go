package main

import (
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
)

// normalizeArgs rewrites flags with one dash, as the spire-server command
// spells them, into the form the flag library wants. The value of a flag is
// joined to it, so that a value may start with a dash. What is not a flag of
// the command in question stays as it is and is refused later.
func normalizeArgs(root *cobra.Command, args []string) []string {
	out := make([]string, 0, len(args))
	cmd := root
	for i := 0; i < len(args); i++ {
		arg := args[i]
		if arg == "--" {
			return append(out, args[i:]...)
		}
		if strings.HasPrefix(arg, "---") {
			out = append(out, arg)
			continue
		}
		if !strings.HasPrefix(arg, "-") || arg == "-" {
			if sub := subcommand(cmd, arg); sub != nil {
				cmd = sub
			}
			out = append(out, arg)
			continue
		}
		name, value, hasValue := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(arg, "-"), "-"), "=")
		flag := lookup(cmd, name)
		if flag == nil {
			if short(cmd, arg) {
				out = append(out, arg)
			} else {
				out = append(out, "--"+strings.TrimLeft(arg, "-"))
			}
			continue
		}
		if !hasValue && flag.NoOptDefVal == "" && i+1 < len(args) {
			i++
			value, hasValue = args[i], true
		}
		if hasValue {
			out = append(out, "--"+flag.Name+"="+value)
		} else {
			out = append(out, "--"+flag.Name)
		}
	}
	return out
}

func subcommand(cmd *cobra.Command, name string) *cobra.Command {
	for _, sub := range cmd.Commands() {
		if sub.Name() == name || sub.HasAlias(name) {
			return sub
		}
	}
	return nil
}

// lookup finds a flag by its full name, or by its letter if that is all there
// is.
func lookup(cmd *cobra.Command, name string) *pflag.Flag {
	cmd.InitDefaultHelpFlag()
	if f := cmd.Flag(name); f != nil {
		return f
	}
	if len(name) == 1 {
		return shorthand(cmd, name)
	}
	return nil
}

func shorthand(cmd *cobra.Command, letter string) *pflag.Flag {
	if f := cmd.Flags().ShorthandLookup(letter); f != nil {
		return f
	}
	for c := cmd; c != nil; c = c.Parent() {
		if f := c.PersistentFlags().ShorthandLookup(letter); f != nil {
			return f
		}
	}
	return nil
}

// short says whether arg is a letter with its value behind it, such as -ojson.
func short(cmd *cobra.Command, arg string) bool {
	return len(arg) > 2 && arg[1] != '-' && arg[1] < 0x80 && shorthand(cmd, arg[1:2]) != nil && shorthand(cmd, arg[1:2]).NoOptDefVal == ""
}
