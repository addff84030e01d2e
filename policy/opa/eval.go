package opa

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"time"

	"github.com/open-policy-agent/opa/v1/ast"
	"github.com/open-policy-agent/opa/v1/metrics"
	"github.com/open-policy-agent/opa/v1/topdown"

	"github.com/portolan-io/portolan/policy"
)

// slices of a deadline: it is counted in steps, each of which begins when the
// process runs, so that a machine that stands still does not turn into denials.
const deadlineSteps = 5

// bounded runs decide under the limits. decide reports through its result only;
// when it overruns, it is left to end by itself and its result is dropped.
func (s *Set) bounded(ctx context.Context, late policy.Denial, decide func(topdown.Cancel) policy.Decision) policy.Decision {
	start := time.Now()
	refuse := func(format string, args ...any) policy.Decision {
		d := late // the goroutine below reads late
		d.Message = fmt.Sprintf(format, args...)
		return policy.Decision{Denials: []policy.Denial{d}, Took: time.Since(start)}
	}
	select {
	case s.slots <- struct{}{}:
	default:
		return refuse("too many evaluations are under way (%d)", cap(s.slots))
	}
	cancel := topdown.NewCancel()
	result := make(chan policy.Decision, 1)
	go func() {
		d := guarded(late, cancel, decide)
		<-s.slots // before the answer, so that who asks next finds it free
		result <- d
	}()
	step := s.limits.Deadline / deadlineSteps
	timer := time.NewTimer(step)
	defer timer.Stop()
	for steps := 1; ; steps++ {
		select {
		case d := <-result:
			d.Took = time.Since(start)
			return d
		case <-ctx.Done():
			cancel.Cancel()
			return refuse("the caller gave up: %v", context.Cause(ctx))
		case <-timer.C:
			if steps >= deadlineSteps || time.Since(start) >= 10*s.limits.Deadline {
				cancel.Cancel()
				return refuse("no decision within %s", s.limits.Deadline)
			}
			timer.Reset(step)
		}
	}
}

// guarded turns a panic of the engine into a denial.
func guarded(late policy.Denial, cancel topdown.Cancel, decide func(topdown.Cancel) policy.Decision) (d policy.Decision) {
	defer func() {
		if r := recover(); r != nil {
			late.Message = fmt.Sprintf("the engine failed: %v at %s", r, firstLine(debug.Stack()))
			d = policy.Decision{Denials: []policy.Denial{late}}
		}
	}()
	return decide(cancel)
}

func firstLine(stack []byte) string {
	const enough = 200
	if len(stack) > enough {
		stack = stack[:enough]
	}
	return string(stack)
}

// eval runs a query; false is undefined. strict makes an error of a built-in fail
// the evaluation instead of making its expression undefined.
func (p *program) eval(ctx context.Context, q ast.Body, input *ast.Term, cancel topdown.Cancel, strict bool) (ast.Value, bool, error) {
	txn, err := p.store.NewTransaction(ctx)
	if err != nil {
		return nil, false, err
	}
	defer p.store.Abort(ctx, txn)
	var value ast.Value
	err = topdown.NewQuery(q).WithCompiler(p.compiler).WithStore(p.store).WithTransaction(txn).
		WithCancel(cancel).WithInput(input).WithStrictBuiltinErrors(strict).WithMetrics(metrics.NoOp()).
		Iter(ctx, func(r topdown.QueryResult) error {
			if t := r[resultVar]; t != nil {
				value = t.Value
			}
			return nil
		})
	return value, value != nil, err
}

// failed is the denial of an evaluation that ended with an error.
func (p *program) failed(rule string, at policy.Location, err error) policy.Denial {
	d := policy.Denial{Rule: rule, Location: at, Bundle: p.name, Message: "evaluation failed: " + err.Error()}
	if te, ok := errors.AsType[*topdown.Error](err); ok {
		d.Message = "evaluation failed: " + te.Message
		if te.Location != nil && te.Location.File != "" {
			d.Location = location(te.Location)
		}
	}
	return d
}
