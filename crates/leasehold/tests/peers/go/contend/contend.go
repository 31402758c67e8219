// Package contend is what every peer in Go does with its library's lock; ../../python/contend.py tells it.
package contend

import (
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// Lock is one lock of a library.
type Lock interface {
	// Take does not wait; it says whether the lock is ours now.
	Take() bool
	// GiveBack releases it.
	GiveBack()
}

// Check ends the program if there is an error.
func Check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// Main does what the arguments say with the lock that `open` makes.
func Main(open func(client *redis.Client, name string, ttl time.Duration) Lock) {
	mode, name := os.Args[1], os.Args[3]
	client := redis.NewClient(&redis.Options{Addr: "127.0.0.1:" + os.Args[2]})
	if mode == "try" {
		fmt.Println(open(client, name, 30*time.Second).Take())
		return
	}
	folder := os.Args[4]
	lock := open(client, name, 10*time.Second)
	fmt.Println("ready")
	count := 0
	for !exists(filepath.Join(folder, "stop")) {
		if !lock.Take() {
			time.Sleep(time.Millisecond)
			continue
		}
		inside(folder)
		count++
		lock.GiveBack()
		time.Sleep(time.Duration(rand.Intn(10000)) * time.Microsecond)
	}
	fmt.Println(count)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func inside(folder string) {
	counter := filepath.Join(folder, "counter")
	text, err := os.ReadFile(counter)
	Check(err)
	before, err := strconv.Atoi(strings.TrimSpace(string(text)))
	Check(err)
	time.Sleep(time.Millisecond)
	Check(os.WriteFile(counter, []byte(strconv.Itoa(before+1)), 0o600))
	turns, err := os.OpenFile(filepath.Join(folder, "turns"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	Check(err)
	_, err = turns.WriteString("t")
	Check(err)
	Check(turns.Close())
}
