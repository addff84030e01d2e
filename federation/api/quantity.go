package api

import (
	"fmt"
	"math"
	"math/big"
	"strconv"
	"strings"

	"github.com/portolan-io/portolan/federation/api/portolanv1"
)

var suffixes = map[string]*big.Rat{
	"Ki": pow(1024, 1), "Mi": pow(1024, 2), "Gi": pow(1024, 3), "Ti": pow(1024, 4), "Pi": pow(1024, 5), "Ei": pow(1024, 6),
	"k": pow(1000, 1), "M": pow(1000, 2), "G": pow(1000, 3), "T": pow(1000, 4), "P": pow(1000, 5), "E": pow(1000, 6),
}

func pow(base, n int64) *big.Rat {
	return new(big.Rat).SetInt(new(big.Int).Exp(big.NewInt(base), big.NewInt(n), nil))
}

// ParseCPU reads "2", "0.5" or "250m" as millicores, rounded up to a whole one.
// The empty string is 0. Negative numbers and exponents are refused.
func ParseCPU(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	number, scale := s, big.NewRat(1000, 1)
	if n, ok := strings.CutSuffix(s, "m"); ok {
		number, scale = n, big.NewRat(1, 1)
	}
	v, ok := quantity(number, scale)
	if !ok {
		return 0, fmt.Errorf("%q is no amount of CPU: write cores (\"2\", \"0.5\") or millicores (\"250m\")", clip(s))
	}
	return v, nil
}

// ParseBytes reads "1073741824", "64Mi", "1.5Gi" or "1G" as bytes, rounded up to
// a whole one. The empty string is 0. Negative numbers and exponents are refused.
func ParseBytes(s string) (int64, error) {
	if s == "" {
		return 0, nil
	}
	number, scale := s, big.NewRat(1, 1)
	if i := strings.IndexFunc(s, func(r rune) bool { return r != '.' && (r < '0' || r > '9') }); i >= 0 {
		number, scale = s[:i], suffixes[s[i:]]
	}
	if scale != nil {
		if v, ok := quantity(number, scale); ok {
			return v, nil
		}
	}
	return 0, fmt.Errorf("%q is no amount of memory: write bytes (\"1048576\") or a suffix Ki, Mi, Gi, Ti, k, M, G, T (\"64Mi\")", clip(s))
}

// quantity multiplies a plain decimal number and rounds up; false when it is no
// such number or does not fit.
func quantity(s string, scale *big.Rat) (int64, bool) {
	if s == "" || len(s) > 32 || s[0] == '.' || s[len(s)-1] == '.' || strings.Count(s, ".") > 1 {
		return 0, false
	}
	for _, r := range s {
		if r != '.' && (r < '0' || r > '9') {
			return 0, false
		}
	}
	if n, err := strconv.ParseInt(s, 10, 64); err == nil && scale.IsInt() && scale.Num().IsInt64() {
		if f := scale.Num().Int64(); n <= math.MaxInt64/f {
			return n * f, true
		}
		return 0, false
	}
	r, ok := new(big.Rat).SetString(s)
	if !ok {
		return 0, false
	}
	r.Mul(r, scale)
	q, rest := new(big.Int).QuoRem(r.Num(), r.Denom(), new(big.Int))
	if rest.Sign() > 0 {
		q.Add(q, big.NewInt(1))
	}
	return q.Int64(), q.IsInt64()
}

// Resources is an amount of CPU and memory.
type Resources struct {
	CPUMilli    int64
	MemoryBytes int64
}

// Add gives the sum; it saturates instead of overflowing.
func (r Resources) Add(o Resources) Resources {
	return Resources{CPUMilli: satAdd(r.CPUMilli, o.CPUMilli), MemoryBytes: satAdd(r.MemoryBytes, o.MemoryBytes)}
}

// Times gives n of it; it saturates instead of overflowing. n is not negative.
func (r Resources) Times(n int64) Resources {
	return Resources{CPUMilli: satMul(r.CPUMilli, n), MemoryBytes: satMul(r.MemoryBytes, n)}
}

// Max gives the greater of each.
func (r Resources) Max(o Resources) Resources {
	return Resources{CPUMilli: max(r.CPUMilli, o.CPUMilli), MemoryBytes: max(r.MemoryBytes, o.MemoryBytes)}
}

// Fits says whether it is within o.
func (r Resources) Fits(o Resources) bool {
	return r.CPUMilli <= o.CPUMilli && r.MemoryBytes <= o.MemoryBytes
}

func satAdd(a, b int64) int64 {
	if b > 0 && a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}

func satMul(a, n int64) int64 {
	if n > 0 && a > math.MaxInt64/n {
		return math.MaxInt64
	}
	return a * n
}

// RequestsOf is what one replica of the spec claims: the containers together, or
// the greediest init container if that is more. A request that is absent is the
// limit. The error names the field.
func RequestsOf(spec *portolanv1.WorkloadSpec) (Resources, error) {
	var sum Resources
	for i, c := range spec.GetContainers() {
		r, err := containerRequests(c)
		if err != nil {
			return Resources{}, fmt.Errorf("spec.containers[%d].%w", i, err)
		}
		sum = sum.Add(r)
	}
	for i, c := range spec.GetInitContainers() {
		r, err := containerRequests(c)
		if err != nil {
			return Resources{}, fmt.Errorf("spec.init_containers[%d].%w", i, err)
		}
		sum = sum.Max(r)
	}
	return sum, nil
}

func containerRequests(c *portolanv1.Container) (Resources, error) {
	cpuText, cpuField := c.GetRequests().GetCpu(), "requests.cpu"
	if cpuText == "" {
		cpuText, cpuField = c.GetLimits().GetCpu(), "limits.cpu"
	}
	memText, memField := c.GetRequests().GetMemory(), "requests.memory"
	if memText == "" {
		memText, memField = c.GetLimits().GetMemory(), "limits.memory"
	}
	cpu, err := ParseCPU(cpuText)
	if err != nil {
		return Resources{}, fmt.Errorf("%s: %w", cpuField, err)
	}
	mem, err := ParseBytes(memText)
	if err != nil {
		return Resources{}, fmt.Errorf("%s: %w", memField, err)
	}
	return Resources{CPUMilli: cpu, MemoryBytes: mem}, nil
}
