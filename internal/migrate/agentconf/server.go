package agentconf

import "strings"

// Server is what a SPIRE Server's configuration says about its agents.
type Server struct {
	TrustDomain string
	// Clusters are those whose agents attest by k8s_psat, with the service
	// accounts (namespace:name) they may have.
	Clusters map[string][]string
}

// ReadServer reads a SPIRE Server's configuration.
func ReadServer(data []byte) (*Server, error) {
	root, err := parse(data)
	if err != nil {
		return nil, err
	}
	out := &Server{Clusters: map[string][]string{}}
	for _, o := range root.below("server") {
		for _, f := range o.fields {
			if strings.EqualFold(f.name, "trust_domain") {
				out.TrustDomain = f.value.text
			}
		}
	}
	for _, clusters := range root.below("plugins", "NodeAttestor", "k8s_psat", "plugin_data", "clusters") {
		for _, f := range clusters.fields {
			out.Clusters[f.name] = nil
			for _, o := range f.value.objects() {
				for _, g := range o.fields {
					if strings.EqualFold(g.name, "service_account_allow_list") {
						out.Clusters[f.name], _ = g.value.texts()
					}
				}
			}
		}
	}
	return out, nil
}

// below are the objects at a path of blocks.
func (n *node) below(path ...string) []*node {
	at := n.objects()
	for _, name := range path {
		var next []*node
		for _, o := range at {
			for _, f := range o.fields {
				if strings.EqualFold(f.name, name) {
					next = append(next, f.value.objects()...)
				}
			}
		}
		at = next
	}
	return at
}
