//go:build e2e

package e2e

import (
	"bytes"
	"fmt"
	"strings"
	"time"

	"github.com/weftmesh/weft/test/hostile"
	"github.com/weftmesh/weft/test/hostile/attack"
	"github.com/weftmesh/weft/test/kube"
)

// nested: namespaces of the attacker's own, in which it has every capability.
func (h *hostiles) nested() {
	inner := []attack.Attempt{
		{ID: "nest-dial4", Kind: "dial", To: "{pod4}:9000", Send: []byte("{mark}\n")}, {ID: "nest-dial6", Kind: "dial", To: "[{pod6}]:9000", Send: []byte("{mark}\n")},
		{ID: "nest-steer", Kind: "dial", To: "127.64.0.1:15001"}, {ID: "nest-ports", Kind: "bind", To: "::", First: 15000, Last: 15019},
		{ID: "nest-cgroup", Kind: "cgroup", To: "/cgroups"},
	}
	h.everywhere([]hostile.Attacker{hostile.Stranger, hostile.Barred}, func(p kube.Pod) []attack.Attempt {
		var all []attack.Attempt
		for _, a := range inner {
			all = append(all, h.fill(a, p, h.target, h.mark()))
		}
		return []attack.Attempt{{ID: "nest", Kind: "nest", Inner: all}}
	}, func(who string, o attack.Outcome) {
		if len(o.Inner) != len(inner) {
			h.Errorf("%s: %+v", who, o)
			return
		}
		for _, i := range o.Inner {
			h.did(i.ID)
			switch {
			case i.ID == "nest-ports" && i.Counts["bound"] != 20:
				h.Errorf("%s, %s: %+v, want its own ports, which are nobody's", who, i.ID, i)
			case i.ID == "nest-cgroup" && i.Counts["joined"] > 0:
				h.Errorf("%s, %s: %+v, want no group joined", who, i.ID, i)
			case strings.HasPrefix(i.ID, "nest-dial") && (len(i.Got) > 0 || i.Errno == ""), i.ID == "nest-steer" && i.Errno != "ECONNREFUSED":
				h.Errorf("%s, %s: %+v, want no connection", who, i.ID, i)
			}
		}
		h.Logf("%s: %+v", who, o.Inner)
	})
}

// processes: what pods reach of weft's own.
func (h *hostiles) processes() {
	outsiders := []hostile.Attacker{hostile.Stranger, hostile.Barred}
	var nodes []kube.Pod
	for _, p := range pods(h.T, system, "app=weft-nodeproxy") {
		nodes = append(nodes, p)
	}
	controller, err := k8s.Kubectl(h.Context(), "get", "service", "-n", system, "weft-controlplane", "-o", "jsonpath={.spec.clusterIP}:{.spec.ports[0].port}")
	if err != nil {
		h.Fatal(err)
	}
	web := func(id, to, line string) attack.Attempt {
		return attack.Attempt{ID: id, Kind: "dial", To: to, Send: []byte(line + " HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"), Millis: 2000}
	}
	h.everywhere(outsiders, func(p kube.Pod) []attack.Attempt {
		all := []attack.Attempt{{ID: "unix", Kind: "unix"}, web("controller-port", controller, "GET /"),
			{ID: "controller-port", Kind: "dial", To: controller, TLS: &attack.TLS{ALPN: []string{"h2"}}, Send: []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"), Millis: 2000}}
		for _, n := range nodes {
			four, six := byFamily(h.T, n.IPs)
			for _, to := range []string{four, six} {
				all = append(all, attack.Attempt{ID: "proxy-pod", Kind: "scan", To: to, First: 14990, Last: 15060, Count: 20, Send: []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n")},
					attack.Attempt{ID: "proxy-pod", Kind: "scan", To: to, First: 9901, Last: 9902, Count: 2})
			}
			for _, path := range []string{"/config_dump", "/certs", "/clusters", "/debug/pprof/", "/debug/pprof/heap", "/quitquitquit", "/logging"} {
				all = append(all, web("admin", four+":15021", "GET "+path), web("admin", four+":15021", "POST "+path))
			}
			all = append(all, web("metrics", four+":15021", "GET /metrics"))
		}
		return all
	}, func(who string, o attack.Outcome) {
		h.did(o.ID)
		switch o.ID {
		case "unix":
			if o.Counts["connected"] > 0 {
				h.Errorf("%s: connected to %q", who, o.Heard)
			}
		case "proxy-pod": // the metrics answer
			if o.Counts["answered"] > 1 {
				h.Errorf("%s: %+v, want the metrics' port alone to answer", who, o.Counts)
			}
		case "admin":
			if !bytes.HasPrefix(o.Got, []byte("HTTP/1.1 404")) && !bytes.HasPrefix(o.Got, []byte("HTTP/1.1 405")) {
				h.Errorf("%s: %.200q %s", who, o.Got, o.Error)
			}
		case "metrics": // the control of the two before
			if !bytes.HasPrefix(o.Got, []byte("HTTP/1.1 200")) {
				h.Errorf("%s: %.200q %s, want the metrics", who, o.Got, o.Error)
			}
		case "controller-port":
			if bytes.HasPrefix(o.Got, []byte("HTTP/1.1 200")) {
				h.Errorf("%s: %.200q, want nothing", who, o.Got)
			}
		}
	})
}

// forge writes conditions onto a pod as somebody who may.
func (h *hostiles) forge(p kube.Pod, status string) {
	h.Helper()
	patch := fmt.Sprintf(`{"status":{"conditions":[{"type":"weft.dev/Enrolled","status":%[1]q,"reason":"Forged"},{"type":"weft.dev/Enforced","status":%[1]q,"reason":"Forged"}]}}`, status)
	if _, err := k8s.Kubectl(h.Context(), "patch", "pod", p.Name, "-n", p.Namespace, "--subresource=status", "-p", patch); err != nil {
		h.Fatal(err)
	}
}

// objects: what a tenant writes.
func (h *hostiles) objects() {
	stranger := h.attackers[hostile.Stranger]["n1"]
	barred := h.attackers[hostile.Barred]["n1"]
	h.forge(stranger, "True")
	h.forge(barred, "False")
	h.forge(h.target, "False")
	if err := k8s.Apply(h.Context(), strings.ReplaceAll(sliceIn(hostileOutside, h.names["target"]["pod4"]), "8080", "9000")); err != nil {
		h.Fatal(err)
	}
	var slice string
	until(h.T, 30*time.Second, "the Service of the slice", func() (bool, string) {
		out, err := k8s.Kubectl(h.Context(), "get", "service", "-n", hostileOutside, "server-slice", "-o", "jsonpath={.spec.clusterIP}")
		slice = out
		return err == nil && out != "", out
	})
	until(h.T, time.Minute, "the condition of the Service of the slice", func() (bool, string) {
		out, err := k8s.Kubectl(h.Context(), "get", "service", "-n", hostileOutside, "server-slice", "-o", `jsonpath={.status.conditions[?(@.type=="weft.dev/Captured")]}`)
		return err == nil && strings.Contains(out, "ForeignEndpoint"), out
	})
	line := func(id, ip string) attack.Attempt {
		return attack.Attempt{ID: id, Kind: "dial", To: ip + ":" + linePort, Send: []byte(h.mark() + "\n"), Millis: 3000}
	}
	target4 := h.names["target"]["pod4"]
	for range 3 {
		h.everywhere([]hostile.Attacker{hostile.Stranger}, func(kube.Pod) []attack.Attempt {
			return []attack.Attempt{line("closed", target4), line("closed", h.address(barred, "4")), line("slice", slice)}
		}, func(who string, o attack.Outcome) {
			if bytes.Contains(o.Got, []byte("app: ")) {
				h.Errorf("%s: %+v, want it closed", who, o)
			}
		})
		h.everywhere([]hostile.Attacker{hostile.Allowed}, func(kube.Pod) []attack.Attempt {
			// A pod that callers believed to be in the mesh would be spoken to by TLS, one that they did not in plaintext.
			return []attack.Attempt{line("answered", target4), line("answered", h.address(barred, "4")), line("answered", h.address(stranger, "4")), line("slice", slice)}
		}, func(who string, o attack.Outcome) {
			if bytes.Contains(o.Got, []byte("app: ")) != (o.ID == "answered") {
				h.Errorf("%s: %+v", who, o)
			}
		})
	}
	for _, p := range []kube.Pod{h.target, barred} {
		condition(h.T, p.Namespace, "pod", p.Name, `weft.dev/Enrolled=True (?:[^F]|F[^o])`)
	}
	h.did("forged-enrolled", "forged-enforced", "forged-other", "slice-bare")
}
