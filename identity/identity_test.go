package identity

import "testing"

func TestParse(t *testing.T) {
	const td = "eu-west.portolan.internal"
	for uri, want := range map[string]ID{
		"spiffe://portolan.internal/control":                           {Kind: Control, TrustDomain: "portolan.internal"},
		"spiffe://portolan.internal/user/ann":                          {Kind: User, TrustDomain: "portolan.internal", Name: "ann"},
		"spiffe://eu-west.portolan.internal/node/n1":                   {Kind: Node, TrustDomain: td, Name: "n1"},
		"spiffe://eu-west.portolan.internal/gateway/ingress":           {Kind: Gateway, TrustDomain: td, Name: "ingress"},
		"spiffe://eu-west.portolan.internal/tenant/shop/workload/web":  {Kind: Workload, TrustDomain: td, Tenant: "shop", Workload: "web"},
		"http://portolan.internal/control":                             {},
		"spiffe://portolan.internal":                                   {},
		"spiffe://portolan.internal/":                                  {},
		"spiffe://portolan.internal/control/":                          {},
		"spiffe://portolan.internal/control/x":                         {},
		"spiffe://portolan.internal/user":                              {},
		"spiffe://portolan.internal/user/":                             {},
		"spiffe://portolan.internal/user/..":                           {},
		"spiffe://portolan.internal/user/a%20b":                        {},
		"spiffe://portolan.internal/user/ann?x=1":                      {},
		"spiffe://portolan.internal:443/control":                       {},
		"spiffe://Portolan.internal/control":                           {},
		"spiffe://portolan.internal/tenant/a/workload":                 {},
		"spiffe://portolan.internal/tenant/a/service/b":                {},
		"spiffe://portolan.internal/tenant/a/workload/b/../../control": {},
		"spiffe://eu-west.portolan.internal/tenant//workload/b":        {},
		"spiffe://ann@portolan.internal/control":                       {},
		"":                                                             {},
	} {
		got, err := Parse(uri)
		if want == (ID{}) {
			if err == nil {
				t.Errorf("%q: accepted as %+v", uri, got)
			}
			continue
		}
		if err != nil || got != want || got.String() != uri {
			t.Errorf("%q: %+v %v", uri, got, err)
		}
	}
}

func TestClusterOf(t *testing.T) {
	for td, want := range map[string]string{
		"eu-west.portolan.internal": "eu-west", "portolan.internal": "", ".portolan.internal": "", "a.b.portolan.internal": "",
		"eu-westportolan.internal": "", "eu-west.portolan.internal.evil": "",
	} {
		if got, ok := ClusterOf("portolan.internal", td); got != want || ok != (want != "") {
			t.Errorf("%q: %q %v", td, got, ok)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, s := range []string{"spiffe://portolan.internal/control", "spiffe://a/tenant/t/workload/w", "spiffe://a/node/..", "spiffe:///control", "spiffe://a/user/%41"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		id, err := Parse(s)
		if err != nil {
			if id != (ID{}) {
				t.Error("an identity with an error")
			}
			return
		}
		// There is one spelling per identity.
		if id.String() != s {
			t.Errorf("%q became %q", s, id)
		}
		if again, err := Parse(id.String()); err != nil || again != id {
			t.Errorf("%+v became %+v: %v", id, again, err)
		}
		if _, err := id.SPIFFE(); err != nil {
			t.Error(err)
		}
	})
}
