package ledger_test

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/internal/ledger"
)

const uid = "0c7a6dbd-6d4a-4f52-8c4a-9c1f3b2a7e10"

func record(volumeID string) ledger.Record {
	return ledger.Record{
		Version: ledger.Version, VolumeID: volumeID, VolumeName: "spiffe",
		PodNamespace: "default", PodName: "web-0", PodUID: uid, ServiceAccount: "web",
		TargetPath: "/var/lib/kubelet/pods/" + uid + "/volumes/kubernetes.io~csi/spiffe/mount",
		Source:     "/run/spire/agent-sockets", SourceDev: 26, SourceIno: 1<<63 + 1,
		Published: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC),
	}
}

func encode(tb testing.TB, r ledger.Record) []byte {
	tb.Helper()
	b, err := ledger.Encode(r)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func TestEncodeDecode(t *testing.T) {
	want := record("csi-1")
	b := encode(t, want)
	const text = `{"version":1,"volumeID":"csi-1","volumeName":"spiffe","podNamespace":"default","podName":"web-0",` +
		`"podUID":"0c7a6dbd-6d4a-4f52-8c4a-9c1f3b2a7e10","serviceAccount":"web",` +
		`"targetPath":"/var/lib/kubelet/pods/0c7a6dbd-6d4a-4f52-8c4a-9c1f3b2a7e10/volumes/kubernetes.io~csi/spiffe/mount",` +
		`"source":"/run/spire/agent-sockets","sourceDev":26,"sourceIno":9223372036854775809,"published":"2026-01-02T03:04:05.000000006Z"}` + "\n"
	if d := cmp.Diff(text, string(b)); d != "" {
		t.Errorf("the format on disk has changed (-want +got):\n%s", d)
	}
	got, err := ledger.Decode(b)
	if err != nil || got != want {
		t.Errorf("%+v, %v", got, err)
	}
	east := want
	east.Published = want.Published.In(time.FixedZone("east", 3600))
	if b2 := encode(t, east); !bytes.Equal(b, b2) {
		t.Errorf("the zone of a time is kept: %s", b2)
	}
}

func TestDecodeIsStrict(t *testing.T) {
	good := string(encode(t, record("csi-1")))
	for name, c := range map[string]struct {
		text string
		want error
	}{
		"empty":          {"", ledger.ErrCorrupt},
		"cut short":      {good[:len(good)/2], ledger.ErrCorrupt},
		"no newline":     {strings.TrimSuffix(good, "\n"), ledger.ErrCorrupt},
		"not JSON":       {"hello", ledger.ErrCorrupt},
		"null":           {"null\n", ledger.ErrCorrupt},
		"array":          {"[]\n", ledger.ErrCorrupt},
		"zeros":          {strings.Repeat("\x00", 100), ledger.ErrCorrupt},
		"text behind":    {good + good, ledger.ErrCorrupt},
		"space":          {" " + good, ledger.ErrCorrupt},
		"unknown key":    {strings.Replace(good, "{", `{"admin":true,`, 1), ledger.ErrCorrupt},
		"repeated key":   {strings.Replace(good, "{", `{"podUID":"other",`, 1), ledger.ErrCorrupt},
		"other case":     {strings.Replace(good, "podUID", "PODUID", 1), ledger.ErrCorrupt},
		"missing key":    {strings.Replace(good, `"podName":"web-0",`, "", 1), ledger.ErrCorrupt},
		"empty pod":      {strings.Replace(good, `"web-0"`, `""`, 1), ledger.ErrCorrupt},
		"wrong type":     {strings.Replace(good, `"web-0"`, `7`, 1), ledger.ErrCorrupt},
		"control":        {strings.Replace(good, `"web-0"`, `"web\u0000"`, 1), ledger.ErrCorrupt},
		"bad UTF-8":      {strings.Replace(good, `web-0`, "web\xff", 1), ledger.ErrCorrupt},
		"relative path":  {strings.Replace(good, `"/run/`, `"run/`, 1), ledger.ErrCorrupt},
		"unclean path":   {strings.Replace(good, `"/run/`, `"/run/../run/`, 1), ledger.ErrCorrupt},
		"no time":        {strings.Replace(good, "2026-01-02T03:04:05.000000006Z", "0001-01-01T00:00:00Z", 1), ledger.ErrCorrupt},
		"too long":       {strings.Replace(good, "web-0", strings.Repeat("w", 300), 1), ledger.ErrCorrupt},
		"endless":        {strings.Replace(good, "web-0", strings.Repeat("w", ledger.MaxFileSize), 1), ledger.ErrCorrupt},
		"no version":     {strings.Replace(good, `"version":1,`, "", 1), ledger.ErrCorrupt},
		"version 2":      {strings.Replace(good, `"version":1`, `"version":2`, 1), ledger.ErrVersion},
		"version 2 more": {strings.Replace(good, `"version":1`, `"version":2,"new":1`, 1), ledger.ErrVersion},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := ledger.Decode([]byte(c.text)); !errors.Is(err, c.want) {
				t.Errorf("error %v, want %v", err, c.want)
			}
		})
	}
}

func TestEncodeRefuses(t *testing.T) {
	for name, change := range map[string]func(*ledger.Record){
		"volumeID":   func(r *ledger.Record) { r.VolumeID = "" },
		"podUID":     func(r *ledger.Record) { r.PodUID = "a\nb" },
		"targetPath": func(r *ledger.Record) { r.TargetPath = "/a/" },
		"published":  func(r *ledger.Record) { r.Published = time.Time{} },
	} {
		r := record("csi-1")
		change(&r)
		if _, err := ledger.Encode(r); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("error %v does not name %s", err, name)
		}
	}
}

func TestFileNameIsOneToOne(t *testing.T) {
	seen := map[string]string{}
	hash := strings.TrimSuffix(ledger.FileName("A"), ".json")
	for _, id := range []string{"csi-1", "A", "a", "", ".", "..", "a/b", "a.json", "-x", "é", strings.Repeat("a", 128), strings.Repeat("a", 129), hash} {
		name := ledger.FileName(id)
		if other, ok := seen[name]; ok {
			t.Errorf("%q and %q share %s", id, other, name)
		}
		seen[name] = id
		if strings.ContainsAny(name, "/\x00") || strings.HasPrefix(name, ".") || len(name) > 255 {
			t.Errorf("%q is kept as %q", id, name)
		}
	}
	if ledger.FileName("csi-1") != "csi-1.json" {
		t.Error("a kubelet's ID is not kept as it is")
	}
}

func TestSame(t *testing.T) {
	a, b := record("csi-1"), record("csi-1")
	b.Published = b.Published.Add(time.Hour)
	if !a.Same(b) {
		t.Error("the time makes a difference")
	}
	b.PodName = "web-1"
	if a.Same(b) {
		t.Error("the pod makes none")
	}
}

// FuzzDecode: whatever is accepted is exactly what Encode writes.
func FuzzDecode(f *testing.F) {
	good := encode(f, record("csi-1"))
	f.Add(good)
	f.Add(good[:40])
	f.Add([]byte("{}"))
	f.Add([]byte(`{"version":2}`))
	f.Add(bytes.Replace(good, []byte("web-0"), []byte(`w\u00e9b`), 1))
	f.Add(bytes.Replace(good, []byte("web-0"), []byte("<web>&"), 1))
	f.Add(bytes.Replace(good, []byte("000000006Z"), []byte("1+01:00"), 1))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := ledger.Decode(data)
		if err != nil {
			if !errors.Is(err, ledger.ErrCorrupt) && !errors.Is(err, ledger.ErrVersion) {
				t.Fatalf("an error of no kind: %v", err)
			}
			return
		}
		if err := r.Validate(); err != nil {
			t.Fatalf("accepted what it would not write: %v", err)
		}
		again, err := ledger.Encode(r)
		if err != nil || !bytes.Equal(again, data) {
			t.Fatalf("%q became %q, %v", data, again, err)
		}
		if ledger.FileName(r.VolumeID) == "" || r.Pod().UID != r.PodUID {
			t.Fatal("the record is not what it says")
		}
	})
}
