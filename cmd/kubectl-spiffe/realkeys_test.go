package main

import (
	"bytes"
	"context"
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// TestKeysWithSpireServer moves the keys of our server through their lives with
// the real command: prepare, activate, taint, revoke, each the other program
// would print alike.
func TestKeysWithSpireServer(t *testing.T) {
	bin := os.Getenv(spireServer)
	if bin == "" {
		t.Skip("no " + spireServer + " to call")
	}
	socket := os.Getenv(spireSocket)
	if socket == "" {
		socket = serveForReal(t)
	}
	theirs := func(args ...string) outcome {
		t.Helper()
		var out, errs bytes.Buffer
		cmd := exec.CommandContext(t.Context(), bin, append(args, "-socketPath", socket)...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		err := cmd.Run()
		return outcome{out.String(), errs.String(), err != nil}
	}
	ours := func(args ...string) outcome {
		var out, errs bytes.Buffer
		code := run(context.WithoutCancel(t.Context()), append(args, "-socketPath", socket), system{
			stdin: strings.NewReader(""), stdout: &out, stderr: &errs, getenv: func(string) string { return "" },
		})
		return outcome{out.String(), errs.String(), code != 0}
	}
	for _, kind := range []string{"x509", "jwt"} {
		name := map[string]string{"x509": "X.509", "jwt": "JWT"}[kind]
		state := func(which string) string {
			t.Helper()
			o := theirs("localauthority", kind, "show", "-output", "json")
			if mine := ours("localauthority", kind, "show", "-output", "json"); mine != o {
				t.Errorf("show prints %+v, the real command %+v", mine, o)
			}
			if mine, o := ours("localauthority", kind, "show"), theirs("localauthority", kind, "show"); mine != o {
				t.Errorf("show prints %+v, the real command %+v", mine, o)
			}
			var v map[string]struct {
				ID string `json:"authority_id"`
			}
			if err := json.Unmarshal([]byte(o.Stdout), &v); err != nil {
				t.Fatalf("%v: %+v", err, o)
			}
			return v[which].ID
		}
		step := func(want, verb string, args ...string) {
			t.Helper()
			o := theirs(append([]string{"localauthority", kind, verb}, args...)...)
			if o.Failed || !strings.HasPrefix(o.Stdout, want+" "+name+" authority:\n  Authority ID: ") {
				t.Fatalf("%s: %+v", verb, o)
			}
		}
		refused := func(verb, id string) {
			t.Helper()
			o, mine := theirs("localauthority", kind, verb, "-authorityID", id), ours("localauthority", kind, verb, "-authorityID", id)
			if !o.Failed || o != mine {
				t.Errorf("%s %s: %+v, the real command %+v", verb, id, mine, o)
			}
			t.Logf("%s %s: %s", kind, verb, strings.TrimSpace(o.Stderr))
		}
		first := state("active")
		refused("taint", first)
		refused("revoke", first)
		step("Prepared", "prepare")
		second := state("prepared")
		refused("taint", second)
		refused("revoke", second)
		step("Activated", "activate", "-authorityID", second)
		if got := state("old"); got != first {
			t.Errorf("old is %q, want %q", got, first)
		}
		refused("activate", first)
		refused("revoke", first)
		step("Tainted", "taint", "-authorityID", first)
		refused("taint", first)
		step("Revoked", "revoke", "-authorityID", first)
		refused("revoke", first)
	}
}
