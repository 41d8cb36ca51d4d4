package adminapi

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// failure is an answer with a code. Its text is the server's: the message and,
// except for NOT_FOUND, the cause behind a colon.
type failure struct {
	code    codes.Code
	message string
	cause   error
}

func fail(code codes.Code, message string, cause error) *failure {
	return &failure{code: code, message: message, cause: cause}
}

func (f *failure) Error() string {
	if f.cause == nil || f.code == codes.NotFound {
		return f.message
	}
	return f.message + ": " + f.cause.Error()
}

func (f *failure) Unwrap() error { return f.cause }

// GRPCStatus makes a failure the outcome of an RPC.
func (f *failure) GRPCStatus() *status.Status { return status.New(f.code, f.Error()) }

// resultFor is the status of a batch item. Clients dereference it, so it is
// never left out.
func resultFor(err error) *typespb.Status {
	if err == nil {
		return &typespb.Status{Code: int32(codes.OK), Message: "OK"}
	}
	var f *failure
	if !errors.As(err, &f) {
		f = fail(codes.Internal, "unexpected error", err)
	}
	return &typespb.Status{Code: int32(f.code), Message: f.Error()} // codes are small
}

func invalid(message string, cause error) error { return fail(codes.InvalidArgument, message, cause) }

func invalidf(format string, args ...any) error {
	return fail(codes.InvalidArgument, fmt.Sprintf(format, args...), nil)
}
