package podinfo_test

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/spiffe-node/spiffe-node/internal/podinfo"
)

// kubeletList is what a kubelet answers; static pods in it have the hash as UID.
func kubeletList(t *testing.T, pods ...*corev1.Pod) string {
	t.Helper()
	list := corev1.PodList{}
	for _, p := range pods {
		list.Items = append(list.Items, *p)
	}
	data, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func write(t *testing.T, name, text string) string {
	t.Helper()
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

// The token is read for every list, the certificate is verified, and failures
// are overcome.
func TestKubelet(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	answer := kubeletList(t, makePod(uidA, "web-0", running(made("main", idA))), makePod(hash, "etcd-node-1", running(made("etcd", idB))))
	token := "first"
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		switch {
		case r.URL.Path != "/pods":
			t.Errorf("asked for %s", r.URL)
		case r.Header.Get("Authorization") != "Bearer "+token:
			http.Error(w, "who are you?", http.StatusUnauthorized)
		default:
			_, _ = io.WriteString(w, answer)
		}
	}))
	t.Cleanup(server.Close)
	dir := t.TempDir()
	cfg := podinfo.KubeletConfig{
		Address:   server.Listener.Addr().String(),
		TokenPath: write(t, filepath.Join(dir, "token"), "zeroth\n"),
		CAPath:    write(t, filepath.Join(dir, "ca.crt"), string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw}))),
	}
	kubelet, err := podinfo.NewKubelet(cfg)
	if err != nil {
		t.Fatal(err)
	}
	s := start(t, podinfo.Config{Kubelet: kubelet})
	defer s.Watch(uidA, func() {})()
	eventually(t, "the refusal", func() bool { return strings.Contains(link(s, "kubelet").LastError, "who are you?") })
	if p := s.Problems(); len(p) != 1 || strings.Contains(p[0], "zeroth") {
		t.Errorf("problems %q", p)
	}
	write(t, cfg.TokenPath, "first\n")
	eventually(t, "labels", has(s, uidA, "k8s:pod-label:app:web"))
	if pod, _ := s.Pod(uidA); pod.Witness != "kubelet" {
		t.Errorf("witness %q", pod.Witness)
	}
	if c, ok := s.Container(hash, idB); !ok || c.Name != "etcd" {
		t.Errorf("static pod's container: %+v, %v", c, ok)
	}

	// Certificates nobody vouches for.
	stranger := cfg
	stranger.CAPath = write(t, filepath.Join(dir, "empty.crt"), "")
	for name, tc := range map[string]struct {
		change func(*podinfo.KubeletConfig)
		want   string
	}{
		"no certificates": {func(c *podinfo.KubeletConfig) { c.CAPath = stranger.CAPath }, "holds none"},
		"no file":         {func(c *podinfo.KubeletConfig) { c.CAPath = "/nonexistent" }, "no such file"},
		"no token":        {func(c *podinfo.KubeletConfig) { c.TokenPath = "/nonexistent" }, "token for the kubelet"},
		"other name": {func(c *podinfo.KubeletConfig) {
			c.Address = strings.Replace(c.Address, "127.0.0.1", "localhost", 1)
		}, "certificate is valid for"},
	} {
		c := cfg
		tc.change(&c)
		k, err := podinfo.NewKubelet(c)
		if err != nil {
			t.Fatal(err)
		}
		s := start(t, podinfo.Config{Kubelet: k})
		stop := s.Watch(uidA, func() {})
		eventually(t, name, func() bool { return strings.Contains(link(s, "kubelet").LastError, tc.want) })
		stop()
	}
	skip := stranger
	skip.SkipVerify = true
	k, err := podinfo.NewKubelet(skip)
	if err != nil {
		t.Fatal(err)
	}
	trusting := start(t, podinfo.Config{Kubelet: k})
	defer trusting.Watch(uidA, func() {})()
	eventually(t, "labels without verification", has(trusting, uidA, "k8s:pod-label:app:web"))
	if _, err := podinfo.NewKubelet(podinfo.KubeletConfig{Address: "node"}); err == nil {
		t.Error("an address without a port is accepted")
	}
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

// The kubelet is asked while somebody lacks facts, at most every 500 ms, once
// for all.
func TestKubeletPace(t *testing.T) {
	t.Parallel()
	token := write(t, filepath.Join(t.TempDir(), "token"), "x")
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var asked []time.Time
		answer := kubeletList(t, makePod(uidB, "other"))
		set := func(a string) { mu.Lock(); defer mu.Unlock(); answer = a }
		lists := func() int { mu.Lock(); defer mu.Unlock(); return len(asked) }
		k, err := podinfo.NewKubelet(podinfo.KubeletConfig{Address: "node:10250", TokenPath: token})
		if err != nil {
			t.Fatal(err)
		}
		k.SetTransport(roundTrip(func(*http.Request) (*http.Response, error) {
			mu.Lock()
			defer mu.Unlock()
			asked = append(asked, time.Now())
			return &http.Response{StatusCode: http.StatusOK, Body: io.NopCloser(strings.NewReader(answer))}, nil
		}))
		s := start(t, podinfo.Config{Kubelet: k})
		time.Sleep(time.Hour)
		if n := lists(); n != 0 {
			t.Fatalf("%d lists for nobody", n)
		}
		var stops []func()
		for range 20 {
			stops = append(stops, s.Watch(uidA, func() {}))
		}
		time.Sleep(2*time.Second + time.Millisecond)
		if n := lists(); n != 5 {
			t.Errorf("%d lists in 2 s for 20 who lack facts, want 5", n)
		}
		set(kubeletList(t, makePod(uidA, "web-0", running(waiting("main")))))
		time.Sleep(time.Second)
		n := lists()
		time.Sleep(time.Minute)
		if lists() != n {
			t.Errorf("%d lists although nobody lacks anything", lists()-n)
		}
		// A container that no status shows, for hours.
		s.Container(uidA, idA)
		time.Sleep(time.Hour)
		if d := lists() - n; d < 60 || d > 400 {
			t.Errorf("%d lists in an hour for a container held back", d)
		}
		set(kubeletList(t, makePod(uidA, "web-0", running(made("main", idA)))))
		time.Sleep(time.Minute)
		n = lists()
		if c, ok := s.Container(uidA, idA); !ok || c.Name != "main" {
			t.Errorf("container %+v, %v", c, ok)
		}
		time.Sleep(time.Minute)
		if lists() != n {
			t.Error("lists although nobody lacks anything")
		}
		for _, stop := range stops {
			stop()
		}
		mu.Lock()
		defer mu.Unlock()
		for i := range asked {
			if i > 0 && asked[i].Sub(asked[i-1]) < 500*time.Millisecond {
				t.Errorf("two lists within %s", asked[i].Sub(asked[i-1]))
			}
		}
	})
}

func TestDecodePods(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, text string
		want       int
		ok         bool
	}{
		{"list", kubeletList(t, makePod(uidA, "a"), makePod(uidB, "b")), 2, true},
		{"null", `{"kind":"PodList","items":null}`, 0, true},
		{"nothing", `{}`, 0, true},
		{"an odd pod", `{"items":[{"metadata":7},{"metadata":{"name":"a"}}],"metadata":{"x":[{}]}}`, 1, true},
		{"items first", `{"items":[{}],"kind":"PodList"}`, 1, true},
		{"broken off", `{"items":[{"metadata":{"name":"a"}},`, 1, false},
		{"broken off later", `{"items":[{}]`, 1, false},
		{"no list", `[]`, 0, false},
		{"no items", `{"items":{}}`, 0, false},
		{"empty", ``, 0, false},
		{"page", `<html>`, 0, false},
	} {
		n := 0
		err := podinfo.DecodePods([]byte(tc.text), func(*corev1.Pod) { n++ })
		if n != tc.want || (err == nil) != tc.ok {
			t.Errorf("%s: %d pods, error %v", tc.name, n, err)
		}
	}
}

func FuzzDecodePods(f *testing.F) {
	for _, seed := range []string{`{"items":[{"metadata":{"name":"a"}},{}]}`, `{"items":null}`, `{"a":{},"items":[1]}`, `[`} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var n int
		err := podinfo.DecodePods(data, func(p *corev1.Pod) {
			n++
			podinfo.Facts(p, node)
		})
		if err == nil && n > 0 && !bytes.Contains(bytes.ToLower(data), []byte("items")) && !bytes.Contains(data, []byte(`\u`)) {
			t.Fatal("pods out of nothing")
		}
	})
}
