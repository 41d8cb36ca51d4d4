package svid

import (
	"container/heap"
	"time"
)

// alarm is something that wants to be woken at a time of the wall clock. ring
// is called with Manager.mu held; the timer is no longer in the heap.
type alarm interface {
	ring(m *Manager, now time.Time)
}

// timer is one alarm's place in the heap. Guarded by Manager.mu.
type timer struct {
	at    int64 // Unix nanoseconds
	index int   // place in the heap + 1; 0 = not in it
	owner alarm
}

// timers is a heap by time.
type timers []*timer

func (h timers) Len() int           { return len(h) }
func (h timers) Less(i, j int) bool { return h[i].at < h[j].at }
func (h timers) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i+1, j+1
}

func (h *timers) Push(x any) {
	t := x.(*timer)
	*h = append(*h, t)
	t.index = len(*h)
}

func (h *timers) Pop() any {
	old := *h
	t := old[len(old)-1]
	old[len(old)-1] = nil
	*h = old[:len(old)-1]
	t.index = 0
	return t
}

// setTimerLocked makes owner ring at a time; the zero time means never.
func (m *Manager) setTimerLocked(t *timer, owner alarm, at time.Time) {
	if at.IsZero() {
		if t.index > 0 {
			heap.Remove(&m.timers, t.index-1)
		}
		return
	}
	t.owner = owner
	switch ns := at.UnixNano(); {
	case t.index == 0:
		t.at = ns
		heap.Push(&m.timers, t)
	case t.at != ns:
		t.at = ns
		heap.Fix(&m.timers, t.index-1)
	}
	if t.index == 1 {
		signal(m.wake)
	}
}

// ringLocked wakes whoever is due and says how long to sleep.
func (m *Manager) ringLocked(now time.Time) time.Duration {
	for len(m.timers) > 0 && m.timers[0].at <= now.UnixNano() {
		t := heap.Pop(&m.timers).(*timer)
		t.owner.ring(m, now)
	}
	if len(m.timers) == 0 {
		return clockCheck
	}
	return min(time.Duration(m.timers[0].at-now.UnixNano()), clockCheck)
}

// signal is a level trigger: the reader looks at the state, not at the number
// of signals.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
