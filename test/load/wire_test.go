package main

import (
	"hash/maphash"
	"testing"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
)

func encode(tb testing.TB, resp *discoveryv3.DiscoveryResponse) []byte {
	tb.Helper()
	data, err := proto.Marshal(resp)
	if err != nil {
		tb.Fatal(err)
	}
	return data
}

func TestAnswer(t *testing.T) {
	t.Parallel()
	seed := maphash.MakeSeed()
	resp := &discoveryv3.DiscoveryResponse{
		VersionInfo: "v", Nonce: "n", TypeUrl: secretType, Canary: true,
		Resources: []*anypb.Any{{TypeUrl: secretType, Value: []byte("one")}, {Value: []byte("two")}},
	}
	var first, again, other answer
	if err := first.parse(encode(t, resp), seed); err != nil {
		t.Fatal(err)
	}
	if first.version != "v" || first.nonce != "n" || first.resources != 2 {
		t.Errorf("%+v", first)
	}
	resp.VersionInfo, resp.Nonce = "w", "o"
	if err := again.parse(encode(t, resp), seed); err != nil || again.content != first.content {
		t.Errorf("the same resources differ: %v", err)
	}
	resp.Resources[1].Value = []byte("three")
	if err := other.parse(encode(t, resp), seed); err != nil || other.content == first.content {
		t.Errorf("other resources are the same: %v", err)
	}
}

// FuzzAnswer: what protobuf reads, answer reads alike; nothing else is read.
func FuzzAnswer(f *testing.F) {
	f.Add(encode(f, &discoveryv3.DiscoveryResponse{VersionInfo: "v", Nonce: "n", Resources: []*anypb.Any{{Value: []byte("x")}}}))
	f.Add([]byte{0x0a})
	f.Fuzz(func(t *testing.T, data []byte) {
		var got answer
		err := got.parse(data, maphash.MakeSeed())
		var want discoveryv3.DiscoveryResponse
		if proto.Unmarshal(data, &want) != nil {
			return
		}
		if err != nil || len(want.ProtoReflect().GetUnknown()) == 0 &&
			(got.version != want.GetVersionInfo() || got.nonce != want.GetNonce() || got.resources != len(want.GetResources())) {
			t.Errorf("%+v %v, want %v", got, err, &want)
		}
	})
}
