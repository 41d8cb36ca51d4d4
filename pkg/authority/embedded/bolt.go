package embedded

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/spiffe-node/spiffe-node/internal/durable"
)

// stateFormat is the version of the whole file. A program refuses a greater
// one: it would drop what it does not know.
const stateFormat = 1

// Keys of the meta bucket; their values are plain.
const (
	metaFormat      = "format"
	metaTrustDomain = "trust_domain"
	metaGeneration  = "generation" // grows by one with each write
)

// remedy ends every error about a damaged file.
const remedy = "the file was not touched; restore it from a backup, or move it away to start with a new CA (workloads then need the new trust bundle and all entries must be created again)"

// boltStore is a store in a bbolt file.
type boltStore struct {
	db       *bolt.DB
	path     string
	readOnly bool
	// generation is the file's as far as we know. A commit that failed at its
	// last step may have happened nevertheless; then the file is ahead of
	// memory, and writing on would mix two histories.
	generation uint64
}

// openBolt opens the state file, or creates it with an owner-only directory.
// It waits up to timeout for another process to let go of it.
func openBolt(path string, td spiffeid.TrustDomain, timeout time.Duration) (*boltStore, error) {
	if err := durable.OwnerDir(filepath.Dir(path)); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	switch err := durable.CheckOwnerFile(path); {
	case errors.Is(err, fs.ErrNotExist):
		if err := createBolt(path, td); err != nil {
			return nil, fmt.Errorf("create state file %s: %w", path, err)
		}
	case err != nil:
		return nil, fmt.Errorf("state file: %w", err)
	}
	s, err := openExisting(path, timeout, false)
	if errors.Is(err, syscall.EROFS) || errors.Is(err, fs.ErrPermission) {
		s, err = openExisting(path, timeout, true)
	}
	if err != nil {
		return nil, err
	}
	if err := s.checkMeta(td); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

// createBolt makes an empty state file. It appears under its name complete and
// durable or not at all, so that an empty or half-written file at path is always
// damage, never a fresh start.
func createBolt(path string, td spiffeid.TrustDomain) (err error) {
	temp, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".new-*")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(temp.Name())) }()
	if err := temp.Close(); err != nil {
		return err
	}
	db, err := bolt.Open(temp.Name(), 0o600, nil)
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, name := range dataBuckets {
			if laterBuckets[name] {
				continue // made when they are first written to
			}
			if _, err := tx.CreateBucket([]byte(name)); err != nil {
				return err
			}
		}
		meta, err := tx.CreateBucket([]byte(bucketMeta))
		if err != nil {
			return err
		}
		return errors.Join(
			meta.Put([]byte(metaFormat), []byte(strconv.Itoa(stateFormat))),
			meta.Put([]byte(metaTrustDomain), []byte(td.Name())),
			meta.Put([]byte(metaGeneration), make([]byte, 8)))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		return err
	}
	// Link instead of rename: if somebody else was faster, theirs stays.
	if err := os.Link(temp.Name(), path); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return durable.SyncDir(filepath.Dir(path))
}

func openExisting(path string, timeout time.Duration, readOnly bool) (*boltStore, error) {
	var file *os.File
	var db *bolt.DB
	err := guard(path, func() (err error) {
		db, err = bolt.Open(path, 0o600, &bolt.Options{
			Timeout:      timeout,
			ReadOnly:     readOnly,
			FreelistType: bolt.FreelistMapType,
			NoStatistics: true,
			OpenFile: func(name string, flag int, perm os.FileMode) (f *os.File, err error) {
				// Never create here: an empty file would be taken for a new one.
				f, err = os.OpenFile(name, flag&^os.O_CREATE, perm)
				if err != nil {
					return nil, err
				}
				if info, err := f.Stat(); err != nil || info.Size() == 0 {
					return nil, errors.Join(err, bolterrors.ErrInvalid, f.Close())
				}
				file = f
				return f, nil
			},
		})
		return err
	})
	switch {
	case err == nil:
		return &boltStore{db: db, path: path, readOnly: readOnly}, nil
	case errors.Is(err, ErrCorrupt):
		// bbolt fell over with the file open and mapped. The mapping would keep
		// the lock alive for as long as this process lives.
		if file != nil {
			err = errors.Join(err, syscall.Flock(int(file.Fd()), syscall.LOCK_UN), file.Close())
		}
		return nil, err
	case errors.Is(err, bolterrors.ErrTimeout):
		return nil, fmt.Errorf("%w: %s is locked by another process (waited %s); stop the other agent, or give this one its own state path", ErrLocked, path, timeout)
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS), errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("open state file: %w", err)
	default:
		return nil, corrupt(path, err)
	}
}

func corrupt(path string, cause error) error {
	return fmt.Errorf("%w: %s: %w; %s", ErrCorrupt, path, cause, remedy)
}

// guard runs f and turns what bbolt does on a damaged file, panics and faults
// in the mapped memory, into ErrCorrupt. f must not start goroutines.
func guard(path string, f func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = corrupt(path, fmt.Errorf("%v", p))
		}
	}()
	return f()
}

func (s *boltStore) checkMeta(td spiffeid.TrustDomain) error {
	return guard(s.path, func() error {
		return s.db.View(func(tx *bolt.Tx) error {
			meta := tx.Bucket([]byte(bucketMeta))
			if meta == nil {
				return corrupt(s.path, errors.New("no meta bucket; is this a state file of spiffe-node?"))
			}
			format, err := strconv.Atoi(string(meta.Get([]byte(metaFormat))))
			if err != nil || format < 1 {
				return corrupt(s.path, fmt.Errorf("bad format version %q", meta.Get([]byte(metaFormat))))
			}
			if format > stateFormat {
				return fmt.Errorf("%w: %s has format %d, this program reads up to %d; run the version that wrote it", ErrNewer, s.path, format, stateFormat)
			}
			if have := string(meta.Get([]byte(metaTrustDomain))); have != td.Name() {
				return fmt.Errorf("%w: %s belongs to %q, configured is %q; use another state path for another trust domain", ErrForeign, s.path, have, td.Name())
			}
			generation := meta.Get([]byte(metaGeneration))
			if len(generation) != 8 {
				return corrupt(s.path, errors.New("bad generation"))
			}
			s.generation = binary.BigEndian.Uint64(generation)
			return nil
		})
	})
}

func (s *boltStore) load(f func(bucket, key string, value []byte) error) error {
	return guard(s.path, func() error {
		return s.db.View(func(tx *bolt.Tx) error {
			for _, name := range dataBuckets {
				b := tx.Bucket([]byte(name))
				switch {
				case b == nil && laterBuckets[name]:
					continue
				case b == nil:
					return corrupt(s.path, fmt.Errorf("no bucket %q", name))
				}
				err := b.ForEach(func(k, v []byte) error {
					if err := f(name, string(k), v); err != nil {
						return corrupt(s.path, fmt.Errorf("bucket %s, key %x: %w", name, k, err))
					}
					return nil
				})
				if err != nil {
					return err
				}
			}
			return nil
		})
	})
}

func (s *boltStore) apply(changes []change) error {
	if s.readOnly {
		return fmt.Errorf("%w: %s was opened read-only; make its file system writable and restart", ErrReadOnly, s.path)
	}
	next := binary.BigEndian.AppendUint64(nil, s.generation+1)
	err := guard(s.path, func() error {
		return s.db.Update(func(tx *bolt.Tx) error {
			meta := tx.Bucket([]byte(bucketMeta))
			if binary.BigEndian.Uint64(meta.Get([]byte(metaGeneration))) != s.generation {
				return fmt.Errorf("%w: an earlier failed write may have reached the disk; restart to read it back", ErrReadOnly)
			}
			for _, c := range changes {
				if err := applyOne(tx, c); err != nil {
					return fmt.Errorf("bucket %s, key %x: %w", c.bucket, c.key, err)
				}
			}
			return meta.Put([]byte(metaGeneration), next)
		})
	})
	if err != nil {
		return fmt.Errorf("write state file %s: %w", s.path, err)
	}
	s.generation++
	return nil
}

func applyOne(tx *bolt.Tx, c change) error {
	b := tx.Bucket([]byte(c.bucket))
	if b == nil && laterBuckets[c.bucket] {
		var err error
		if b, err = tx.CreateBucket([]byte(c.bucket)); err != nil {
			return err
		}
	}
	if c.value == nil {
		return b.Delete([]byte(c.key))
	}
	return b.Put([]byte(c.key), c.value)
}

func (s *boltStore) close() error {
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("close state file %s: %w", s.path, err)
	}
	return nil
}
