package tunnel

import (
	"errors"
	"io"
)

// Relay copies messages from one stream to another until the source ends or one
// of them fails. It is how a call through tunnels is handed down a plane.
func Relay[M any](recv func() (M, error), send func(M) error) error {
	for {
		m, err := recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := send(m); err != nil {
			return err
		}
	}
}
