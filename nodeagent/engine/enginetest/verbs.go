package enginetest

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"syscall"
	"time"
)

// Verbs is the program of every image that is not scripted: the same verbs as
// the suite's test image (testimage) understands, named by the argument after
// the first.
//
//	sleep            until SIGTERM, then exit 0
//	exit N [D]       after duration D
//	echo WORDS…      to stdout, exit 0
//	env NAME         its value to stdout
//	cat              stdin to stdout
//	tick             "tick <n>" every 50 ms until SIGTERM
//	stubborn         ignores SIGTERM
//	busy             uses all the CPU it gets until SIGTERM, then exit 0
//	eat              uses memory until it is killed for it
func Verbs(p *Proc) int {
	verb, rest := "sleep", []string(nil)
	if len(p.Args) > 1 {
		verb, rest = p.Args[1], p.Args[2:]
	}
	switch verb {
	case "exit":
		return exitVerb(p, rest)
	case "echo":
		for i, w := range rest {
			if i > 0 {
				_, _ = io.WriteString(p.Stdout, " ")
			}
			_, _ = io.WriteString(p.Stdout, w)
		}
		_, _ = io.WriteString(p.Stdout, "\n")
		return 0
	case "env":
		for _, kv := range p.Spec.Env {
			if len(rest) > 0 && len(kv) > len(rest[0]) && kv[:len(rest[0])+1] == rest[0]+"=" {
				_, _ = fmt.Fprintln(p.Stdout, kv[len(rest[0])+1:])
			}
		}
		return 0
	case "cat":
		_, _ = io.Copy(p.Stdout, p.Stdin)
		return 0
	case "busy":
		p.SetCPU(max(p.Spec.CPUMilli, 1))
	case "eat":
		return p.OOM(max(p.Spec.MemoryBytes, 1))
	case "stubborn":
		<-p.Killed
		return 137
	}
	return sleepVerb(p, verb == "tick")
}

func exitVerb(p *Proc, rest []string) int {
	code := 0
	if len(rest) > 0 {
		code, _ = strconv.Atoi(rest[0])
	}
	if len(rest) > 1 {
		d, _ := time.ParseDuration(rest[1])
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-t.C:
		case <-p.Killed:
			return 137
		}
	}
	return code
}

func sleepVerb(p *Proc, tick bool) int {
	t := time.NewTicker(50 * time.Millisecond)
	defer t.Stop()
	if !tick {
		t.Stop()
	}
	for n := 0; ; {
		select {
		case <-t.C:
			_, _ = fmt.Fprintf(p.Stdout, "tick %d\n", n)
			n++
		case s := <-p.Signals:
			if s == syscall.SIGTERM {
				return 0
			}
		case <-p.Killed:
			return 137
		}
	}
}

// readAll reads a log file; empty when there is none yet.
func readAll(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	return string(b)
}
