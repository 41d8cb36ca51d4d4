package peersock

import (
	"context"
	"errors"
	"net"

	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// Credentials are a gRPC server's credentials for connections of a Listener:
// they pass the connection through and make its *Peer the AuthInfo.
func Credentials() credentials.TransportCredentials { return transport{} }

// FromContext is the peer of the call ctx belongs to; false if the call did
// not come through a Listener.
func FromContext(ctx context.Context) (*Peer, bool) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, false
	}
	who, ok := p.AuthInfo.(*Peer)
	return who, ok
}

// AuthType is the name of the way in which peers are known.
func (p *Peer) AuthType() string { return authType }

// GetCommonAuthInfo says that nobody else reads or writes this connection: it
// does not leave the kernel.
func (p *Peer) GetCommonAuthInfo() credentials.CommonAuthInfo {
	return credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}
}

const authType = "peersock"

var (
	_ credentials.AuthInfo = (*Peer)(nil)

	errServerOnly = errors.New("peersock: these credentials are for servers")
	errNotOurs    = errors.New("peersock: the connection does not come from a peersock Listener")
)

type transport struct{}

func (transport) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errServerOnly
}

func (transport) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := conn.(*Conn)
	if !ok {
		conn.Close()
		return nil, nil, errNotOurs
	}
	return c, c.Peer(), nil
}

func (transport) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: authType}
}

func (t transport) Clone() credentials.TransportCredentials { return t }

func (transport) OverrideServerName(string) error { return errServerOnly }
