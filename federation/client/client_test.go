package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
	"github.com/portolan-io/portolan/identity"
	"github.com/portolan-io/portolan/identity/ca"
)

// TestOnlyReadsAreRepeated holds the list against the protos: unary reads are all
// in it, and nothing else is.
func TestOnlyReadsAreRepeated(t *testing.T) {
	listed := 0
	protoregistry.GlobalFiles.RangeFilesByPackage("portolan.v1", func(f protoreflect.FileDescriptor) bool {
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				reads := strings.HasPrefix(string(m.Name()), "Get") || strings.HasPrefix(string(m.Name()), "List") || strings.HasPrefix(string(m.Name()), "Explain")
				want := reads && !m.IsStreamingClient() && !m.IsStreamingServer()
				if got := slices.Contains(repeatable[string(s.Name())], string(m.Name())); got != want {
					t.Errorf("%s is repeated: %t, want %t", m.FullName(), got, want)
				}
				if want {
					listed++
				}
			}
		}
		return true
	})
	n := 0
	for _, methods := range repeatable {
		n += len(methods)
	}
	if n != listed {
		t.Errorf("%d methods are listed, %d exist", n, listed)
	}
}

// flaky is unavailable for everybody, and counts who asked.
type flaky struct {
	portolanv1.UnimplementedRuntimeServiceServer
	portolanv1.UnimplementedWorkloadServiceServer
	mu    sync.Mutex
	calls map[string]int
}

func (f *flaky) refuse(method string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls[method]++
	return status.Error(codes.Unavailable, "try again")
}

func (f *flaky) Exec(grpc.BidiStreamingServer[portolanv1.ExecRequest, portolanv1.ExecResponse]) error {
	return f.refuse("Exec")
}

func (f *flaky) CreateWorkload(context.Context, *portolanv1.CreateWorkloadRequest) (*portolanv1.Workload, error) {
	return nil, f.refuse("CreateWorkload")
}

func (f *flaky) GetWorkload(context.Context, *portolanv1.GetWorkloadRequest) (*portolanv1.Workload, error) {
	return nil, f.refuse("GetWorkload")
}

func TestWhatRunsSomethingIsSentOnce(t *testing.T) {
	dir := t.TempDir()
	a, err := ca.Open(t.Context(), ca.Config{TrustDomain: "portolan.internal", Storage: ca.DirStorage(dir), SealKey: make([]byte, 32)})
	if err != nil {
		t.Fatal(err)
	}
	file := func(name string, b []byte) string {
		p := filepath.Join(dir, name)
		if err := os.WriteFile(p, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return p
	}
	user, err := a.Issue(t.Context(), ca.Request{ID: identity.ID{Kind: identity.User, TrustDomain: "portolan.internal", Name: "root"}})
	if err != nil {
		t.Fatal(err)
	}
	server, err := a.Issue(t.Context(), ca.Request{ID: identity.ID{Kind: identity.Control, TrustDomain: "portolan.internal"}, DNSNames: []string{"federation.portolan.internal"}})
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(user.TLS().PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	var chain []byte
	for _, der := range user.TLS().Certificate {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	f := &flaky{calls: map[string]int{}}
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS13, Certificates: []tls.Certificate{*server.TLS()}})))
	portolanv1.RegisterRuntimeServiceServer(g, f)
	portolanv1.RegisterWorkloadServiceServer(g, f)
	go func() { _ = g.Serve(l) }()
	t.Cleanup(g.Stop)
	cc, err := Dial(Context{
		Name: "test", Addresses: []string{l.Addr().String()}, ServerName: "federation.portolan.internal",
		CertFile: file("cert.pem", chain), KeyFile: file("key.pem", pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})), BundleFile: file("roots.pem", a.Bundle()),
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cc.Close() })
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	w := portolanv1.NewWorkloadServiceClient(cc)
	_, _ = w.GetWorkload(ctx, &portolanv1.GetWorkloadRequest{})
	_, _ = w.CreateWorkload(ctx, &portolanv1.CreateWorkloadRequest{})
	x, err := portolanv1.NewRuntimeServiceClient(cc).Exec(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := x.Recv(); status.Code(err) != codes.Unavailable {
		t.Fatal(err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.calls["Exec"] != 1 || f.calls["CreateWorkload"] != 1 || f.calls["GetWorkload"] != 4 {
		t.Errorf("calls %v: only what reads is repeated", f.calls)
	}
}
