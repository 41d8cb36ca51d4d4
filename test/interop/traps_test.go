package interop_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/spiffe-node/spiffe-node/internal/spirewire/agentpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/svidpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/trustdomainpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
)

// A client of SPIRE Server falls over when a server gets one of these wrong,
// and no message definition says so. One authority process serves all of them;
// each makes what it needs under a name of its own.
func TestTraps(t *testing.T) {
	a := startAuthority(t, "")
	conn, err := grpc.NewClient("unix:"+a.admin(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, trap := range []struct {
		name string
		run  func(*trapped)
	}{
		{"01 by_downstream false does not filter", trapDownstreamFilter},
		{"02 every result of a batch has a status", trapStatus},
		{"03 a similar entry comes with the stored one", trapSimilarEntry},
		{"04 a page token is empty only after an empty page", trapPages},
		{"05 the command line shows the request and the wire what is stored", trapFailedEntryOnTheCommandLine},
		{"06 denials have a detail of this type", trapDenials},
		{"07 renewal keeps both SVIDs and attesting again does not", trapRenewal},
		{"08 revisions and entries agree", trapRevisionsAgree},
		{"09 masks leave revision and ID", trapMasks},
		{"10 up to 500 entries are sent at once", trapPageOfEntries},
		{"11 the bundle is for everybody", trapAnonymousBundle},
		{"12 the server's certificate has a URI and nothing else", trapServerCertificate},
		{"13 JWT keys have an ID", trapKeyID},
		{"14 an unknown trust domain's bundle is not found", trapUnknownBundle},
		{"15 chains have no root", trapChains},
		{"16 https_web is there though it is empty", trapEmptyMessage},
		{"17 DNS names have an order and selectors have none", trapOrder},
		{"18 times are whole seconds and rounded", trapRounding},
	} {
		t.Run(trap.name, func(t *testing.T) {
			here := *a.agent
			here.t = t
			trap.run(&trapped{
				authority: &authority{agent: &here, address: a.address, bundle: a.bundle},
				entries:   entrypb.NewEntryClient(conn), agents: agentpb.NewAgentClient(conn),
				bundles: bundlepb.NewBundleClient(conn), svids: svidpb.NewSVIDClient(conn),
				federation: trustdomainpb.NewTrustDomainClient(conn),
			})
		})
	}
	a.alive()
}

// trapped is the authority in a test of its own, with an administrator's
// clients on its socket.
type trapped struct {
	*authority
	entries entrypb.EntryClient
	agents  agentpb.AgentClient
	bundles bundlepb.BundleClient
	svids   svidpb.SVIDClient

	federation trustdomainpb.TrustDomainClient
}

func wireID(path string) *typespb.SPIFFEID {
	return &typespb.SPIFFEID{TrustDomain: trustDomain, Path: path}
}

func wireEntry(parent, path string, edit ...func(*typespb.Entry)) *typespb.Entry {
	e := &typespb.Entry{ParentId: wireID(parent), SpiffeId: wireID(path), Selectors: []*typespb.Selector{{Type: "trap", Value: path}}}
	for _, f := range edit {
		f(e)
	}
	return e
}

func (a *trapped) create(in ...*typespb.Entry) []*entrypb.BatchCreateEntryResponse_Result {
	a.t.Helper()
	resp, err := a.entries.BatchCreateEntry(withTimeout(a.t), &entrypb.BatchCreateEntryRequest{Entries: in})
	if err != nil || len(resp.GetResults()) != len(in) {
		a.t.Fatalf("%d results, %v", len(resp.GetResults()), err)
	}
	return resp.GetResults()
}

func (a *trapped) mustCreate(in ...*typespb.Entry) []*typespb.Entry {
	a.t.Helper()
	var out []*typespb.Entry
	for _, r := range a.create(in...) {
		if r.GetStatus().GetCode() != 0 {
			a.t.Fatal(r.GetStatus())
		}
		out = append(out, r.GetEntry())
	}
	return out
}

// must is the answer to a call that has to succeed.
func must[Q, R any](t *testing.T, call func(context.Context, Q, ...grpc.CallOption) (R, error), req Q) R {
	t.Helper()
	resp, err := call(withTimeout(t), req)
	if err != nil {
		t.Fatal(err)
	}
	return resp
}

func trapDownstreamFilter(a *trapped) {
	t := a.t
	a.mustCreate(wireEntry("/t1", "/t1/plain"), wireEntry("/t1", "/t1/down", func(e *typespb.Entry) { e.Downstream = true }))
	for want, down := range map[int]*wrapperspb.BoolValue{2: wrapperspb.Bool(false), 1: wrapperspb.Bool(true)} {
		list := must(t, a.entries.ListEntries, &entrypb.ListEntriesRequest{Filter: &entrypb.ListEntriesRequest_Filter{ByParentId: wireID("/t1"), ByDownstream: down}})
		count := must(t, a.entries.CountEntries, &entrypb.CountEntriesRequest{Filter: &entrypb.CountEntriesRequest_Filter{ByParentId: wireID("/t1"), ByDownstream: down}})
		if len(list.GetEntries()) != want || int(count.GetCount()) != want {
			t.Errorf("by_downstream %t lists %d and counts %d, want %d", down.GetValue(), len(list.GetEntries()), count.GetCount(), want)
		}
	}
}

func trapStatus(a *trapped) {
	t := a.t
	check := func(what string, msg proto.Message, want ...codes.Code) {
		t.Helper()
		m := msg.ProtoReflect()
		results := m.Get(m.Descriptor().Fields().ByName("results")).List()
		if results.Len() != len(want) {
			t.Errorf("%s: %d results, want %d", what, results.Len(), len(want))
			return
		}
		for i, code := range want {
			r := results.Get(i).Message()
			f := r.Descriptor().Fields().ByName("status")
			if !r.Has(f) {
				t.Errorf("%s: result %d has no status", what, i)
				continue
			}
			got := r.Get(f).Message().Interface().(*typespb.Status)
			if codes.Code(got.GetCode()) != code || got.GetMessage() == "" || code == codes.OK && got.GetMessage() != "OK" {
				t.Errorf("%s: result %d is %v, want %s", what, i, got, code)
			}
		}
	}
	svid, agent := a.join(a.token(""))
	e := wireEntry(svid.ID.Path(), "/t2")
	created := must(t, a.entries.BatchCreateEntry, &entrypb.BatchCreateEntryRequest{Entries: []*typespb.Entry{e, nil, e}})
	check("create entry", created, codes.OK, codes.InvalidArgument, codes.AlreadyExists)
	id := created.GetResults()[0].GetEntry().GetId()
	e.Id = id
	check("update entry", must(t, a.entries.BatchUpdateEntry, &entrypb.BatchUpdateEntryRequest{Entries: []*typespb.Entry{e, nil}}), codes.OK, codes.InvalidArgument)
	_, csr := keyAndCSR(t)
	check("new X509-SVID", must(t, svidpb.NewSVIDClient(agent).BatchNewX509SVID, &svidpb.BatchNewX509SVIDRequest{Params: []*svidpb.NewX509SVIDParams{
		{EntryId: id, Csr: csr}, nil, {EntryId: "none", Csr: csr}, {EntryId: id, Csr: []byte{1}},
	}}), codes.OK, codes.InvalidArgument, codes.NotFound, codes.InvalidArgument)
	check("delete entry", must(t, a.entries.BatchDeleteEntry, &entrypb.BatchDeleteEntryRequest{Ids: []string{id, "", "none"}}), codes.OK, codes.InvalidArgument, codes.NotFound)
	b := []*typespb.Bundle{{TrustDomain: "t2.org"}, nil, {TrustDomain: trustDomain}}
	check("create bundle", must(t, a.bundles.BatchCreateFederatedBundle, &bundlepb.BatchCreateFederatedBundleRequest{Bundle: b}), codes.OK, codes.InvalidArgument, codes.InvalidArgument)
	check("set bundle", must(t, a.bundles.BatchSetFederatedBundle, &bundlepb.BatchSetFederatedBundleRequest{Bundle: b}), codes.OK, codes.InvalidArgument, codes.InvalidArgument)
	check("update bundle", must(t, a.bundles.BatchUpdateFederatedBundle, &bundlepb.BatchUpdateFederatedBundleRequest{Bundle: b}), codes.OK, codes.InvalidArgument, codes.InvalidArgument)
	check("delete bundle", must(t, a.bundles.BatchDeleteFederatedBundle, &bundlepb.BatchDeleteFederatedBundleRequest{TrustDomains: []string{"t2.org", "t2.org", ""}}), codes.OK, codes.NotFound, codes.InvalidArgument)
}

func trapSimilarEntry(a *trapped) {
	t := a.t
	first := a.mustCreate(wireEntry("/t3", "/t3/w", func(e *typespb.Entry) { e.Hint = "stored" }))[0]
	again := a.create(wireEntry("/t3", "/t3/w", func(e *typespb.Entry) { e.Hint = "asked for" }))[0]
	if again.GetStatus().GetCode() != int32(codes.AlreadyExists) || again.GetStatus().GetMessage() != "similar entry already exists" || !proto.Equal(again.GetEntry(), first) {
		t.Errorf("got %v, want the entry %v", again, first)
	}
}

func trapPages(a *trapped) {
	t := a.t
	a.mustCreate(wireEntry("/t4", "/t4/1"), wireEntry("/t4", "/t4/2"), wireEntry("/t4", "/t4/3"), wireEntry("/t4", "/t4/4"))
	for i := range 4 {
		must(t, a.bundles.BatchSetFederatedBundle, &bundlepb.BatchSetFederatedBundleRequest{Bundle: []*typespb.Bundle{{TrustDomain: fmt.Sprintf("t4-%d.org", i)}}})
	}
	for range 4 {
		a.join(a.token(""))
	}
	for name, page := range map[string]func(token string) (int, string){
		"entries": func(token string) (int, string) {
			r := must(t, a.entries.ListEntries, &entrypb.ListEntriesRequest{PageSize: 2, PageToken: token, Filter: &entrypb.ListEntriesRequest_Filter{ByParentId: wireID("/t4")}})
			return len(r.GetEntries()), r.GetNextPageToken()
		},
		"agents": func(token string) (int, string) {
			r := must(t, a.agents.ListAgents, &agentpb.ListAgentsRequest{PageSize: 2, PageToken: token})
			return len(r.GetAgents()), r.GetNextPageToken()
		},
		"bundles": func(token string) (int, string) {
			r := must(t, a.bundles.ListFederatedBundles, &bundlepb.ListFederatedBundlesRequest{PageSize: 2, PageToken: token})
			return len(r.GetBundles()), r.GetNextPageToken()
		},
	} {
		total, token, seen := 0, "", map[string]bool{}
		for {
			n, next := page(token)
			total += n
			if (next == "") != (n == 0) {
				t.Errorf("%s: a page of %d with the token %q", name, n, next)
			}
			if next == "" || seen[next] {
				break
			}
			token, seen[next] = next, true
		}
		if total < 4 || name == "entries" && total != 4 {
			t.Errorf("%s: all pages have %d", name, total)
		}
	}
}

func trapFailedEntryOnTheCommandLine(a *trapped) {
	t := a.t
	stored := a.mustCreate(wireEntry("/t5", "/t5/w", func(e *typespb.Entry) { e.Hint = "stored" }))[0]
	args := []string{"entry", "create", "-parentID", "spiffe://" + trustDomain + "/t5", "-spiffeID", "spiffe://" + trustDomain + "/t5/w", "-selector", "trap:/t5/w", "-hint", "asked"}
	var printed struct {
		Results []struct {
			Entry  struct{ ID, Hint string }
			Status struct{ Code int }
		}
	}
	out := a.cli(append(args, "-output", "json")...) // succeeds, though the entry failed
	if err := json.Unmarshal([]byte(out), &printed); err != nil || len(printed.Results) != 1 {
		t.Fatalf("%v: %s", err, out)
	}
	if r := printed.Results[0]; r.Status.Code != int(codes.AlreadyExists) || r.Entry.Hint != "asked" || r.Entry.ID != "" {
		t.Errorf("the command line shows %+v", r)
	}
	out, err := a.tryCLI(args...)
	if err == nil || !strings.Contains(out, "Entry ID                : (none)") || !strings.Contains(out, "Hint                    : asked") {
		t.Errorf("%v: %s", err, out)
	}
	onWire := a.create(wireEntry("/t5", "/t5/w", func(e *typespb.Entry) { e.Hint = "asked" }))[0].GetEntry()
	if onWire.GetHint() != "stored" || onWire.GetId() != stored.GetId() {
		t.Errorf("the wire shows %v", onWire)
	}
}

// list is a call that every agent makes.
func (a *trapped) list(as *x509svid.SVID) error {
	a.t.Helper()
	_, err := entrypb.NewEntryClient(a.tls(as)).GetAuthorizedEntries(withTimeout(a.t), &entrypb.GetAuthorizedEntriesRequest{})
	return err
}

func trapDenials(a *trapped) {
	t := a.t
	svid, conn := a.join(a.token(""))
	if err := a.list(svid); err != nil {
		t.Fatal(err)
	}
	id := wireID(svid.ID.Path())
	must(t, a.agents.BanAgent, &agentpb.BanAgentRequest{Id: id})
	wantReason(t, a.list(svid), typespb.PermissionDeniedDetails_AGENT_BANNED)
	must(t, a.agents.DeleteAgent, &agentpb.DeleteAgentRequest{Id: id})
	wantReason(t, a.list(svid), typespb.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	// On the stream that a real agent syncs with, too.
	stream, err := entrypb.NewEntryClient(conn).SyncAuthorizedEntries(withTimeout(t))
	if err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantReason(t, err, typespb.PermissionDeniedDetails_AGENT_NOT_ATTESTED)
	// Who is no agent at all learns nothing.
	_, err = entrypb.NewEntryClient(a.tls(nil)).GetAuthorizedEntries(withTimeout(t), &entrypb.GetAuthorizedEntriesRequest{})
	if st := status.Convert(err); st.Code() != codes.PermissionDenied || len(st.Details()) != 0 ||
		st.Message() != "authorization denied for method /spire.api.server.entry.v1.Entry/GetAuthorizedEntries" {
		t.Errorf("without a certificate: %v %v", err, st.Details())
	}
}

func trapRenewal(a *trapped) {
	t := a.t
	old, conn := a.join(a.token(""))
	key, csr := keyAndCSR(t)
	resp := must(t, agentpb.NewAgentClient(conn).RenewAgent, &agentpb.RenewAgentRequest{Params: &agentpb.AgentX509SVIDParams{Csr: csr}})
	renewed := toSVID(t, key, resp.GetSvid().GetCertChain())
	if err := a.list(old); err != nil {
		t.Errorf("the old SVID before the new one is used: %v", err)
	}
	if err := a.list(renewed); err != nil {
		t.Errorf("the new SVID: %v", err)
	}
	wantReason(t, a.list(old), typespb.PermissionDeniedDetails_AGENT_NOT_ACTIVE)

	// Agents that can attest again do, and then the old SVID is out at once.
	ca := newMachineCA(t)
	b := startAuthority(t, fmt.Sprintf("nodeAttestation: {x509pop: {mode: external_pki, caBundlePaths: [%s]}}\n", ca.file))
	m := ca.machine(nil)
	first := b.mustPop(m)
	_, err := agentpb.NewAgentClient(b.tls(first)).RenewAgent(withTimeout(t), &agentpb.RenewAgentRequest{Params: &agentpb.AgentX509SVIDParams{Csr: csr}})
	wantReason(t, err, typespb.PermissionDeniedDetails_AGENT_MUST_REATTEST)
	second := b.mustPop(m)
	other := &trapped{authority: b}
	wantReason(t, other.list(first), typespb.PermissionDeniedDetails_AGENT_NOT_ACTIVE)
	if err := other.list(second); err != nil {
		t.Error(err)
	}
}

// agentMask is what a SPIRE Agent asks for.
func agentMask() *typespb.EntryMask {
	return &typespb.EntryMask{
		SpiffeId: true, Selectors: true, FederatesWith: true, Admin: true, Downstream: true,
		RevisionNumber: true, StoreSvid: true, Hint: true, AdditionalAttributes: true, CreatedAt: true,
	}
}

// withEntries is an agent with n entries.
func (a *trapped) withEntries(n int) entrypb.EntryClient {
	a.t.Helper()
	svid, conn := a.join(a.token(""))
	var in []*typespb.Entry
	for i := range n {
		in = append(in, wireEntry(svid.ID.Path(), fmt.Sprintf("/many/%d", i), func(e *typespb.Entry) { e.Hint = "h" }))
	}
	for part := range slices.Chunk(in, 250) {
		a.mustCreate(part...)
	}
	return entrypb.NewEntryClient(conn)
}

// sync opens the stream and sends the first message.
func (a *trapped) sync(c entrypb.EntryClient, mask *typespb.EntryMask) grpc.BidiStreamingClient[entrypb.SyncAuthorizedEntriesRequest, entrypb.SyncAuthorizedEntriesResponse] {
	a.t.Helper()
	stream, err := c.SyncAuthorizedEntries(withTimeout(a.t))
	if err != nil {
		a.t.Fatal(err)
	}
	if err := stream.Send(&entrypb.SyncAuthorizedEntriesRequest{OutputMask: mask}); err != nil {
		a.t.Fatal(err)
	}
	return stream
}

func trapRevisionsAgree(a *trapped) {
	t := a.t
	c := a.withEntries(501)
	all := must(t, c.GetAuthorizedEntries, &entrypb.GetAuthorizedEntriesRequest{}).GetEntries()
	if len(all) != 501 {
		t.Fatalf("%d entries", len(all))
	}
	// One of them has been changed since.
	changed := all[7]
	resp := must(t, a.entries.BatchUpdateEntry, &entrypb.BatchUpdateEntryRequest{Entries: []*typespb.Entry{changed}, InputMask: &typespb.EntryMask{Hint: true}})
	if code := resp.GetResults()[0].GetStatus().GetCode(); code != 0 {
		t.Fatal(resp)
	}
	type revision struct{ number, created int64 }
	stream := a.sync(c, agentMask())
	listed, sizes := map[string]revision{}, ""
	for more := true; more; {
		page, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range page.GetEntryRevisions() {
			listed[r.GetId()] = revision{r.GetRevisionNumber(), r.GetCreatedAt()}
			if r.GetCreatedAt() == 0 {
				t.Errorf("revision of %s without created_at", r.GetId())
			}
		}
		if len(page.GetEntries()) != 0 {
			t.Error("entries among the revisions")
		}
		sizes += fmt.Sprintf(" %d", len(page.GetEntryRevisions()))
		more = page.GetMore()
	}
	if sizes != " 500 1" || listed[changed.GetId()].number != 1 {
		t.Errorf("pages of%s, revision %d", sizes, listed[changed.GetId()].number)
	}
	ids := []string{changed.GetId(), all[0].GetId(), "unknown"}
	if err := stream.Send(&entrypb.SyncAuthorizedEntriesRequest{Ids: ids}); err != nil {
		t.Fatal(err)
	}
	page, err := stream.Recv()
	if err != nil || len(page.GetEntries()) != 2 || page.GetMore() || !slices.IsSortedFunc(page.GetEntries(), func(x, y *typespb.Entry) int { return strings.Compare(x.GetId(), y.GetId()) }) {
		t.Fatalf("%v, %v", page, err)
	}
	for _, e := range page.GetEntries() {
		if got := (revision{e.GetRevisionNumber(), e.GetCreatedAt()}); got != listed[e.GetId()] {
			t.Errorf("entry %s says %v, its revision %v", e.GetId(), got, listed[e.GetId()])
		}
	}
	if err := stream.Send(&entrypb.SyncAuthorizedEntriesRequest{Ids: []string{"unknown"}}); err != nil {
		t.Fatal(err)
	}
	if page, err := stream.Recv(); err != nil || len(page.GetEntries()) != 0 || page.GetMore() {
		t.Errorf("nothing that was asked for: %v, %v", page, err)
	}
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("the stream ended with %v", err)
	}
}

func trapMasks(a *trapped) {
	t := a.t
	c := a.withEntries(1)
	all := must(t, c.GetAuthorizedEntries, &entrypb.GetAuthorizedEntriesRequest{}).GetEntries()
	must(t, a.entries.BatchUpdateEntry, &entrypb.BatchUpdateEntryRequest{Entries: all, InputMask: &typespb.EntryMask{Hint: true}})
	page, err := a.sync(c, agentMask()).Recv()
	if err != nil || len(page.GetEntries()) != 1 {
		t.Fatalf("%v, %v", page, err)
	}
	if e := page.GetEntries()[0]; e.GetRevisionNumber() != 1 || e.GetId() != all[0].GetId() || e.GetParentId() != nil || e.GetHint() != "h" {
		t.Errorf("an agent gets %v", e)
	}
	_, err = a.sync(c, &typespb.EntryMask{SpiffeId: true}).Recv()
	wantCode(t, err, codes.InvalidArgument, "revision number cannot be masked")
	if e := must(t, a.entries.GetEntry, &entrypb.GetEntryRequest{Id: all[0].GetId(), OutputMask: &typespb.EntryMask{}}); !proto.Equal(e, &typespb.Entry{Id: all[0].GetId()}) {
		t.Errorf("an empty mask leaves %v", e)
	}
	id := wireID(a.mustAgent())
	if got := must(t, a.agents.GetAgent, &agentpb.GetAgentRequest{Id: id, OutputMask: &typespb.AgentMask{}}); !proto.Equal(got, &typespb.Agent{Id: id}) {
		t.Errorf("an empty mask leaves %v", got)
	}
	if got := must(t, a.bundles.GetBundle, &bundlepb.GetBundleRequest{OutputMask: &typespb.BundleMask{}}); !proto.Equal(got, &typespb.Bundle{TrustDomain: trustDomain}) {
		t.Errorf("an empty mask leaves %v", got)
	}
}

// mustAgent is the path of an agent that has attested.
func (a *trapped) mustAgent() string {
	a.t.Helper()
	svid, _ := a.join(a.token(""))
	return svid.ID.Path()
}

func trapPageOfEntries(a *trapped) {
	t := a.t
	for _, n := range []int{0, 1, 500} {
		stream := a.sync(a.withEntries(n), nil)
		page, err := stream.Recv()
		if err != nil || len(page.GetEntries()) != n || len(page.GetEntryRevisions()) != 0 || page.GetMore() {
			t.Errorf("%d entries: %d entries and %d revisions, more %t, %v", n, len(page.GetEntries()), len(page.GetEntryRevisions()), page.GetMore(), err)
		}
		if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
			t.Errorf("%d entries: the stream ended with %v", n, err)
		}
	}
	page, err := a.sync(a.withEntries(501), nil).Recv()
	if err != nil || len(page.GetEntries()) != 0 || len(page.GetEntryRevisions()) != 500 || !page.GetMore() {
		t.Errorf("501 entries: %d entries and %d revisions, more %t, %v", len(page.GetEntries()), len(page.GetEntryRevisions()), page.GetMore(), err)
	}
}

func trapAnonymousBundle(a *trapped) {
	t := a.t
	b := must(t, bundlepb.NewBundleClient(a.tls(nil)).GetBundle, &bundlepb.GetBundleRequest{})
	if b.GetTrustDomain() != trustDomain || len(b.GetX509Authorities()) == 0 || len(b.GetJwtAuthorities()) == 0 {
		t.Errorf("got %v", b)
	}
}
