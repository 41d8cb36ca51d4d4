package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// object is the part of any Kubernetes object that this package reads.
type object struct {
	Metadata Metadata `json:"metadata"`
	Spec     struct {
		Taints []struct{ Key, Effect string } `json:"taints"`
	} `json:"spec"`
	Status struct {
		Conditions []Condition `json:"conditions"`
	} `json:"status"`
}

// Metadata is an object's, as far as tests ask for it.
type Metadata struct {
	Name              string            `json:"name"`
	Namespace         string            `json:"namespace"`
	UID               string            `json:"uid"`
	Labels            map[string]string `json:"labels"`
	CreationTimestamp time.Time         `json:"creationTimestamp"`
	DeletionTimestamp *time.Time        `json:"deletionTimestamp"`
}

// Condition is one of an object's conditions.
type Condition struct{ Type, Status, Reason, Message string }

// ContainerStatus is what the kubelet says of a container.
type ContainerStatus struct {
	Name         string `json:"name"`
	ContainerID  string `json:"containerID"`
	Ready        bool   `json:"ready"`
	RestartCount int    `json:"restartCount"`
}

// Pod is a pod as tests see it.
type Pod struct {
	Metadata Metadata `json:"metadata"`
	Spec     struct {
		NodeName           string `json:"nodeName"`
		ServiceAccountName string `json:"serviceAccountName"`
	} `json:"spec"`
	Status struct {
		Phase             string            `json:"phase"`
		Reason            string            `json:"reason"`
		PodIP             string            `json:"podIP"`
		Conditions        []Condition       `json:"conditions"`
		ContainerStatuses []ContainerStatus `json:"containerStatuses"`
	} `json:"status"`
}

func (o *object) condition(kind string) error { return condition(o.Status.Conditions, kind) }

// Ready returns nil when the pod is Ready, else why not.
func (p *Pod) Ready() error {
	if p.Metadata.DeletionTimestamp != nil {
		return fmt.Errorf("pod %s/%s is being deleted", p.Metadata.Namespace, p.Metadata.Name)
	}
	if err := condition(p.Status.Conditions, "Ready"); err != nil {
		return fmt.Errorf("pod %s/%s (%s): %w", p.Metadata.Namespace, p.Metadata.Name, p.Status.Phase, err)
	}
	return nil
}

func condition(all []Condition, kind string) error {
	for _, c := range all {
		if c.Type == kind {
			if c.Status == "True" {
				return nil
			}
			return fmt.Errorf("not %s: %s: %s", kind, c.Reason, c.Message)
		}
	}
	return fmt.Errorf("not %s: no such condition yet", kind)
}

// APIError is an answer of the API server other than success.
type APIError struct {
	Code    int
	Message string
}

func (e *APIError) Error() string { return fmt.Sprintf("API server: %d: %s", e.Code, e.Message) }

// IsNotFound reports whether err is the API server's 404.
func IsNotFound(err error) bool {
	var e *APIError
	return errors.As(err, &e) && e.Code == http.StatusNotFound
}

// API sends one request as cluster administrator: path begins with /api, body
// (nil for none) and into (nil to ignore the answer) are JSON values; an into
// of type *string gets the answer as it is.
func (c *Cluster) API(ctx context.Context, method, path string, body, into any) error {
	var payload io.Reader
	if body != nil {
		raw, err := json.Marshal(body)
		if err != nil {
			return fmt.Errorf("encoding the body for %s %s: %w", method, path, err)
		}
		payload = bytes.NewReader(raw)
	}
	req, err := http.NewRequestWithContext(ctx, method, fmt.Sprintf("https://127.0.0.1:%d%s", c.state.Port, path), payload)
	if err != nil {
		return err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
		if method == http.MethodPatch {
			req.Header.Set("Content-Type", "application/merge-patch+json")
		}
	}
	res, err := c.api.Do(req)
	if err != nil {
		return fmt.Errorf("asking the API server: %w", err)
	}
	defer res.Body.Close()
	answer, err := io.ReadAll(res.Body)
	if err != nil {
		return fmt.Errorf("reading the API server's answer to %s %s: %w", method, path, err)
	}
	if res.StatusCode >= 300 {
		var status struct{ Message string }
		if json.Unmarshal(answer, &status) != nil || status.Message == "" {
			status.Message = string(answer)
		}
		return &APIError{Code: res.StatusCode, Message: status.Message}
	}
	switch into := into.(type) {
	case nil:
		return nil
	case *string:
		*into = string(answer)
		return nil
	default:
		return json.Unmarshal(answer, into)
	}
}

// Pod reads one pod.
func (c *Cluster) Pod(ctx context.Context, namespace, name string) (*Pod, error) {
	var pod Pod
	return &pod, c.API(ctx, http.MethodGet, podPath(namespace, name), nil, &pod)
}

// Pods lists the pods of a namespace, all of them when it is empty; selector is
// a label selector or empty.
func (c *Cluster) Pods(ctx context.Context, namespace, selector string) ([]Pod, error) {
	path := "/api/v1/pods"
	if namespace != "" {
		path = podPath(namespace, "")
	}
	if selector != "" {
		path += "?labelSelector=" + queryEscape(selector)
	}
	var list struct{ Items []Pod }
	return list.Items, c.API(ctx, http.MethodGet, path, nil, &list)
}

// CreatePod creates a pod from its JSON form, any value that encodes to it.
func (c *Cluster) CreatePod(ctx context.Context, namespace string, pod any) (*Pod, error) {
	var made Pod
	return &made, c.API(ctx, http.MethodPost, podPath(namespace, ""), pod, &made)
}

// DeletePod asks for a pod's deletion and does not wait for it; see [Cluster.WaitGone].
// A negative grace means the pod's own, 0 forces.
func (c *Cluster) DeletePod(ctx context.Context, namespace, name string, grace time.Duration) error {
	var options any
	if grace >= 0 {
		options = map[string]any{"kind": "DeleteOptions", "apiVersion": "v1", "gracePeriodSeconds": int(grace / time.Second)}
	}
	return c.API(ctx, http.MethodDelete, podPath(namespace, name), options, nil)
}

// Logs reads what a container has written so far; container may be empty when there is one.
func (c *Cluster) Logs(ctx context.Context, namespace, pod, container string) (string, error) {
	path := podPath(namespace, pod) + "/log"
	if container != "" {
		path += "?container=" + queryEscape(container)
	}
	var text string
	return text, c.API(ctx, http.MethodGet, path, nil, &text)
}

// WaitReady waits until a pod is Ready.
func (c *Cluster) WaitReady(ctx context.Context, namespace, name string) (*Pod, error) {
	var pod *Pod
	err := Poll(ctx, 50*time.Millisecond, func(ctx context.Context) (err error) {
		if pod, err = c.Pod(ctx, namespace, name); err != nil {
			return err
		}
		return pod.Ready()
	})
	return pod, err
}

// WaitGone waits until a pod with this UID is gone from the API server.
func (c *Cluster) WaitGone(ctx context.Context, namespace, name, uid string) error {
	return Poll(ctx, 50*time.Millisecond, func(ctx context.Context) error {
		pod, err := c.Pod(ctx, namespace, name)
		switch {
		case IsNotFound(err):
			return nil
		case err != nil:
			return err
		case pod.Metadata.UID != uid:
			return nil
		}
		return fmt.Errorf("pod %s/%s is still there, phase %s", namespace, name, pod.Status.Phase)
	})
}

// NodeLogs is Logs read from the node's files, which needs neither API server
// nor kubelet. It is what the container's newest run has written.
func (c *Cluster) NodeLogs(pod *Pod, container string) (string, error) {
	m := pod.Metadata
	dir := c.NodePath(filepath.Join("/var/log/pods", m.Namespace+"_"+m.Name+"_"+m.UID, container))
	for restart := 64; restart >= 0; restart-- {
		raw, err := os.ReadFile(filepath.Join(dir, strconv.Itoa(restart)+".log"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return "", fmt.Errorf("reading the log of %s/%s: %w", m.Namespace, m.Name, err)
		}
		var text strings.Builder
		for line := range strings.Lines(string(raw)) {
			// Time, stream, F for full or P for partial, text.
			if f := strings.SplitN(line, " ", 4); len(f) == 4 {
				if f[2] == "P" {
					f[3] = strings.TrimSuffix(f[3], "\n")
				}
				text.WriteString(f[3])
			}
		}
		return text.String(), nil
	}
	return "", fmt.Errorf("container %s of %s/%s has no log on the node yet", container, m.Namespace, m.Name)
}
