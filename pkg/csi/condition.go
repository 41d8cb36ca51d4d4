package csi

import (
	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/encoding/protowire"
)

// CSI 1.13 took the alpha message VolumeCondition out of its files and kept the
// numbers reserved. The kubelets of today were built before it and read the
// condition from where it was, so it is written by number.
const (
	capVolumeCondition csipb.NodeServiceCapability_RPC_Type = 4 // VOLUME_CONDITION

	fieldCondition = 2 // NodeGetVolumeStatsResponse.volume_condition
	fieldAbnormal  = 1 // VolumeCondition.abnormal, bool
	fieldMessage   = 2 // VolumeCondition.message, string
)

// addVolumeCondition puts the condition into the answer as CSI 1.3 to 1.12
// have it.
func addVolumeCondition(resp *csipb.NodeGetVolumeStatsResponse, c condition) {
	var m []byte
	m = protowire.AppendTag(m, fieldAbnormal, protowire.VarintType)
	m = protowire.AppendVarint(m, protowire.EncodeBool(c.reason != ""))
	m = protowire.AppendTag(m, fieldMessage, protowire.BytesType)
	m = protowire.AppendString(m, c.message)
	var field []byte
	field = protowire.AppendTag(field, fieldCondition, protowire.BytesType)
	field = protowire.AppendBytes(field, m)
	ref := resp.ProtoReflect()
	ref.SetUnknown(append(ref.GetUnknown(), field...))
}
