package hostile

import (
	"slices"
	"strings"

	"github.com/weftmesh/weft/test/hostile/attack"
)

// Fill puts what {names} stand for into an attempt.
func Fill(a attack.Attempt, names map[string]string) attack.Attempt {
	var pairs []string
	for name, value := range names {
		pairs = append(pairs, "{"+name+"}", value)
	}
	all := strings.NewReplacer(pairs...)
	a.To, a.From, a.Send = all.Replace(a.To), all.Replace(a.From), []byte(all.Replace(string(a.Send)))
	if a.TLS != nil {
		t := *a.TLS
		t.Name = all.Replace(t.Name)
		a.TLS = &t
	}
	a.Options = slices.Clone(a.Options)
	for i, o := range a.Options {
		a.Options[i] = all.Replace(o)
	}
	return a
}
