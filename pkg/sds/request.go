package sds

import (
	"errors"
	"fmt"
	"strings"
	"unicode/utf8"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

// request is what counts of a DiscoveryRequest.
type request struct {
	version string
	node    *node // nil if the message has none
	names   nameList
	typeURL string
	nonce   string
	nack    *nack
}

// deltaRequest is what counts of a DeltaDiscoveryRequest.
type deltaRequest struct {
	node        *node
	typeURL     string
	subscribe   nameList
	unsubscribe nameList
	initial     map[string]string // name -> version the client has
	initialSize int
	nonce       string
	nack        *nack
}

// nack is a google.rpc.Status: why the client rejects a response.
type nack struct {
	code    int32
	message string
}

// maxNackText is how much of a client's words is kept.
const maxNackText = 512

// nameList is a list of resource names that stops growing at the limits.
type nameList struct {
	list  []string
	bytes int
	count int
	long  bool // a name longer than maxNameBytes
}

func (l *nameList) add(name string) {
	l.count++
	l.bytes += len(name)
	l.long = l.long || len(name) > maxNameBytes
	if l.within() == nil {
		l.list = append(l.list, name)
	}
}

var (
	errTooManyNames = fmt.Errorf("over limit: more than %d resource names, or more than %d bytes of them", MaxNames, maxNamesBytes)
	errNameTooLong  = fmt.Errorf("resource name longer than %d bytes", maxNameBytes)
	errUTF8         = errors.New("string field contains invalid UTF-8")
)

func (l *nameList) within() error {
	switch {
	case l.count > MaxNames || l.bytes > maxNamesBytes:
		return errTooManyNames
	case l.long:
		return errNameTooLong
	}
	return nil
}

func undecodable(err error) error {
	return status.Errorf(codes.Internal, "the request cannot be decoded: %v", err)
}

// limits says what of the request is too much, if anything.
func (q *request) limits() error { return q.names.within() }

func (q *deltaRequest) limits() error {
	if err := q.subscribe.within(); err != nil {
		return err
	}
	if err := q.unsubscribe.within(); err != nil {
		return err
	}
	if len(q.initial) > MaxNames || q.initialSize > maxNamesBytes {
		return errTooManyNames
	}
	return nil
}

func (q *deltaRequest) addInitial(name, version string) {
	if q.initial == nil {
		q.initial = make(map[string]string)
	}
	if len(q.initial) > MaxNames {
		return // already over the limit
	}
	q.initialSize += len(name) + len(version)
	q.initial[name] = version
}

// fields calls visit for each field of a message. Values are raw: the bytes of
// length-delimited fields, the varint otherwise.
func fields(b []byte, visit func(num protowire.Number, typ protowire.Type, value []byte, varint uint64) error) error {
	for len(b) > 0 {
		num, typ, n := protowire.ConsumeTag(b)
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		var value []byte
		var varint uint64
		switch typ {
		case protowire.BytesType:
			value, n = protowire.ConsumeBytes(b)
		case protowire.VarintType:
			varint, n = protowire.ConsumeVarint(b)
		default:
			n = protowire.ConsumeFieldValue(num, typ, b)
		}
		if n < 0 {
			return protowire.ParseError(n)
		}
		b = b[n:]
		if err := visit(num, typ, value, varint); err != nil {
			return err
		}
	}
	return nil
}

func text(value []byte) (string, error) {
	if !utf8.Valid(value) {
		return "", errUTF8
	}
	return string(value), nil
}

// typeURLText is text for a field that nearly always holds the same.
func typeURLText(value []byte) (string, error) {
	if string(value) == TypeURL {
		return TypeURL, nil
	}
	return text(value)
}

func (q *request) unmarshal(b []byte) error {
	*q = request{}
	return fields(b, func(num protowire.Number, typ protowire.Type, value []byte, _ uint64) (err error) {
		if typ != protowire.BytesType {
			return nil // every field of interest is length-delimited
		}
		switch num {
		case 1:
			q.version, err = text(value)
		case 2:
			q.node, err = parseNode(q.node, value)
		case 3:
			var name string
			if name, err = text(value); err == nil {
				q.names.add(name)
			}
		case 4:
			q.typeURL, err = typeURLText(value)
		case 5:
			q.nonce, err = text(value)
		case 6:
			q.nack, err = parseNack(q.nack, value)
		}
		return err
	})
}

func (q *deltaRequest) unmarshal(b []byte) error {
	*q = deltaRequest{}
	return fields(b, func(num protowire.Number, typ protowire.Type, value []byte, _ uint64) (err error) {
		if typ != protowire.BytesType {
			return nil
		}
		var name string
		switch num {
		case 1:
			q.node, err = parseNode(q.node, value)
		case 2:
			q.typeURL, err = typeURLText(value)
		case 3:
			if name, err = text(value); err == nil {
				q.subscribe.add(name)
			}
		case 4:
			if name, err = text(value); err == nil {
				q.unsubscribe.add(name)
			}
		case 5:
			var key, val string
			err = fields(value, func(num protowire.Number, typ protowire.Type, value []byte, _ uint64) (err error) {
				switch {
				case typ != protowire.BytesType:
				case num == 1:
					key, err = text(value)
				case num == 2:
					val, err = text(value)
				}
				return err
			})
			q.addInitial(key, val)
		case 6:
			q.nonce, err = text(value)
		case 7:
			q.nack, err = parseNack(q.nack, value)
		}
		return err
	})
}

func parseNack(prev *nack, b []byte) (*nack, error) {
	var out nack
	if prev != nil {
		out = *prev // a field given twice is merged
	}
	err := fields(b, func(num protowire.Number, typ protowire.Type, value []byte, varint uint64) (err error) {
		switch {
		case num == 1 && typ == protowire.VarintType:
			out.code = int32(uint32(varint)) // protobuf's own truncation
		case num == 2 && typ == protowire.BytesType:
			if !utf8.Valid(value) {
				return errUTF8
			}
			out.message = clip(string(value), maxNackText)
		}
		return err
	})
	return &out, err
}

// clip shortens s to at most n bytes without breaking a rune, and without
// keeping the rest in memory.
func clip(s string, n int) string {
	if len(s) <= n {
		return s
	}
	for n > 0 && !utf8.RuneStart(s[n]) {
		n--
	}
	return strings.Clone(s[:n])
}
