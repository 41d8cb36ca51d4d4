package ledger

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/durable"
)

// Store is the writing side. What is on disk counts: a second process may write
// while one takes over from the other. Safe for concurrent use; two calls for
// one volume are the caller's to keep apart.
type Store struct {
	dir string
	log *slog.Logger

	mu      sync.Mutex
	records map[string]kept  // by volume ID
	bad     map[string]error // by file name
}

// kept is a record and the file it was read from or written to.
type kept struct {
	Record
	stamp
}

// stamp tells one version of a file from the next: every Put makes a new
// inode.
type stamp struct {
	ino   uint64
	mtime unix.Timespec
}

func stampOf(path string) (stamp, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return stamp{}, err
	}
	return stamp{ino: st.Ino, mtime: st.Mtim}, nil
}

// Open makes the directory if it is missing (owner-only; a directory open to
// others is refused) and reads what is in it. Files that are not records are
// logged, kept and listed by Bad. logger may be nil.
func Open(dir string, logger *slog.Logger) (*Store, error) {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	if err := durable.OwnerDir(dir); err != nil {
		return nil, fmt.Errorf("open the publish ledger: %w", err)
	}
	s := &Store{dir: filepath.Clean(dir), log: logger, records: map[string]kept{}, bad: map[string]error{}}
	if err := s.removeTemp(); err != nil {
		return nil, fmt.Errorf("open the publish ledger: %w", err)
	}
	return s, s.Refresh()
}

// Dir is the directory of the ledger.
func (s *Store) Dir() string { return s.dir }

// Refresh reads the directory again.
func (s *Store) Refresh() error {
	// Under the lock, so that a Put in between is not forgotten again.
	s.mu.Lock()
	defer s.mu.Unlock()
	records, bad, err := scan(s.dir)
	if err != nil {
		return err
	}
	for name, err := range bad {
		if old, known := s.bad[name]; !known || old.Error() != err.Error() {
			s.log.Error("ledger record cannot be read and is left as it is", slog.String("file", filepath.Join(s.dir, name)), slog.Any("error", err))
		}
	}
	s.records = make(map[string]kept, len(records))
	for _, r := range records {
		// Without a stamp: the next Get reads the file once more.
		s.records[r.VolumeID] = kept{Record: r}
	}
	s.bad = bad
	return nil
}

// Put writes the record, in place of an earlier one for the same volume. A
// file of that name that cannot be read is renamed, not lost.
func (s *Store) Put(r Record) error {
	data, err := Encode(r)
	if err != nil {
		return err
	}
	name := FileName(r.VolumeID)
	path := filepath.Join(s.dir, name)
	if err := s.setAside(name); err != nil {
		return err
	}
	if err := durable.WriteFile(path, data, 0o600); err != nil {
		return fmt.Errorf("record volume %s of pod %s/%s: %w", r.VolumeID, r.PodNamespace, r.PodName, err)
	}
	r.Version = Version
	r.Published = r.Published.UTC()
	st, err := stampOf(path)
	if err != nil {
		return fmt.Errorf("record volume %s: %w", r.VolumeID, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.records[r.VolumeID] = kept{Record: r, stamp: st}
	return nil
}

// Delete removes the volume's record; that there is none is no error.
func (s *Store) Delete(volumeID string) error {
	name := FileName(volumeID)
	if err := s.setAside(name); err != nil {
		return err
	}
	if err := durable.Remove(filepath.Join(s.dir, name)); err != nil {
		return fmt.Errorf("forget volume %s: %w", volumeID, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.records, volumeID)
	return nil
}

// Get is the record of a volume, as it is on disk now.
func (s *Store) Get(volumeID string) (Record, bool) {
	name := FileName(volumeID)
	now, err := stampOf(filepath.Join(s.dir, name))
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		delete(s.records, volumeID)
		return Record{}, false
	}
	if k, ok := s.records[volumeID]; ok && k.stamp == now {
		return k.Record, true
	}
	r, err := load(s.dir, name)
	if err != nil {
		if s.bad[name] == nil && !errors.Is(err, fs.ErrNotExist) {
			s.bad[name] = err
			s.log.Error("ledger record cannot be read and is left as it is", slog.String("file", filepath.Join(s.dir, name)), slog.Any("error", err))
		}
		delete(s.records, volumeID)
		return Record{}, false
	}
	s.records[volumeID] = kept{Record: r, stamp: now}
	return r, true
}

// List is every record this process has written or read, by volume ID.
func (s *Store) List() []Record {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]Record, 0, len(s.records))
	for _, id := range slices.Sorted(maps.Keys(s.records)) {
		out = append(out, s.records[id].Record)
	}
	return out
}

// Len is the length of List.
func (s *Store) Len() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.records)
}

// Bad are the files that could not be read, by name.
func (s *Store) Bad() map[string]error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return maps.Clone(s.bad)
}

// Writable is nil if a record could be written now: the directory is there, on
// a filesystem that is neither read-only nor full.
func (s *Store) Writable() error {
	if err := unix.Access(s.dir, unix.W_OK|unix.X_OK); err != nil {
		return fmt.Errorf("the publish ledger %s cannot be written: %w", s.dir, err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(s.dir, &st); err != nil {
		return fmt.Errorf("the publish ledger %s cannot be written: %w", s.dir, err)
	}
	// A filesystem that does not count blocks or inodes shows none at all.
	if st.Blocks > 0 && st.Bavail == 0 || st.Files > 0 && st.Ffree == 0 {
		return fmt.Errorf("the publish ledger %s cannot be written: %w", s.dir, unix.ENOSPC)
	}
	return nil
}

// setAside moves a file that could not be read out of the way of a new record,
// its content untouched.
func (s *Store) setAside(name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, bad := s.bad[name]; !bad {
		return nil
	}
	from := filepath.Join(s.dir, name)
	to := from + ".corrupt"
	for i := 2; ; i++ {
		err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
		if err == nil {
			s.log.Warn("ledger record that cannot be read makes way for a new one", slog.String("file", to))
			break
		}
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if !errors.Is(err, fs.ErrExist) || i > 100 {
			return fmt.Errorf("keep %s, which cannot be read, aside: %w", from, err)
		}
		to = fmt.Sprintf("%s.corrupt-%d", from, i)
	}
	delete(s.bad, name)
	return nil
}

// removeTemp clears what an interrupted Put left behind.
func (s *Store) removeTemp() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if n := e.Name(); e.Type().IsRegular() && strings.HasPrefix(n, ".") && strings.Contains(n, suffix+".tmp-") {
			if err := os.Remove(filepath.Join(s.dir, n)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return err
			}
		}
	}
	return nil
}

// isRecordName tells records from temporary files and what was set aside.
func isRecordName(name string) bool {
	return strings.HasSuffix(name, suffix) && !strings.HasPrefix(name, ".")
}

// scan reads every record of the directory, by file name.
func scan(dir string) (map[string]Record, map[string]error, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("read the publish ledger: %w", err)
	}
	records, bad := make(map[string]Record, len(entries)), map[string]error{}
	for _, e := range entries {
		name := e.Name()
		if !isRecordName(name) {
			continue
		}
		r, err := load(dir, name)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			bad[name] = err
		default:
			records[name] = r
		}
	}
	return records, bad, nil
}

// load reads one record and checks that its file is named after its volume.
func load(dir, name string) (Record, error) {
	// O_NONBLOCK and the check: a fifo or a device here must not hang us.
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return Record{}, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Record{}, err
	}
	if !info.Mode().IsRegular() {
		return Record{}, fmt.Errorf("%w: not a regular file", ErrCorrupt)
	}
	data, err := io.ReadAll(io.LimitReader(f, MaxFileSize+1))
	if err != nil {
		return Record{}, err
	}
	r, err := Decode(data)
	if err != nil {
		return Record{}, err
	}
	if want := FileName(r.VolumeID); want != name {
		return Record{}, fmt.Errorf("%w: it is of volume %q, which belongs in %s", ErrCorrupt, r.VolumeID, want)
	}
	return r, nil
}
