package podinfo_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe-node/spiffe-node/internal/podinfo"
)

// A source that starts while the API server is away knows what the last one
// knew; the server's first answer replaces it.
func TestRestart(t *testing.T) {
	t.Parallel()
	server := newAPIServer(t)
	server.put(makePod(uidA, "web-0", running(made("main", idA))))
	server.put(makePod("mirror-uid", "etcd-node-1", mirror(hash), running(made("etcd", idB))))
	server.put(makePod(uidB, "gone"))
	file := filepath.Join(t.TempDir(), "pods.json")
	cfg := podinfo.Config{Node: node, API: server.api(), StateFile: file}
	first, err := podinfo.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- first.Run(ctx) }()
	eventually(t, "the pods", func() bool { return first.Status().Pods == 3 })
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode() != 0o600 {
		t.Fatalf("state file: %v, %v", info, err)
	}

	back := server.away()
	s := start(t, cfg)
	if !has(s, uidA, "k8s:pod-label:app:web")() || !has(s, hash, "k8s:pod-name:etcd-node-1")() || !has(s, uidB, "k8s:pod-name:gone")() {
		t.Error("facts did not outlive the process")
	}
	if c, ok := s.Container(uidA, idA); !ok || c.Name != "main" || len(c.Selectors) != 2 {
		t.Errorf("container %+v, %v", c, ok)
	}
	eventually(t, "the loss to be seen", func() bool { return link(s, "pods").LastError != "" })
	server.remove("shop", "gone")
	server.put(makePod(uidA, "web-0", running(made("main", idA)), label("app", "new")))
	back()
	eventually(t, "the new label", has(s, uidA, "k8s:pod-label:app:new"))
	eventually(t, "the end of a pod deleted meanwhile", func() bool { return s.Status().Pods == 2 })
}

func TestBadState(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	server := newAPIServer(t)
	for name, text := range map[string]string{
		"garbage":     "\x00",
		"version":     `{"version":2,"node":"node-1","pods":[{"key":"k","uid":"u","witness":"watch"}]}`,
		"node":        `{"version":1,"node":"node-2","pods":[{"key":"k","uid":"u","witness":"watch"}]}`,
		"no UID":      `{"version":1,"node":"node-1","pods":[{"key":"k","witness":"watch"}]}`,
		"ledger":      `{"version":1,"node":"node-1","pods":[{"key":"k","uid":"u","witness":"ledger"}]}`,
		"no selector": `{"version":1,"node":"node-1","pods":[{"key":"k","uid":"u","witness":"watch","selectors":["x"]}]}`,
		"order":       `{"version":1,"node":"node-1","pods":[{"key":"k","uid":"u","witness":"watch","containers":[{"id":"b"},{"id":"a"}]}]}`,
	} {
		s, err := podinfo.New(podinfo.Config{Node: node, API: server.api(), StateFile: write(t, filepath.Join(dir, strings.ReplaceAll(name, " ", "-")), text)})
		if err != nil {
			t.Fatal(err)
		}
		if n := s.Status().Pods; n != 0 {
			t.Errorf("%s: %d pods restored", name, n)
		}
	}
	open := write(t, filepath.Join(dir, "open"), `{"version":1,"node":"node-1","pods":[{"key":"k","uid":"u","witness":"watch"}]}`)
	if err := os.Chmod(open, 0o644); err != nil {
		t.Fatal(err)
	}
	s, err := podinfo.New(podinfo.Config{Node: node, API: server.api(), StateFile: open})
	if err != nil {
		t.Fatal(err)
	}
	if n := s.Status().Pods; n != 0 {
		t.Errorf("restored from a file others may write: %d pods", n)
	}
}
