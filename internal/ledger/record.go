package ledger

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path"
	"regexp"
	"strings"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// Version is the format this package writes and reads.
const Version = 1

// MaxFileSize bounds a record's file, in bytes. A target path and the names of
// a pod fit several times.
const MaxFileSize = 16 << 10

const suffix = ".json"

// Errors of Decode.
var (
	// ErrCorrupt: the file is not what Encode writes.
	ErrCorrupt = errors.New("corrupt ledger record")
	// ErrVersion: the record is of a format this program does not know.
	ErrVersion = errors.New("unknown version of ledger record")
)

// Record says which pod a published volume belongs to.
type Record struct {
	// Version is the format; Encode sets it.
	Version int `json:"version"`
	// VolumeID is the kubelet's handle of the volume.
	VolumeID string `json:"volumeID"`
	// VolumeName is the volume's name in the pod.
	VolumeName   string `json:"volumeName"`
	PodNamespace string `json:"podNamespace"`
	PodName      string `json:"podName"`
	PodUID       string `json:"podUID"`
	// ServiceAccount is empty for a static pod.
	ServiceAccount string `json:"serviceAccount"`
	// TargetPath is where the volume is mounted, clean and absolute.
	TargetPath string `json:"targetPath"`
	// Source is the directory that is mounted, as the driver sees it.
	Source string `json:"source"`
	// SourceDev and SourceIno identify the directory that is mounted, for as
	// long as it is: an inode that is mounted is not given to another file.
	SourceDev uint64 `json:"sourceDev"`
	SourceIno uint64 `json:"sourceIno"`
	// Published is when the record was first written, in UTC.
	Published time.Time `json:"published"`
}

// Pod is what the record says about the pod.
func (r Record) Pod() attest.Pod {
	return attest.Pod{
		UID:            r.PodUID,
		Namespace:      r.PodNamespace,
		Name:           r.PodName,
		ServiceAccount: r.ServiceAccount,
		Witness:        attest.WitnessLedger,
	}
}

// Same says whether both records state the same facts, whenever they were
// written.
func (r Record) Same(o Record) bool {
	r.Version, r.Published = o.Version, o.Published
	return r == o
}

// Validate names what keeps a record from being written.
func (r Record) Validate() error {
	for _, f := range []struct {
		name, value string
		max         int
		optional    bool
	}{
		{name: "volumeID", value: r.VolumeID, max: 256},
		{name: "volumeName", value: r.VolumeName, max: 253},
		{name: "podNamespace", value: r.PodNamespace, max: 253},
		{name: "podName", value: r.PodName, max: 253},
		{name: "podUID", value: r.PodUID, max: 128},
		{name: "serviceAccount", value: r.ServiceAccount, max: 253, optional: true},
		{name: "targetPath", value: r.TargetPath, max: 4096},
		{name: "source", value: r.Source, max: 4096},
	} {
		switch {
		case f.value == "" && !f.optional:
			return fmt.Errorf("%s is empty", f.name)
		case len(f.value) > f.max:
			return fmt.Errorf("%s has %d bytes, the most is %d", f.name, len(f.value), f.max)
		case strings.ToValidUTF8(f.value, "") != f.value || strings.ContainsFunc(f.value, isControl):
			return fmt.Errorf("%s has characters that are not text", f.name)
		}
	}
	for name, p := range map[string]string{"targetPath": r.TargetPath, "source": r.Source} {
		if !path.IsAbs(p) || path.Clean(p) != p {
			return fmt.Errorf("%s %q is not a clean absolute path", name, p)
		}
	}
	if y := r.Published.Year(); r.Published.IsZero() || y < 1970 || y > 9999 {
		return errors.New("published is not a time")
	}
	return nil
}

func isControl(c rune) bool { return c < 0x20 || c == 0x7f }

// Encode is the one form a record has on disk.
func Encode(r Record) ([]byte, error) {
	r.Version = Version
	r.Published = r.Published.UTC()
	if err := r.Validate(); err != nil {
		return nil, fmt.Errorf("encode ledger record: %w", err)
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(r); err != nil {
		return nil, fmt.Errorf("encode ledger record: %w", err)
	}
	if b.Len() > MaxFileSize {
		return nil, fmt.Errorf("encode ledger record: %d bytes, the most is %d", b.Len(), MaxFileSize)
	}
	return b.Bytes(), nil
}

// Decode reads what Encode wrote and nothing else; errors wrap ErrCorrupt or
// ErrVersion.
func Decode(data []byte) (Record, error) {
	if len(data) > MaxFileSize {
		return Record{}, fmt.Errorf("%w: more than %d bytes", ErrCorrupt, MaxFileSize)
	}
	var r Record
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	err := dec.Decode(&r)
	if r.Version != 0 && r.Version != Version {
		return Record{}, fmt.Errorf("%w: %d, this program reads %d", ErrVersion, r.Version, Version)
	}
	if err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	// encoding/json forgives what no writer of ours writes: repeated keys,
	// keys in another case, text after the record.
	again, err := Encode(r)
	if err != nil {
		return Record{}, fmt.Errorf("%w: %w", ErrCorrupt, err)
	}
	if !bytes.Equal(again, data) {
		return Record{}, fmt.Errorf("%w: not in the form it is written in", ErrCorrupt)
	}
	// The decoded time may carry a location that equal times do not share.
	r.Published = r.Published.UTC()
	return r, nil
}

var plainID = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,127}$`)

// FileName is the name of a volume's record: the volume ID where it is as the
// kubelet makes it, otherwise a hash of it. No two IDs share one.
func FileName(volumeID string) string {
	if plainID.MatchString(volumeID) && !strings.HasPrefix(volumeID, "sha256-") {
		return volumeID + suffix
	}
	sum := sha256.Sum256([]byte(volumeID))
	return "sha256-" + hex.EncodeToString(sum[:]) + suffix
}
