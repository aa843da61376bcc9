package main

import (
	"context"
	"errors"
	"flag"
	"os"
	"os/signal"
	"syscall"

	"github.com/weftmesh/weft/test/hostile/attack"
)

// hostile are the commands of the tests of hostile pods.
//
//	load attack [-at-once 16] < attempts.json
//	load target
//	load seen [-since 0]
var hostile = map[string]func(args []string) error{
	"attack": func(args []string) error {
		flags := flag.NewFlagSet("attack", flag.ExitOnError)
		atOnce := flags.Int("at-once", 16, "attempts that are made side by side")
		if len(args) > 0 && args[0] == attack.Nested {
			if err := attack.Settle(); err != nil {
				return err
			}
			args = args[1:]
		}
		if err := flags.Parse(args); err != nil || flags.NArg() != 0 {
			return errors.New("attack: want no arguments")
		}
		return attack.Main(os.Stdin, os.Stdout, *atOnce)
	},
	"target": func(args []string) error {
		if len(args) != 0 {
			return errors.New("target: want no arguments")
		}
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
		defer stop()
		return attack.Serve(ctx, [4]int{8080, 9000, 9001, 9002})
	},
	"seen": func(args []string) error {
		flags := flag.NewFlagSet("seen", flag.ExitOnError)
		since := flags.Int("since", 0, "number of the first sight")
		if err := flags.Parse(args); err != nil || flags.NArg() != 0 {
			return errors.New("seen: want no arguments")
		}
		return attack.Ask(*since, os.Stdout)
	},
}
