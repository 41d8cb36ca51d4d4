package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// usage is what some processes have used at one moment.
type usage struct {
	at      time.Time
	cpu     time.Duration // user and system, since their start
	rss     int64         // bytes
	threads int
	fds     int
}

// readUsage sums over processes.
func readUsage(pids []int) (usage, error) {
	u := usage{at: time.Now()}
	for _, pid := range pids {
		cpu, err := processCPU(pid)
		if err != nil {
			return u, fmt.Errorf("process %d: %w", pid, err)
		}
		u.cpu += cpu
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		if err != nil {
			return u, fmt.Errorf("process %d: %w", pid, err)
		}
		u.rss += statusNumber(status, "VmRSS") * 1024
		u.threads += int(statusNumber(status, "Threads"))
		// Without the right to look, descriptors stay 0.
		fds, _ := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		u.fds += len(fds)
	}
	return u, nil
}

// processCPU is a process's processor time to the nanosecond, ended threads
// included.
func processCPU(pid int) (time.Duration, error) {
	// The clock of a process, as clock_getcpuclockid(3) makes it.
	const scheduled = 2
	var ts unix.Timespec
	if err := unix.ClockGettime(int32(^pid<<3|scheduled), &ts); err != nil {
		return 0, fmt.Errorf("no processor clock: %w", err)
	}
	return time.Duration(ts.Nano()), nil
}

// ownCPU is what load itself has used.
func ownCPU() time.Duration {
	cpu, err := processCPU(os.Getpid())
	if err != nil {
		return 0
	}
	return cpu
}

func statusNumber(status []byte, name string) int64 {
	for line := range bytes.Lines(status) {
		rest, ok := strings.CutPrefix(string(line), name+":")
		if !ok {
			continue
		}
		if f := strings.Fields(rest); len(f) > 0 {
			n, _ := strconv.ParseInt(f[0], 10, 64)
			return n
		}
	}
	return 0
}

// raiseFiles lets this process open as many files as the kernel allows it.
func raiseFiles(need int) error {
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	lim.Cur = lim.Max
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		return fmt.Errorf("limit of open files: %w", err)
	}
	if lim.Cur < uint64(need) {
		return fmt.Errorf("limit of open files is %d, this run needs %d: raise it with ulimit -n", lim.Cur, need)
	}
	return nil
}

func checkMetricsURL(text string) error {
	if text == "" {
		return nil
	}
	u, err := url.Parse(text)
	if err != nil {
		return fmt.Errorf("-metrics: %w", err)
	}
	ip := net.ParseIP(u.Hostname())
	if u.Scheme != "http" || u.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return fmt.Errorf("-metrics: %s is not an http URL of this machine", text)
	}
	return nil
}

// errNoGoroutines: the page has no such metric.
var errNoGoroutines = errors.New("no go_goroutines there")

// goroutines reads the server's own count.
func goroutines(ctx context.Context, target string) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target, nil)
	if err != nil {
		return 0, fmt.Errorf("metrics: %w", err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("metrics: %w", err)
	}
	defer resp.Body.Close()
	return findGoroutines(io.LimitReader(resp.Body, 16<<20))
}

func findGoroutines(page io.Reader) (int, error) {
	lines := bufio.NewScanner(page)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if len(f) >= 2 && (f[0] == "go_goroutines" || strings.HasPrefix(f[0], "go_goroutines{")) {
			v, err := strconv.ParseFloat(f[len(f)-1], 64)
			if err != nil {
				return 0, fmt.Errorf("metrics: %w", err)
			}
			return int(v), nil
		}
	}
	return 0, errors.Join(errNoGoroutines, lines.Err())
}
