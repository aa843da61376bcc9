package epoch

import (
	"strings"
	"testing"
)

func TestMark(t *testing.T) {
	m := Mark{Orders{7, 12}, Kinds{"pods": 90, "services": 3}}
	if text := m.String(); text != "7.12 pods=90 services=3" {
		t.Errorf("%q", text)
	}
	back, err := Parse(m.String())
	if err != nil || back.String() != m.String() {
		t.Errorf("%v, %v", back, err)
	}
	if none, err := Parse(""); err != nil || none.Term != 0 || len(none.Made) != 0 {
		t.Errorf("nothing seen: %v, %v", none, err)
	}
	for _, bad := range []string{"x", " ", "7", "7.x", "7.1 pods", "7.1 pods=-1", "99999999999999999999.1", "1.1 " + strings.Repeat("a", limit)} {
		if m, err := Parse(bad); err == nil {
			t.Errorf("%q is read as %v", bad, m)
		}
	}
}

func TestOrder(t *testing.T) {
	for _, c := range []struct {
		name          string
		first, second Orders
		want          bool
	}{
		{"a later number", Orders{1, 1}, Orders{1, 2}, true},
		{"the same", Orders{1, 1}, Orders{1, 1}, false},
		{"a later leader begins anew", Orders{1, 9}, Orders{2, 1}, true},
		{"an earlier leader", Orders{2, 1}, Orders{1, 9}, false},
	} {
		if got := c.first.Before(c.second); got != c.want {
			t.Errorf("%s: %t", c.name, got)
		}
	}
	have := Kinds{"pods": 5, "services": 1}
	if !have.Covers(Kinds{"pods": 5}) || have.Covers(Kinds{"pods": 6}) || have.Covers(Kinds{"routes": 1}) || !have.Covers(nil) {
		t.Error("covers")
	}
	have.Raise(Kinds{"pods": 4, "routes": 2})
	if have["pods"] != 5 || have["routes"] != 2 {
		t.Errorf("raised: %v", have)
	}
	if Version("12") != 12 || !(Kinds{"pods": Version("12")}).Covers(Kinds{"pods": 12}) || (Kinds{"pods": 12}).Covers(Kinds{"pods": Version("opaque")}) {
		t.Error("versions")
	}
}
