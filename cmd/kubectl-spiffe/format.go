package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"strconv"
	"strings"
	"text/tabwriter"
	"unicode"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// format is how a command prints its answer; it is a flag value.
type format string

const (
	formatPretty format = "pretty"
	formatJSON   format = "json"
	formatYAML   format = "yaml"
	formatTable  format = "table"
	formatWide   format = "wide"
)

func (f *format) String() string { return string(*f) }
func (f *format) Type() string   { return "format" }

func (f *format) Set(s string) error {
	switch v := format(strings.ToLower(s)); v {
	case formatPretty, formatJSON, formatYAML, formatTable, formatWide:
		*f = v
	case "prettyprint":
		*f = formatPretty
	default:
		return fmt.Errorf("unknown format option: %q", s)
	}
	return nil
}

// answer is one result in all the forms it can be printed in.
type answer struct {
	// message is printed as JSON and YAML: its fields under the wire's names.
	message proto.Message
	// value is printed instead of message if there is none.
	value any
	// pretty writes the text for people and decides on success; nil: the
	// table is the pretty form.
	pretty func() error
	// table fills rows; nil: table and wide print the pretty form.
	table func(t *table, wide bool)
}

// print writes an answer in the form asked for.
func (a *app) print(x answer) error {
	switch {
	case a.output == formatJSON || a.output == formatYAML:
		v, err := plain(x)
		if err != nil {
			return err
		}
		if a.output == formatYAML {
			return writeYAML(a.stdout, v)
		}
		return writeJSON(a.stdout, v)
	case x.table != nil && (a.output != formatPretty || x.pretty == nil):
		t := &table{}
		x.table(t, a.output == formatWide)
		return t.write(a.stdout)
	}
	return x.pretty()
}

// plain turns an answer into maps, lists, strings, numbers and bools.
// Everything that is set to nothing is left out, defaults are kept.
func plain(x answer) (any, error) {
	var (
		data []byte
		err  error
	)
	if x.message != nil {
		data, err = protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(x.message)
	} else {
		data, err = json.Marshal(x.value)
	}
	if err != nil {
		return nil, err
	}
	var v any
	if err := json.Unmarshal(data, &v); err != nil {
		return nil, err
	}
	return prune(v), nil
}

// prune removes null members.
func prune(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for k, e := range v {
			if e == nil {
				delete(v, k)
			} else {
				v[k] = prune(e)
			}
		}
	case []any:
		for i := range v {
			v[i] = prune(v[i])
		}
	}
	return v
}

// writeJSON is one line with sorted members.
func writeJSON(w io.Writer, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", data)
	return err
}

func writeYAML(w io.Writer, v any) error {
	enc := yaml.NewEncoder(w)
	enc.SetIndent(2)
	if err := enc.Encode(v); err != nil {
		return err
	}
	return enc.Close()
}

// table is a list of rows in columns of equal width.
type table struct {
	header []string
	rows   [][]string
}

func (t *table) columns(names ...string) { t.header = append(t.header, names...) }
func (t *table) row(cells ...string)     { t.rows = append(t.rows, cells) }

func (t *table) write(w io.Writer) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	for _, row := range append([][]string{t.header}, t.rows...) {
		for i, cell := range row {
			row[i] = cmp.Or(clean(cell), "-")
		}
		if _, err := fmt.Fprintln(tw, strings.Join(row, "\t")); err != nil {
			return err
		}
	}
	return tw.Flush()
}

// clean makes text that a workload may have chosen harmless for a terminal:
// what does not print is shown as an escape.
func clean(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return s
	}
	var out strings.Builder
	for _, r := range s {
		if unicode.IsPrint(r) && r != utf8.RuneError {
			out.WriteRune(r)
		} else {
			quoted := strconv.QuoteRuneToASCII(r)
			out.WriteString(quoted[1 : len(quoted)-1])
		}
	}
	return out.String()
}

// count is "1 entry" or "n entries".
func count[N int | int32 | int64](n N, one, many string) string {
	if n == 1 {
		return fmt.Sprintf("1 %s", one)
	}
	return fmt.Sprintf("%d %s", n, many)
}
