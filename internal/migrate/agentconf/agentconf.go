package agentconf

import (
	"bytes"
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/spiffe-node/spiffe-node/internal/config"
)

// Outcome is what became of a key.
type Outcome string

// The outcomes.
const (
	Translated  Outcome = "translated"    // To says into what
	NotNeeded   Outcome = "not needed"    // Text says why
	Unsupported Outcome = "not supported" // Text says what to do instead
	Unknown     Outcome = "unknown"       // SPIRE Agent has no such key either
)

// Item is the account of one key.
type Item struct {
	Key     string  `json:"key"` // dotted, as agent.sds.default_svid_name
	Line    int     `json:"line"`
	Outcome Outcome `json:"outcome"`
	To      string  `json:"to,omitempty"` // keys of the sds-agent, with commas
	Text    string  `json:"text,omitempty"`
}

// Result is a translation.
type Result struct {
	// YAML is the sds-agent's configuration.
	YAML []byte
	// Refused is why the sds-agent's own parser does not take it as it is; nil
	// if it does.
	Refused error
	// Items are the account, by line.
	Items []Item
	// Unset are variables that were expanded and not set.
	Unset []string
	// Facts are what others want to know of the file.
	Facts Facts
}

// Facts are what a file says about its site.
type Facts struct {
	TrustDomain, ServerAddress, SocketPath string
	NodeAttestor                           string
	Cluster                                string // of k8s_psat
	WorkloadAttestors                      []string
	// Delegates are who may use the Delegated Identity API.
	Delegates []string
	Broker    bool
}

// Options say how a file is read.
type Options struct {
	// Getenv expands $NAME and ${NAME}, as SPIRE Agent's -expandEnv; nil = they
	// stay as they are. The second result says whether the variable is set.
	Getenv func(string) (string, bool)
}

// translation is one run.
type translation struct {
	Result

	set  map[string]any // keys of the sds-agent
	from map[string]*node
	seen map[string]int // keys of SPIRE Agent, with their line
}

// Translate reads a file. An error says that it could not be read at all.
func Translate(data []byte, opt Options) (*Result, error) {
	t := &translation{set: map[string]any{}, from: map[string]*node{}, seen: map[string]int{}}
	if opt.Getenv != nil {
		data = t.expand(data, opt.Getenv)
	}
	root, err := parse(data)
	if err != nil {
		return nil, err
	}
	t.block("", root)
	t.together()
	slices.SortStableFunc(t.Items, func(a, b Item) int { return cmp.Compare(a.Line, b.Line) })
	if t.YAML, err = render(t.set); err != nil {
		return nil, err
	}
	_, t.Refused = config.Parse("", t.YAML, nil)
	return &t.Result, nil
}

func (t *translation) expand(data []byte, getenv func(string) (string, bool)) []byte {
	return []byte(os.Expand(string(data), func(name string) string {
		if name == "$" {
			return "$"
		}
		v, ok := getenv(name)
		if !ok && !slices.Contains(t.Unset, name) {
			t.Unset = append(t.Unset, name)
		}
		return v
	}))
}

// block accounts for everything in an object; path is empty or ends in a dot.
func (t *translation) block(path string, n *node) {
	for _, f := range n.fields {
		key := path + cmp.Or(f.name, `""`)
		switch {
		case strings.EqualFold(key, "plugins"):
			for _, o := range f.value.objects() {
				t.plugins(o)
			}
			continue
		case t.rule(key, f):
			continue
		}
		objects := f.value.objects()
		if !hasChildren(key) || len(objects) == 0 && !f.value.off() {
			t.add(Item{Key: key, Line: f.line, Outcome: Unknown, Text: "is no key of SPIRE Agent 1.15; it would refuse the file"})
			continue
		}
		for _, o := range objects {
			t.block(key+".", o)
		}
	}
}

// rule applies the rule for a key, if there is one.
func (t *translation) rule(key string, f field) bool {
	r, ok := rules[strings.ToLower(key)]
	if !ok {
		return false
	}
	if first, again := t.seen[strings.ToLower(key)]; again && !r.repeats {
		t.add(Item{Key: key, Line: f.line, Outcome: Unsupported, Text: fmt.Sprintf("is given again; the one in line %d counted until here, keep one of them", first)})
	}
	t.seen[strings.ToLower(key)] = f.line
	item := Item{Key: key, Line: f.line, Outcome: r.outcome, To: strings.Join(r.to, ", "), Text: r.text}
	switch {
	case r.outcome == Unsupported && f.value.off():
		item.Outcome, item.Text = NotNeeded, "is off"
	case r.apply != nil:
		t.from[strings.ToLower(key)] = f.value
		if err := r.apply(t, f.value, &item); err != nil {
			item.Outcome, item.Text, item.To = Unsupported, err.Error(), ""
		}
	}
	t.add(item)
	return true
}

func (t *translation) add(i Item) { t.Items = append(t.Items, i) }

// value is the text of a key of SPIRE Agent; "" = it is not in the file.
func (t *translation) value(key string) string {
	if n := t.from[key]; n != nil {
		return n.text
	}
	return ""
}

// render writes the keys in the order of the reference.
func render(set map[string]any) ([]byte, error) {
	root := &yaml.Node{Kind: yaml.MappingNode}
	for _, key := range config.Keys() {
		v, ok := set[key]
		if !ok {
			continue
		}
		at := root
		parts := strings.Split(key, ".")
		for _, part := range parts[:len(parts)-1] {
			at = member(at, part)
		}
		value := &yaml.Node{}
		if err := value.Encode(v); err != nil {
			return nil, err
		}
		at.Content = append(at.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: parts[len(parts)-1]}, value)
	}
	var out bytes.Buffer
	enc := yaml.NewEncoder(&out)
	enc.SetIndent(2)
	if err := enc.Encode(root); err != nil {
		return nil, err
	}
	return out.Bytes(), enc.Close()
}

// member is the object of that name in a mapping, made if it is missing.
func member(n *yaml.Node, name string) *yaml.Node {
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == name {
			return n.Content[i+1]
		}
	}
	out := &yaml.Node{Kind: yaml.MappingNode}
	n.Content = append(n.Content, &yaml.Node{Kind: yaml.ScalarNode, Value: name}, out)
	return out
}

// Value is a key of the sds-agent as it was translated; nil = it was not.
func (r *Result) Value(key string) any {
	var at any
	if yaml.Unmarshal(r.YAML, &at) != nil {
		return nil
	}
	for part := range strings.SplitSeq(key, ".") {
		m, ok := at.(map[string]any)
		if !ok {
			return nil
		}
		at = m[part]
	}
	return at
}
