package main

import (
	"testing"

	"github.com/portolan-io/portolan/federation/api/configfile/configtest"
)

func TestChartConfig(t *testing.T) {
	file := configtest.FromChart(t, "../../../charts/golden/cluster.yaml", "cluster.yaml")
	c, err := LoadConfig(file)
	if err != nil {
		t.Fatal(err)
	}
	if c.Fleet() == "" || c.Federation.TokenFile == "" {
		t.Errorf("config %+v", c)
	}
}
