// Package probe is what the probe workload writes and the tests read.
package probe

import (
	"bufio"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"
)

// Kinds of events.
const (
	Start  = "start"  // the process runs
	Secret = "secret" // a secret came
	Error  = "error"  // a stream ended
	Peer   = "peer"   // a mutual TLS handshake with SPIFFEID, or Message why not
)

// Event is one line of a probe's output.
type Event struct {
	Kind       string        `json:"kind"`
	Time       time.Time     `json:"time"`
	SinceStart time.Duration `json:"sinceStart"` // of the process, nanoseconds
	Name       string        `json:"name,omitempty"`
	Conn       int           `json:"conn,omitempty"`
	Attempt    int           `json:"attempt,omitempty"` // streams opened since the last that got a secret
	// Of a certificate:
	SPIFFEID string    `json:"spiffeID,omitempty"`
	Serial   string    `json:"serial,omitempty"`
	NotAfter time.Time `json:"notAfter,omitzero"`
	// Of a validation context, "" for plain trusted_ca:
	TrustDomains []string `json:"trustDomains,omitempty"`
	// Of an ended stream; Held tells whether it had got a secret.
	Code    string `json:"code,omitempty"`
	Message string `json:"message,omitempty"`
	Held    bool   `json:"held,omitempty"`
}

// Log is a probe's output so far.
type Log []Event

// Parse reads a probe's output; an incomplete last line is left out.
func Parse(text string) (Log, error) {
	var log Log
	if i := strings.LastIndexByte(text, '\n'); i >= 0 {
		text = text[:i]
	} else {
		return nil, nil
	}
	lines := bufio.NewScanner(strings.NewReader(text))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var ev Event
		if err := json.Unmarshal(lines.Bytes(), &ev); err != nil {
			return log, fmt.Errorf("line %q is not a probe's: %w", lines.Text(), err)
		}
		log = append(log, ev)
	}
	return log, lines.Err()
}

// First is the first secret of that name.
func (l Log) First(name string) (Event, bool) {
	for _, ev := range l {
		if ev.Kind == Secret && ev.Name == name {
			return ev, true
		}
	}
	return Event{}, false
}

// Last is the newest secret of that name.
func (l Log) Last(name string) (Event, bool) {
	for _, ev := range slices.Backward(l) {
		if ev.Kind == Secret && ev.Name == name {
			return ev, true
		}
	}
	return Event{}, false
}

// Errors are the ended streams.
func (l Log) Errors() Log {
	var errs Log
	for _, ev := range l {
		if ev.Kind == Error {
			errs = append(errs, ev)
		}
	}
	return errs
}

// Down is how many streams have ended and not come back yet.
func (l Log) Down() int {
	up := map[string]bool{}
	for _, ev := range l {
		if ev.Kind == Secret || ev.Kind == Error {
			up[fmt.Sprint(ev.Conn, ev.Name)] = ev.Kind == Secret
		}
	}
	down := 0
	for _, isUp := range up {
		if !isUp {
			down++
		}
	}
	return down
}

// Outages are how long each stream was without a server: from the end of a
// held stream to the next secret on it. An outage still going on is left out.
func (l Log) Outages() []time.Duration {
	type key struct {
		conn int
		name string
	}
	down := map[key]time.Time{}
	var outages []time.Duration
	for _, ev := range l {
		k := key{ev.Conn, ev.Name}
		switch {
		case ev.Kind == Error && ev.Held:
			down[k] = ev.Time
		case ev.Kind == Secret:
			if since, ok := down[k]; ok {
				outages = append(outages, ev.Time.Sub(since))
				delete(down, k)
			}
		}
	}
	return outages
}
