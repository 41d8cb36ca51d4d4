package spirewire_test

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/debugpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/localauthoritypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/loggerpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/trustdomainpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// files are all compiled descriptors of the SPIRE Server API.
var files = []protoreflect.FileDescriptor{
	typespb.File_internal_spirewire_typespb_types_proto,
	agentpb.File_internal_spirewire_agentpb_agent_proto,
	bundlepb.File_internal_spirewire_bundlepb_bundle_proto,
	debugpb.File_internal_spirewire_debugpb_debug_proto,
	entrypb.File_internal_spirewire_entrypb_entry_proto,
	localauthoritypb.File_internal_spirewire_localauthoritypb_localauthority_proto,
	loggerpb.File_internal_spirewire_loggerpb_logger_proto,
	svidpb.File_internal_spirewire_svidpb_svid_proto,
	trustdomainpb.File_internal_spirewire_trustdomainpb_trustdomain_proto,
}

// TestDescriptors compares everything that goes over the wire or into JSON
// with the table in testdata, which was made from the published field numbers
// and not from our .proto files.
func TestDescriptors(t *testing.T) {
	want, err := os.ReadFile("testdata/wire.golden")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range files {
		got = append(got, describeMessages(f.Messages())...)
		got = append(got, describeEnums(f.Enums())...)
		got = append(got, describeServices(f.Services())...)
	}
	slices.Sort(got)
	wantLines := strings.Split(strings.TrimSuffix(string(want), "\n"), "\n")
	slices.Sort(wantLines)
	if diff := cmp.Diff(wantLines, got); diff != "" {
		t.Errorf("descriptors (-golden +compiled):\n%s", diff)
	}
}

func describeMessages(ms protoreflect.MessageDescriptors) []string {
	var out []string
	for i := range ms.Len() {
		m := ms.Get(i)
		if m.Fields().Len() == 0 {
			out = append(out, string(m.FullName()))
		}
		for j := range m.Fields().Len() {
			out = append(out, describeField(m, m.Fields().Get(j)))
		}
		out = append(out, describeMessages(m.Messages())...)
		out = append(out, describeEnums(m.Enums())...)
	}
	return out
}

func describeField(m protoreflect.MessageDescriptor, f protoreflect.FieldDescriptor) string {
	label, oneof := "", ""
	switch {
	case f.Cardinality() == protoreflect.Repeated:
		label = "repeated "
	case f.HasOptionalKeyword():
		label = "optional "
	case f.ContainingOneof() != nil:
		oneof = " oneof=" + string(f.ContainingOneof().Name())
	}
	kind := f.Kind().String()
	switch f.Kind() {
	case protoreflect.MessageKind:
		kind = string(f.Message().FullName())
	case protoreflect.EnumKind:
		kind = string(f.Enum().FullName())
	}
	return fmt.Sprintf("%s %d %s%s %s%s", m.FullName(), f.Number(), label, kind, f.Name(), oneof)
}

func describeEnums(es protoreflect.EnumDescriptors) []string {
	var out []string
	for i := range es.Len() {
		e := es.Get(i)
		for j := range e.Values().Len() {
			v := e.Values().Get(j)
			out = append(out, fmt.Sprintf("%s enum %s=%d", e.FullName(), v.Name(), v.Number()))
		}
	}
	return out
}

func describeServices(ss protoreflect.ServiceDescriptors) []string {
	var out []string
	for i := range ss.Len() {
		s := ss.Get(i)
		for j := range s.Methods().Len() {
			m := s.Methods().Get(j)
			in, outKind := "", ""
			if m.IsStreamingClient() {
				in = "stream "
			}
			if m.IsStreamingServer() {
				outKind = "stream "
			}
			out = append(out, fmt.Sprintf("%s rpc %s %s%s %s%s",
				s.FullName(), m.Name(), in, m.Input().FullName(), outKind, m.Output().FullName()))
		}
	}
	return out
}
