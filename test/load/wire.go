package main

import (
	"errors"
	"fmt"
	"hash/maphash"

	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// Methods of Envoy's secret discovery service.
const (
	streamMethod = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"
	fetchMethod  = "/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets"
)

var streamDesc = grpc.StreamDesc{StreamName: "StreamSecrets", ServerStreams: true, ClientStreams: true}

// answer is what load looks at in a DiscoveryResponse. It is read without
// building the message: on a machine shared with the server the client's own
// work would otherwise be a good part of what is measured.
type answer struct {
	version   string
	nonce     string
	resources int
	content   uint64 // equal for equal resources
}

// codec reads answers, and everything else as gRPC does.
type codec struct {
	encoding.CodecV2
	seed maphash.Seed
}

func newCodec() *codec {
	return &codec{CodecV2: encoding.GetCodecV2(proto.Name), seed: maphash.MakeSeed()}
}

// Unmarshal reads an answer, or any other message.
func (c *codec) Unmarshal(data mem.BufferSlice, v any) error {
	a, ok := v.(*answer)
	if !ok {
		return c.CodecV2.Unmarshal(data, v)
	}
	buf := data.MaterializeToBuffer(mem.DefaultBufferPool())
	defer buf.Free()
	return a.parse(buf.ReadOnlyData(), c.seed)
}

// Fields of envoy.service.discovery.v3.DiscoveryResponse.
const (
	fieldVersion   = 1
	fieldResources = 2
	fieldNonce     = 5
)

var errAnswer = errors.New("not a DiscoveryResponse")

func (a *answer) parse(msg []byte, seed maphash.Seed) error {
	*a = answer{}
	var h maphash.Hash
	h.SetSeed(seed)
	for len(msg) > 0 {
		num, kind, n := protowire.ConsumeTag(msg)
		if n < 0 {
			return fmt.Errorf("%w: %w", errAnswer, protowire.ParseError(n))
		}
		msg = msg[n:]
		var value []byte
		if kind == protowire.BytesType {
			value, n = protowire.ConsumeBytes(msg)
		} else {
			n = protowire.ConsumeFieldValue(num, kind, msg)
		}
		if n < 0 {
			return fmt.Errorf("%w: field %d: %w", errAnswer, num, protowire.ParseError(n))
		}
		msg = msg[n:]
		if kind != protowire.BytesType {
			continue
		}
		switch num {
		case fieldVersion:
			a.version = string(value)
		case fieldNonce:
			a.nonce = string(value)
		case fieldResources:
			a.resources++
			_, _ = h.Write(value) // never fails
		}
	}
	a.content = h.Sum64()
	return nil
}
