package policytest

import (
	"testing"

	"github.com/portolan-io/portolan/policy"
	"github.com/portolan-io/portolan/policy/opa"
)

func openOPA(t *testing.T, bundles []policy.Bundle) policy.Authorizer {
	t.Helper()
	s, err := opa.Compile(bundles, opa.Limits{})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func TestOPAPassesTheSuite(t *testing.T) { Authorizer(t, openOPA) }
