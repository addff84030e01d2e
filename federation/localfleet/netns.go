package localfleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// names of everything that a fleet makes on the machine.
type names struct{ id string }

func (n names) clusterNS(i int) string { return fmt.Sprintf("ptl-%s-c%d", n.id, i) }
func (n names) nodeNS(i, j int) string { return fmt.Sprintf("ptl-%s-c%dn%d", n.id, i, j) }
func (n names) wan(i int) string       { return fmt.Sprintf("ptl%sw%d", n.id, i) }

// nodePort is the bridge's side of a node's link, inside the cluster's namespace.
func (n names) nodePort(j int) string { return fmt.Sprintf("node%d", j) }

// nsDir is where iproute2 keeps the names of namespaces.
const nsDir = "/run/netns"

func nsPath(ns string) string { return filepath.Join(nsDir, ns) }

// ip runs iproute2, in a namespace when ns is not empty. Namespaces are entered
// by child processes only: a thread of ours never changes its own.
func ip(ctx context.Context, ns string, args ...string) error {
	if ns != "" {
		args = append([]string{"-n", ns}, args...)
	}
	return run(ctx, "ip", args...)
}

func run(ctx context.Context, name string, args ...string) error {
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, strings.TrimSpace(out.String()))
	}
	return nil
}

// sysctl sets a value inside a namespace, or on this machine when ns is empty.
func sysctl(ctx context.Context, ns, key, value string) error {
	file := "/proc/sys/" + key
	if ns == "" {
		return os.WriteFile(file, []byte(value), 0o644)
	}
	return run(ctx, "nsenter", "--net="+nsPath(ns), "--", "sh", "-c", `echo "$1" > "$2"`, "sh", value, file)
}

// network builds namespaces, bridges and links of the fleet. Building is
// idempotent: what is there already is taken down first.
type network struct {
	fleet *Fleet
	names names
}

// up makes everything.
func (n *network) up(ctx context.Context) error {
	if err := n.down(ctx); err != nil {
		return err
	}
	for i := range n.fleet.Clusters {
		if err := n.cluster(ctx, i); err != nil {
			return fmt.Errorf("network of cluster %s: %w", n.fleet.Clusters[i].Name, err)
		}
		for j := range n.fleet.Clusters[i].Nodes {
			if err := n.node(ctx, i, j); err != nil {
				return fmt.Errorf("network of node %s: %w", n.fleet.Clusters[i].Nodes[j].Name, err)
			}
		}
	}
	return nil
}

type steps struct {
	ctx context.Context //nolint:containedctx // lives for one sequence of commands
	err error
}

func (s *steps) ip(ns string, args ...string) {
	if s.err == nil {
		s.err = ip(s.ctx, ns, args...)
	}
}

func (s *steps) sysctl(ns, key, value string) {
	if s.err == nil {
		s.err = sysctl(s.ctx, ns, key, value)
	}
}

func (n *network) cluster(ctx context.Context, i int) error {
	ns, wan := n.names.clusterNS(i), n.names.wan(i)
	ours, theirs := n.fleet.WAN(i)
	s := &steps{ctx: ctx}
	s.ip("", "netns", "add", ns)
	s.ip(ns, "link", "set", "lo", "up")
	s.ip("", "link", "add", wan, "type", "veth", "peer", "name", "wan", "netns", ns)
	s.ip("", "address", "add", ours.String()+"/30", "dev", wan)
	s.ip(ns, "address", "add", theirs.String()+"/30", "dev", "wan")
	// Forwarding between WAN links only: the machine's own setting stays.
	s.sysctl("", "net/ipv4/conf/"+wan+"/forwarding", "1")
	s.sysctl(ns, "net/ipv4/ip_forward", "1")
	s.ip(ns, "link", "set", "wan", "up")
	s.ip(ns, "route", "add", "default", "via", ours.String())
	s.ip(ns, "link", "add", "br0", "type", "bridge")
	s.ip(ns, "address", "add", n.fleet.ClusterAddr(i).String()+"/24", "dev", "br0")
	s.ip(ns, "link", "set", "br0", "up")
	if s.err != nil {
		return s.err
	}
	return n.healWAN(ctx, i)
}

// healWAN sets the link up and the route behind it, which the kernel dropped
// with the link.
func (n *network) healWAN(ctx context.Context, i int) error {
	_, theirs := n.fleet.WAN(i)
	s := &steps{ctx: ctx}
	s.ip("", "link", "set", n.names.wan(i), "up")
	s.ip("", "route", "replace", n.fleet.CIDR(i).String(), "via", theirs.String(), "dev", n.names.wan(i))
	return s.err
}

func (n *network) cutWAN(ctx context.Context, i int) error {
	return ip(ctx, "", "link", "set", n.names.wan(i), "down")
}

func (n *network) node(ctx context.Context, i, j int) error {
	cns, ns, port := n.names.clusterNS(i), n.names.nodeNS(i, j), n.names.nodePort(j)
	s := &steps{ctx: ctx}
	s.ip("", "netns", "add", ns)
	s.ip(ns, "link", "set", "lo", "up")
	s.ip(cns, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", ns)
	s.ip(cns, "link", "set", port, "master", "br0")
	s.ip(cns, "link", "set", port, "up")
	s.ip(ns, "address", "add", n.fleet.NodeAddr(i, j).String()+"/24", "dev", "eth0")
	s.ip(ns, "link", "set", "eth0", "up")
	s.ip(ns, "route", "add", "default", "via", n.fleet.ClusterAddr(i).String())
	s.sysctl(ns, "net/ipv4/ip_forward", "1")
	if s.err != nil {
		return s.err
	}
	// What a machine in a data centre does at its edge: replicas leave the
	// cluster's network under their node's address.
	rules := fmt.Sprintf("table ip edge { chain out { type nat hook postrouting priority srcnat; oifname \"eth0\" ip saddr %[1]s ip daddr != %[1]s masquerade; }; }", n.fleet.CIDR(i))
	return run(ctx, "nsenter", "--net="+nsPath(ns), "--", "nft", rules)
}

func (n *network) cutNode(ctx context.Context, i, j int) error {
	return ip(ctx, n.names.clusterNS(i), "link", "set", n.names.nodePort(j), "down")
}

func (n *network) healNode(ctx context.Context, i, j int) error {
	return ip(ctx, n.names.clusterNS(i), "link", "set", n.names.nodePort(j), "up")
}

// namespaces lists the fleet's namespaces that exist, also those of an earlier
// fleet file.
func (n names) namespaces() ([]string, error) {
	all, err := os.ReadDir(nsDir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list network namespaces: %w", err)
	}
	var out []string
	for _, e := range all {
		if strings.HasPrefix(e.Name(), "ptl-"+n.id+"-") {
			out = append(out, e.Name())
		}
	}
	return out, nil
}

// down removes namespaces and, with them, their links; and WAN links whose other
// end went with its namespace.
func (n *network) down(ctx context.Context) error { return n.names.removeNetwork(ctx) }

func (n names) removeNetwork(ctx context.Context) error {
	// The links first: their peers may be held by processes that are still dying.
	links, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	var errs []error
	for _, l := range links {
		if strings.HasPrefix(l.Name, "ptl"+n.id+"w") {
			errs = append(errs, ip(ctx, "", "link", "delete", l.Name))
		}
	}
	nss, err := n.namespaces()
	errs = append(errs, err)
	for _, ns := range nss {
		errs = append(errs, ip(ctx, "", "netns", "delete", ns))
	}
	errs = append(errs, releaseNames())
	return errors.Join(errs...)
}

// releaseNames takes back, with the last named namespace of the machine, the mount
// that iproute2 makes of their folder with the first. While anybody's is in it, it
// is busy.
func releaseNames() error {
	left, err := os.ReadDir(nsDir)
	if err != nil || len(left) > 0 {
		return nil //nolint:nilerr // there is none, or it is somebody's
	}
	if err := unix.Unmount(nsDir, 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("unmount %s: %w", nsDir, err)
	}
	return nil
}

// overlap says which route of this machine the fleet's network collides with.
func overlap(ctx context.Context, p netip.Prefix, own string) (string, error) {
	out, err := exec.CommandContext(ctx, "ip", "-4", "-o", "route", "show").Output()
	if err != nil {
		return "", fmt.Errorf("list routes: %w", err)
	}
	for line := range strings.Lines(string(out)) {
		f := strings.Fields(line)
		if len(f) == 0 || f[0] == "default" || strings.Contains(line, own) {
			continue
		}
		dst := f[0]
		if !strings.Contains(dst, "/") {
			dst += "/32"
		}
		if r, err := netip.ParsePrefix(dst); err == nil && r.Overlaps(p) {
			return strings.TrimSpace(line), nil
		}
	}
	return "", nil
}
