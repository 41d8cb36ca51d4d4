package embedded

import (
	"encoding/binary"
	"fmt"
)

// Names of the buckets.
const (
	bucketMeta    = "meta"
	bucketEntries = "entries"
	bucketBundles = "bundles"
	bucketAgents  = "agents"
	bucketCA      = "ca"
	bucketTokens  = "join_tokens"
	// bucketRelationships is for federation.
	bucketRelationships = "relationships"
)

// dataBuckets are those with framed values.
var dataBuckets = []string{bucketEntries, bucketBundles, bucketAgents, bucketCA, bucketTokens, bucketRelationships}

// laterBuckets are missing in files of older programs and made when they are
// first written to.
var laterBuckets = map[string]bool{bucketTokens: true, bucketRelationships: true}

// store keeps values durable. All reading happens once, at the start; from then
// on memory is the truth and the store follows it, so an implementation needs
// no reads beside load. Calls never overlap.
type store interface {
	// load calls f for every value, by bucket and key. f must not keep the
	// value. Damage is an error that wraps ErrCorrupt.
	load(f func(bucket, key string, value []byte) error) error
	// apply makes all changes durable, or none. When it fails, the stored
	// values are as before; if that is in doubt, later calls fail with
	// ErrReadOnly.
	apply(changes []change) error
	// close releases the store. Nothing is lost without it.
	close() error
}

// change puts a value, or deletes the key when the value is nil.
type change struct {
	bucket, key string
	value       []byte
}

func put(bucket, key string, content []byte) change {
	return change{bucket, key, seal(bucket, key, content)}
}

func remove(bucket, key string) change { return change{bucket: bucket, key: key} }

// rowKey orders keys by row.
func rowKey(row int64) string {
	return string(binary.BigEndian.AppendUint64(nil, uint64(row)))
}

func parseRow(key string) (int64, error) {
	if len(key) != 8 || key[0]&0x80 != 0 {
		return 0, fmt.Errorf("key %q is no row", key)
	}
	return int64(binary.BigEndian.Uint64([]byte(key))), nil
}
