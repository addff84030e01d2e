package api

import (
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

// LayOver changes a container as an override says, if it is of its name: variables
// are added, arguments and quantities that are given replace the template's. A
// request that is as great as its limit goes with the limit, unless the override
// gives one: that is what a request is that nobody wrote.
func LayOver(c *portolanv1.Container, o *portolanv1.WorkloadSpec_ContainerOverride) {
	if containerName(c.GetName()) != containerName(o.GetName()) {
		return
	}
	for k, v := range o.GetEnv() {
		if c.Env == nil {
			c.Env = map[string]string{}
		}
		c.Env[k] = v
	}
	if len(o.GetArgs()) > 0 {
		c.Args = slices.Clone(o.GetArgs())
	}
	requests := proto.CloneOf(o.GetRequests())
	if l := o.GetLimits(); l != nil {
		if requests == nil {
			requests = &portolanv1.ResourceList{}
		}
		if requests.Cpu == "" && c.GetRequests().GetCpu() == c.GetLimits().GetCpu() {
			requests.Cpu = l.GetCpu()
		}
		if requests.Memory == "" && c.GetRequests().GetMemory() == c.GetLimits().GetMemory() {
			requests.Memory = l.GetMemory()
		}
	}
	c.Requests, c.Limits = layResources(c.GetRequests(), requests), layResources(c.GetLimits(), o.GetLimits())
}

func containerName(name string) string {
	if name == "" {
		return "main"
	}
	return name
}

// layResources replaces the quantities that are given.
func layResources(have, o *portolanv1.ResourceList) *portolanv1.ResourceList {
	if o == nil {
		return have
	}
	out := &portolanv1.ResourceList{}
	if have != nil {
		out = proto.CloneOf(have)
	}
	if o.GetCpu() != "" {
		out.Cpu = o.GetCpu()
	}
	if o.GetMemory() != "" {
		out.Memory = o.GetMemory()
	}
	if o.GetPids() != 0 {
		out.Pids = o.GetPids()
	}
	if o.GetStorage() != "" {
		out.Storage = o.GetStorage()
	}
	return out
}
