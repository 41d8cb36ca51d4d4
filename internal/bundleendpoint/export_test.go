package bundleendpoint

// LookAgain has a certificate from files looked at at the next handshake,
// however short the last look was ago.
func LookAgain(c *Certificate) { c.again() }
