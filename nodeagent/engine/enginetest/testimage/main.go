// Command testimage is the only file of the image that the engines' conformance
// suite runs. Its verbs are those of enginetest.Verbs, and a few that only a
// real engine can answer.
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
)

func main() {
	verb, rest := "sleep", []string(nil)
	if len(os.Args) > 1 {
		verb, rest = os.Args[1], os.Args[2:]
	}
	os.Exit(run(verb, rest))
}

func run(verb string, rest []string) int {
	switch verb {
	case "exit":
		return exit(rest)
	case "echo":
		fmt.Println(strings.Join(rest, " "))
	case "env":
		fmt.Println(os.Getenv(rest[0]))
	case "cat":
		if _, err := io.Copy(os.Stdout, os.Stdin); err != nil {
			return 1
		}
	case "eat":
		return eat()
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
		for {
			time.Sleep(time.Hour)
		}
	case "show":
		show()
	case "try":
		return try(rest)
	case "serve":
		return serve(rest[0])
	default:
		return sleep(verb == "tick")
	}
	return 0
}

func exit(rest []string) int {
	code := 0
	if len(rest) > 0 {
		code, _ = strconv.Atoi(rest[0])
	}
	if len(rest) > 1 {
		d, _ := time.ParseDuration(rest[1])
		time.Sleep(d)
	}
	return code
}

func sleep(tick bool) int {
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	t := time.NewTicker(50 * time.Millisecond)
	for n := 0; ; {
		select {
		case <-term:
			return 0
		case <-t.C:
			if tick {
				fmt.Printf("tick %d\n", n)
				n++
			}
		}
	}
}

func eat() int {
	var held [][]byte
	for {
		b := make([]byte, 1<<20)
		for i := range b {
			b[i] = byte(i)
		}
		held = append(held, b)
		if len(held) > 1<<20 {
			return 1
		}
	}
}

// show prints what a hardened process may be.
func show() {
	b, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(b)) {
		for _, k := range []string{"Uid:", "Gid:", "CapEff:", "CapBnd:", "NoNewPrivs:", "Seccomp:"} {
			if strings.HasPrefix(line, k) {
				fmt.Print(strings.Join(strings.Fields(line)[:2], " "), "\n")
			}
		}
	}
	host, _ := os.Hostname()
	fmt.Println("Hostname:", host)
	ifaces, _ := net.Interfaces()
	fmt.Println("Interfaces:", len(ifaces))
}

// try answers 0 when something can be done: write PATH, read PATH (non-empty),
// unshare, setuid ID, setgid ID.
func try(rest []string) int {
	var err error
	switch rest[0] {
	case "write":
		err = os.WriteFile(rest[1], []byte("x"), 0o600)
	case "read":
		var b []byte
		if b, err = os.ReadFile(rest[1]); err == nil && len(b) == 0 {
			err = io.ErrUnexpectedEOF
		}
	case "unshare":
		err = syscall.Unshare(syscall.CLONE_NEWUSER)
	case "setuid":
		err = become(syscall.Setuid, rest[1])
	case "setgid":
		err = become(syscall.Setgid, rest[1])
	}
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

func become(set func(int) error, id string) error {
	n, err := strconv.Atoi(id)
	if err != nil {
		return err
	}
	return set(n)
}

func serve(port string) int {
	mux := http.NewServeMux()
	mux.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	srv := &http.Server{Addr: ":" + port, Handler: mux, ReadHeaderTimeout: time.Second}
	if err := srv.ListenAndServe(); err != nil {
		fmt.Println(err)
	}
	return 1
}
