// Package epoch tells which of two replicas' states is the newer one: by the leader's orders in it, and by what was read of
// each kind of objects.
package epoch

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"
)

// Kinds holds the highest resource version of each kind of objects.
type Kinds map[string]uint64

// Covers tells whether nothing of other is newer.
func (k Kinds) Covers(other Kinds) bool {
	for kind, version := range other {
		if k[kind] < version {
			return false
		}
	}
	return true
}

// Raise takes over what is higher in other.
func (k Kinds) Raise(other Kinds) {
	for kind, version := range other {
		k[kind] = max(k[kind], version)
	}
}

// Orders number what a leader decided: first by its term, then within it.
type Orders struct{ Term, Number uint64 }

// Before tells whether other came later.
func (o Orders) Before(other Orders) bool {
	return o.Term < other.Term || o.Term == other.Term && o.Number < other.Number
}

func (o Orders) String() string { return fmt.Sprintf("%d.%d", o.Term, o.Number) }

// Mark names a state that agents are given.
type Mark struct {
	Orders
	// Made are the newest objects that it was made of.
	Made Kinds
}

// limit bounds what an agent may say that it has seen.
const limit = 4096

// Metadata is the key under which an agent says which state it was given last.
const Metadata = "weft-seen"

// String is what agents are told; they give it back as it is.
func (m Mark) String() string {
	var b strings.Builder
	b.WriteString(m.Orders.String())
	for _, kind := range slices.Sorted(maps.Keys(m.Made)) {
		fmt.Fprintf(&b, " %s=%d", kind, m.Made[kind])
	}
	return b.String()
}

// Parse reads what String wrote; "" is the zero Mark.
func Parse(text string) (Mark, error) {
	m := Mark{Made: Kinds{}}
	if text == "" {
		return m, nil
	}
	if len(text) > limit {
		return m, fmt.Errorf("read state's name: longer than %d bytes", limit)
	}
	words := strings.Fields(text)
	if len(words) == 0 {
		return m, fmt.Errorf("read state's name: %q is none", text)
	}
	term, number, _ := strings.Cut(words[0], ".")
	var err error
	if m.Term, err = strconv.ParseUint(term, 10, 64); err == nil {
		m.Number, err = strconv.ParseUint(number, 10, 64)
	}
	for _, word := range words[1:] {
		kind, version, _ := strings.Cut(word, "=")
		if err == nil {
			m.Made[kind], err = strconv.ParseUint(version, 10, 64)
		}
	}
	if err != nil {
		return Mark{}, fmt.Errorf("read state's name: %w", err)
	}
	return m, nil
}

// Version reads an object's resource version. One that is no number is newer than all: nothing may be concluded from it.
func Version(text string) uint64 {
	v, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return math.MaxUint64
	}
	return v
}
