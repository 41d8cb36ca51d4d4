package agentconf

import "strings"

// RuleKeys are the keys there are rules for, in lower case.
func RuleKeys() []string {
	var out []string
	for key := range rules {
		out = append(out, key)
	}
	for name, p := range builtIn {
		prefix := "plugins." + strings.ToLower(strings.ReplaceAll(name, "/", "."))
		out = append(out, prefix)
		for key := range p.data {
			out = append(out, prefix+".plugin_data."+key)
		}
	}
	return out
}
