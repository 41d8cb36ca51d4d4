// Package spirewire is the SPIRE Server API on the wire: our own .proto files
// for spire.api.types and the nine server services, one folder each, with the
// generated code committed beside them.
//
// Promise: full names, method paths, field numbers, types and enum numbers are
// those of SPIRE 1.15. A test compares every compiled descriptor with
// testdata/wire.golden, so that a slip of the pen cannot become an
// incompatibility. File names, Go packages and the split into files are ours.
//
// A second copy of spire.api.types must not be linked into the same binary:
// the protobuf registry refuses it. Tests that drive SPIRE's own Go packages
// run in another process.
package spirewire

//go:generate ./generate.sh

// DefaultAdminSocket is where the agent serves this API and the command line
// client looks for it, if neither is told otherwise.
const DefaultAdminSocket = "/run/spiffe-node/admin/api.sock"
