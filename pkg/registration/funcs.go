package registration

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"regexp"
	"strings"
	"text/template"
)

var errNegative = errors.New("trunc: length is negative")

// templateFuncs are what templates may call besides text/template's own: a few
// functions of texts, named and with their arguments in order as Helm's users
// know them, so that a label or a name can be made fit for a SPIFFE ID. None
// has an effect, reads the clock, the environment or a random number: equal
// objects give equal entries.
func templateFuncs() template.FuncMap {
	return template.FuncMap{
		"lower":      strings.ToLower,
		"upper":      strings.ToUpper,
		"trim":       strings.TrimSpace,
		"trimPrefix": func(prefix, s string) string { return strings.TrimPrefix(s, prefix) },
		"trimSuffix": func(suffix, s string) string { return strings.TrimSuffix(s, suffix) },
		"replace":    func(from, to, s string) string { return strings.ReplaceAll(s, from, to) },
		"contains":   func(part, s string) bool { return strings.Contains(s, part) },
		"hasPrefix":  func(prefix, s string) bool { return strings.HasPrefix(s, prefix) },
		"hasSuffix":  func(suffix, s string) bool { return strings.HasSuffix(s, suffix) },
		"splitList":  func(sep, s string) []string { return strings.Split(s, sep) },
		"join":       func(sep string, list []string) string { return strings.Join(list, sep) },
		"trunc":      trunc,
		"default":    orDefault,
		"sha256sum":  func(s string) string { h := sha256.Sum256([]byte(s)); return hex.EncodeToString(h[:]) },
		"regexReplaceAll": func(expr, s, to string) (string, error) {
			re, err := regexp.Compile(expr)
			if err != nil {
				return "", err
			}
			return re.ReplaceAllString(s, to), nil
		},
	}
}

func trunc(n int, s string) (string, error) {
	if n < 0 {
		return "", errNegative
	}
	return s[:min(n, len(s))], nil
}

// orDefault is value, or def if it is missing or empty.
func orDefault(def string, value any) any {
	if value == nil || value == "" {
		return def
	}
	return value
}
