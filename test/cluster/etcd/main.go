// Command etcd is the etcd server, built from its module: go install cannot build it because its own main package sits
// in a module with replace directives.
package main

import (
	"os"

	"go.etcd.io/etcd/server/v3/etcdmain"
)

func main() { etcdmain.Main(os.Args) }
