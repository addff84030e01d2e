package main

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"time"
)

// keep notes this start in the replica's volume, and lists all that were noted: a
// part for those who want to see that data stays.
func (s *shop) keep(mux *http.ServeMux) error {
	dir := env("DATA", "/data")
	f, err := os.OpenFile(filepath.Join(dir, "starts"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	if _, err := fmt.Fprintln(f, name, Version); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	mux.HandleFunc("GET /starts", func(w http.ResponseWriter, r *http.Request) { http.ServeFile(w, r, filepath.Join(dir, "starts")) })
	return nil
}

// burn uses all the CPU that it gets for ?seconds=N.
func burn(w http.ResponseWriter, r *http.Request) {
	n, err := strconv.Atoi(r.URL.Query().Get("seconds"))
	if err != nil || n < 1 || n > 600 {
		http.Error(w, "seconds: a number from 1 to 600", http.StatusBadRequest)
		return
	}
	w.WriteHeader(http.StatusAccepted)
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), time.Duration(n)*time.Second)
	go func() {
		defer cancel()
		for i := 0; ctx.Err() == nil; i++ {
			for j := range 1000 {
				i += j
			}
		}
	}()
}

// batch works for a while and ends as it is told: "shop batch 2s 0".
func batch(ctx context.Context, args []string) error {
	if len(args) != 2 {
		return fmt.Errorf("usage: shop batch DURATION CODE")
	}
	d, err := time.ParseDuration(args[0])
	if err != nil {
		return err
	}
	code, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
		return ctx.Err()
	}
	if code != 0 {
		os.Exit(code)
	}
	return nil
}
