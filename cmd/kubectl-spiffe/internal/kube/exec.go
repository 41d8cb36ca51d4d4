package kube

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"sync"

	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/util/exec"
	"k8s.io/streaming/pkg/httpstream"
)

// maxStderr is how much of a command's complaints is kept.
const maxStderr = 4 << 10

// ErrNoCommand is wrapped by Exec's connection when the container has no such
// program.
var ErrNoCommand = errors.New("the container has no such command")

// Exec runs a command in a container and joins its standard input and output
// to a connection. What goes wrong later, and what the command wrote to its
// standard error, is the error of Read.
func (c *Cluster) Exec(ctx context.Context, namespace, pod, container string, command ...string) (net.Conn, error) {
	u := c.client.Get().AbsPath(podPath(namespace, pod, "exec")).URL()
	u.RawQuery = url.Values{
		"container": {container}, "command": command,
		"stdin": {"true"}, "stdout": {"true"}, "stderr": {"true"},
	}.Encode()
	socket, err := remotecommand.NewWebSocketExecutor(c.config, "GET", u.String())
	if err != nil {
		return nil, err
	}
	spdy, err := remotecommand.NewSPDYExecutor(c.config, "POST", u)
	if err != nil {
		return nil, err
	}
	executor, err := remotecommand.NewFallbackExecutor(socket, spdy, tooOld)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	near, far := net.Pipe()
	conn := &execConn{Conn: near, cancel: cancel, where: fmt.Sprintf("%s/%s, container %s", namespace, pod, container)}
	go func() {
		defer cancel()
		var stderr limited
		err := executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: far, Stdout: far, Stderr: &stderr})
		conn.end(err, stderr.String())
		_ = far.Close()
	}()
	return conn, nil
}

// tooOld says whether the other side, or a proxy before it, speaks SPDY only.
func tooOld(err error) bool {
	return httpstream.IsUpgradeFailure(err) || httpstream.IsHTTPSProxyError(err)
}

func podPath(namespace, pod, sub string) string {
	return "/api/v1/namespaces/" + url.PathEscape(namespace) + "/pods/" + url.PathEscape(pod) + "/" + sub
}

// execConn is a running command as a connection.
type execConn struct {
	net.Conn
	cancel context.CancelFunc
	where  string

	mu  sync.Mutex
	err error
}

func (c *execConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil && n == 0 {
		c.mu.Lock()
		defer c.mu.Unlock()
		if c.err != nil {
			return 0, c.err
		}
	}
	return n, err
}

// Close ends the command.
func (c *execConn) Close() error {
	err := c.Conn.Close()
	c.cancel()
	return err
}

func (c *execConn) end(err error, stderr string) {
	if err == nil && stderr == "" {
		return
	}
	text := strings.TrimSpace(stderr)
	code, exited := errors.AsType[exec.CodeExitError](err)
	switch {
	case exited && (code.Code == 126 || code.Code == 127), err != nil && noCommand(err.Error()+text):
		err = fmt.Errorf("exec in %s: %w", c.where, ErrNoCommand)
	case err == nil || exited && text != "":
		err = fmt.Errorf("exec in %s: %s", c.where, text)
	default:
		err = fmt.Errorf("exec in %s: %w", c.where, err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
}

// noCommand knows how container runtimes say it: none has a code for it.
func noCommand(text string) bool {
	for _, s := range []string{"executable file not found", "no such file or directory", "stat /", "not found in $PATH"} {
		if strings.Contains(text, s) {
			return true
		}
	}
	return false
}

// limited keeps the beginning of what is written to it.
type limited struct {
	mu  sync.Mutex
	buf []byte
}

var _ io.Writer = (*limited)(nil)

func (l *limited) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = append(l.buf, p[:min(len(p), maxStderr-len(l.buf))]...)
	return len(p), nil
}

func (l *limited) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.buf)
}
