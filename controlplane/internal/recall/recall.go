// Package recall keeps what the mesh's objects said last where the next leader finds it: MeshConfig, whose deletion never
// means "withdraw", and the good form of every policy, which stays in force when an update of it cannot be compiled.
package recall

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/weftmesh/weft/api/names"
	"github.com/weftmesh/weft/api/v1alpha1"
	"github.com/weftmesh/weft/controlplane/internal/resolve"
)

const (
	// sizeLimit bounds the ConfigMap, in bytes: Kubernetes takes no object beyond 1 MiB.
	sizeLimit = 900 << 10
	// interval between two writes.
	interval = 2 * time.Second
	// policyPrefix of the keys of policies; the rest is resolve's name of the policy.
	policyPrefix = "policy."
)

// Known is what was said last.
type Known struct {
	// MeshConfig is nil if there never was one.
	MeshConfig *v1alpha1.MeshConfig
	// Policies are resolve's good forms.
	Policies map[string]resolve.Good
}

// Config of a Store.
type Config struct {
	Client kubernetes.Interface
	// Namespace is weft's own.
	Namespace string
	Log       *slog.Logger
}

// Store is the ConfigMap.
type Store struct {
	config Config
	wake   chan struct{}

	mu   sync.Mutex
	next Known
}

// Open reads what the leader before kept. What cannot be read in it is left out.
func Open(ctx context.Context, c Config) (*Store, Known, error) {
	s := &Store{config: c, wake: make(chan struct{}, 1)}
	m, err := c.Client.CoreV1().ConfigMaps(c.Namespace).Get(ctx, names.LastKnownConfigMap, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return s, Known{}, nil
	}
	if err != nil {
		return nil, Known{}, fmt.Errorf("read ConfigMap %s/%s: %w", c.Namespace, names.LastKnownConfigMap, err)
	}
	known, bad := decode(m.Data)
	for key, err := range bad {
		c.Log.Warn("last known form cannot be read", "key", key, "error", err)
	}
	return s, known, nil
}

// Take takes what a turn used; Run writes it. An uninstallation forgets all: nothing of it may come back with the next
// installation.
func (s *Store) Take(in resolve.Input, good map[string]resolve.Good) {
	if in.UninstallOrder != nil && in.UninstallOrder.Data[names.UninstallKey] == "true" {
		s.keep(Known{})
		return
	}
	s.keep(Known{in.MeshConfig, good})
}

func (s *Store) keep(k Known) {
	s.mu.Lock()
	s.next = k
	s.mu.Unlock()
	s.again()
}

func (s *Store) again() {
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// Run writes what changed until ctx ends, not more often than once per interval.
func (s *Store) Run(ctx context.Context) {
	var written map[string]string
	for ; ctx.Err() == nil; pause(ctx, interval) {
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		}
		s.mu.Lock()
		next := s.next
		s.mu.Unlock()
		content, skipped := encode(next, sizeLimit)
		if written != nil && maps.Equal(content, written) {
			continue
		}
		if len(skipped) > 0 {
			s.config.Log.Warn("no room to keep the last known form of policies: broken by an update they deny after a restart", "policies", len(skipped), "first", skipped[0])
		}
		if err := s.write(ctx, content); err != nil {
			s.config.Log.Warn("last known forms cannot be kept, trying again", "error", err)
			s.again()
		} else {
			written = content
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

func (s *Store) write(ctx context.Context, content map[string]string) error {
	maps := s.config.Client.CoreV1().ConfigMaps(s.config.Namespace)
	m, err := maps.Get(ctx, names.LastKnownConfigMap, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		m = &corev1.ConfigMap{ObjectMeta: metav1.ObjectMeta{Name: names.LastKnownConfigMap, Namespace: s.config.Namespace}, Data: content}
		_, err = maps.Create(ctx, m, metav1.CreateOptions{})
	case err == nil:
		m.Data = content
		_, err = maps.Update(ctx, m, metav1.UpdateOptions{})
	}
	if err != nil {
		return fmt.Errorf("write ConfigMap %s/%s: %w", s.config.Namespace, names.LastKnownConfigMap, err)
	}
	return nil
}

// encode makes the content: MeshConfig, then the forms that are in force in place of broken ones and of lost ones, then the others.
// skipped are those that the limit leaves no room for.
func encode(k Known, limit int) (content map[string]string, skipped []string) {
	content = map[string]string{}
	size := 0
	add := func(key string, o any) {
		text, err := json.Marshal(o)
		if err != nil {
			panic(fmt.Sprintf("marshal %s: %v", key, err)) // plain data always marshals
		}
		if size+len(key)+len(text) > limit {
			skipped = append(skipped, key)
			return
		}
		size += len(key) + len(text)
		content[key] = string(text)
	}
	if k.MeshConfig != nil {
		add("MeshConfig", &v1alpha1.MeshConfig{ObjectMeta: trim(k.MeshConfig.ObjectMeta), Spec: k.MeshConfig.Spec})
	}
	ids := slices.SortedFunc(maps.Keys(k.Policies), func(a, b string) int {
		return cmp.Or(rank(k.Policies[a])-rank(k.Policies[b]), cmp.Compare(a, b))
	})
	for _, id := range ids {
		slim := resolve.Good{Lost: k.Policies[id].Lost}
		if p := k.Policies[id].Authentication; p != nil {
			slim.Authentication = &v1alpha1.AuthenticationPolicy{ObjectMeta: trim(p.ObjectMeta), Spec: p.Spec}
		}
		if p := k.Policies[id].Access; p != nil {
			slim.Access = &v1alpha1.AccessPolicy{ObjectMeta: trim(p.ObjectMeta), Spec: p.Spec}
		}
		add(policyPrefix+id, slim)
	}
	return content, skipped
}

func rank(g resolve.Good) int {
	if g.InForce || g.Lost {
		return 0
	}
	return 1
}

// trim keeps what resolve reads.
func trim(m metav1.ObjectMeta) metav1.ObjectMeta {
	return metav1.ObjectMeta{Namespace: m.Namespace, Name: m.Name, UID: m.UID, CreationTimestamp: m.CreationTimestamp}
}

func decode(content map[string]string) (k Known, bad map[string]error) {
	k.Policies, bad = map[string]resolve.Good{}, map[string]error{}
	for key, text := range content {
		id, policy := strings.CutPrefix(key, policyPrefix)
		var err error
		switch {
		case policy:
			var g resolve.Good
			if err = json.Unmarshal([]byte(text), &g); err == nil && (g.Authentication == nil) == (g.Access == nil) {
				err = errors.New("not one policy")
			}
			if err == nil {
				k.Policies[id] = g
			}
		case key == "MeshConfig":
			var m v1alpha1.MeshConfig
			if err = json.Unmarshal([]byte(text), &m); err == nil {
				k.MeshConfig = &m
			}
		default:
			err = errors.New("unknown key")
		}
		if err != nil {
			bad[key] = err
		}
	}
	return k, bad
}
