# The fleet's own minimum, before anybody wrote a policy.
package portolan.admission

import rego.v1

# Every container of the final spec, init containers included, with the path of
# its field.
containers contains {"field": sprintf("spec.containers[%d]", [i]), "spec": c} if {
	some i, c in input.object.spec.containers
}

containers contains {"field": sprintf("spec.init_containers[%d]", [i]), "spec": c} if {
	some i, c in input.object.spec.init_containers
}

deny contains {"msg": "a CPU limit is required", "field": sprintf("%s.limits.cpu", [c.field])} if {
	input.kind == "Workload"
	some c in containers
	not limited(c.spec, "cpu")
}

deny contains {"msg": "a memory limit is required", "field": sprintf("%s.limits.memory", [c.field])} if {
	input.kind == "Workload"
	some c in containers
	not limited(c.spec, "memory")
}

limited(c, resource) if c.limits[resource] != ""
