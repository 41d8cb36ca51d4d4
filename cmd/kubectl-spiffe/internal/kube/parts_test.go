package kube_test

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/kube"
)

// open is a cluster whose API server answers every list with items.
func open(t *testing.T, handler http.HandlerFunc) *kube.Cluster {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	path := filepath.Join(t.TempDir(), "kubeconfig")
	text := `{"apiVersion":"v1","kind":"Config","current-context":"t","clusters":[{"name":"t","cluster":{"server":"` + server.URL + `"}}],"contexts":[{"name":"t","context":{"cluster":"t","namespace":"shop"}}]}`
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := kube.Open(kube.Config{Kubeconfig: path})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func agentPod(name, node, created, state, ready string) map[string]any {
	return map[string]any{
		"metadata": map[string]any{"name": name, "namespace": "spire-server", "creationTimestamp": created, "annotations": map[string]any{"kubectl.kubernetes.io/default-container": "csi-driver"}},
		"spec":     map[string]any{"nodeName": node, "containers": []any{map[string]any{"name": "sds-agent", "ports": []any{map[string]any{"name": "inspect", "containerPort": 9983}}}, map[string]any{"name": "csi-driver"}}},
		"status": map[string]any{
			"containerStatuses": []any{map[string]any{"name": "sds-agent", "state": map[string]any{state: map[string]any{}}}},
			"conditions":        []any{map[string]any{"type": "Ready", "status": ready}},
		},
	}
}

// While one agent replaces another, the one that serves is asked.
func TestTheAgentThatServes(t *testing.T) {
	c := open(t, func(w http.ResponseWriter, r *http.Request) {
		if !strings.Contains(r.URL.Query().Get("labelSelector"), "app.kubernetes.io/name=spiffe-node") {
			t.Errorf("asked for %s", r.URL)
		}
		_ = json.NewEncoder(w).Encode(map[string]any{"items": []any{
			agentPod("ended", "n1", "2026-01-04T00:00:00Z", "terminated", "False"),
			agentPod("starting", "n1", "2026-01-03T00:00:00Z", "running", "False"),
			agentPod("old", "n1", "2026-01-01T00:00:00Z", "running", "True"),
			agentPod("new", "n1", "2026-01-02T00:00:00Z", "running", "True"),
			agentPod("other", "n2", "2026-01-02T00:00:00Z", "waiting", "False"),
			agentPod("pending", "", "2026-01-02T00:00:00Z", "waiting", "False"),
		}})
	})
	part, err := c.AgentOf(t.Context(), "", "n1")
	if err != nil {
		t.Fatal(err)
	}
	if part.Pod != "new" || part.InspectPort != 9983 || !part.Running || !part.Ready {
		t.Errorf("got %+v", part)
	}
	all, err := c.Agents(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range kube.Current(all) {
		names = append(names, p.Pod)
	}
	if diff := cmp.Diff([]string{"new", "other"}, names); diff != "" {
		t.Error(diff)
	}
	if _, err := c.AgentOf(t.Context(), "", "n3"); err == nil || !strings.Contains(err.Error(), "node n3") {
		t.Errorf("got %v", err)
	}
}

func TestErrorsKeepTheServersWords(t *testing.T) {
	code, reason := http.StatusForbidden, "Forbidden"
	c := open(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		_ = json.NewEncoder(w).Encode(map[string]any{"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": reason, "message": "because", "code": code})
	})
	var into map[string]any
	if err := c.Get(t.Context(), "/api/v1/x", &into); !kube.IsForbidden(err) || kube.IsAbsent(err) || !strings.Contains(err.Error(), "because") {
		t.Errorf("got %v", err)
	}
	code, reason = http.StatusNotFound, "NotFound"
	if err := c.Get(t.Context(), "/api/v1/x", &into); !kube.IsAbsent(err) || kube.IsForbidden(err) {
		t.Errorf("got %v", err)
	}
	if _, err := c.Token(t.Context(), "a", "b", "c"); !kube.IsAbsent(err) {
		t.Errorf("got %v", err)
	}
}

// A port nobody forwards, a container nobody may enter.
func TestStreamsThatDoNotOpen(t *testing.T) {
	c := open(t, func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "no such pod", http.StatusNotFound) })
	if conn, err := c.Forward(t.Context(), "a", "b", 1); err == nil {
		_ = conn.Close()
		t.Error("a port that is not there is open")
	}
	conn, err := c.Exec(t.Context(), "a", "b", "c", "true")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, kube.ErrNoCommand) || !strings.Contains(err.Error(), "exec in a/b, container c") {
		t.Errorf("got %v", err)
	}
}

func TestConfig(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, ".kube"), 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, ".kube", "config")
	env := func(values map[string]string) kube.Config {
		return kube.Config{Getenv: func(k string) string { return values[k] }}
	}
	home := env(map[string]string{"HOME": dir})
	if got := home.Files(); len(got) != 0 {
		t.Errorf("files before there are any: %q", got)
	}
	if err := os.WriteFile(file, []byte("apiVersion: v1\nkind: Config\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{file}, home.Files()); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]string{file}, env(map[string]string{"KUBECONFIG": "/none:" + file}).Files()); diff != "" {
		t.Error(diff)
	}
	if got := env(nil).Files(); got != nil {
		t.Errorf("files of nowhere: %q", got)
	}
	if _, err := kube.Open(home); err == nil {
		t.Error("a kubeconfig without a cluster is taken")
	}
}
