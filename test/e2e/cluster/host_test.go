package cluster

import (
	"os"
	"os/exec"
	"testing"
)

func TestParseMounts(t *testing.T) {
	table := `36 35 98:0 /mnt1 /mnt\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
120 95 0:42 /spiffe-node/public /var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/s/mount ro,nosuid shared:28 - tmpfs tmpfs rw,mode=755
`
	got, err := parseMounts([]byte(table))
	if err != nil {
		t.Fatal(err)
	}
	want := []Mount{
		{Root: "/mnt1", Point: "/mnt 2", Type: "ext3"},
		{Root: "/spiffe-node/public", Point: "/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/s/mount", Type: "tmpfs", ReadOnly: true},
	}
	if len(got) != len(want) || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if _, err := parseMounts([]byte("nonsense\n")); err == nil {
		t.Error("a line that is no mount was accepted")
	}
}

func TestAlive(t *testing.T) {
	if !alive(os.Getpid()) {
		t.Error("this process counts as ended")
	}
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	pid := cmd.Process.Pid
	for alive(pid) { // ends by itself; nobody has reaped it yet
	}
	if _, err := startTime(pid); err != nil {
		t.Errorf("a zombie has a start time: %v", err)
	}
	if err := cmd.Wait(); err != nil {
		t.Fatal(err)
	}
	if _, err := startTime(pid); err == nil && alive(pid) {
		t.Error("a reaped process counts as alive")
	}
}
