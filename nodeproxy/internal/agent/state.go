package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"time"

	"google.golang.org/protobuf/types/known/anypb"

	"github.com/weftmesh/weft/nodeproxy/internal/envoy"
	"github.com/weftmesh/weft/nodeproxy/internal/recall"
	"github.com/weftmesh/weft/nodeproxy/internal/relay"
)

// The last known state is kept below the run folder, which ends with the node's boot as the pods' sandboxes do.
const (
	stateFolder = "state"
	// ownFile holds what this node's pods are to be, written before it is acted on: an agent that starts without a
	// controller must not fall back behind it. indexFile holds all else, written at leisure.
	ownFile, indexFile = "own", "index"
	// podFolder holds a file for each enrolled pod: what its Envoy has of its policies.
	podFolder = "pods"
	// recordPause is the least time between two writes of the index.
	recordPause = time.Second
	// quiet is how long the index has not changed before memory is given back.
	quiet = 3 * time.Second
)

// ofNode are the types that are about this node's pods.
var ofNode = []string{relay.TypeSeen, relay.TypeMesh, relay.TypeNamespace, relay.TypeLocalPod, relay.TypeInboundPolicy}

func (a *agent) statePath(file string) string {
	return filepath.Join(a.config.RunDir, stateFolder, file)
}

// restore takes over what the agent before this one knew. What cannot be read is not taken.
func (a *agent) restore() error {
	if err := os.MkdirAll(a.statePath(podFolder), 0o700); err != nil {
		return fmt.Errorf("make state folder: %w", err)
	}
	for _, file := range []string{ownFile, indexFile} {
		resources, err := recall.Load(a.statePath(file))
		if err != nil {
			a.config.Log.Warn("last known state is not used", "error", err)
			continue
		}
		a.upstream.Restore(resources)
	}
	return nil
}

// changed notes that the index is to be written.
func (a *agent) changed(typeURL string) {
	if slices.Contains(ofNode, typeURL) {
		return
	}
	select {
	case a.dirty <- struct{}{}:
	default:
	}
}

// record writes the index after changes, and once more when ctx ends. A large change takes several times the memory that it
// leaves in use; what is left over goes back to the machine when it is quiet again, which the runtime would not do by itself.
func (a *agent) record(ctx context.Context) {
	var still <-chan time.Time
	for {
		select {
		case <-still:
			debug.FreeOSMemory()
			still = nil
			continue
		case <-ctx.Done():
			select {
			case <-a.dirty:
				a.save(indexFile)
			default:
			}
			return
		case <-a.dirty:
		}
		a.save(indexFile)
		select {
		case <-ctx.Done():
			a.save(indexFile)
			return
		case <-time.After(recordPause):
		}
		still = time.After(quiet)
	}
}

// save writes a file. A failure costs the next agent its memory, and this one nothing.
func (a *agent) save(file string) {
	a.saving.Lock() // what is written last is what was read last
	defer a.saving.Unlock()
	resources, err := a.upstream.Index()
	resources = slices.DeleteFunc(resources, func(r relay.Resource) bool { return slices.Contains(ofNode, r.Key.TypeURL) != (file == ownFile) })
	if file == indexFile {
		resources = append(resources, a.cache.Relayed()...)
	}
	if err == nil {
		err = recall.Save(a.statePath(file), resources)
	}
	if err != nil {
		a.config.Log.Warn("last known state is not kept", "error", err)
	}
}

// forget removes what is kept in the run folder, when weft leaves the node for good: of Envoys as well, if their supervisors were
// killed and nothing else will.
func (a *agent) forget() error {
	err := os.RemoveAll(a.statePath(""))
	for _, name := range ownerFiles {
		err = errors.Join(err, os.RemoveAll(filepath.Join(a.config.RunDir, name)))
	}
	if err = errors.Join(err, envoy.Clear(a.config.RunDir)); err != nil {
		return fmt.Errorf("clear the run folder: %w", err)
	}
	return nil
}

// podMemory keeps a file per pod, for the enroller of the next agent.
type podMemory struct{ folder string }

// typeRecord is the enroller's own.
const typeRecord = "weft/pod-record"

func (m podMemory) path(podUID string) string { return filepath.Join(m.folder, filepath.Base(podUID)) }

// Save replaces a pod's record.
func (m podMemory) Save(podUID string, record []byte) error {
	return recall.Save(m.path(podUID), []relay.Resource{{Key: relay.Key{TypeURL: typeRecord, Name: podUID}, Body: &anypb.Any{TypeUrl: typeRecord, Value: record}}})
}

// Load reads a pod's record; nil: there is none.
func (m podMemory) Load(podUID string) ([]byte, error) {
	kept, err := recall.Load(m.path(podUID))
	if err != nil || len(kept) == 0 {
		return nil, err
	}
	return kept[0].Body.GetValue(), nil
}

// Drop forgets a pod.
func (m podMemory) Drop(podUID string) error {
	if err := os.Remove(m.path(podUID)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("forget pod: %w", err)
	}
	return nil
}
