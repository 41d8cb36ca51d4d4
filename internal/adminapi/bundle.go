package adminapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// bundleService is spire.api.server.bundle.v1.Bundle.
type bundleService struct {
	bundlepb.UnimplementedBundleServer
	td    spiffeid.TrustDomain
	store bundleStore
}

// errBundleMissing is what clients tolerate for an unknown trust domain.
func errBundleMissing() error { return fail(codes.NotFound, "bundle not found", nil) }

func (s *bundleService) CountBundles(context.Context, *bundlepb.CountBundlesRequest) (*bundlepb.CountBundlesResponse, error) {
	return &bundlepb.CountBundlesResponse{Count: int32(s.store.BundleCount())}, nil // memory ends first
}

func (s *bundleService) GetBundle(_ context.Context, req *bundlepb.GetBundleRequest) (*typespb.Bundle, error) {
	return maskedBundle(s.store.OwnBundle(), newMasker(req.GetOutputMask())), nil
}

func maskedBundle(b *embedded.Bundle, mask *masker) *typespb.Bundle {
	out := bundleToWire(b)
	mask.apply(out)
	return out
}

func (s *bundleService) AppendBundle(ctx context.Context, req *bundlepb.AppendBundleRequest) (out *typespb.Bundle, err error) {
	defer func() {
		audit(ctx, "append to bundle", err, slog.Int("x509_authorities", len(req.GetX509Authorities())),
			slog.Int("jwt_authorities", len(req.GetJwtAuthorities())))
	}()
	if len(req.GetX509Authorities()) == 0 && len(req.GetJwtAuthorities()) == 0 {
		return nil, invalid("no authorities to append", nil)
	}
	roots, err := x509FromWire(req.GetX509Authorities())
	if err != nil {
		return nil, invalid("failed to convert X.509 authority", err)
	}
	keys, err := jwtFromWire(req.GetJwtAuthorities())
	if err != nil {
		return nil, invalid("failed to convert JWT authority", err)
	}
	b, err := s.store.AppendBundle(ctx, roots, keys)
	if err != nil {
		return nil, fail(codes.Internal, "failed to append bundle", err)
	}
	return maskedBundle(b, newMasker(req.GetOutputMask())), nil
}

func (s *bundleService) ListFederatedBundles(_ context.Context, req *bundlepb.ListFederatedBundlesRequest) (*bundlepb.ListFederatedBundlesResponse, error) {
	p, err := readPage(req.GetPageSize(), req.GetPageToken())
	if err != nil {
		return nil, fail(codes.Internal, "failed to list bundles", err)
	}
	items, last := cut(p, s.store.FederatedBundles(), func(b embedded.FederatedBundle) int64 { return b.Row })
	mask := newMasker(req.GetOutputMask())
	resp := &bundlepb.ListFederatedBundlesResponse{NextPageToken: p.next(len(items), last)}
	for _, b := range items {
		resp.Bundles = append(resp.Bundles, maskedBundle(b.Bundle, mask))
	}
	return resp, nil
}

func (s *bundleService) GetFederatedBundle(_ context.Context, req *bundlepb.GetFederatedBundleRequest) (*typespb.Bundle, error) {
	td, err := federatedDomain(s.td, req.GetTrustDomain(), "getting a federated bundle for the server's own trust domain is not allowed")
	if err != nil {
		return nil, err
	}
	b, err := s.store.FederatedBundle(td)
	switch {
	case errors.Is(err, embedded.ErrNotFound):
		return nil, errBundleMissing()
	case err != nil:
		return nil, fail(codes.Internal, "failed to fetch bundle", err)
	}
	return maskedBundle(b, newMasker(req.GetOutputMask())), nil
}

func (s *bundleService) BatchCreateFederatedBundle(ctx context.Context, req *bundlepb.BatchCreateFederatedBundleRequest) (*bundlepb.BatchCreateFederatedBundleResponse, error) {
	mask := newMasker(req.GetOutputMask())
	resp := &bundlepb.BatchCreateFederatedBundleResponse{}
	for _, in := range req.GetBundle() {
		out, err := s.create(ctx, in, mask)
		resp.Results = append(resp.Results, &bundlepb.BatchCreateFederatedBundleResponse_Result{Status: resultFor(err), Bundle: out})
		auditBundle(ctx, "create federated bundle", err, in.GetTrustDomain())
	}
	return resp, nil
}

func (s *bundleService) create(ctx context.Context, in *typespb.Bundle, mask *masker) (*typespb.Bundle, error) {
	b, err := bundleFromWire(s.td, in, "creating a federated bundle for the server's own trust domain is not allowed")
	if err != nil {
		return nil, err
	}
	switch err := s.store.CreateFederatedBundle(ctx, b); {
	case errors.Is(err, embedded.ErrExists):
		return nil, fail(codes.AlreadyExists, "bundle already exists", nil)
	case err != nil:
		return nil, fail(codes.Internal, "unable to create bundle", err)
	}
	return maskedBundle(b, mask), nil
}

func (s *bundleService) BatchUpdateFederatedBundle(ctx context.Context, req *bundlepb.BatchUpdateFederatedBundleRequest) (*bundlepb.BatchUpdateFederatedBundleResponse, error) {
	mask := newMasker(req.GetOutputMask())
	resp := &bundlepb.BatchUpdateFederatedBundleResponse{}
	for _, in := range req.GetBundle() {
		out, err := s.update(ctx, in, req.GetInputMask(), mask)
		resp.Results = append(resp.Results, &bundlepb.BatchUpdateFederatedBundleResponse_Result{Status: resultFor(err), Bundle: out})
		auditBundle(ctx, "update federated bundle", err, in.GetTrustDomain())
	}
	return resp, nil
}

func (s *bundleService) update(ctx context.Context, in *typespb.Bundle, fields *typespb.BundleMask, mask *masker) (*typespb.Bundle, error) {
	given, err := bundleFromWire(s.td, in, "updating a federated bundle for the server's own trust domain is not allowed")
	if err != nil {
		return nil, err
	}
	b, err := s.store.UpdateFederatedBundle(ctx, given.TrustDomain, func(next *embedded.Bundle) {
		if fields == nil || fields.GetX509Authorities() {
			next.X509 = given.X509
		}
		if fields == nil || fields.GetJwtAuthorities() {
			next.JWT = given.JWT
		}
		if fields == nil || fields.GetRefreshHint() {
			next.RefreshHint = given.RefreshHint
		}
		if fields == nil || fields.GetSequenceNumber() {
			next.Sequence = given.Sequence
		}
	})
	switch {
	case errors.Is(err, embedded.ErrNotFound):
		return nil, errBundleMissing()
	case err != nil:
		return nil, fail(codes.Internal, "failed to update bundle", err)
	}
	return maskedBundle(b, mask), nil
}

func (s *bundleService) BatchSetFederatedBundle(ctx context.Context, req *bundlepb.BatchSetFederatedBundleRequest) (*bundlepb.BatchSetFederatedBundleResponse, error) {
	mask := newMasker(req.GetOutputMask())
	resp := &bundlepb.BatchSetFederatedBundleResponse{}
	for _, in := range req.GetBundle() {
		out, err := s.set(ctx, in, mask)
		resp.Results = append(resp.Results, &bundlepb.BatchSetFederatedBundleResponse_Result{Status: resultFor(err), Bundle: out})
		auditBundle(ctx, "set federated bundle", err, in.GetTrustDomain())
	}
	return resp, nil
}

func (s *bundleService) set(ctx context.Context, in *typespb.Bundle, mask *masker) (*typespb.Bundle, error) {
	b, err := bundleFromWire(s.td, in, "setting a federated bundle for the server's own trust domain is not allowed")
	if err != nil {
		return nil, err
	}
	if err := s.store.SetFederatedBundle(ctx, b); err != nil {
		return nil, fail(codes.Internal, "failed to set bundle", err)
	}
	return maskedBundle(b, mask), nil
}

func (s *bundleService) BatchDeleteFederatedBundle(ctx context.Context, req *bundlepb.BatchDeleteFederatedBundleRequest) (*bundlepb.BatchDeleteFederatedBundleResponse, error) {
	mode := embedded.Restrict
	switch req.GetMode() {
	case bundlepb.BatchDeleteFederatedBundleRequest_RESTRICT:
	case bundlepb.BatchDeleteFederatedBundleRequest_DELETE:
		mode = embedded.DeleteEntries
	case bundlepb.BatchDeleteFederatedBundleRequest_DISSOCIATE:
		mode = embedded.Dissociate
	default:
		return nil, invalidf("unhandled delete mode %q", req.GetMode().String())
	}
	resp := &bundlepb.BatchDeleteFederatedBundleResponse{}
	for _, name := range req.GetTrustDomains() {
		err := s.delete(ctx, name, mode)
		resp.Results = append(resp.Results, &bundlepb.BatchDeleteFederatedBundleResponse_Result{Status: resultFor(err), TrustDomain: name})
		auditBundle(ctx, "delete federated bundle", err, name)
	}
	return resp, nil
}

func (s *bundleService) delete(ctx context.Context, name string, mode embedded.DeleteMode) error {
	td, err := federatedDomain(s.td, name, "removing the bundle for the server trust domain is not allowed")
	if err != nil {
		return err
	}
	const message = "failed to delete federated bundle"
	var inUse *embedded.InUseError
	switch err := s.store.DeleteFederatedBundle(ctx, td, mode); {
	case errors.Is(err, embedded.ErrNotFound):
		return errBundleMissing()
	case errors.As(err, &inUse):
		return fail(codes.FailedPrecondition, message, fmt.Errorf("datastore-sql: %w", inUse))
	case err != nil:
		return fail(codes.Internal, message, err)
	}
	return nil
}

func auditBundle(ctx context.Context, what string, err error, name string) {
	audit(ctx, what, err, slog.String("trust_domain", name))
}
