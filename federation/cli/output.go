package cli

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"time"
	"unicode/utf8"

	"charm.land/lipgloss/v2"
	"github.com/spf13/cobra"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"
	"sigs.k8s.io/yaml"
)

// outputs that every reading verb knows.
const outputs = "table|wide|json|yaml|name"

func (a *app) outputFlag(c *cobra.Command) {
	c.Flags().StringVarP(&a.output, "output", "o", "table", "how to print: "+outputs)
	_ = c.RegisterFlagCompletionFunc("output", cobra.FixedCompletions(strings.Split(outputs, "|"), cobra.ShellCompDirectiveNoFileComp))
}

func (a *app) checkOutput() error {
	for o := range strings.SplitSeq(outputs, "|") {
		if a.output == o {
			return nil
		}
	}
	return fmt.Errorf("unknown output %q; use %s", a.output, outputs)
}

// table is rows under headings. Wide columns are shown with -o wide.
type table struct {
	head []string
	wide []bool
	rows [][]string
}

func newTable(cols ...string) *table {
	t := &table{}
	for _, c := range cols {
		name, wide := strings.CutPrefix(c, "+")
		t.head = append(t.head, name)
		t.wide = append(t.wide, wide)
	}
	return t
}

func (t *table) add(cells ...string) { t.rows = append(t.rows, cells) }

// print fits the table into the terminal: the widest cells give way first.
func (a *app) print(t *table) {
	var cols []int
	for i := range t.head {
		if !t.wide[i] || a.output == "wide" {
			cols = append(cols, i)
		}
	}
	width := make([]int, len(cols))
	for x, c := range cols {
		width[x] = utf8.RuneCountInString(t.head[c])
		for _, r := range t.rows {
			width[x] = max(width[x], utf8.RuneCountInString(cell(r, c)))
		}
	}
	screen, isTerm := a.terminal()
	if isTerm && a.output != "wide" {
		shrink(width, screen)
	}
	color := isTerm && os.Getenv("NO_COLOR") == ""
	a.line(t.head, cols, width, func(s string, _ int) string {
		if color {
			return lipgloss.NewStyle().Bold(true).Render(s)
		}
		return s
	})
	for _, r := range t.rows {
		a.line(r, cols, width, func(s string, _ int) string {
			if color {
				return tint(s)
			}
			return s
		})
	}
}

func cell(row []string, i int) string {
	if i < len(row) {
		return strings.ReplaceAll(row[i], "\n", " ")
	}
	return ""
}

func shrink(width []int, screen int) {
	total := func() int {
		n := 2 * (len(width) - 1)
		for _, w := range width {
			n += w
		}
		return n
	}
	for total() > screen {
		widest := 0
		for i, w := range width {
			if w > width[widest] {
				widest = i
			}
		}
		if width[widest] <= 8 {
			return
		}
		width[widest]--
	}
}

func (a *app) line(row []string, cols, width []int, style func(string, int) string) {
	var b strings.Builder
	for x, c := range cols {
		s := cell(row, c)
		n := utf8.RuneCountInString(s)
		if n > width[x] {
			r := []rune(s)
			s, n = string(r[:max(0, width[x]-1)])+"…", width[x]
		}
		b.WriteString(style(s, c))
		if x < len(cols)-1 {
			b.WriteString(strings.Repeat(" ", width[x]-n+2))
		}
	}
	a.printf("%s\n", strings.TrimRight(b.String(), " "))
}

// tint colours words that stand for states.
func tint(s string) string {
	switch strings.TrimSpace(s) {
	case "running", "ready", "ok", "READY", "True", "succeeded", "allowed", "yes":
		return lipgloss.NewStyle().Foreground(lipgloss.Green).Render(s)
	case "lost", "LOST", "failed", "refused", "False", "held", "frozen", "backoff", "no":
		return lipgloss.NewStyle().Foreground(lipgloss.Red).Render(s)
	case "pending", "PENDING", "pulling", "starting", "stopping", "restarting", "Unknown":
		return lipgloss.NewStyle().Foreground(lipgloss.Yellow).Render(s)
	}
	return s
}

// machine prints messages as json, yaml or names; false when another form is
// wanted. A single message stands alone, several are a list.
func (a *app) machine(single bool, msgs []proto.Message) (bool, error) {
	switch a.output {
	case "name":
		for _, m := range msgs {
			a.printf("%s\n", text(m, "name"))
		}
		return true, nil
	case "json", "yaml":
	default:
		return false, nil
	}
	var items []json.RawMessage
	for _, m := range msgs {
		b, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
		if err != nil {
			return true, err
		}
		items = append(items, b)
	}
	var v any = map[string]any{"items": items}
	if items == nil {
		v = map[string]any{"items": []any{}}
	}
	if single && len(items) == 1 {
		v = items[0]
	}
	return true, a.encode(v)
}

// encode prints any value as json or yaml.
func (a *app) encode(v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if a.output == "yaml" {
		if b, err = yaml.JSONToYAML(b); err != nil {
			return err
		}
		a.printf("%s", b)
		return nil
	}
	a.printf("%s\n", b)
	return nil
}

// age of a moment, as people say it.
func age(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil || t.AsTime().IsZero() {
		return "-"
	}
	return span(now.Sub(t.AsTime()))
}

func span(d time.Duration) string {
	switch {
	case d < 0:
		return "0s"
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}

// word makes an enum's value short: REPLICA_STATE_RUNNING → running.
func word(full, prefix string) string {
	return strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(full, prefix)), "_", "-")
}

// last segment of a name.
func last(name string) string { return name[strings.LastIndexByte(name, '/')+1:] }

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func bytesText(n int64) string {
	switch {
	case n == 0:
		return "-"
	case n >= 10<<30:
		return fmt.Sprintf("%dGi", n>>30)
	case n >= 1<<20:
		return fmt.Sprintf("%dMi", n>>20)
	}
	return fmt.Sprintf("%dKi", n>>10)
}

func coresText(milli int64) string {
	if milli%1000 == 0 {
		return fmt.Sprint(milli / 1000)
	}
	return fmt.Sprintf("%dm", milli)
}
