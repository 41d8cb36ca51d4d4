package config

import (
	"encoding"
	"fmt"
	"reflect"
	"strings"
)

// Reference is the table of all keys with type, default and meaning, in
// Markdown, made from the types themselves so that it cannot drift.
func Reference() string { return reference(Default()) }

// AuthorityReference is the same for the authority's configuration.
func AuthorityReference() string { return reference(DefaultAuthority()) }

// Keys are the keys of an agent's configuration, in the order of Reference.
func Keys() []string { return keys("", reflect.TypeFor[Agent]()) }

func keys(prefix string, t reflect.Type) []string {
	var out []string
	for f := range t.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		if f.Type.Kind() == reflect.Struct {
			out = append(out, keys(prefix+name+".", f.Type)...)
		} else {
			out = append(out, prefix+name)
		}
	}
	return out
}

func reference(defaults any) string {
	var b strings.Builder
	b.WriteString("| key | type | default | meaning |\n|---|---|---|---|\n")
	describe(&b, "", reflect.ValueOf(defaults))
	return b.String()
}

func describe(b *strings.Builder, prefix string, v reflect.Value) {
	for f, value := range v.Fields() {
		name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
		key := prefix + name
		if f.Type.Kind() == reflect.Struct {
			describe(b, key+".", value)
			continue
		}
		fmt.Fprintf(b, "| `%s` | %s | %s | %s |\n", key, typeName(f.Type), defaultText(value), f.Tag.Get("doc"))
	}
}

func typeName(t reflect.Type) string {
	switch {
	case t == reflect.TypeFor[Duration]():
		return "duration"
	case t.Kind() == reflect.Slice:
		return "list of " + typeName(t.Elem())
	case t.Kind() == reflect.Pointer:
		return typeName(t.Elem())
	case t.Kind() == reflect.Int, t.Kind() == reflect.Int64:
		return "integer"
	case t.Kind() == reflect.Bool:
		return "boolean"
	}
	return "string"
}

func defaultText(v reflect.Value) string {
	if v.Kind() == reflect.Pointer {
		v = v.Elem()
	}
	if m, ok := reflect.TypeAssert[encoding.TextMarshaler](v); ok {
		if text, err := m.MarshalText(); err == nil {
			return "`" + string(text) + "`"
		}
	}
	switch {
	case v.Kind() == reflect.Slice && v.Len() == 0, v.Kind() == reflect.String && v.Len() == 0:
		return ""
	case v.Kind() == reflect.Slice:
		return "`[" + strings.Join(v.Interface().([]string), ", ") + "]`"
	}
	return fmt.Sprintf("`%v`", v.Interface())
}
