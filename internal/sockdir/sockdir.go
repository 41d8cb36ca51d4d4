// Package sockdir keeps the directory that pods mount: the public socket and its
// alternate names.
//
// # Promise
//
// The directory's inode never changes, because every pod holds a bind mount of
// it: the directory is created or adopted, never removed or replaced. The
// socket changes by bind and rename inside it, so that its name never points
// to nothing while an agent replaces another. A socket is unlinked only while
// its inode is still the one this process made. An agent of another make may
// unlink by name when it ends: links to the socket are made again.
//
// # Threats
//
// Pods see the directory read-only, but a mis-mounted one could write to it.
// Nothing but sockets and links is ever placed here, nothing in it is trusted
// or read back.
package sockdir

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"
)

// Socket is a listening unix socket published in a directory.
type Socket struct {
	*net.UnixListener
	path  string
	inode uint64
	links []string
}

// Listen makes or adopts dir (mode 0755), and publishes a listening socket there
// as name, connectable by any uid, with links as relative symbolic links to
// it. Whatever stood under those names before is replaced in one step, unless
// it is a directory or a regular file: those are refused, for they are not an
// agent's.
func Listen(dir, name string, links ...string) (*Socket, error) {
	if err := adopt(dir); err != nil {
		return nil, err
	}
	for _, n := range append([]string{name}, links...) {
		if err := replaceable(dir, n); err != nil {
			return nil, err
		}
	}
	// Bound under a private name first: connecting clients never meet a socket
	// that is bound but not yet listening or not yet open to them.
	tmp := filepath.Join(dir, "."+name+"."+strconv.Itoa(os.Getpid()))
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove left-over socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen in socket directory %q: %w", dir, err)
	}
	l.SetUnlinkOnClose(false)
	s := &Socket{UnixListener: l, path: filepath.Join(dir, name)}
	if err := s.publish(tmp, dir, links); err != nil {
		_ = l.Close()
		_ = os.Remove(tmp)
		return nil, err
	}
	return s, nil
}

func (s *Socket) publish(tmp, dir string, links []string) error {
	// Any uid must be able to connect: sidecars run as 1337, applications as
	// anything. Who they are is decided by the kernel's word, not by the mode.
	if err := os.Chmod(tmp, 0o777); err != nil { //nolint:gosec // public by design
		return fmt.Errorf("open socket %q to all users: %w", s.path, err)
	}
	var err error
	if s.inode, err = inode(tmp); err != nil {
		return err
	}
	if err := os.Rename(tmp, s.path); err != nil {
		return fmt.Errorf("publish socket: %w", err)
	}
	for _, link := range links {
		if err := s.link(filepath.Join(dir, link)); err != nil {
			return err
		}
		s.links = append(s.links, filepath.Join(dir, link))
	}
	return nil
}

// link makes path a relative link to the socket, whatever it was.
func (s *Socket) link(path string) error {
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+strconv.Itoa(os.Getpid()))
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove left-over link: %w", err)
	}
	err := os.Symlink(filepath.Base(s.path), tmp)
	if err == nil {
		err = os.Rename(tmp, path)
	}
	if err != nil {
		return fmt.Errorf("publish alternate socket name %q: %w", filepath.Base(path), err)
	}
	return nil
}

// KeepLinks makes links again that somebody has removed, until ctx ends:
// SPIRE Agent unlinks its socket's name when it ends, also if this agent has
// taken the directory over before. A link must be missing at two looks, every
// apart, for the agent that comes next removes a name before it binds it; one
// that is there and leads elsewhere is that agent's. said is told of each link
// that was made, or why it could not be.
func (s *Socket) KeepLinks(ctx context.Context, every time.Duration, said func(link string, err error)) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	missing := map[string]bool{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		current := s.Current()
		for _, link := range s.links {
			_, err := os.Lstat(link)
			gone := current && errors.Is(err, fs.ErrNotExist)
			if gone && missing[link] {
				said(link, s.link(link))
			}
			missing[link] = gone
		}
	}
}

// Path is where the socket is published.
func (s *Socket) Path() string { return s.path }

// Current says whether the published name still leads to this socket, and not to
// that of an agent that has taken over.
func (s *Socket) Current() bool {
	ino, err := inode(s.path)
	return err == nil && ino == s.inode
}

// Unpublish removes the socket's name and links if they are still this
// process's own. Accepted connections are not touched.
func (s *Socket) Unpublish() error {
	if !s.Current() {
		return nil
	}
	errs := []error{}
	for _, link := range s.links {
		if to, err := os.Readlink(link); err == nil && to == filepath.Base(s.path) {
			errs = append(errs, os.Remove(link))
		}
	}
	errs = append(errs, os.Remove(s.path))
	return errors.Join(errs...)
}

func adopt(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // public by design
		return fmt.Errorf("make socket directory: %w", err)
	}
	fi, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("look at socket directory: %w", err)
	}
	if !fi.IsDir() {
		return fmt.Errorf("socket directory %q is not a directory: pods could not mount it; name the directory itself, not a link to it", dir)
	}
	if fi.Mode().Perm()&0o055 != 0o055 {
		if err := os.Chmod(dir, fi.Mode().Perm()|0o055); err != nil {
			return fmt.Errorf("open socket directory %q to all users: %w", dir, err)
		}
	}
	return nil
}

func replaceable(dir, name string) error {
	if name != filepath.Base(name) || name == "." || name == ".." || name == "" {
		return fmt.Errorf("socket name %q must be a bare file name", name)
	}
	fi, err := os.Lstat(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at socket name %q: %w", name, err)
	}
	if fi.IsDir() || fi.Mode().IsRegular() {
		return fmt.Errorf("%q is neither a socket nor a link; it is not an agent's and stays: move it away or choose another socket directory", filepath.Join(dir, name))
	}
	return nil
}

func inode(path string) (uint64, error) {
	fi, err := os.Lstat(path)
	if err != nil {
		return 0, fmt.Errorf("look at socket: %w", err)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return 0, fmt.Errorf("no inode number for %q on this system", path)
	}
	return st.Ino, nil
}
