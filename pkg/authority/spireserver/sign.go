package spireserver

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

// batcher merges requests that wait at the same time into one call. Guarded by
// mu.
type batcher struct {
	mu      sync.Mutex
	waiting []*order
	running int
	limit   int // of one call: halved when one fails, doubled when one succeeds
}

// order is one request for an X.509-SVID.
type order struct {
	ctx  context.Context // of whoever waits; a batch does not end with it
	req  *svidpb.NewX509SVIDParams
	done chan outcome
}

// outcome is what became of an order.
type outcome struct {
	result *svidpb.BatchNewX509SVIDResponse_Result
	err    error
}

// errUnlisted is the server's word that an entry is not this agent's.
var errUnlisted = errors.New("the server does not sign for this entry")

// SignX509 has the server sign for an entry, together with whoever else asks at
// that moment. Errors as of authority.Authority.
func (c *Client) SignX509(ctx context.Context, req authority.X509Request) (*authority.X509Issued, error) {
	if err := c.mayAsk(ctx, req.EntryID, req.SPIFFEID); err != nil {
		return nil, err
	}
	if err := checkCSR(req.CSR); err != nil {
		return nil, fmt.Errorf("%w: CSR for entry %s: %w", authority.ErrRefused, req.EntryID, err)
	}
	chain, err := c.signX509(ctx, req)
	if errors.Is(err, errUnlisted) {
		err = c.settle(ctx, req.EntryID, err)
	}
	if err != nil {
		return nil, fmt.Errorf("sign X.509-SVID for %s: %w", req.SPIFFEID, sentinel(err))
	}
	issued, err := c.checkX509(ctx, req, chain)
	if err != nil {
		return nil, fmt.Errorf("sign X.509-SVID for %s: %w", req.SPIFFEID, sentinel(err))
	}
	return issued, nil
}

// checkCSR refuses what no authority signs, or should.
func checkCSR(der []byte) error {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return err
	}
	switch key := csr.PublicKey.(type) {
	case *ecdsa.PublicKey:
		if key.Curve == elliptic.P224() {
			return errors.New("elliptic curve P-224 is not accepted")
		}
	case *rsa.PublicKey:
		if n := key.N.BitLen(); n < 2048 {
			return fmt.Errorf("an RSA key of %d bits is not accepted", n)
		}
	}
	return nil
}

// mayAsk is nil if the server is to be asked to sign for an entry.
func (c *Client) mayAsk(ctx context.Context, id string, spiffeID spiffeid.ID) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	e, isMissing, heard := c.ledger.get(id)
	switch {
	case id == "":
		return fmt.Errorf("%w: no entry ID", authority.ErrRefused)
	case !heard:
		return nil
	case e == nil:
		return fmt.Errorf("%w: entry %s is not among those this agent is authorized for", authority.ErrRefused, id)
	case e.SPIFFEID != spiffeID:
		return fmt.Errorf("%w: entry %s is for %s, not for %s", authority.ErrRefused, id, e.SPIFFEID, spiffeID)
	case isMissing:
		return fmt.Errorf("%w: the server does not list entry %s any more; its withdrawal is being confirmed", authority.ErrTryLater, id)
	}
	return nil
}

// signX509 puts one order into the next batch and waits for it.
func (c *Client) signX509(ctx context.Context, req authority.X509Request) ([][]byte, error) {
	o := &order{ctx: ctx, req: &svidpb.NewX509SVIDParams{EntryId: req.EntryID, Csr: req.CSR}, done: make(chan outcome, 1)}
	c.batch.mu.Lock()
	c.batch.waiting = append(c.batch.waiting, o)
	c.startBatchLocked()
	c.batch.mu.Unlock()
	var out outcome
	select {
	case out = <-o.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	case <-c.life.Done():
		return nil, errClosed
	}
	if out.err != nil {
		return nil, out.err
	}
	st := out.result.GetStatus()
	switch codes.Code(st.GetCode()) {
	case codes.OK:
		return out.result.GetSvid().GetCertChain(), nil
	case codes.NotFound:
		return nil, fmt.Errorf("%w: %s", errUnlisted, st.GetMessage())
	case codes.InvalidArgument:
		return nil, fmt.Errorf("%w: %s", authority.ErrRefused, st.GetMessage())
	}
	return nil, fmt.Errorf("%w: %s", authority.ErrTryLater, statusText(st))
}

func statusText(st *typespb.Status) string {
	return fmt.Sprintf("%s: %s", codes.Code(st.GetCode()), st.GetMessage())
}

// startBatchLocked starts a call for those who wait, if one more may run.
func (c *Client) startBatchLocked() {
	b := &c.batch
	if len(b.waiting) == 0 || b.running >= maxBatches || c.life.Err() != nil {
		return
	}
	b.running++
	c.tasks.Go(c.runBatches)
}

// runBatches makes calls until nobody waits.
func (c *Client) runBatches() {
	b := &c.batch
	for {
		b.mu.Lock()
		orders := b.takeLocked()
		if len(orders) == 0 {
			b.running--
			b.mu.Unlock()
			return
		}
		b.mu.Unlock()
		err := c.runBatch(orders)
		b.mu.Lock()
		b.adjustLocked(len(orders), err)
		b.mu.Unlock()
	}
}

// takeLocked takes the next orders; those whose askers have left are dropped.
func (b *batcher) takeLocked() []*order {
	var out []*order
	for len(b.waiting) > 0 && len(out) < b.limit {
		o := b.waiting[0]
		b.waiting[0] = nil
		b.waiting = b.waiting[1:]
		if o.ctx.Err() == nil {
			out = append(out, o)
		}
	}
	return out
}

// adjustLocked learns from a call of n orders.
func (b *batcher) adjustLocked(n int, err error) {
	switch {
	case err == nil:
		b.limit = min(b.limit*2, maxBatch)
	case unreachable(err), errors.Is(err, authority.ErrNotReady), errors.Is(err, context.Canceled), deniedReason(err) != none:
		// Not because of the size.
	default:
		b.limit = max(1, min(n, b.limit)/2)
	}
}

func (c *Client) runBatch(orders []*order) error {
	req := &svidpb.BatchNewX509SVIDRequest{}
	for _, o := range orders {
		req.Params = append(req.Params, o.req)
	}
	c.met.batch.Observe(float64(len(orders)))
	var results []*svidpb.BatchNewX509SVIDResponse_Result
	err := c.call(c.life, "BatchNewX509SVID", func(ctx context.Context, cc grpc.ClientConnInterface) error {
		res, err := svidpb.NewSVIDClient(cc).BatchNewX509SVID(ctx, req)
		if err != nil {
			return err
		}
		if results = res.GetResults(); len(results) != len(orders) {
			return fmt.Errorf("%w: %d results for %d requests", errProtocol, len(results), len(orders))
		}
		return nil
	})
	for i, o := range orders {
		switch {
		case err != nil:
			o.done <- outcome{err: batchError(err)}
		case results[i].GetStatus() == nil:
			o.done <- outcome{err: fmt.Errorf("%w: a result without status", errProtocol)}
		default:
			o.done <- outcome{result: results[i]}
		}
	}
	return err
}

// batchError is the error of one order when its batch failed: whatever the
// server said, it did not say it of this order.
func batchError(err error) error {
	if errors.Is(err, authority.ErrNotReady) {
		return err
	}
	return fmt.Errorf("%w: %w", authority.ErrTryLater, err)
}

// settle finds out what to make of the server's refusal to sign for an entry
// that it has listed: it is asked once more what it lists. An entry that is
// gone is thereby withdrawn; one that is listed still was refused by a server
// that lags behind.
func (c *Client) settle(ctx context.Context, id string, refusal error) error {
	if _, _, heard := c.ledger.get(id); heard && !c.ledger.deny(id) {
		return fmt.Errorf("%w: %w", authority.ErrRefused, refusal)
	}
	if err := c.resync(ctx, id); err != nil {
		return fmt.Errorf("%w: %w; asking again failed: %w", authority.ErrTryLater, refusal, err)
	}
	if e, _, _ := c.ledger.get(id); e == nil {
		return fmt.Errorf("%w: %w", authority.ErrRefused, refusal)
	}
	return fmt.Errorf("%w: %w, but lists it", authority.ErrTryLater, refusal)
}

// checkX509 makes sure that a chain is for the SPIFFE ID of the request and
// below a root that those who verify it can know.
func (c *Client) checkX509(ctx context.Context, req authority.X509Request, chain [][]byte) (*authority.X509Issued, error) {
	if len(chain) == 0 {
		return nil, fmt.Errorf("%w: an SVID without certificates", errProtocol)
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("%w: certificate %d of an SVID: %w", errProtocol, i, err)
		}
		certs[i] = cert
	}
	id, err := x509svid.IDFromCert(certs[0])
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errProtocol, err)
	}
	if id != req.SPIFFEID {
		c.Hurry() // the entry has changed
		return nil, fmt.Errorf("%w: the server signed for %s", authority.ErrTryLater, id)
	}
	if !c.isRooted(certs) {
		// The CA is newer than the bundle: whoever gets the SVID must be able to
		// get the bundle that goes with it.
		if err := c.refreshOwn(ctx); err != nil {
			return nil, err
		}
		if !c.isRooted(certs) {
			return nil, fmt.Errorf("%w: the SVID is below no authority of the trust bundle", authority.ErrTryLater)
		}
	}
	return &authority.X509Issued{Chain: chain, NotBefore: certs[0].NotBefore, NotAfter: certs[0].NotAfter}, nil
}

// isRooted says whether a chain ends below an authority of the own bundle. Key
// identifiers answer for nearly every server; signatures decide if they do not.
func (c *Client) isRooted(certs []*x509.Certificate) bool {
	c.store.mu.Lock()
	own := c.store.own
	c.store.mu.Unlock()
	if own == nil {
		return false
	}
	if top := certs[len(certs)-1]; len(top.AuthorityKeyId) > 0 {
		for _, root := range own.X509Authorities() {
			if bytes.Equal(root.SubjectKeyId, top.AuthorityKeyId) {
				return true
			}
		}
	}
	_, _, err := x509svid.Verify(certs, own.X509Bundle(), x509svid.WithTime(certs[0].NotBefore.Add(time.Second)))
	return err == nil
}
