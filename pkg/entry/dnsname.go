package entry

import (
	"errors"
	"fmt"
	"strings"

	"golang.org/x/net/idna"
)

// Errors of CheckDNSName.
var (
	errDNSASCII     = errors.New("name must be ascii")
	errDNSWildcards = errors.New("too many wildcards")
	errDNSFirst     = errors.New("wildcard must be first label")
	errDNSEmpty     = errors.New("empty or only whitespace")
	errDNSDot       = errors.New("domain ends with dot")
)

// CheckDNSName refuses what cannot be a DNS name of an entry. A wildcard may be
// the whole first label; underscores and upper case pass, as with SPIRE Server.
func CheckDNSName(name string) error {
	for i := range len(name) {
		if name[i] >= 0x80 {
			return errDNSASCII
		}
	}
	rest := name
	switch strings.Count(name, "*") {
	case 0:
	case 1:
		var first bool
		if rest, first = strings.CutPrefix(name, "*."); !first {
			return errDNSFirst
		}
	default:
		return errDNSWildcards
	}
	rest = strings.TrimSpace(rest)
	switch {
	case rest == "":
		return errDNSEmpty
	case strings.HasSuffix(rest, "."):
		return errDNSDot
	}
	profile := idna.New(idna.ValidateLabels(true), idna.VerifyDNSLength(true))
	if _, err := profile.ToASCII(rest); err != nil {
		return fmt.Errorf("idna error\n%w", err)
	}
	return nil
}

func checkDNSNames(names []string) error {
	for _, name := range names {
		if err := CheckDNSName(name); err != nil {
			return fmt.Errorf("invalid DNS name: %w", err)
		}
	}
	return nil
}
