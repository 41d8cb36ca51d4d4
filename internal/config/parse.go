package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// Problem is one thing wrong with a configuration.
type Problem struct {
	File string // empty if the configuration came from flags alone
	Line int    // 0 if no line of the file says it
	Key  string // dotted path of the key
	Text string
}

// Error is file:line: key: text.
func (p *Problem) Error() string {
	var b strings.Builder
	if p.File != "" {
		b.WriteString(p.File)
		if p.Line > 0 {
			b.WriteString(":" + strconv.Itoa(p.Line))
		}
		b.WriteString(": ")
	}
	if p.Key != "" {
		b.WriteString(p.Key + ": ")
	}
	b.WriteString(p.Text)
	return b.String()
}

// ErrInvalid is wrapped by every error about the contents of a configuration.
var ErrInvalid = errors.New("configuration refused")

// document is what the kinds of configuration have in common.
type document interface {
	// header are the fields in which a file says what it is.
	header() (apiVersion, kind *string)
	// problems checks what can be checked without touching the system, and
	// fills in what depends on other keys. root is the file, for what only the
	// presence of a key can tell.
	problems(root *yaml.Node) []*Problem
}

// Load reads, overrides and checks an agent's configuration. path may be empty
// for defaults only. override (may be nil) is applied between the file and the
// checks; flags go there.
func Load(path string, override func(*Agent)) (*Agent, error) { return load(path, override, Parse) }

// Parse is Load for a document that has been read; name is what errors call it.
// Errors wrap ErrInvalid and name every problem found, each with its line.
func Parse(name string, data []byte, override func(*Agent)) (*Agent, error) {
	return parse(name, data, Default(), override)
}

func load[T any](path string, override func(*T), parse func(string, []byte, func(*T)) (*T, error)) (*T, error) {
	var data []byte
	if path != "" {
		var err error
		if data, err = os.ReadFile(path); err != nil {
			return nil, fmt.Errorf("read configuration: %w", err)
		}
	}
	return parse(path, data, override)
}

func parse[T any, P interface {
	*T
	document
}](name string, data []byte, c T, override func(*T)) (*T, error) {
	var root yaml.Node
	if len(bytes.TrimSpace(data)) > 0 {
		// The file must say what it is: defaults must not stand in for that.
		version, kind := P(&c).header()
		*version, *kind = "", ""
		if err := decode(name, data, &c, &root); err != nil {
			return nil, err
		}
	}
	if override != nil {
		override(&c)
	}
	if err := refuse(name, &root, P(&c).problems(&root)); err != nil {
		return nil, err
	}
	return &c, nil
}

// refuse is nil without problems; otherwise it names each with its line.
func refuse(name string, root *yaml.Node, problems []*Problem) error {
	var errs []error
	for _, p := range problems {
		p.File = name
		p.Line = lineOf(root, p.Key)
		errs = append(errs, p)
	}
	if len(errs) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %w", ErrInvalid, errors.Join(errs...))
}

// decode reads the one document in data into a configuration that holds the
// defaults, and again into a tree that knows the lines.
func decode(name string, data []byte, c any, root *yaml.Node) error {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	dec.KnownFields(true)
	if err := dec.Decode(c); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %w", ErrInvalid, explain(name, err))
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %w", ErrInvalid, &Problem{File: name, Text: "holds more than one document; keep one"})
	}
	if err := yaml.Unmarshal(data, root); err != nil {
		return fmt.Errorf("%w: %w", ErrInvalid, explain(name, err))
	}
	return nil
}

var yamlLine = regexp.MustCompile(`^(?:yaml: )?line (\d+): (.*)$`)

// explain turns the library's errors into problems with a line.
func explain(name string, err error) error {
	lines := []string{err.Error()}
	if te, ok := errors.AsType[*yaml.TypeError](err); ok {
		lines = te.Errors
	}
	var errs []error
	for _, l := range lines {
		p := &Problem{File: name, Text: l}
		if m := yamlLine.FindStringSubmatch(l); m != nil {
			p.Line, _ = strconv.Atoi(m[1])
			p.Text = m[2]
		}
		if key, ok := strings.CutPrefix(p.Text, "field "); ok {
			if key, _, ok := strings.Cut(key, " not found in type "); ok {
				p.Key, p.Text = key, "is not a key here; see docs/configuration.md for the keys"
			}
		}
		errs = append(errs, p)
	}
	return errors.Join(errs...)
}

// lineOf finds the line of a dotted key; of its nearest parent if the key is
// not in the file; 0 if none is.
func lineOf(root *yaml.Node, key string) int {
	if root.Kind != yaml.DocumentNode || len(root.Content) == 0 {
		return 0
	}
	n, line := root.Content[0], 0
	for part := range strings.SplitSeq(key, ".") {
		part, index, indexed := strings.Cut(part, "[")
		next := child(n, part)
		if next == nil {
			return line
		}
		line = cmp.Or(next.Line, line)
		n = next
		if i, err := strconv.Atoi(strings.TrimSuffix(index, "]")); indexed && err == nil && n.Kind == yaml.SequenceNode && i < len(n.Content) {
			n = n.Content[i]
			line = n.Line
		}
	}
	return line
}

func child(n *yaml.Node, name string) *yaml.Node {
	if n.Kind != yaml.MappingNode {
		return nil
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == name {
			return n.Content[i+1]
		}
	}
	return nil
}
