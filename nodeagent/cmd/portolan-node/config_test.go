package main

import (
	"os"
	"strings"
	"testing"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/configfile/configtest"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

const good = `
node: n1
dataDir: /var/lib/portolan
runDir: /run/portolan/n1
address: 10.0.0.1
cluster: {serverName: cluster.eu.portolan.internal, addresses: ["10.0.0.254:7450"], tokenFile: /token}
containerd: {address: /run/c.sock, namespace: portolan, runcRoot: /run/runc, cgroupParent: /portolan/n1}
envoy: /usr/bin/envoy
registries: {hosts: {"registry.portolan.internal:5000": {address: "10.0.0.9:5000", caFile: /ca.pem}}}
labels: {zone: a}
taints: [{key: gpu, effect: NoSchedule}]
capacity: {cpu: "4", memory: 8Gi}
logLevel: debug
`

func TestConfig(t *testing.T) {
	c, err := parse([]byte(good))
	if err != nil {
		t.Fatal(err)
	}
	f, err := c.facts()
	if err != nil {
		t.Fatal(err)
	}
	if f.GetCpuMilli() != 4000 || f.GetMemoryBytes() != 8<<30 || f.GetAddress() != "10.0.0.1" || f.GetLabels()["zone"] != "a" ||
		f.GetTaints()[0].GetEffect() != portolanv1.TaintEffect_TAINT_EFFECT_NO_SCHEDULE {
		t.Errorf("facts %v", f)
	}
	if c.Registries.Hosts["registry.portolan.internal:5000"].CAFile != "/ca.pem" || c.Containerd.RuncRoot != "/run/runc" {
		t.Errorf("config %+v", c)
	}
	c, err = parse([]byte(strings.Replace(good, `capacity: {cpu: "4", memory: 8Gi}`, "", 1)))
	if err != nil {
		t.Fatal(err)
	}
	if f, err := c.facts(); err != nil || f.GetCpuMilli() < 1000 || f.GetMemoryBytes() < 64<<20 {
		t.Errorf("the machine's own capacity: %v, %v", f, err)
	}
}

func TestBadConfig(t *testing.T) {
	for _, c := range []struct{ old, new, want string }{
		{"node: n1", "node: N_1", "node:"},
		{"node: n1", "node: n1\nnodes: 3", "nodes"},
		{"runDir: /run/portolan/n1", "runDir: run", "runDir"},
		{"address: 10.0.0.1\n", "address: here\n", "address"},
		{`addresses: ["10.0.0.254:7450"]`, "addresses: []", "cluster.addresses"},
		{"serverName: cluster.eu.portolan.internal", `serverName: ""`, "cluster.serverName"},
		{"memory: 8Gi", "memory: lots", "capacity.memory"},
		{`cpu: "4"`, `cpu: "-4"`, "capacity.cpu"},
		{"effect: NoSchedule", "effect: Never", "taints[0]"},
		{"logLevel: debug", "logLevel: loud", "logLevel"},
	} {
		text := strings.Replace(good, c.old, c.new, 1)
		if text == good {
			t.Fatalf("%q is not in the sample", c.old)
		}
		if _, err := parse([]byte(text)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want it to name %s", c.new, err, c.want)
		}
	}
}

func TestCommands(t *testing.T) {
	for _, args := range [][]string{{"agent"}, {"warden"}, {"agent", "--config", "/absent/node.yaml"}, {"other"}} {
		c := root()
		c.SetArgs(args)
		if err := c.ExecuteContext(t.Context()); err == nil {
			t.Errorf("%v succeeded", args)
		}
	}
}

func TestChartConfig(t *testing.T) {
	file := configtest.FromChart(t, "../../../charts/golden/node.yaml", "node.yaml")
	t.Setenv("NODE_NAME", "worker-1")
	if _, err := load(file); err == nil || !strings.Contains(err.Error(), "HOST_IP") {
		t.Errorf("without HOST_IP: %v", err)
	}
	t.Setenv("HOST_IP", "10.0.0.7")
	c, err := load(file)
	if err != nil {
		t.Fatal(err)
	}
	if c.Node != "worker-1" || c.Address != "10.0.0.7" || c.Cluster.TokenFile != "/etc/portolan/tokens/worker-1" {
		t.Errorf("config %+v", c)
	}
}

// A Kubernetes node's name is a DNS name, which an ID is not.
func TestNodeIDOfAHostName(t *testing.T) {
	long := strings.Repeat("a-very-long-name.", 5)
	for host, want := range map[string]string{
		"eu-west-1": "eu-west-1", "ip-10-0-1-2.ec2.internal": "ip-10-0-1-2-ec2-internal", "10.0.1.2": "n-10-0-1-2", "Worker_7.": "worker-7", "": "",
	} {
		if got := nodeID(host); got != want {
			t.Errorf("%q becomes %q, want %q", host, got, want)
		}
	}
	a, b := nodeID(long+"a"), nodeID(long+"b")
	if a == b {
		t.Errorf("two machines become %q", a)
	}
	for _, id := range []string{a, b, nodeID("10.0.1.2"), nodeID("ip-10-0-1-2.ec2.internal")} {
		if _, err := api.ParseID(id); err != nil {
			t.Error(err)
		}
	}
	c, err := parse([]byte("{hostName: Worker.1, dataDir: /d, runDir: /r, address: 10.0.0.1, cluster: {serverName: c, addresses: ['a:1']}}"))
	if err != nil || c.Node != "worker-1" {
		t.Errorf("node %+v, %v", c, err)
	}
}

// What the chart renders is a configuration.
func TestTheChartsConfigurationIsRead(t *testing.T) {
	b, err := os.ReadFile("../../../charts/golden/node.yaml")
	if err != nil {
		t.Fatal(err)
	}
	_, text, ok := strings.Cut(string(b), "  node.yaml: |\n")
	text, _, found := strings.Cut(text, "\n---")
	if !ok || !found {
		t.Fatal("no configuration in the chart")
	}
	t.Setenv("NODE_NAME", "ip-10-0-1-2.ec2.internal")
	t.Setenv("HOST_IP", "10.0.1.2")
	c, err := parse([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if c.Node != "ip-10-0-1-2-ec2-internal" || len(c.Taints) != 1 || c.Capacity.CPU != "6" || c.Labels["zone"] == "" || c.Registries.Hosts["registry.example:443"].CAFile == "" {
		t.Errorf("%+v", c)
	}
}
