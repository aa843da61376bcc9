// Command render prints what the agent would put into Envoy for pods given as JSON on standard input, as a golden file.
// Tests outside this module's internal tree use it, and whoever wants to see what a policy becomes.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
	"github.com/weftmesh/weft/nodeproxy/internal/lds"
	"github.com/weftmesh/weft/test/contract/golden"
)

type input struct {
	// Roots is the trust bundle in PEM.
	Roots string
	Pods  []struct {
		lds.Pod
		// Policy and Previous are InboundPolicies in protobuf's JSON form; PreviousRevision is the latter's.
		Policy, Previous json.RawMessage
		PreviousRevision map[uint16]uint32
	}
	// Services are of weft.mesh.v1, in protobuf's JSON form.
	Services []json.RawMessage
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "render:", err)
		os.Exit(1)
	}
}

func run() error {
	var in input
	if err := json.NewDecoder(os.Stdin).Decode(&in); err != nil {
		return fmt.Errorf("read pods: %w", err)
	}
	file := golden.File{Listeners: []proto.Message{lds.Holder()}, Clusters: golden.Messages(lds.Clusters())}
	for _, p := range in.Pods {
		previous := lds.Form{ServerFirst: p.ServerFirst, MaxConnection: p.MaxConnection, Revision: p.PreviousRevision}
		for _, policy := range []struct {
			raw json.RawMessage
			to  **meshv1.InboundPolicy
		}{{p.Policy, &p.Pod.Policy}, {p.Previous, &previous.Policy}} {
			if len(policy.raw) == 0 || string(policy.raw) == "null" {
				continue
			}
			*policy.to = &meshv1.InboundPolicy{}
			if err := protojson.Unmarshal(policy.raw, *policy.to); err != nil {
				return fmt.Errorf("read policy of pod %s: %w", p.UID, err)
			}
		}
		if previous.Policy != nil {
			p.Pod.Previous = []lds.Form{previous}
		}
		listeners, err := lds.Listeners(p.Pod)
		if err != nil {
			return err
		}
		file.Listeners = append(file.Listeners, golden.Messages(listeners)...)
		for _, rule := range lds.RuleSecrets(p.Pod) {
			file.Secrets = append(file.Secrets, lds.ValidationSecret(rule, []byte(in.Roots)))
		}
	}
	var services []*meshv1.Service
	for _, raw := range in.Services {
		service := &meshv1.Service{}
		if err := protojson.Unmarshal(raw, service); err != nil {
			return fmt.Errorf("read service: %w", err)
		}
		services = append(services, service)
	}
	file.Scopes = golden.Messages(lds.Scopes(services))
	out, err := file.Marshal()
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(out)
	return err
}
