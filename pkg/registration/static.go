package registration

import (
	"log/slog"

	"k8s.io/apimachinery/pkg/types"

	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

// staticState is a ClusterStaticEntry.
type staticState struct {
	*source
	decl *declaration // nil = never was valid
}

// setStatic takes over a ClusterStaticEntry.
func (x *engine) setStatic(c *v1alpha1.ClusterStaticEntry) {
	x.replaceNamed(kindStatic, c.Name, c.UID)
	if !x.handles(c.Spec.ClassName) {
		x.notOurs(kindStatic, c.Name, c.UID, c.Spec.ClassName)
		return
	}
	delete(x.otherClass, kindStatic+"/"+c.Name)
	s := x.statics[c.UID]
	if s == nil {
		s = &staticState{source: newSource(kindStatic, &c.ObjectMeta)}
		x.statics[c.UID] = s
	}
	unchanged := s.same(&c.ObjectMeta)
	s.meta(&c.ObjectMeta)
	s.observed.static = &c.Status
	x.touch(s.source)
	if unchanged {
		return
	}
	e, err := x.renderStatic(&c.Spec)
	x.accept(s.source, err)
	if err != nil {
		return
	}
	s.decl = x.replace(s.decl, e, s.source, nil)
	x.dirty[s.decl.group] = true
	x.releaseHeld(s.uid)
}

func (x *engine) deleteStatic(uid types.UID) {
	s := x.statics[uid]
	if s == nil {
		return
	}
	x.replace(s.decl, nil, s.source, nil)
	x.dropSource(s.source)
	x.releaseHeld(uid)
	delete(x.statics, uid)
}

// replaceNamed forgets an older resource of the same name: an informer may
// show a deletion and a new creation as one change.
func (x *engine) replaceNamed(kind, name string, uid types.UID) {
	key := kind + "/" + name
	if old := x.byName[key]; old != "" && old != uid {
		x.deleteResource(kind, name)
	}
	x.byName[key] = uid
}

// deleteResource forgets a resource.
func (x *engine) deleteResource(kind, name string) {
	key := kind + "/" + name
	uid := x.byName[key]
	delete(x.byName, key)
	delete(x.otherClass, key)
	switch kind {
	case kindSPIFFEID:
		x.deleteRule(uid)
	case kindStatic:
		x.deleteStatic(uid)
	case kindFederated:
		x.deleteFederated(uid)
	}
}

// notOurs forgets a resource, if it was ours before, whose class says that
// somebody else handles it. It is said aloud once, for a wrong class name
// looks just like this.
func (x *engine) notOurs(kind, name string, uid types.UID, class string) {
	key := kind + "/" + name
	said := x.otherClass[key]
	x.deleteResource(kind, name)
	x.byName[key], x.otherClass[key] = uid, class
	x.resourcesDirty = true
	if said == class {
		return
	}
	x.Logger.Warn("resource is left to another controller for its className; leave that empty, or give it ours, to have it handled here",
		slog.String("kind", kind), slog.String("name", name), slog.String("class", class), slog.String("ours", x.ClassName))
}

// accept notes whether the newest specification is valid.
func (x *engine) accept(s *source, err error) {
	switch {
	case err == nil:
		s.valid = max(s.generation, 1)
	case s.refused == nil || s.refused.Error() != err.Error():
		x.Logger.Warn("resource is refused", slog.String("kind", s.kind), slog.String("name", s.name),
			slog.Bool("last_valid_in_force", s.valid > 0), slog.String("error", oneLine(err)))
	}
	s.refused = err
	x.resourcesDirty = true
}
