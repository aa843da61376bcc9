// Command shop is a small web shop: an HTTP front end, an HTTP catalogue in two versions, a gRPC price service, and
// redis beside them. It knows nothing of any mesh; `make demo` brings it into one while it serves.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/peer"

	"github.com/weftmesh/weft/examples/shop/shoppb"
)

const usage = `usage: shop <front|catalogue|prices> [flags]

  front      HTTP on -listen; asks -catalogue (HTTP), -prices (gRPC) and -redis for every page
  catalogue  HTTP on -listen; answers with -version
  prices     gRPC on -listen
`

type config struct {
	listen, catalogue, prices, redis, version string
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	var c config
	f := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	f.StringVar(&c.listen, "listen", ":8080", "address to serve on")
	f.StringVar(&c.catalogue, "catalogue", "http://catalogue", "URL of the catalogue")
	f.StringVar(&c.prices, "prices", "prices:9000", "address of the price service")
	f.StringVar(&c.redis, "redis", "redis:6379", "address of redis")
	f.StringVar(&c.version, "version", "v1", "version that the catalogue shows")
	_ = f.Parse(os.Args[2:])

	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	roles := map[string]func(context.Context, config) error{"front": front, "catalogue": catalogue, "prices": prices}
	role, ok := roles[os.Args[1]]
	if !ok {
		fmt.Fprint(os.Stderr, usage)
		os.Exit(2)
	}
	if err := role(ctx, c); err != nil {
		log.Fatalf("run %s: %v", os.Args[1], err)
	}
}

// serveHTTP serves until ctx ends, then lets requests in flight finish: a pod that is deleted still gets requests
// until every node has learnt of it.
func serveHTTP(ctx context.Context, listen string, h http.Handler) error {
	s := &http.Server{Addr: listen, Handler: h, ReadHeaderTimeout: 10 * time.Second}
	failed := make(chan error, 1)
	go func() { failed <- s.ListenAndServe() }()
	select {
	case err := <-failed:
		return fmt.Errorf("listen on %s: %w", listen, err)
	case <-ctx.Done():
	}
	time.Sleep(3 * time.Second)
	return s.Shutdown(context.Background())
}

// echo answers with what the caller needs to check that its request alone was served, and by whom.
func echo(w http.ResponseWriter, r *http.Request, version string) {
	h := w.Header()
	h.Set("X-Sequence", r.Header.Get("X-Sequence"))
	h.Set("X-Pod", os.Getenv("HOSTNAME"))
	h.Set("X-Client", r.RemoteAddr)
	h.Set("X-Version", version)
	local, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if local != nil {
		h.Set("X-Server", local.String())
	}
}

func catalogue(ctx context.Context, c config) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		echo(w, r, c.version)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(map[string]any{"version": c.version, "items": []string{"loom", "shuttle", "reed"}})
	})
	return serveHTTP(ctx, c.listen, mux)
}

func front(ctx context.Context, c config) error {
	// passthrough: the cluster's DNS balances nothing here, one connection is what an app usually holds.
	conn, err := grpc.NewClient("passthrough:///"+c.prices, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return fmt.Errorf("dial prices at %s: %w", c.prices, err)
	}
	defer conn.Close()
	priceClient := shoppb.NewPricesClient(conn)
	client := &http.Client{Timeout: 5 * time.Second}

	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		echo(w, r, "")
		page, err := buildPage(r.Context(), client, priceClient, c)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		w.Header().Set("X-Catalogue", page.Version)
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(page)
	})
	return serveHTTP(ctx, c.listen, mux)
}

type page struct {
	Version string   `json:"version"`
	Items   []string `json:"items"`
	Cents   uint64   `json:"cents"`
	Visits  uint64   `json:"visits"`
}

func buildPage(ctx context.Context, client *http.Client, prices shoppb.PricesClient, c config) (*page, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.catalogue, nil)
	if err != nil {
		return nil, fmt.Errorf("ask the catalogue: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("ask the catalogue: %w", err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("read the catalogue: %w", err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask the catalogue: status %d: %s", resp.StatusCode, strings.TrimSpace(string(body)))
	}
	var p page
	if err := json.Unmarshal(body, &p); err != nil {
		return nil, fmt.Errorf("read the catalogue: %w", err)
	}
	price, err := prices.Get(ctx, &shoppb.PriceRequest{Item: "loom"})
	if err != nil {
		return nil, fmt.Errorf("ask for a price: %w", err)
	}
	p.Cents = price.Cents
	if p.Visits, err = countVisit(ctx, c.redis); err != nil {
		return nil, fmt.Errorf("count the visit: %w", err)
	}
	return &p, nil
}

// countVisit increments a counter in redis over a connection of its own.
func countVisit(ctx context.Context, addr string) (uint64, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return 0, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := io.WriteString(conn, "INCR visits\r\n"); err != nil {
		return 0, err
	}
	b := make([]byte, 64)
	n, err := conn.Read(b)
	if err != nil {
		return 0, err
	}
	answer := strings.TrimSpace(string(b[:n]))
	number, ok := strings.CutPrefix(answer, ":")
	if !ok {
		return 0, errors.New("redis answered " + strconv.Quote(answer))
	}
	return strconv.ParseUint(number, 10, 64)
}

type priceServer struct {
	shoppb.UnimplementedPricesServer
}

func price(ctx context.Context, r *shoppb.PriceRequest) *shoppb.Price {
	p := &shoppb.Price{Item: r.Item, Cents: 4200, Sequence: r.Sequence, Pod: os.Getenv("HOSTNAME")}
	if from, ok := peer.FromContext(ctx); ok {
		p.Client = from.Addr.String()
		p.Server = from.LocalAddr.String()
	}
	return p
}

func (priceServer) Get(ctx context.Context, r *shoppb.PriceRequest) (*shoppb.Price, error) {
	return price(ctx, r), nil
}

func (priceServer) Watch(s shoppb.Prices_WatchServer) error {
	for {
		r, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := s.Send(price(s.Context(), r)); err != nil {
			return err
		}
	}
}

func prices(ctx context.Context, c config) error {
	l, err := net.Listen("tcp", c.listen)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", c.listen, err)
	}
	s := grpc.NewServer()
	shoppb.RegisterPricesServer(s, priceServer{})
	grpc_health_v1.RegisterHealthServer(s, health.NewServer())
	go func() {
		<-ctx.Done()
		time.Sleep(3 * time.Second)
		time.AfterFunc(10*time.Second, s.Stop)
		s.GracefulStop()
	}()
	return s.Serve(l)
}
