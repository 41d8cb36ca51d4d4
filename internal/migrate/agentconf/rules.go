package agentconf

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"
)

// rule says what becomes of one key of SPIRE Agent.
type rule struct {
	outcome Outcome
	to      []string
	text    string
	// apply sets keys of the sds-agent; it may change the item. nil: nothing is
	// set. An error is what the value cannot be had for.
	apply func(t *translation, v *node, i *Item) error
	// repeats says that the key may be given several times.
	repeats bool
}

func notNeeded(text string) rule   { return rule{outcome: NotNeeded, text: text} }
func unsupported(text string) rule { return rule{outcome: Unsupported, text: text} }

// later is a key that together reads with others.
func later(text string, to ...string) rule {
	return rule{outcome: Translated, to: to, text: text, apply: func(_ *translation, v *node, _ *Item) error {
		if v.kind != isText && v.kind != isNull {
			return errors.New("is no text: correct it")
		}
		return nil
	}}
}

// text copies a value; change may be nil.
func text(to string, change func(string) (any, error)) rule {
	return rule{outcome: Translated, to: []string{to}, apply: func(t *translation, v *node, _ *Item) error {
		switch {
		case v.kind == isNull, v.kind == isText && v.text == "":
			return nil // the default on either side
		case v.kind != isText:
			return errors.New("is no text: correct it")
		case change == nil:
			t.set[to] = v.text
			return nil
		}
		out, err := change(v.text)
		if err == nil {
			t.set[to] = out
		}
		return err
	}}
}

func boolean(to string) rule {
	return text(to, func(s string) (any, error) {
		b, err := strconv.ParseBool(s)
		if err != nil {
			return nil, fmt.Errorf("%q is neither true nor false: correct it", s)
		}
		return b, nil
	})
}

func positive(to string) rule {
	return text(to, func(s string) (any, error) {
		n, err := strconv.Atoi(s)
		if err != nil || n < 0 {
			return nil, fmt.Errorf("%q is no number that fits: correct it", s)
		}
		return n, nil
	})
}

func duration(to string) rule {
	return text(to, func(s string) (any, error) {
		d, err := time.ParseDuration(s)
		if err != nil || d < 0 {
			return nil, fmt.Errorf("%q is no duration such as 90s: correct it", s)
		}
		return d.String(), nil
	})
}

// socket is a unix socket, with or without the scheme SPIRE Agent wants.
func socket(to string) rule {
	return text(to, func(s string) (any, error) {
		path := strings.TrimPrefix(strings.TrimPrefix(s, "unix:"), "//")
		if !strings.HasPrefix(path, "/") {
			return nil, fmt.Errorf("%q is no unix socket's absolute path; over TCP it is not asked", s)
		}
		return path, nil
	})
}

func list(to string) rule {
	return rule{outcome: Translated, to: []string{to}, apply: func(t *translation, v *node, _ *Item) error {
		all, ok := v.texts()
		if !ok {
			return errors.New("is no list of texts: correct it")
		}
		if len(all) > 0 {
			t.set[to] = all
		}
		return nil
	}}
}

const (
	spireServer = "authority.spireServer."
	attestation = spireServer + "nodeAttestation."
	bundle      = spireServer + "trustBundle."

	windowsOnly = "is for Windows, where there is no sds-agent"
	useMetrics  = "metrics are for Prometheus, at /metrics of health.address: collect them from there"
	useLimits   = "calls per second are not counted: limits.* bound connections, streams and waiting calls of each pod, before attestation"
	noBroker    = "there is no Broker API: whoever uses it needs an agent that has it, on nodes of its own"
	newAgentID  = "it is part of the agent's SPIFFE ID, so entries of the old agent need the new one as parent, or a token made with -spiffeID"
	noDelegates = "there is no Delegated Identity API: keep SPIRE Agent on nodes whose proxies use it (Cilium, ztunnel), or give each pod its own identity by its volume"
)

// rules are by key, in lower case, since HCL does not tell the cases apart.
// The keys of plugins are in pluginRules.
var rules = map[string]rule{
	"agent.trust_domain": {outcome: Translated, to: []string{"trustDomain"}, apply: func(t *translation, v *node, _ *Item) error {
		t.set["trustDomain"], t.Facts.TrustDomain = v.text, v.text
		return nil
	}},
	"agent.server_address": later("", spireServer+"address"),
	"agent.server_port":    later("", spireServer+"address"),
	"agent.socket_path":    later("its file name is a link to the socket; in a container, the directory is the one that the host's is mounted at: the chart's socket.directory names the host's", "socket.directory", "socket.name", "socket.alternateNames"),
	"agent.admin_socket_path": notNeeded("the admin socket is at admin.socketPath and always there: kubectl spiffe logger and debug use it; " +
		"Delegated Identity is not served, see authorized_delegates"),
	"agent.authorized_delegates": {outcome: Unsupported, text: noDelegates, apply: func(t *translation, v *node, _ *Item) error {
		t.Facts.Delegates, _ = v.texts()
		return nil
	}},
	"agent.data_dir":                         notNeeded("the agent attests anew; what a restart needs is kept in identity.stateDirectory, in memory"),
	"agent.disable_workload_api":             boolean("workloadAPI.disabled"),
	"agent.disable_sds_api":                  boolean("sds.disabled"),
	"agent.allow_unauthenticated_verifiers":  boolean("workloadAPI.allowUnauthenticatedVerifiers"),
	"agent.allowed_foreign_jwt_claims":       list("workloadAPI.allowedForeignJWTClaims"),
	"agent.join_token":                       later("a join token is good for one attestation, and this one is SPIRE Agent's: write a new one (spire-server token generate) into the file; "+newAgentID, attestation+"type", attestation+"joinTokenFile"),
	"agent.join_token_file":                  later("a join token is good for one attestation: write a new one into the file; "+newAgentID, attestation+"type", attestation+"joinTokenFile"),
	"agent.insecure_bootstrap":               boolean(bundle + "insecure"),
	"agent.trust_bundle_path":                text(bundle+"path", nil),
	"agent.trust_bundle_url":                 text(bundle+"url", nil),
	"agent.trust_bundle_format":              later("", bundle+"format"),
	"agent.trust_bundle_unix_socket":         socket(bundle + "unixSocket"),
	"agent.trust_bundle_spiffe_workload_api": socket(bundle + "workloadAPISocket"),
	"agent.rebootstrap_mode":                 text(spireServer+"rebootstrap.mode", nil),
	"agent.rebootstrap_delay":                duration(spireServer + "rebootstrap.delay"),
	"agent.workload_x509_svid_key_type":      text("identity.x509SVIDKeyType", nil),
	"agent.availability_target":              duration("identity.availabilityTarget"),
	"agent.x509_svid_cache_max_size":         atLeastOne("identity.maxX509SVIDs"),
	"agent.jwt_svid_cache_max_size":          atLeastOne("identity.maxJWTSVIDs"),

	"agent.sds.default_svid_name":              text("sds.defaultSVIDName", nil),
	"agent.sds.default_bundle_name":            text("sds.defaultBundleName", nil),
	"agent.sds.default_all_bundles_name":       text("sds.defaultAllBundlesName", nil),
	"agent.sds.disable_spiffe_cert_validation": boolean("sds.disableSPIFFECertValidation"),

	"agent.log_level":           text("log.level", logLevel),
	"agent.log_format":          text("log.format", logFormat),
	"agent.log_file":            unsupported("logs go to standard error: let the service manager or the container runtime keep them"),
	"agent.log_source_location": unsupported("log lines carry their facts as attributes, not the line of the program"),
	"agent.log_selectors":       notNeeded("kubectl spiffe explain shows a caller's selectors, and the nearest entries with what is lacking; no log has to"),
	"agent.profiling_enabled":   boolean("health.profiling"),
	"agent.profiling_port":      notNeeded("/debug/pprof is at health.address"),
	"agent.profiling_freq":      notNeeded("profiles are taken when /debug/pprof is asked"),
	"agent.profiling_names":     notNeeded("profiles are taken when /debug/pprof is asked"),

	"agent.experimental.sync_interval":               duration(spireServer + "syncInterval"),
	"agent.experimental.jwt_svid_cache_hit_timeout":  notNeeded("while a token is still good, nobody waits longer than 250 ms for a newer one"),
	"agent.experimental.use_sync_authorized_entries": notNeeded("the server is asked that way if it can answer so"),
	"agent.experimental.require_pq_kem":              boolean(spireServer + "requirePQKEM"),
	"agent.experimental.named_pipe_name":             unsupported(windowsOnly),
	"agent.experimental.admin_named_pipe_name":       unsupported(windowsOnly),
	"agent.experimental.feature_flags":               unsupported("there are no feature flags; WIT-SVIDs, which one of SPIRE's is for, are not served"),
	"agent.experimental.broker": {outcome: Unsupported, text: noBroker, apply: func(t *translation, _ *node, _ *Item) error {
		t.Facts.Broker = true
		return nil
	}},
	"agent.experimental.ratelimit.fetch_x509_svid":    unsupported(useLimits),
	"agent.experimental.ratelimit.fetch_jwt_svid":     unsupported(useLimits),
	"agent.experimental.ratelimit.fetch_x509_bundles": unsupported(useLimits),
	"agent.experimental.ratelimit.fetch_jwt_bundles":  unsupported(useLimits),
	"agent.experimental.ratelimit.stream_secrets":     unsupported(useLimits),
	"agent.experimental.ratelimit.fetch_secrets":      unsupported(useLimits),

	"health_checks.listener_enabled": later("", "health.address"),
	"health_checks.bind_address":     later("", "health.address"),
	"health_checks.bind_port":        later("", "health.address"),
	"health_checks.live_path":        notNeeded("the path is /livez: change the probe"),
	"health_checks.ready_path":       notNeeded("the path is /readyz: change the probe"),

	"telemetry.prometheus.host":        later("one port serves health and metrics: scrape /metrics of health.address", "health.address"),
	"telemetry.prometheus.port":        later("one port serves health and metrics: scrape /metrics of health.address", "health.address"),
	"telemetry.prometheus.tls":         unsupported("/metrics is plain HTTP: bind health.address to 127.0.0.1, or let a network policy say who may reach it (the chart's networkPolicy.metricsFrom)"),
	"telemetry.statsd":                 {outcome: Unsupported, text: useMetrics, repeats: true},
	"telemetry.dogstatsd":              {outcome: Unsupported, text: useMetrics, repeats: true},
	"telemetry.m3":                     {outcome: Unsupported, text: useMetrics, repeats: true},
	"telemetry.inmem":                  {outcome: NotNeeded, text: "kubectl spiffe status shows what an administrator asks for", repeats: true},
	"telemetry.metricprefix":           notNeeded("metrics have their own names: docs/operations.md lists them; relabel in Prometheus"),
	"telemetry.enabletrustdomainlabel": notNeeded("add labels in Prometheus' scrape configuration"),
	"telemetry.enablehostnamelabel":    notNeeded("add labels in Prometheus' scrape configuration"),
	"telemetry.allowedprefixes":        notNeeded("drop metrics in Prometheus' scrape configuration"),
	"telemetry.blockedprefixes":        notNeeded("drop metrics in Prometheus' scrape configuration"),
	"telemetry.allowedlabels":          notNeeded("drop labels in Prometheus' scrape configuration"),
	"telemetry.blockedlabels":          notNeeded("drop labels in Prometheus' scrape configuration"),
}

// atLeastOne is a number for which SPIRE's zero means its default.
func atLeastOne(to string) rule {
	r := positive(to)
	set := r.apply
	r.apply = func(t *translation, v *node, i *Item) error {
		if v.text == "0" {
			return nil
		}
		return set(t, v, i)
	}
	return r
}

// hasChildren says whether rules are below a key.
func hasChildren(key string) bool {
	prefix := strings.ToLower(key) + "."
	for k := range rules {
		if strings.HasPrefix(k, prefix) {
			return true
		}
	}
	return false
}

func logLevel(s string) (any, error) {
	switch s = strings.ToLower(s); s {
	case "debug", "info", "warn", "error":
		return s, nil
	case "warning":
		return "warn", nil
	case "trace":
		return "debug", nil
	case "fatal", "panic":
		return "error", nil
	}
	return nil, fmt.Errorf("%q is no log level: correct it", s)
}

func logFormat(s string) (any, error) {
	if s = strings.ToLower(s); !slices.Contains([]string{"text", "json"}, s) {
		return nil, fmt.Errorf("%q is neither text nor json: correct it", s)
	}
	return s, nil
}
