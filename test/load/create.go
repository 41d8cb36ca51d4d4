package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// workload is one that gets an entry of its own.
type workload struct {
	i        int
	uid      int
	id       string // SPIFFE ID
	selector string
	name     string // secret name it asks for
}

// creator makes the entry of a workload.
type creator func(context.Context, workload) error

// runCreate is how soon a workload that waits has its secret once its entry is
// there.
func runCreate(ctx context.Context, o *options, r *Report) (err error) {
	create := o.create
	switch {
	case create != nil:
	case o.admin != "":
		a, err := newAdmin(o)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, a.close(ctx)) }()
		create = a.create
	default:
		create = byCommand(o.cmd)
	}
	var (
		wg                           sync.WaitGroup
		mu                           sync.Mutex
		calls, fromStart, fromReturn []time.Duration
		failure                      error
		next                         atomic.Int64
	)
	run := strconv.FormatInt(time.Now().Unix(), 36)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for range min(o.parallel, o.count) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < o.count; i = int(next.Add(1)) - 1 {
				w := o.workload(i, run)
				start, returned, got, err := o.await(ctx, r, w, create)
				mu.Lock()
				if err != nil {
					failure = errors.Join(failure, fmt.Errorf("workload %d (%s): %w", i, w.selector, err))
					mu.Unlock()
					cancel()
					return
				}
				calls = append(calls, returned.Sub(start))
				fromStart = append(fromStart, got.Sub(start))
				fromReturn = append(fromReturn, max(got.Sub(returned), 0))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	r.addTimes("secret after the entry's creation began", fromStart)
	r.addTimes("secret after creation returned", fromReturn)
	r.addTimes("creation itself", calls)
	r.add("workloads served", float64(len(fromStart)), "")
	return failure
}

// workload is the i-th of this run; IDs of two runs differ.
func (o *options) workload(i int, run string) workload {
	td := "example.org"
	if id, err := spiffeid.FromString(o.parent); err == nil {
		td = id.TrustDomain().Name()
	}
	w := workload{i: i, uid: os.Getuid(), id: fmt.Sprintf("spiffe://%s/load/%s/%d", td, run, i)}
	if o.as == "uid" {
		w.uid, w.name = o.firstUID+i, o.names[0]
	} else {
		w.name = w.id
	}
	w.selector = fmt.Sprintf("unix:uid:%d", w.uid)
	return w
}

// await starts a workload, lets it wait, creates its entry and says when the
// creation began, when it returned and when the workload had its secret.
func (o *options) await(ctx context.Context, r *Report, w workload, create creator) (start, returned, got time.Time, err error) {
	if err := sleep(ctx, rand.N(o.spread+1)); err != nil {
		return start, returned, got, err
	}
	p, err := startProbe(ctx, o, w)
	if err != nil {
		return start, returned, got, err
	}
	defer func() {
		refusals := p.stop()
		for _, text := range refusals {
			r.fail(errors.New(text))
		}
	}()
	select {
	case <-p.waiting:
	case at := <-p.secret:
		return start, returned, got, fmt.Errorf("it had a secret before its entry existed, at %s: is there another entry for it?", at.Format(time.RFC3339))
	case <-ctx.Done():
		return start, returned, got, stopped(ctx)
	}
	if err := sleep(ctx, o.lead/2+rand.N(o.lead+1)); err != nil {
		return start, returned, got, err
	}
	start = time.Now()
	if err := create(ctx, w); err != nil {
		return start, returned, got, fmt.Errorf("create its entry: %w", err)
	}
	returned = time.Now()
	select {
	case got = <-p.secret:
		return start, returned, got, nil
	case <-ctx.Done():
		return start, returned, got, fmt.Errorf("no secret %v after its entry was created: %w", time.Since(start).Round(time.Millisecond), stopped(ctx))
	}
}

// byCommand creates entries with a command the user gave.
func byCommand(template string) creator {
	return func(ctx context.Context, w workload) error {
		out, err := shell(ctx, strings.NewReplacer(
			"{i}", strconv.Itoa(w.i),
			"{uid}", strconv.Itoa(w.uid),
			"{id}", w.id,
			"{selector}", w.selector,
		).Replace(template))
		if err != nil {
			return fmt.Errorf("-cmd: %w: %s", err, out)
		}
		return nil
	}
}

// admin creates entries through the SPIRE Server API.
type admin struct {
	conn   *grpc.ClientConn
	api    entrypb.EntryClient
	parent *typespb.SPIFFEID
	keep   bool

	mu  sync.Mutex
	ids []string
}

func newAdmin(o *options) (*admin, error) {
	parent, err := spiffeid.FromString(o.parent)
	if err != nil {
		return nil, fmt.Errorf("-parent: %w", err)
	}
	conn, err := dial(o.admin)
	if err != nil {
		return nil, err
	}
	// The first call must not pay for the connection.
	conn.Connect()
	return &admin{conn: conn, api: entrypb.NewEntryClient(conn), parent: wireID(parent), keep: o.keepEntry}, nil
}

func wireID(id spiffeid.ID) *typespb.SPIFFEID {
	return &typespb.SPIFFEID{TrustDomain: id.TrustDomain().Name(), Path: id.Path()}
}

func (a *admin) create(ctx context.Context, w workload) error {
	id, err := spiffeid.FromString(w.id)
	if err != nil {
		return err
	}
	kind, value, _ := strings.Cut(w.selector, ":")
	resp, err := a.api.BatchCreateEntry(ctx, &entrypb.BatchCreateEntryRequest{Entries: []*typespb.Entry{{
		ParentId:  a.parent,
		SpiffeId:  wireID(id),
		Selectors: []*typespb.Selector{{Type: kind, Value: value}},
	}}})
	if err != nil {
		return err
	}
	if len(resp.GetResults()) != 1 || resp.GetResults()[0].GetStatus().GetCode() != 0 {
		return fmt.Errorf("the server answered %v", resp.GetResults())
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.ids = append(a.ids, resp.GetResults()[0].GetEntry().GetId())
	return nil
}

// close removes the entries, also when the run was stopped.
func (a *admin) close(ctx context.Context) error {
	defer a.conn.Close()
	if a.keep || len(a.ids) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	if _, err := a.api.BatchDeleteEntry(ctx, &entrypb.BatchDeleteEntryRequest{Ids: a.ids}); err != nil {
		return fmt.Errorf("remove the entries made: %w", err)
	}
	return nil
}
