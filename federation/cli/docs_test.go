package cli

import (
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/portolan-io/portolan/federation/cli/manifest"
)

var fence = regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```")

// TestDocsAreTrue: commands in the documentation exist, with those flags, and
// manifests in it parse.
func TestDocsAreTrue(t *testing.T) {
	files, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	commands, manifests := 0, 0
	for _, file := range append(files, "../../README.md") {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, block := range fence.FindAllStringSubmatch(string(b), -1) {
			switch lang, text := block[1], block[2]; lang {
			case "sh":
				for line := range strings.Lines(text) {
					if rest, ok := strings.CutPrefix(line, "bin/portolan "); ok {
						commands++
						documentedCommand(t, filepath.Base(file), rest)
					}
				}
			case "yaml":
				if strings.Contains(text, "\nkind: ") || strings.HasPrefix(text, "kind: ") {
					manifests++
					if _, err := manifest.Parse(filepath.Base(file), []byte(text)); err != nil {
						t.Errorf("%s: %v", filepath.Base(file), err)
					}
				}
			}
		}
	}
	if commands < 10 || manifests < 2 {
		t.Errorf("only %d commands and %d manifests were found", commands, manifests)
	}
}

// documentedCommand checks one line, up to its comment or to what the shell does
// with it.
func documentedCommand(t *testing.T, file, line string) {
	t.Helper()
	line, _, _ = strings.Cut(line, "#")
	line, _, _ = strings.Cut(line, "|")
	line, _, _ = strings.Cut(line, "&&")
	line, _, _ = strings.Cut(line, " >")
	cmd, args, err := New(strings.NewReader(""), io.Discard, io.Discard).Find(strings.Fields(line))
	if err != nil || !cmd.Runnable() {
		t.Errorf("%s: portolan %s: no such command (%v)", file, line, err)
		return
	}
	if err := cmd.ParseFlags(args); err != nil {
		t.Errorf("%s: portolan %s: %v", file, line, err)
	}
	if cmd.Args != nil {
		if err := cmd.Args(cmd, cmd.Flags().Args()); err != nil {
			t.Errorf("%s: portolan %s: %v", file, line, err)
		}
	}
}
