package podinfo

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/spiffe-node/spiffe-node/internal/podfacts"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// Runtime asks the container runtime (CRI v1) for single containers. The socket
// is root's: whoever may use it may run anything on the node, so it is opt-in.
// Safe for concurrent use.
type Runtime struct {
	conn *grpc.ClientConn
}

// NewRuntime is a client of the runtime at a unix socket; it connects when it is
// first asked.
func NewRuntime(socket string) (*Runtime, error) {
	if !filepath.IsAbs(socket) {
		return nil, fmt.Errorf("podinfo: the runtime's socket %q is not an absolute path", socket)
	}
	conn, err := grpc.NewClient("unix://"+socket,
		grpc.WithTransportCredentials(insecure.NewCredentials()), // a socket of root's
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(bytesCodec{}), grpc.MaxCallRecvMsgSize(maxStatus)),
		grpc.WithNoProxy())
	if err != nil {
		return nil, fmt.Errorf("podinfo: client of the container runtime: %w", err)
	}
	return &Runtime{conn: conn}, nil
}

// Close ends the connection.
func (r *Runtime) Close() error { return r.conn.Close() }

const (
	// maxStatus bounds a container's status, in bytes.
	maxStatus = 1 << 20
	// The status of a container whose process calls exists; the runtime may be
	// restarting all the same.
	runtimeTries = 4
	runtimePause = 100 * time.Millisecond
)

// errStranger: the runtime's container is not one of the pod's.
var errStranger = errors.New("the container is not the pod's")

// container asks for one container and checks that it belongs to the pod.
func (r *Runtime) container(ctx context.Context, podUID, id string) (attest.Container, error) {
	req := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), id)
	var resp []byte
	if err := r.conn.Invoke(ctx, "/runtime.v1.RuntimeService/ContainerStatus", &req, &resp); err != nil {
		return attest.Container{}, err
	}
	c, err := parseStatus(resp)
	switch {
	case err != nil:
		return attest.Container{}, fmt.Errorf("status of container %s: %w", id, err)
	case c.id != id, c.labels["io.kubernetes.pod.uid"] != podUID, c.labels["io.kubernetes.container.name"] == "":
		return attest.Container{}, fmt.Errorf("%w: %s says it is container %q of pod %q", errStranger, id, c.id, c.labels["io.kubernetes.pod.uid"])
	}
	b := podfacts.NewBuilder(podfacts.MaxText)
	b.Image("container-image:", c.image, c.imageRef)
	return attest.Container{ID: id, Name: c.labels["io.kubernetes.container.name"], Selectors: b.Done()}, nil
}

// criStatus is what is read of runtime.v1.ContainerStatus. Image and imageRef
// are what the kubelet makes the API's image and imageID of, so that the
// selectors are the same before and after the status has them.
type criStatus struct {
	id, image, imageRef string
	labels              map[string]string
}

// parseStatus reads a runtime.v1.ContainerStatusResponse. Four of its fields are
// needed: the generated code for all of CRI would weigh more than the agent's
// own.
func parseStatus(resp []byte) (criStatus, error) {
	out := criStatus{labels: map[string]string{}}
	err := eachField(resp, func(n protowire.Number, v []byte) error {
		if n != 1 { // status
			return nil
		}
		return eachField(v, func(n protowire.Number, v []byte) error {
			switch n {
			case 1:
				out.id = string(v)
			case 8: // image
				return eachField(v, func(n protowire.Number, v []byte) error {
					if n == 1 {
						out.image = string(v)
					}
					return nil
				})
			case 9:
				out.imageRef = string(v)
			case 12: // labels
				var key, value string
				err := eachField(v, func(n protowire.Number, v []byte) error {
					switch n {
					case 1:
						key = string(v)
					case 2:
						value = string(v)
					}
					return nil
				})
				out.labels[key] = value
				return err
			}
			return nil
		})
	})
	return out, err
}

// eachField calls each for every length-delimited field of a message.
func eachField(msg []byte, each func(protowire.Number, []byte) error) error {
	for len(msg) > 0 {
		num, typ, n := protowire.ConsumeTag(msg)
		if n < 0 {
			return protowire.ParseError(n)
		}
		msg = msg[n:]
		if typ != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(num, typ, msg); n < 0 {
				return protowire.ParseError(n)
			}
			msg = msg[n:]
			continue
		}
		v, n := protowire.ConsumeBytes(msg)
		if n < 0 {
			return protowire.ParseError(n)
		}
		msg = msg[n:]
		if err := each(num, v); err != nil {
			return err
		}
	}
	return nil
}

// bytesCodec passes messages through as *[]byte.
type bytesCodec struct{}

func (bytesCodec) Name() string { return "proto" }

func (bytesCodec) Marshal(v any) (mem.BufferSlice, error) {
	b, ok := v.(*[]byte)
	if !ok {
		return nil, fmt.Errorf("message is %T, not bytes", v)
	}
	return mem.BufferSlice{mem.SliceBuffer(*b)}, nil
}

func (bytesCodec) Unmarshal(data mem.BufferSlice, v any) error {
	b, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("message is %T, not bytes", v)
	}
	*b = data.Materialize()
	return nil
}

// askRuntime looks a container up that no status shows yet.
func (s *Source) askRuntime(ctx context.Context, n containerName) {
	pause := runtimePause
	for try := range runtimeTries {
		if try > 0 {
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
			pause *= 3
		}
		if s.store.get(n.pod).has(n.id) {
			return // a status shows it by now
		}
		s.cfg.Metrics.requests.WithLabelValues("runtime").Inc()
		callCtx, cancel := context.WithTimeout(ctx, fetchTimeout)
		c, err := s.cfg.Runtime.container(callCtx, n.pod, n.id)
		cancel()
		switch {
		case err == nil:
			s.runtime.synced()
			s.store.putContainer(n.pod, c)
			return
		case errors.Is(err, errStranger):
			s.runtime.down(err) // not what the cgroup says: worth a look
			return
		case status.Code(err) == codes.NotFound:
			s.runtime.up()
		case ctx.Err() != nil:
			return
		default:
			s.runtime.down(fmt.Errorf("container %s: %w", n.id, err))
		}
	}
}
