package main

import (
	"os"
	"path/filepath"
)

// Platform is an operating system and an architecture as Go names them.
type Platform struct{ OS, Arch string }

func (p Platform) dir(bin string) string { return filepath.Join(bin, p.OS+"-"+p.Arch) }

// Image is what goes into one image.
type Image struct {
	Name        string
	Description string
	// Binaries are path in the image -> file in the directory of binaries.
	Binaries map[string]string
	// Links are path -> target of symbolic links.
	Links map[string]string
	// Dirs are empty directories with their modes.
	Dirs       map[string]int64
	Entrypoint string
	// WorkingDir is / if it is empty.
	WorkingDir string
	User       string
	Env        []string
	Ports      []string
}

// adminSocket is where SPIRE's images have the server's socket.
const adminSocket = "/tmp/spire-server/private/api.sock"

// Images are the images of this repository.
func Images() []Image {
	return []Image{
		{
			Name:        "csi-driver",
			Description: "CSI node plugin csi.spiffe.io: mounts the node's SPIFFE socket directory into pods",
			Binaries:    map[string]string{"/csi-driver": "csi-driver"},
			Entrypoint:  "/csi-driver",
			User:        "0:0", // mounts
			Ports:       []string{"9810/tcp"},
		},
		{
			Name:        "sds-agent",
			Description: "Attests the callers of a node's socket and serves them SPIFFE identities over Envoy SDS v3 and the SPIFFE Workload API",
			Binaries:    map[string]string{"/sds-agent": "sds-agent", "/kubectl-spiffe": "kubectl-spiffe"},
			Entrypoint:  "/sds-agent",
			User:        "0:0", // owns directories of the host
			Ports:       []string{"9982/tcp"},
		},
		{
			Name:        "authority",
			Description: "CA and registrar of a SPIFFE trust domain, with the SPIRE Server API",
			Binaries:    map[string]string{"/authority": "authority", "/kubectl-spiffe": "kubectl-spiffe"},
			Links: map[string]string{
				// What SPIRE's documents tell people to run ...
				"/opt/spire/bin/spire-server": "/kubectl-spiffe",
				// ... and the socket that older ones of them name.
				"/run/spire/sockets/server.sock": adminSocket,
			},
			Dirs:       map[string]int64{"/tmp": 0o1777},
			Entrypoint: "/authority",
			WorkingDir: "/opt/spire", // Istio's guide runs ./bin/spire-server
			User:       "1000:1000",
			Env:        []string{"SPIRE_SERVER_PRIVATE_SOCKET=" + adminSocket},
			Ports:      []string{"8081/tcp", "8080/tcp"},
		},
	}
}

// missing is the first binary that is not there, or "".
func (i Image) missing(bin string, platforms []Platform) string {
	for _, p := range platforms {
		for _, file := range i.Binaries {
			path := filepath.Join(p.dir(bin), file)
			if _, err := os.Stat(path); err != nil {
				return path
			}
		}
	}
	return ""
}
