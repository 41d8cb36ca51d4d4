// Package doctest keeps parts of the documentation equal to the code: a test
// compares a marked block of a page with what the code says, and writes it when
// run with -update. For tests only.
package doctest

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"
)

// Block compares the text between the markers <!-- name --> and <!-- /name -->
// of a page with want, or replaces it when update is set. Everything else on
// the page is written by hand.
func Block(t *testing.T, page, name, want string, update bool) {
	t.Helper()
	doc, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	begin, end := "<!-- "+name+" -->\n", "<!-- /"+name+" -->"
	before, rest, ok := strings.Cut(string(doc), begin)
	block, after, ok2 := strings.Cut(rest, end)
	if !ok || !ok2 {
		t.Fatalf("%s has lost its %q and %q markers", page, begin, end)
	}
	if block == want {
		return
	}
	if !update {
		t.Fatalf("%s is out of date between its %q markers; run this package's tests with -update", page, name)
	}
	if err := os.WriteFile(page, []byte(before+begin+want+end+after), 0o644); err != nil { //nolint:gosec // a page for everybody to read
		t.Fatal(err)
	}
}

// Flags is the table of all flags of a set, in Markdown.
func Flags(fs *flag.FlagSet) string {
	var b strings.Builder
	b.WriteString("| flag | default | meaning |\n|---|---|---|\n")
	fs.VisitAll(func(f *flag.Flag) {
		value, usage := flag.UnquoteUsage(f)
		name := "--" + f.Name
		if value != "" {
			name += " " + strings.ToUpper(value)
		}
		def := f.DefValue
		if def != "" {
			def = "`" + def + "`"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", name, def, strings.ReplaceAll(usage, "|", "\\|"))
	})
	return b.String()
}
