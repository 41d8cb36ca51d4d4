package probe_test

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/probe"
)

func TestOutages(t *testing.T) {
	at := func(ms int) time.Time { return time.UnixMilli(int64(ms)) }
	log := probe.Log{
		{Kind: probe.Start, Time: at(0)},
		{Kind: probe.Error, Name: "default", Time: at(5)}, // never had anything: no outage
		{Kind: probe.Secret, Name: "ROOTCA", Time: at(10)},
		{Kind: probe.Secret, Name: "default", Time: at(20)},
		{Kind: probe.Error, Name: "default", Time: at(100), Held: true},
		{Kind: probe.Error, Name: "default", Time: at(150)},
		{Kind: probe.Error, Name: "ROOTCA", Time: at(160), Held: true},
		{Kind: probe.Secret, Name: "default", Time: at(400)},
	}
	if got, want := log.Outages(), []time.Duration{300 * time.Millisecond}; !slices.Equal(got, want) {
		t.Errorf("outages are %v, want %v", got, want)
	}
	if got := log.Down(); got != 1 {
		t.Errorf("%d streams are down, want ROOTCA's", got)
	}
}

func TestParse(t *testing.T) {
	line, err := json.Marshal(probe.Event{Kind: probe.Secret, Name: "default", SPIFFEID: "spiffe://example.org/x"})
	if err != nil {
		t.Fatal(err)
	}
	log, err := probe.Parse(string(line) + "\n" + string(line[:10]))
	if err != nil || len(log) != 1 {
		t.Fatalf("one whole line and a part of one: %d events, error %v", len(log), err)
	}
	if ev, ok := log.Last("default"); !ok || ev.SPIFFEID != "spiffe://example.org/x" {
		t.Errorf("last secret is %+v", ev)
	}
	if _, err := probe.Parse("panic: something\n"); err == nil || !strings.Contains(err.Error(), "panic: something") {
		t.Errorf("error %v does not show the foreign line", err)
	}
}
