package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/signal"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

const manual = `load measures an SDS socket with clients that behave like Envoy.

  load streams  -socket S [-n 1000] [-server-pid P]    cost and speed of open connections
  load fetch    -socket S [-clients 8] [-duration 10s] rate of FetchSecrets
  load fanout   -socket S [-n 1000] -cmd C             update of an entry -> all streams have it
  load create   -socket S [-count 20] -admin A -parent ID | -cmd C
                                                       creation of an entry -> its workload has the secret
  load steady   -server-pid P[,P...] [-duration 10s]   memory and processor time at rest
  load compare  A.json B.json ...                      results of -o side by side, with ratios
  load MODE -h                                         all flags of a mode

Every mode prints a table and, with -o FILE, writes the same as JSON. -server-pid
takes the processes to account for, separated by commas; without it only the
clients' side is reported. Values are of this one run; repeat before you quote.

The clients. As Envoy does, each connection carries one SotW stream per secret
name (default and ROOTCA), the node is sent with a stream's first request only,
every response is acknowledged, and a stream that ends is opened again after a
pause drawn from [0, next), next being 0.5 s at first and doubling to 30 s, and
0.5 s again after a response (-retry envoy, create's default; -retry 50ms, the
default of the others, waits a fixed time).

streams opens -n connections, at most -parallel at a time, and reports:
  first secret          from the dial to the first secret of a stream (p50, p99)
  server CPU            of the server's processes while connections were opened,
                        less what they use when idle, per connection
  server RSS            growth of resident memory once all is quiet, per connection
  server goroutines     growth per connection, if -metrics is given (a loopback
                        http URL that serves go_goroutines, as Prometheus does)
fetch keeps -clients connections busy, one FetchSecrets call after the other.
fanout opens -n connections with one stream for the first of -names, runs -cmd
  (through sh) when all have their secret, and waits until every stream has got a
  different secret, -rounds times with a pause drawn from [0, -pause) before each;
  {round} in the command is replaced. Times count from the command's start and
  from its return.
create gives each of -count workloads its own entry. A workload is a process
  with a uid of its own (from -first-uid), started by load, which therefore must
  be root; its entry has the selector unix:uid:<uid>. Without root, or with -as id,
  workloads ask for their SPIFFE ID by name instead, with the caller's own uid.
  A workload starts after a pause drawn from [0, -spread), so that it does not fall
  in step with a server that looks at its entries every few seconds; its entry is
  created when it has waited for about -lead: with
  -admin through the SPIRE Server API on that unix socket, below -parent, and
  removed at the end; with -cmd by a command, in which {i}, {uid}, {id} (SPIFFE ID)
  and {selector} are replaced. Times count from the call's start and its return.

Examples, against an agent and its admin socket:
  load streams -socket /run/spiffe-node/sds/socket -server-pid $(pidof sds-agent) -o ours.json
  load create  -socket /tmp/agent/api.sock -admin /tmp/spire-server/api.sock \
      -parent spiffe://example.org/spire/agent/join_token/... -count 20 -parallel 10
  load fanout  -socket S -cmd 'spire-server entry update -entryID ... -x509SVIDTTL $((3600+RANDOM%60))'
`

func main() {
	// The clients' garbage must not cost the server processor time.
	debug.SetGCPercent(400)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "load:", err)
		stop()
		os.Exit(1)
	}
}

// mode is one figure: it reads its flags and measures.
type mode struct {
	name  string
	start func(ctx context.Context, o *options, r *Report) error
}

func modes() []mode {
	return []mode{
		{"streams", runStreams},
		{"fetch", runFetch},
		{"fanout", runFanout},
		{"create", runCreate},
		{"steady", runSteady},
	}
}

// errUsage has been explained already.
var errUsage = errors.New("bad usage; see load -h")

func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		fmt.Fprint(stderr, manual)
		return errUsage
	}
	name, args := args[0], args[1:]
	switch name {
	case "-h", "-help", "--help", "help":
		fmt.Fprint(stdout, manual)
		return nil
	case "compare":
		return compare(args, stdout)
	case "probe": // a workload of create, started by load itself
		return probe(ctx, args, stdin, stdout)
	}
	all := modes()
	i := slices.IndexFunc(all, func(m mode) bool { return m.name == name })
	if i < 0 {
		fmt.Fprint(stderr, manual)
		return fmt.Errorf("%w: no mode %q", errUsage, name)
	}
	o, err := parse(name, args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return nil
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, o.timeout, fmt.Errorf("-timeout of %v is over", o.timeout))
	defer cancel()
	r := newReport(name, o)
	self := ownCPU()
	err = all[i].start(ctx, o, r)
	r.finish(ownCPU() - self)
	r.print(stdout)
	if o.out != "" {
		err = errors.Join(err, r.save(o.out))
	}
	return err
}

// options are the flags of all modes; each mode has the ones it reads.
type options struct {
	socket    string
	label     string
	names     []string
	pids      []int
	metrics   string
	out       string
	timeout   time.Duration
	n         int
	parallel  int
	settle    time.Duration
	idle      time.Duration
	clients   int
	duration  time.Duration
	cmd       string
	count     int
	admin     string
	parent    string
	retry     retry
	lead      time.Duration
	spread    time.Duration
	as        string
	firstUID  int
	keepEntry bool
	rounds    int
	pause     time.Duration
	log       io.Writer
	// create replaces -admin and -cmd in tests.
	create creator
}

// Bounds of what a run may do to the machine.
const (
	maxConnections = 20000
	maxClients     = 1000
	maxCount       = 1000
	maxTime        = time.Hour
)

func parse(name string, args []string, stderr io.Writer) (*options, error) {
	o := &options{log: &locked{w: stderr}}
	fs := flag.NewFlagSet("load "+name, flag.ContinueOnError)
	fs.SetOutput(stderr)
	var names, pids, retryText string
	fs.StringVar(&pids, "server-pid", "", "processes to account for, separated by commas")
	fs.StringVar(&o.label, "label", "", "what is measured, for the report (the socket's path)")
	fs.StringVar(&o.out, "o", "", "write the results as JSON to this file")
	fs.StringVar(&o.metrics, "metrics", "", "loopback http URL of the server's Prometheus metrics, to count goroutines")
	fs.DurationVar(&o.timeout, "timeout", 5*time.Minute, "end of the run, whatever has been reached")
	if name != "steady" {
		fs.StringVar(&o.socket, "socket", "", "SDS unix socket (required)")
		fs.StringVar(&names, "names", defaultNames(name), "secret names, one stream each; fetch asks for all of them in one call")
	}
	switch name {
	case "streams", "fanout":
		fs.IntVar(&o.n, "n", 1000, "connections")
		fs.IntVar(&o.parallel, "parallel", 8, "connections being opened at a time")
		fs.DurationVar(&o.settle, "settle", 3*time.Second, "quiet time before memory is read")
		fs.StringVar(&retryText, "retry", "50ms", "pause before a stream is opened again: envoy or a duration")
	}
	switch name {
	case "streams", "fetch", "fanout":
		fs.DurationVar(&o.idle, "idle", 2*time.Second, "how long the idle server is watched first, to know what it uses anyway")
	}
	switch name {
	case "fetch":
		fs.IntVar(&o.clients, "clients", 8, "clients, one connection each")
		fs.DurationVar(&o.duration, "duration", 10*time.Second, "how long they fetch")
	case "steady":
		fs.DurationVar(&o.duration, "duration", 10*time.Second, "how long to watch")
	case "fanout":
		fs.StringVar(&o.cmd, "cmd", "", "command that updates the entry (required); {round} is replaced")
		fs.IntVar(&o.rounds, "rounds", 1, "updates, one after the other")
		fs.DurationVar(&o.pause, "pause", 5*time.Second, "bound of the random pause before each update")
	case "create":
		fs.IntVar(&o.count, "count", 20, "entries to create")
		fs.IntVar(&o.parallel, "parallel", 1, "workloads waiting at a time")
		fs.StringVar(&o.admin, "admin", "", "unix socket with the SPIRE Server API to create entries through")
		fs.StringVar(&o.parent, "parent", "", "parent SPIFFE ID of the entries: the agent's own")
		fs.StringVar(&o.cmd, "cmd", "", "command that creates an entry, instead of -admin; {i} {uid} {id} {selector} are replaced")
		fs.StringVar(&retryText, "retry", "envoy", "pause before a stream is opened again: envoy or a duration")
		fs.DurationVar(&o.lead, "lead", time.Second, "how long workloads wait before the entry is created, 50 to 150 % of it")
		fs.DurationVar(&o.spread, "spread", 5*time.Second, "bound of the random pause before each workload starts")
		fs.StringVar(&o.as, "as", "", "how workloads differ: uid or id (uid as root, else id)")
		fs.IntVar(&o.firstUID, "first-uid", 100_000+1000*rand.IntN(1_000_000), "uid of the first workload; as good as new in every run unless given")
		fs.BoolVar(&o.keepEntry, "keep", false, "leave the entries made through -admin")
	}
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, fmt.Errorf("%w: %w", errUsage, err)
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("%w: argument %q", errUsage, fs.Arg(0))
	}
	if retryText != "" {
		var err error
		if o.retry, err = parseRetry(retryText); err != nil {
			return nil, fmt.Errorf("-retry: %w", err)
		}
	}
	for p := range strings.SplitSeq(pids, ",") {
		if p = strings.TrimSpace(p); p == "" {
			continue
		}
		pid, err := strconv.Atoi(p)
		if err != nil || pid <= 0 {
			return nil, fmt.Errorf("-server-pid: %q is no process", p)
		}
		o.pids = append(o.pids, pid)
	}
	for n := range strings.SplitSeq(names, ",") {
		if n = strings.TrimSpace(n); n != "" {
			o.names = append(o.names, n)
		}
	}
	return o, o.check(name)
}

// locked lets several workloads complain through one writer.
type locked struct {
	mu sync.Mutex
	w  io.Writer
}

// Write writes p as one piece.
func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

// defaultNames is what a sidecar holds, or the part of it a mode is about.
func defaultNames(mode string) string {
	if mode == "streams" {
		return "default,ROOTCA"
	}
	return "default"
}

func (o *options) check(name string) error {
	within := func(flag string, v, limit int) error {
		if v < 1 || v > limit {
			return fmt.Errorf("-%s: %d is not within 1 and %d", flag, v, limit)
		}
		return nil
	}
	for _, d := range []time.Duration{o.timeout, o.duration, o.settle, o.lead, o.pause, o.idle, o.spread} {
		if d < 0 || d > maxTime {
			return fmt.Errorf("a duration of %v is not within 0 and %v", d, maxTime)
		}
	}
	if err := checkMetricsURL(o.metrics); err != nil {
		return err
	}
	if name == "steady" {
		if len(o.pids) == 0 {
			return errors.New("-server-pid is required")
		}
		return nil
	}
	if o.label == "" {
		o.label = o.socket
	}
	if len(o.names) == 0 {
		return errors.New("-names: no name")
	}
	switch name {
	case "streams", "fanout":
		if err := errors.Join(within("n", o.n, maxConnections), within("parallel", o.parallel, maxClients)); err != nil {
			return err
		}
	case "fetch":
		if err := within("clients", o.clients, maxClients); err != nil {
			return err
		}
	case "create":
		if err := o.checkCreate(within); err != nil {
			return err
		}
	}
	if name == "fanout" {
		if o.cmd == "" {
			return errors.New("-cmd is required: the command that updates the entry")
		}
		if err := within("rounds", o.rounds, maxCount); err != nil {
			return err
		}
	}
	return checkSocket("-socket", o.socket)
}

func (o *options) checkCreate(within func(string, int, int) error) error {
	if err := errors.Join(within("count", o.count, maxCount), within("parallel", o.parallel, maxClients),
		within("first-uid", o.firstUID, 1<<30)); err != nil {
		return err
	}
	switch {
	case o.as == "" && os.Geteuid() == 0:
		o.as = "uid"
	case o.as == "":
		o.as = "id"
	case o.as == "uid" && os.Geteuid() != 0:
		return errors.New("-as uid: only root can start workloads with other uids")
	case o.as != "uid" && o.as != "id":
		return fmt.Errorf("-as: %q is neither uid nor id", o.as)
	}
	if o.create != nil {
		return nil
	}
	if (o.admin == "") == (o.cmd == "") {
		return errors.New("one of -admin and -cmd is required")
	}
	if o.admin == "" {
		return nil
	}
	if o.parent == "" {
		return errors.New("-parent is required with -admin: the agent's SPIFFE ID")
	}
	return checkSocket("-admin", o.admin)
}

// checkSocket refuses everything that is not a unix socket of this machine.
func checkSocket(flag, path string) error {
	if path == "" {
		return fmt.Errorf("%s is required", flag)
	}
	info, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("%s: %w", flag, err)
	}
	if info.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("%s: %s is not a unix socket", flag, path)
	}
	return nil
}
