package cluster

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/types/known/emptypb"
)

// startTimeout bounds each component's way to answering.
const startTimeout = 60 * time.Second

// supervisor is process 2 of a cluster: it owns the components.
type supervisor struct {
	cfg   Config
	log   *slog.Logger
	parts map[string]*component
	api   *http.Client
}

func runSupervisor(dir string) error {
	raw, err := os.ReadFile(filepath.Join(dir, "cluster.json"))
	if err != nil {
		return fmt.Errorf("reading the cluster's configuration: %w", err)
	}
	var cfg Config
	if err := json.Unmarshal(raw, &cfg); err != nil {
		return fmt.Errorf("reading the cluster's configuration: %w", err)
	}
	s := &supervisor{cfg: cfg, log: slog.New(slog.NewTextHandler(os.Stderr, nil))}
	if err := s.run(context.Background()); err != nil {
		s.log.Error("cluster failed", slog.Any("error", err))
		return err
	}
	return nil
}

func (s *supervisor) run(ctx context.Context) error {
	begun := time.Now()
	syscall.CloseOnExec(apiListenerFD)
	lent, err := net.FileListener(os.NewFile(apiListenerFD, "api"))
	if err != nil {
		return fmt.Errorf("taking over the API port on the host's loopback: %w", err)
	}
	if err := s.cfg.prepareNamespaces(); err != nil {
		return err
	}
	if err := s.connect(); err != nil {
		return err
	}
	s.parts = s.cfg.components()
	type step struct {
		name  string
		ready func(context.Context) error
	}
	steps := []step{{"containerd", criReady}}
	if s.cfg.Joins == "" {
		steps = append(steps,
			step{"etcd", dialable("tcp", "127.0.0.1:2379")},
			step{"kube-apiserver", s.apiReady},
			step{"kube-controller-manager", nil},
			step{"kube-scheduler", nil},
		)
	}
	for _, step := range steps {
		if err := s.startReady(ctx, step.name, step.ready); err != nil {
			return err
		}
		if step.name == "containerd" {
			if err := s.importImages(ctx); err != nil {
				return err
			}
		}
		s.log.Info("started", slog.String("component", step.name), slog.Duration("after", time.Since(begun).Round(time.Millisecond)))
	}
	if s.cfg.Joins == "" {
		if err := s.serveDNS(); err != nil {
			return err
		}
	}
	if s.cfg.KubeProxy {
		if err := s.startReady(ctx, "kube-proxy", nil); err != nil {
			return err
		}
	}
	if err := s.startReady(ctx, "kubelet", s.nodeReady); err != nil {
		return err
	}
	s.log.Info("node is ready", slog.Duration("after", time.Since(begun).Round(time.Millisecond)))
	go forward(lent, fmt.Sprintf("%s:%d", NodeIP, apiPort))
	return s.serveControl()
}

// components names every program with its flags; nothing is started yet.
func (c Config) components() map[string]*component {
	list := []*component{
		{name: "etcd", path: "etcd", args: []string{
			"--data-dir=" + c.path("etcd", "data"), "--name=e2e", "--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
			"--listen-peer-urls=http://127.0.0.1:2380", "--logger=zap", "--log-level=warn",
		}},
		{name: "kube-apiserver", path: c.bin("kube-apiserver"), args: []string{
			"--etcd-servers=http://127.0.0.1:2379", "--bind-address=0.0.0.0", fmt.Sprintf("--secure-port=%d", apiPort), "--advertise-address=" + NodeIP,
			"--service-cluster-ip-range=" + serviceCIDR, "--client-ca-file=" + c.pki("ca.crt"),
			"--tls-cert-file=" + c.pki("apiserver.crt"), "--tls-private-key-file=" + c.pki("apiserver.key"),
			"--kubelet-client-certificate=" + c.pki("apiserver-kubelet.crt"), "--kubelet-client-key=" + c.pki("apiserver-kubelet.key"),
			"--kubelet-certificate-authority=" + c.pki("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
			"--service-account-issuer=https://kubernetes.default.svc.cluster.local",
			"--service-account-key-file=" + c.pki("service-accounts.pub"), "--service-account-signing-key-file=" + c.pki("service-accounts.key"),
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction", "--allow-privileged=true", "--profiling=false",
		}},
		{name: "kube-controller-manager", path: c.bin("kube-controller-manager"), args: []string{
			"--kubeconfig=" + c.path("controller-manager.conf"), "--leader-elect=false", "--bind-address=127.0.0.1",
			"--service-account-private-key-file=" + c.pki("service-accounts.key"), "--root-ca-file=" + c.pki("ca.crt"),
			"--use-service-account-credentials=true", "--profiling=false",
		}},
		{name: "kube-scheduler", path: c.bin("kube-scheduler"), args: []string{
			"--kubeconfig=" + c.path("scheduler.conf"), "--authentication-kubeconfig=" + c.path("scheduler.conf"), "--authorization-kubeconfig=" + c.path("scheduler.conf"),
			"--leader-elect=false", "--bind-address=127.0.0.1", "--profiling=false",
		}},
		{name: "kube-proxy", path: c.bin("kube-proxy"), args: []string{
			"--kubeconfig=" + c.path("proxy.conf"), "--proxy-mode=iptables", "--cluster-cidr=" + allPodsCIDR, "--hostname-override=" + c.NodeName,
			"--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0", "--conntrack-tcp-timeout-close-wait=0",
		}},
		{name: "containerd", path: "containerd", args: []string{"--config=" + c.path("containerd.toml")}},
		{name: "kubelet", path: c.bin("kubelet"), args: []string{
			"--config=" + c.path("kubelet.yaml"), "--kubeconfig=" + c.path("kubelet.conf"), "--hostname-override=" + c.NodeName, "--node-ip=" + c.nodeIP(),
			"--root-dir=/var/lib/kubelet", "--v=2",
		}},
	}
	parts := make(map[string]*component, len(list))
	for _, p := range list {
		p.log = c.path("logs", p.name+".log")
		parts[p.name] = p
	}
	return parts
}

func (s *supervisor) startReady(ctx context.Context, name string, ready func(context.Context) error) error {
	part := s.parts[name]
	if err := part.start(); err != nil {
		return err
	}
	if ready == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	return part.await(ctx, ready)
}

func (s *supervisor) importImages(ctx context.Context) error {
	for _, file := range append([]string{s.cfg.path("images", "pause.tar")}, s.cfg.Images...) {
		out, err := exec.CommandContext(ctx, "ctr", "--address", containerdSocket, "--namespace", "k8s.io", "images", "import", file).CombinedOutput()
		if err != nil {
			return fmt.Errorf("importing image archive %s: %w: %s", file, err, tail(out, 3))
		}
	}
	return nil
}

// connect makes the client for the API server, with the administrator's certificate.
func (s *supervisor) connect() error {
	conf, err := s.cfg.adminTLS()
	if err != nil {
		return err
	}
	s.api = &http.Client{Transport: &http.Transport{TLSClientConfig: conf}, Timeout: 10 * time.Second}
	return nil
}

func (c Config) adminTLS() (*tls.Config, error) {
	ca, err := os.ReadFile(c.pki("ca.crt"))
	if err != nil {
		return nil, fmt.Errorf("reading the cluster's CA: %w", err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(ca)
	cert, err := tls.LoadX509KeyPair(c.pki("admin.crt"), c.pki("admin.key"))
	if err != nil {
		return nil, fmt.Errorf("loading the administrator's certificate: %w", err)
	}
	return &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{cert}}, nil
}

func (s *supervisor) get(ctx context.Context, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+NodeIP+path, nil)
	if err != nil {
		return nil, err
	}
	res, err := s.api.Do(req)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("GET %s: %s: %s", path, res.Status, tail(body, 3))
	}
	return body, err
}

func (s *supervisor) apiReady(ctx context.Context) error {
	_, err := s.get(ctx, "/readyz")
	return err
}

func (s *supervisor) nodeReady(ctx context.Context) error {
	body, err := s.get(ctx, "/api/v1/nodes/"+s.cfg.NodeName)
	if err != nil {
		return err
	}
	var node object
	if err := json.Unmarshal(body, &node); err != nil {
		return fmt.Errorf("reading the node: %w", err)
	}
	if len(node.Spec.Taints) > 0 {
		return fmt.Errorf("the node is tainted: %v", node.Spec.Taints)
	}
	return node.condition("Ready")
}

// criReady asks the runtime for its version as the kubelet does first; the
// socket is there before the plugin that answers. Neither message matters.
func criReady(ctx context.Context) error {
	conn, err := grpc.NewClient("unix://"+containerdSocket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.Invoke(ctx, "/runtime.v1.RuntimeService/Version", new(emptypb.Empty), new(emptypb.Empty))
}

func dialable(network, address string) func(context.Context) error {
	return func(ctx context.Context) error {
		conn, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil {
			return err
		}
		return conn.Close()
	}
}

// forward copies every connection on l, a listener of the host's network
// namespace, to address in ours.
func forward(l net.Listener, address string) {
	for {
		in, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer in.Close()
			out, err := net.Dial("tcp", address)
			if err != nil {
				return
			}
			defer out.Close()
			go func() {
				_, _ = io.Copy(out, in)
				_ = out.(*net.TCPConn).CloseWrite()
			}()
			_, _ = io.Copy(in, out)
		}()
	}
}
