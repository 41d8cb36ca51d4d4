package main

import (
	"bufio"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// parked is how long a stream without any answer counts as not yet waiting.
const parked = 300 * time.Millisecond

// probe is the workload's side: it waits for a secret and says on stdout what
// happens, one line each:
//
//	waiting              refused once, or open for a while without an answer
//	refused TEXT         the stream was ended
//	secret NANOSECONDS   here it is, since 1970; the last line
//
// It ends with the secret, or when stdin does, as it does when load dies.
func probe(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer) error {
	fs := flag.NewFlagSet("load probe", flag.ContinueOnError)
	socket := fs.String("socket", "", "SDS unix socket")
	name := fs.String("name", "default", "secret name")
	retryText := fs.String("retry", "envoy", "pause before a stream is opened again")
	if err := fs.Parse(args); err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	pause, err := parseRetry(*retryText)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		_, _ = io.Copy(io.Discard, stdin)
		cancel()
	}()
	p := &prober{out: stdout, got: cancel}
	return p.run(ctx, *socket, *name, pause)
}

// prober writes what happens to one waiting stream.
type prober struct {
	got func()

	mu      sync.Mutex
	out     io.Writer
	waiting bool
	done    bool
}

func (p *prober) run(ctx context.Context, socket, name string, pause retry) error {
	conn, err := dial(socket)
	if err != nil {
		return err
	}
	defer conn.Close()
	timer := time.AfterFunc(parked, p.wait)
	defer timer.Stop()
	w := &watch{
		conn: conn, name: name, retry: pause,
		response: func(resp answer, at time.Time) {
			if resp.resources > 0 {
				p.secret(at)
			}
		},
		refused: func(err error) {
			p.say("refused " + strings.Join(strings.Fields(err.Error()), " "))
			p.wait()
		},
	}
	w.run(ctx)
	return nil
}

func (p *prober) wait() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.waiting && !p.done {
		p.waiting = true
		fmt.Fprintln(p.out, "waiting")
	}
}

func (p *prober) secret(at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.done {
		return
	}
	p.done = true
	fmt.Fprintln(p.out, "secret", at.UnixNano())
	p.got()
}

func (p *prober) say(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.done {
		fmt.Fprintln(p.out, line)
	}
}

// running is a workload as await sees it.
type running struct {
	waiting chan struct{}  // closed once it waits
	secret  chan time.Time // gets one value
	end     func()
	done    chan struct{} // closed when it has ended
	refused []string      // complete when done
}

// startProbe starts a workload: a process with its uid, or only a stream of
// this process if that makes no difference.
func startProbe(ctx context.Context, o *options, w workload) (*running, error) {
	p := &running{waiting: make(chan struct{}), secret: make(chan time.Time, 1), done: make(chan struct{})}
	ctx, cancel := context.WithCancel(ctx)
	if w.uid == os.Getuid() {
		pr, pw := io.Pipe()
		p.end = cancel
		go func() {
			inner := &prober{out: pw, got: cancel}
			_ = pw.CloseWithError(inner.run(ctx, o.socket, w.name, o.retry))
		}()
		go p.read(pr, nil)
		return p, nil
	}
	// The path behind /proc/self/exe may be closed to the other user; the link
	// is not.
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "probe",
		"-socket", o.socket, "-name", w.name, "-retry", o.retry.String())
	cmd.Dir, cmd.Env = "/", []string{}
	cmd.Stderr = o.log
	cmd.WaitDelay = time.Second
	id := uint32(w.uid)
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: id, Gid: id},
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		cancel()
		return nil, fmt.Errorf("start workload: %w", err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		cancel()
		return nil, fmt.Errorf("start workload: %w", err)
	}
	if err := cmd.Start(); err != nil {
		cancel()
		return nil, fmt.Errorf("start workload with uid %d: %w", w.uid, err)
	}
	p.end = func() { _ = stdin.Close() }
	go p.read(stdout, func() {
		_ = cmd.Wait()
		cancel()
	})
	return p, nil
}

// read follows what the workload says until it ends.
func (p *running) read(from io.Reader, ended func()) {
	defer close(p.done)
	if ended != nil {
		defer ended()
	}
	lines := bufio.NewScanner(from)
	waits := false
	for lines.Scan() {
		word, rest, _ := strings.Cut(lines.Text(), " ")
		switch word {
		case "waiting":
			if !waits {
				waits = true
				close(p.waiting)
			}
		case "refused":
			p.refused = append(p.refused, rest)
		case "secret":
			if n, err := strconv.ParseInt(rest, 10, 64); err == nil {
				select {
				case p.secret <- time.Unix(0, n):
				default:
				}
			}
		}
	}
}

// stop ends the workload and returns what it was refused with.
func (p *running) stop() []string {
	p.end()
	<-p.done
	return p.refused
}
