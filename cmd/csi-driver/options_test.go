package main

import (
	"bytes"
	"errors"
	"flag"
	"io"
	"strings"
	"testing"
)

func env(pairs ...string) func(string) string {
	return func(key string) string {
		for i := 0; i+1 < len(pairs); i += 2 {
			if pairs[i] == key {
				return pairs[i+1]
			}
		}
		return ""
	}
}

// The hardened chart's command line for spiffe-csi starts this driver too.
func TestSpiffeCSICommandLine(t *testing.T) {
	o, err := parse([]string{
		"-workload-api-socket-dir", "/spire-agent-socket",
		"-plugin-name", "csi.spiffe.io",
		"-csi-socket-path", "/spiffe-csi/csi.sock",
	}, env("MY_NODE_NAME", "node-7"), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if o.nodeID != "node-7" || o.sourceDir != "/spire-agent-socket" || o.csiSocket != "/spiffe-csi/csi.sock" || !o.register ||
		o.registryDir != "/var/lib/kubelet/plugins_registry" || o.endpoint != "/var/lib/kubelet/plugins/csi.spiffe.io/csi.sock" {
		t.Errorf("%+v", o)
	}
	o, err = parse([]string{"-node-id", "a", "-node-id-env", "NODE", "-workload-api-socket-dir=/x"}, env("NODE", "b"), io.Discard)
	if err != nil || o.nodeID != "a" {
		t.Errorf("%+v, %v", o, err)
	}
}

func TestParse(t *testing.T) {
	base := []string{"--node-id=n", "--workload-api-socket-dir=/agent"}
	o, err := parse(append(base, "--kubelet-root=/k/", "--csi-socket-path=/k/plugins/x/csi.sock", "--plugin-name=x.y", "--socket-names= a , b,"), env(), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if o.registryDir != "/k/plugins_registry" || o.endpoint != "/k/plugins/x/csi.sock" || strings.Join(o.names(), "|") != "a|b" {
		t.Errorf("%+v", o)
	}
	o, err = parse(append(base, "--registry-dir=/reg", "--registration-endpoint=/host/csi.sock", "--register=false"), env(), io.Discard)
	if err != nil || o.registryDir != "/reg" || o.endpoint != "/host/csi.sock" || o.register {
		t.Errorf("%+v, %v", o, err)
	}
	for want, args := range map[string][]string{
		"-node-id":                 {"-workload-api-socket-dir=/x"},
		"-workload-api-socket-dir": {"-node-id=n"},
		"unexpected argument":      append(base, "serve"),
		"-no-such-flag":            append(base, "-no-such-flag"),
		"-shutdown-grace":          append(base, "-shutdown-grace=-1s"),
		"shutdown-grace":           append(base, "-shutdown-grace=soon"),
	} {
		_, err := parse(args, env(), io.Discard)
		if !errors.Is(err, errUsage) || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v does not say %q", err, want)
		}
	}
}

func TestHelpAndVersion(t *testing.T) {
	var out, errs bytes.Buffer
	if err := run(t.Context(), []string{"-h"}, env(), &out, &errs); !errors.Is(err, flag.ErrHelp) {
		t.Error(err)
	}
	flagSet(&options{}, io.Discard).VisitAll(func(f *flag.Flag) {
		if !strings.Contains(errs.String(), "-"+f.Name) || f.Usage == "" {
			t.Errorf("-%s is not explained", f.Name)
		}
	})
	if err := run(t.Context(), []string{"-version"}, env(), &out, &errs); err != nil || strings.TrimSpace(out.String()) == "" {
		t.Errorf("%q, %v", &out, err)
	}
}
