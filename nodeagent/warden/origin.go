package warden

import (
	"strings"

	"github.com/portolan-io/portolan/xds/distribute"
)

// origin is the directive that a proxy's resource was made of, by the name under
// which its users' object travels: there a refusal becomes status. What many
// objects have a part in, a listener for example, keeps the proxy's name.
func (wd *world) origin(typeURL, name string) string {
	seg := strings.Split(name, "/")
	if wd == nil || len(seg) < 4 || seg[0] != "outbound" {
		return shortType(typeURL) + "/" + name
	}
	tenant, service := seg[1], seg[2]
	if typeURL == distribute.RouteType {
		for _, r := range wd.input.Routes {
			if r.GetTenant() == tenant && r.GetSpec().GetService() == service {
				return "route/" + tenant + "/" + r.GetRoute()
			}
		}
	}
	return "service/" + tenant + "/" + service
}
