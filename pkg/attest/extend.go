package attest

// Credentialed is a Process that knows the supplementary groups its process
// had at connect(2). Without it they are read when the caller is bound.
type Credentialed interface {
	Process
	// Groups are the numbers in this process's user namespace.
	Groups() ([]uint32, error)
}

// Container is what is known of one container of a pod.
type Container struct {
	ID   string
	Name string
	// Selectors are further k8s selectors of this container (images).
	Selectors []Selector
}

// ContainerSource is a PodSource that also knows containers. The notify of
// Watch also tells of a pod's containers.
type ContainerSource interface {
	PodSource
	// Container is what is known of a container now; false if nothing is.
	Container(podUID, containerID string) (Container, bool)
}

// JoinedSource is a PodSource that joins several witnesses. What each of them
// says is compared as if it were alone, so that joining hides no disagreement.
type JoinedSource interface {
	PodSource
	// Testimony is what each witness that knows the pod says of it now, one Pod
	// per witness.
	Testimony(uid string) []Pod
}

// WitnessLedger is the Pod.Witness of facts from the publish ledger, the one
// RequireLedger asks for. A source that joins several lists them separated by
// commas.
const WitnessLedger = "ledger"

// Denied is the reason for which a subject that was bound has been denied
// since, and wraps ErrDenied; nil for all others. Such a subject has no
// selectors any more.
func Denied(s Subject) error {
	if d, ok := s.(interface{ Err() error }); ok {
		return d.Err()
	}
	return nil
}
