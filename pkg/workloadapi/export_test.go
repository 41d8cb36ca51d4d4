package workloadapi

import (
	"context"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/metadata"

	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// CheckHeader is the check of the security header.
func CheckHeader(md metadata.MD) error {
	return checkHeader(metadata.NewIncomingContext(context.Background(), md))
}

// Validate is ValidateJWTSVID for a caller with the picture u.
func (s *Server) Validate(u *svid.Update, token, audience string) (*workload.ValidateJWTSVIDResponse, error) {
	return s.validate(u, &workload.ValidateJWTSVIDRequest{Svid: token, Audience: audience})
}

// CheckJWTRequest is the check of a FetchJWTSVID request.
func CheckJWTRequest(req *workload.JWTSVIDRequest) error {
	_, err := checkJWTRequest(req)
	return err
}

// Views is how many responses are held.
func (s *Server) Views() (n int) {
	s.views.m.Range(func(any, any) bool { n++; return true })
	return n
}
