package ledger

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/spiffe-node/spiffe-node/internal/durable"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// ReaderConfig is what a Reader needs. The zero value of a field but Dir is
// usable.
type ReaderConfig struct {
	// Dir is the ledger's directory; it is made, owner-only, if it is missing.
	Dir string
	// Resync is how often the whole directory is read again, in case a change
	// was not announced; 0 is 30 s.
	Resync time.Duration
	// OnPublish is called once for every volume that appears, those that are
	// there at start included, after Pod answers for it. It is called from
	// Run and must not block.
	OnPublish func(Record)
	// Logger may be nil.
	Logger *slog.Logger
}

// Reader follows a ledger. It is an [attest.PodSource]. Safe for concurrent
// use.
type Reader struct {
	cfg ReaderConfig
	log *slog.Logger

	mu       sync.RWMutex
	files    map[string]Record             // by file name
	bad      map[string]string             // file name to the error last logged
	pods     map[string][]string           // pod UID to its file names, sorted
	watchers map[string]map[*podWatch]bool // by pod UID
}

type podWatch struct{ notify func() }

var _ attest.PodSource = (*Reader)(nil)

// NewReader makes the directory if it is missing and reads it once, so that
// Pod answers before Run does.
func NewReader(cfg ReaderConfig) (*Reader, error) {
	if cfg.Resync <= 0 {
		cfg.Resync = 30 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	cfg.Dir = filepath.Clean(cfg.Dir)
	r := &Reader{
		cfg:      cfg,
		log:      cfg.Logger,
		files:    map[string]Record{},
		bad:      map[string]string{},
		pods:     map[string][]string{},
		watchers: map[string]map[*podWatch]bool{},
	}
	if err := durable.OwnerDir(cfg.Dir); err != nil {
		return nil, fmt.Errorf("watch the publish ledger: %w", err)
	}
	_, err := r.rescan()
	return r, err
}

// Pod is what the ledger says about the pod; of several volumes the one
// published last speaks.
func (r *Reader) Pod(uid string) (attest.Pod, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	rec, ok := r.newest(uid)
	return rec.Pod(), ok
}

// Record is the record behind Pod.
func (r *Reader) Record(uid string) (Record, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.newest(uid)
}

// Named are the newest records of pods of that name, one for each UID.
func (r *Reader) Named(namespace, name string) []Record {
	seen := map[string]bool{}
	var out []Record
	for _, rec := range r.all() {
		if rec.PodNamespace != namespace || rec.PodName != name || seen[rec.PodUID] {
			continue
		}
		seen[rec.PodUID] = true
		if newest, ok := r.Record(rec.PodUID); ok {
			out = append(out, newest)
		}
	}
	return out
}

// Len is the number of volumes in the ledger.
func (r *Reader) Len() int {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return len(r.files)
}

func (r *Reader) newest(uid string) (Record, bool) {
	var out Record
	names := r.pods[uid]
	for _, n := range names {
		if rec := r.files[n]; out.PodUID == "" || rec.Published.After(out.Published) {
			out = rec
		}
	}
	return out, len(names) > 0
}

// Watch calls notify after the answer of Pod for uid has changed.
func (r *Reader) Watch(uid string, notify func()) (stop func()) {
	w := &podWatch{notify: notify}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.watchers[uid] == nil {
		r.watchers[uid] = map[*podWatch]bool{}
	}
	r.watchers[uid][w] = true
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.watchers[uid], w)
		if len(r.watchers[uid]) == 0 {
			delete(r.watchers, uid)
		}
	}
}

// rewatch is how soon a directory that has vanished is looked for again.
const rewatch = time.Second

// Run follows the directory until ctx ends. It fails only if the kernel gives
// no watch at all.
func (r *Reader) Run(ctx context.Context) error {
	w, err := fsnotify.NewBufferedWatcher(1024)
	if err != nil {
		return fmt.Errorf("watch the publish ledger %s: %w", r.cfg.Dir, err)
	}
	defer w.Close()
	r.announce(r.all())
	timer := time.NewTimer(0) // the first round sets the watch and reads what came before it
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
			timer.Reset(r.round(w))
		case ev, ok := <-w.Events:
			if !ok {
				return nil
			}
			r.event(ev, timer)
		case err, ok := <-w.Errors:
			if !ok {
				return nil
			}
			// Events were dropped, or the kernel ran out of something: the
			// directory itself says what is true.
			r.log.Warn("watch of the publish ledger was interrupted, reading it again", slog.Any("error", err))
			timer.Reset(0)
		}
	}
}

// round makes sure that the directory is there and watched, and reads it. It
// says when the next round is due.
func (r *Reader) round(w *fsnotify.Watcher) time.Duration {
	if err := r.watchDir(w); err != nil {
		r.log.Error("publish ledger cannot be watched", slog.Any("error", err))
		return rewatch
	}
	fresh, err := r.rescan()
	if err != nil {
		r.log.Error("publish ledger cannot be read", slog.Any("error", err))
		return rewatch
	}
	r.announce(fresh)
	return r.cfg.Resync
}

// watchDir adds the watch. It is added anew every round: a directory that was
// removed and made again has another inode, and adding twice is free.
func (r *Reader) watchDir(w *fsnotify.Watcher) error {
	if err := durable.OwnerDir(r.cfg.Dir); err != nil {
		return err
	}
	if err := w.Add(r.cfg.Dir); err != nil {
		return fmt.Errorf("watch %s: %w", r.cfg.Dir, err)
	}
	return nil
}

func (r *Reader) event(ev fsnotify.Event, timer *time.Timer) {
	if ev.Name == r.cfg.Dir {
		if ev.Has(fsnotify.Remove) || ev.Has(fsnotify.Rename) {
			r.log.Warn("publish ledger was removed, looking for it again", slog.String("dir", r.cfg.Dir))
			timer.Reset(0)
		}
		return
	}
	name := filepath.Base(ev.Name)
	if !isRecordName(name) || ev.Op == fsnotify.Chmod {
		return
	}
	rec, err := load(r.cfg.Dir, name)
	if isNew := r.apply(name, rec, err); isNew {
		r.announce([]Record{rec})
	}
}

// rescan reads the directory and returns the records of volumes that were not
// known before.
func (r *Reader) rescan() ([]Record, error) {
	records, bad, err := scan(r.cfg.Dir)
	if err != nil {
		return nil, err
	}
	r.mu.RLock()
	var gone []string
	for name := range r.files {
		if _, ok := records[name]; !ok && bad[name] == nil {
			gone = append(gone, name)
		}
	}
	for name := range r.bad {
		if _, ok := records[name]; !ok && bad[name] == nil {
			gone = append(gone, name)
		}
	}
	r.mu.RUnlock()
	for _, name := range gone {
		r.apply(name, Record{}, fs.ErrNotExist)
	}
	for name, err := range bad {
		r.apply(name, Record{}, err)
	}
	var fresh []Record
	for name, rec := range records {
		if r.apply(name, rec, nil) {
			fresh = append(fresh, rec)
		}
	}
	return fresh, nil
}

// apply takes over what a file says now and tells those who watch the pods it
// concerns. It returns whether the volume is new.
func (r *Reader) apply(name string, rec Record, err error) (isNew bool) {
	r.mu.Lock()
	old, known := r.files[name]
	switch {
	case err == nil:
		delete(r.bad, name)
		if known && old == rec {
			r.mu.Unlock()
			return false
		}
		r.unlink(name, old)
		r.files[name] = rec
		r.pods[rec.PodUID] = insert(r.pods[rec.PodUID], name)
	case errors.Is(err, fs.ErrNotExist):
		delete(r.bad, name)
		r.unlink(name, old)
	default:
		// What a broken file said before is no longer vouched for.
		if r.bad[name] != err.Error() {
			r.bad[name] = err.Error()
			r.log.Error("ledger record cannot be read and is left as it is", slog.String("file", filepath.Join(r.cfg.Dir, name)), slog.Any("error", err))
		}
		r.unlink(name, old)
	}
	var tell []func()
	for _, uid := range slices.Compact([]string{old.PodUID, rec.PodUID}) {
		for w := range r.watchers[uid] {
			tell = append(tell, w.notify)
		}
	}
	r.mu.Unlock()
	for _, notify := range tell {
		notify()
	}
	return err == nil && !known
}

func (r *Reader) unlink(name string, old Record) {
	if _, known := r.files[name]; !known {
		return
	}
	delete(r.files, name)
	names := slices.DeleteFunc(r.pods[old.PodUID], func(n string) bool { return n == name })
	if len(names) == 0 {
		delete(r.pods, old.PodUID)
		return
	}
	r.pods[old.PodUID] = names
}

func insert(names []string, name string) []string {
	at, found := slices.BinarySearch(names, name)
	if found {
		return names
	}
	return slices.Insert(names, at, name)
}

func (r *Reader) all() []Record {
	r.mu.RLock()
	defer r.mu.RUnlock()
	out := make([]Record, 0, len(r.files))
	for _, rec := range r.files {
		out = append(out, rec)
	}
	return out
}

func (r *Reader) announce(records []Record) {
	if r.cfg.OnPublish == nil {
		return
	}
	slices.SortFunc(records, func(a, b Record) int { return a.Published.Compare(b.Published) })
	for _, rec := range records {
		r.cfg.OnPublish(rec)
	}
}
