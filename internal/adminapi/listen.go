package adminapi

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// probeTimeout bounds the question whether somebody still serves a socket that
// is already there.
const probeTimeout = time.Second

// listener is a unix listener that removes its socket only while the path
// still leads to the inode it made.
type listener struct {
	*net.UnixListener
	path     string
	dev, ino uint64
	once     sync.Once
}

// listen makes the socket. Its directory is created closed to others; one that
// is there already must be the agent's own and closed. A socket left behind is
// removed only after a connection to it was refused.
func listen(ctx context.Context, path, group string) (*listener, error) {
	gid := -1
	if group != "" {
		var err error
		if gid, err = lookupGroup(group); err != nil {
			return nil, err
		}
	}
	if err := prepareDir(filepath.Dir(path), gid); err != nil {
		return nil, err
	}
	if err := clearStale(ctx, path); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{}
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("admin socket: %w", err)
	}
	ul := l.(*net.UnixListener)
	ul.SetUnlinkOnClose(false)
	out := &listener{UnixListener: ul, path: path}
	if err := out.secure(gid); err != nil {
		return nil, errors.Join(err, out.Close())
	}
	return out, nil
}

func (l *listener) secure(gid int) error {
	dev, ino, err := inode(l.path)
	if err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	l.dev, l.ino = dev, ino
	mode := fs.FileMode(0o600)
	if gid >= 0 {
		mode = 0o660
		if err := os.Lchown(l.path, -1, gid); err != nil {
			return fmt.Errorf("admin socket: %w", err)
		}
	}
	if err := os.Chmod(l.path, mode); err != nil {
		return fmt.Errorf("admin socket: %w", err)
	}
	return nil
}

// Accept tells later stages who called, for the audit log.
func (l *listener) Accept() (net.Conn, error) {
	c, err := l.AcceptUnix()
	if err != nil {
		return nil, err
	}
	return &conn{UnixConn: c, peer: peerOf(c)}, nil
}

// Close stops accepting and removes the socket if it is still ours.
func (l *listener) Close() error {
	err := l.UnixListener.Close()
	l.once.Do(func() {
		if dev, ino, e := inode(l.path); e == nil && dev == l.dev && ino == l.ino {
			if e := os.Remove(l.path); err == nil {
				err = e
			}
		}
	})
	return err
}

// conn answers with the peer's credentials where a unix socket has no address.
type conn struct {
	*net.UnixConn
	peer peer
}

func (c *conn) RemoteAddr() net.Addr { return c.peer }

// peer is who connected, as the kernel recorded it; pid 0 if it did not say.
type peer struct {
	pid      int32
	uid, gid uint32
}

func (p peer) Network() string { return "unix" }
func (p peer) String() string  { return fmt.Sprintf("pid %d uid %d", p.pid, p.uid) }

func peerOf(c *net.UnixConn) peer {
	var p peer
	raw, err := c.SyscallConn()
	if err != nil {
		return p
	}
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			p = peer{pid: cred.Pid, uid: cred.Uid, gid: cred.Gid}
		}
	})
	return p
}

func prepareDir(dir string, gid int) error {
	mode := fs.FileMode(0o700)
	if gid >= 0 {
		mode = 0o750
	}
	// Others may pass through the directories above, as through /run.
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil { //nolint:gosec // see above
		return fmt.Errorf("admin socket directory: %w", err)
	}
	switch err := os.Mkdir(dir, mode); {
	case err == nil:
		// The umask may have taken bits away, never added any.
		if gid >= 0 {
			if err := os.Lchown(dir, -1, gid); err != nil {
				return fmt.Errorf("admin socket directory: %w", err)
			}
		}
		if err := os.Chmod(dir, mode); err != nil {
			return fmt.Errorf("admin socket directory: %w", err)
		}
		return nil
	case !errors.Is(err, fs.ErrExist):
		return fmt.Errorf("admin socket directory: %w", err)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("admin socket directory: %w", err)
	}
	if !info.IsDir() {
		return fmt.Errorf("admin socket directory %s is not a directory; name another one", dir)
	}
	st := info.Sys().(*syscall.Stat_t)
	if int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("admin socket directory %s belongs to uid %d, not to this agent (uid %d); name another one", dir, st.Uid, os.Geteuid())
	}
	if open := info.Mode().Perm() &^ mode; open != 0 {
		return fmt.Errorf("admin socket directory %s has mode %04o, at most %04o is allowed: whoever gets at the socket can hand out identities; chmod %o it or name another one",
			dir, info.Mode().Perm(), mode, mode)
	}
	if gid >= 0 && info.Mode().Perm()&0o070 != 0 && int(st.Gid) != gid {
		return fmt.Errorf("admin socket directory %s is open to group %d, not to the configured group %d; chgrp it or name another one", dir, st.Gid, gid)
	}
	return nil
}

func clearStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return fmt.Errorf("admin socket: %w", err)
	case info.Mode().Type() != fs.ModeSocket:
		return fmt.Errorf("admin socket %s: something that is not a socket is in the way; remove it or name another path", path)
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	switch {
	case err == nil:
		_ = c.Close()
		return fmt.Errorf("admin socket %s is served by another process; stop it or name another path", path)
	case !errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("admin socket %s: cannot tell whether somebody serves it: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("admin socket: remove the stale one: %w", err)
	}
	return nil
}

func lookupGroup(name string) (int, error) {
	if gid, err := strconv.Atoi(name); err == nil && gid >= 0 {
		return gid, nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, fmt.Errorf("admin socket group: %w", err)
	}
	return strconv.Atoi(g.Gid)
}

func inode(path string) (dev, ino uint64, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, 0, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	return uint64(st.Dev), st.Ino, nil //nolint:unconvert // Dev is narrower on some architectures
}
