package csi_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

const otherUID = "7b1f3a52-0d8e-4c55-9a3b-0a1b2c3d4e5f"

func TestPublishRefusals(t *testing.T) {
	n := newNode(t)
	n.target(otherUID, testVolume)
	type req = *csipb.NodePublishVolumeRequest
	ctxKey := func(k, v string) func(req) {
		return func(r req) { r.VolumeContext["csi.storage.k8s.io/"+k] = v }
	}
	for name, c := range map[string]struct {
		change func(req)
		words  []string
	}{
		"no volume ID":   {func(r req) { r.VolumeId = "" }, []string{"volume_id"}},
		"long volume ID": {func(r req) { r.VolumeId = strings.Repeat("x", 129) }, []string{"volume_id", "128"}},
		"no target":      {func(r req) { r.TargetPath = "" }, []string{"target_path"}},
		"no capability":  {func(r req) { r.VolumeCapability = nil }, []string{"volume_capability"}},
		"no access type": {func(r req) { r.VolumeCapability.AccessType = nil }, []string{"access_type"}},
		"block":          {func(r req) { r.VolumeCapability.AccessType = &csipb.VolumeCapability_Block{} }, []string{"volumeDevices"}},
		"filesystem":     {func(r req) { r.VolumeCapability.GetMount().FsType = "ext4" }, []string{"spec.volumes[].csi.fsType", "ext4"}},
		"mount flags":    {func(r req) { r.VolumeCapability.GetMount().MountFlags = []string{"context=x"} }, []string{"seLinuxMount"}},
		"no access mode": {func(r req) { r.VolumeCapability.AccessMode = nil }, []string{"access_mode"}},
		"reader only": {func(r req) {
			r.VolumeCapability.AccessMode.Mode = csipb.VolumeCapability_AccessMode_SINGLE_NODE_READER_ONLY
		}, []string{"SINGLE_NODE_READER_ONLY", "readOnly: true"}},
		"read-write":           {func(r req) { r.Readonly = false }, []string{"spec.volumes[].csi.readOnly: true"}},
		"not ephemeral":        {ctxKey("ephemeral", "false"), []string{"inline", "podInfoOnMount"}},
		"no context":           {func(r req) { r.VolumeContext = nil }, []string{"podInfoOnMount"}},
		"no namespace":         {ctxKey("pod.namespace", ""), []string{"metadata.namespace", "podInfoOnMount"}},
		"no pod name":          {ctxKey("pod.name", ""), []string{"metadata.name", "podInfoOnMount"}},
		"no UID":               {ctxKey("pod.uid", ""), []string{"metadata.uid", "podInfoOnMount"}},
		"namespace no name":    {ctxKey("pod.namespace", "a/b"), []string{"metadata.namespace"}},
		"pod name no name":     {ctxKey("pod.name", "Web\n0"), []string{"metadata.name"}},
		"account no name":      {ctxKey("serviceAccount.name", "a:b"), []string{"spec.serviceAccountName"}},
		"another pod":          {ctxKey("pod.uid", otherUID), []string{"another pod", otherUID, testUID}},
		"another pod's target": {func(r req) { r.TargetPath = strings.Replace(r.TargetPath, testUID, otherUID, 1) }, []string{"another pod"}},
		"another volume's ID":  {func(r req) { r.VolumeId = csi.VolumeID(testUID, "other") }, []string{"volume_id", csi.VolumeID(testUID, testVolume)}},
		"another pod's ID":     {func(r req) { r.VolumeId = csi.VolumeID(otherUID, testVolume) }, []string{"volume_id"}},
		"relative target":      {func(r req) { r.TargetPath = "pods/x" }, []string{"absolute"}},
		"dots":                 {func(r req) { r.TargetPath = filepath.Dir(r.TargetPath) + "/x/../mount" }, []string{"'..'"}},
		"outside":              {func(r req) { r.TargetPath = "/etc" }, []string{"--kubelet-root"}},
		"root itself":          {func(r req) { r.TargetPath = n.root }, []string{"--kubelet-root"}},
		"root's namesake":      {func(r req) { r.TargetPath = strings.Replace(r.TargetPath, n.root, n.root+"2", 1) }, []string{"--kubelet-root"}},
		"not a volume's":       {func(r req) { r.TargetPath = filepath.Dir(r.TargetPath) }, []string{"kubernetes.io~csi"}},
		"another plugin's":     {func(r req) { r.TargetPath = strings.Replace(r.TargetPath, "~csi", "~empty-dir", 1) }, []string{"kubernetes.io~csi"}},
		"deeper":               {func(r req) { r.TargetPath += "/x" }, []string{"kubernetes.io~csi"}},
		"zero byte":            {func(r req) { r.TargetPath += "\x00" }, []string{"zero byte"}},
		"endless target":       {func(r req) { r.TargetPath += strings.Repeat("/", 5000) }, []string{"bytes"}},
		"volume with odd name": {func(r req) { r.TargetPath = strings.Replace(r.TargetPath, "/"+testVolume+"/", "/A b/", 1) }, []string{"volume"}},
		"target with odd UID":  {func(r req) { r.TargetPath = strings.Replace(r.TargetPath, testUID, "-", 1) }, []string{"UID"}},
	} {
		t.Run(name, func(t *testing.T) {
			r := n.request(testUID, testVolume)
			c.change(r)
			wantCode(t, callPublish(n, r), codes.InvalidArgument, c.words...)
			if got := len(n.store.List()); got != 0 {
				t.Errorf("%d records after a refusal", got)
			}
		})
	}
}

// The other modes pass, as with spiffe-csi, and so does what is not looked at.
func TestPublishAccepts(t *testing.T) {
	for name, change := range map[string]func(*csipb.NodePublishVolumeRequest){
		"unknown mode":      func(r *csipb.NodePublishVolumeRequest) { r.VolumeCapability.AccessMode.Mode = 0 },
		"many readers":      func(r *csipb.NodePublishVolumeRequest) { r.VolumeCapability.AccessMode.Mode = 3 },
		"future mode":       func(r *csipb.NodePublishVolumeRequest) { r.VolumeCapability.AccessMode.Mode = 99 },
		"unknown attribute": func(r *csipb.NodePublishVolumeRequest) { r.VolumeContext["mine"] = "x" },
		"tokens": func(r *csipb.NodePublishVolumeRequest) {
			r.VolumeContext["csi.storage.k8s.io/serviceAccount.tokens"] = "{}"
		},
		"mount group": func(r *csipb.NodePublishVolumeRequest) { r.VolumeCapability.GetMount().VolumeMountGroup = "5" },
		"secrets":     func(r *csipb.NodePublishVolumeRequest) { r.Secrets = map[string]string{"a": "b"} },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			r := n.request(testUID, testVolume)
			change(r)
			n.publish(r)
			n.wantPublished(r)
		})
	}
}

// A static pod has a config hash for a UID and no service account.
func TestStaticPod(t *testing.T) {
	n := newNode(t)
	uid := "5d41402abc4b2a76b9719d911017c592"
	r := n.request(uid, testVolume)
	r.VolumeContext["csi.storage.k8s.io/serviceAccount.name"] = ""
	n.publish(r)
	if rec, ok := n.store.Get(r.GetVolumeId()); !ok || rec.PodUID != uid || rec.ServiceAccount != "" {
		t.Fatalf("record %+v, %v", rec, ok)
	}
	n.unpublish(unpublishOf(r))
	n.wantNothing(r)
}

func TestAnyVolumeID(t *testing.T) {
	n := newNode(t, func(c *csi.Config) { c.AnyVolumeID = true })
	r := n.request(testUID, testVolume)
	r.VolumeId = "An ID / of sorts"
	n.publish(r)
	n.wantPublished(r)
	t.Run("one volume on two targets", func(t *testing.T) {
		other := n.request(testUID, "other")
		other.VolumeId = r.GetVolumeId()
		wantCode(t, callPublish(n, other), codes.FailedPrecondition, r.GetTargetPath())
	})
	t.Run("two volumes on one target", func(t *testing.T) {
		other := n.request(testUID, testVolume)
		other.VolumeId = "another"
		wantCode(t, callPublish(n, other), codes.AlreadyExists, r.GetVolumeId())
	})
	n.unpublish(unpublishOf(r))
	n.wantNothing(r)
}

// An agent that is not there yet is worth another try, and nothing is left of
// the first.
func TestAgentNotThere(t *testing.T) {
	for name, c := range map[string]struct {
		break_ func(t *testing.T, n *node)
		check  map[csi.AgentCheck]codes.Code
	}{
		"no directory": {
			func(t *testing.T, n *node) {
				t.Helper()
				removeAll(t, n.source)
			},
			map[csi.AgentCheck]codes.Code{csi.CheckConnect: codes.Unavailable, csi.CheckExists: codes.Unavailable, csi.CheckOff: codes.Unavailable},
		},
		"no socket": {
			func(t *testing.T, n *node) {
				t.Helper()
				removeAll(t, filepath.Join(n.source, "socket"))
			},
			map[csi.AgentCheck]codes.Code{csi.CheckConnect: codes.Unavailable, csi.CheckExists: codes.Unavailable, csi.CheckOff: codes.OK},
		},
		"nobody listens": {
			func(t *testing.T, n *node) {
				t.Helper()
				n.agent.(*net.UnixListener).SetUnlinkOnClose(false)
				_ = n.agent.Close()
			},
			map[csi.AgentCheck]codes.Code{csi.CheckConnect: codes.Unavailable, csi.CheckExists: codes.OK, csi.CheckOff: codes.OK},
		},
		"no socket but a file": {
			func(t *testing.T, n *node) {
				t.Helper()
				removeAll(t, filepath.Join(n.source, "socket"))
				if err := os.WriteFile(filepath.Join(n.source, "socket"), nil, 0o600); err != nil {
					t.Fatal(err)
				}
			},
			map[csi.AgentCheck]codes.Code{csi.CheckConnect: codes.Unavailable, csi.CheckExists: codes.Unavailable, csi.CheckOff: codes.OK},
		},
		"another name": {
			func(t *testing.T, n *node) {
				t.Helper()
				if err := os.Rename(filepath.Join(n.source, "socket"), filepath.Join(n.source, "api.sock")); err != nil {
					t.Fatal(err)
				}
			},
			map[csi.AgentCheck]codes.Code{csi.CheckConnect: codes.OK, csi.CheckExists: codes.OK, csi.CheckOff: codes.OK},
		},
	} {
		for check, want := range c.check {
			t.Run(name+" "+string(check), func(t *testing.T) {
				n := newNode(t, func(c *csi.Config) { c.AgentCheck = check })
				c.break_(t, n)
				r := n.request(testUID, testVolume)
				err := callPublish(n, r)
				wantCode(t, err, want)
				probe, perr := n.ids.Probe(context.Background(), &csipb.ProbeRequest{})
				if perr != nil || probe.GetReady().GetValue() != (want == codes.OK) {
					t.Errorf("probe %v, %v", probe, perr)
				}
				if want != codes.OK {
					n.wantNothing(r)
				}
			})
		}
	}
}

func removeAll(t *testing.T, path string) {
	t.Helper()
	if err := os.RemoveAll(path); err != nil {
		t.Fatal(err)
	}
}

// A volume that stands is confirmed while the agent is replaced: the kubelet
// asks again for every volume when it starts.
func TestRepublishWithoutAgent(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	n.publish(r)
	_ = n.agent.Close()
	n.publish(r)
	if got := mountsAt(t, r.GetTargetPath()); got != 1 {
		t.Fatalf("%d mounts", got)
	}
}

func TestRepublishRepairsAReplacedSource(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	n.publish(r)
	n.replaceSource()
	if err := dialIn(r.GetTargetPath()); err == nil {
		t.Fatal("the dead mount leads to the agent")
	}
	before, _ := n.store.Get(r.GetVolumeId())
	n.publish(r)
	n.wantPublished(r)
	after, _ := n.store.Get(r.GetVolumeId())
	if after.SourceIno == before.SourceIno {
		t.Error("the record is of the directory that was deleted")
	}
	if after.SourceIno = before.SourceIno; after != before {
		t.Errorf("the record was %+v and is %+v", before, after)
	}
	n.replaceSource()
	n.unpublish(unpublishOf(r))
	n.wantNothing(r)
}

// While the agent is away a dead mount is left for later rather than removed.
func TestRepairWaitsForTheAgent(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	n.publish(r)
	n.replaceSource()
	_ = n.agent.Close()
	wantCode(t, callPublish(n, r), codes.Unavailable)
	n.wantRecord(r, true)
	if got := mountsAt(t, r.GetTargetPath()); got != 1 {
		t.Fatalf("%d mounts", got)
	}
}

// In a container the directory behind the mount can be gone while the path is
// there.
func TestDeletedSourceUnderAMount(t *testing.T) {
	n := newNode(t)
	inside := filepath.Join(t.TempDir(), "inside")
	mkdir(t, inside)
	bind(t, n.source, inside)
	n.start(func(c *csi.Config) { c.SourceDir = inside })
	if err := n.driver.Live(); err != nil {
		t.Fatal(err)
	}
	_ = n.agent.Close()
	removeAll(t, n.source)
	mkdir(t, n.source)
	n.startAgent()
	wantCode(t, callPublish(n, n.request(testUID, testVolume)), codes.Unavailable, "started again")
	if err := n.driver.Live(); err == nil {
		t.Error("the driver thinks it can live with it")
	}
}

func mkdir(t *testing.T, dir string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
}

func bind(t *testing.T, from, to string) {
	t.Helper()
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(to, unix.MNT_DETACH) })
}

func TestNoParent(t *testing.T) {
	n := newNode(t)
	r := n.request(testUID, testVolume)
	removeAll(t, filepath.Join(n.root, "pods", testUID))
	wantCode(t, callPublish(n, r), codes.FailedPrecondition, "mountPropagation")
	n.wantRecord(r, false)
	n.unpublish(unpublishOf(r))
}

func TestCancelledCallerDoesNotWait(t *testing.T) {
	n := newNode(t)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := n.driver.NodePublishVolume(ctx, n.request(testUID, testVolume))
	if err != nil {
		wantCode(t, err, codes.Aborted)
	}
}
