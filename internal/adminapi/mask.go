package adminapi

import (
	"slices"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// masker clears what an output mask leaves out. A field without a bit in the
// mask's message, such as the ID, always stays. A nil masker keeps everything.
type masker struct {
	clear []protoreflect.Name
}

// newMasker reads a mask: a message of bools named after the fields they
// select. A nil mask selects everything.
func newMasker[M interface {
	comparable
	proto.Message
}](mask M,
) *masker {
	var none M
	if mask == none {
		return nil
	}
	m := mask.ProtoReflect()
	out := &masker{}
	bits := m.Descriptor().Fields()
	for i := range bits.Len() {
		if bit := bits.Get(i); !m.Get(bit).Bool() {
			out.clear = append(out.clear, bit.Name())
		}
	}
	return out
}

// clears says whether a field, or a oneof, is left out.
func (k *masker) clears(name protoreflect.Name) bool {
	return k != nil && slices.Contains(k.clear, name)
}

// apply clears fields of msg in place.
func (k *masker) apply(msg proto.Message) {
	if k == nil {
		return
	}
	m := msg.ProtoReflect()
	fields := m.Descriptor().Fields()
	for _, name := range k.clear {
		if f := fields.ByName(name); f != nil {
			m.Clear(f)
		}
	}
}
