package spireserver

import (
	"context"
	"net"
)

// ForTests sets what only tests may: the dialer (nil = TCP), state on any
// filesystem, and polling of a server that would push.
func (c *Config) ForTests(dial func(ctx context.Context, address string) (net.Conn, error), noWatch bool) {
	c.dial, c.anyFilesystem, c.noWatch = dial, true, noWatch
}
