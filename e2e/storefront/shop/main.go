// Command shop is every service of the sample application in one binary; the
// first argument chooses the part: web, catalog, cart, payments, or the job
// restock. Each part counts what it saw of its callers and callees, so that tests
// and people can check identity, version and region end to end.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"sort"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Version is what the image was built as: v1 or v2.
var Version = "v1"

func main() {
	log := slog.New(slog.NewJSONHandler(os.Stdout, nil))
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: shop web|catalog|cart|payments|restock")
		os.Exit(2)
	}
	s := newShop(os.Args[1], log)
	var err error
	if os.Args[1] == "restock" {
		err = s.restock(ctx)
	} else {
		err = s.serve(ctx)
	}
	if err != nil {
		log.Error("shop ended", "part", os.Args[1], "error", err)
		os.Exit(1)
	}
}

// sight is what one side of a call showed.
type sight struct {
	// Direction: "in" (a caller) or "out" (a callee).
	Direction string `json:"direction"`
	// Peer is the SPIFFE ID of a caller, or the name of a callee.
	Peer    string `json:"peer"`
	Version string `json:"version"`
	Region  string `json:"region"`
	Cluster string `json:"cluster"`
	Status  int    `json:"status"`
}

type shop struct {
	part  string
	log   *slog.Logger
	http  *http.Client
	redis *redis
	fail  failing

	mu   sync.Mutex
	seen map[sight]int64
}

// failing lets tests make a replica unhealthy from outside.
type failing struct {
	mu       sync.Mutex
	liveness bool
}

const maxSights = 1000

func newShop(part string, log *slog.Logger) *shop {
	return &shop{
		part: part, log: log, seen: map[sight]int64{},
		http:  &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 32, IdleConnTimeout: 30 * time.Second}},
		redis: &redis{addr: env("REDIS_ADDR", "redis:6379")},
	}
}

func env(key, def string) string {
	if v := os.Getenv(key); v != "" {
		return v
	}
	return def
}

func (s *shop) saw(v sight) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.seen[v]; ok || len(s.seen) < maxSights {
		s.seen[v]++
	}
}

// caller reads the SPIFFE ID that the sidecar took from the peer's certificate.
func caller(r *http.Request) string {
	for part := range strings.SplitSeq(r.Header.Get("X-Forwarded-Client-Cert"), ";") {
		if uri, ok := strings.CutPrefix(part, "URI="); ok {
			return uri
		}
	}
	return ""
}

func (s *shop) serve(ctx context.Context) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", s.health)
	mux.HandleFunc("GET /livez", s.live)
	mux.HandleFunc("GET /seen", s.sights)
	mux.HandleFunc("GET /metrics", s.metrics)
	mux.HandleFunc("POST /fail/liveness", s.failLiveness)
	mux.HandleFunc("POST /eat", eat)
	mux.HandleFunc("POST /log/{line}", s.say)
	switch s.part {
	case "web":
		s.web(mux)
	case "catalog":
		mux.HandleFunc("GET /items", s.items)
	case "cart":
		s.cart(mux)
	case "payments":
		mux.HandleFunc("POST /pay", s.pay)
	default:
		return fmt.Errorf("no part %q", s.part)
	}
	srv := &http.Server{Addr: ":" + env("PORT", "8080"), Handler: s.count(mux), ReadHeaderTimeout: 5 * time.Second}
	errs := make(chan error, 1)
	go func() { errs <- srv.ListenAndServe() }()
	s.log.Info("serving", "part", s.part, "version", Version, "address", srv.Addr)
	select {
	case err := <-errs:
		return err
	case <-ctx.Done():
	}
	grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
	defer cancel()
	s.log.Info("stopping", "part", s.part)
	return srv.Shutdown(grace)
}

// count notes every call but those of probes and of people who ask for counts.
func (s *shop) count(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Shop-Part", s.part)
		h.Set("X-Shop-Version", Version)
		h.Set("X-Shop-Region", os.Getenv("PORTOLAN_REGION"))
		h.Set("X-Shop-Cluster", os.Getenv("PORTOLAN_CLUSTER"))
		h.Set("X-Shop-Replica", os.Getenv("PORTOLAN_REPLICA"))
		h.Set("X-Shop-Caller", caller(r))
		switch r.URL.Path {
		case "/healthz", "/livez", "/seen", "/metrics":
		default:
			s.saw(sight{Direction: "in", Peer: caller(r), Version: Version, Region: os.Getenv("PORTOLAN_REGION"), Cluster: os.Getenv("PORTOLAN_CLUSTER"), Status: 0})
		}
		next.ServeHTTP(w, r)
	})
}

func (s *shop) health(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") }

func (s *shop) live(w http.ResponseWriter, _ *http.Request) {
	s.fail.mu.Lock()
	defer s.fail.mu.Unlock()
	if s.fail.liveness {
		http.Error(w, "asked to fail", http.StatusInternalServerError)
		return
	}
	fmt.Fprintln(w, "ok")
}

func (s *shop) failLiveness(http.ResponseWriter, *http.Request) {
	s.fail.mu.Lock()
	s.fail.liveness = true
	s.fail.mu.Unlock()
}

// eat takes memory until the limit ends it.
func eat(w http.ResponseWriter, _ *http.Request) {
	w.WriteHeader(http.StatusAccepted)
	go func() {
		var kept [][]byte
		for {
			b := make([]byte, 1<<20)
			for i := range b {
				b[i] = byte(i)
			}
			kept = append(kept, b)
			if len(kept) > 1<<14 {
				return
			}
		}
	}()
}

// say writes a line to the log, so that it can be looked for there.
func (s *shop) say(_ http.ResponseWriter, r *http.Request) {
	s.log.Info("said", "line", r.PathValue("line"))
}

type sightCount struct {
	sight
	Count int64 `json:"count"`
}

func (s *shop) counts() []sightCount {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]sightCount, 0, len(s.seen))
	for v, n := range s.seen {
		out = append(out, sightCount{v, n})
	}
	sort.Slice(out, func(i, j int) bool { return fmt.Sprint(out[i].sight) < fmt.Sprint(out[j].sight) })
	return out
}

func (s *shop) sights(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(s.counts())
}

func (s *shop) metrics(w http.ResponseWriter, _ *http.Request) {
	fmt.Fprintln(w, "# TYPE shop_calls_total counter")
	for _, c := range s.counts() {
		fmt.Fprintf(w, "shop_calls_total{direction=%q,peer=%q,version=%q,region=%q,cluster=%q,status=%q} %d\n",
			c.Direction, c.Peer, c.Version, c.Region, c.Cluster, strconv.Itoa(c.Status), c.Count)
	}
}

// call asks another part and notes who answered.
func (s *shop) call(ctx context.Context, method, host, path string) (int, []byte, http.Header, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://"+host+path, nil)
	if err != nil {
		return 0, nil, nil, err
	}
	resp, err := s.http.Do(req)
	if err != nil {
		s.saw(sight{Direction: "out", Peer: host})
		return 0, nil, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	s.saw(sight{Direction: "out", Peer: host, Version: resp.Header.Get("X-Shop-Version"), Region: resp.Header.Get("X-Shop-Region"), Cluster: resp.Header.Get("X-Shop-Cluster"), Status: resp.StatusCode})
	return resp.StatusCode, b, resp.Header, err
}

// relay answers with what another part said, and by whom.
func (s *shop) relay(w http.ResponseWriter, r *http.Request, method, host, path string) {
	code, body, h, err := s.call(r.Context(), method, host, path)
	if err != nil {
		http.Error(w, host+": "+err.Error(), http.StatusBadGateway)
		return
	}
	for _, k := range []string{"Content-Type", "X-Shop-Part", "X-Shop-Version", "X-Shop-Region", "X-Shop-Cluster", "X-Shop-Replica", "X-Shop-Caller"} {
		if v := h.Get(k); v != "" {
			w.Header().Set(strings.Replace(k, "X-Shop-", "X-Upstream-", 1), v)
		}
	}
	w.WriteHeader(code)
	_, _ = w.Write(body)
}

func (s *shop) web(mux *http.ServeMux) {
	catalog, cart, assets := env("CATALOG", "catalog"), env("CART", "cart"), env("ASSETS", "assets")
	mux.HandleFunc("GET /api/items", func(w http.ResponseWriter, r *http.Request) { s.relay(w, r, http.MethodGet, catalog, "/items") })
	mux.HandleFunc("GET /api/cart", func(w http.ResponseWriter, r *http.Request) {
		s.relay(w, r, http.MethodGet, cart, "/cart?"+r.URL.RawQuery)
	})
	mux.HandleFunc("POST /api/cart", func(w http.ResponseWriter, r *http.Request) {
		s.relay(w, r, http.MethodPost, cart, "/cart?"+r.URL.RawQuery)
	})
	mux.HandleFunc("POST /api/checkout", func(w http.ResponseWriter, r *http.Request) {
		s.relay(w, r, http.MethodPost, cart, "/checkout?"+r.URL.RawQuery)
	})
	mux.HandleFunc("GET /", func(w http.ResponseWriter, r *http.Request) {
		code, body, h, err := s.call(r.Context(), http.MethodGet, assets, (&url.URL{Path: r.URL.Path}).EscapedPath())
		if err != nil {
			http.Error(w, assets+": "+err.Error(), http.StatusBadGateway)
			return
		}
		w.Header().Set("Content-Type", h.Get("Content-Type"))
		w.WriteHeader(code)
		_, _ = w.Write(body)
	})
}

var stock = []string{"astrolabe", "compass", "dividers", "hourglass", "lead line"}

func (s *shop) items(w http.ResponseWriter, _ *http.Request) {
	list := stock
	if Version != "v1" {
		list = append(append([]string{}, stock...), "portolan chart")
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"version": Version, "region": os.Getenv("PORTOLAN_REGION"), "items": list})
}

func (s *shop) cart(mux *http.ServeMux) {
	user := func(r *http.Request) string { return "cart:" + r.URL.Query().Get("user") }
	mux.HandleFunc("GET /cart", func(w http.ResponseWriter, r *http.Request) {
		items, err := s.redis.list(r.Context(), user(r))
		answer(w, map[string]any{"items": items}, err)
	})
	mux.HandleFunc("POST /cart", func(w http.ResponseWriter, r *http.Request) {
		n, err := s.redis.push(r.Context(), user(r), r.URL.Query().Get("item"))
		answer(w, map[string]any{"count": n}, err)
	})
	mux.HandleFunc("POST /checkout", func(w http.ResponseWriter, r *http.Request) {
		code, body, _, err := s.call(r.Context(), http.MethodPost, env("PAYMENTS", "payments"), "/pay")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("payments answered %d: %s", code, strings.TrimSpace(string(body)))
		}
		if err == nil {
			err = s.redis.del(r.Context(), user(r))
		}
		answer(w, map[string]any{"paid": err == nil}, err)
	})
}

func (s *shop) pay(w http.ResponseWriter, _ *http.Request) {
	answer(w, map[string]any{"paid": true, "region": os.Getenv("PORTOLAN_REGION")}, nil)
}

func answer(w http.ResponseWriter, v any, err error) {
	w.Header().Set("Content-Type", "application/json")
	if err != nil {
		w.WriteHeader(http.StatusBadGateway)
		v = map[string]any{"error": err.Error()}
	}
	_ = json.NewEncoder(w).Encode(v)
}

// restock is the job: it asks the catalog for its items and notes them in Redis.
func (s *shop) restock(ctx context.Context) error {
	deadline := time.Now().Add(60 * time.Second)
	for {
		code, body, _, err := s.call(ctx, http.MethodGet, env("CATALOG", "catalog"), "/items")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("catalog answered %d", code)
		}
		if err == nil {
			_, err = s.redis.push(ctx, "restocked", string(body))
		}
		if err == nil {
			s.log.Info("restocked", "bytes", len(body))
			return nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		s.log.Warn("restock: trying again", "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}
