package registration

import (
	"crypto/sha256"
	"encoding/hex"
	"regexp"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

// Kinds of resources.
const (
	kindSPIFFEID  = "ClusterSPIFFEID"
	kindStatic    = "ClusterStaticEntry"
	kindFederated = "ClusterFederatedTrustDomain"
)

// source is a resource that declares entries, with what became of them.
type source struct {
	kind       string
	name       string
	uid        types.UID
	created    time.Time
	deleting   time.Time // zero = not being deleted
	generation int64
	// refused is why the newest specification is not in force, nil if it is.
	refused error
	// valid is the generation in force; 0 = none.
	valid int64

	masked  int // declarations that lose against an older one
	toSet   int // declarations that win
	success int // winners that are stored
	// failures are the winners the authority refuses.
	failures map[*declaration]error
	// unfederated counts stored winners without some of their federated
	// bundles.
	unfederated map[*declaration]bool

	// observed is the status as the API server has it.
	observed observedStatus
	// writes of the status that did not last: somebody else writes it too.
	contested int
}

// observedStatus is one of the statuses; the others are nil.
type observedStatus struct {
	spiffeID  *v1alpha1.ClusterSPIFFEIDStatus
	static    *v1alpha1.ClusterStaticEntryStatus
	federated *v1alpha1.ClusterFederatedTrustDomainStatus
}

func newSource(kind string, m *metav1.ObjectMeta) *source {
	s := &source{kind: kind, uid: m.UID, failures: make(map[*declaration]error), unfederated: make(map[*declaration]bool)}
	s.meta(m)
	return s
}

// meta takes over what may have changed.
func (s *source) meta(m *metav1.ObjectMeta) {
	s.name, s.generation, s.created = m.Name, m.Generation, m.CreationTimestamp.Time
	s.deleting = time.Time{}
	if m.DeletionTimestamp != nil {
		s.deleting = m.DeletionTimestamp.Time
	}
}

// same says whether the newest object has the specification that was decided
// on before.
func (s *source) same(m *metav1.ObjectMeta) bool {
	decided := s.valid > 0 || s.refused != nil
	return decided && m.Generation != 0 && s.generation == m.Generation && s.deleting.IsZero() == (m.DeletionTimestamp == nil)
}

// before says which of two sources wins where both declare the same entry: the
// older; among equals the one that is not being deleted, or is so later; then
// the lower UID.
func (s *source) before(o *source) bool {
	switch {
	case !s.created.Equal(o.created):
		return s.created.Before(o.created)
	case s.deleting.IsZero() != o.deleting.IsZero():
		return s.deleting.IsZero()
	case !s.deleting.Equal(o.deleting):
		return s.deleting.After(o.deleting)
	default:
		return s.uid < o.uid
	}
}

// EntryPrefix begins the IDs of entries written here. What follows are 32
// hexadecimal digits and, rarely, a dash and 8 more.
const EntryPrefix = "reg-"

// entryID is the ID that the entry of a resource, for a pod if there is one,
// prefers: the same after each restart.
func entryID(source, pod types.UID) string {
	h := sha256.Sum256([]byte(string(source) + "\x00" + string(pod)))
	return EntryPrefix + hex.EncodeToString(h[:16])
}

// ownership recognises our IDs.
type ownership struct{ re *regexp.Regexp }

func newOwnership() ownership {
	return ownership{regexp.MustCompile(`\A` + EntryPrefix + `[0-9a-f]{32}(-[0-9a-f]{8})?\z`)}
}

func (o ownership) owns(id string) bool {
	return strings.HasPrefix(id, EntryPrefix) && o.re.MatchString(id)
}
