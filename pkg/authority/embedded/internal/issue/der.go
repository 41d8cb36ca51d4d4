package issue

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"time"
)

// DER tags used in certificates.
const (
	tagBool            = 0x01
	tagInteger         = 0x02
	tagBitString       = 0x03
	tagOctets          = 0x04
	tagUTCTime         = 0x17
	tagGeneralizedTime = 0x18
	tagSequence        = 0x30
	tagContext0        = 0x80 // primitive, [0] as in AuthorityKeyIdentifier
	tagContext2        = 0x82 // dNSName
	tagContext6        = 0x86 // uniformResourceIdentifier
	tagExplicit0       = 0xa0
	tagExplicit3       = 0xa3
)

// tlv encodes tag, length and the concatenated parts. The certificates of this
// package have one fixed shape; writing it out costs a tenth of the reflection
// in encoding/asn1, and the result is parsed again by crypto/x509 before it is
// signed.
func tlv(tag byte, parts ...[]byte) []byte {
	n := 0
	for _, p := range parts {
		n += len(p)
	}
	out := make([]byte, 0, n+6)
	out = append(out, tag)
	switch {
	case n < 0x80:
		out = append(out, byte(n))
	case n < 0x100:
		out = append(out, 0x81, byte(n))
	case n < 0x10000:
		out = append(out, 0x82, byte(n>>8), byte(n))
	default:
		// A certificate never gets near 16 MiB: SVIDs of that size fit no
		// message, and the check of the draft would refuse it.
		out = append(out, 0x83, byte(n>>16), byte(n>>8), byte(n))
	}
	for _, p := range parts {
		out = append(out, p...)
	}
	return out
}

// derTime is the Time of RFC 5280 4.1.2.5: UTCTime before 2050, then
// GeneralizedTime; whole seconds in UTC.
func derTime(t time.Time) []byte {
	t = t.UTC()
	if y := t.Year(); y >= 1950 && y < 2050 {
		return tlv(tagUTCTime, t.AppendFormat(nil, "060102150405Z"))
	}
	return tlv(tagGeneralizedTime, t.AppendFormat(nil, "20060102150405Z"))
}

// derInteger is a positive INTEGER.
func derInteger(big []byte) []byte {
	if len(big) == 0 {
		big = []byte{0}
	}
	if big[0]&0x80 != 0 {
		return tlv(tagInteger, []byte{0}, big)
	}
	return tlv(tagInteger, big)
}

func extension(oid []byte, critical bool, value []byte) []byte {
	if critical {
		return tlv(tagSequence, oid, derTrue, tlv(tagOctets, value))
	}
	return tlv(tagSequence, oid, tlv(tagOctets, value))
}

var (
	derVersion3 = tlv(tagExplicit0, tlv(tagInteger, []byte{2}))
	derTrue     = tlv(tagBool, []byte{0xff})

	oidSubjectKeyID   = []byte{0x06, 3, 0x55, 0x1d, 14}
	oidKeyUsage       = []byte{0x06, 3, 0x55, 0x1d, 15}
	oidSAN            = []byte{0x06, 3, 0x55, 0x1d, 17}
	oidBasic          = []byte{0x06, 3, 0x55, 0x1d, 19}
	oidAuthorityKeyID = []byte{0x06, 3, 0x55, 0x1d, 35}
	oidExtKeyUsage    = []byte{0x06, 3, 0x55, 0x1d, 37}
	oidServerAuth     = []byte{0x06, 8, 0x2b, 6, 1, 5, 5, 7, 3, 1}
	oidClientAuth     = []byte{0x06, 8, 0x2b, 6, 1, 5, 5, 7, 3, 2}

	// digitalSignature (0), keyEncipherment (2), keyAgreement (4)
	extLeafKeyUsage = extension(oidKeyUsage, true, tlv(tagBitString, []byte{3, 0xa8}))
	// keyCertSign (5), cRLSign (6)
	extCAKeyUsage  = extension(oidKeyUsage, true, tlv(tagBitString, []byte{1, 0x06}))
	extLeafExtUse  = extension(oidExtKeyUsage, false, tlv(tagSequence, oidServerAuth, oidClientAuth))
	extLeafBasic   = extension(oidBasic, true, tlv(tagSequence))
	extCABasic     = extension(oidBasic, true, tlv(tagSequence, derTrue))
	algECDSASHA256 = tlv(tagSequence, []byte{0x06, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 2})
	algECDSASHA384 = tlv(tagSequence, []byte{0x06, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, 3})
	algRSASHA256   = tlv(tagSequence, []byte{0x06, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 0x0b, 0x05, 0})
)

// signing is how a CA key signs certificates.
type signing struct {
	der  []byte // AlgorithmIdentifier
	alg  x509.SignatureAlgorithm
	hash crypto.Hash
}

func signingFor(pub crypto.PublicKey) (signing, error) {
	switch pub := pub.(type) {
	case *ecdsa.PublicKey:
		switch pub.Curve {
		case elliptic.P256():
			return signing{algECDSASHA256, x509.ECDSAWithSHA256, crypto.SHA256}, nil
		case elliptic.P384():
			return signing{algECDSASHA384, x509.ECDSAWithSHA384, crypto.SHA384}, nil
		}
	case *rsa.PublicKey:
		if err := CheckPublicKey(pub); err != nil {
			return signing{}, err
		}
		return signing{algRSASHA256, x509.SHA256WithRSA, crypto.SHA256}, nil
	}
	return signing{}, fmt.Errorf("a key of type %T cannot be a CA key here", pub)
}
