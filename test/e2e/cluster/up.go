package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// Cluster is a running cluster. Its methods may be called from any goroutine.
type Cluster struct {
	cfg        Config
	state      state
	supervisor *http.Client
	api        *http.Client
	lifeline   *os.File // nil unless this process owns the cluster
}

// state is what is kept in state.json for Open and Down.
type state struct {
	Init      int    `json:"init"`      // process id of the cluster's init, as seen outside
	StartTime uint64 `json:"startTime"` // of that process, in clock ticks since boot
	Port      int    `json:"port"`      // of the API server, on the host's loopback
}

// Up starts a cluster and returns when its node is Ready. What is left of an
// earlier cluster in the same directory is removed first. On an error nothing
// is left running and Dir keeps the logs.
func Up(ctx context.Context, cfg Config) (*Cluster, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	if err := cfg.checkHost(); err != nil {
		return nil, err
	}
	if !cfg.haveCommands() {
		return nil, fmt.Errorf("no Kubernetes programs in %s; run `go run ./cmd/cluster build` in test/e2e", cfg.bin(""))
	}
	if err := Down(ctx, cfg); err != nil {
		return nil, err
	}
	lock, err := takeLock(ctx)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	return cfg.up(ctx, lock, nil)
}

// up starts a node; link, unless nil, connects its network namespace.
func (c Config) up(ctx context.Context, lock *os.File, link func(*Cluster) error) (*Cluster, error) {
	begun := time.Now()
	if err := c.prepare(); err != nil {
		return nil, err
	}
	cl, err := c.spawn(lock)
	if err != nil {
		return nil, err
	}
	if link != nil {
		err = link(cl)
	}
	if err == nil {
		err = cl.awaitControl(ctx)
	}
	if err != nil {
		_ = cl.end(context.WithoutCancel(ctx))
		return nil, err
	}
	c.Log.Info("cluster is up", slog.String("dir", c.Dir), slog.String("kubeconfig", cl.Kubeconfig()), slog.Duration("took", time.Since(begun).Round(time.Millisecond)))
	return cl, nil
}

// prepare fills the scratch directory.
func (c Config) prepare() error {
	for _, dir := range []string{"", "images", "logs", "static-pods", "kubelet", "etcd"} {
		if err := os.MkdirAll(c.path(dir), 0o755); err != nil {
			return fmt.Errorf("making the cluster's directory: %w", err)
		}
	}
	if c.Joins == "" {
		if err := c.writePKI(); err != nil {
			return err
		}
	}
	if err := c.writeNodePKI(); err != nil {
		return err
	}
	if err := c.writeFiles(); err != nil {
		return err
	}
	pause := c.bin("pause")
	if _, err := os.Stat(pause); err != nil {
		return fmt.Errorf("no pause program in %s; run `go run ./cmd/cluster build` in test/e2e: %w", filepath.Dir(pause), err)
	}
	if err := WriteImage(c.path("images", "pause.tar"), Image{Name: pauseImage, Files: map[string]string{"/pause": pause}, Entrypoint: []string{"/pause"}}); err != nil {
		return err
	}
	raw, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("encoding the cluster's configuration: %w", err)
	}
	return writeFile(c.path("cluster.json"), string(raw))
}

// spawn starts the cluster's init in its namespaces.
func (c Config) spawn(lock *os.File) (*Cluster, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("taking a loopback port for the API server: %w", err)
	}
	defer l.Close()
	port := l.Addr().(*net.TCPAddr).Port
	lent, err := l.(*net.TCPListener).File()
	if err != nil {
		return nil, fmt.Errorf("handing the API port over: %w", err)
	}
	defer lent.Close()
	lifeR, lifeW, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("making the cluster's lifeline: %w", err)
	}
	defer lifeR.Close()
	log, err := os.OpenFile(c.path("logs", "supervisor.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return nil, fmt.Errorf("opening the supervisor's log: %w", err)
	}
	defer log.Close()
	exe, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("finding this executable: %w", err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), stageVar+"=init", dirVar+"="+c.Dir)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{lent, lifeR, lock}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid:     true,
		Cloneflags: syscall.CLONE_NEWNS | syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
	}
	if c.Detach {
		// Its own write end keeps the pipe from ending.
		cmd.ExtraFiles = append(cmd.ExtraFiles, lifeW)
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("starting the cluster in its own namespaces (root needed): %w", err)
	}
	go func() { _ = cmd.Wait() }() // reaps; the log says why it ended
	started, err := startTime(cmd.Process.Pid)
	if err != nil {
		_ = cmd.Process.Kill()
		return nil, fmt.Errorf("reading the start time of the cluster's init: %w", err)
	}
	st := state{Init: cmd.Process.Pid, StartTime: started, Port: port}
	raw, err := json.Marshal(st)
	if err == nil {
		err = writeFile(c.path("state.json"), string(raw))
	}
	if err == nil {
		err = writeFile(c.path("kubeconfig"), c.kubeconfig("admin", fmt.Sprintf("https://127.0.0.1:%d", port)))
	}
	if err != nil {
		_ = cmd.Process.Kill()
		return nil, err
	}
	cl, err := c.attach(st)
	if err != nil {
		_ = cmd.Process.Kill()
		return nil, err
	}
	cl.lifeline = lifeW
	return cl, nil
}

// Open finds the running cluster in cfg.Dir.
func Open(ctx context.Context, cfg Config) (*Cluster, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return nil, err
	}
	raw, err := os.ReadFile(cfg.path("cluster.json"))
	if err != nil {
		return nil, fmt.Errorf("no cluster in %s: %w", cfg.Dir, err)
	}
	log := cfg.Log
	if err := json.Unmarshal(raw, &cfg); err != nil {
		return nil, fmt.Errorf("reading the configuration of the cluster in %s: %w", cfg.Dir, err)
	}
	cfg.Log = log
	st, running, err := cfg.running()
	if err != nil {
		return nil, err
	}
	if !running {
		return nil, fmt.Errorf("the cluster in %s does not run any more", cfg.Dir)
	}
	c, err := cfg.attach(st)
	if err != nil {
		return nil, err
	}
	if _, err := c.Status(ctx); err != nil {
		return nil, err
	}
	return c, nil
}

func (c Config) attach(st state) (*Cluster, error) {
	conf, err := c.adminTLS()
	if err != nil {
		return nil, err
	}
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", c.path("control.sock"))
	}
	return &Cluster{
		cfg: c, state: st,
		supervisor: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}},
		api:        &http.Client{Transport: &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}},
	}, nil
}

// running reads state.json and reports whether its process still lives.
func (c Config) running() (state, bool, error) {
	raw, err := os.ReadFile(c.path("state.json"))
	if errors.Is(err, fs.ErrNotExist) {
		return state{}, false, nil
	}
	var st state
	if err == nil {
		err = json.Unmarshal(raw, &st)
	}
	if err != nil {
		return state{}, false, fmt.Errorf("reading the state of the cluster in %s: %w", c.Dir, err)
	}
	started, err := startTime(st.Init)
	return st, err == nil && started == st.StartTime && alive(st.Init), nil
}

// awaitControl waits until the supervisor answers, which it does once the node is Ready.
func (c *Cluster) awaitControl(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	err := Poll(ctx, 50*time.Millisecond, func(ctx context.Context) error {
		if _, running, err := c.cfg.running(); err != nil || !running {
			return Fatal(errors.Join(err, errors.New("the supervisor ended")))
		}
		_, err := c.Status(ctx)
		return err
	})
	if err != nil {
		text, _ := os.ReadFile(c.cfg.path("logs", "supervisor.log"))
		return fmt.Errorf("bringing the cluster up: %w\n%s", err, strings.TrimSpace(string(tail(text, 25))))
	}
	return nil
}
