package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

// printTable renders the lines of a run as Markdown: the steps of each run, and
// the mistakes with what both nsmgrs answered.
func printTable(out io.Writer, paths []string) error {
	var all []result
	for _, path := range paths {
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		lines := bufio.NewScanner(file)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			var line result
			if err := json.Unmarshal(lines.Bytes(), &line); err != nil {
				_ = file.Close()
				return fmt.Errorf("%s: %w", path, err)
			}
			all = append(all, line)
		}
		_ = file.Close()
		if err := lines.Err(); err != nil {
			return fmt.Errorf("%s: %w", path, err)
		}
	}
	isMistake := func(line result) bool { return line.Mistake != "" }
	steps := slices.DeleteFunc(slices.Clone(all), isMistake)
	mistakes := slices.DeleteFunc(all, func(line result) bool { return !isMistake(line) })
	grid(out, "step", steps, func(line result) (string, string) { return line.Step, line.cell() })
	grid(out, "call: mistake", mistakes, func(line result) (string, string) {
		cell := line.Real
		if line.Failed != "" {
			cell = "**FAILED** " + line.Real + "; " + line.Failed
		}
		return line.Call + ": " + line.Mistake, cell
	})
	return nil
}

// cell is what a step's place in the table says.
func (r result) cell() string {
	var parts []string
	if r.Failed != "" {
		parts = append(parts, "**FAILED** "+r.Failed)
	}
	for _, part := range []string{r.Took, r.Loss, r.Note} {
		if part != "" {
			parts = append(parts, part)
		}
	}
	if len(parts) == 0 {
		return "passed"
	}
	return strings.Join(parts, "; ")
}

// grid has a row for each name and a column for each title, both in the order
// of their first appearance.
func grid(out io.Writer, head string, lines []result, split func(result) (string, string)) {
	if len(lines) == 0 {
		return
	}
	var titles, names []string
	cells := map[[2]string][]string{}
	for _, line := range lines {
		name, cell := split(line)
		if !slices.Contains(titles, line.Title) {
			titles = append(titles, line.Title)
		}
		if !slices.Contains(names, name) {
			names = append(names, name)
		}
		key := [2]string{name, line.Title}
		cells[key] = append(cells[key], strings.ReplaceAll(cell, "|", "/"))
	}
	fmt.Fprintf(out, "\n| %s | %s |\n|---|%s\n", head, strings.Join(titles, " | "), strings.Repeat("---|", len(titles)))
	for _, name := range names {
		row := []string{name}
		for _, title := range titles {
			row = append(row, strings.Join(cells[[2]string{name, title}], " / "))
		}
		fmt.Fprintf(out, "| %s |\n", strings.Join(row, " | "))
	}
}
