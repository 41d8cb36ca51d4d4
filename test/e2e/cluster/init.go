package cluster

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// Environment of the re-executed binary: which stage it is, and the cluster's
// scratch directory.
const (
	stageVar = "SPIFFE_NODE_E2E_STAGE"
	dirVar   = "SPIFFE_NODE_E2E_DIR"
)

// Files that init inherits.
const (
	apiListenerFD = 3 // TCP listener on the host's loopback
	lifelineFD    = 4 // read end of a pipe: at its end the cluster ends
	lockFD        = 5 // the machine's only place for a cluster
	detachFD      = 6 // write end of the lifeline, if the cluster is detached
)

// Main runs this process's part in a cluster and reports whether it had one.
// Every program that calls [Up] calls it first and exits with code when ran
// is true.
func Main() (code int, ran bool) {
	var err error
	switch os.Getenv(stageVar) {
	case "init":
		err = runInit()
	case "supervisor":
		err = runSupervisor(os.Getenv(dirVar))
	default:
		return 0, false
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1, true
	}
	return 0, true
}

// runInit is process 1 of the PID namespace. It starts the supervisor, reaps
// whoever is left to it (containerd's shims are), and ends with the
// supervisor, the lifeline or SIGTERM, and everything else with it.
func runInit() error {
	exe, err := os.Executable()
	if err != nil {
		return fmt.Errorf("finding this executable: %w", err)
	}
	for fd := apiListenerFD; fd <= detachFD; fd++ {
		syscall.CloseOnExec(fd)
	}
	if err := os.Setenv(stageVar, "supervisor"); err != nil {
		return fmt.Errorf("setting the supervisor's stage: %w", err)
	}
	child, err := syscall.ForkExec(exe, os.Args[:1], &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2, apiListenerFD}})
	if err != nil {
		return fmt.Errorf("starting the supervisor: %w", err)
	}
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGTERM, syscall.SIGINT)
	ended := make(chan error, 2)
	go func() {
		var one [1]byte
		_, _ = os.NewFile(lifelineFD, "lifeline").Read(one[:])
		ended <- nil
	}()
	go func() {
		for {
			var status syscall.WaitStatus
			pid, err := syscall.Wait4(-1, &status, 0, nil)
			switch {
			case errors.Is(err, syscall.EINTR):
			case err != nil:
				ended <- fmt.Errorf("waiting for children: %w", err)
				return
			case pid == child:
				ended <- fmt.Errorf("the supervisor ended with status %d", status.ExitStatus())
				return
			}
		}
	}()
	select {
	case <-stop:
		return nil
	case err := <-ended:
		return err
	}
}
