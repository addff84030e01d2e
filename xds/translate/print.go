package translate

import (
	"strconv"

	"github.com/portolan-io/portolan/xds/model"
)

// print is everything that a resource is made of, written one after the other
// with lengths, so that different things never read the same. Equal prints give
// equal resources; TestNextIsLikeNew holds that.
type print string

type printer struct{ b []byte }

func (p *printer) s(xs ...string) {
	for _, x := range xs {
		p.n(len(x))
		p.b = append(p.b, x...)
	}
}

func (p *printer) n(xs ...int) {
	for _, x := range xs {
		p.b = strconv.AppendInt(p.b, int64(x), 36)
		p.b = append(p.b, ' ')
	}
}

func (p *printer) bool(x bool) {
	if x {
		p.b = append(p.b, '+')
	} else {
		p.b = append(p.b, '-')
	}
}

func (p *printer) ports(s *model.Service) {
	p.s(s.Tenant, s.Name)
	p.n(len(s.Ports))
	for _, port := range s.Ports {
		p.s(port.Name)
		p.n(int(port.Port), int(port.Target))
		p.bool(port.HTTP)
	}
	p.n(len(s.Revisions))
	p.s(s.Revisions...)
}

func clusterPrint(s *model.Service) print {
	p := &printer{}
	p.ports(s)
	p.s(s.Identities...)
	return print(p.b)
}

func endpointPrint(g *model.Graph, s *model.Service) print {
	p := &printer{}
	p.s(g.Region, g.Zone)
	p.ports(s)
	p.n(len(s.Endpoints))
	for _, e := range s.Endpoints {
		p.s(e.Revision, e.Zone)
		p.b = e.Address.AppendTo(p.b)
		p.bool(e.Draining)
		p.bool(e.Standby)
	}
	for _, r := range s.Remotes {
		p.s(r.Cluster, r.Region)
		p.bool(r.Healthy)
		p.n(len(r.Gateways))
		for _, gw := range r.Gateways {
			p.b = append(gw.AppendTo(p.b), ' ')
		}
		for _, port := range s.Ports {
			p.n(r.Ready[model.PortRevision{Port: port.Name}])
			for _, rev := range s.Revisions {
				p.n(r.Ready[model.PortRevision{Port: port.Name, Revision: rev}])
			}
		}
	}
	return print(p.b)
}

func routePrint(s *model.Service) print {
	p := &printer{}
	p.ports(s)
	p.route(s)
	return print(p.b)
}

func (p *printer) route(s *model.Service) {
	if s.Route == nil {
		p.bool(false)
		return
	}
	p.bool(true)
	p.s(s.Route.Tenant, s.Route.Name)
	p.n(len(s.Route.Rules))
	for _, r := range s.Route.Rules {
		p.rule(r)
	}
}

func (p *printer) rule(r model.Rule) {
	p.bool(r.Broken)
	p.n(int(r.Spec.Timeout), len(r.Matches), len(r.Backends))
	p.bool(r.Spec.Retry != nil)
	if t := r.Spec.Retry; t != nil {
		p.n(t.Attempts, int(t.PerTryTimeout), len(t.On))
		p.s(t.On...)
	}
	for _, m := range r.Matches {
		p.s(m.PathPrefix, m.PathExact, m.Method)
		p.n(len(m.Headers))
		for _, h := range m.Headers {
			p.s(h.Name, h.Value)
		}
	}
	for _, b := range r.Backends {
		p.s(b.Service.Tenant, b.Service.Name, b.Port, b.Revision)
		p.n(int(b.Weight))
	}
}

// listenerPrint is of the outbound listener: TCP routes are in it.
func listenerPrint(services []*model.Service) print {
	p := &printer{}
	for _, s := range services {
		p.b = s.VIP.AppendTo(p.b)
		p.ports(s)
		for _, port := range s.Ports {
			if !port.HTTP {
				p.route(s)
				break
			}
		}
	}
	return print(p.b)
}

func servedPrint(serves []model.Served) print {
	p := &printer{}
	for _, s := range serves {
		p.n(int(s.Target), len(s.For))
		p.bool(s.HTTP)
		for _, f := range s.For {
			p.s(f.Service, f.Port)
		}
	}
	return print(p.b)
}

func trustPrint(g *model.Graph) print {
	p := &printer{}
	p.s(g.TrustDomain)
	p.n(len(g.Domains))
	for _, d := range g.Domains {
		p.s(d.Name, string(d.Roots))
	}
	p.s(g.Peers...)
	return print(p.b)
}
