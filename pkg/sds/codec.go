package sds

import (
	"google.golang.org/grpc/encoding"
	protocodec "google.golang.org/grpc/encoding/proto" // registers the codec that ours passes messages on to
	"google.golang.org/grpc/mem"
)

// raw is a request as it came.
type raw struct{ data mem.BufferSlice }

// message is an encoded response.
type message struct{ data mem.BufferSlice }

// lean is a request that reads itself from protobuf bytes and keeps only what
// counts.
type lean interface{ unmarshal(b []byte) error }

type codec struct{ encoding.CodecV2 }

// Codec is gRPC's protobuf codec with a short cut for the messages of this
// package: responses are sent as the shared bytes they are, and of requests
// only the fields that count are read (an Envoy's first request carries a node
// description of tens of kilobytes). All other messages are left to the
// standard codec. A server that Register is used on must have it, by
// grpc.ForceServerCodecV2.
func Codec() encoding.CodecV2 { return codec{encoding.GetCodecV2(protocodec.Name)} }

// Marshal implements encoding.CodecV2.
func (c codec) Marshal(v any) (mem.BufferSlice, error) {
	if m, ok := v.(*message); ok {
		return m.data, nil
	}
	return c.CodecV2.Marshal(v)
}

// Unmarshal implements encoding.CodecV2.
func (c codec) Unmarshal(data mem.BufferSlice, v any) error {
	if r, ok := v.(*raw); ok {
		// Read later, off the handler's stack. The slice was made for us; what
		// it refers to is the transport's.
		data.Ref()
		r.data = data
		return nil
	}
	m, ok := v.(lean)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	return m.unmarshal(buf.ReadOnlyData())
}
