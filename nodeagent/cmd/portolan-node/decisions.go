package main

import (
	"context"
	"fmt"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/portolan-io/portolan/federation/api/nodev1"
)

// showDecisions asks the warden on its socket, which serves root alone.
func showDecisions(ctx context.Context, socket string, out io.Writer) error {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithNoProxy())
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	// More than a warden keeps.
	r, err := nodev1.NewWardenServiceClient(conn).ListDecisions(ctx, &nodev1.ListDecisionsRequest{Limit: 1 << 16})
	if err != nil {
		return fmt.Errorf("ask the warden: %w", err)
	}
	for _, d := range r.GetDecisions() {
		b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(d)
		if err != nil {
			return err
		}
		if _, err := fmt.Fprintf(out, "%s\n", b); err != nil {
			return err
		}
	}
	return nil
}
