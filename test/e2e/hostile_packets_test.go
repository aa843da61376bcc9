//go:build e2e

package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/weftmesh/weft/test/hostile"
	"github.com/weftmesh/weft/test/hostile/attack"
	"github.com/weftmesh/weft/test/kube"
)

// lines are what the TCP port of both targets answers.
const linePort = "9000"

// address is a pod's address of a family.
func (h *hostiles) address(p kube.Pod, family string) string {
	four, six := byFamily(h.T, p.IPs)
	if family == "4" {
		return four
	}
	return six
}

// corner is a family, and whether the pod without weft is attacked, which must work.
type corner struct {
	family  string
	control bool
}

func (c corner) String() string {
	if c.control {
		return "IPv" + c.family + ", control"
	}
	return "IPv" + c.family
}

// packets are the attempts that need NET_RAW and more than one step. The corners of each kind do not meet.
func (h *hostiles) packets() {
	for _, kind := range []struct {
		name string
		run  func(*hostiles, corner)
	}{{"stacks", (*hostiles).stacks}, {"injections", (*hostiles).injections}, {"claims", (*hostiles).claims}, {"sniffers", (*hostiles).sniffers}} {
		h.Run(kind.name, func(t *testing.T) {
			for _, c := range []corner{{"4", false}, {"4", true}, {"6", false}, {"6", true}} {
				t.Run(c.String(), func(t *testing.T) {
					t.Parallel()
					kind.run(h.in(t), c)
				})
			}
		})
	}
}

// stacks: whole connections past the attacker's kernel.
func (h *hostiles) stacks(c corner) {
	stranger, barred, allowed := h.attackers[hostile.Stranger]["n1"], h.attackers[hostile.Barred]["n1"], h.attackers[hostile.Allowed]["n1"]
	against := h.target
	if c.control {
		against = h.bare
	}
	for i, s := range []struct {
		id, from string
		by       kube.Pod
		take     bool
	}{
		{"stack-unused" + c.family, h.unused(c), stranger, false}, {"stack-allowed" + c.family, h.address(allowed, c.family), stranger, true},
		{"stack-barred" + c.family, h.address(allowed, c.family), barred, true},
	} {
		mark, to := h.mark(), h.address(against, c.family)
		a := attack.Attempt{ID: s.id, Kind: "stack", From: net.JoinHostPort(s.from, strconv.Itoa(41000+i)), To: net.JoinHostPort(to, linePort), Send: []byte(mark + "\n"), Millis: 5000}
		if s.take {
			a.Victims = []string{to}
		}
		o := h.attack(s.by, 1, a)[0]
		saw, answered := h.saw(against, mark), bytes.Contains(o.Got, []byte("app: "))
		switch {
		case c.control && !(saw && answered):
			h.Errorf("%s: the pod without weft was not reached: %+v", s.id, o)
		case !c.control && (saw || len(o.Got) > 0):
			h.Errorf("%s: got %q, the app saw it: %v", s.id, o.Got, saw)
		case !c.control:
			h.Logf("%s: %s %s", s.id, o.Stage, o.Errno)
		}
		h.did(s.id)
	}
}

// unused is an address of n1's pods that no pod has; each corner has its own.
func (h *hostiles) unused(c corner) string {
	last := byte(0xfa)
	if c.control {
		last = 0xfb
	}
	if c.family == "4" {
		b := machine(h.T, "n1").Pods4.Addr().As4()
		b[3] = last
		return netip.AddrFrom4(b).String()
	}
	b := machine(h.T, "n1").Pods6.Addr().As16()
	b[14], b[15] = 0xfe, last
	return netip.AddrFrom16(b).String()
}

// gateway is the address by which n1's pods leave their bridge.
func (h *hostiles) gateway(family string) string {
	if family == "4" {
		return machine(h.T, "n1").Pods4.Masked().Addr().Next().String()
	}
	return machine(h.T, "n1").Pods6.Masked().Addr().Next().String()
}

// noEffect tells that forged packets did not do what they do on a machine that is not busy: to a connection that is protected not
// even harm, or none to one that is not. The long form takes that as a fault of the test.
func (h *hostiles) noEffect(format string, arguments ...any) {
	h.Helper()
	if *hostileForm == "full" {
		h.Errorf(format, arguments...)
	} else {
		h.Logf(format, arguments...)
	}
}

// stream is a connection as the wire shows it: the client's end, and the next numbers of both.
type stream struct {
	client           string
	clientSeq, seqOf uint32
}

var segmentLine = regexp.MustCompile(`IP6? (\S+)\.(\d+) > (\S+)\.(\d+): Flags \[([^\]]*)\],(?: seq (\d+)(?::(\d+))?,)?(?: ack (\d+))?`)

// held opens a connection from a pod to a server for a while, and finds it on the wire of a node.
func (h *hostiles) held(by kube.Pod, to, node string) (stream, <-chan attack.Outcome) {
	h.Helper()
	ctx, cancel := context.WithCancel(h.Context())
	defer cancel()
	server, port, err := net.SplitHostPort(to)
	if err != nil {
		h.Fatal(err)
	}
	four, six := byFamily(h.T, by.IPs)
	cmd := machine(h.T, node).NetCommand(ctx, "tcpdump", "-i", "any", "--immediate-mode", "-n", "-S", "-l", fmt.Sprintf("tcp and host %s and (host %s or host %s) and port %s", server, four, six, port))
	out, err := cmd.StdoutPipe()
	if err != nil {
		h.Fatal(err)
	}
	notes, err := cmd.StderrPipe()
	if err != nil {
		h.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		h.Fatal(err)
	}
	defer func() { cancel(); _ = cmd.Wait() }()
	for listening := bufio.NewScanner(notes); listening.Scan() && !strings.Contains(listening.Text(), "listening on"); {
	}
	done := h.background(by, 1, attack.Attempt{ID: "held", Kind: "hold", To: to, Count: 1, Send: []byte("hello\n"), Millis: 15000})
	var mu sync.Mutex
	var s stream
	last := time.Now()
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			m := segmentLine.FindStringSubmatch(lines.Text())
			if m == nil {
				continue
			}
			mu.Lock()
			s.read(m, server)
			last = time.Now()
			mu.Unlock()
		}
	}()
	until(h.T, 10*time.Second, "the connection on the wire", func() (bool, string) {
		mu.Lock()
		defer mu.Unlock()
		return s.client != "" && s.clientSeq != 0 && s.seqOf != 0 && time.Since(last) > time.Second, fmt.Sprintf("%+v", s)
	})
	mu.Lock()
	defer mu.Unlock()
	return s, done
}

// read takes a line of tcpdump: who sends, and which number comes next. A SYN begins; what is left of others is passed over.
func (s *stream) read(m []string, server string) {
	client := net.JoinHostPort(m[1], m[2])
	if m[1] == server {
		client = net.JoinHostPort(m[3], m[4])
	} else if m[5] == "S" && client != s.client {
		*s = stream{client: client}
	}
	if client != s.client {
		return
	}
	next := func(text string) uint32 { n, _ := strconv.ParseUint(text, 10, 32); return uint32(n) }
	seq := next(m[6])
	if m[7] != "" {
		seq = next(m[7])
	}
	if strings.Contains(m[5], "S") {
		seq++
	}
	side := &s.clientSeq
	if m[1] == server {
		side = &s.seqOf
	}
	// Each packet is seen on several links, and not always in order. Without a number it is nothing but an acknowledgement.
	if m[6] != "" && (*side == 0 || int32(seq-*side) > 0) {
		*side = seq
	}
}

// injection is one forged packet into a connection that is held.
type injection struct {
	id string
	// node of the client, and the server's port: no two have the same.
	node, port string
	make       func(s stream, server, mark string) attack.Attempt
	// fits: a connection without weft takes it. answer: it goes to the client, who sees the connection end; towards the server only
	// the server does, for what it sends from then on acknowledges what the client has not sent.
	fits, answer bool
}

// forgedData is data that fits.
func forgedData(from, to string, seq, ack uint32, mark string) attack.Attempt {
	return attack.Attempt{Kind: "inject", From: from, To: to, Segment: &attack.Segment{Seq: seq, Ack: ack, Flags: attack.PSH | attack.ACK}, Send: []byte("injected " + mark + "\n")}
}

func injections(family string) []injection {
	request := func(s stream, server, mark string) attack.Attempt {
		return forgedData(s.client, server, s.clientSeq, s.seqOf, mark)
	}
	all := []injection{
		{id: "inject-request" + family, node: "n1", port: "9000", fits: true, make: request},
		{id: "inject-answer" + family, node: "n1", port: "9001", fits: true, answer: true, make: func(s stream, server, mark string) attack.Attempt {
			return forgedData(server, s.client, s.seqOf, s.clientSeq, mark)
		}},
		{id: "inject-reset" + family, node: "n1", port: "9002", fits: true, answer: true, make: func(s stream, server, _ string) attack.Attempt {
			return attack.Attempt{Kind: "inject", From: server, To: s.client, Segment: &attack.Segment{Seq: s.seqOf, Ack: s.clientSeq, Flags: attack.RST | attack.ACK}}
		}},
	}
	if family == "4" {
		all = append(all, injection{id: "inject-across4", node: "n2", port: "9000", fits: true, make: request},
			injection{id: "inject-wrong", node: "n2", port: "9002", make: func(s stream, server, mark string) attack.Attempt {
				return forgedData(s.client, server, s.clientSeq+1<<30, s.seqOf, mark)
			}})
	}
	return all
}

// injections into an allowed pod's connection; the control is a stranger's to the pod without weft.
func (h *hostiles) injections(c corner) {
	for _, i := range injections(c.family) {
		h.Run(i.id, func(t *testing.T) {
			t.Parallel()
			h.in(t).inject(i, c)
		})
	}
}

func (h *hostiles) inject(i injection, c corner) {
	client, server, injector := h.attackers[hostile.Allowed][i.node], h.target, h.attackers[hostile.Stranger][i.node]
	if c.control {
		client, server, injector = h.attackers[hostile.Stranger][i.node], h.bare, h.attackers[hostile.Barred][i.node]
	}
	to, mark := net.JoinHostPort(h.address(server, c.family), i.port), h.mark()
	s, done := h.held(client, to, i.node)
	a := i.make(s, to, mark)
	a.ID = i.id
	if sent := h.attack(injector, 1, a)[0]; sent.Counts["sent"] != 1 {
		h.Errorf("nothing was sent: %+v", sent)
	}
	o := <-done
	through, ended := h.saw(server, mark) || i.answer && bytes.Contains(o.Got, []byte(mark)), o.Counts["closed"] == 1
	switch {
	case o.Error != "" || o.Counts["answered"] != 1:
		h.Errorf("the connection that is attacked: %+v", o)
	case !c.control && through:
		h.Errorf("what was injected reached an app: %+v", o)
	case !c.control && ended != i.answer:
		h.noEffect("the client sees the connection end: %v, want %v: %+v, %+v", ended, i.answer, o, s)
	case c.control && len(a.Send) > 0 && through != i.fits, c.control && len(a.Send) == 0 && !ended:
		h.noEffect("a connection without weft is not harmed: %+v, %+v", o, s)
	}
	h.did(i.id)
}

// claims: the attacker tells a pod that another's address is its own. A pod of the mesh sends it TLS; the control is a
// pod without weft, which sends it what it has to say.
func (h *hostiles) claims(c corner) {
	stranger, barred, allowed := h.attackers[hostile.Stranger], h.attackers[hostile.Barred], h.attackers[hostile.Allowed]
	by, victim, server, far := stranger["n1"], allowed["n1"], h.target, allowed["n2"]
	if c.control {
		by, victim, server, far = barred["n1"], stranger["n1"], h.bare, stranger["n2"]
	}
	for _, s := range []struct {
		id, claimed string
		server      kube.Pod
	}{{"claim-server" + c.family, h.address(server, c.family), server}, {"claim-gateway" + c.family, h.gateway(c.family), far}} {
		mark, to := h.mark(), net.JoinHostPort(h.address(s.server, c.family), linePort)
		say := attack.Attempt{ID: "say", Kind: "dial", To: to, Send: []byte(mark + "\n"), Millis: 2000}
		if o := h.attack(victim, 1, say)[0]; !bytes.Contains(o.Got, []byte("app: ")) {
			h.Errorf("%s: the server does not answer before: %+v", s.id, o)
		}
		taken := h.background(by, 1, attack.Attempt{ID: s.id, Kind: "claim", Victims: []string{h.address(victim, c.family)}, Claims: []string{s.claimed}, Millis: 12000})
		var said attack.Outcome
		for began := time.Now(); time.Since(began) < 8*time.Second; { // the victim's kernel takes no second word within a second
			time.Sleep(time.Second)
			if said = h.attack(victim, 1, say)[0]; !bytes.Contains(said.Got, []byte("app: ")) {
				break
			}
		}
		o := <-taken
		readable, foreign := false, ""
		for _, heard := range o.Heard {
			readable = readable || bytes.Contains(heard, []byte(mark))
			if !bytes.HasPrefix(heard, []byte{22, 3}) && !bytes.HasPrefix(heard, []byte{23, 3}) {
				foreign = string(heard)
			}
		}
		switch {
		case o.Error != "" || len(o.Heard) == 0:
			h.noEffect("%s: nobody came: %+v; the victim: %+v", s.id, o, said)
		case c.control && !readable:
			h.noEffect("%s: what a pod without weft says is not heard: %+v", s.id, o)
		case !c.control && (readable || foreign != "" || bytes.Contains(said.Got, []byte("app: "))):
			h.Errorf("%s: heard %q, the victim got %q", s.id, o.Heard, said.Got)
		}
		h.did(s.id)
	}
}

// sniffers: what a pod of the mesh hears in its own namespace, where its node's Envoy also has sockets. The control is its own
// traffic, between its Envoy and its app.
func (h *hostiles) sniffers(c corner) {
	for _, at := range placements {
		barred, mark := h.attackers[hostile.Barred][at.node], h.mark()
		server := h.target
		if c.control {
			server = barred
		}
		heard := h.background(barred, 1, attack.Attempt{ID: "sniff", Kind: "sniff", Send: []byte(mark), Millis: 8000})
		time.Sleep(3 * time.Second)
		for _, from := range h.attackers[hostile.Allowed] {
			o := h.attack(from, 1, attack.Attempt{ID: "say", Kind: "dial", To: net.JoinHostPort(h.address(server, c.family), linePort), Send: []byte(mark + "\n"), Millis: 2000})[0]
			if !bytes.Contains(o.Got, []byte(mark)) { // what claims have told it lasts
				h.noEffect("sniff on %s: an allowed pod is not served: %+v", at.node, o)
			}
		}
		o := <-heard
		switch heard := o.Counts["matches"] > 0; {
		case o.Error != "" || heard && !c.control:
			h.Errorf("sniff on %s: %+v", at.node, o)
		case c.control && !heard:
			h.noEffect("sniff on %s: its own traffic is not heard: %+v", at.node, o)
		}
	}
	h.did("sniff")
}
