package main

import (
	"strings"
	"testing"

	"github.com/portolan-io/portolan/federation/api/configfile/configtest"
)

func TestChartConfig(t *testing.T) {
	file := configtest.FromChart(t, "../../../charts/golden/federation.yaml", "federation.yaml")
	t.Setenv("POD_NAME", "federation-7d9c-x2x4v")
	if _, err := LoadConfig(file); err == nil || !strings.Contains(err.Error(), "DATABASE_URL") {
		t.Errorf("without DATABASE_URL: %v", err)
	}
	t.Setenv("DATABASE_URL", "postgres://p:a#b@db:26257/portolan")
	c, err := LoadConfig(file)
	if err != nil {
		t.Fatal(err)
	}
	if c.Replica != "federation-7d9c-x2x4v" || c.Database.URL != "postgres://p:a#b@db:26257/portolan" {
		t.Errorf("replica %q, database %q", c.Replica, c.Database.URL)
	}
}
