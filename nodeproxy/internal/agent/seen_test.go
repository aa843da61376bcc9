package agent

import (
	"slices"
	"testing"

	meshv1 "github.com/weftmesh/weft/api/mesh/v1"
)

func TestOnlyWhatHasComeIsLookedAt(t *testing.T) {
	a, b := &meshv1.LocalPod{Uid: "a"}, &meshv1.LocalPod{Uid: "b"}
	var s seen
	for _, step := range []struct {
		now  map[string]any
		want []string
	}{
		{map[string]any{"a": a, "b": b}, []string{"a", "b"}},
		{map[string]any{"a": a, "b": b}, nil},
		{map[string]any{"a": a, "b": &meshv1.LocalPod{Uid: "b"}}, []string{"b"}},
		{map[string]any{"a": a}, []string{"b"}},
		{map[string]any{"a": (*meshv1.InboundPolicy)(nil)}, []string{"a"}},
	} {
		var got []string
		s.take(step.now, func(uid string) { got = append(got, uid) })
		slices.Sort(got)
		if !slices.Equal(got, step.want) {
			t.Errorf("looked at %v, want %v", got, step.want)
		}
	}
}
