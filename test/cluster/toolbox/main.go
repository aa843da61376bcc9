// Command toolbox is the test image's server and client in one static program.
//
//	toolbox serve [-http :8080] [-tcp :9000] [-greet :9001] [-udp :9000] [-grpc :9002]
//	toolbox get [-n 1] [-interval 0s] [-timeout 5s] [-H 'name: value'] [-d body] [-h2c] [-new] URL
//	toolbox tcp|udp [-timeout 5s] host:port [line]
//	toolbox hold [-interval 100ms] host:port
//	toolbox resolve [-timeout 5s] name
//	toolbox batch < calls.json
//
// The clients print one line per answer and end with status 1 if any failed.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"time"
)

func main() {
	if len(os.Args) < 2 {
		fail(errors.New("choose one of serve, get, tcp, udp, hold, resolve, batch"))
	}
	commands := map[string]func([]string) error{
		"serve": serve, "get": get, "hold": hold, "resolve": resolve, "batch": batch,
		"tcp": func(args []string) error { return exchange("tcp", args) },
		"udp": func(args []string) error { return exchange("udp", args) },
	}
	run, known := commands[os.Args[1]]
	if !known {
		fail(fmt.Errorf("run %q: there is no such command: choose one of serve, get, tcp, udp, hold, resolve, batch", os.Args[1]))
	}
	if err := run(os.Args[2:]); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "toolbox:", err)
	os.Exit(1)
}

// headers collects repeated -H flags.
type headers http.Header

func (h headers) String() string { return "" }

func (h headers) Set(text string) error {
	name, value, ok := strings.Cut(text, ":")
	if !ok {
		return errors.New("want name: value")
	}
	http.Header(h).Add(strings.TrimSpace(name), strings.TrimSpace(value))
	return nil
}

// get requests a URL n times and prints status and body of each answer, on one line.
func get(args []string) error {
	flags := flag.NewFlagSet("get", flag.ExitOnError)
	count := flags.Int("n", 1, "number of requests")
	interval := flags.Duration("interval", 0, "time between two requests")
	timeout := flags.Duration("timeout", 5*time.Second, "time limit of one request")
	body := flags.String("d", "", "body; makes it a POST")
	h2c := flags.Bool("h2c", false, "HTTP/2 with prior knowledge")
	fresh := flags.Bool("new", false, "a new connection for each request")
	header := headers{}
	flags.Var(header, "H", "header, may be repeated")
	if err := flags.Parse(args); err != nil || flags.NArg() != 1 {
		return errors.New("get: want one URL")
	}
	transport := &http.Transport{DisableKeepAlives: *fresh}
	if *h2c {
		transport.Protocols = new(http.Protocols)
		transport.Protocols.SetUnencryptedHTTP2(true)
	}
	client := &http.Client{Transport: transport, Timeout: *timeout, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	failed := 0
	for i := range *count {
		if i > 0 {
			time.Sleep(*interval)
		}
		line, err := request(client, flags.Arg(0), *body, http.Header(header))
		if err != nil {
			failed++
			line = "error " + err.Error()
		}
		fmt.Println(line)
	}
	if failed > 0 {
		return fmt.Errorf("get %s: %d of %d requests failed", flags.Arg(0), failed, *count)
	}
	return nil
}

func request(client *http.Client, url, body string, header http.Header) (string, error) {
	method := http.MethodGet
	if body != "" {
		method = http.MethodPost
	}
	r, err := http.NewRequest(method, url, strings.NewReader(body))
	if err != nil {
		return "", err
	}
	r.Header = header.Clone()
	if host := header.Get("Host"); host != "" {
		r.Host = host
	}
	response, err := client.Do(r)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d %s", response.StatusCode, strings.TrimSpace(string(content))), nil
}

// exchange sends one line and prints the line that comes back.
func exchange(network string, args []string) error {
	flags := flag.NewFlagSet(network, flag.ExitOnError)
	timeout := flags.Duration("timeout", 5*time.Second, "time limit")
	if err := flags.Parse(args); err != nil || flags.NArg() < 1 {
		return fmt.Errorf("%s: want host:port [line]", network)
	}
	line := "hello"
	if flags.NArg() > 1 {
		line = flags.Arg(1)
	}
	conn, err := net.DialTimeout(network, flags.Arg(0), *timeout)
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(*timeout)); err != nil {
		return fmt.Errorf("set the time limit: %w", err)
	}
	if _, err := fmt.Fprintln(conn, line); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	answer, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return fmt.Errorf("receive: %w", err)
	}
	fmt.Print(answer)
	return nil
}

// hold keeps one connection busy and prints each answer; when the connection ends, it prints how and succeeds.
func hold(args []string) error {
	flags := flag.NewFlagSet("hold", flag.ExitOnError)
	interval := flags.Duration("interval", 100*time.Millisecond, "time between two lines")
	if err := flags.Parse(args); err != nil || flags.NArg() != 1 {
		return errors.New("hold: want host:port")
	}
	conn, err := net.DialTimeout("tcp", flags.Arg(0), 5*time.Second)
	if err != nil {
		return fmt.Errorf("dial: %w", err)
	}
	defer conn.Close()
	answers := bufio.NewReader(conn)
	for i := 1; ; i++ {
		_, err := fmt.Fprintln(conn, i)
		var answer string
		if err == nil {
			_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			answer, err = answers.ReadString('\n')
		}
		if err != nil {
			fmt.Println("end", time.Now().UnixNano(), err)
			return nil
		}
		fmt.Print(answer)
		time.Sleep(*interval)
	}
}

// resolve prints a name's addresses.
func resolve(args []string) error {
	flags := flag.NewFlagSet("resolve", flag.ExitOnError)
	timeout := flags.Duration("timeout", 5*time.Second, "time limit")
	if err := flags.Parse(args); err != nil || flags.NArg() != 1 {
		return errors.New("resolve: want one name")
	}
	ctx, cancel := context.WithTimeout(context.Background(), *timeout)
	defer cancel()
	addresses, err := net.DefaultResolver.LookupHost(ctx, flags.Arg(0))
	if err != nil {
		return fmt.Errorf("resolve: %w", err)
	}
	for _, address := range addresses {
		fmt.Println(address)
	}
	return nil
}
