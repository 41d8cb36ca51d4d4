package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"syscall"
)

// Status is what the supervisor says of a cluster.
type Status struct {
	// Components maps each program to its process id inside the cluster, 0 when it does not run.
	Components map[string]int `json:"components"`
}

// serveControl answers on control.sock, whose presence means that the node is
// ready.
func (s *supervisor) serveControl() error {
	l, err := net.Listen("unix", s.cfg.path("control.sock"))
	if err != nil {
		return fmt.Errorf("listening for control requests: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /status", func(w http.ResponseWriter, _ *http.Request) {
		st := Status{Components: map[string]int{}}
		for name, part := range s.parts {
			st.Components[name] = part.pid()
		}
		_ = json.NewEncoder(w).Encode(st) // the client sees a short answer
	})
	mux.HandleFunc("POST /stop/{name}", s.act(func(ctx context.Context, c *component) error { return c.stop(ctx, syscall.SIGTERM) }))
	mux.HandleFunc("POST /kill/{name}", s.act(func(ctx context.Context, c *component) error { return c.stop(ctx, syscall.SIGKILL) }))
	mux.HandleFunc("POST /start/{name}", s.act(func(_ context.Context, c *component) error { return c.start() }))
	mux.HandleFunc("POST /reboot", func(w http.ResponseWriter, r *http.Request) {
		if err := s.reboot(r.Context()); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	})
	mux.HandleFunc("GET /probe", func(w http.ResponseWriter, r *http.Request) {
		req, err := http.NewRequestWithContext(r.Context(), http.MethodGet, r.URL.Query().Get("url"), nil)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer res.Body.Close()
		w.WriteHeader(res.StatusCode)
		_, _ = io.Copy(w, res.Body)
	})
	return http.Serve(l, mux)
}

func (s *supervisor) act(do func(context.Context, *component) error) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		part, ok := s.parts[r.PathValue("name")]
		if !ok {
			http.Error(w, "no such component", http.StatusNotFound)
			return
		}
		if err := do(r.Context(), part); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
		}
	}
}

// control sends one request to the supervisor.
func (c *Cluster) control(ctx context.Context, method, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, method, "http://control"+path, nil)
	if err != nil {
		return err
	}
	res, err := c.supervisor.Do(req)
	if err != nil {
		return fmt.Errorf("asking the cluster's supervisor: %w", err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		return fmt.Errorf("reading the supervisor's answer: %w", err)
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("cluster: %s: %s", path, bytes.TrimSpace(body))
	}
	switch into := into.(type) {
	case nil:
		return nil
	case *string:
		*into = string(body)
		return nil
	default:
		return json.Unmarshal(body, into)
	}
}

// Status reports which components run.
func (c *Cluster) Status(ctx context.Context) (Status, error) {
	var st Status
	return st, c.control(ctx, http.MethodGet, "/status", &st)
}

// Stop ends a component with SIGTERM and returns when it is gone. Containers
// keep running, whichever it is.
func (c *Cluster) Stop(ctx context.Context, name string) error {
	return c.control(ctx, http.MethodPost, "/stop/"+url.PathEscape(name), nil)
}

// Kill is Stop with SIGKILL.
func (c *Cluster) Kill(ctx context.Context, name string) error {
	return c.control(ctx, http.MethodPost, "/kill/"+url.PathEscape(name), nil)
}

// Start starts a component that was stopped, without waiting until it is ready.
func (c *Cluster) Start(ctx context.Context, name string) error {
	return c.control(ctx, http.MethodPost, "/start/"+url.PathEscape(name), nil)
}
