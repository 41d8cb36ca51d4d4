package main

import (
	"errors"
	"flag"
	"fmt"
	"io"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

// errUsage marks a command line that cannot be used.
var errUsage = errors.New("see csi-driver -h")

// options is the command line.
type options struct {
	nodeID        string
	nodeIDEnv     string
	csiSocket     string
	pluginName    string
	sourceDir     string
	socketNames   string
	agentCheck    string
	kubeletRoot   string
	ledgerDir     string
	register      bool
	registryDir   string
	endpoint      string
	anyVolumeID   bool
	readOnly      bool
	healthAddress string
	logLevel      string
	logFormat     string
	grace         time.Duration
	version       bool
}

// flagSet declares the flags. Those of spiffe-csi keep their names, their
// single dash and their meaning.
func flagSet(o *options, output io.Writer) *flag.FlagSet {
	fs := flag.NewFlagSet("csi-driver", flag.ContinueOnError)
	fs.SetOutput(output)
	fs.StringVar(&o.nodeID, "node-id", "", "name of the node as the kubelet knows it; wins over -node-id-env")
	fs.StringVar(&o.nodeIDEnv, "node-id-env", "MY_NODE_NAME", "environment variable that holds the name of the node")
	fs.StringVar(&o.csiSocket, "csi-socket-path", "/spiffe-csi/csi.sock", "unix socket to serve CSI on; its directory must exist")
	fs.StringVar(&o.pluginName, "plugin-name", csi.DefaultName, "name of the driver, as in the CSIDriver object and in pods")
	fs.StringVar(&o.sourceDir, "workload-api-socket-dir", "", "directory of the agent's socket, to be mounted into pods (required)")
	fs.StringVar(&o.socketNames, "socket-names", strings.Join(csi.DefaultSocketNames(), ","), "names under which the agent may listen in that directory, with commas between")
	fs.StringVar(&o.agentCheck, "agent-check", string(csi.CheckConnect), "what a publish asks of the agent: connect (a socket takes connections), exists (there is a socket), off")
	fs.StringVar(&o.kubeletRoot, "kubelet-root", csi.DefaultKubeletRoot, "the kubelet's --root-dir; target paths must lie below its pods directory")
	fs.StringVar(&o.ledgerDir, "ledger-dir", "/run/spiffe-node/ledger", "directory of the publish ledger, shared with the agent; on a tmpfs, owner-only, made if it is missing")
	fs.BoolVar(&o.register, "register", true, "register with the kubelet; false where node-driver-registrar does it")
	fs.StringVar(&o.registryDir, "registry-dir", "", "the kubelet's directory of registration sockets; empty is plugins_registry below -kubelet-root")
	fs.StringVar(&o.endpoint, "registration-endpoint", "", "the CSI socket as the kubelet sees it; empty is -csi-socket-path where that is below -kubelet-root, else plugins/NAME/csi.sock below -kubelet-root")
	fs.BoolVar(&o.anyVolumeID, "any-volume-id", false, "accept volume IDs that are not the kubelet's for the pod and volume of the target path")
	fs.BoolVar(&o.readOnly, "read-only-mount", false, "make the mount on the host read-only too; in containers it is either way")
	fs.StringVar(&o.healthAddress, "health-address", "127.0.0.1:9810", "host:port of /livez, /readyz and /metrics; empty for none")
	fs.StringVar(&o.logLevel, "log-level", "info", "debug, info, warn or error")
	fs.StringVar(&o.logFormat, "log-format", "json", "json or text")
	fs.DurationVar(&o.grace, "shutdown-grace", 10*time.Second, "how long calls that run may take to finish when the driver stops")
	fs.BoolVar(&o.version, "version", false, "print the version and end")
	return fs
}

// parse reads the command line and fills in what depends on other flags.
func parse(args []string, getenv func(string) string, output io.Writer) (options, error) {
	var o options
	fs := flagSet(&o, output)
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return o, err
		}
		return o, fmt.Errorf("%w: %w", err, errUsage)
	}
	if o.version {
		return o, nil
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q: %w", fs.Arg(0), errUsage)
	}
	if o.nodeID == "" {
		o.nodeID = getenv(o.nodeIDEnv)
	}
	switch {
	case o.nodeID == "":
		return o, fmt.Errorf("the node's name is missing: set -node-id, or the environment variable %s: %w", o.nodeIDEnv, errUsage)
	case o.sourceDir == "":
		return o, fmt.Errorf("-workload-api-socket-dir is missing: %w", errUsage)
	case o.grace < 0:
		return o, fmt.Errorf("-shutdown-grace %s is negative: %w", o.grace, errUsage)
	}
	if o.registryDir == "" {
		o.registryDir = filepath.Join(o.kubeletRoot, "plugins_registry")
	}
	if o.endpoint == "" {
		o.endpoint = filepath.Clean(o.csiSocket)
		if !strings.HasPrefix(o.endpoint, filepath.Clean(o.kubeletRoot)+"/") {
			o.endpoint = filepath.Join(o.kubeletRoot, "plugins", o.pluginName, "csi.sock")
		}
	}
	return o, nil
}

func (o options) names() []string {
	var out []string
	for n := range strings.SplitSeq(o.socketNames, ",") {
		if n = strings.TrimSpace(n); n != "" {
			out = append(out, n)
		}
	}
	return out
}
