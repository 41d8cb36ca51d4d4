package spireserver

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// dialTimeout bounds an attempt to reach one IP address. A server that is
	// there answers in milliseconds; one that has moved leaves an address at
	// which nobody does, and whoever knows the new one must not wait for that.
	dialTimeout = 2 * time.Second
	// dialStagger is the lead that an IP address of a name has over the next.
	dialStagger = 250 * time.Millisecond
	// maxIPs is how many addresses of a name are tried.
	maxIPs = 16
	// deadPeer is how long sent data may stay unacknowledged, and how long a
	// quiet connection may be silent, before the kernel gives it up.
	deadPeer = 20 * time.Second
)

// dialTCP connects to host:port. The name is looked up each time; of several IP
// addresses that which answers first is taken.
func dialTCP(ctx context.Context, address string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	d := net.Dialer{
		Timeout:         dialTimeout,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: 10 * time.Second, Interval: 5 * time.Second, Count: 2},
		Control: func(_, _ string, raw syscall.RawConn) error {
			var err error
			if cerr := raw.Control(func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadPeer/time.Millisecond))
			}); cerr != nil {
				return cerr
			}
			return err
		},
	}
	ips := []string{host}
	if net.ParseIP(host) == nil {
		lctx, cancel := context.WithTimeout(ctx, dialTimeout)
		ips, err = net.DefaultResolver.LookupHost(lctx, host)
		cancel()
		if err != nil {
			return nil, err
		}
	}
	conn, err := firstOf(ctx, ips, func(ctx context.Context, ip string) (net.Conn, error) {
		return d.DialContext(ctx, "tcp", net.JoinHostPort(ip, port))
	})
	if err != nil && len(ips) > 1 {
		return nil, fmt.Errorf("%s: %w", address, err)
	}
	return conn, err
}

// firstOf dials addresses one after the other, the next when one has failed or
// has had its lead, and takes the connection that is there first.
func firstOf(ctx context.Context, addresses []string, dial func(context.Context, string) (net.Conn, error)) (net.Conn, error) {
	if len(addresses) == 0 {
		return nil, errors.New("the name has no address")
	}
	addresses = addresses[:min(len(addresses), maxIPs)]
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		conn net.Conn
		err  error
	}
	answers := make(chan answer, len(addresses))
	started := 0
	start := func() {
		address := addresses[started]
		started++
		go func() {
			conn, err := dial(ctx, address)
			answers <- answer{conn, err}
		}()
	}
	start()
	lead := time.NewTimer(dialStagger)
	defer lead.Stop()
	var errs []error
	for len(errs) < len(addresses) {
		select {
		case <-lead.C:
		case a := <-answers:
			if a.err == nil {
				late := started - len(errs) - 1
				go func() {
					for range late {
						if a := <-answers; a.err == nil {
							_ = a.conn.Close()
						}
					}
				}()
				return a.conn, nil
			}
			errs = append(errs, a.err)
		}
		if started < len(addresses) {
			start()
			lead.Reset(dialStagger)
		}
	}
	return nil, errors.Join(errs...)
}
