// The lock of github.com/go-redsync/redsync over one server.
package main

import (
	"errors"
	"time"

	"github.com/go-redsync/redsync/v4"
	"github.com/go-redsync/redsync/v4/redis/goredis/v9"
	"github.com/redis/go-redis/v9"

	"leasehold.test/peers/contend"
)

type peer struct{ mutex *redsync.Mutex }

func (p peer) Take() bool {
	err := p.mutex.TryLock()
	var taken *redsync.ErrTaken
	if errors.As(err, &taken) || errors.Is(err, redsync.ErrFailed) {
		return false
	}
	contend.Check(err)
	return true
}

func (p peer) GiveBack() {
	released, err := p.mutex.Unlock()
	contend.Check(err)
	if !released {
		contend.Check(errors.New("the lock was not ours any more"))
	}
}

func main() {
	contend.Main(func(client *redis.Client, name string, ttl time.Duration) contend.Lock {
		return peer{redsync.New(goredis.NewPool(client)).NewMutex(name, redsync.WithExpiry(ttl))}
	})
}
