package sds

import (
	"encoding/binary"
	"errors"
	"io"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
)

// direct is what RecvMsg reads from. Waiting in it rather than in RecvMsg
// saves a kilobyte of frames, which is what lets a quiet handler live on a
// stack of 4 KiB instead of 8, twice per Envoy. Like statusWriter it is no part
// of gRPC's interface: without it RecvMsg is used.
type direct interface {
	ReadMessageHeader(header []byte) error
	Read(n int) (mem.BufferSlice, error)
	RecvCompress() string
}

// directly is nil if messages are compressed, which is left to gRPC.
func directly(transport any) direct {
	d, ok := transport.(direct)
	if !ok || d.RecvCompress() != "" && d.RecvCompress() != "identity" {
		return nil
	}
	return d
}

// maxRequest bounds a request: MaxNames long names and the description an
// Envoy gives of itself fit many times.
const maxRequest = 1 << 20

// receive waits for the next request. Of one that is read directly, only the
// header is there: the rest is for the worker.
func (c *call) receive() error {
	if c.direct == nil {
		return c.stream.RecvMsg(&c.in)
	}
	return c.direct.ReadMessageHeader(c.header[:])
}

// readBody reads what follows the header: compressed or not, and the length.
func (c *call) readBody() error {
	if c.direct == nil {
		return nil
	}
	if c.header[0] != 0 {
		return status.Error(codes.Internal, "the request is marked as compressed, but the stream is not")
	}
	size := binary.BigEndian.Uint32(c.header[1:])
	if size > maxRequest {
		return status.Errorf(codes.ResourceExhausted, "request of %d bytes is longer than %d", size, maxRequest)
	}
	data, err := c.direct.Read(int(size))
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return status.Error(codes.Internal, "the stream ended within a request")
	}
	c.in.data = data
	return err
}
