package podinfo_test

import (
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/spiffe-node/spiffe-node/internal/podinfo"
)

func text(num protowire.Number, s string) []byte { return message(num, []byte(s)) }

func message(num protowire.Number, parts ...[]byte) []byte {
	var all []byte
	for _, p := range parts {
		all = append(all, p...)
	}
	return protowire.AppendBytes(protowire.AppendTag(nil, num, protowire.BytesType), all)
}

// criAnswer is a ContainerStatusResponse as containerd writes it: with fields
// of all kinds that nobody here reads.
func criAnswer(id, podUID, name string) []byte {
	label := func(k, v string) []byte { return message(12, text(1, k), text(2, v)) }
	number := func(num protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, num, protowire.VarintType), v)
	}
	return append(message(1,
		text(1, id), message(2, text(1, "metadata-name"), number(2, 3)), number(3, 1), number(4, 1<<60), number(7, 0),
		message(8, text(1, "registry.example/"+name+":1"), text(18, "main:1")),
		text(9, "registry.example/"+name+"@sha256:"+name), text(10, ""),
		label("io.kubernetes.container.name", name), label("io.kubernetes.pod.uid", podUID), label("io.kubernetes.pod.name", "web-0"),
		message(13, text(1, "annotation"), text(2, "x")), message(14, text(1, "/mount")),
	), message(2, text(1, "info"), text(2, "{}"))...)
}

// runtimeServer is a container runtime.
func runtimeServer(t *testing.T, answer func(id string) ([]byte, error)) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "cri.sock")
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.ForceServerCodecV2(podinfo.BytesCodec{}), grpc.UnknownServiceHandler(func(_ any, stream grpc.ServerStream) error {
		if m, _ := grpc.MethodFromServerStream(stream); m != "/runtime.v1.RuntimeService/ContainerStatus" {
			return status.Error(codes.Unimplemented, m)
		}
		var req []byte
		if err := stream.RecvMsg(&req); err != nil {
			return err
		}
		_, _, n := protowire.ConsumeTag(req)
		id, _ := protowire.ConsumeString(req[n:])
		resp, err := answer(id)
		if err != nil {
			return err
		}
		return stream.SendMsg(&resp)
	}))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(l)
	}()
	t.Cleanup(func() {
		server.Stop()
		<-done
	})
	return socket
}

// The runtime says who a container is before any status shows it, in the same
// words.
func TestRuntime(t *testing.T) {
	t.Parallel()
	var asked, failing atomic.Int64
	failing.Store(1)
	socket := runtimeServer(t, func(id string) ([]byte, error) {
		asked.Add(1)
		switch {
		case failing.Add(-1) >= 0:
			return nil, status.Error(codes.Unavailable, "starting")
		case id == idA:
			return criAnswer(idA, uidA, "main"), nil
		case id == idB:
			return criAnswer(idB, uidB, "main"), nil // of another pod
		}
		return nil, status.Error(codes.NotFound, "no such container")
	})
	runtime, err := podinfo.NewRuntime(socket)
	if err != nil {
		t.Fatal(err)
	}
	book := &ledger{}
	book.put(published(uidA, "web-0"))
	server := newAPIServer(t)
	s := start(t, podinfo.Config{Ledger: book, Runtime: runtime, API: server.api()})
	if _, ok := s.Container(uidA, idA); ok || asked.Load() != 0 {
		t.Error("asked for a pod nobody is bound to")
	}
	notified := make(chan struct{}, 16)
	stop := s.Watch(uidA, func() { notified <- struct{}{} })
	for range 10 {
		s.Container(uidA, idA)
	}
	<-notified
	c, ok := s.Container(uidA, idA)
	if !ok || c.Name != "main" {
		t.Fatalf("container %+v, %v", c, ok)
	}
	if d := cmp.Diff([]string{"k8s:container-image:registry.example/main:1", "k8s:container-image:registry.example/main@sha256:main"}, texts(c.Selectors)); d != "" {
		t.Error(d)
	}
	// The first question, which failed, is over: its error cannot hide what is
	// said of these.
	s.Container(uidA, idB)
	s.Container(uidA, idC)
	eventually(t, "the stranger", func() bool { return strings.Contains(link(s, "runtime").LastError, "not the pod's") })
	if _, ok := s.Container(uidA, idB); ok {
		t.Error("a container of another pod is this one's")
	}
	// The status takes over.
	later := made("main", idA)
	later.Image = "later"
	server.put(makePod(uidA, "web-0", running(later)))
	eventually(t, "the status", func() bool {
		c, ok := s.Container(uidA, idA)
		return ok && strings.Contains(strings.Join(texts(c.Selectors), " "), "later")
	})
	stop()
	if _, _, interests := s.Held(); interests != 0 {
		t.Errorf("%d interests are left", interests)
	}
	eventually(t, "the end of the questions", func() bool {
		n := asked.Load()
		time.Sleep(5 * time.Millisecond)
		return asked.Load() == n
	})
	if n := asked.Load(); n > 7 {
		t.Errorf("the runtime was asked %d times", n)
	}
	if _, err := podinfo.NewRuntime("relative.sock"); err == nil {
		t.Error("a relative path is accepted")
	}
}

func FuzzParseStatus(f *testing.F) {
	f.Add(criAnswer(idA, uidA, "main"))
	f.Add([]byte{})
	f.Add([]byte{0x0a, 0xff})
	f.Fuzz(func(t *testing.T, data []byte) {
		_, _, _, labels, err := podinfo.ParseStatus(data)
		if err == nil && labels == nil {
			t.Fatal("no labels")
		}
	})
}
