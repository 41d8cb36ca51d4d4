package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const (
	defaultSocket     = "/run/spiffe-node/admin/api.sock"
	envSocket         = "SPIRE_SERVER_PRIVATE_SOCKET"
	envSocketTemplate = "SPIRE_SERVER_PRIVATE_SOCKET_TEMPLATE"
)

// callTimeout bounds each call, so that a stuck server cannot hold a script for
// ever.
const callTimeout = time.Minute

// socket decides which socket is meant: the flag, then the instance, then the
// environment, then the default.
func (a *app) socket() (string, error) {
	switch {
	case a.socketPath != defaultSocket:
		return a.socketPath, nil
	case a.instance != "":
		template := a.getenv(envSocketTemplate)
		switch {
		case template == "":
			return "", fmt.Errorf("you must define %s to use the instance flag", envSocketTemplate)
		case !strings.Contains(template, "%i"):
			return "", fmt.Errorf("failed to find %%i in %s", envSocketTemplate)
		}
		return strings.ReplaceAll(template, "%i", a.instance), nil
	}
	if path := a.getenv(envSocket); path != "" {
		return path, nil
	}
	return a.socketPath, nil
}

// connect hands a connection to use and closes it: to the socket of this
// machine, or to a part of spiffe-node in the cluster.
func (a *app) connect(use func(grpc.ClientConnInterface) error) error {
	if a.inCluster() {
		return a.connectFar(a.ctx, use)
	}
	path, err := a.socket()
	if err != nil {
		return err
	}
	path = strings.TrimPrefix(path, "unix://")
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()), boundCalls())
	if err != nil {
		return err
	}
	return errors.Join(use(conn), conn.Close())
}
