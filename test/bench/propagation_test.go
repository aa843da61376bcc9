package main

import (
	"testing"
	"time"
)

func TestVerdictsAreInForceWhenTheOldOneEndsForGood(t *testing.T) {
	started := time.Unix(100, 0)
	run := func(c *caller, from, n int, status string) {
		for i := range n {
			c.answers = append(c.answers, answer{started.Add(time.Duration(from+i) * time.Millisecond), status})
		}
	}
	for _, test := range []struct {
		name string
		fill func(*caller)
		want int // milliseconds; -1: not yet
	}{
		{"a clean change", func(c *caller) { run(c, -50, 50, "200"); run(c, 0, 40, "200"); run(c, 40, enough, "403") }, 40},
		{"an old verdict between new ones", func(c *caller) { run(c, 0, 10, "403"); run(c, 10, 1, "200"); run(c, 11, enough, "403") }, 11},
		{"too few new verdicts", func(c *caller) { run(c, 0, 10, "200"); run(c, 10, enough-1, "403") }, -1},
		{"answers from before the change", func(c *caller) { run(c, -enough, enough, "403") }, -1},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := &caller{}
			test.fill(c)
			first, ok := c.since(started, is("403"))
			if !ok && test.want == -1 {
				return
			}
			if got := first.Sub(started); !ok || got != time.Duration(test.want)*time.Millisecond {
				t.Errorf("in force after %v (%v), want %d ms", got, ok, test.want)
			}
		})
	}
}
