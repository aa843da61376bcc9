package report

import (
	"fmt"
	"html"
	"math"
	"strings"
)

// Sizes of the chart, in pixels.
const (
	labels  = 330 // width of the rows' names
	panel   = 300 // width of each of two panels
	gap     = 40
	bar     = 14
	spacing = 12
	top     = 86
)

// bars of a row: weft without and with L7 policy, each over two sidecars with the same policy.
var bars = []struct{ variant, base, colour string }{{Weft, Sidecars, "#2563a8"}, {WeftL7, SidecarsL7, "#9db8d2"}}

// Chart draws throughput and proxies' processor time over two sidecars', as SVG.
func Chart(s Summary) string {
	type group struct {
		title string
		of    []Comparison
	}
	var groups []group
	for _, p := range Placements {
		for _, w := range Workloads {
			g := group{title: w.Title + ", " + p.Title}
			for _, b := range bars {
				for _, c := range s.Comparisons {
					if c.Workload == w.Name && c.Placement == p.Name && c.Variant == b.variant && c.Base == b.base {
						g.of = append(g.of, c)
					}
				}
			}
			if len(g.of) > 0 {
				groups = append(groups, g)
			}
		}
	}
	most := 1.0
	for _, g := range groups {
		for _, c := range g.of {
			most = max(most, c.Rate.Max, c.Proxies.Max)
		}
	}
	scale := math.Ceil(2*most+0.2) / 2
	height := top
	for _, g := range groups {
		height += len(g.of)*bar + spacing
	}
	width := labels + 2*panel + 2*gap
	var b strings.Builder
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", width, height+24, width, height+24)
	fmt.Fprintf(&b, `<rect width="%d" height="%d" fill="#ffffff"/>`+"\n", width, height+24)
	text(&b, 12, 22, "start", "15", "weft over two sidecars (1 = two sidecars); lines: lowest and highest pair")
	for i, k := range bars {
		fmt.Fprintf(&b, `<rect x="%d" y="33" width="12" height="12" fill="%s"/>`+"\n", 12+i*200, k.colour)
		text(&b, 30+i*200, 43, "start", "12", title(k.variant))
	}
	text(&b, 12+2*200, 43, "start", "12", "dashed red edge: too noisy")
	panels := []struct {
		title string
		of    func(Comparison) Stat
	}{{"throughput (more is better)", func(c Comparison) Stat { return c.Rate }}, {"proxies' processor time per operation (less is better)", func(c Comparison) Stat { return c.Proxies }}}
	at := func(p int) int { return labels + p*(panel+gap) }
	for i, p := range panels {
		text(&b, at(i), 68, "start", "12", p.title)
		for tick := 0.0; tick <= scale; tick += 0.5 {
			x := float64(at(i)) + tick/scale*panel
			colour := "#dddddd"
			if tick == 1 {
				colour = "#333333"
			}
			fmt.Fprintf(&b, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="%s"/>`+"\n", x, top-10, x, height, colour)
			text(&b, int(x), height+14, "middle", "11", fmt.Sprintf("%g", tick))
		}
	}
	y := top
	for _, g := range groups {
		text(&b, labels-10, y+len(g.of)*bar/2+4, "end", "12", g.title)
		for _, c := range g.of {
			for i, p := range panels {
				draw(&b, at(i), y, panel/scale, p.of(c), colourOf(c.Variant))
			}
			y += bar
		}
		y += spacing
	}
	b.WriteString("</svg>\n")
	return b.String()
}

func colourOf(variant string) string {
	for _, b := range bars {
		if b.variant == variant {
			return b.colour
		}
	}
	return "#999999"
}

// draw draws one bar with its range and its number; nothing where nothing was compared.
func draw(b *strings.Builder, x, y int, scale float64, s Stat, colour string) {
	if s.Count == 0 {
		return
	}
	edge := ""
	if s.Noisy {
		edge = ` stroke="#c02020" stroke-dasharray="3 2"`
	}
	fmt.Fprintf(b, `<rect x="%d" y="%d" width="%.1f" height="%d" fill="%s"%s/>`+"\n", x, y+1, s.Median*scale, bar-3, colour, edge)
	middle := float64(y) + bar/2.0
	fmt.Fprintf(b, `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="#222222"/>`+"\n", float64(x)+s.Min*scale, middle, float64(x)+s.Max*scale, middle)
	text(b, x+int(s.Max*scale)+5, y+bar-3, "start", "11", fmt.Sprintf("%.2f", s.Median))
}

func text(b *strings.Builder, x, y int, anchor, size, s string) {
	fmt.Fprintf(b, `<text x="%d" y="%d" text-anchor="%s" font-size="%s" fill="#222222">%s</text>`+"\n", x, y, anchor, size, html.EscapeString(s))
}
