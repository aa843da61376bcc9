package ca

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/weftmesh/weft/api/names"
)

// Annotations on the CA Secret.
const (
	// AnnotationRotate asks for a new root: any value that has not been answered yet.
	AnnotationRotate = names.Group + "/rotate"
	// AnnotationPhase tells how far the newest change of root has come: added, published, switched or done.
	AnnotationPhase = names.Group + "/rotation-phase"
	// AnnotationRotated is the value of AnnotationRotate whose change of root is done.
	AnnotationRotated = names.Group + "/rotated"
)

const (
	// rotationKey is where the Secret says how far a change of root has come.
	rotationKey = "rotation"
	// renewBefore is how long before its end a root is replaced.
	renewBefore = rootLife / 5
	// lookEvery is how often a replica looks at the Secret: its right to it is by name, which admits no watch.
	lookEvery = 10 * time.Second
)

// phase is how far a change of root has come. Each is one Update of the Secret, so that a controller that starts in the
// middle goes on from it.
type phase string

const (
	// idle: one root.
	idle phase = ""
	// added: the new root is in the bundle, the old one signs.
	added phase = "added"
	// published: the ConfigMap holds both; the new root signs once every connected node has both and the mounts had their time.
	published phase = "published"
	// switched: the new root signs; the old one goes when the last SVID that it signed has ended.
	switched phase = "switched"
)

func (p phase) String() string {
	if p == idle {
		return "done"
	}
	return string(p)
}

// rotation is the state that the Secret keeps.
type rotation struct {
	Phase phase     `json:"phase"`
	Since time.Time `json:"since,omitzero"`
	// TTL is the longest that an SVID signed by one of the roots may live. It never falls: a shorter one that is configured
	// says nothing about those that are out.
	TTL time.Duration `json:"ttl,omitempty"`
	// Answered is the value of AnnotationRotate that the newest change answered.
	Answered string `json:"answered,omitempty"`
}

// stored is what the Secret holds.
type stored struct {
	roots    []*Root
	rotation rotation
}

func read(secret *corev1.Secret) (stored, error) {
	var s stored
	var err error
	if s.roots, err = decode(secret.Data); err != nil {
		return s, err
	}
	if raw := secret.Data[rotationKey]; len(raw) > 0 {
		if err := json.Unmarshal(raw, &s.rotation); err != nil {
			return s, fmt.Errorf("read key %s: %w", rotationKey, err)
		}
	}
	want := 2
	switch s.rotation.Phase {
	case idle:
		want = 1
	case added, published, switched:
	default:
		return s, fmt.Errorf("read key %s: unknown phase %q", rotationKey, s.rotation.Phase)
	}
	if len(s.roots) != want {
		return s, fmt.Errorf("read roots: %d of them in phase %q, want %d", len(s.roots), s.rotation.Phase, want)
	}
	return s, nil
}

func (s stored) data() (map[string][]byte, error) {
	data, err := encode(s.roots)
	if err != nil {
		return nil, err
	}
	if data[rotationKey], err = json.Marshal(s.rotation); err != nil {
		return nil, fmt.Errorf("write key %s: %w", rotationKey, err)
	}
	return data, nil
}

// Rotate changes the root when it grows old or when AnnotationRotate asks for it, until ctx ends. Only the leader calls it.
func (a *Authority) Rotate(ctx context.Context) {
	a.every(ctx, "root rotation step failed, trying again", a.step)
}

// Publish writes the bundle as the Secret has it now where agents mount it from. Only the leader calls it.
func (a *Authority) Publish(ctx context.Context) error {
	if _, _, err := a.look(ctx); err != nil {
		return err
	}
	return a.publish(ctx)
}

// Follow takes over what the leader makes of the Secret, until ctx ends.
func (a *Authority) Follow(ctx context.Context) {
	a.every(ctx, "the CA Secret cannot be read, trying again", func(ctx context.Context) error {
		_, _, err := a.look(ctx)
		return err
	})
}

func (a *Authority) every(ctx context.Context, failed string, do func(context.Context) error) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		if err := do(ctx); err != nil && ctx.Err() == nil {
			a.config.Log.Warn(failed, "error", err)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// look takes over what the Secret holds.
func (a *Authority) look(ctx context.Context) (*corev1.Secret, stored, error) {
	secret, err := a.config.Client.CoreV1().Secrets(a.config.Namespace).Get(ctx, secretName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, stored{}, fmt.Errorf("read Secret %s/%s: it was deleted; restore it from a backup, or restart the controller and then every agent to begin with a new root", a.config.Namespace, secretName)
	}
	if err != nil {
		return nil, stored{}, fmt.Errorf("read Secret %s/%s: %w", a.config.Namespace, secretName, err)
	}
	now, err := read(secret)
	if err != nil {
		return nil, stored{}, fmt.Errorf("Secret %s/%s: %w; restore it from a backup", a.config.Namespace, secretName, err)
	}
	a.adopt(now.roots)
	return secret, now, nil
}

// step takes over what the Secret holds, and goes at most one phase on.
func (a *Authority) step(ctx context.Context) error {
	secret, now, err := a.look(ctx)
	if err != nil {
		return err
	}
	if err := a.publish(ctx); err != nil {
		return err
	}
	next, err := a.next(now, secret.Annotations[AnnotationRotate])
	if err != nil || next == nil {
		return err
	}
	if secret.Data, err = next.data(); err != nil {
		return err
	}
	turns := next.rotation.Phase != now.rotation.Phase
	if turns {
		tell(secret, next.rotation)
	}
	// Update, not Patch: a Secret that changed since it was read is not overwritten.
	if _, err := a.config.Client.CoreV1().Secrets(a.config.Namespace).Update(ctx, secret, metav1.UpdateOptions{}); err != nil {
		return fmt.Errorf("write Secret %s/%s: %w", a.config.Namespace, secretName, err)
	}
	if !turns {
		return nil
	}
	a.config.Log.Info("root rotation", "phase", next.rotation.Phase.String(), "roots", len(next.roots), "signer", next.roots[0].Certificate.SerialNumber)
	a.adopt(next.roots)
	return a.publish(ctx)
}

// tell puts how far a change of root has come where its user looks.
func tell(secret *corev1.Secret, r rotation) {
	if secret.Annotations == nil { // it grew old by itself
		secret.Annotations = map[string]string{}
	}
	secret.Annotations[AnnotationPhase] = r.Phase.String()
	if r.Phase == idle && r.Answered != "" {
		secret.Annotations[AnnotationRotated] = r.Answered
	}
}

// next decides; nil: nothing to do yet.
func (a *Authority) next(s stored, request string) (*stored, error) {
	now, r := a.config.Now(), s.rotation
	r.Since, r.TTL = now, max(r.TTL, a.config.TTL)
	switch s.rotation.Phase {
	case idle:
		old := now.After(s.roots[0].Certificate.NotAfter.Add(-renewBefore))
		if !old && (request == "" || request == r.Answered) {
			if r.TTL == s.rotation.TTL {
				return nil, nil
			}
			return &stored{s.roots, r}, nil
		}
		root, err := NewRoot(a.domain, now)
		if err != nil {
			return nil, err
		}
		r.Phase, r.Answered = added, request
		return &stored{[]*Root{s.roots[0], root}, r}, nil
	case added: // and step has published the bundle
		r.Phase = published
		return &stored{s.roots, r}, nil
	case published:
		if now.Sub(s.rotation.Since) < a.config.MountDelay {
			return nil, nil
		}
		if behind := a.config.Behind(hashOf(s.roots)); len(behind) > 0 {
			a.config.Log.Info("root rotation waits for nodes", "nodes", behind)
			return nil, nil
		}
		r.Phase = switched
		// The old key has signed for the last time, so it is kept no longer.
		return &stored{[]*Root{s.roots[1], {Certificate: s.roots[0].Certificate}}, r}, nil
	case switched:
		// Clocks that differ by more than a TTL would not get that far.
		if now.Sub(s.rotation.Since) < s.rotation.TTL+min(backdate, s.rotation.TTL) {
			return nil, nil
		}
		return &stored{s.roots[:1], rotation{Phase: idle, Since: now, Answered: r.Answered, TTL: r.TTL}}, nil
	}
	return nil, errors.New("rotate root: unknown phase") // read refuses it
}

// adopt makes roots the ones in use and tells the streams of them.
func (a *Authority) adopt(roots []*Root) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if slices.EqualFunc(a.roots, roots, func(x, y *Root) bool { return bytes.Equal(x.Certificate.Raw, y.Certificate.Raw) }) {
		return
	}
	if !bytes.Equal(a.roots[0].Certificate.Raw, roots[0].Certificate.Raw) {
		a.server = nil // made anew by the new signer
	}
	a.roots = roots
	close(a.changed)
	a.changed = make(chan struct{})
}

// hashOf names a set of roots, whatever their order.
func hashOf(roots []*Root) string {
	var sums [][]byte
	for _, r := range roots {
		sum := sha256.Sum256(r.Certificate.Raw)
		sums = append(sums, sum[:])
	}
	slices.SortFunc(sums, bytes.Compare)
	sum := sha256.Sum256(bytes.Join(sums, nil))
	return hex.EncodeToString(sum[:8])
}
