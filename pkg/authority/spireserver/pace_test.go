package spireserver_test

import (
	"errors"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority/spireserver"
)

func TestPace(t *testing.T) {
	calm := spireserver.Pace(5*time.Second, time.Millisecond, 100, false, nil)
	for _, d := range calm {
		if d < 4500*time.Millisecond || d > 5500*time.Millisecond {
			t.Errorf("calm: %s", d)
		}
	}
	hurried := spireserver.Pace(5*time.Second, time.Millisecond, 40, true, nil)
	if hurried[0] > 251*time.Millisecond || hurried[1] > 320*time.Millisecond || hurried[39] < 4*time.Second {
		t.Errorf("hurried: %v", hurried)
	}
	for i := 1; i < 12; i++ {
		if hurried[i] < hurried[i-1] {
			t.Errorf("not slowing down: %v", hurried)
		}
	}
	// However long a sync takes, half of the time is rest.
	for _, d := range spireserver.Pace(time.Second, 3*time.Second, 10, true, nil) {
		if d < 3*time.Second {
			t.Errorf("slow syncs: %s", d)
		}
	}
	failed := spireserver.Pace(5*time.Second, time.Millisecond, 30, false, errors.New("no"))
	if failed[0] > 500*time.Millisecond {
		t.Errorf("first pause %s", failed[0])
	}
	for _, d := range failed[10:] {
		if d < 7*time.Second || d > 15*time.Second {
			t.Errorf("late pause %s", d)
		}
	}
}
