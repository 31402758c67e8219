// The lock of github.com/bsm/redislock.
package main

import (
	"context"
	"errors"
	"time"

	"github.com/bsm/redislock"
	"github.com/redis/go-redis/v9"

	"leasehold.test/peers/contend"
)

type peer struct {
	client *redislock.Client
	name   string
	ttl    time.Duration
	held   *redislock.Lock
}

func (p *peer) Take() bool {
	held, err := p.client.Obtain(context.Background(), p.name, p.ttl, nil)
	if errors.Is(err, redislock.ErrNotObtained) {
		return false
	}
	contend.Check(err)
	p.held = held
	return true
}

func (p *peer) GiveBack() { contend.Check(p.held.Release(context.Background())) }

func main() {
	contend.Main(func(client *redis.Client, name string, ttl time.Duration) contend.Lock {
		return &peer{client: redislock.New(client), name: name, ttl: ttl}
	})
}
