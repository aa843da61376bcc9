//go:build e2e

package e2e

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// databases, for a namespace: a MariaDB, whose server speaks first, behind a port that says so and one that does not, and its clients.
const databases = `
apiVersion: v1
kind: Pod
metadata: {name: db, namespace: %[1]s, labels: {app: db}}
spec:
  nodeName: n1
  terminationGracePeriodSeconds: 1
  containers:
    - name: mariadb
      image: weft.dev/test-mariadb:dev
      args: [--no-defaults, --datadir=/data, --skip-grant-tables, --skip-networking=0, '--bind-address=0.0.0.0,::', --socket=/tmp/s.sock, --innodb-buffer-pool-size=16M, --innodb-log-file-size=4M]
      readinessProbe: {tcpSocket: {port: 3306}, periodSeconds: 1, timeoutSeconds: 10}
      volumeMounts: [{name: data, mountPath: /data}]
  volumes: [{name: data, emptyDir: {medium: Memory}}]
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: db-client, namespace: %[1]s}
spec:
  selector: {matchLabels: {app: db-client}}
  template:
    metadata: {labels: {app: db-client}}
    spec:
      terminationGracePeriodSeconds: 1
      containers: [{name: mariadb, image: "weft.dev/test-mariadb:dev", command: [/usr/local/bin/sleep, infinity]}]
---
apiVersion: v1
kind: Service
metadata: {name: db, namespace: %[1]s}
spec:
  selector: {app: db}
  ports: [{name: mysql, port: 3306}, {name: undeclared, port: 3307, targetPort: 3306}]
`

// inspectorsWait is what Envoy's inspectors would add to a connection whose server speaks first (lds: inspectTimeout).
const inspectorsWait = 100 * time.Millisecond

// TestDatabases: a real server that speaks first, by its own client, Permissive and Strict. To a port that says so no
// inspector is waited for: a connection takes about as long as it does where there is no mesh.
func TestDatabases(t *testing.T) {
	for _, namespace := range []string{"mesh", "outside"} {
		apply(t, fmt.Sprintf(databases, namespace))
	}
	for _, namespace := range []string{"mesh", "outside"} {
		if err := k8s.UntilReady(t.Context(), 3*time.Minute, namespace, "app in (db,db-client)", nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := k8s.UntilCondition(t.Context(), 2*time.Minute, "mesh", "app in (db,db-client)", enforced, "True", nil); err != nil {
		t.Fatal(err)
	}
	enrolled, outsider := caller{"mesh", "db-client"}, caller{"outside", "db-client"}
	until(t, time.Minute, "kube-proxy to know the databases", func() (bool, string) {
		for _, at := range placements {
			for _, namespace := range []string{"mesh", "outside"} {
				if _, err := tryQuery(t, outsider, at, namespace, 3306); err != nil {
					return false, err.Error()
				}
			}
		}
		return true, ""
	})
	t.Run("Permissive", func(t *testing.T) {
		for _, at := range placements {
			noWait(t, enrolled, outsider, at)
			noWait(t, outsider, outsider, at)
			query(t, enrolled, at, "mesh", 3307)
		}
	})
	t.Run("Strict", func(t *testing.T) {
		enterStrict(t)
		for _, at := range placements {
			noWait(t, enrolled, outsider, at)
			query(t, enrolled, at, "mesh", 3307)
			if o := stranger.ask(t, at.node, call{Address: "db.mesh.svc.cluster.local:3306"})[0]; !o.closed() {
				t.Errorf("%s: a stranger under Strict: %+v, want no banner", at.name, o)
			}
		}
	})
}

// connections of one run of the client.
const connections = 20

// query connects again and again to a namespace's database and returns how long one connection with its query took.
func query(t *testing.T, from caller, at placement, namespace string, port int) time.Duration {
	t.Helper()
	took, err := tryQuery(t, from, at, namespace, port)
	if err != nil {
		t.Fatal(err)
	}
	return took
}

func tryQuery(t *testing.T, from caller, at placement, namespace string, port int) (time.Duration, error) {
	t.Helper()
	client := pod(t, from.namespace, from.app, at.node).Name
	script := strings.Repeat("connect; select 'answer';", connections)
	started := time.Now()
	out, err := k8s.Kubectl(t.Context(), "exec", "-n", from.namespace, client, "--", "mariadb", "--no-defaults", "-h", "db."+namespace, "-P", fmt.Sprint(port), "-N", "-e", script)
	took := time.Since(started)
	if n := strings.Count(out, "answer"); err != nil || n != connections {
		return 0, fmt.Errorf("%s, %s, port %d: %d answers of %d, %w", from, at.name, port, n, connections, err)
	}
	return took / connections, nil
}

// noWait compares connections into the mesh with such that no mesh has a part in, made in turns on the same machine: a
// caller that waits for an inspector would be behind by the inspector's whole wait.
func noWait(t *testing.T, from, outsider caller, at placement) {
	t.Helper()
	var behind []time.Duration
	for range 5 {
		in := query(t, from, at, "mesh", 3306)
		behind = append(behind, in-query(t, outsider, at, "outside", 3306))
	}
	slices.Sort(behind)
	t.Logf("%s, %s: behind by %v", from.namespace, at.name, behind)
	if median := behind[len(behind)/2]; median >= inspectorsWait/2 {
		t.Errorf("%s, %s: a connection takes %v longer than without the mesh: something waits for the client's first bytes", from.namespace, at.name, median)
	}
}
