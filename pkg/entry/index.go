package entry

import (
	"encoding/binary"
	"hash/maphash"

	iradix "github.com/hashicorp/go-immutable-radix/v2"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// The indices are keyed by hashes: keys stay short whatever the entries hold,
// and the seed is drawn per lineage, so nobody can aim at one bucket. Whoever
// looks up checks the entries found; a collision costs time, never a wrong
// answer.

// key is a hash as a radix tree wants it. One byte per four bits: nodes stay
// at 16 edges, which makes the copy of a path cheap.
type key [16]byte

func makeKey(hash uint64) (k key) {
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], hash)
	for i, c := range b {
		k[2*i], k[2*i+1] = c>>4, c&0xf
	}
	return k
}

func hashSelector(seed maphash.Seed, s selector.Selector) uint64 {
	return maphash.Comparable(seed, s)
}

func hashID(seed maphash.Seed, id spiffeid.ID) uint64 {
	return maphash.Comparable(seed, id)
}

// nameKey is the SPIFFE ID's hash followed by that of parent and selectors, so
// that one tree answers for the SPIFFE ID (by prefix) and for similar entries.
func nameKey(seed maphash.Seed, e *Entry) []byte {
	var h maphash.Hash
	h.SetSeed(seed)
	maphash.WriteComparable(&h, e.ParentID)
	for s := range e.Selectors.All() {
		maphash.WriteComparable(&h, s)
	}
	name, rest := makeKey(hashID(seed, e.SPIFFEID)), makeKey(h.Sum64())
	return append(name[:], rest[:]...)
}

// putList adds an item to the list under a key.
func putList(tree *iradix.Txn[*list], t *token, k []byte, it *item) {
	old, _ := tree.Get(k)
	if l := old.put(t, it); l != old {
		tree.Insert(k, l)
	}
}

// delList removes a row from the list under a key, and the key with the last
// row.
func delList(tree *iradix.Txn[*list], t *token, k []byte, row int64) {
	old, ok := tree.Get(k)
	if !ok {
		return
	}
	switch l := old.del(t, row); {
	case l == nil:
		tree.Delete(k)
	case l != old:
		tree.Insert(k, l)
	}
}
