package admit

import (
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/portolan-io/portolan/federation/api"
	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// proxyUID is the reserved user of the proxies (nodeagent/proxy): its traffic is
// not captured, so no workload may have it.
const proxyUID = 14010

// minMemory is the least memory limit with which a container can start.
const minMemory = 4 << 20

// reservedPorts are the proxy's own: captured outbound and inbound traffic.
var reservedPorts = []int32{15001, 15006}

// capabilities that a container may ask for, on top of none. Those that change who
// a process is are not among them: it would become the proxy's user, whose traffic
// is not captured, and leave the mesh.
var capabilities = []string{"CHOWN", "NET_BIND_SERVICE"}

// reservedEnv is set by the node agent.
var reservedEnv = []string{"SPIFFE_ENDPOINT_SOCKET"}

// systemTrees may not be covered at all, systemDirs not themselves.
var (
	systemTrees = []string{"/proc", "/sys", "/dev", "/run/spiffe"}
	systemDirs  = []string{"/", "/bin", "/boot", "/etc", "/lib", "/lib64", "/sbin", "/usr"}
)

func defaultContainer(c *portolanv1.Container) {
	if l := c.Limits; l != nil {
		if l.Pids == 0 {
			l.Pids = defaultPids
		}
		if c.Requests == nil {
			c.Requests = &portolanv1.ResourceList{}
		}
		if c.Requests.Cpu == "" {
			c.Requests.Cpu = l.Cpu
		}
		if c.Requests.Memory == "" {
			c.Requests.Memory = l.Memory
		}
	}
	for _, p := range []*portolanv1.Probe{c.Startup, c.Liveness, c.Readiness} {
		defaultProbe(p)
	}
}

func defaultProbe(p *portolanv1.Probe) {
	if p == nil {
		return
	}
	if p.Period == nil {
		p.Period = durationpb.New(10 * time.Second)
	}
	if p.Timeout == nil {
		p.Timeout = durationpb.New(time.Second)
	}
	if p.FailureThreshold == 0 {
		p.FailureThreshold = 3
	}
	if p.SuccessThreshold == 0 {
		p.SuccessThreshold = 1
	}
	if h := p.GetHttp(); h != nil && h.Path == "" {
		h.Path = "/"
	}
}

func (c *checker) containers(s *portolanv1.WorkloadSpec) {
	names := map[string]bool{}
	ports := map[int32]bool{}
	portNames := map[string]bool{}
	for i, ctr := range s.GetContainers() {
		field := at("spec.containers", i)
		c.container(field, ctr, names)
		c.ports(field+".ports", ctr.GetPorts(), ports, portNames)
		c.probe(field+".startup", ctr.GetStartup(), true)
		c.probe(field+".liveness", ctr.GetLiveness(), true)
		c.probe(field+".readiness", ctr.GetReadiness(), false)
		c.hook(field+".pre_stop", ctr.GetPreStop(), s.GetGracePeriod())
	}
	for i, ctr := range s.GetInitContainers() {
		field := at("spec.init_containers", i)
		c.container(field, ctr, names)
		for _, f := range []struct {
			name string
			set  bool
		}{
			{"ports", len(ctr.GetPorts()) > 0},
			{"startup", ctr.GetStartup() != nil},
			{"liveness", ctr.GetLiveness() != nil},
			{"readiness", ctr.GetReadiness() != nil},
			{"pre_stop", ctr.GetPreStop() != nil},
		} {
			if f.set {
				c.add(field+"."+f.name, "an init container runs to its end and has none")
			}
		}
	}
}

// container checks what init and main containers have in common.
func (c *checker) container(field string, ctr *portolanv1.Container, names map[string]bool) {
	if c.id(field+".name", ctr.GetName()) {
		if names[ctr.GetName()] {
			c.add(field+".name", "%q is there twice", ctr.GetName())
		}
		names[ctr.GetName()] = true
	}
	if img := ctr.GetImage(); img == "" {
		c.add(field+".image", "is required")
	} else if strings.ContainsAny(img, " \t\r\n\x00") {
		c.add(field+".image", "%q is no image reference", clip(img))
	}
	c.text(field+".command", ctr.GetCommand())
	c.text(field+".args", ctr.GetArgs())
	c.env(field+".env", ctr.GetEnv())
	c.resources(field, ctr)
	c.tmpfs(field+".tmpfs", ctr.GetTmpfs())
	if ctr.GetRunAsUser() == proxyUID {
		c.add(field+".run_as_user", "%d is reserved for proxies", proxyUID)
	}
	if ctr.GetRunAsGroup() == proxyUID {
		c.add(field+".run_as_group", "%d is reserved for proxies", proxyUID)
	}
	for i, name := range ctr.GetAddCapabilities() {
		if !slices.Contains(capabilities, name) {
			c.add(at(field+".add_capabilities", i), "%q may not be added; only %s may", clip(name), strings.Join(capabilities, ", "))
		} else if slices.Contains(ctr.GetAddCapabilities()[:i], name) {
			c.add(at(field+".add_capabilities", i), "%q is there twice", name)
		}
	}
	if wd := ctr.GetWorkingDir(); wd != "" {
		c.absolute(field+".working_dir", wd)
	}
}

func (c *checker) env(field string, env map[string]string) {
	for _, k := range keys(env) {
		switch {
		case !envName.MatchString(k):
			c.add(key(field, k), "%q is no name of an environment variable: use letters, digits and '_', not beginning with a digit", clip(k))
		case slices.Contains(reservedEnv, k):
			c.add(key(field, k), "is set by the node agent")
		case strings.ContainsRune(env[k], 0):
			c.add(key(field, k), "holds a NUL byte")
		case len(env[k]) > 32<<10:
			c.add(key(field, k), "has %d bytes; at most %d are allowed", len(env[k]), 32<<10)
		}
	}
}

func (c *checker) resources(field string, ctr *portolanv1.Container) {
	reqCPU := c.quantity(field+".requests.cpu", ctr.GetRequests().GetCpu(), api.ParseCPU)
	limCPU := c.quantity(field+".limits.cpu", ctr.GetLimits().GetCpu(), api.ParseCPU)
	reqMem := c.quantity(field+".requests.memory", ctr.GetRequests().GetMemory(), api.ParseBytes)
	limMem := c.quantity(field+".limits.memory", ctr.GetLimits().GetMemory(), api.ParseBytes)
	if limCPU > 0 && reqCPU > limCPU {
		c.add(field+".requests.cpu", "%s is more than the limit of %s", ctr.GetRequests().GetCpu(), ctr.GetLimits().GetCpu())
	}
	if limMem > 0 && reqMem > limMem {
		c.add(field+".requests.memory", "%s is more than the limit of %s", ctr.GetRequests().GetMemory(), ctr.GetLimits().GetMemory())
	}
	if limMem > 0 && limMem < minMemory {
		c.add(field+".limits.memory", "%s is less than the 4Mi that a container needs to start: is a suffix missing?", ctr.GetLimits().GetMemory())
	}
	for _, l := range []struct {
		name string
		list *portolanv1.ResourceList
	}{{"requests", ctr.GetRequests()}, {"limits", ctr.GetLimits()}} {
		c.quantity(field+"."+l.name+".storage", l.list.GetStorage(), api.ParseBytes)
	}
	if ctr.GetRequests().GetPids() != 0 {
		c.add(field+".requests.pids", "process counts are limited, not requested: use limits.pids")
	}
}

// quantity gives the parsed amount, 0 when absent or wrong.
func (c *checker) quantity(field, value string, parse func(string) (int64, error)) int64 {
	if value == "" {
		return 0
	}
	v, err := parse(value)
	if err != nil {
		c.add(field, "%v", err)
		return 0
	}
	if v == 0 {
		c.add(field, "must be more than 0")
	}
	return v
}

func (c *checker) ports(field string, list []*portolanv1.ContainerPort, ports map[int32]bool, names map[string]bool) {
	for i, p := range list {
		f := at(field, i)
		c.port(f+".port", p.GetPort())
		if ports[p.GetPort()] {
			c.add(f+".port", "port %d is there twice in the replica", p.GetPort())
		}
		ports[p.GetPort()] = true
		if n := p.GetName(); n != "" && c.id(f+".name", n) {
			if names[n] {
				c.add(f+".name", "%q is there twice in the replica", n)
			}
			names[n] = true
		}
	}
}

func (c *checker) port(field string, p int32) {
	if slices.Contains(reservedPorts, p) {
		c.add(field, "%d is reserved for the proxy", p)
	}
}

func (c *checker) probe(field string, p *portolanv1.Probe, once bool) {
	if p == nil {
		return
	}
	switch {
	case p.GetHttp() != nil:
		c.port(field+".http.port", p.GetHttp().GetPort())
		c.urlPath(field+".http.path", p.GetHttp().GetPath())
		for _, h := range keys(p.GetHttp().GetHeaders()) {
			if !headerName.MatchString(strings.ToLower(h)) || strings.ContainsAny(p.GetHttp().GetHeaders()[h], "\r\n\x00") {
				c.add(key(field+".http.headers", h), "is no valid header")
			}
		}
	case p.GetTcp() != nil:
		c.port(field+".tcp.port", p.GetTcp().GetPort())
	case p.GetExec() != nil:
		c.exec(field+".exec", p.GetExec())
	default:
		c.add(field, "one of http, tcp and exec is required")
	}
	c.duration(field+".initial_delay", p.GetInitialDelay(), anyDelay)
	c.duration(field+".period", p.GetPeriod(), probePeriod)
	c.duration(field+".timeout", p.GetTimeout(), probeWait)
	if once && p.GetSuccessThreshold() != 1 {
		c.add(field+".success_threshold", "must be 1 for startup and liveness")
	}
}

func (c *checker) exec(field string, e *portolanv1.Probe_ExecCheck) {
	if len(e.GetCommand()) == 0 || e.GetCommand()[0] == "" {
		c.add(field+".command", "is required")
	}
	c.text(field+".command", e.GetCommand())
}

func (c *checker) hook(field string, h *portolanv1.Hook, grace *durationpb.Duration) {
	if h == nil {
		return
	}
	switch {
	case h.GetExec() != nil:
		c.exec(field+".exec", h.GetExec())
	case h.GetHttp() != nil:
		c.port(field+".http.port", h.GetHttp().GetPort())
		c.urlPath(field+".http.path", h.GetHttp().GetPath())
	case h.GetSleep() != nil:
		c.duration(field+".sleep", h.GetSleep(), bounds{0, max(grace.AsDuration(), 0)})
	default:
		c.add(field, "one of exec, http and sleep is required")
	}
}

func (c *checker) tmpfs(field string, list []string) {
	for i, p := range list {
		f := at(field, i)
		if !c.absolute(f, p) {
			continue
		}
		if ofSystem(p) {
			c.add(f, "%q is a path of the system", p)
		} else if slices.Contains(list[:i], p) {
			c.add(f, "%q is there twice", p)
		}
	}
}

// ofSystem says that a path may not be covered.
func ofSystem(p string) bool {
	system := slices.Contains(systemDirs, p)
	for _, t := range systemTrees {
		system = system || within(p, t) || within(t, p) && p != "/run"
	}
	return system
}

// within says that a canonical path is another one or below it.
func within(p, top string) bool { return p == top || strings.HasPrefix(p, top+"/") }

// mountPath checks where a volume goes.
func (c *checker) mountPath(field, p string) bool {
	if !c.absolute(field, p) {
		return false
	}
	if ofSystem(p) {
		c.add(field, "%q is a path of the system", p)
		return false
	}
	return true
}
