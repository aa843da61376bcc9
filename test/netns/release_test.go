package netns

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/weftmesh/weft/redirect"
)

// objects lists the ids of everything that the instance holds in the kernel.
func (w *world) objects(p *pod) (maps []ebpf.MapID, programs []ebpf.ProgramID, links []link.ID) {
	w.t.Helper()
	err := filepath.WalkDir(w.pins, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		if filepath.Base(filepath.Dir(path)) == "maps" {
			m, err := ebpf.LoadPinnedMap(path, nil)
			if err != nil {
				return err
			}
			defer m.Close()
			info, err := m.Info()
			if err != nil {
				return err
			}
			id, _ := info.ID()
			maps = append(maps, id)
			return nil
		}
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return err
		}
		defer l.Close()
		info, err := l.Info()
		if err != nil {
			return err
		}
		programs = append(programs, info.Program)
		links = append(links, info.ID)
		return nil
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return maps, programs, links
}

func lifeRelease(t *testing.T) {
	w, p, stranger := serving(t)
	bystander := newWorld(t)
	bystander.services()
	q := bystander.enrolled("a", podIPv4, podIPv6)
	q.serve("app", 8080)
	visitor := bystander.pod("x", strangerIPv4, strangerIPv6)
	maps, programs, links := w.objects(p)
	if len(maps) != 22 || len(links) != 13 {
		t.Errorf("%d maps and %d links are pinned, not 22 and 13", len(maps), len(links))
	}
	p.reaches(t, serviceIPv4)
	p.reset()
	w.ok(w.redirect.Close())
	for range 2 { // a second time is no error
		w.ok(redirect.Release(w.pins, false))
	}
	eventually(t, "no BPF object", func() error {
		for _, id := range maps {
			if m, err := ebpf.NewMapFromID(id); err == nil {
				m.Close()
				return errors.New("a map is left")
			}
		}
		for _, id := range programs {
			if program, err := ebpf.NewProgramFromID(id); err == nil {
				program.Close()
				return errors.New("a program is left")
			}
		}
		for _, id := range links {
			if l, err := link.NewFromID(id); err == nil {
				l.Close()
				return errors.New("a link is left")
			}
		}
		return nil
	})
	wantBy(t, stranger, appAddresses[0], "app")
	w.unlistenQuietly(p)
	if routes := p.steeringRoutes(); len(routes) > 0 {
		t.Errorf("routes are left: %v", routes)
	}
	if ports := p.readSysctl("ipv4/ip_local_reserved_ports"); ports != "" {
		t.Errorf("ports %s are reserved", ports)
	}
	if migrate := p.readSysctl("ipv4/tcp_migrate_req"); migrate != "0" {
		t.Errorf("tcp_migrate_req is %s", migrate)
	}
	q.reaches(t, serviceIPv4) // the other instance works on
	q.reaches(t, serviceIPv6)
	relayed(t, visitor, appAddresses[0])
	relayed(t, visitor, appAddresses[1])
	w.load()
}

// lifeReleaseInUse releases while connections are open: they go on, in both families, and no packet of theirs leaves.
func lifeReleaseInUse(t *testing.T) {
	w, p, stranger := serving(t)
	p.sysctl("ipv6/conf/lo/disable_ipv6", "0")
	kept := map[string]*stream{}
	for _, to := range []string{serviceIPv4, serviceIPv6} {
		kept[to], _ = p.reaches(t, to)
	}
	inbound, g, err := stranger.greeted(appAddresses[1])
	if err != nil || g.By != "in" {
		t.Fatal(g.By, err)
	}
	kept[appAddresses[1]] = inbound
	lost := w.unroutable()
	w.ok(w.redirect.Close())
	w.ok(redirect.Release(w.pins, true))
	for to, st := range kept {
		if err := st.write("still\n"); err != nil {
			t.Error(err)
		}
		if line, err := st.readLine(); err != nil || line != "still" {
			t.Errorf("a connection to %s after Release: %q, %v", to, line, err)
		}
	}
	wantBy(t, stranger, appAddresses[0], "app")
	_, err = p.dial(serviceIPv4)
	if err == nil {
		t.Error("a service is captured after Release")
	}
	if n := w.unroutable(); n != lost {
		t.Errorf("%d packets for Envoy reached the node", n-lost)
	}
	if routes := p.steeringRoutes(); len(routes) != 2 {
		t.Errorf("%d steering routes are left, not those of two families", len(routes))
	}
	// Envoy's end, with its pod: the apps are told.
	w.envoy.kill()
	for to, st := range kept {
		if line, err := st.readLine(); err == nil {
			t.Errorf("the connection to %s says %q after Envoy's end", to, line)
		}
	}
	p.reset()
	w.load() // and the node may join again
	w.envoy = newHand(t, w.root, w.name+"-envoy-again")
	w.ok(w.redirect.AttachProxy(0, w.envoy.cgroup))
	w.services()
	w.enrol(p)
	p.reaches(t, serviceIPv6)
	p.reset()
	w.settled(p)
	w.withdrawn(p)
	w.unlistenQuietly(p)
	untouched(t, w, p)
}

// lifeReleaseAfterEnvoy releases when no Envoy is left and an app has not closed what it had in it: nothing is spared for that.
func lifeReleaseAfterEnvoy(t *testing.T) {
	w, p, _ := serving(t)
	p.reaches(t, serviceIPv4)
	p.reaches(t, serviceIPv6)
	w.envoy.kill()
	if state, err := w.redirect.Verify(p.uid); err != nil || state.Outgoing != 2 {
		t.Fatalf("%d connections are counted, not the app's 2: %v", state.Outgoing, err)
	}
	w.ok(w.redirect.Close())
	w.ok(redirect.Release(w.pins, false))
	if routes := p.steeringRoutes(); len(routes) > 0 {
		t.Errorf("routes are left: %v", routes)
	}
	p.reset()
	w.load()
	w.envoy = newHand(t, w.root, w.name+"-envoy-again")
}
