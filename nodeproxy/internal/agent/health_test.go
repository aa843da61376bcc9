package agent

import (
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
)

func TestMetricsAreDocumented(t *testing.T) {
	page, err := os.ReadFile("../../../docs/METRICS.md")
	if err != nil {
		t.Fatal(err)
	}
	all := make(chan *prometheus.Desc, 100)
	(&health{}).Describe(all)
	close(all)
	if len(all) == 0 {
		t.Fatal("no metrics")
	}
	for d := range all {
		name := regexp.MustCompile(`fqName: "(\w+)"`).FindStringSubmatch(d.String())[1]
		if !strings.Contains(string(page), "\n| `"+name) {
			t.Errorf("docs/METRICS.md has no %s", name)
		}
	}
}
