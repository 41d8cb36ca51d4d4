package interop_test

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/health/grpc_health_v1" // its messages are called by name
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	_ "github.com/spiffe-node/spiffe-node/internal/spirewire/debugpb" // as above
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	_ "github.com/spiffe-node/spiffe-node/internal/spirewire/loggerpb" // as above
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// asked is a server with connections as each kind of caller.
type asked struct {
	*authority
	as map[string]*grpc.ClientConn
}

// ask prepares a server: an agent, one that will be banned, a workload, an
// administrator and a downstream server by entry, a federated bundle.
func ask(t *testing.T, a *authority) *asked {
	t.Helper()
	socket, err := grpc.NewClient("unix:"+a.admin(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = socket.Close() })
	out := &asked{a, map[string]*grpc.ClientConn{"socket": socket, "nobody": a.tls(nil)}}
	for _, name := range []string{"agent", "banned"} {
		must(t, agentpb.NewAgentClient(socket).CreateJoinToken, &agentpb.CreateJoinTokenRequest{Ttl: 60, Token: name})
		_, out.as[name] = a.join(name)
	}
	agent := "/spire/agent/join_token/agent"
	var entries []*typespb.Entry
	for i, name := range []string{"web", "admin", "down"} {
		e := wireEntry(agent, "/"+name)
		e.Id, e.Admin, e.Downstream = "entry-"+name, i == 1, i == 2
		entries = append(entries, e)
	}
	r := must(t, entrypb.NewEntryClient(socket).BatchCreateEntry, &entrypb.BatchCreateEntryRequest{Entries: entries})
	for i, name := range []string{"web", "admin", "down"} {
		if s := r.GetResults()[i].GetStatus(); s.GetCode() != 0 {
			t.Fatal(s)
		}
		dir := t.TempDir()
		a.cli("x509", "mint", "-spiffeID", "spiffe://"+trustDomain+"/"+name, "-write", dir)
		svid, err := x509svid.Load(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"))
		if err != nil {
			t.Fatal(err)
		}
		out.as[name] = a.tls(svid)
	}
	// A SPIRE Server knows what an agent may have after a while.
	for deadline := time.Now().Add(patience); ; time.Sleep(100 * time.Millisecond) {
		got := must(t, entrypb.NewEntryClient(out.as["agent"]).GetAuthorizedEntries, &entrypb.GetAuthorizedEntriesRequest{})
		if len(got.GetEntries()) == len(entries) {
			return out
		}
		if time.Now().After(deadline) {
			t.Fatalf("the agent has %d entries", len(got.GetEntries()))
		}
	}
}

// methodOf finds a method by its short name, such as entry/ListEntries.
func methodOf(t *testing.T, short string) protoreflect.MethodDescriptor {
	t.Helper()
	pkg, name, _ := strings.Cut(short, "/")
	service := map[string]string{"trustdomain": "TrustDomain", "localauthority": "LocalAuthority", "svid": "SVID"}[pkg]
	if service == "" {
		service = strings.ToUpper(pkg[:1]) + pkg[1:]
	}
	full := "spire.api.server." + pkg + ".v1." + service
	if pkg == "health" {
		full = "grpc.health.v1.Health"
	}
	d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(full))
	if err != nil {
		t.Fatal(err)
	}
	m := d.(protoreflect.ServiceDescriptor).Methods().ByName(protoreflect.Name(name))
	if m == nil {
		t.Fatalf("%s has no method %s", full, name)
	}
	return m
}

func newMessage(t *testing.T, d protoreflect.MessageDescriptor) proto.Message {
	t.Helper()
	kind, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
	if err != nil {
		t.Fatal(err)
	}
	return kind.New().Interface()
}

// call makes one call, with one message of a stream for each request, and
// writes down everything that comes back.
func (a *asked) call(t *testing.T, who, method string, requests ...string) string {
	t.Helper()
	m := methodOf(t, method)
	path := fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	stream, err := a.as[who].NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, path)
	if err != nil {
		return scrub(status.Convert(err).Proto().String())
	}
	for _, text := range requests {
		req := newMessage(t, m.Input())
		if err := protojson.Unmarshal([]byte(text), req); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		if err := stream.SendMsg(req); err != nil {
			break // Recv says why
		}
	}
	_ = stream.CloseSend()
	var out strings.Builder
	for {
		resp := newMessage(t, m.Output())
		switch err := stream.RecvMsg(resp); {
		case errors.Is(err, io.EOF):
			return out.String()
		case err != nil:
			st := status.Convert(err)
			fmt.Fprintf(&out, "%s %q", st.Code(), scrub(st.Message()))
			for _, d := range st.Proto().GetDetails() {
				fmt.Fprintf(&out, " [%s %x]", d.GetTypeUrl(), d.GetValue())
			}
			return out.String()
		}
		data, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(resp)
		if err != nil {
			t.Fatal(err)
		}
		var compact bytes.Buffer
		if err := json.Compact(&compact, data); err != nil {
			t.Fatal(err)
		}
		out.WriteString(scrub(compact.String()) + "\n")
	}
}

// Times, keys and what is drawn by lot differ between any two servers.
var scrubs = []struct {
	find *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`"(token)":"[^"]{60,}"`), `"$1":"JWT"`},
	{regexp.MustCompile(`[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}`), "UUID"},
	{regexp.MustCompile(`"[A-Za-z0-9+/=]{60,}"`), `"DER"`},
	{regexp.MustCompile(`"key_id":"\w{32}"`), `"key_id":"KEY"`},
	{regexp.MustCompile(`"x509svid_serial_number":"\d+"`), `"x509svid_serial_number":"SERIAL"`},
	{regexp.MustCompile(`"(\w+_at)":"\d{9,}"`), `"$1":"TIME"`},
	{regexp.MustCompile(`SERIALNUMBER=\d+`), "SERIALNUMBER=N"},
	{regexp.MustCompile(`"uptime":\d+,`), ""}, // a new server leaves the zero out
	{regexp.MustCompile(`"sequence_number":"\d+"`), `"sequence_number":"N"`},
	{regexp.MustCompile(`"next_page_token":"\d+"`), `"next_page_token":"N"`},
	{regexp.MustCompile(`"authority_id":"\w+"`), `"authority_id":"ID"`},
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:.]+Z`), "TIME"},
}

func scrub(s string) string {
	for _, r := range scrubs {
		s = r.find.ReplaceAllString(s, r.with)
	}
	return s
}

// Both servers get the same calls in the same order from the same callers.
func TestSameAnswersAsSPIREServer(t *testing.T) {
	s := startSPIREServer(t)
	old := isSPIRE114(t)
	theirs, ours := ask(t, s.authority), ask(t, startAuthority(t, ""))
	_, good := keyAndCSR(t)
	csr, err := x509.ParseCertificateRequest(good)
	if err != nil {
		t.Fatal(err)
	}
	unsigned := bytes.Clone(good)
	unsigned[len(unsigned)-1] ^= 1
	pub, err := x509.MarshalPKIXPublicKey(csr.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	b64 := base64.StdEncoding.EncodeToString
	fill := strings.NewReplacer("$CSR", b64(good), "$FORGED", b64(unsigned), "$PUB", b64(pub), "$TD", trustDomain,
		"$AGENT", `{"trust_domain":"example.org","path":"/spire/agent/join_token/agent"}`,
		"$BANNED", `{"trust_domain":"example.org","path":"/spire/agent/join_token/banned"}`)
	for line := range strings.Lines(sameCalls) {
		fields := strings.Fields(line)
		if len(fields) < 2 || fields[0] == "#" {
			continue
		}
		// Some answers are those of a release: 1.15 deletes an alias's entry with
		// its agent, and has more attributes of an entry.
		who, later := strings.CutPrefix(fields[0], "1.15:")
		if later && old {
			continue
		}
		requests := fields[2:]
		for i := range requests {
			requests[i] = fill.Replace(requests[i])
		}
		for who := range strings.SplitSeq(who, ",") {
			want := theirs.call(t, who, fields[1], requests...)
			got := ours.call(t, who, fields[1], requests...)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%s %s %s (-SPIRE Server +ours):\n%s\n%s", who, fields[1], strings.Join(fields[2:], " "), want, got)
			}
		}
	}
}
