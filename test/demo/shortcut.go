package main

import (
	"context"
	"fmt"
	"regexp"
	"strconv"
	"time"

	"github.com/weftmesh/weft/test/kube"
)

const shortcut = "weft.dev/Shortcut"

var redirectedBytes = regexp.MustCompile(`weft_redirect_events_total\{kind="shortcut_redirected_bytes"\} (\S+)`)

// shortcut has payload go past TCP between apps and Envoy, on running pods, and takes it back.
func (d *demo) shortcut(ctx context.Context) error {
	if _, err := d.cluster.Kubectl(ctx, "label", "namespace", "shop", "weft.dev/sockmap=enabled", "--overwrite"); err != nil {
		return err
	}
	why := ""
	err := kube.Until(ctx, time.Minute, shortcut, d.progress(shortcut), func(ctx context.Context) (bool, string) {
		pods, err := d.cluster.Pods(ctx, "shop", "")
		if err != nil {
			return false, err.Error()
		}
		have := 0
		for _, p := range pods {
			c := p.Conditions[shortcut]
			if c.Reason == "Unsupported" {
				why = c.Message
				return true, why
			}
			if c.Status == "True" {
				have++
			}
		}
		return have == len(pods), fmt.Sprintf("%d/%d pods", have, len(pods))
	})
	if err != nil {
		return err
	}
	if why != "" {
		d.say("the pods' conditions say why not here: %s", why)
	} else if err := d.redirected(ctx); err != nil {
		return err
	}
	if _, err := d.cluster.Kubectl(ctx, "label", "namespace", "shop", "weft.dev/sockmap-"); err != nil {
		return err
	}
	if err := d.cluster.UntilCondition(ctx, time.Minute, "shop", "", shortcut, "False", d.progress(shortcut)); err != nil {
		return err
	}
	if err := d.moreRequests(ctx, 1000); err != nil {
		return err
	}
	if err := d.samePods(ctx); err != nil {
		return err
	}
	all, err := d.load.Fresh(ctx)
	if err != nil {
		return err
	}
	return d.noLoss(all)
}

// redirected waits until bytes have gone past TCP on a node, and lets some traffic pass.
func (d *demo) redirected(ctx context.Context) error {
	var bytes float64
	err := kube.Until(ctx, time.Minute, "bytes past TCP", d.progress("bytes past TCP"), func(ctx context.Context) (bool, string) {
		pods, err := d.cluster.Pods(ctx, system, "app=weft-nodeproxy")
		if err != nil {
			return false, err.Error()
		}
		bytes = 0
		for _, p := range pods {
			out, err := d.cluster.Kubectl(ctx, "get", "--raw", fmt.Sprintf("/api/v1/namespaces/%s/pods/%s:15021/proxy/metrics", system, p.Name))
			if err != nil {
				return false, err.Error()
			}
			if m := redirectedBytes.FindStringSubmatch(out); m != nil {
				n, err := strconv.ParseFloat(m[1], 64)
				if err != nil {
					return false, err.Error()
				}
				bytes += n
			}
		}
		return bytes > 1<<20, fmt.Sprintf("%.0f KiB", bytes/1024)
	})
	if err != nil {
		return err
	}
	d.say("%.1f MiB went from socket to socket", bytes/(1<<20))
	return d.moreRequests(ctx, 2000)
}
