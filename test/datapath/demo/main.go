// Command demo shows weft's path between two pods without Kubernetes: real hooks, the real Envoy, mTLS and one policy.
// It exits non-zero unless every step holds.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/test/contract/proxy"
	"github.com/weftmesh/weft/test/datapath/lab"
)

const port = 8080

func main() {
	os.Exit(lab.Enter(func() int {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := run(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "\nthe demo failed:", err)
			return 1
		}
		return 0
	}))
}

type demo struct {
	*lab.Lab
	front, shop, stranger *lab.Pod
	began                 time.Time
	kept                  net.Conn
}

func run(ctx context.Context) (err error) {
	d := &demo{began: time.Now()}
	d.say("two nodes, three pods as network namespaces; the hooks and an Envoy on each node")
	d.Lab, err = lab.New(ctx, lab.Spec{
		Module: ".",
		Pods: []lab.PodSpec{
			{Name: "front", Account: "front", Node: 0, Last: 2},
			{Name: "stranger", Node: 0, Last: 3},
			{Name: "shop", Account: "shop", Node: 1, Last: 4},
		},
		Services: []lab.ServiceSpec{{Name: "shop", Last: 1, Pods: []string{"shop"}, Ports: []lab.PortSpec{
			{Port: 80, Target: port, Class: meshv1.Class_CLASS_HTTP, Protocol: meshv1.Protocol_PROTOCOL_HTTP1}}}},
	})
	defer func() { err = errors.Join(err, d.Close()) }()
	if err != nil {
		return err
	}
	d.front, d.shop, d.stranger = d.Pod("front"), d.Pod("shop"), d.Pod("stranger")
	steps := []struct {
		title string
		run   func(context.Context) error
	}{
		{"outside the mesh: front asks the shop's pod directly, and keeps the connection", d.before},
		{"both pods join while they run; the shop becomes Strict", d.join},
		{"front asks http://" + d.Address("shop", 80, false) + ": mutual TLS between the nodes", d.secured},
		{"a stranger's plaintext is refused", d.refused},
		{"a policy denies /admin: 403 from the shop's own Envoy", d.denied},
	}
	for i, step := range steps {
		d.say(fmt.Sprintf("%d/%d %s", i+1, len(steps), step.title))
		if err := step.run(ctx); err != nil {
			return fmt.Errorf("%s: %w", step.title, err)
		}
	}
	d.say("done; everything is removed")
	return nil
}

func (d *demo) say(text string) {
	fmt.Printf("\033[1m[%4.1f s]\033[0m %s\n", time.Since(d.began).Seconds(), text)
}

func (d *demo) show(format string, args ...any) { fmt.Printf("         "+format+"\n", args...) }

func (d *demo) before(ctx context.Context) error {
	listener, err := d.shop.Listen(port)
	if err != nil {
		return err
	}
	go http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintln(w, "welcome to", r.URL.Path) }))
	if d.kept, err = d.front.Dial(ctx, d.direct()); err != nil {
		return err
	}
	return d.askKept()
}

func (d *demo) direct() string { return fmt.Sprintf("%s:%d", d.shop.Addresses[0], port) }

// askKept uses the connection that is older than the mesh.
func (d *demo) askKept() error {
	fmt.Fprint(d.kept, "GET /old HTTP/1.1\r\nHost: shop\r\n\r\n")
	response, err := http.ReadResponse(bufio.NewReader(d.kept), nil)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, response.Body)
	d.show("%s over the kept connection", response.Status)
	return err
}

func (d *demo) join(ctx context.Context) error {
	strict := &meshv1.InboundPolicy{DefaultPort: &meshv1.PortPolicy{Mode: meshv1.Mode_MODE_STRICT}}
	d.front.Policy, d.shop.Policy = strict, strict
	begin := time.Now()
	if err := d.Enrol(ctx); err != nil {
		return err
	}
	d.show("%d ms", time.Since(begin).Milliseconds())
	return d.askKept()
}

func (d *demo) get(ctx context.Context, from *lab.Pod, address, path string) (int, string, error) {
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, address string) (net.Conn, error) { return from.Dial(ctx, address) }}}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+path, nil)
	if err != nil {
		return 0, "", err
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return response.StatusCode, strings.TrimSpace(string(body)), err
}

func (d *demo) secured(ctx context.Context) error {
	status, body, err := d.get(ctx, d.front, d.Address("shop", 80, false), "/items")
	if err != nil || status != http.StatusOK {
		return fmt.Errorf("got %d %q: %w", status, body, err)
	}
	d.show("200 %q", body)
	return proxy.Until(ctx, func() error {
		for _, record := range d.Records(0) {
			if record["kind"] == "request" && record["peer"] == d.shop.ID() && record["local"] == d.front.ID() {
				d.show("peers' certificates: %s -> %s", record["local"], record["peer"])
				return nil
			}
		}
		return errors.New("no request between the two identities in Envoy's log")
	})
}

func (d *demo) refused(ctx context.Context) error {
	status, _, err := d.get(ctx, d.stranger, d.direct(), "/")
	if err == nil {
		return fmt.Errorf("the stranger was answered %d", status)
	}
	d.show("%v", err)
	return nil
}

func (d *demo) denied(ctx context.Context) error {
	d.shop.Policy = &meshv1.InboundPolicy{DefaultPort: &meshv1.PortPolicy{Mode: meshv1.Mode_MODE_STRICT}, Ports: []*meshv1.PortPolicy{{
		Port: port, Mode: meshv1.Mode_MODE_STRICT, Http: true, Deny: []*meshv1.Rule{{Name: "shop/no-admin[0]",
			Requests: []*meshv1.Request{{Paths: []*meshv1.StringMatch{{Match: &meshv1.StringMatch_Prefix{Prefix: "/admin"}}}}}}}}}}
	begin := time.Now()
	if err := d.Apply(ctx); err != nil {
		return err
	}
	d.Bump()
	if err := d.Apply(ctx); err != nil {
		return err
	}
	d.show("in force after %d ms", time.Since(begin).Milliseconds())
	for path, want := range map[string]int{"/admin": http.StatusForbidden, "/items": http.StatusOK} {
		status, _, err := d.get(ctx, d.front, d.Address("shop", 80, false), path)
		if err != nil || status != want {
			return fmt.Errorf("%s was answered %d, want %d: %w", path, status, want, err)
		}
		d.show("%d for %s", status, path)
	}
	return nil
}
