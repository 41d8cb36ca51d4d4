package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strings"
	"sync"

	"github.com/gorilla/websocket"
	"go.yaml.in/yaml/v3"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"
)

// fakeAPI is an API server: objects from a file, exec into containers whose
// command runs in this process, and ports that are functions.
type fakeAPI struct {
	objects []map[string]any
	// forbidden are prefixes of paths the user may not touch.
	forbidden []string
	// command is the container's: what it writes to its output, and its exit
	// code.
	command func(ctx context.Context, pod, container string, args []string, stdin io.Reader, stdout, stderr io.Writer) int
	// ports are where connections to pod:port end.
	ports map[string]string
	// token is what token requests answer; "" = there is no such account.
	token string
	// oldOnly makes it a server from before WebSockets.
	oldOnly bool

	mu    sync.Mutex
	calls []string
}

func (f *fakeAPI) parse(data []byte) error {
	dec := yaml.NewDecoder(bytes.NewReader(data))
	for {
		var o map[string]any
		err := dec.Decode(&o)
		switch {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		case o != nil:
			f.objects = append(f.objects, o)
		}
	}
}

func field(o map[string]any, path ...string) any {
	var v any = o
	for _, p := range path {
		m, _ := v.(map[string]any)
		v = m[p]
	}
	return v
}

func text(o map[string]any, path ...string) string {
	s, _ := field(o, path...).(string)
	return s
}

// listPath is the path at which objects of its kind and namespace are listed.
func listPath(o map[string]any, everywhere bool) string {
	prefix := "/apis/" + text(o, "apiVersion")
	if !strings.Contains(text(o, "apiVersion"), "/") {
		prefix = "/api/" + text(o, "apiVersion")
	}
	if ns := text(o, "metadata", "namespace"); ns != "" && !everywhere {
		prefix += "/namespaces/" + ns
	}
	return prefix + "/" + strings.ToLower(text(o, "kind")) + "s"
}

func (f *fakeAPI) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	f.mu.Lock()
	f.calls = append(f.calls, r.Method+" "+r.URL.Path)
	f.mu.Unlock()
	for _, p := range f.forbidden {
		if strings.HasPrefix(r.URL.Path, p) {
			fail(w, http.StatusForbidden, metav1.StatusReasonForbidden, "you may not touch "+r.URL.Path)
			return
		}
	}
	switch parts := strings.Split(strings.Trim(r.URL.Path, "/"), "/"); {
	case f.oldOnly && r.Method == http.MethodGet && len(parts) == 7:
		http.Error(w, "no WebSocket here", http.StatusBadRequest)
	case len(parts) == 7 && parts[6] == "exec" && f.oldOnly:
		f.execSPDY(w, r, parts[5])
	case len(parts) == 7 && parts[6] == "exec":
		f.exec(w, r, parts[5])
	case len(parts) == 7 && parts[6] == "portforward" && r.Method == http.MethodGet:
		http.Error(w, "no WebSocket here", http.StatusBadRequest)
	case len(parts) == 7 && parts[6] == "portforward":
		f.forward(w, r, parts[5])
	case len(parts) == 7 && parts[6] == "token" && f.token != "":
		_ = json.NewEncoder(w).Encode(map[string]any{"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "status": map[string]any{"token": f.token}})
	default:
		f.objectsAt(w, r)
	}
}

func (f *fakeAPI) objectsAt(w http.ResponseWriter, r *http.Request) {
	selector, err := labels.Parse(r.URL.Query().Get("labelSelector"))
	if err != nil {
		fail(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, err.Error())
		return
	}
	known := strings.Contains(r.URL.Path, "/api/v1/")
	items := []any{}
	for _, o := range f.objects {
		if r.URL.Path == listPath(o, false)+"/"+text(o, "metadata", "name") {
			_ = json.NewEncoder(w).Encode(o)
			return
		}
		if r.URL.Path != listPath(o, false) && r.URL.Path != listPath(o, true) {
			continue
		}
		known = true
		set := labels.Set{}
		m, _ := field(o, "metadata", "labels").(map[string]any)
		for k, v := range m {
			set[k], _ = v.(string)
		}
		uid, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Query().Get("fieldSelector"), "involvedObject.uid="), ",")
		if selector.Matches(set) && (uid == "" || uid == text(o, "involvedObject", "uid")) {
			items = append(items, o)
		}
	}
	last := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
	if !known || !strings.HasSuffix(last, "s") || last != "pods" && !strings.Contains(r.URL.RawQuery, "limit") {
		fail(w, http.StatusNotFound, metav1.StatusReasonNotFound, r.URL.Path+" not found")
		return
	}
	// In two pages, so that reading on is tested.
	meta := map[string]any{}
	switch half := len(items) / 2; {
	case len(items) < 2:
	case r.URL.Query().Get("continue") == "":
		items, meta["continue"] = items[:half], "more"
	default:
		items = items[half:]
	}
	_ = json.NewEncoder(w).Encode(map[string]any{"metadata": meta, "items": items})
}

func fail(w http.ResponseWriter, code int, reason metav1.StatusReason, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(metav1.Status{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Status"}, Status: metav1.StatusFailure, Code: int32(code), Reason: reason, Message: message,
	})
}

// exec speaks the fifth version of the remote command protocol.
func (f *fakeAPI) exec(w http.ResponseWriter, r *http.Request, pod string) {
	up := websocket.Upgrader{Subprotocols: []string{"v5.channel.k8s.io"}}
	conn, err := up.Upgrade(w, r, nil)
	if err != nil {
		return
	}
	defer conn.Close()
	stdinR, stdinW := io.Pipe()
	defer stdinR.Close()
	go func() {
		for {
			_, msg, err := conn.ReadMessage()
			if err != nil || len(msg) > 1 && msg[0] == 255 {
				_ = stdinW.Close()
				return
			}
			if len(msg) > 1 && msg[0] == 0 {
				if _, err := stdinW.Write(msg[1:]); err != nil {
					return
				}
			}
		}
	}()
	var mu sync.Mutex
	channel := func(n byte) io.Writer {
		return writerFunc(func(p []byte) (int, error) {
			mu.Lock()
			defer mu.Unlock()
			return len(p), conn.WriteMessage(websocket.BinaryMessage, append([]byte{n}, p...))
		})
	}
	code := f.command(r.Context(), pod, r.URL.Query().Get("container"), r.URL.Query()["command"], stdinR, channel(1), channel(2))
	_, _ = channel(3).Write(exitStatus(code))
	mu.Lock()
	defer mu.Unlock()
	_ = conn.WriteMessage(websocket.CloseMessage, websocket.FormatCloseMessage(websocket.CloseNormalClosure, ""))
}

func exitStatus(code int) []byte {
	status := metav1.Status{Status: metav1.StatusSuccess}
	if code != 0 {
		status = metav1.Status{Status: metav1.StatusFailure, Reason: "NonZeroExitCode", Message: "command terminated", Details: &metav1.StatusDetails{
			Causes: []metav1.StatusCause{{Type: "ExitCode", Message: map[bool]string{true: "127", false: "1"}[code == 127]}},
		}}
	}
	data, _ := json.Marshal(status)
	return data
}

// streams accepts the streams of a SPDY connection by their type until it has
// the number wanted.
func streams(w http.ResponseWriter, r *http.Request, protocol string, want int) (map[string]httpstream.Stream, httpstream.Connection) {
	if _, err := httpstream.Handshake(r, w, []string{protocol}); err != nil {
		return nil, nil
	}
	opened := make(chan httpstream.Stream, want)
	conn := spdy.NewResponseUpgrader().UpgradeResponse(w, r, func(s httpstream.Stream, _ <-chan struct{}) error {
		opened <- s
		return nil
	})
	if conn == nil {
		return nil, nil
	}
	out := map[string]httpstream.Stream{}
	for range want {
		select {
		case s := <-opened:
			out[s.Headers().Get(corev1.StreamType)] = s
		case <-conn.CloseChan():
			return nil, nil
		}
	}
	return out, conn
}

func (f *fakeAPI) execSPDY(w http.ResponseWriter, r *http.Request, pod string) {
	all, conn := streams(w, r, "v4.channel.k8s.io", 4)
	if conn == nil {
		return
	}
	defer conn.Close()
	code := f.command(r.Context(), pod, r.URL.Query().Get("container"), r.URL.Query()["command"], all["stdin"], all["stdout"], all["stderr"])
	_, _ = all["error"].Write(exitStatus(code))
	for _, s := range all {
		_ = s.Close()
	}
	<-conn.CloseChan()
}

func (f *fakeAPI) forward(w http.ResponseWriter, r *http.Request, pod string) {
	all, conn := streams(w, r, "portforward.k8s.io", 2)
	if conn == nil {
		return
	}
	defer conn.Close()
	addr := f.ports[pod+":"+all["data"].Headers().Get(corev1.PortHeader)]
	out, err := net.Dial("tcp", addr)
	if err != nil {
		_, _ = io.WriteString(all["error"], err.Error())
		_ = all["error"].Close()
		<-conn.CloseChan()
		return
	}
	defer out.Close()
	_ = all["error"].Close()
	go func() {
		_, _ = io.Copy(out, all["data"])
		_ = out.Close()
	}()
	_, _ = io.Copy(all["data"], out)
	_ = all["data"].Close()
	<-conn.CloseChan()
}

type writerFunc func([]byte) (int, error)

func (w writerFunc) Write(p []byte) (int, error) { return w(p) }

// tunnelInto is a command that runs this program's own far end.
func tunnelInto(socket string) func(ctx context.Context, pod, container string, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	return func(ctx context.Context, _, _ string, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
		if args[0] != "kubectl-spiffe" {
			_, _ = io.WriteString(stderr, "exec: \""+args[0]+"\": executable file not found in $PATH")
			return 127
		}
		return run(ctx, args[1:], system{stdin: stdin, stdout: stdout, stderr: stderr, getenv: func(name string) string {
			return map[string]string{envSocket: socket}[name]
		}})
	}
}

// start serves until the end of the test and gives back a kubeconfig.
func (f *fakeAPI) start(cleanup func(func()), path, namespace string) error {
	server := httptest.NewServer(f)
	cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	return os.WriteFile(path, []byte(`apiVersion: v1
kind: Config
current-context: test
clusters:
- {name: test, cluster: {server: "`+server.URL+`"}}
users:
- {name: test, user: {token: the-users-own}}
contexts:
- {name: test, context: {cluster: test, user: test, namespace: `+cmp.Or(namespace, "default")+`}}
`), 0o600)
}

func (f *fakeAPI) called(prefix string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.ContainsFunc(f.calls, func(c string) bool { return strings.HasPrefix(c, prefix) })
}
