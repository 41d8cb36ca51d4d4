package check

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"go.yaml.in/yaml/v3"
)

// maxInput is how much of a file is read.
const maxInput = 32 << 20

// Object is one document: an object of Kubernetes, or a values file, which has
// no kind.
type Object struct {
	Kind, Namespace, Name string
	// Source is file:line, empty for objects of a cluster.
	Source string

	fields map[string]any
}

func (o *Object) String() string {
	switch {
	case o.Kind == "":
		return "values"
	case o.Name == "":
		return o.Kind
	case o.Namespace == "":
		return o.Kind + " " + o.Name
	}
	return o.Kind + " " + o.Namespace + "/" + o.Name
}

// NewObject is an object of a cluster. The kind is said because lists leave it
// out.
func NewObject(kind string, fields map[string]any) Object {
	o := Object{Kind: cmp.Or(kind, str(fields, "kind")), Namespace: str(fields, "metadata", "namespace"), Name: str(fields, "metadata", "name"), fields: fields}
	return o
}

// Parse reads all documents of a file, those in Lists one by one. What comes
// before an error is given back with it.
func Parse(file string, r io.Reader) ([]Object, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxInput+1))
	switch {
	case err != nil:
		return nil, err
	case len(data) > maxInput:
		return nil, fmt.Errorf("%s: longer than %d bytes", file, maxInput)
	}
	var out []Object
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var node yaml.Node
		err := dec.Decode(&node)
		switch {
		case errors.Is(err, io.EOF):
			return out, nil
		case err != nil:
			return out, fmt.Errorf("%s: %w", file, err)
		}
		var fields map[string]any
		if err := decode(&node, &fields); err != nil {
			return out, fmt.Errorf("%s:%d: no object: %w", file, node.Line, err)
		}
		out = appendObjects(out, fields, fmt.Sprintf("%s:%d", file, first(&node)), 0)
	}
}

// decode goes by way of JSON, so that only what Kubernetes could be sent is
// read, with its types.
func decode(node *yaml.Node, into *map[string]any) error {
	var v map[string]any
	if err := node.Decode(&v); err != nil {
		return err
	}
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return json.Unmarshal(data, into)
}

// first is the line of the first key, which is where people look.
func first(node *yaml.Node) int {
	for node.Kind == yaml.DocumentNode && len(node.Content) > 0 {
		node = node.Content[0]
	}
	return node.Line
}

func appendObjects(out []Object, fields map[string]any, source string, depth int) []Object {
	if fields == nil {
		return out
	}
	items, isList := fields["items"].([]any)
	if kind := str(fields, "kind"); isList && depth < 4 && len(kind) >= 4 && kind[len(kind)-4:] == "List" {
		for _, item := range items {
			if m, ok := item.(map[string]any); ok {
				out = appendObjects(out, m, source, depth+1)
			}
		}
		return out
	}
	o := NewObject("", fields)
	o.Source = source
	return append(out, o)
}

// at is the value at a path, nil if there is none.
func at(fields map[string]any, path ...string) any {
	var v any = fields
	for _, p := range path {
		m, ok := v.(map[string]any)
		if !ok {
			return nil
		}
		v = m[p]
	}
	return v
}

// str is the text at a path.
func str(fields map[string]any, path ...string) string {
	s, _ := at(fields, path...).(string)
	return s
}

func dict(fields map[string]any, path ...string) map[string]any {
	m, _ := at(fields, path...).(map[string]any)
	return m
}

func list(fields map[string]any, path ...string) []map[string]any {
	all, _ := at(fields, path...).([]any)
	var out []map[string]any
	for _, v := range all {
		if m, ok := v.(map[string]any); ok {
			out = append(out, m)
		}
	}
	return out
}

// Typed reads an object as one of Kubernetes' types.
func Typed[T any](o *Object) (T, error) { return typed[T](o.fields) }

// typed reads fields as one of Kubernetes' types.
func typed[T any](fields map[string]any) (T, error) {
	var out T
	data, err := json.Marshal(fields)
	if err != nil {
		return out, err
	}
	return out, json.Unmarshal(data, &out)
}
