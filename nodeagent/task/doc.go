// Package task decides the life of one allocation on a node. Next looks at what
// is assigned and what was observed and names at most one action to begin, what
// to report, and when to look again; Observe folds what happened into the
// state. It owns the order of start and stop, probes' thresholds, restart
// backoff and the reasons that people see. It never acts: no clock, randomness,
// I/O, goroutines or logging.
//
// Concurrency: none; the caller owns the State.
package task
