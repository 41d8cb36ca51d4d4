package csi

import (
	"context"
	"fmt"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// GetPluginInfo names the driver and its version.
func (d *Driver) GetPluginInfo(context.Context, *csipb.GetPluginInfoRequest) (*csipb.GetPluginInfoResponse, error) {
	return &csipb.GetPluginInfoResponse{Name: d.cfg.Name, VendorVersion: d.cfg.Version}, nil
}

// GetPluginCapabilities is empty: there is no controller.
func (d *Driver) GetPluginCapabilities(context.Context, *csipb.GetPluginCapabilitiesRequest) (*csipb.GetPluginCapabilitiesResponse, error) {
	return &csipb.GetPluginCapabilitiesResponse{}, nil
}

// Probe says ready only while a publish would work. It is no liveness check: a
// restart of the driver does not bring an absent agent back.
func (d *Driver) Probe(context.Context, *csipb.ProbeRequest) (*csipb.ProbeResponse, error) {
	return &csipb.ProbeResponse{Ready: wrapperspb.Bool(d.Ready() == nil)}, nil
}

// Ready is nil while a publish would work: the socket directory is there, the
// agent answers if that is asked for, and the ledger can be written.
func (d *Driver) Ready() error {
	src, err := d.openSource()
	if err != nil {
		return err
	}
	defer src.Close()
	if err := d.agent.check(src); err != nil {
		return err
	}
	return d.cfg.Ledger.Writable()
}

// Live is nil unless only a new process in a new container can help: the
// socket directory that is mounted at the configured path was deleted on the
// host, and a mount does not follow its path to a new directory.
func (d *Driver) Live() error {
	src, err := mountSource(d.cfg.SourceDir)
	if err != nil {
		return nil // absent is a matter of readiness: it may come
	}
	defer src.Close()
	if src.Deleted() {
		return fmt.Errorf("%s shows a directory that was deleted on the host: the container must be started again", d.cfg.SourceDir)
	}
	return nil
}
