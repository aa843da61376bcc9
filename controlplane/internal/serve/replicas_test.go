package serve_test

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/controlplane/internal/barrier"
	"github.com/weftmesh/weft/controlplane/internal/engine"
	"github.com/weftmesh/weft/controlplane/internal/epoch"
	"github.com/weftmesh/weft/controlplane/internal/ir"
	"github.com/weftmesh/weft/controlplane/internal/replica"
	"github.com/weftmesh/weft/controlplane/internal/reports"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
	"github.com/weftmesh/weft/controlplane/internal/serve"
	"github.com/weftmesh/weft/controlplane/internal/xds"
)

// uid of the one pod that joins and leaves, on the first node; the other nodes call it.
const uid = "u"

const (
	out      = meshv1.PodState_POD_STATE_OUT
	permits  = meshv1.PodState_POD_STATE_CAPTURED
	enforces = meshv1.PodState_POD_STATE_ENFORCED
)

// mesh is a mesh with some replicas, in which everything happens in any order: real engines, servers, barriers and resolvers;
// the API server, the connections and the nodes are made up.
type mesh struct {
	*rand.Rand
	objects  []resolve.Input // as they were, oldest first
	version  uint64
	label    string // of the pod
	replicas []*process
	leader   *process
	began    time.Time
	nodes    []*node
	state    meshv1.PodState // of the pod, in its node's kernel
	policy   string
}

// process is one replica.
type process struct {
	name    string
	engine  *engine.Engine
	server  *serve.Server
	store   *reports.Store
	read    int // how much of objects it has read
	seen    epoch.Kinds
	term    uint64
	given   replica.Orders
	link    *link
	current time.Time // when it last served what the leader ordered, or led
}

// link is a follower's stream to the leader, with what is on its way.
type link struct {
	to       *process
	term     uint64
	down     []replica.Orders
	up       []func()
	answers  map[string]bool
	sessions map[string]*reports.Session
}

// node is an agent.
type node struct {
	name     string
	held     epoch.Mark
	versions map[serve.Resource]string
	peer     *meshv1.Workload // how it speaks to the pod
	own      *meshv1.LocalPod // what it is to do with the pod
	at       *process
	stream   *serve.Agent
	linked   time.Time // when the leader had its stream last
	missed   bool      // the leader need not wait for it: it was away for too long and has not caught up
	opened   uint64
}

func newMesh(seed uint64, replicas, nodes int) *mesh {
	m := &mesh{Rand: rand.New(rand.NewPCG(seed, 7)), state: out}
	for i := range nodes {
		m.nodes = append(m.nodes, &node{name: fmt.Sprint("n", i+1), versions: map[serve.Resource]string{}})
	}
	m.write(names.MeshEnabled)
	for i := range replicas {
		m.replicas = append(m.replicas, m.start(fmt.Sprint("r", i+1)))
	}
	m.lead(m.replicas[0])
	m.leader.engine.Turn()
	return m
}

// write is a change of the pod's label.
func (m *mesh) write(label string) {
	m.version++
	m.label = label
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p", UID: types.UID(uid), Labels: map[string]string{names.LabelMesh: label}}}
	pod.Spec.NodeName, pod.Status.PodIPs = "n1", []corev1.PodIP{{IP: "10.0.0.1"}}
	if m.state != out {
		pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: names.ConditionEnrolled, Status: corev1.ConditionTrue})
	}
	if m.state == enforces {
		pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{Type: names.ConditionEnforced, Status: corev1.ConditionTrue, Message: engine.InForce(m.policy, 0)})
	}
	in := resolve.Input{Namespace: "weft-system", TrustDomain: "cluster.local", Namespaces: []*corev1.Namespace{{ObjectMeta: metav1.ObjectMeta{Name: "shop"}}},
		Pods: []*corev1.Pod{pod}, Made: epoch.Kinds{"pods": m.version}}
	for _, n := range m.nodes {
		agent := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "weft-system", Name: n.name, UID: types.UID(n.name), Labels: map[string]string{"app": names.AgentServiceAccount}}}
		agent.Spec.NodeName, agent.Status.Phase = n.name, corev1.PodRunning
		in.Pods = append(in.Pods, agent)
	}
	m.objects = append(m.objects, in)
}

func (m *mesh) start(name string) *process {
	p := &process{name: name, seen: epoch.Kinds{}}
	quiet := slog.New(slog.DiscardHandler)
	p.server = serve.New(serve.Config{Log: quiet})
	p.store = reports.New(reports.Config{Changed: func() {}, Log: quiet})
	p.engine = engine.New(engine.Config{
		Server:  p.server,
		Reports: func() (r barrier.Reports, synced map[string]bool) { return p.store.View() },
		Give: func(o replica.Orders) {
			p.given = o
			for _, f := range m.replicas {
				if f.link != nil && f.link.to == p {
					f.link.down = append(f.link.down, o)
				}
			}
		},
		Status: func(engine.Picture) {}, Served: func(*ir.Snapshot) {}, Resolved: func(time.Duration) {}, Converged: func(time.Duration) {},
	})
	m.reads(p, len(m.objects))
	return p
}

// reads lets a replica follow the objects up to a point.
func (m *mesh) reads(p *process, to int) {
	p.read = to
	in := m.objects[to-1]
	p.seen.Raise(in.Made)
	in.Seen = epoch.Kinds{"pods": p.seen["pods"]}
	p.engine.Input(in)
}

// stand lets a replica stand for the Lease. One that is not current lets those lead that are.
func (m *mesh) stand(p *process) {
	if time.Since(p.current) >= 8*time.Second {
		for _, other := range m.replicas {
			if time.Since(other.current) < 8*time.Second {
				p = other
			}
		}
	}
	m.lead(p)
}

// lead gives the Lease to a replica. The one before knows that it has it no longer.
func (m *mesh) lead(p *process) {
	if m.leader != nil {
		m.leader.engine.Lead(0, false)
		m.leader.engine.Turn()
	}
	for _, f := range m.replicas {
		m.cut(f)
	}
	m.version++
	m.leader, m.began, p.term, p.given = p, time.Now(), m.version, replica.Orders{}
	p.server.Begin()
	p.store = reports.New(reports.Config{Changed: func() {}, Log: slog.New(slog.DiscardHandler)})
	current := time.Since(p.current) < 8*time.Second
	if !current { // it knows the pods' conditions, which were written in time
		m.write(m.label)
		m.reads(p, len(m.objects))
	}
	p.engine.Lead(p.term, current)
	p.current = time.Now()
	for _, n := range m.nodes {
		if n.at == p {
			m.report(n)
		}
	}
}

func (m *mesh) follow(f *process) {
	m.cut(f)
	if f == m.leader || m.leader == nil {
		return
	}
	f.link = &link{to: m.leader, term: m.leader.term, answers: map[string]bool{}, sessions: map[string]*reports.Session{}}
	m.leader.server.Serves(f.name, 0)
	if m.leader.given.Number > 0 {
		f.link.down = append(f.link.down, m.leader.given)
	}
	for _, n := range m.nodes {
		if n.at == f {
			m.report(n)
		}
	}
}

func (m *mesh) cut(f *process) {
	if f.link != nil {
		f.link.to.server.Left(f.name)
		f.link = nil
	}
}

// answers puts what a follower's nodes answered on its way.
func (m *mesh) answers(f *process) {
	l := f.link
	answers, number := f.server.Answers(l.term)
	l.up = append(l.up, func() {
		for name, a := range answers {
			l.answers[name] = true
			l.to.server.Told(f.name, a)
		}
		for name := range l.answers {
			if answers[name] == nil {
				delete(l.answers, name)
				l.to.server.Gone(f.name, name)
			}
		}
		l.to.server.Serves(f.name, number)
	})
}

// report lets a node's agent open a stream of reports and say everything.
func (m *mesh) report(n *node) {
	n.opened++
	said := []*meshv1.NodeReport{{Kind: &meshv1.NodeReport_Hello{Hello: &meshv1.Hello{Node: n.name, BootId: "b", Opened: n.opened}}}}
	if n == m.nodes[0] {
		r := &meshv1.PodReport{Uid: uid, Sandbox: "s", State: m.state, StartedUnheld: true, InboundPolicy: m.policy}
		said = append(said, &meshv1.NodeReport{Kind: &meshv1.NodeReport_Pod{Pod: r}})
	}
	said = append(said, &meshv1.NodeReport{Kind: &meshv1.NodeReport_Synced{Synced: &meshv1.Synced{}}})
	tell := func(to *process) {
		session := to.store.Open(n.name)
		for _, r := range said {
			_ = session.Take(r) // an older one is refused
		}
	}
	switch {
	case n.at == nil:
	case n.at == m.leader:
		tell(n.at)
	case n.at.link != nil:
		to := n.at.link.to
		n.at.link.up = append(n.at.link.up, func() { tell(to) })
	}
}

func (m *mesh) connect(n *node, to *process) {
	if n.stream != nil {
		n.stream.Close()
	}
	n.at, n.stream = nil, serve.Connect(to.server, n.name, n.held, n.versions)
	if n.stream != nil {
		n.at = to
	}
	// Reports are taken from an agent that is not served yet, too.
	n.at = to
	m.report(n)
}

// crash ends a replica, and starts another under its name that knows nothing but the objects.
func (m *mesh) crash(i int) {
	old := m.replicas[i]
	m.cut(old)
	for _, n := range m.nodes {
		if n.at == old {
			if n.stream != nil {
				n.stream.Close()
			}
			n.at, n.stream = nil, nil
		}
	}
	for _, f := range m.replicas {
		if f.link != nil && f.link.to == old {
			f.link = nil
		}
	}
	m.replicas[i] = m.start(old.name)
	if m.leader == old {
		m.leader = nil
	}
}

// speaks tells whether a node speaks mTLS to the pod.
func (n *node) speaks() bool { return n.peer.GetMtls() }

// receive lets an agent take what its replica has for it.
func (m *mesh) receive(n *node) error {
	if n.stream == nil {
		return nil
	}
	for _, r := range n.stream.Receive() {
		mark, err := epoch.Parse(r.SystemVersionInfo)
		if err != nil {
			return err
		}
		if mark.Before(n.held.Orders) {
			return fmt.Errorf("%s is given orders %v after %v", n.name, mark, n.held)
		}
		n.held = mark
		was := n.speaks()
		for _, x := range r.Resources {
			n.versions[serve.Resource{TypeURL: r.TypeUrl, Name: x.Name}] = x.Version
			if r.TypeUrl == xds.TypeWorkload && x.Name == uid {
				n.peer = &meshv1.Workload{}
				if err := x.Resource.UnmarshalTo(n.peer); err != nil {
					return err
				}
			}
			if r.TypeUrl == xds.TypeLocalPod && x.Name == "n1/"+uid {
				n.own = &meshv1.LocalPod{}
				if err := x.Resource.UnmarshalTo(n.own); err != nil {
					return err
				}
			}
		}
		for _, name := range r.RemovedResources {
			delete(n.versions, serve.Resource{TypeURL: r.TypeUrl, Name: name})
			if r.TypeUrl == xds.TypeLocalPod {
				return fmt.Errorf("%s is told that pod %s is gone", n.name, name)
			}
			if r.TypeUrl == xds.TypeWorkload && name == uid {
				n.peer = nil
			}
		}
		switch {
		case n.missed: // it catches up with what it missed
		case n.speaks() && !was && m.state == out:
			return fmt.Errorf("%s is told to speak mTLS to a pod that is not captured", n.name)
		case was && !n.speaks() && m.state == enforces:
			return fmt.Errorf("%s is told to speak plaintext to a pod that enforces", n.name)
		}
	}
	return nil
}

// obey lets the pod's node do what it is told.
func (m *mesh) obey() error {
	n := m.nodes[0]
	if n.own == nil {
		return nil
	}
	to := []meshv1.PodState{out, permits, enforces}[n.own.Stage]
	if n.own.Goal != meshv1.Stage_STAGE_OUT && m.state == enforces {
		to = enforces // it goes on while it is to be in
	}
	was := m.state
	for _, other := range m.nodes {
		switch {
		case other.missed:
		case to == out && was == permits && other.speaks():
			return fmt.Errorf("the pod leaves while %s speaks mTLS to it", other.name)
		case to == enforces && was != enforces && !other.speaks():
			return fmt.Errorf("the pod enforces while %s speaks plaintext to it", other.name)
		}
	}
	if to == out && was == enforces {
		return fmt.Errorf("the pod leaves and was not Permissive before")
	}
	if m.state = to; to == enforces {
		m.policy = n.own.InboundPolicy
	} else {
		m.policy = ""
	}
	m.report(n)
	return nil
}

// pass lets the clock go on, and notes whom the leader has.
func (m *mesh) pass(d time.Duration) {
	m.look()
	time.Sleep(d)
	m.look()
}

func (m *mesh) look() {
	for _, p := range m.replicas {
		if m.leader != nil && (p == m.leader || p.link != nil && m.leader.given.Number > 0 && p.server.Orders() == m.leader.given.Orders) {
			p.current = time.Now()
		}
	}
	if m.leader == nil {
		return
	}
	has, decides := m.leader.server.State(), m.leader.server.Orders().Term == m.leader.term
	for _, n := range m.nodes {
		if slices.Contains(has.Nodes, n.name) {
			n.linked = time.Now()
			n.missed = n.missed && (!decides || slices.Contains(has.Behind, n.name))
		} else if n.linked.Before(m.began) {
			n.linked = m.began
		}
		n.missed = n.missed || time.Since(n.linked) >= 30*time.Second
	}
}

// happens lets one thing happen.
func (m *mesh) happens() error {
	p, n := m.replicas[m.IntN(len(m.replicas))], m.nodes[m.IntN(len(m.nodes))]
	if m.IntN(3) > 0 { // most of the time what is to be done is done
		m.reads(p, len(m.objects))
		p.engine.Turn()
		if p.link != nil && m.IntN(4) > 0 {
			m.answers(p)
			for _, up := range p.link.up {
				up()
			}
			p.link.up = nil
		}
		if n.stream == nil {
			m.connect(n, p)
		}
		if err := m.receive(n); err != nil {
			return err
		}
		if n.stream != nil {
			n.stream.Answer()
		}
		if m.look(); m.IntN(3) == 0 {
			return m.obey()
		}
		return nil
	}
	switch m.IntN(24) {
	case 0:
		m.write([]string{names.MeshEnabled, names.MeshDisabled}[m.IntN(2)])
	case 1, 2:
		if p.read < len(m.objects) {
			m.reads(p, p.read+1+m.IntN(len(m.objects)-p.read))
		}
	case 3, 4, 5, 6:
		p.engine.Turn()
	case 7, 8, 9:
		return m.receive(n)
	case 10, 11:
		if n.stream != nil {
			n.stream.Answer()
		}
	case 12, 13:
		return m.obey()
	case 14, 15:
		if p.link != nil && len(p.link.down) > 0 {
			p.engine.Take(p.link.down[0])
			p.link.down = p.link.down[1:]
		}
	case 16:
		if p.link != nil {
			m.answers(p)
		}
	case 17, 18:
		if p.link != nil && len(p.link.up) > 0 {
			p.link.up[0]()
			p.link.up = p.link.up[1:]
		}
	case 19:
		if p.link == nil || m.IntN(8) == 0 {
			m.follow(p)
		} else if m.IntN(8) == 0 {
			m.cut(p)
		}
	case 20:
		m.connect(n, p)
	case 21:
		if m.leader == nil || m.IntN(3) == 0 {
			m.stand(p)
		} else if m.IntN(6) == 0 {
			m.crash(slices.Index(m.replicas, p))
		}
	case 22, 23:
		if m.IntN(8) == 0 {
			m.pass(31 * time.Second)
		} else {
			m.pass(time.Second)
		}
	}
	m.look()
	return nil
}

// settle lets everything go its way until the pod is as it should be.
func (m *mesh) settle() error {
	m.write(names.MeshEnabled)
	if m.leader == nil {
		m.stand(m.replicas[0])
	}
	for range 40 {
		for _, p := range m.replicas {
			m.reads(p, len(m.objects))
			if p != m.leader && p.link == nil {
				m.follow(p)
			}
			p.engine.Turn()
			if p.link != nil {
				for _, o := range p.link.down {
					p.engine.Take(o)
				}
				p.link.down = nil
				p.engine.Turn()
				m.answers(p)
				for _, up := range p.link.up {
					up()
				}
				p.link.up = nil
			}
		}
		for i, n := range m.nodes {
			if n.stream == nil {
				m.connect(n, m.replicas[i%len(m.replicas)])
			}
			if err := m.receive(n); err != nil {
				return err
			}
			if n.stream != nil {
				n.stream.Answer()
			}
		}
		m.pass(time.Second)
		if err := m.obey(); err != nil {
			return err
		}
	}
	own := m.nodes[0].own
	if m.state != enforces || own.GetStage() != meshv1.Stage_STAGE_ENFORCED || own.GetMovedPolicy() != m.policy || slices.ContainsFunc(m.nodes, func(n *node) bool { return !n.speaks() }) {
		return fmt.Errorf("it ends %s, %v", m.state, own)
	}
	return nil
}

// TestReplicas lets everything happen in any order to replicas, their connections, their leader and their nodes: nobody speaks mTLS
// to a pod that does not capture, no pod enforces while somebody who was waited for speaks plaintext to it, and no agent is
// given what is older than what it has.
func TestReplicas(t *testing.T) {
	for seed := range uint64(300) {
		synctest.Test(t, func(t *testing.T) {
			m := newMesh(seed, 2+int(seed%2), 3)
			for i := range 600 {
				if err := m.happens(); err != nil {
					t.Fatalf("seed %d step %d: %v", seed, i, err)
				}
			}
			if err := m.settle(); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
		})
		if t.Failed() {
			return
		}
	}
}
