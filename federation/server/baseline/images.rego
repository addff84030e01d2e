package portolan.admission

import rego.v1

# What runs is pinned: a tag may move, the digest that it was resolved to may not.
deny contains {"msg": sprintf("image %q was not resolved to a digest", [c.spec.image]), "field": sprintf("%s.image", [c.field])} if {
	input.kind == "Workload"
	some c in containers
	not contains(object.get(c.spec, "resolved_image", ""), "@sha256:")
}
