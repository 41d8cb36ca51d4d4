package embedded

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Every stored value is framed:
//
//	byte 0     frame version (1)
//	byte 1-4   CRC-32C over bucket name, key and content, big endian
//	byte 5-    content
//
// bbolt guards only its meta pages; the checksum finds flipped bits and values
// that strayed to another key. It is no defence against people: who can write
// the file holds the CA keys anyway.

const (
	frameVersion = 1
	frameHeader  = 5
)

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)

	errChecksum = errors.New("checksum does not match")
	errShort    = errors.New("value is cut short")
)

func seal(bucket, key string, content []byte) []byte {
	out := make([]byte, frameHeader, frameHeader+len(content))
	out[0] = frameVersion
	binary.BigEndian.PutUint32(out[1:], frameSum(bucket, key, content))
	return append(out, content...)
}

// unseal is the content of a stored value. It aliases value.
func unseal(bucket, key string, value []byte) ([]byte, error) {
	switch {
	case len(value) < frameHeader:
		return nil, errShort
	case value[0] != frameVersion:
		return nil, fmt.Errorf("value has frame version %d, this program reads %d", value[0], frameVersion)
	}
	content := value[frameHeader:]
	if binary.BigEndian.Uint32(value[1:]) != frameSum(bucket, key, content) {
		return nil, errChecksum
	}
	return content, nil
}

func frameSum(bucket, key string, content []byte) uint32 {
	// The zero byte keeps bucket and key apart; bucket names hold none.
	sum := crc32.Update(0, castagnoli, []byte(bucket+"\x00"+key))
	return crc32.Update(sum, castagnoli, content)
}
