package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/peersock"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// nearest is how many almost-matching entries an explanation lists.
const nearest = 3

// Explain says what each process of the target gets or lacks. A process that
// has not connected is bound as if it had, so that the question can be asked
// before it calls, or of one that never does.
func (i inspector) Explain(ctx context.Context, target adminapi.Target) ([]adminapi.Explanation, error) {
	bySubject := map[attest.Subject]*adminapi.Explanation{}
	var order []*adminapi.Explanation
	for _, p := range i.node.public.listener.Connections() {
		subject, err := p.Subject()
		if !matches(p, subject, target) {
			continue
		}
		ex := bySubject[subject]
		if ex == nil || subject == nil {
			x := i.explain(p.Caller(), subject, err)
			x.Phases = append([]adminapi.Phase{{Name: "connected", At: p.Since(), Detail: fmt.Sprintf("connection %d", p.ID())}}, x.Phases...)
			ex = &x
			bySubject[subject] = ex
			order = append(order, ex)
		}
		ex.Connections = append(ex.Connections, i.connections(func(q *peersock.Peer) bool { return q == p })...)
	}
	if len(order) == 0 && target.PID > 0 {
		x, err := i.explainAbsent(ctx, target.PID)
		if err != nil {
			return nil, err
		}
		order = append(order, x)
	}
	if len(order) == 0 && i.node.ledger != nil {
		order = i.explainSilent(target)
	}
	if len(order) == 0 {
		return nil, fmt.Errorf("%w: no process of pod %s/%s is connected; does the pod mount a csi.spiffe.io volume on this node?", adminapi.ErrNotFound, target.PodNamespace, target.PodName)
	}
	out := make([]adminapi.Explanation, len(order))
	for k, ex := range order {
		for _, c := range ex.Connections {
			for _, s := range c.Streams {
				if !s.LastPush.IsZero() {
					ex.Phases = append(ex.Phases, adminapi.Phase{Name: "served", At: s.LastPush, Detail: s.API + " " + strings.Join(s.Names, " ")})
				}
			}
		}
		slices.SortStableFunc(ex.Phases, func(a, b adminapi.Phase) int { return a.At.Compare(b.At) })
		out[k] = *ex
	}
	return out, nil
}

func matches(p *peersock.Peer, subject attest.Subject, t adminapi.Target) bool {
	if t.PID > 0 {
		return p.Caller().PID == t.PID
	}
	b, ok := subject.(*attest.Binding)
	if !ok {
		return false
	}
	pod, known := b.Pod()
	return known && pod.Namespace == t.PodNamespace && pod.Name == t.PodName
}

// explain judges one bound caller.
func (i inspector) explain(c attest.Caller, subject attest.Subject, err error) adminapi.Explanation {
	ex := adminapi.Explanation{Caller: callerInfo(c, subject, err)}
	if err != nil || ex.Caller.Denied != "" {
		ex.Verdict, ex.NextStep = "late", "the caller could not be bound yet; it is tried again"
		if ex.Caller.Denied != "" || errors.Is(err, attest.ErrDenied) {
			ex.Verdict, ex.NextStep = "denied", "restart the workload; if it happens again, compare its cgroup with the publish ledger"
		} else {
			ex.Phases = append(ex.Phases, adminapi.Phase{Name: "bound", Detail: err.Error()})
		}
		return ex
	}
	set := i.node.manager.Entries()
	in, known := i.node.manager.Inspect(subject)
	if !known {
		in = svid.Inspection{Selectors: subject.Selectors(), Synced: i.node.manager.Status().Synced}
		matched := set.Match(in.Selectors)
		entry.Sort(matched, i.node.order, i.agent.cfg.SDS.DefaultHint)
		for _, e := range matched {
			in.Entries = append(in.Entries, svid.EntryStatus{Entry: e})
		}
	}
	i.fill(&ex, in)
	i.judge(&ex, in, known)
	return ex
}

// fill adds the entries that match, or those that nearly do.
func (i inspector) fill(ex *adminapi.Explanation, in svid.Inspection) {
	for k, e := range in.Entries {
		ex.Matches = append(ex.Matches, adminapi.Match{
			EntryID: e.Entry.ID, SPIFFEID: e.Entry.SPIFFEID.String(), ParentID: e.Entry.ParentID.String(),
			Selectors: e.Entry.Selectors, Hint: e.Entry.Hint, Default: k == 0,
			Serial: e.Serial, NotBefore: e.NotBefore, ExpiresAt: e.NotAfter, LastError: e.LastError,
		})
	}
	if len(in.Entries) > 0 {
		return
	}
	for _, n := range i.node.manager.Entries().Nearest(in.Selectors, nearest) {
		ex.Nearest = append(ex.Nearest, adminapi.Near{
			EntryID: n.Entry.ID, SPIFFEID: n.Entry.SPIFFEID.String(), Selectors: n.Entry.Selectors, Missing: n.Missing,
		})
	}
}

func (i inspector) judge(ex *adminapi.Explanation, in svid.Inspection, connected bool) {
	ex.Verdict = "late"
	switch {
	case !in.Synced:
		ex.NextStep = "the agent has not heard from its authority yet; see kubectl spiffe status"
	case len(in.Entries) == 0:
		ex.NextStep = "no entry's selectors are all among the caller's; create one with parent " + i.node.id.String() + ", or see the nearest below"
	case in.Entries[0].Serial != "":
		ex.Verdict = "issued"
	case !connected:
		ex.NextStep = "the process has not connected; it would get the identity below when it does"
	case in.Entries[0].LastError != "":
		ex.NextStep = "the authority does not sign this entry: " + in.Entries[0].LastError
	default:
		ex.NextStep = "the SVID is being signed"
	}
	for _, e := range in.Entries {
		if e.Serial != "" {
			// A certificate says when it was signed to the second, back-dated to
			// bear clocks that differ: too coarse for a time of its own here.
			ex.Phases = append(ex.Phases, adminapi.Phase{Name: "signed", Detail: e.Entry.SPIFFEID.String()})
		}
	}
}

// explainAbsent binds a process that has no connection.
func (i inspector) explainAbsent(ctx context.Context, pid int32) (*adminapi.Explanation, error) {
	fi, err := os.Stat("/proc/" + strconv.Itoa(int(pid)))
	if err != nil {
		return nil, fmt.Errorf("%w: there is no process %d here", adminapi.ErrNotFound, pid)
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return nil, fmt.Errorf("%w: process %d has no owner on this system", adminapi.ErrNotFound, pid)
	}
	fd, err := unix.PidfdOpen(int(pid), 0)
	if err != nil {
		return nil, fmt.Errorf("%w: process %d: %w", adminapi.ErrNotFound, pid, err)
	}
	defer unix.Close(fd)
	b, err := i.node.attestor.Bind(ctx, attest.Caller{PID: pid, UID: st.Uid, GID: st.Gid, Process: heldProcess(fd)})
	if err == nil {
		defer b.Close()
		err = b.Settle(ctx)
	}
	caller := attest.Caller{PID: pid, UID: st.Uid, GID: st.Gid}
	var subject attest.Subject
	if b != nil {
		subject = b
	}
	ex := i.explain(caller, subject, err)
	ex.Phases = append([]adminapi.Phase{{Name: "not connected", Detail: "the process has no connection to the public socket"}}, ex.Phases...)
	return &ex, nil
}

// explainSilent is what the publish ledger knows of a pod none of whose
// processes has opened the socket: the volume is there, and this is what a
// process would get.
func (i inspector) explainSilent(t adminapi.Target) []*adminapi.Explanation {
	var out []*adminapi.Explanation
	for _, rec := range i.node.ledger.Named(t.PodNamespace, t.PodName) {
		pod := rec.Pod()
		if known, ok := i.node.pods.Pod(rec.PodUID); ok {
			pod = known
		}
		selectors := attest.NewSelectors(pod.K8sSelectors()...)
		ex := &adminapi.Explanation{
			Caller: adminapi.CallerInfo{
				PodUID: rec.PodUID, PodNamespace: rec.PodNamespace, PodName: rec.PodName, ServiceAccount: rec.ServiceAccount,
				Witnesses: strings.Split(pod.Witness, ","), Selectors: selectors,
			},
			Verdict: adminapi.VerdictNotConnected,
			Phases: []adminapi.Phase{
				{Name: "volume mounted", At: rec.Published, Detail: rec.VolumeName},
				{Name: "not connected", Detail: "no process of the pod has a connection to the socket"},
			},
		}
		in := svid.Inspection{Selectors: selectors}
		matched := i.node.manager.Entries().Match(selectors)
		entry.Sort(matched, i.node.order, i.agent.cfg.SDS.DefaultHint)
		for _, e := range matched {
			in.Entries = append(in.Entries, svid.EntryStatus{Entry: e})
		}
		i.fill(ex, in)
		ex.NextStep = "no process has opened the socket: is the client's path that of the mount? It would get the identity below"
		if len(matched) == 0 {
			ex.NextStep = "no process has opened the socket, and by what is known of the pod no entry would match it: see the nearest below"
		}
		out = append(out, ex)
	}
	return out
}

// heldProcess is a process held by a pidfd of our own.
type heldProcess int

// Alive is nil while the process runs.
func (h heldProcess) Alive() error {
	if err := unix.PidfdSendSignal(int(h), 0, nil, 0); err != nil {
		return fmt.Errorf("%w: the process has ended", attest.ErrDenied)
	}
	return nil
}
