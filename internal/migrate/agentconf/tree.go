package agentconf

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/hashicorp/hcl"
	"github.com/hashicorp/hcl/hcl/ast"
	"github.com/hashicorp/hcl/hcl/token"
)

const (
	maxSize  = 1 << 20
	maxDepth = 64
)

// node is one value of a file: a text, a list or an object.
type node struct {
	line   int
	text   string
	list   []*node
	fields []field
	kind   kind
}

type kind int

const (
	isNull kind = iota
	isText      // strings, numbers and booleans: SPIRE takes one for the other
	isList
	isObject
)

type field struct {
	name  string
	line  int
	value *node
}

// parse reads HCL, or JSON if the file begins as an object.
func parse(data []byte) (*node, error) {
	if len(data) > maxSize {
		return nil, fmt.Errorf("longer than %d bytes", maxSize)
	}
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		return parseJSON(data)
	}
	return parseHCL(data)
}

// parseHCL keeps what the library does to a hostile file from the caller: its
// parser recurses without bound and may panic.
func parseHCL(data []byte) (out *node, err error) {
	if deep(data) {
		return nil, fmt.Errorf("nested deeper than %d", maxDepth)
	}
	defer func() {
		if p := recover(); p != nil {
			out, err = nil, fmt.Errorf("not HCL: %v", p)
		}
	}()
	f, err := hcl.ParseBytes(data)
	if err != nil {
		return nil, err
	}
	root, ok := f.Node.(*ast.ObjectList)
	if !ok {
		return nil, errors.New("not an HCL file of keys and blocks")
	}
	return fromObjects(root, 1), nil
}

// deep says whether brackets nest deeper than any configuration. Those in
// strings and comments count too, closed or not.
func deep(data []byte) bool {
	depth := 0
	for _, b := range data {
		switch b {
		case '{', '[':
			depth++
		case '}', ']':
			depth--
		}
		if depth > maxDepth {
			return true
		}
	}
	return false
}

func fromObjects(list *ast.ObjectList, line int) *node {
	out := &node{kind: isObject, line: line}
	for _, item := range list.Items {
		// A block of several keys, such as NodeAttestor "k8s_psat", is one
		// object in another.
		at := out
		for i, key := range item.Keys {
			name, _ := key.Token.Value().(string)
			f := field{name: name, line: key.Pos().Line}
			if i == len(item.Keys)-1 {
				f.value = fromHCL(item.Val, f.line)
			} else {
				f.value = &node{kind: isObject, line: f.line}
			}
			at.fields = append(at.fields, f)
			at = f.value
		}
	}
	return out
}

func fromHCL(n ast.Node, line int) *node {
	switch n := n.(type) {
	case *ast.ObjectType:
		return fromObjects(n.List, line)
	case *ast.ListType:
		out := &node{kind: isList, line: line}
		for _, item := range n.List {
			out.list = append(out.list, fromHCL(item, item.Pos().Line))
		}
		return out
	case *ast.LiteralType:
		out := &node{kind: isText, line: line, text: n.Token.Text}
		if n.Token.Type == token.STRING || n.Token.Type == token.HEREDOC {
			out.text, _ = n.Token.Value().(string)
		}
		return out
	}
	return &node{line: line}
}

// parseJSON is our own: the library's reader of JSON knows no lines.
func parseJSON(data []byte) (*node, error) {
	p := jsonParser{dec: json.NewDecoder(bytes.NewReader(data)), data: data, line: 1}
	p.dec.UseNumber()
	out, err := p.value(0)
	if err == nil {
		if _, more := p.dec.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("more follows after the object")
		}
	}
	if err != nil {
		return nil, fmt.Errorf("line %d: not JSON: %w", p.at(), err)
	}
	return out, nil
}

type jsonParser struct {
	dec  *json.Decoder
	data []byte
	seen int64 // bytes counted into line
	line int
}

// at is the line of what was read last.
func (p *jsonParser) at() int {
	if now := p.dec.InputOffset(); now > p.seen {
		p.line += bytes.Count(p.data[p.seen:now], []byte("\n"))
		p.seen = now
	}
	return p.line
}

func (p *jsonParser) value(depth int) (*node, error) {
	t, err := p.dec.Token()
	if err != nil {
		return nil, err
	}
	if depth > maxDepth {
		return nil, fmt.Errorf("nested deeper than %d", maxDepth)
	}
	out := &node{line: p.at(), kind: isText}
	switch t := t.(type) {
	case string:
		out.text = t
	case json.Number:
		out.text = t.String()
	case bool:
		out.text = strconv.FormatBool(t)
	case json.Delim:
		return out, p.inside(out, t, depth)
	default:
		out.kind = isNull
	}
	return out, nil
}

func (p *jsonParser) inside(out *node, open json.Delim, depth int) error {
	out.kind = isList
	if open == '{' {
		out.kind = isObject
	}
	for p.dec.More() {
		var f field
		if open == '{' {
			key, err := p.dec.Token()
			if err != nil {
				return err
			}
			f.name, _ = key.(string)
			f.line = p.at()
		}
		v, err := p.value(depth + 1)
		if err != nil {
			return err
		}
		if f.value = v; open == '{' {
			out.fields = append(out.fields, f)
		} else {
			out.list = append(out.list, v)
		}
	}
	_, err := p.dec.Token()
	return err
}

// objects are the objects that a block may stand for: itself, or each of a
// list, which is how JSON repeats a block.
func (n *node) objects() []*node {
	switch n.kind {
	case isObject:
		return []*node{n}
	case isList:
		var out []*node
		for _, item := range n.list {
			out = append(out, item.objects()...)
		}
		return out
	case isNull, isText:
	}
	return nil
}

// texts are the items of a list, or the one text.
func (n *node) texts() ([]string, bool) {
	switch n.kind {
	case isText:
		return []string{n.text}, true
	case isList:
		out := make([]string, 0, len(n.list))
		for _, item := range n.list {
			if item.kind != isText {
				return nil, false
			}
			out = append(out, item.text)
		}
		return out, true
	case isNull, isObject:
	}
	return nil, n.kind == isNull
}

// off says whether a value is what leaving the key out means.
func (n *node) off() bool {
	switch n.kind {
	case isText:
		return n.text == "" || n.text == "0" || strings.EqualFold(n.text, "false")
	case isList:
		return len(n.list) == 0
	case isObject:
		return len(n.fields) == 0
	case isNull:
	}
	return true
}
