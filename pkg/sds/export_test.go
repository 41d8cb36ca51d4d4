package sds

import (
	"fmt"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// Outcome is what an event led to.
type Outcome struct {
	SotW    *discoveryv3.DiscoveryResponse
	Delta   *discoveryv3.DeltaDiscoveryResponse
	Cause   string
	Verdict string
	Text    string // of a NACK
	Unknown []string
	Late    []string
	Narrow  bool
	End     error
}

func outcome(c *core, a action, delta bool) (out Outcome) {
	out = Outcome{
		Cause: a.cause, Verdict: a.verdict.String(), Text: a.rejects.message,
		Unknown: a.unknown, Late: c.late(), Narrow: a.narrow, End: a.end,
	}
	if a.send != nil {
		var full proto.Message
		if delta {
			out.Delta = new(discoveryv3.DeltaDiscoveryResponse)
			full = out.Delta
		} else {
			out.SotW = new(discoveryv3.DiscoveryResponse)
			full = out.SotW
		}
		if err := proto.Unmarshal(a.send.Materialize(), full); err != nil {
			panic(err)
		}
	}
	return out
}

// SotW drives the state machine of StreamSecrets.
type SotW struct{ m *stream }

func newResolver(names Names, plain bool) *resolver {
	n, _, err := names.parse()
	if err != nil {
		panic(err)
	}
	return &resolver{names: n, plain: plain, bodies: new(bodies)}
}

func NewSotW(names Names, plain bool) SotW {
	return SotW{&stream{core: core{r: newResolver(names, plain)}}}
}

// RequestBytes is what the server does with bytes from the wire; ok is false
// if it refuses them.
func (s SotW) RequestBytes(b []byte, u *svid.Update) (out Outcome, ok bool) {
	q := new(request)
	if err := q.unmarshal(b); err != nil {
		return out, false
	}
	if err := checkRequest(q.typeURL, q.limits()); err != nil {
		return out, false
	}
	return outcome(&s.m.core, s.m.request(q, u), false), true
}

func (s SotW) Request(q *discoveryv3.DiscoveryRequest, u *svid.Update) Outcome {
	b, err := proto.Marshal(q)
	if err != nil {
		panic(err)
	}
	out, ok := s.RequestBytes(b, u)
	if !ok {
		panic("request refused")
	}
	return out
}

func (s SotW) Update(u *svid.Update) Outcome {
	return outcome(&s.m.core, s.m.update(u), false)
}

// FoldOnly is Update without decoding the response, for benchmarks.
func (s SotW) FoldOnly(u *svid.Update) bool { return s.m.update(u).send != nil }

// Trust is the bookkeeping on the own bundle.
func (s SotW) Trust() (sent, acked uint32, rejected bool) { return s.m.trust.show() }

// Trust is the bookkeeping on the own bundle.
func (d Delta) Trust() (sent, acked uint32, rejected bool) { return d.m.trust.show() }

func (t *trust) show() (sent, acked uint32, rejected bool) { return t.sent, t.acked, t.rejected }

// Delta drives the state machine of DeltaSecrets.
type Delta struct{ m *delta }

func NewDelta(names Names, plain bool) Delta {
	return Delta{&delta{core: core{r: newResolver(names, plain)}}}
}

func (d Delta) RequestBytes(b []byte, u *svid.Update) (out Outcome, ok bool) {
	q := new(deltaRequest)
	if err := q.unmarshal(b); err != nil {
		return out, false
	}
	if err := checkRequest(q.typeURL, q.limits()); err != nil {
		return out, false
	}
	return outcome(&d.m.core, d.m.request(q, u), true), true
}

func (d Delta) Request(q *discoveryv3.DeltaDiscoveryRequest, u *svid.Update) Outcome {
	b, err := proto.Marshal(q)
	if err != nil {
		panic(err)
	}
	out, ok := d.RequestBytes(b, u)
	if !ok {
		panic("request refused")
	}
	return out
}

func (d Delta) Update(u *svid.Update) Outcome {
	return outcome(&d.m.core, d.m.update(u), true)
}

// ReadRequest shows what the hand-written reader and the full decoder make of
// the same bytes.
func ReadRequest(b []byte) (hand, full string, handErr, fullErr error) {
	q := new(request)
	handErr = q.unmarshal(b)
	decoded := new(discoveryv3.DiscoveryRequest)
	fullErr = proto.Unmarshal(b, decoded)
	p := requestOf(decoded)
	show := func(q *request) string {
		return fmt.Sprintf("%q %v %+v %q %q %v", q.version, showNode(q.node), q.names, q.typeURL, q.nonce, showNack(q.nack))
	}
	return show(q), show(p), handErr, fullErr
}

// ReadDelta is ReadRequest for delta requests.
func ReadDelta(b []byte) (hand, full string, handErr, fullErr error) {
	q := new(deltaRequest)
	handErr = q.unmarshal(b)
	decoded := new(discoveryv3.DeltaDiscoveryRequest)
	fullErr = proto.Unmarshal(b, decoded)
	p := deltaRequestOf(decoded)
	show := func(q *deltaRequest) string {
		return fmt.Sprintf("%v %q %+v %+v %v %q %v", showNode(q.node), q.typeURL, q.subscribe, q.unsubscribe, q.initial, q.nonce, showNack(q.nack))
	}
	return show(q), show(p), handErr, fullErr
}

// ReadNode is ReadRequest for the node alone, and whether it wants the plain
// form.
func ReadNode(b []byte) (plain bool, ok bool) {
	n, err := parseNode(nil, b)
	if err != nil {
		return false, false
	}
	return n.plain(false), true
}

// requestOf is what unmarshal makes of the message's bytes.
func requestOf(full *discoveryv3.DiscoveryRequest) *request {
	q := &request{
		version: full.GetVersionInfo(), node: nodeOf(full.GetNode()), typeURL: full.GetTypeUrl(),
		nonce: full.GetResponseNonce(),
	}
	for _, name := range full.GetResourceNames() {
		q.names.add(name)
	}
	if d := full.GetErrorDetail(); d != nil {
		q.nack = &nack{code: d.GetCode(), message: clip(d.GetMessage(), maxNackText)}
	}
	return q
}

func deltaRequestOf(full *discoveryv3.DeltaDiscoveryRequest) *deltaRequest {
	q := &deltaRequest{node: nodeOf(full.GetNode()), typeURL: full.GetTypeUrl(), nonce: full.GetResponseNonce()}
	for _, name := range full.GetResourceNamesSubscribe() {
		q.subscribe.add(name)
	}
	for _, name := range full.GetResourceNamesUnsubscribe() {
		q.unsubscribe.add(name)
	}
	for name, version := range full.GetInitialResourceVersions() {
		q.addInitial(name, version)
	}
	if d := full.GetErrorDetail(); d != nil {
		q.nack = &nack{code: d.GetCode(), message: clip(d.GetMessage(), maxNackText)}
	}
	return q
}

// nodeOf is parseNode for a decoded message; nil stays nil.
func nodeOf(full *corev3.Node) *node {
	if full == nil {
		return nil
	}
	var out node
	switch v := full.GetMetadata().GetFields()[metadataDisableValidator].GetKind().(type) {
	case *structpb.Value_BoolValue:
		out.disable = &v.BoolValue
	case *structpb.Value_StringValue:
		out.disable = parseBoolText(v.StringValue)
	}
	if v := full.GetUserAgentBuildVersion().GetVersion(); v != nil {
		out.hasVersion, out.major, out.minor = true, v.GetMajorNumber(), v.GetMinorNumber()
	}
	return &out
}

func showNode(n *node) string {
	if n == nil {
		return "none"
	}
	disable := "unset"
	if n.disable != nil {
		disable = fmt.Sprint(*n.disable)
	}
	return fmt.Sprintf("%s %v %d.%d", disable, n.hasVersion, n.major, n.minor)
}

func showNack(n *nack) string {
	if n == nil {
		return "none"
	}
	return fmt.Sprintf("%d %q", n.code, n.message)
}

// Means says what a name stands for, for the name parser's fuzz test.
func Means(names Names, name string) (ours bool) {
	return newResolver(names, false).target(name).means != meansNothing
}

// Cached is how many encoded SVIDs and bundles are held.
func (s *Server) Cached() (svids, bundles int) {
	return s.resolve.bodies.svids.len(), s.resolve.bodies.bundles.len()
}

// EncodeSVID is the encoding of one SVID, uncached.
func EncodeSVID(s *svid.X509SVID) int { return encodeCertificate(s).size }

// Parked is how many late names a stream has, for tests of the server.
const ErrWithdrawnText = "identity withdrawn"

var ErrWithdrawn = errWithdrawn

// NewRequest is what the server decodes requests into.
func NewRequest() any { return new(request) }
