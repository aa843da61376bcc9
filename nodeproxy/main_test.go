package main

import (
	"runtime/debug"
	"testing"
)

func TestVersionIsTheBuilds(t *testing.T) {
	revision := []debug.BuildSetting{{Key: "vcs", Value: "git"}, {Key: "vcs.revision", Value: "38eefb3"}}
	for _, c := range []struct {
		name string
		info *debug.BuildInfo
		want string
	}{
		{"a release", &debug.BuildInfo{Main: debug.Module{Version: "v0.1.0"}, Settings: revision}, "v0.1.0"},
		{"a revision", &debug.BuildInfo{Main: debug.Module{Version: "(devel)"}, Settings: revision}, "38eefb3"},
		{"neither", &debug.BuildInfo{}, "unknown"},
		{"no information", nil, "unknown"},
	} {
		if got := version(c.info, c.info != nil); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}
