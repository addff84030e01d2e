// Command plots draws the figures of docs/figures from the tables beside them:
// name.csv becomes name.svg. It is a module of its own, so that no drawing library
// enters the product's go.mod.
//
// A table's first line says how it is drawn: "bars", or "lines" with both axes
// logarithmic; then title, x axis, y axis, and the target, if there is one. The
// second line names the columns: series, x, y, and for bars the spread of y.
package main

import (
	"encoding/csv"
	"errors"
	"fmt"
	"image/color"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgsvg"
)

// palette is told apart also without colours seen: Okabe and Ito's.
var palette = []color.RGBA{
	{0, 114, 178, 255}, {230, 159, 0, 255}, {0, 158, 115, 255}, {204, 121, 167, 255}, {213, 94, 0, 255}, {86, 180, 233, 255}, {90, 90, 90, 255},
}

type row struct {
	series string
	x      string
	y, dev float64
}

type table struct {
	kind, title, x, y string
	target            float64 // 0: none
	rows              []row
}

func main() {
	dir := "../../docs/figures"
	if len(os.Args) > 1 {
		dir = os.Args[1]
	}
	if err := run(dir); err != nil {
		fmt.Fprintln(os.Stderr, "plots:", err)
		os.Exit(1)
	}
}

func run(dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "*.csv"))
	if err != nil {
		return err
	}
	if len(files) == 0 {
		return fmt.Errorf("there is no table in %s", dir)
	}
	for _, f := range files {
		t, err := read(f)
		if err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}
		p, err := t.plot()
		if err != nil {
			return fmt.Errorf("%s: %w", f, err)
		}
		out := strings.TrimSuffix(f, ".csv") + ".svg"
		if err := save(p, out); err != nil {
			return err
		}
		fmt.Println(out)
	}
	return nil
}

// The size of a figure, and of the column for its legend.
const (
	width, height = 22 * vg.Centimeter, 10 * vg.Centimeter
	legendWidth   = 5.5 * vg.Centimeter
)

// save draws the legend beside the plot: inside it would hide what it explains.
func save(p *plot.Plot, file string) error {
	legend := p.Legend
	p.Legend = plot.NewLegend()
	c := vgsvg.New(width, height)
	all := draw.New(c)
	all.SetColor(color.White)
	all.Fill(all.Rectangle.Path())
	p.Draw(draw.Crop(all, vg.Points(6), -legendWidth, vg.Points(4), -vg.Points(6)))
	legend.Top, legend.Left, legend.ThumbnailWidth, legend.Padding = true, true, vg.Points(16), vg.Points(3)
	legend.Draw(draw.Crop(all, width-legendWidth+vg.Points(10), 0, 0, -vg.Points(34)))
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	_, err = c.WriteTo(f)
	return errors.Join(err, f.Close())
}

func read(file string) (*table, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := csv.NewReader(f)
	r.FieldsPerRecord = -1
	r.Comment = '#'
	lines, err := r.ReadAll()
	if err != nil {
		return nil, err
	}
	if len(lines) < 3 || len(lines[0]) < 4 {
		return nil, errors.New("needs a line of kind, title and axes, a line of column names, and rows")
	}
	t := &table{kind: lines[0][0], title: lines[0][1], x: lines[0][2], y: lines[0][3]}
	if len(lines[0]) > 4 {
		if t.target, err = strconv.ParseFloat(lines[0][4], 64); err != nil {
			return nil, err
		}
	}
	for i, l := range lines[2:] {
		v := row{series: l[0], x: l[1]}
		if v.y, err = strconv.ParseFloat(l[2], 64); err != nil {
			return nil, fmt.Errorf("row %d: %w", i+1, err)
		}
		if len(l) > 3 && l[3] != "" {
			if v.dev, err = strconv.ParseFloat(l[3], 64); err != nil {
				return nil, fmt.Errorf("row %d: %w", i+1, err)
			}
		}
		t.rows = append(t.rows, v)
	}
	return t, nil
}

func (t *table) series() []string {
	var out []string
	for _, r := range t.rows {
		if !slices.Contains(out, r.series) {
			out = append(out, r.series)
		}
	}
	return out
}

func (t *table) plot() (*plot.Plot, error) {
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = t.title, t.x, t.y
	p.Title.Padding, p.Title.TextStyle.Font.Size = vg.Points(8), vg.Points(13)
	p.Legend.TextStyle.Font.Size = vg.Points(10)
	grid := plotter.NewGrid()
	grid.Vertical.Color, grid.Horizontal.Color = color.Gray{230}, color.Gray{215}
	p.Add(grid)
	switch t.kind {
	case "lines":
		return p, t.lines(p)
	case "bars":
		return p, t.bars(p)
	}
	return nil, fmt.Errorf("kind %q: write lines or bars", t.kind)
}

func (t *table) lines(p *plot.Plot) error {
	p.X.Scale, p.Y.Scale = plot.LogScale{}, plot.LogScale{}
	p.X.Tick.Marker, p.Y.Tick.Marker = plot.TickerFunc(ticks), plot.TickerFunc(ticks)
	low, high := math.Inf(1), math.Inf(-1)
	for i, name := range t.series() {
		var xy plotter.XYs
		for _, r := range t.rows {
			if r.series != name {
				continue
			}
			x, err := strconv.ParseFloat(r.x, 64)
			if err != nil {
				return err
			}
			xy = append(xy, plotter.XY{X: x, Y: r.y})
			low, high = min(low, x), max(high, x)
		}
		l, s, err := plotter.NewLinePoints(xy)
		if err != nil {
			return err
		}
		l.Color, l.Width = palette[i%len(palette)], vg.Points(1.8)
		s.Color, s.Shape, s.Radius = palette[i%len(palette)], draw.CircleGlyph{}, vg.Points(2.6)
		p.Add(l, s)
		p.Legend.Add(name, l, s)
	}
	if t.target > 0 {
		l, err := plotter.NewLine(plotter.XYs{{X: low, Y: t.target}, {X: high, Y: t.target}})
		if err != nil {
			return err
		}
		l.Color, l.Dashes = color.Gray{90}, []vg.Length{vg.Points(5), vg.Points(4)}
		p.Add(l)
		p.Legend.Add("target", l)
	}
	return nil
}

// ticks marks 1, 2 and 5 of each decade.
func ticks(low, high float64) []plot.Tick {
	var out []plot.Tick
	for e := math.Floor(math.Log10(low)); e <= math.Ceil(math.Log10(high)); e++ {
		for _, m := range []float64{1, 2, 5} {
			if v := m * math.Pow(10, e); v >= low*0.999 && v <= high*1.001 {
				label := ""
				if m == 1 || high/low < 100 {
					label = number(v)
				}
				out = append(out, plot.Tick{Value: v, Label: label})
			}
		}
	}
	return out
}

// label writes values above their bars.
func label(p *plot.Plot, at plotter.XYs, offset vg.Length) error {
	var text []string
	for _, v := range at {
		text = append(text, strconv.FormatFloat(v.Y, 'f', 1, 64))
	}
	l, err := plotter.NewLabels(plotter.XYLabels{XYs: at, Labels: text})
	if err != nil {
		return err
	}
	for i := range l.TextStyle {
		l.TextStyle[i].XAlign, l.TextStyle[i].Font.Size = draw.XCenter, vg.Points(8)
	}
	l.Offset = vg.Point{X: offset, Y: vg.Points(2)}
	p.Add(l)
	return nil
}

func number(v float64) string {
	switch {
	case v >= 1e6:
		return strconv.FormatFloat(v/1e6, 'f', -1, 64) + " M"
	case v >= 1e3:
		return strconv.FormatFloat(v/1e3, 'f', -1, 64) + " k"
	}
	return strconv.FormatFloat(v, 'f', -1, 64)
}

func (t *table) bars(p *plot.Plot) error {
	var groups []string
	low, high := math.Inf(1), math.Inf(-1)
	for _, r := range t.rows {
		if !slices.Contains(groups, r.x) {
			groups = append(groups, r.x)
		}
		low, high = min(low, r.y-r.dev), max(high, r.y+r.dev)
	}
	names := t.series()
	var labels []func() error // drawn last, over the bars beside them
	bar := vg.Points(min(26, 300/float64(len(groups)*len(names))))
	for i, name := range names {
		var v plotter.Values
		var at plotter.XYs
		for g, group := range groups {
			k := slices.IndexFunc(t.rows, func(r row) bool { return r.series == name && r.x == group })
			if k < 0 {
				return fmt.Errorf("%s has no value for %s", name, group)
			}
			r := t.rows[k]
			v = append(v, r.y)
			at = append(at, plotter.XY{X: float64(g), Y: r.y})
		}
		b, err := plotter.NewBarChart(v, bar)
		if err != nil {
			return err
		}
		b.Color, b.LineStyle.Width = palette[i%len(palette)], 0
		b.Offset = bar * vg.Length(float64(i)-float64(len(names)-1)/2)
		p.Add(b)
		p.Legend.Add(name, b)
		labels = append(labels, func() error { return label(p, at, b.Offset) })
	}
	for _, draw := range labels {
		if err := draw(); err != nil {
			return err
		}
	}
	// Bars that begin at zero would hide what they are to show.
	p.Y.Min, p.Y.Max = math.Floor(low-(high-low)*0.15), math.Ceil(high+(high-low)*0.05)
	if t.target > 0 {
		l, err := plotter.NewLine(plotter.XYs{{X: -0.5, Y: t.target}, {X: float64(len(groups)) - 0.5, Y: t.target}})
		if err != nil {
			return err
		}
		l.Color, l.Dashes = color.Gray{90}, []vg.Length{vg.Points(5), vg.Points(4)}
		p.Add(l)
		p.Legend.Add("target", l)
		p.Y.Max = max(p.Y.Max, math.Ceil(t.target))
	}
	p.NominalX(groups...)
	return nil
}
