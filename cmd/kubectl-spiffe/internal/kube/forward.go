package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/streaming/pkg/httpstream"
)

// Forward is a connection to a port of a pod, its loopback included, through
// the API server and the kubelet.
func (c *Cluster) Forward(ctx context.Context, namespace, pod string, port int32) (net.Conn, error) {
	where := fmt.Sprintf("port %d of %s/%s", port, namespace, pod)
	u := c.client.Get().AbsPath(podPath(namespace, pod, "portforward")).URL()
	tunnel, err := portforward.NewSPDYOverWebsocketDialerForStreaming(u, c.config)
	if err != nil {
		return nil, err
	}
	transport, upgrader, err := spdy.RoundTripperFor(c.config)
	if err != nil {
		return nil, err
	}
	plain := spdy.NewDialerForStreaming(upgrader, &http.Client{Transport: transport}, http.MethodPost, u)
	conn, _, err := portforward.NewFallbackDialerForStreaming(tunnel, plain, tooOld).Dial(portforward.PortForwardProtocolV1Name)
	if err != nil {
		return nil, fmt.Errorf("forward %s: %w", where, err)
	}
	header := http.Header{}
	header.Set(corev1.StreamType, corev1.StreamTypeError)
	header.Set(corev1.PortHeader, strconv.Itoa(int(port)))
	header.Set(corev1.PortForwardRequestIDHeader, "0")
	complaints, err := conn.CreateStream(header)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("forward %s: %w", where, err), conn.Close())
	}
	_ = complaints.Close() // for writing: nothing will be
	header.Set(corev1.StreamType, corev1.StreamTypeData)
	data, err := conn.CreateStream(header)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("forward %s: %w", where, err), conn.Close())
	}
	near, far := net.Pipe()
	f := &forwarded{Conn: near, conn: conn}
	go f.watch(complaints, where)
	go f.copy(far, data)
	go f.copy(data, far)
	context.AfterFunc(ctx, func() { _ = f.Close() })
	return f, nil
}

// forwarded gives a pair of streams the deadlines a connection must have.
type forwarded struct {
	net.Conn
	conn httpstream.Connection

	mu  sync.Mutex
	err error
}

func (f *forwarded) copy(to io.WriteCloser, from io.Reader) {
	_, _ = io.Copy(to, from)
	_ = to.Close()
}

// watch reads the stream on which the kubelet says why it cannot connect.
func (f *forwarded) watch(complaints io.Reader, where string) {
	text, err := io.ReadAll(io.LimitReader(complaints, maxStderr))
	if err == nil && len(text) > 0 {
		f.mu.Lock()
		f.err = fmt.Errorf("forward %s: %s", where, text)
		f.mu.Unlock()
		_ = f.Close()
	}
}

func (f *forwarded) Read(p []byte) (int, error) {
	n, err := f.Conn.Read(p)
	if err != nil && n == 0 {
		f.mu.Lock()
		defer f.mu.Unlock()
		if f.err != nil {
			return 0, f.err
		}
	}
	return n, err
}

func (f *forwarded) Close() error {
	return errors.Join(f.Conn.Close(), f.conn.Close())
}
