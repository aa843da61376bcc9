//go:build e2e

package e2e

import (
	"bytes"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"strings"
	"testing"
	"time"
)

var rotate = flag.Bool("rotate", false, "change the root under load: 25 minutes, most of them kubelet's time to mount the bundle and the end of old SVIDs; and five times with SVIDs that live for a minute, 15 minutes")

// shortLived are values under which SVIDs are renewed every half minute, and a root can be replaced in two minutes.
var shortLived = []string{"--set", "controlplane.svidTTL=1m", "--set", "controlplane.mountDelay=1s"}

// TestRotations: SVIDs are renewed again and again, and five roots come and go meanwhile, under load without raw TCP that never ends:
// nothing is lost.
func TestRotations(t *testing.T) {
	if !*rotate {
		t.Skip("it takes 15 minutes: run it with -rotate; its short form is part of TestUpgrade")
	}
	reinstall(t, shortLived...)
	t.Cleanup(func() { reinstall(t) })
	beginAnew(t)
	s := enrolledShop(newDrainedShop(t))
	began := time.Now()
	for range 5 {
		s.changeRoot(true)
	}
	for time.Since(began) < 10*time.Minute {
		s.dwell(1000)
	}
	sum := s.leave()
	t.Logf("%v: %d requests on %d connections, %d requests lost", time.Since(began).Round(time.Second), sum.Requests, sum.Connections, sum.Failed)
}

// changeRoot changes the root while SVIDs are short-lived, until both nodes have renewed all of theirs, by the new root; to the end: until
// the old one is dropped.
func (s shop) changeRoot(toTheEnd bool) {
	t := s.T
	t.Helper()
	began := time.Now()
	old := readAuthority(t).roots(t)[0]
	before := map[string]map[string][]*x509.Certificate{}
	for _, at := range placements {
		before[at.node] = kept(t, at.node)
	}
	request := fmt.Sprint(began.UnixNano())
	if _, err := k8s.Kubectl(t.Context(), "annotate", "secret", "-n", system, "weft-ca", "weft.dev/rotate="+request, "--overwrite"); err != nil {
		t.Fatal(err)
	}
	phase := func(want string) {
		t.Helper()
		until(t, 3*time.Minute, "the phase "+want, func() (bool, string) {
			now := readAuthority(t).Annotations
			return now["weft.dev/rotation-phase"] == want && (want != "done" || now["weft.dev/rotated"] == request), fmt.Sprint(now)
		})
	}
	phase("switched")
	root := readAuthority(t).roots(t)[0]
	if bytes.Equal(root.Raw, old.Raw) {
		t.Fatal("the old root still signs")
	}
	renewed := 0
	for _, at := range placements {
		until(t, 2*time.Minute, "SVIDs of the new root on "+at.node, func() (bool, string) {
			renewed = 0
			for name, chain := range kept(t, at.node) {
				if !strings.HasPrefix(name, "spiffe://") || len(chain) == 0 {
					continue
				}
				if life := chain[0].NotAfter.Sub(chain[0].NotBefore); life > 10*time.Minute || !signedBy(chain[0], root) {
					return false, fmt.Sprintf("that of %s lives for %v, and is the new root's: %t", name, life, signedBy(chain[0], root))
				}
				if was := before[at.node][name]; len(was) > 0 && bytes.Equal(was[0].Raw, chain[0].Raw) {
					return false, name + " has its old one"
				}
				renewed++
			}
			return renewed > 0, "Envoy holds no SVID"
		})
	}
	s.dwell(400)
	if toTheEnd {
		phase("done")
		if now := readAuthority(t).roots(t); len(now) != 1 || !bytes.Equal(now[0].Raw, root.Raw) {
			t.Fatalf("%d roots are trusted at the end, want the new one alone", len(now))
		}
	}
	sum := s.lossless()
	t.Logf("a new root after %v; by now %d requests on %d connections, %d requests lost", time.Since(began).Round(time.Second), sum.Requests, sum.Connections, sum.Failed)
}

// authority is what the CA Secret says.
type authority struct {
	Data        map[string][]byte
	Annotations map[string]string
}

func readAuthority(t *testing.T) authority {
	t.Helper()
	raw, err := k8s.Kubectl(t.Context(), "get", "secret", "-n", system, "weft-ca", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var secret struct {
		Data     map[string][]byte
		Metadata struct{ Annotations map[string]string }
	}
	if err := json.Unmarshal([]byte(raw), &secret); err != nil {
		t.Fatal(err)
	}
	return authority{secret.Data, secret.Metadata.Annotations}
}

// roots are those that are trusted, the one that signs first.
func (a authority) roots(t *testing.T) []*x509.Certificate {
	t.Helper()
	return certificates(t, a.Data["ca.crt"])
}

func certificates(t *testing.T, text []byte) (out []*x509.Certificate) {
	t.Helper()
	for {
		var block *pem.Block
		if block, text = pem.Decode(text); block == nil {
			return out
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, c)
	}
}

// kept are the certificates that a node's Envoy has, by the name of their secret: SVIDs' leaves, and the trust bundle's roots.
func kept(t *testing.T, node string) map[string][]*x509.Certificate {
	t.Helper()
	type source struct {
		Bytes  string `json:"inline_bytes"`
		String string `json:"inline_string"`
	}
	var dump struct {
		Configs []struct {
			Secrets []struct {
				Name   string
				Secret struct {
					Certificate struct {
						Chain source `json:"certificate_chain"`
					} `json:"tls_certificate"`
					Validation struct {
						Roots source `json:"trusted_ca"`
					} `json:"validation_context"`
				}
			} `json:"dynamic_active_secrets"`
		}
	}
	if err := json.Unmarshal([]byte(admin(t, node, "/config_dump")), &dump); err != nil {
		t.Fatal(err)
	}
	out := map[string][]*x509.Certificate{}
	for _, c := range dump.Configs {
		for _, s := range c.Secrets {
			for _, from := range []source{s.Secret.Certificate.Chain, s.Secret.Validation.Roots} {
				text, err := base64.StdEncoding.DecodeString(from.Bytes)
				if err != nil {
					t.Fatal(err)
				}
				out[s.Name] = append(out[s.Name], certificates(t, append(text, from.String...))...)
			}
		}
	}
	return out
}

// signedBy tells whether a root vouches for an SVID.
func signedBy(leaf, root *x509.Certificate) bool {
	pool := x509.NewCertPool()
	pool.AddCert(root)
	_, err := leaf.Verify(x509.VerifyOptions{Roots: pool, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
	return err == nil
}

// TestRootRotation: the root is replaced while the shop is in the mesh under load and leaders die, and nothing is lost. The load has no raw TCP:
// those connections are cut within the life of their peer's SVID, as documented.
func TestRootRotation(t *testing.T) {
	if !*rotate {
		t.Skip("it takes 25 minutes: run it with -rotate")
	}
	reinstall(t, "--set", "controlplane.svidTTL=15m") // the shortest there is
	t.Cleanup(func() { reinstall(t) })
	beginAnew(t) // the root that is there has signed for longer, and stays until the last of those SVIDs ends
	s := newShopWith(t, "shop", "busy", busy)
	apply(t, guarded)
	s.label("app in (busy,catalogue,prices)", true)
	s.begin("app=busy")
	started := time.Now()
	secure(t, started)
	old := readAuthority(t).roots(t)
	if len(old) != 1 {
		t.Fatalf("%d roots before the rotation", len(old))
	}

	request := fmt.Sprint(started.Unix())
	if _, err := k8s.Kubectl(t.Context(), "annotate", "secret", "-n", system, "weft-ca", "weft.dev/rotate="+request, "--overwrite"); err != nil {
		t.Fatal(err)
	}
	// The leader dies in every phase, and the next goes on from it.
	for _, phase := range []string{"published", "switched"} {
		until(t, 15*time.Minute, "the phase "+phase, func() (bool, string) {
			now := readAuthority(t).Annotations
			return now["weft.dev/rotation-phase"] == phase, fmt.Sprint(now)
		})
		leader, _ := replicas(t)
		kill(t, leader)
		next, _ := replicas(t)
		t.Logf("phase %s: the leader %s is killed, %s leads", phase, leader.Name, next.Name)
	}
	both := readAuthority(t).roots(t)
	if len(both) != 2 || bytes.Equal(both[0].Raw, old[0].Raw) || !bytes.Equal(both[1].Raw, old[0].Raw) {
		t.Fatalf("%d roots are trusted after the switch, want the new one and the old one", len(both))
	}
	t.Logf("the new root signs after %v", time.Since(started).Round(time.Second))
	s.dwell(400)
	s.lossless()

	until(t, 30*time.Minute, "the old root to be dropped", func() (bool, string) {
		now := readAuthority(t).Annotations
		return now["weft.dev/rotation-phase"] == "done" && now["weft.dev/rotated"] == request, fmt.Sprint(now)
	})
	t.Logf("the old root is dropped after %v", time.Since(started).Round(time.Second))
	now := readAuthority(t).roots(t)
	if len(now) != 1 || !bytes.Equal(now[0].Raw, both[0].Raw) {
		t.Fatalf("%d roots are trusted at the end, want the new one alone", len(now))
	}
	for _, at := range placements {
		t.Run(at.node, func(t *testing.T) {
			until(t, time.Minute, "Envoy to trust the new root alone", func() (bool, string) {
				roots := kept(t, at.node)["bundle"]
				return len(roots) == 1 && bytes.Equal(roots[0].Raw, now[0].Raw), fmt.Sprintf("it trusts %d roots", len(roots))
			})
			svids := 0
			for name, chain := range kept(t, at.node) {
				if !strings.HasPrefix(name, "spiffe://") || len(chain) == 0 {
					continue
				}
				svids++
				if !signedBy(chain[0], now[0]) || signedBy(chain[0], old[0]) {
					t.Errorf("the SVID of %s: the new root vouches for it: %t, the old one: %t", name, signedBy(chain[0], now[0]), signedBy(chain[0], old[0]))
				}
			}
			if svids == 0 {
				t.Error("Envoy holds no SVID")
			}
		})
	}
	secure(t, time.Now())
	sum := s.lossless()
	t.Logf("%d requests on %d connections, %d requests lost", sum.Requests, sum.Connections, sum.Failed)
}

// beginAnew gives weft another root, as docs/OPERATE.md says: without the Secret the controller makes one, and agents start from it.
func beginAnew(t *testing.T) {
	t.Helper()
	scale(t, 0)
	if _, err := k8s.Kubectl(t.Context(), "delete", "secret,configmap", "weft-ca", "-n", system); err != nil {
		t.Fatal(err)
	}
	scale(t, controllers)
	restartAgents(t)
}

// secure waits until the callees' Envoys on both nodes have logged hundreds of requests that began since, and fails unless
// nearly all of them had a peer's certificate.
func secure(t *testing.T, since time.Time) {
	t.Helper()
	for _, at := range placements {
		with, without := 0, 0
		until(t, time.Minute, "requests at the callees' Envoy on "+at.node, func() (bool, string) {
			with, without = peers(t, at.node, since)
			return with+without >= 200, fmt.Sprintf("%d with a peer's certificate, %d without", with, without)
		})
		if without > with/10 {
			t.Fatalf("on %s: %d requests and connections with a peer's certificate, %d without: the load is not under mTLS", at.node, with, without)
		}
	}
}

// peers counts what a node's Envoy has let in of the shop since, by whether it saw a certificate.
func peers(t *testing.T, node string, since time.Time) (with, without int) {
	t.Helper()
	for _, l := range accessLog(t, node, since) {
		if l.Direction != "in" {
			continue
		}
		opened, err := time.Parse(time.RFC3339Nano, l.Time)
		if err != nil || opened.Before(since) || strings.HasSuffix(l.Destination, ":9001") {
			continue
		}
		if l.Peer != "" && l.Peer != "-" {
			with++
		} else {
			without++
		}
	}
	return with, without
}
