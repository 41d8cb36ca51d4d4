// Package kubereview asks the API server who a token belongs to and what its
// owner may: TokenReview and SubjectAccessReview.
//
// It promises to send a token to the API server and to nobody else, to log
// none, and to take an answer it does not understand for a no. The process needs
// create on tokenreviews and on subjectaccessreviews, which the ClusterRole
// system:auth-delegator gives.
package kubereview

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/spiffe-node/spiffe-node/internal/inspecttls"
)

// Reviewer is the API server. Safe for concurrent use.
type Reviewer struct{ client rest.Interface }

var _ inspecttls.Reviewer = (*Reviewer)(nil)

// New is a client of the API server of a kubeconfig, or with an empty one of
// the pod this process runs in. It does not connect.
func New(kubeconfig, userAgent string) (*Reviewer, error) {
	var cfg *rest.Config
	var err error
	if kubeconfig == "" {
		cfg, err = rest.InClusterConfig()
	} else {
		cfg, err = clientcmd.BuildConfigFromFlags("", kubeconfig)
	}
	if err != nil {
		return nil, fmt.Errorf("configure the API server's client: %w", err)
	}
	scheme := runtime.NewScheme()
	metav1.AddToGroupVersion(scheme, metav1.Unversioned)
	cfg.NegotiatedSerializer = serializer.NewCodecFactory(scheme).WithoutConversion()
	cfg.UserAgent, cfg.WarningHandler = userAgent, rest.NoWarnings{}
	client, err := rest.UnversionedRESTClientFor(cfg)
	if err != nil {
		return nil, fmt.Errorf("configure the API server's client: %w", err)
	}
	return &Reviewer{client}, nil
}

// Token is a TokenReview.
func (r *Reviewer) Token(ctx context.Context, token, audience string) (inspecttls.User, error) {
	var out authenticationv1.TokenReview
	err := r.create(ctx, "/apis/authentication.k8s.io/v1/tokenreviews", &authenticationv1.TokenReview{
		TypeMeta: metav1.TypeMeta{APIVersion: "authentication.k8s.io/v1", Kind: "TokenReview"},
		Spec:     authenticationv1.TokenReviewSpec{Token: token, Audiences: []string{audience}},
	}, &out)
	switch {
	case err != nil:
		return inspecttls.User{}, fmt.Errorf("token review: %w", err)
	case !out.Status.Authenticated:
		return inspecttls.User{}, inspecttls.ErrUnknownToken
	case !slices.Contains(out.Status.Audiences, audience):
		// An API server that knows no audiences authenticates for its own.
		return inspecttls.User{}, fmt.Errorf("token review: not for audience %s: %w", audience, inspecttls.ErrUnknownToken)
	case out.Status.User.Username == "":
		return inspecttls.User{}, errors.New("token review: a user without a name")
	}
	u := out.Status.User
	user := inspecttls.User{Name: u.Username, UID: u.UID, Groups: u.Groups, Extra: map[string][]string{}}
	for k, v := range u.Extra {
		user.Extra[k] = v
	}
	return user, nil
}

// Access is a SubjectAccessReview.
func (r *Reviewer) Access(ctx context.Context, user inspecttls.User, a inspecttls.Access) (bool, error) {
	extra := map[string]authorizationv1.ExtraValue{}
	for k, v := range user.Extra {
		extra[k] = v
	}
	var out authorizationv1.SubjectAccessReview
	err := r.create(ctx, "/apis/authorization.k8s.io/v1/subjectaccessreviews", &authorizationv1.SubjectAccessReview{
		TypeMeta: metav1.TypeMeta{APIVersion: "authorization.k8s.io/v1", Kind: "SubjectAccessReview"},
		Spec: authorizationv1.SubjectAccessReviewSpec{
			User: user.Name, UID: user.UID, Groups: user.Groups, Extra: extra,
			ResourceAttributes: &authorizationv1.ResourceAttributes{
				Verb: a.Verb, Group: a.Group, Version: "*", Resource: a.Resource, Subresource: a.Subresource, Namespace: a.Namespace, Name: a.Name,
			},
		},
	}, &out)
	if err != nil {
		return false, fmt.Errorf("access review: %w", err)
	}
	return out.Status.Allowed && !out.Status.Denied, nil
}

func (r *Reviewer) create(ctx context.Context, path string, object, into any) error {
	body, err := json.Marshal(object)
	if err != nil {
		return err
	}
	res := r.client.Post().AbsPath(path).SetHeader("Content-Type", runtime.ContentTypeJSON).Body(body).Do(ctx)
	if err := res.Error(); err != nil {
		return err
	}
	data, err := res.Raw()
	if err != nil {
		return err
	}
	return json.Unmarshal(data, into)
}
