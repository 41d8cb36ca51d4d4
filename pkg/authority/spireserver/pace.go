package spireserver

import "time"

// pace says when to sync next. It is plain data: time comes from outside. Not
// safe for concurrent use.
type pace struct {
	interval time.Duration // when nobody is in a hurry
	step     time.Duration // pause in a hurry; 0 = none
	failures int           // in a row
	earliest time.Time     // a hurry does not sync before
	ended    time.Time     // last sync
	credit   int           // hurries that may start anew
	credited time.Time     // when credit was last counted
}

// maxCredit is how many hurries may start anew in quick succession. One more
// comes with every interval, so that a workload nobody knows, which asks again
// and again, costs at most one sync a second.
const maxCredit = 20

// after is the pause after a sync. latest is when the next must come; zero = it
// may come at any time.
func (p *pace) after(start, end time.Time, err error, latest time.Time) time.Duration {
	// However long a sync takes, there is time between two of them.
	gap := max(hurryMin-end.Sub(start), end.Sub(start))
	p.earliest, p.ended = end.Add(gap), end
	if err != nil {
		d := pause(p.failures)
		p.failures++
		p.earliest = end.Add(max(d/2, gap))
		return max(d, gap)
	}
	p.failures = 0
	wait := around(p.interval)
	if p.step > 0 {
		wait = min(wait, p.step)
		if p.step = time.Duration(float64(p.step) * hurryGrowth); p.step >= p.interval {
			p.step = 0
		}
	}
	if !latest.IsZero() {
		wait = min(wait, latest.Sub(end))
	}
	return max(wait, gap)
}

// hurry starts a hurry anew; the result is the pause until the next sync.
func (p *pace) hurry(now time.Time) time.Duration {
	if p.credited.IsZero() {
		p.credit, p.credited = maxCredit, now
	}
	if n := int(now.Sub(p.credited) / p.interval); n > 0 {
		p.credit = min(p.credit+n, maxCredit)
		p.credited = now
	}
	earliest := p.earliest
	if p.credit > 0 {
		p.credit--
		p.step = min(hurryMin, p.interval)
	} else if slow := p.ended.Add(time.Second); slow.After(earliest) {
		earliest = slow
	}
	return max(earliest.Sub(now), 0)
}
