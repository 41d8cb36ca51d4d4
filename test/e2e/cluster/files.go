package cluster

import (
	"fmt"
	"os"
	"path/filepath"
)

// pauseImage is the sandbox image containerd is told to use.
const pauseImage = "spiffe-node.test/pause:1"

// containerdSocket is on the node's own /run.
const containerdSocket = "/run/containerd/containerd.sock"

// writeFiles writes the configuration of every component.
func (c Config) writeFiles() error {
	files := map[string]string{
		"containerd.toml":        c.containerdConfig(),
		"kubelet.yaml":           c.kubeletConfig(),
		"cni/10-bridge.conflist": c.cniConfig(),
		"resolv.conf":            "nameserver " + clusterDNS + "\n",
		// Not the service's address: kube-proxy refuses that while there is no API
		// server, and would refuse it to itself for ever.
		"controller-manager.conf": c.kubeconfig("controller-manager", "https://"+NodeIP),
		"scheduler.conf":          c.kubeconfig("scheduler", "https://"+NodeIP),
		"kubelet.conf":            c.kubeconfig(c.own("kubelet-client"), "https://"+NodeIP),
		"proxy.conf":              c.kubeconfig("proxy", "https://"+NodeIP),
		"admin.conf":              c.kubeconfig("admin", "https://"+NodeIP),
	}
	for name, content := range files {
		if err := os.MkdirAll(filepath.Dir(c.path(name)), 0o755); err != nil {
			return fmt.Errorf("making the directory of %s: %w", name, err)
		}
		if err := os.WriteFile(c.path(name), []byte(content), 0o600); err != nil {
			return fmt.Errorf("writing %s: %w", name, err)
		}
	}
	return nil
}

func (c Config) kubeconfig(user, server string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
current-context: e2e
clusters: [{name: e2e, cluster: {server: %q, certificate-authority: %q}}]
users: [{name: %q, user: {client-certificate: %q, client-key: %q}}]
contexts: [{name: e2e, context: {cluster: e2e, user: %q}}]
`, server, c.pki("ca.crt"), user, c.pki(user+".crt"), c.pki(user+".key"), user)
}

func (c Config) containerdConfig() string {
	return fmt.Sprintf(`version = 2
root = %q
state = "/run/containerd"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
address = %q
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = %q
# Without CAP_SYS_RESOURCE runc cannot lower a pod's oom_score_adj and no pod starts.
restrict_oom_score_adj = %t
disable_apparmor = true
disable_hugetlb_controller = true
tolerate_missing_hugetlb_controller = true
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "/usr/lib/cni"
conf_dir = %q
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
SystemdCgroup = false
`, c.path("containerd"), containerdSocket, pauseImage, !hasCapability(capSysResource), c.path("cni"))
}

func (c Config) kubeletConfig() string {
	return fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
address: 0.0.0.0
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: %[1]q}
authorization: {mode: Webhook}
tlsCertFile: %[2]q
tlsPrivateKeyFile: %[3]q
containerRuntimeEndpoint: unix://%[4]s
cgroupDriver: cgroupfs
cgroupRoot: %[8]s
failSwapOn: false
failCgroupV1: false
localStorageCapacityIsolation: false
resolvConf: %[5]q
clusterDNS: [%[7]s]
clusterDomain: cluster.local
staticPodPath: %[6]q
readOnlyPort: 0
imageGCHighThresholdPercent: 100
evictionHard: {memory.available: 32Mi, nodefs.available: 1%%, imagefs.available: 1%%, nodefs.inodesFree: 0%%, imagefs.inodesFree: 0%%}
`, c.pki("ca.crt"), c.pki(c.own("kubelet-server")+".crt"), c.pki(c.own("kubelet-server")+".key"), containerdSocket, c.path("resolv.conf"), c.path("static-pods"), clusterDNS, c.cgroupRoot())
}

func (c Config) cniConfig() string {
	return fmt.Sprintf(`{"cniVersion": "0.4.0", "name": "e2e", "plugins": [
{"type": "bridge", "bridge": %q, "isGateway": true, "ipMasq": false, "hairpinMode": true,
 "ipam": {"type": "host-local", "dataDir": "/run/cni-networks", "ranges": [[{"subnet": %q, "rangeStart": %q, "gateway": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}}]}
`, bridge, c.podCIDR(), c.inPods("0.10"), c.nodeIP())
}
