// Package check finds what keeps pods from their identities: in objects of a
// cluster or in files not applied yet.
//
// It promises to report and never to change, and to take any YAML without
// failing: what cannot be read becomes a finding with its line. It reads what
// it is given and nothing else, so the same rules hold for a cluster, for the
// output of helm template and for a values file. It does not run Go templates:
// of an injection template it sees what is there in every case.
package check
