package netns

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/redirect"
)

// shortcutBound is the default of redirect.Limits.
const shortcutBound = 1 << 20

// shortcutWorld makes a node with one enrolled pod that has the short circuit, and an Envoy that holds what it accepts.
// Where the kernel cannot have it, it checks that this is said, and by whom, and returns nil: there is no more to test.
func shortcutWorld(t *testing.T, settings ...func(*redirect.Config)) (*world, *pod) {
	t.Helper()
	w := newWorld(t, settings...)
	w.services()
	p := w.pod("a", podIPv4, podIPv6)
	w.ok(w.redirect.Enrol(p.description()))
	w.listen(w.envoy, p, 0, func(o *order) { o.Hold = true })
	w.ok(w.redirect.Capture(p.uid, true, true))
	if w.redirect.ShortcutRefused() == nil {
		w.ok(w.redirect.SetShortcut(p.uid, true))
		return w, p
	}
	var uts unix.Utsname
	w.ok(unix.Uname(&uts))
	release := unix.ByteSliceToString(uts.Release[:])
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		t.Fatal(err)
	}
	if major > 6 || major == 6 && minor >= 18 {
		t.Fatalf("kernel %s is refused the short circuit: %v", release, w.redirect.ShortcutRefused())
	}
	err := w.redirect.SetShortcut(p.uid, true)
	if !errors.Is(err, redirect.ErrUnsupported) || !strings.Contains(err.Error(), redirect.MinimumShortcutKernel) {
		t.Errorf("kernel %s: %v does not say that it is too old", release, err)
	}
	w.ok(w.redirect.SetShortcut(p.uid, false)) // which it is
	state, err := w.redirect.Verify(p.uid)
	if err != nil || state.Shortcut || !state.Captured() {
		t.Errorf("a pod that was refused the short circuit: %+v, %v", state, err)
	}
	if n := w.entries("joined") + w.entries("peers"); n > 0 {
		t.Errorf("%d sockets have joined", n)
	}
	return nil, nil
}

// take brings a descriptor of the hand's into this process, and leaves the hand without it.
func (h *hand) take(file int) *stream {
	h.t.Helper()
	st := h.copyOf(file)
	h.must(order{Do: "drop", File: file})
	h.t.Cleanup(st.close)
	return st
}

// leg is a connection between an app and Envoy, with both ends in the test's hands.
type leg struct {
	name       string
	app, proxy *stream
}

// everyLeg makes one of every kind: out is what an app dials, in is Envoy's last hop to an app.
func (w *world) everyLeg(p *pod) []leg {
	w.t.Helper()
	return []leg{
		w.outLeg(p, serviceIPv4), w.outLeg(p, serviceIPv6), w.outLeg(p, "[::ffff:10.96.0.1]:80"),
		w.inLeg(p, podIPv4), w.inLeg(p, podIPv6),
	}
}

func (w *world) outLeg(p *pod, to string) leg {
	w.t.Helper()
	app, file := w.heldLeg(p, to)
	return leg{"app to Envoy " + to, app, w.envoy.take(file)}
}

// heldLeg is outLeg whose Envoy's end stays with Envoy.
func (w *world) heldLeg(p *pod, to string) (app *stream, file int) {
	w.t.Helper()
	app, g, err := p.greeted(to)
	if err != nil || g.By != "out" {
		w.t.Fatalf("dial %s: %+v, %v", to, g, err)
	}
	give := order{Do: "give", Netns: p.path, Port: names.ListenPort(names.PortOutHTTP, 0), To: unmap(app.local()).String()}
	eventually(w.t, "Envoy's end", func() error {
		r := w.envoy.do(give)
		file = r.File
		if r.Error != "" {
			return errors.New(r.Error)
		}
		return nil
	})
	return app, file
}

func (w *world) inLeg(p *pod, address string) leg {
	w.t.Helper()
	at := netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
	server, err := p.socket(unix.AF_INET6, 0, intOption(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 0), bound(at.String()))
	w.ok(err)
	defer server.close()
	return w.inLegTo(p, server, address)
}

// inLegTo has Envoy dial the pod's address at a server socket of an app.
func (w *world) inLegTo(p *pod, server *stream, address string) leg {
	w.t.Helper()
	w.ok(unix.Listen(server.fd, 8))
	to := netip.AddrPortFrom(netip.MustParseAddr(address), server.local().Port())
	r := w.envoy.do(order{Do: "reach", Netns: p.path, To: to.String(), Tag: names.TagLocalLeg})
	if r.Error != "" {
		w.t.Fatalf("local leg to %s: %s", to, r.Error)
	}
	fd, _, err := unix.Accept4(server.fd, unix.SOCK_CLOEXEC)
	w.ok(err)
	app := &stream{fd}
	w.t.Cleanup(app.close)
	return leg{"Envoy to app " + to.String(), app, w.envoy.take(r.File)}
}

// pattern repeats after a prime number of bytes: whatever is lost, doubled or moved shows.
var pattern = func() []byte {
	b := make([]byte, 1<<20+7)
	random := rand.NewChaCha8([32]byte{7})
	_, _ = random.Read(b)
	return append(b, b...)
}()

func patternAt(offset, n int) []byte {
	at := offset % (len(pattern) / 2)
	return pattern[at : at+n]
}

// send writes n bytes of the pattern from offset on, in pieces of random size.
func (st *stream) send(offset, n int, random *rand.Rand) error {
	for end := offset + n; offset < end; {
		piece := min(1+random.IntN([]int{1, 100, 4000, 70000, 200000}[random.IntN(5)]), end-offset)
		sent, err := unix.Write(st.fd, patternAt(offset, piece))
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN:
			if err := poll(st.fd, unix.POLLOUT); err != nil {
				return fmt.Errorf("wait for room: %w", err)
			}
		case err != nil:
			return os.NewSyscallError("write", err)
		default:
			offset += sent
		}
	}
	return nil
}

// receive reads n bytes in pieces of random size; all must be the pattern's.
func (st *stream) receive(offset, n int, random *rand.Rand) error {
	buffer := make([]byte, 300000)
	for end := offset + n; offset < end; {
		size := min(1+random.IntN([]int{10, 1000, 70000, 300000}[random.IntN(4)]), end-offset)
		got, err := unix.Read(st.fd, buffer[:size])
		switch {
		case err == unix.EINTR:
		case err == unix.EAGAIN: // a signal, which the short circuit does not restart after
			if err := poll(st.fd, unix.POLLIN); err != nil {
				return fmt.Errorf("%d bytes in, wait for more: %w", offset, err)
			}
		case err != nil:
			return fmt.Errorf("%d bytes in: %w", offset, os.NewSyscallError("read", err))
		case got == 0:
			return fmt.Errorf("%d bytes in: %w", offset, io.ErrUnexpectedEOF)
		case !bytes.Equal(buffer[:got], patternAt(offset, got)):
			return fmt.Errorf("%d bytes in: the next %d are not those that were sent: %s", offset, got, stray(buffer[:got], offset))
		default:
			offset += got
		}
	}
	return nil
}

// stray tells from where in the pattern bytes are that do not belong to offset.
func stray(b []byte, offset int) string {
	same := 0
	for same < len(b) && b[same] == patternAt(offset, len(b))[same] {
		same++
	}
	b = b[same:]
	at := bytes.Index(pattern, b[:min(len(b), 16)])
	if at < 0 {
		return fmt.Sprintf("from byte %d on they are none of the sent", same)
	}
	moved := at - (offset+same)%(len(pattern)/2)
	return fmt.Sprintf("after %d they go on %d bytes from there", same, moved)
}

// bothWays sends n bytes each way at once, from offset on.
func (l leg) bothWays(offset, n int) error {
	errs := make(chan error, 4)
	for i, f := range []func(int, int, *rand.Rand) error{l.app.send, l.proxy.send, l.app.receive, l.proxy.receive} {
		go func() {
			err := f(offset, n, rand.New(rand.NewPCG(uint64(i), uint64(offset))))
			if err != nil {
				err = fmt.Errorf("%s, %s: %w", l.name, []string{"app sends", "Envoy sends", "app receives", "Envoy receives"}[i], err)
			}
			errs <- err
		}()
	}
	return errors.Join(<-errs, <-errs, <-errs, <-errs)
}

// primed sends a little each way, until the short circuit has it: before both ends have joined and been accepted it stays
// on TCP. It returns how many bytes each way were sent.
func (w *world) primed(l leg) (offset int) {
	w.t.Helper()
	eventually(w.t, l.name+" is in the short circuit", func() error {
		before := w.counter("shortcut_redirected_bytes")
		if err := l.bothWays(offset, 1); err != nil {
			w.t.Fatal(err)
		}
		offset++
		if moved := w.counter("shortcut_redirected_bytes") - before; moved != 2 {
			return fmt.Errorf("%d of 2 bytes", moved)
		}
		return nil
	})
	return offset
}

// unread tells how many bytes FIONREAD shows, and what they take of the kernel's memory.
func (st *stream) unread(t testing.TB) (n, memory int) {
	t.Helper()
	n, err := unix.IoctlGetInt(st.fd, unix.SIOCINQ)
	if err != nil {
		t.Fatal("FIONREAD:", err)
	}
	var info [9]uint32
	size := uint32(unsafe.Sizeof(info))
	if _, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(st.fd), unix.SOL_SOCKET, unix.SO_MEMINFO,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0); errno != 0 {
		t.Fatal("SO_MEMINFO:", errno)
	}
	return n, int(info[0])
}

func shortcutBothWays(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	for _, l := range w.everyLeg(p) {
		offset := w.primed(l)
		before := w.counter("shortcut_redirected_bytes")
		if err := l.bothWays(offset, 64<<20); err != nil {
			t.Error(err)
		}
		if moved := w.counter("shortcut_redirected_bytes") - before; moved < 1<<20 {
			t.Errorf("%s: %d of 128 MiB were redirected", l.name, moved)
		}
		l.app.close()
		l.proxy.close()
	}
	for _, reason := range []string{"unread", "bound"} {
		if w.counter("shortcut_passed_"+reason+"_bytes") == 0 {
			t.Errorf("not a byte was passed to TCP for %q: the switch between the two was not tried", reason)
		}
	}
	w.leftBehind(t)
}

// hasty redirects whatever has an odd size, without asking what TCP still has on its way: msg.c without what keeps order.
func hasty(t *testing.T, joined *ebpf.Map) *ebpf.Program {
	t.Helper()
	const remote, local, remotePort, localPort, size, key = 28, 44, 60, 64, 68, -48 // struct sk_msg_md; struct tuple on the stack
	code := asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadMem(asm.R0, asm.R6, size, asm.Word),
		asm.And.Imm(asm.R0, 1),
		asm.JEq.Imm(asm.R0, 0, "pass"),
		asm.FnGetNetnsCookie.Call(),
		asm.StoreMem(asm.R10, key, asm.R0, asm.DWord),
	}
	for i := range int16(4) {
		code = append(code,
			asm.LoadMem(asm.R1, asm.R6, remote+4*i, asm.Word), asm.StoreMem(asm.R10, key+8+4*i, asm.R1, asm.Word),
			asm.LoadMem(asm.R1, asm.R6, local+4*i, asm.Word), asm.StoreMem(asm.R10, key+24+4*i, asm.R1, asm.Word))
	}
	code = append(code,
		asm.LoadMem(asm.R1, asm.R6, remotePort, asm.Word), asm.HostTo(asm.BE, asm.R1, asm.Word), asm.StoreMem(asm.R10, key+40, asm.R1, asm.Half),
		asm.LoadMem(asm.R1, asm.R6, localPort, asm.Word), asm.StoreMem(asm.R10, key+42, asm.R1, asm.Half),
		asm.StoreImm(asm.R10, key+44, 0, asm.Word),
		asm.Mov.Reg(asm.R1, asm.R6), asm.LoadMapPtr(asm.R2, joined.FD()), asm.Mov.Reg(asm.R3, asm.R10), asm.Add.Imm(asm.R3, key),
		asm.Mov.Imm(asm.R4, 1), asm.FnMsgRedirectHash.Call(),
		asm.Mov.Imm(asm.R0, 1).WithSymbol("pass"), asm.Return())
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.SkMsg, AttachType: ebpf.AttachSkMsgVerdict, License: "GPL", Name: "hasty", Instructions: code})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { program.Close() })
	return program
}

// shortcutControl shows that these tests would see bytes that overtake others: with hasty they do.
func shortcutControl(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	joined := w.pinnedMap("joined")
	w.ok(link.RawAttachProgram(link.RawAttachProgramOptions{Target: joined.FD(), Program: hasty(t, joined), Attach: ebpf.AttachSkMsgVerdict}))
	for range 20 {
		l := w.outLeg(p, serviceIPv6)
		sent := make(chan error, 1)
		go func() { sent <- l.app.send(0, 64<<20, random()) }()
		err := l.proxy.receive(0, 64<<20, random())
		l.proxy.reset()
		<-sent
		l.app.close()
		if err != nil {
			t.Log("as it must be:", err)
			return
		}
	}
	t.Error("bytes that overtake others do not show")
}

// shortcutOthers: only connections of pods that have it join, whoever else is captured in this kernel.
func shortcutOthers(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	bystander, q := shortcutWorld(t)
	bystander.ok(bystander.redirect.SetShortcut(q.uid, false))
	without := w.pod("b", "10.99.1.7", "fd99::1:7")
	w.ok(w.redirect.Enrol(without.description()))
	w.listen(w.envoy, without, 0, func(o *order) { o.Hold = true })
	w.ok(w.redirect.Capture(without.uid, true, true))

	with := append(w.everyLeg(p), w.everyLeg(p)...)
	if n := w.entries("joined"); n != 2*len(with) {
		t.Errorf("%d sockets have joined, not %d", n, 2*len(with))
	}
	legs := append(bystander.everyLeg(q), w.outLeg(without, serviceIPv4), w.outLeg(without, serviceIPv6), w.inLeg(without, "10.99.1.7"), w.inLeg(without, "fd99::1:7"))
	redirected := w.counter("shortcut_redirected_bytes")
	for _, l := range legs {
		if err := l.bothWays(0, 1<<20); err != nil {
			t.Error(err)
		}
	}
	if n := w.entries("joined"); n != 2*len(with) || w.counter("shortcut_redirected_bytes") != redirected {
		t.Errorf("connections of a pod without the short circuit are in it: %d have joined, not %d", n, 2*len(with))
	}
	if n := bystander.entries("joined") + bystander.entries("peers"); n > 0 {
		t.Errorf("%d sockets have joined at a node none of whose pods has the short circuit", n)
	}
}

// leftBehind waits until no socket is in the short circuit.
func (w *world) leftBehind(t *testing.T) {
	t.Helper()
	eventually(t, "no socket in the short circuit", func() error {
		if n, m := w.entries("joined"), w.entries("peers"); n+m > 0 {
			return fmt.Errorf("%d in joined, %d in peers", n, m)
		}
		return nil
	})
}

// shortcutSwitched switches as soon as bytes have gone the way that was switched to.
func shortcutSwitched(t *testing.T) {
	w, p := shortcutWorld(t)
	if w == nil {
		return
	}
	for _, l := range w.everyLeg(p) {
		offset := w.primed(l)
		var stop atomic.Bool
		done := make(chan error, 1)
		go func() {
			var err error
			for ; err == nil && !stop.Load(); offset += 8 << 20 {
				err = l.bothWays(offset, 8<<20)
			}
			done <- err
		}()
		for i := range 20 {
			on := i%2 == 1
			w.ok(w.redirect.SetShortcut(p.uid, on))
			way := map[bool]string{true: "shortcut_redirected_bytes", false: "shortcut_passed_off_bytes"}[on]
			before := w.counter(way)
			eventually(t, l.name+": "+way, func() error {
				if w.counter(way) == before {
					return errors.New("it does not move")
				}
				return nil
			})
		}
		stop.Store(true)
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
