// The four measures of bench/peers in Go, on one processor. Prints one `measure nanoseconds` a line.
// A oneshot is a channel of capacity 1 with a goroutine-free receive, which is Go's idiom.
package main

import (
	"fmt"
	"runtime"
	"sync"
	"time"
)

const (
	yields    = 1000000
	tasks     = 500000
	inputs    = 300000
	callbacks = 500000
)

func switches() {
	var group sync.WaitGroup
	for t := 0; t < 2; t++ {
		group.Add(1)
		go func() {
			for i := 0; i < yields/2; i++ {
				runtime.Gosched()
			}
			group.Done()
		}()
	}
	group.Wait()
}

func spawn() {
	n := 0
	done := make(chan int)
	for i := 0; i < tasks; i++ {
		go func(n int) { done <- n + 1 }(n)
		n = <-done
	}
}

func all() {
	results := make([]int, inputs)
	tickets := make([]chan int, inputs)
	for i := range tickets {
		tickets[i] = make(chan int, 1)
	}
	for i, ticket := range tickets {
		ticket <- i
	}
	for i, ticket := range tickets {
		results[i] = <-ticket
	}
}

func oneshot() {
	calls := 0
	for i := 0; i < callbacks; i++ {
		ticket := make(chan int, 1)
		ticket <- 1
		calls += <-ticket
	}
}

func report(what string, measure func(), count int) {
	measure()
	start := time.Now()
	measure()
	fmt.Printf("%s %.1f\n", what, float64(time.Since(start).Nanoseconds())/float64(count))
}

func main() {
	runtime.GOMAXPROCS(1)
	report("switch", switches, yields)
	report("spawn", spawn, tasks)
	report("all", all, inputs)
	report("oneshot", oneshot, callbacks)
}
