// Package recall keeps what the controller last said on disk, so that an agent that starts while no controller answers
// goes on from there. It holds no secret.
package recall

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/protobuf/proto"

	"github.com/weftmesh/weft/nodeproxy/internal/relay"
)

// header begins a file, with the version of its form; the hash of what follows, in hexadecimal, ends its first line.
const header = "weft-state 1 "

// Load reads what Save wrote. A missing file holds nothing; one that is broken, cut short or of another version is an error.
func Load(path string) ([]relay.Resource, error) {
	raw, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read last known state: %w", err)
	}
	first, body, _ := bytes.Cut(raw, []byte("\n"))
	sum, ok := strings.CutPrefix(string(first), header)
	if !ok {
		return nil, fmt.Errorf("read last known state: %s is not of this version", path)
	}
	if got := sha256.Sum256(body); sum != hex.EncodeToString(got[:]) {
		return nil, fmt.Errorf("read last known state: %s is damaged", path)
	}
	var list discovery.DeltaDiscoveryResponse
	if err := proto.Unmarshal(body, &list); err != nil {
		return nil, fmt.Errorf("read last known state: %w", err)
	}
	var out []relay.Resource
	for _, r := range list.Resources {
		out = append(out, relay.Resource{Key: relay.Key{TypeURL: r.GetResource().GetTypeUrl(), Name: r.Name}, Version: r.Version, Body: r.Resource})
	}
	return out, nil
}

// Save replaces a file at once, readable for its owner alone. It holds one resource in memory at a time: there may be tens of
// thousands.
func Save(path string, resources []relay.Resource) error {
	// Its own folder, so that the rename stays within a file system. CreateTemp makes the file 0600.
	f, err := os.CreateTemp(filepath.Dir(path), filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write last known state: %w", err)
	}
	defer os.Remove(f.Name()) // gone already when all went well
	err = write(f, resources)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write last known state: %w", err)
	}
	return nil
}

// write makes a DeltaDiscoveryResponse of the resources, which as bytes is one after the other, behind its header.
func write(f *os.File, resources []relay.Resource) error {
	sum := sha256.New()
	if _, err := f.WriteString(header + strings.Repeat("0", hex.EncodedLen(sum.Size())) + "\n"); err != nil {
		return err
	}
	out := bufio.NewWriter(f)
	both := io.MultiWriter(out, sum)
	var one []byte
	for _, r := range resources {
		if r.Key.TypeURL == relay.TypeSecret {
			return fmt.Errorf("%s is a secret", r.Key.Name)
		}
		list := discovery.DeltaDiscoveryResponse{Resources: []*discovery.Resource{{Name: r.Key.Name, Version: r.Version, Resource: r.Body}}}
		var err error
		if one, err = (proto.MarshalOptions{Deterministic: true}).MarshalAppend(one[:0], &list); err != nil {
			return err
		}
		if _, err := both.Write(one); err != nil {
			return err
		}
	}
	if err := out.Flush(); err != nil {
		return err
	}
	_, err := f.WriteAt([]byte(hex.EncodeToString(sum.Sum(nil))), int64(len(header)))
	return err
}
