package main

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc"

	"github.com/portolan-io/portolan/federation/api/nodev1"
)

type decisions struct {
	nodev1.UnimplementedWardenServiceServer
}

func (decisions) ListDecisions(context.Context, *nodev1.ListDecisionsRequest) (*nodev1.ListDecisionsResponse, error) {
	return &nodev1.ListDecisionsResponse{Decisions: []*nodev1.NetworkDecision{{Source: "spiffe://a", Reason: "no allow rule applies"}, {Source: "spiffe://b", Allowed: true}}}, nil
}

func TestShowDecisions(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "w.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer()
	nodev1.RegisterWardenServiceServer(srv, decisions{})
	go func() { _ = srv.Serve(l) }()
	defer srv.Stop()
	var out strings.Builder
	if err := showDecisions(t.Context(), socket, &out); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(out.String()), "\n")
	if len(lines) != 2 || !strings.Contains(lines[0], "no allow rule applies") || !strings.Contains(lines[1], "spiffe://b") {
		t.Errorf("%q", lines)
	}
}
