package sds

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/pem"
	"runtime"
	"slices"
	"sync"
	"weak"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// Field numbers of envoy.extensions.transport_sockets.tls.v3 and its
// neighbours, as far as they are written here.
const (
	secretName              = protowire.Number(1)
	secretTLSCertificate    = protowire.Number(2)
	secretValidationContext = protowire.Number(4)
	tlsCertificateChain     = protowire.Number(1)
	tlsPrivateKey           = protowire.Number(2)
	dataSourceInlineBytes   = protowire.Number(2)
	contextTrustedCA        = protowire.Number(1)
	contextCustomValidator  = protowire.Number(12)
	extensionName           = protowire.Number(1)
	extensionTypedConfig    = protowire.Number(2)
	anyTypeURL              = protowire.Number(1)
	anyValue                = protowire.Number(2)
	validatorTrustDomains   = protowire.Number(1)
	trustDomainName         = protowire.Number(1)
	trustDomainBundle       = protowire.Number(2)
)

const (
	// TypeURL is the type of every resource served here.
	TypeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"

	validatorTypeURL = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.SPIFFECertValidatorConfig"
	validatorName    = "envoy.tls.cert_validator.spiffe"
)

// payload is a Secret without its name: the oneof's field and the encoded
// message in pieces that may be shared with other payloads. Immutable.
type payload struct {
	field   protowire.Number
	pieces  [][]byte
	size    int
	digest  [sha256.Size]byte
	version string // of this resource alone
}

func newPayload(field protowire.Number, digest [sha256.Size]byte, pieces ...[]byte) *payload {
	p := &payload{field: field, pieces: pieces, digest: digest, version: hex.EncodeToString(digest[:8])}
	for _, b := range pieces {
		p.size += len(b)
	}
	return p
}

// bodies remembers what SVIDs and bundles look like encoded. An entry goes
// when the value it was made from is collected, so an encoded private key does
// not outlive its SVID. Safe for concurrent use.
type bodies struct {
	svids   weakCache[svid.X509SVID, payload]
	bundles weakCache[spiffebundle.Bundle, bundleBody]
}

// weakCache maps pointers to what was derived from the values behind them. The
// derived value must not refer to the value.
type weakCache[K, V any] struct {
	m sync.Map // weak.Pointer[K] -> *V
}

// get is the derived value and whether it was made just now.
func (c *weakCache[K, V]) get(k *K, derive func(*K) *V) (*V, bool) {
	key := weak.Make(k)
	if v, ok := c.m.Load(key); ok {
		return v.(*V), false
	}
	v, loaded := c.m.LoadOrStore(key, derive(k))
	if !loaded {
		runtime.AddCleanup(k, func(key weak.Pointer[K]) { c.m.Delete(key) }, key)
	}
	return v.(*V), !loaded
}

func (c *weakCache[K, V]) len() int {
	n := 0
	c.m.Range(func(any, any) bool { n++; return true })
	return n
}

// certificate is the payload of an X.509-SVID. The digest is that of the chain
// alone: the leaf holds the public key, so the private key adds nothing, and
// versions go over the wire and into logs.
func (b *bodies) certificate(s *svid.X509SVID) (*payload, bool) {
	return b.svids.get(s, encodeCertificate)
}

func encodeCertificate(s *svid.X509SVID) *payload {
	h := sha256.New()
	h.Write([]byte("tls_certificate\x00"))
	var chain []byte
	for _, der := range s.ChainDER {
		h.Write(protowire.AppendVarint(nil, uint64(len(der))))
		h.Write(der)
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: s.KeyDER})
	body := make([]byte, 0, len(chain)+len(key)+32)
	body = appendDataSource(body, tlsCertificateChain, chain)
	body = appendDataSource(body, tlsPrivateKey, key)
	clear(key)
	return newPayload(secretTLSCertificate, [sha256.Size]byte(h.Sum(nil)), body)
}

func appendDataSource(b []byte, field protowire.Number, inline []byte) []byte {
	b = protowire.AppendTag(b, field, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(sizeBytes(dataSourceInlineBytes, len(inline))))
	b = protowire.AppendTag(b, dataSourceInlineBytes, protowire.BytesType)
	return protowire.AppendBytes(b, inline)
}

// sizeBytes is the encoded size of a length-delimited field.
func sizeBytes(field protowire.Number, n int) int {
	return protowire.SizeTag(field) + protowire.SizeBytes(n)
}

// bundleBody is a trust bundle in the forms it is served in.
type bundleBody struct {
	digest [sha256.Size]byte
	empty  bool      // no X.509 authority: nothing Envoy could use
	block  [2][]byte // one SPIFFECertValidatorConfig.TrustDomain field: head, PEM
	plain  *payload  // trusted_ca
	single *payload  // SPIFFE validator with this trust domain alone
}

func (b *bodies) bundle(t *spiffebundle.Bundle) (*bundleBody, bool) {
	return b.bundles.get(t, encodeBundle)
}

func encodeBundle(t *spiffebundle.Bundle) *bundleBody {
	td := t.TrustDomain().Name()
	h := sha256.New()
	h.Write([]byte(td + "\x00"))
	var roots []byte
	for _, cert := range t.X509Authorities() {
		h.Write(protowire.AppendVarint(nil, uint64(len(cert.Raw))))
		h.Write(cert.Raw)
		roots = append(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: cert.Raw})...)
	}
	roots = slices.Clip(roots)
	body := &bundleBody{digest: [sha256.Size]byte(h.Sum(nil)), empty: len(roots) == 0}

	source := sizeBytes(dataSourceInlineBytes, len(roots))
	head := protowire.AppendTag(nil, validatorTrustDomains, protowire.BytesType)
	head = protowire.AppendVarint(head, uint64(sizeBytes(trustDomainName, len(td))+sizeBytes(trustDomainBundle, source)))
	head = protowire.AppendTag(head, trustDomainName, protowire.BytesType)
	head = protowire.AppendString(head, td)
	head = appendSourceHead(head, trustDomainBundle, len(roots))
	body.block = [2][]byte{head, roots}
	body.single = validator(body)
	body.plain = newPayload(secretValidationContext,
		sha256.Sum256(append([]byte("trusted_ca\x00"), body.digest[:]...)),
		appendSourceHead(nil, contextTrustedCA, len(roots)), roots)
	return body
}

// appendSourceHead writes a DataSource field up to its n inline bytes.
func appendSourceHead(b []byte, field protowire.Number, n int) []byte {
	b = protowire.AppendTag(b, field, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(sizeBytes(dataSourceInlineBytes, n)))
	b = protowire.AppendTag(b, dataSourceInlineBytes, protowire.BytesType)
	return protowire.AppendVarint(b, uint64(n))
}

// validator is the validation context for Envoy's SPIFFE validator with these
// bundles, in this order.
func validator(list ...*bundleBody) *payload {
	h := sha256.New()
	h.Write([]byte("spiffe_validator\x00"))
	config := 0
	for _, b := range list {
		h.Write(b.digest[:])
		config += len(b.block[0]) + len(b.block[1])
	}
	typed := sizeBytes(anyTypeURL, len(validatorTypeURL)) + sizeBytes(anyValue, config)
	extension := sizeBytes(extensionName, len(validatorName)) + sizeBytes(extensionTypedConfig, typed)
	head := protowire.AppendTag(make([]byte, 0, 192), contextCustomValidator, protowire.BytesType)
	head = protowire.AppendVarint(head, uint64(extension))
	head = protowire.AppendTag(head, extensionName, protowire.BytesType)
	head = protowire.AppendString(head, validatorName)
	head = protowire.AppendTag(head, extensionTypedConfig, protowire.BytesType)
	head = protowire.AppendVarint(head, uint64(typed))
	head = protowire.AppendTag(head, anyTypeURL, protowire.BytesType)
	head = protowire.AppendString(head, validatorTypeURL)
	head = protowire.AppendTag(head, anyValue, protowire.BytesType)
	head = protowire.AppendVarint(head, uint64(config))
	// What is not shared goes into one piece: gRPC keeps the longest list of
	// pieces it has written, for each connection.
	pieces := make([][]byte, 0, 2*len(list))
	for i, b := range list {
		own := b.block[0]
		if i == 0 {
			own = append(head, own...)
		}
		pieces = append(pieces, own, b.block[1])
	}
	return newPayload(secretValidationContext, [sha256.Size]byte(h.Sum(nil)), pieces...)
}

// allBundles is the own and the federated bundles, sorted by trust domain;
// bundles without an X.509 authority are left out.
func (b *bodies) allBundles(u *svid.Update) *payload {
	tds := make([]spiffeid.TrustDomain, 0, len(u.Federated)+1)
	for td := range u.Federated {
		if td != u.Own.TrustDomain() {
			tds = append(tds, td)
		}
	}
	tds = append(tds, u.Own.TrustDomain())
	slices.SortFunc(tds, spiffeid.TrustDomain.Compare)
	list := make([]*bundleBody, 0, len(tds))
	for _, td := range tds {
		t := u.Federated[td]
		if td == u.Own.TrustDomain() {
			t = u.Own
		}
		if t != nil {
			if body, _ := b.bundle(t); !body.empty {
				list = append(list, body)
			}
		}
	}
	if len(list) == 1 {
		return list[0].single
	}
	return validator(list...)
}
