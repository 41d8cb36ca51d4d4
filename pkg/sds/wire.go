package sds

import (
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/encoding/protowire"
)

// Field numbers of the discovery messages written here.
const (
	responseVersion   = protowire.Number(1)
	responseResources = protowire.Number(2)
	responseTypeURL   = protowire.Number(4)
	responseNonce     = protowire.Number(5)
	responseRemoved   = protowire.Number(6) // delta only
	resourceVersion   = protowire.Number(1)
	resourceAny       = protowire.Number(2)
	resourceName      = protowire.Number(3)
)

// resource is a payload under the name the client asked for.
type resource struct {
	name    string
	payload *payload
	entryID string // the registration entry of an identity
	serial  string // of an identity's certificate, decimal
	roots   uint32 // generation of the own bundle, if it is in the payload
}

func (r *resource) identity() bool { return r.payload.field == secretTLSCertificate }

func (r *resource) secretSize() int {
	return sizeBytes(secretName, len(r.name)) + sizeBytes(r.payload.field, r.payload.size)
}

func (r *resource) anySize() int {
	return sizeBytes(anyTypeURL, len(TypeURL)) + sizeBytes(anyValue, r.secretSize())
}

// appendAny writes the Any up to the payload's first byte.
func (r *resource) appendAny(b []byte) []byte {
	b = protowire.AppendTag(b, anyTypeURL, protowire.BytesType)
	b = protowire.AppendString(b, TypeURL)
	b = protowire.AppendTag(b, anyValue, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(r.secretSize()))
	b = protowire.AppendTag(b, secretName, protowire.BytesType)
	b = protowire.AppendString(b, r.name)
	b = protowire.AppendTag(b, r.payload.field, protowire.BytesType)
	return protowire.AppendVarint(b, uint64(r.payload.size))
}

// builder writes a message as pieces: its own small heads, cut from one
// allocation, with the shared payloads between them.
type builder struct {
	out  mem.BufferSlice
	buf  []byte
	from int
}

func newBuilder(resources []resource, extra int) *builder {
	// Besides texts, tags and lengths: the most there can be.
	size, pieces := extra+len(TypeURL)+12, 1
	for i := range resources {
		size += len(TypeURL) + 2*len(resources[i].name) + 52
		pieces += 1 + len(resources[i].payload.pieces)
	}
	return &builder{out: make(mem.BufferSlice, 0, pieces), buf: make([]byte, 0, size)}
}

// cut ends the current head.
func (b *builder) cut() {
	if b.from < len(b.buf) {
		b.out = append(b.out, mem.SliceBuffer(b.buf[b.from:len(b.buf):len(b.buf)]))
		b.from = len(b.buf)
	}
}

func (b *builder) text(field protowire.Number, s string) {
	if s != "" {
		b.buf = protowire.AppendTag(b.buf, field, protowire.BytesType)
		b.buf = protowire.AppendString(b.buf, s)
	}
}

func (b *builder) share(p *payload) {
	b.cut()
	for _, piece := range p.pieces {
		if len(piece) > 0 {
			b.out = append(b.out, mem.SliceBuffer(piece))
		}
	}
}

// encodeResponse is a DiscoveryResponse.
func encodeResponse(version, nonce string, resources []resource) mem.BufferSlice {
	b := newBuilder(resources, len(version)+len(nonce))
	b.text(responseVersion, version)
	b.text(responseTypeURL, TypeURL)
	b.text(responseNonce, nonce)
	for i := range resources {
		r := &resources[i]
		b.buf = protowire.AppendTag(b.buf, responseResources, protowire.BytesType)
		b.buf = protowire.AppendVarint(b.buf, uint64(r.anySize()))
		b.buf = r.appendAny(b.buf)
		b.share(r.payload)
	}
	b.cut()
	return b.out
}

// encodeDelta is a DeltaDiscoveryResponse; each resource has its own version.
func encodeDelta(nonce string, resources []resource, removed []string) mem.BufferSlice {
	extra := len(nonce)
	for _, name := range removed {
		extra += len(name) + 4
	}
	b := newBuilder(resources, extra)
	b.text(responseTypeURL, TypeURL)
	b.text(responseNonce, nonce)
	for _, name := range removed {
		b.text(responseRemoved, name)
	}
	for i := range resources {
		r := &resources[i]
		size := r.anySize()
		b.buf = protowire.AppendTag(b.buf, responseResources, protowire.BytesType)
		b.buf = protowire.AppendVarint(b.buf, uint64(sizeBytes(resourceVersion, len(r.payload.version))+
			sizeBytes(resourceName, len(r.name))+sizeBytes(resourceAny, size)))
		b.text(resourceVersion, r.payload.version)
		b.text(resourceName, r.name)
		b.buf = protowire.AppendTag(b.buf, resourceAny, protowire.BytesType)
		b.buf = protowire.AppendVarint(b.buf, uint64(size))
		b.buf = r.appendAny(b.buf)
		b.share(r.payload)
	}
	b.cut()
	return b.out
}
