package portolan.admission_test

import rego.v1

import data.portolan.admission

good := {"image": "r.example/a:1", "resolved_image": "r.example/a@sha256:00", "limits": {"cpu": "1", "memory": "64Mi"}}

workload(containers, inits) := {
	"operation": "CREATE", "kind": "Workload",
	"object": {"spec": {"containers": containers, "init_containers": inits}},
}

fields contains d.field if some d in admission.deny

test_good_is_admitted if {
	count(admission.deny) == 0 with input as workload([good], [good])
}

test_no_limits_is_refused if {
	bad := object.remove(good, ["limits"])
	fields == {"spec.containers[0].limits.cpu", "spec.containers[0].limits.memory"} with input as workload([bad], [])
}

test_init_container_counts if {
	bad := object.union(object.remove(good, ["limits"]), {"limits": {"cpu": "1"}})
	fields == {"spec.init_containers[0].limits.memory"} with input as workload([good], [bad])
}

test_empty_limit_is_none if {
	bad := object.union(good, {"limits": {"cpu": ""}})
	fields == {"spec.containers[0].limits.cpu"} with input as workload([bad], [])
}

test_unresolved_image_is_refused if {
	bad := object.remove(good, ["resolved_image"])
	fields == {"spec.containers[0].image"} with input as workload([bad], [])
}

test_other_kinds_pass if {
	count(admission.deny) == 0 with input as {"operation": "CREATE", "kind": "Service", "object": {"spec": {}}}
}

test_deletion_passes if {
	count(admission.deny) == 0 with input as {"operation": "DELETE", "kind": "Workload", "old_object": {"spec": {"containers": [{}]}}}
}
