package entry

// Set is an immutable, indexed snapshot of registration entries.
type Set struct{}
