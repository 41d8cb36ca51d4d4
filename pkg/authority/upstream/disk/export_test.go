package disk

// The parsers of the files.
var (
	ParseCertificates = parseCertificates
	ParseKey          = parseKey
)
