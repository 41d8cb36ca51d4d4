package main

import (
	"context"
	"fmt"
	"os"
	"time"
)

// runSteady is what the server's processes use when nobody asks.
func runSteady(ctx context.Context, o *options, r *Report) error {
	if o.label == "" {
		r.Label = fmt.Sprint("processes ", o.pids)
	}
	before, err := readUsage(o.pids)
	if err != nil {
		return err
	}
	if err := sleep(ctx, o.duration); err != nil {
		return err
	}
	now, err := readUsage(o.pids)
	if err != nil {
		return err
	}
	r.add("RSS", mib(now.rss), "MiB")
	pss := int64(0)
	for _, pid := range o.pids {
		// Unlike RSS this does not count shared pages twice.
		rollup, err := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		if err != nil {
			pss = 0
			break
		}
		pss += statusNumber(rollup, "Pss") * 1024
	}
	if pss > 0 {
		r.add("PSS", mib(pss), "MiB")
	}
	r.add("CPU", float64((now.cpu-before.cpu)/time.Microsecond)/now.at.Sub(before.at).Seconds()/1000, "ms/s")
	r.add("threads", float64(now.threads), "")
	r.add("descriptors", float64(now.fds), "")
	if o.metrics == "" {
		return nil
	}
	n, err := goroutines(ctx, o.metrics)
	if err != nil {
		return err
	}
	r.add("goroutines", float64(n), "")
	return nil
}
