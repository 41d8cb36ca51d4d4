package podinfo

import (
	"sync"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// store holds the facts of the pods on the node and who wants to hear of them.
// Safe for concurrent use; it notifies without its lock.
type store struct {
	// changed is told of pods about which something is new. It must not block.
	changed func(uids []string)

	mu        sync.RWMutex
	entries   map[string]*held           // by the object's UID
	static    map[string]map[string]bool // config hash -> UIDs of the mirror pods
	interests map[string]*interest       // by the UID in the cgroup
}

// held are the facts of one object.
type held struct {
	*facts
	gone    bool      // deleted; kept because a caller is bound to it
	fetched time.Time // by name, not seen in a list or watch yet; else zero
}

// interest is that somebody is bound to a pod.
type interest struct {
	watchers map[*watcher]struct{}
	since    time.Time // when something was last found lacking
	// runtime has what the container runtime said of containers that are not
	// among the pod's facts yet.
	runtime map[string]attest.Container
	// lacks are containers that were asked for in vain.
	lacks map[string]struct{}
}

type watcher struct{ notify func() }

// maxForeign bounds runtime and lacks of one pod.
const maxForeign = 64

func newStore(changed func([]string)) *store {
	return &store{
		changed:   changed,
		entries:   map[string]*held{},
		static:    map[string]map[string]bool{},
		interests: map[string]*interest{},
	}
}

// get are the facts of the pod with this UID in its cgroup; nil if unknown.
func (s *store) get(uid string) *facts {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.getLocked(uid)
}

func (s *store) getLocked(uid string) *facts {
	if h := s.entries[uid]; h != nil && !h.static {
		return h.facts
	}
	// Two mirror pods of one hash: one of them lies.
	if len(s.static[uid]) == 1 {
		for key := range s.static[uid] {
			return s.entries[key].facts
		}
	}
	return nil
}

// all are the facts held of pods that have not ended.
func (s *store) all() []*facts {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]*facts, 0, len(s.entries))
	for _, h := range s.entries {
		if !h.ended && !h.gone {
			out = append(out, h.facts)
		}
	}
	return out
}

// bound says whether somebody watches the pod.
func (s *store) bound(uid string) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.interests[uid] != nil
}

func (s *store) len() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.entries)
}

// put takes over what an object says now; f is nil if it says nothing to us.
func (s *store) put(key string, f *facts, fetched time.Time) {
	s.mu.Lock()
	uids := s.putLocked(key, f, fetched)
	s.mu.Unlock()
	s.tell(uids)
}

func (s *store) putLocked(key string, f *facts, fetched time.Time) []string {
	old := s.entries[key]
	switch {
	case !fetched.IsZero() && old != nil:
		return nil // a watch is never behind what it has said before
	case f == nil, f.ended && s.interests[f.uid] == nil:
		return s.removeLocked(key)
	}
	h := &held{facts: f, fetched: fetched}
	if old != nil {
		if old.uid == f.uid && old.equal(f) {
			h.facts = old.facts // one copy, and the older one is shared already
			s.entries[key] = h
			return nil
		}
		s.unlinkLocked(old)
	}
	s.entries[key] = h
	if f.static {
		// The kubelet makes a deleted mirror pod anew.
		for key := range s.static[f.uid] {
			if s.entries[key].gone {
				s.removeLocked(key)
			}
		}
		if s.static[f.uid] == nil {
			s.static[f.uid] = map[string]bool{}
		}
		s.static[f.uid][key] = true
	}
	if in := s.interests[f.uid]; in != nil {
		for _, c := range f.containers {
			delete(in.runtime, c.ID)
			delete(in.lacks, c.ID)
		}
	}
	if old != nil && old.uid != f.uid {
		return []string{old.uid, f.uid}
	}
	return []string{f.uid}
}

// remove is told that an object was deleted. Its processes may outlive it a
// little; while one is bound the facts stay.
func (s *store) remove(key string) {
	s.mu.Lock()
	h := s.entries[key]
	var uids []string
	if h != nil {
		uids = s.dropLocked(h)
	}
	s.mu.Unlock()
	s.tell(uids)
}

// dropLocked removes what was deleted unless somebody is bound to it and nobody
// else can speak for it.
func (s *store) dropLocked(h *held) []string {
	if s.interests[h.uid] != nil && (!h.static || len(s.static[h.uid]) == 1) {
		h.gone = true
		return nil
	}
	return s.removeLocked(h.key)
}

// replace is told of everything there is. Facts fetched after since stay: the
// list may be older.
func (s *store) replace(list []*facts, since time.Time) {
	s.mu.Lock()
	var uids []string
	seen := make(map[string]bool, len(list))
	for _, f := range list {
		seen[f.key] = true
		uids = append(uids, s.putLocked(f.key, f, time.Time{})...)
	}
	for key, h := range s.entries {
		switch {
		case seen[key], h.fetched.After(since):
		default:
			uids = append(uids, s.dropLocked(h)...)
		}
	}
	s.mu.Unlock()
	s.tell(uids)
}

// expire drops facts fetched before the given time that no list or watch has
// confirmed since.
func (s *store) expire(before time.Time) {
	s.mu.RLock()
	var old []string
	for key, h := range s.entries {
		if !h.fetched.IsZero() && h.fetched.Before(before) {
			old = append(old, key)
		}
	}
	s.mu.RUnlock()
	for _, key := range old {
		s.remove(key)
	}
}

func (s *store) removeLocked(key string) []string {
	h := s.entries[key]
	if h == nil {
		return nil
	}
	s.unlinkLocked(h)
	delete(s.entries, key)
	return []string{h.uid}
}

func (s *store) unlinkLocked(h *held) {
	if !h.static {
		return
	}
	delete(s.static[h.uid], h.key)
	if len(s.static[h.uid]) == 0 {
		delete(s.static, h.uid)
	}
}

// tell notifies those bound to the pods.
func (s *store) tell(uids []string) {
	if len(uids) == 0 {
		return
	}
	s.notify(uids...)
	s.changed(uids)
}

// notify runs the notifications of the pods and nothing else.
func (s *store) notify(uids ...string) {
	s.mu.RLock()
	var list []*watcher
	for _, uid := range uids {
		if in := s.interests[uid]; in != nil {
			for w := range in.watchers {
				list = append(list, w)
			}
		}
	}
	s.mu.RUnlock()
	for _, w := range list {
		w.notify()
	}
}

// uids are the pods that are held or that somebody is bound to.
func (s *store) uids() []string {
	s.mu.RLock()
	defer s.mu.RUnlock()
	out := make([]string, 0, len(s.entries)+len(s.interests))
	for _, h := range s.entries {
		out = append(out, h.uid)
	}
	for uid := range s.interests {
		if s.entries[uid] == nil {
			out = append(out, uid)
		}
	}
	return out
}

// watch notes that somebody is bound to the pod.
func (s *store) watch(uid string, notify func()) (stop func()) {
	w := &watcher{notify: notify}
	s.mu.Lock()
	in := s.interests[uid]
	if in == nil {
		in = &interest{watchers: map[*watcher]struct{}{}, since: time.Now()}
		s.interests[uid] = in
	}
	in.watchers[w] = struct{}{}
	s.mu.Unlock()
	return func() { s.unwatch(uid, w) }
}

func (s *store) unwatch(uid string, w *watcher) {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.interests[uid]
	if in == nil {
		return
	}
	delete(in.watchers, w)
	if len(in.watchers) > 0 {
		return
	}
	delete(s.interests, uid)
	keys := []string{uid}
	for key := range s.static[uid] {
		keys = append(keys, key)
	}
	for _, key := range keys {
		if h := s.entries[key]; h != nil && h.uid == uid && (h.gone || h.ended) {
			s.removeLocked(key) // nobody is left to be told
		}
	}
}

// container is what is known of a container, from the pod's facts or else the
// runtime. An unknown one of a pod somebody is bound to is noted as lacking;
// asked says whether this is the first time.
func (s *store) container(uid, id string) (c attest.Container, ok, first bool) {
	s.mu.RLock()
	c, ok = s.getLocked(uid).find(id)
	in := s.interests[uid]
	if !ok && in != nil {
		if c, ok = in.runtime[id]; !ok {
			_, noted := in.lacks[id]
			first = !noted
		}
	}
	s.mu.RUnlock()
	if first {
		first = s.lacking(uid, id)
	}
	return c, ok, first
}

func (s *store) lacking(uid, id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	in := s.interests[uid]
	if in == nil || len(in.lacks) >= maxForeign {
		return false
	}
	if _, ok := s.getLocked(uid).find(id); ok {
		return false
	}
	if _, ok := in.lacks[id]; ok {
		return false
	}
	if in.lacks == nil {
		in.lacks = map[string]struct{}{}
	}
	in.lacks[id] = struct{}{}
	in.since = time.Now()
	return true
}

// putContainer takes over what the runtime says of a container.
func (s *store) putContainer(uid string, c attest.Container) {
	s.mu.Lock()
	in := s.interests[uid]
	if in != nil {
		if _, known := s.getLocked(uid).find(c.ID); known || len(in.runtime) >= maxForeign {
			in = nil
		}
	}
	if in != nil {
		if in.runtime == nil {
			in.runtime = map[string]attest.Container{}
		}
		in.runtime[c.ID] = c
		delete(in.lacks, c.ID)
	}
	s.mu.Unlock()
	if in != nil {
		s.notify(uid)
	}
}

// wanting says since when the pod has been missing that has been missing for
// the shortest time; false if nobody lacks anything.
func (s *store) wanting() (since time.Time, lacking bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for uid, in := range s.interests {
		if s.getLocked(uid) != nil && len(in.lacks) == 0 {
			continue
		}
		lacking = true
		if in.since.After(since) {
			since = in.since
		}
	}
	return since, lacking
}
