package agentconf

import (
	"net"
	"path"
	"slices"
	"strings"

	"github.com/spiffe-node/spiffe-node/internal/config"
)

// newTokenFile is where an operator is asked to put a new join token if the
// old one stood in the configuration itself.
const newTokenFile = "/etc/spiffe-node/join-token" //nolint:gosec // a path

// together sets what several keys say together, and what SPIRE Agent does
// without being told.
func (t *translation) together() {
	t.set["apiVersion"], t.set["kind"] = config.APIVersion, config.Kind
	if host := t.value("agent.server_address"); host != "" {
		t.Facts.ServerAddress = net.JoinHostPort(host, t.value("agent.server_port"))
		t.set[spireServer+"address"] = t.Facts.ServerAddress
	}
	t.rebootstrap()
	t.socket()
	t.nodeAttestation()
	if t.set[bundle+"path"] != nil || t.set[bundle+"url"] != nil {
		if format := t.value("agent.trust_bundle_format"); format != "" {
			t.set[bundle+"format"] = format
		}
	}
	t.health()
	t.set["identity.defaultOrder"] = "spire"
	t.add(Item{
		Key: "(default identity)", Outcome: Translated, To: "identity.defaultOrder",
		Text: "SPIRE Agent takes the smallest entry ID if several entries match; remove the key to take the one with the most selectors, then the oldest",
	})
}

// rebootstrap writes SPIRE Agent's defaults out, which are not ours.
func (t *translation) rebootstrap() {
	const mode, delay = spireServer + "rebootstrap.mode", spireServer + "rebootstrap.delay"
	switch {
	case t.set[spireServer+"address"] == nil:
	case t.set[mode] == nil:
		t.set[mode] = config.RebootstrapNever
		t.add(Item{
			Key: "(rebootstrap_mode)", Outcome: Translated, To: mode,
			Text: "SPIRE Agent's default; with auto the agent finds its way to a server that was installed anew",
		})
	case t.set[mode] != config.RebootstrapNever && t.set[delay] == nil:
		t.set[delay] = "10m0s"
	}
}

func (t *translation) socket() {
	name := t.value("agent.socket_path")
	t.Facts.SocketPath = name
	if name == "" {
		name = "/tmp/spire-agent/public/api.sock"
		if t.set["mode"] == "kubernetes" {
			return // the chart and the manifests say where it is on the host
		}
	}
	// The socket itself must not have SPIRE Agent's name: SPIRE Agent unlinks
	// that when it ends, also if it is somebody else's by then. A link is made
	// again.
	base := path.Base(name)
	names := slices.DeleteFunc([]string{"socket", "spire-agent.sock", "api.sock"}, func(n string) bool { return n == base })
	t.set["socket.directory"], t.set["socket.name"] = path.Dir(name), names[0]
	t.set["socket.alternateNames"] = append([]string{base}, names[1:]...)
}

// nodeAttestation: SPIRE Agent attests by a join token if it has one, whatever
// the plugin is.
func (t *translation) nodeAttestation() {
	file := t.value("agent.join_token_file")
	if token := t.value("agent.join_token"); token != "" && file == "" {
		file = newTokenFile
	}
	if file == "" && t.set[attestation+"type"] == "join_token" {
		file = newTokenFile // it was given on the command line
	}
	if file != "" {
		t.Facts.NodeAttestor = "join_token"
		t.set[attestation+"type"], t.set[attestation+"joinTokenFile"] = "join_token", file
		for _, key := range []string{"cluster", "tokenPath", "certificatePath", "privateKeyPath", "intermediatesPath", "workloadAPISocket"} {
			delete(t.set, attestation+key)
		}
	}
}

// health puts health and metrics on one port: the one for health if there is
// one, since probes and scrapers are changed more easily than firewalls.
func (t *translation) health() {
	on := strings.EqualFold(t.value("health_checks.listener_enabled"), "true")
	switch host, port := t.value("telemetry.prometheus.host"), t.value("telemetry.prometheus.port"); {
	case on:
		host, port = t.value("health_checks.bind_address"), t.value("health_checks.bind_port")
		if host == "" {
			host = "localhost"
		}
		if port == "" {
			port = "80"
		}
		t.set["health.address"] = net.JoinHostPort(strings.Trim(host, "[]"), port)
	case port != "":
		if host == "" {
			host = "localhost"
		}
		t.set["health.address"] = net.JoinHostPort(strings.Trim(host, "[]"), port)
	case t.from["health_checks.listener_enabled"] != nil:
		t.set["health.address"] = ""
	}
}
