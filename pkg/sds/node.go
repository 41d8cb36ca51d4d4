package sds

import (
	"strconv"

	"google.golang.org/protobuf/encoding/protowire"
)

// metadataDisableValidator is the node metadata key that chooses the form of
// validation contexts, as SPIRE Agent reads it.
const metadataDisableValidator = "disable_spiffe_cert_validation"

// node is what counts of an Envoy's description of itself.
type node struct {
	disable    *bool // metadata; nil if absent or unreadable
	hasVersion bool  // a build version was given
	major      uint32
	minor      uint32
}

// plain says whether bundles go to this client as plain trusted_ca. Envoy has
// the SPIFFE validator since 1.18; a client that names no version is assumed
// to be newer, as is one that does not describe itself.
func (n *node) plain(configured bool) bool {
	if n == nil {
		return configured
	}
	if n.disable != nil {
		configured = *n.disable
	}
	old := n.hasVersion && n.major <= 1 && (n.major < 1 || n.minor <= 17)
	return configured || old
}

func parseBoolText(s string) *bool {
	if b, err := strconv.ParseBool(s); err == nil {
		return &b
	}
	return nil
}

// parseNode reads envoy.config.core.v3.Node; prev is what the same field held
// before in the same message.
func parseNode(prev *node, b []byte) (*node, error) {
	var out node
	if prev != nil {
		out = *prev
	}
	err := fields(b, func(num protowire.Number, typ protowire.Type, value []byte, _ uint64) error {
		if typ != protowire.BytesType {
			return nil
		}
		switch num {
		case 3: // metadata
			return parseStruct(value, &out)
		case 7: // user_agent_version, the other member of the oneof
			out.hasVersion, out.major, out.minor = false, 0, 0
		case 8: // user_agent_build_version
			return parseBuildVersion(value, &out)
		}
		return nil
	})
	return &out, err
}

func parseBuildVersion(b []byte, out *node) error {
	return fields(b, func(num protowire.Number, typ protowire.Type, value []byte, _ uint64) error {
		if num != 1 || typ != protowire.BytesType {
			return nil
		}
		out.hasVersion = true
		return fields(value, func(num protowire.Number, typ protowire.Type, _ []byte, varint uint64) error {
			switch {
			case typ != protowire.VarintType:
			case num == 1:
				out.major = uint32(varint) // protobuf's own truncation
			case num == 2:
				out.minor = uint32(varint) // protobuf's own truncation
			}
			return nil
		})
	})
}

// parseStruct looks for the one key of a google.protobuf.Struct that counts.
func parseStruct(b []byte, out *node) error {
	return fields(b, func(num protowire.Number, typ protowire.Type, value []byte, _ uint64) error {
		if num != 1 || typ != protowire.BytesType {
			return nil
		}
		var key []byte
		var kind protowire.Number
		var flag bool
		var str []byte
		err := fields(value, func(num protowire.Number, typ protowire.Type, value []byte, _ uint64) error {
			switch {
			case typ != protowire.BytesType:
			case num == 1:
				key = value
			case num == 2:
				return parseValue(value, &kind, &flag, &str)
			}
			return nil
		})
		if err != nil || string(key) != metadataDisableValidator {
			return err
		}
		out.disable = nil // the last entry of a key counts
		switch kind {
		case 4:
			out.disable = &flag
		case 3:
			out.disable = parseBoolText(string(str))
		}
		return nil
	})
}

// parseValue reads which kind a google.protobuf.Value is.
func parseValue(b []byte, kind *protowire.Number, flag *bool, str *[]byte) error {
	return fields(b, func(num protowire.Number, typ protowire.Type, value []byte, varint uint64) error {
		switch {
		case num == 3 && typ == protowire.BytesType:
			*kind, *str = num, value
		case num == 4 && typ == protowire.VarintType:
			*kind, *flag = num, varint != 0
		case num == 1 && typ == protowire.VarintType, num == 2 && typ == protowire.Fixed64Type,
			(num == 5 || num == 6) && typ == protowire.BytesType:
			*kind = num
		}
		return nil
	})
}
