package authority

// TrustReport says how far the own trust bundle has got on one node: what the
// agent holds, and what those it serves have acknowledged. An authority that
// is about to sign with a new key reads it to know whether anybody would not
// understand the signatures yet.
type TrustReport struct {
	X509, JWT TrustProgress
	// Outdated is how many X.509-SVIDs in use hang on an authority that is
	// tainted or no longer in the bundle.
	Outdated int
}

// TrustProgress is one kind of authorities in the own bundle. IDs are subject
// key IDs in lowercase hex, or JWT key IDs.
type TrustProgress struct {
	// Held are those in the bundle the agent holds.
	Held []string
	// Acknowledged are those that every open consumer has acknowledged; where
	// nobody consumes the bundle, those held.
	Acknowledged []string
	// Consumers is how many open streams carry the bundle; Lagging, how many of
	// them have not acknowledged what the agent holds.
	Consumers, Lagging int
	// Laggards names some of the lagging ones.
	Laggards []Laggard
}

// Laggard is a consumer that has not acknowledged the bundle.
type Laggard struct {
	Name string // pod as namespace/name, or a process
	API  string // sotw, delta or a method of the Workload API
	// Rejected is what the client said when it turned the bundle down; empty =
	// it said nothing.
	Rejected string
}

// Bounds of a report: whoever writes one keeps to them, whoever reads one cuts.
const (
	MaxReportedIDs      = 64
	MaxReportedLaggards = 8
	MaxReportedText     = 256 // bytes of any string
)
