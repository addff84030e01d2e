package opa

import (
	"slices"
	"strings"

	"github.com/open-policy-agent/opa/v1/ast"
)

// allowedBuiltins are what a policy may call. A decision is a function of policy
// and input, so nothing is here that looks at the world (network, clock,
// randomness, environment), and nothing of which a single call can run long or
// make much out of little (shifts, ranges, templates, YAML, schemas, graphs,
// certificates): a deadline stops an evaluation only between two calls.
const allowedBuiltins = `
abs all and any array.concat array.flatten array.reverse array.slice assign
base64.decode base64.encode base64.is_valid base64url.decode base64url.encode base64url.encode_no_pad
bits.and bits.negate bits.or bits.xor ceil concat contains count
crypto.hmac.equal crypto.hmac.sha256 crypto.hmac.sha512 crypto.md5 crypto.sha1 crypto.sha256
div endswith eq equal floor format_int glob.match glob.quote_meta gt gte hex.decode hex.encode indexof indexof_n
internal.member_2 internal.member_3 internal.print internal.template_string internal.test_case intersection
io.jwt.decode io.jwt.verify_eddsa io.jwt.verify_es256 io.jwt.verify_es384 io.jwt.verify_es512
io.jwt.verify_hs256 io.jwt.verify_hs384 io.jwt.verify_hs512 io.jwt.verify_ps256 io.jwt.verify_ps384
io.jwt.verify_ps512 io.jwt.verify_rs256 io.jwt.verify_rs384 io.jwt.verify_rs512
is_array is_boolean is_null is_number is_object is_set is_string
json.filter json.is_valid json.marshal json.patch json.remove json.unmarshal lower lt lte max min minus mul neq
object.filter object.get object.keys object.remove object.subset object.union object.union_n or plus print product
regex.find_all_string_submatch_n regex.find_n regex.is_valid regex.match regex.replace regex.split
rego.metadata.chain rego.metadata.rule rem replace round semver.compare semver.is_valid set_diff sort split sprintf startswith
strings.any_prefix_match strings.any_suffix_match strings.count strings.replace_n strings.reverse strings.split_n substring sum
time.add_date time.clock time.date time.diff time.format time.parse_duration_ns time.parse_ns time.parse_rfc3339_ns time.weekday
to_number trace trim trim_left trim_prefix trim_right trim_space trim_suffix type_name union
units.parse units.parse_bytes upper uri.is_valid uri.parse
urlquery.decode urlquery.decode_object urlquery.encode urlquery.encode_object uuid.parse walk`

// capabilities are this OPA's, less the built-ins that are not allowed; nothing
// may be fetched from anywhere.
func capabilities() *ast.Capabilities {
	allowed := map[string]bool{}
	for n := range strings.FieldsSeq(allowedBuiltins) {
		allowed[n] = true
	}
	c := ast.CapabilitiesForThisVersion()
	c.Builtins = slices.DeleteFunc(slices.Clone(c.Builtins), func(b *ast.Builtin) bool {
		return !allowed[b.Name] || b.Nondeterministic
	})
	c.AllowNet = []string{}
	return c
}

// forbidden names the built-in in a compiler's complaint about an undefined
// function, when OPA has one that is not allowed here.
func forbidden(message string) (string, bool) {
	name, ok := strings.CutPrefix(message, "undefined function ")
	if !ok {
		return "", false
	}
	_, ok = ast.BuiltinMap[name]
	return name, ok
}
