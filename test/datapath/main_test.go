package datapath

import (
	"os"
	"testing"

	"github.com/weftmesh/weft/test/datapath/lab"
)

func TestMain(m *testing.M) { os.Exit(lab.Enter(m.Run)) }
