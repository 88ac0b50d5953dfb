// asyncorch.h - v0.1.0 - futures, tasks, I/O and orchestration for plain C, in one file.
//
//     #define ASYNCORCH_IMPLEMENTATION   // in exactly one .c or .cc file of the program
//     #include "asyncorch.h"             // and without the define wherever else it is used
//     cc -O2 program.c                   // -pthread for glibc before 2.34 and the BSDs
//
// Public domain. Search for >>name to reach a section. Each layer calls only what stands above it.
//
//     >>manual          model, first program, ownership, order, cancellation, scopes, time, errors,
//                       misuse, I/O, sockets, files, threads, signals, processes, pollers, guest
//                       mode, fork, limits and caveats
//     >>config          what can be set before the include
//     >>api             by topic (search for // ----): one contract block each
//     >>implementation  bottom first:
//
//       0 >>platform    operating system, processor, compiler, tools
//       1 >>base        errors, misuse, allocator, slots, ready ring; >>forward: what cannot wait
//       2 >>context     the switch, stacks with guards
//       3 >>poller      one contract; poll(2), epoll, kqueue; which one fits
//       4 >>timer       a heap of deadlines
//         >>inbox       what other threads leave for a loop
//       5 >>loop        turns, rounds, guest mode ............. orch_loop_run, orch_loop_dispatch
//       6 >>future      tickets, settle, then, follow, cancel . orch_then, orch_settle, orch_drop
//       7 >>combinator  all, any, race, quorum, timeout ....... orch_all, orch_timeout
//       8 >>task        coroutines, await, shield ............. orch_go, orch_await, orch_sleep
//         >>scope       a nursery and a deadline in one ....... orch_scope_open, orch_scope_go
//       9 >>io          descriptors, reading, writing, lines .. orch_read, orch_write, orch_ready
//      10 >>thread      posts, remotes, offloaded work ........ orch_offload, orch_post, orch_go_on
//         >>signal      signals, wherever they arrive ......... orch_signal, orch_signals_next
//         >>run         the life of a loop, the main task ..... orch_loop_new, orch_run, orch_exit
//         >>kinds       what each kind of future does, a table
//         >>net         sockets ............................... orch_serve, orch_connect, orch_udp
//         >>file        files, on threads ..................... orch_file_load, orch_file_read
//      11 >>coordination semaphore, event, channel, topic ... orch_acquire, orch_send, orch_publish
//      12 >>policy      retry, map, hedge ..................... orch_retry, orch_map, orch_hedge
//         >>guard       limiter, breaker, single flight ....... orch_limit, orch_breaker_run
//         >>process     children: started, fed, read, ended ... orch_process_run, ..._start
//
//     >>end             macros undefined, licence

#ifndef ASYNCORCH_H
#define ASYNCORCH_H

// ------------------------------------------------------------------------------------------------
// >>manual
//
// 1. The model
//
// A future is the read end of work in progress: pending, then settled once and for ever, with a
// value or an error. A promise is its write end. A task is a C function that may wait, for futures
// (orch_await) or for input and output (orch_read), while other tasks run. A loop runs all of this
// on one thread: it runs what is ready, and sleeps in the poller when nothing is. Whatever you
// compose with all, any, race or timeout is a future again.
//
// 2. A first program
//
//     #define ASYNCORCH_IMPLEMENTATION
//     #include "asyncorch.h"
//     #include <stdio.h>
//
//     static orch_result work(void *arg) {           // a task: an ordinary function
//         orch_sleep(20);                            // only this task waits
//         return orch_ok_int(*(int *)arg * 2);
//     }
//
//     static orch_result start(void *arg) {
//         int a = 3, b = 4;
//         orch_future *first = orch_go(work, &a);    // both run at the same time
//         orch_future *second = orch_go(work, &b);
//         (void)arg;
//         orch_result r = orch_await(orch_timeout(orch_all(first, second), 1000));
//         if (r.error != 0) return r;                // prints the message and exits with 1
//         printf("%d\n", (int)(orch_int(orch_at(&r, 0)) + orch_int(orch_at(&r, 1))));
//         orch_result_free(&r);
//         return orch_ok(NULL, NULL);
//     }
//
//     int main(void) { return orch_exit(orch_run(start, NULL)); }
//
// 3. Ownership
//
// Every function that takes a future consumes it, whatever happens. Every function that returns one
// hands it over. So an expression like the one above leaks nothing on any path and needs no check
// inside: what could not be made is a future that is rejected already. orch_ref makes one more
// reference; a reference ends with orch_drop (give up), orch_detach (let it run) or by being
// consumed. Giving up the last reference to pending work cancels it. Inside a task that call
// returns only when the work has ended, so a child never touches its parent's variables after they
// are gone. Outside a task the work ends later, and must own what it uses.
// A result owns what it shows. Free it with orch_result_free, whoever else may hold the future;
// orch_take moves the value out when nobody does. A result that a callback gets, or orch_wait
// gives, is lent. A promise owns nothing: settling twice, or after the future has gone, returns
// false and does no harm.
//
// 4. Order
//
// Callbacks run from the loop, never inside orch_then or orch_settle; for one future in the order
// in which they were registered, overall in the order in which they became runnable. A task starts
// at once and runs until it first waits. C leaves the order in which arguments are evaluated open:
// start tasks in statements when their order matters. Awaiting what is settled goes on at once, but
// the 128th time in a row lets others run first.
//
// 5. Cancellation
//
// Cancelling is a request. It walks from what was asked to where the work is done: a task in
// orch_await, a promise with orch_promise_on_cancel, a timer, a descriptor. Sources that somebody
// else holds too are left alone. In a cancelled task everything that would have to wait returns
// ORCH_ECANCELED until the task ends; between orch_shield_begin and orch_shield_end it may wait,
// for its clean-up. orch_cancel_reason says why. An await that is under way ends when what it waits
// for has ended, and returns what that came to: no value is lost. A combinator that is decided
// cancels its losers and is delivered when they have ended, which takes no time unless a loser
// shields or its producer said that it will still settle.
//
// 6. Scopes
//
// A scope makes sure that no work outlives the function that started it, and that all of it meets
// one deadline:
//
//     static orch_result page(void *arg) {
//         orch_scope s;                                   // on the task's stack
//         orch_scope_desc desc = {"page", 2000, false};   // name, deadline in ms, keep_going
//         orch_scope_open(&s, &desc);
//         orch_scope_go(&s, fetch_comments, arg);         // if one fails, the other is cancelled,
//         orch_scope_go(&s, fetch_likes, arg);            // and so is a wait before close
//         return orch_scope_close(&s);                    // waits for both: the first error, or
//     }                                                   // ORCH_ETIMEDOUT
//
// Close it on every path; what has gone before close is the body, and belongs to the scope like a
// task in it. Scopes nest, the nearest deadline counts, and cancelling one reaches everything
// below. A shield begun inside holds off what comes from outside: a scope opened within the shield
// still has its own deadline, which bounds a clean-up. orch_local carries a value (a trace id) to
// all that a task starts.
//
// 7. Time
//
// Milliseconds, never early. The clock is monotonic and read once for 128 pieces of ready work, or
// all if there are fewer: a timer that is armed meanwhile counts from then. For tests
// orch_loop_desc.clock can be ORCH_CLOCK_VIRTUAL: whenever everything is blocked, time jumps to the
// next timer, so that a day of back-off runs in milliseconds and always in the same way.
// orch_loop_desc.seed draws the order of equally ready tasks and equal deadlines from a number: the
// same seed gives the same run, other seeds find what depends on the order. Reports of a failure
// name the seed.
//
// 8. Errors
//
// 0 is success, negative is -errno or ORCH_E..., positive is yours. Rejections can carry a message
// (orch_failf) that orch_message finds. A detached future that is rejected and seen by nobody is
// reported to on_unhandled. When everything is blocked for good, orch_run returns ORCH_EDEADLK and
// reports who awaits what: tasks by name, combinators and scopes with what is open in them, each
// with up to 8 of its parts. orch_loop_dump says the same at any time, also from a running task.
//
// 9. Misuse
//
// debug: builds without NDEBUG print "asyncorch: <function>: <what to do>", a backtrace, and abort.
// release: builds with NDEBUG return the error named here. What was handed over is released in
// both.
//
//     misuse                                          debug    release
//     NULL for a future (but drop, detach: nothing)   aborts   ORCH_EINVAL
//     a future used after it was consumed, pending    aborts   ORCH_ECONSUMED
//     ... after it was freed                          aborts   ORCH_ECONSUMED, until reused
//     the same future twice in a list                 aborts   ORCH_ECONSUMED for the second
//     NULL for a callback, hook or task function      aborts   ORCH_EINVAL; futures are dropped
//     NULL for a list that is not empty               aborts   ORCH_EINVAL
//     NULL for the result of orch_settle_with         aborts   false; the promise stays pending
//     a count above 2^31 - 16                         aborts   ORCH_EINVAL; the list is not read
//     await, wait, sleep, yield, shield outside task  aborts   ORCH_ENOTASK; await drops its future
//     no loop on this thread (await to yield, too)    aborts   ORCH_ENOLOOP
//     a loop or orch_run where one is running         aborts   ORCH_ENESTED (orch_loop_new: NULL)
//     running or freeing a loop from inside it        aborts   ORCH_ENESTED
//     a poller that the system has not                aborts   ORCH_EINVAL (orch_loop_new: NULL)
//     a future or promise of another thread's loop    aborts   ORCH_ETHREAD; settle: false
//     a loop stopped or dumped by another thread      aborts   does nothing
//     a list or share freed by another thread         aborts   it is kept: a leak
//     a box opened by another thread                  aborts   a dead ticket
//     a stack size below 16 KiB or above 1 GiB        aborts   ORCH_EINVAL (orch_loop_new: NULL)
//     an argument copy above half the stack           aborts   ORCH_EINVAL
//     orch_shield_end without a beginning             aborts   ignored
//     NULL for a semaphore, channel, limiter, ...     aborts   ORCH_EINVAL (free: nothing)
//     acquire, send, recv, limit outside task         aborts   ORCH_ENOTASK; the item is freed
//     more permits released than taken                aborts   ORCH_EINVAL
//     a desc with a value out of range (not retry's)  aborts   an object that says ORCH_EINVAL
//     NULL for a scope                                aborts   ORCH_ESCOPE (open: ORCH_EINVAL)
//     a scope closed twice or by another task         aborts   ORCH_ESCOPE
//     a scope closed while others are open in it      aborts   those are closed first
//     a task that ends with a scope open              aborts   reported, cancelled and closed
//     a second completion_next while one is pending   aborts   ORCH_EBUSY
//     completion_free by another thread, or no loop   aborts   does nothing
//     a promise boxed twice at a time                 aborts   the first unbox wins
//     orch_ready with no or unknown events            aborts   ORCH_EINVAL
//     read, write, accept, connect, serve and the     aborts   ORCH_ENOTASK
//       calls for files outside a task
//     NULL for memory or a path of one of them        aborts   ORCH_EINVAL
//     orch_serve without a handler                    aborts   ORCH_EINVAL; the listener is closed
//     orch_listen of NULL, a connection to nothing,   aborts   ORCH_EINVAL
//       orch_resolve of neither host nor service
//     post or go_on without a loop or a function      aborts   ORCH_EINVAL
//     an unknown lane, a lane of no threads           aborts   ORCH_EINVAL
//     orch_promise_remote without a loop              aborts   NULL
//     NULL for a remote (drop: nothing)               aborts   false; the result is freed
//     orch_signals_new with an empty list             aborts   an object that says ORCH_EINVAL
//     a process without argv, with an unknown in,     aborts   an object that says ORCH_EINVAL
//       out or err, or with NULL as input of some size
//     orch_process_run outside a task                 aborts   ORCH_ENOTASK
//     guest mode: no array for a count, a virtual     aborts   ORCH_EINVAL
//       clock
//     a stack overflow                                dies on the guard and names the task, in both
//     a cancelled task that goes on waiting           reported once, in both
//
// Not detected: a handle used after its slot was used again (release), a result copied and freed
// twice, an element of a list kept longer than the list, a ticket, box or future used after its
// loop was freed, a result of orch_await that is not freed, close() in place of orch_close, what
// orch_promise_pending and orch_promise_wanted are asked by another thread, orch_chain in what is
// not returned or settled with.
//
// 10. Input and output
//
// Calls for tasks, in direct style: they return what they moved, or a negative error.
//
//     static orch_result echo(int fd, void *context) {    // orch_serve runs it for each connection
//         char data[4096];
//         ptrdiff_t n;
//         (void)context;
//         while ((n = orch_read(fd, data, sizeof data)) > 0) {
//             if (orch_write(fd, data, (size_t)n) < 0) break;
//         }
//         return orch_ok(NULL, NULL);
//     }
//
// Each tries first and waits only when it would block; after a read that came short the next one
// waits first, so a request costs one recv and one send. A wait obeys the deadlines and the
// cancellation around it, so no call has a time-out of its own: open a scope, or await the task
// within orch_timeout. orch_write writes all of it; of two that meet in one direction of a
// descriptor the second gets ORCH_EBUSY, so bytes of two never mix. SIGPIPE is never raised. They
// work for sockets, pipes and terminals, non-blocking or not. orch_reader_line gives lines.
// orch_ready is a future of readiness alone, for a library that does its own calls.
// Close with orch_close: whoever waits gets ORCH_ECANCELED, the poller forgets the descriptor, and
// no late event reaches the next owner of its number. orch_adopt promises it for a descriptor that
// the library did not make; its waits are then free of system calls under epoll and kqueue too.
//
// 11. Sockets
//
// orch_listen makes a listener, orch_serve is the accept loop: a task for each connection, at most
// so many at a time. Out of descriptors it tells on_error once and waits until it can go on; when
// it is cancelled it stops listening, lets connections end, cancels those that take too long, and
// returns when all have ended. orch_connect takes a host and a service, resolves on a thread, and
// races the addresses as RFC 8305 says. orch_listen and orch_udp take numbers and "localhost", no
// other names. orch_socket_... are the calls with flags, and those for datagrams.
//
// 12. Files
//
// A disk blocks, whatever poll says: a plain orch_read of a file stops the loop for as long. So
// orch_file_... run on threads of the pool, on memory of their own: cancelled, they return at once,
// and never touch the caller's memory afterwards; a cancelled write may or may not happen.
// orch_file_load reads a whole file; orch_file_save replaces one so that others see the old or the
// new one, whole.
//
// 13. Threads
//
// A loop and all that belongs to it is used on its own thread. Each thread may have one; they share
// nothing. For another thread's loop exactly these may be called:
//
//     orch_post(loop, fn, arg)          has the loop call fn       from any thread
//     orch_remote_settle, ..._drop      settles a promise there    from any thread
//     orch_go_on(loop, fn, arg)         a task there, future here  from a thread with a loop
//
// Any thread, with a loop or without, may call those whose block says "any thread": among them
// orch_ok, orch_fail, orch_failf, orch_message, orch_pool_limit and orch_pool_statistics. Nothing
// here may be called from a signal handler.
// orch_post: what was accepted is called, at the latest when the loop is freed; a loop that is gone
// says ORCH_ECLOSED. A sleeping loop is woken once for any number of posts. orch_promise_remote
// makes the write end for another thread; while one is out the loop is not deadlocked, and virtual
// time stands still when nothing is ready.
// orch_offload runs what blocks or computes on a thread of the pool: lanes that do not hold up each
// other (the default, files, names, five of your own), each with a bound, first come first served;
// threads that are idle for 5 s end. Cancelled before it has begun, it never runs. Begun, it cannot
// be stopped: its future ends at once, fn runs on, and its result is freed when it comes. So what
// arg shows must live as long as fn runs, or be copied (arg_size) or owned (release).
// orch_go_on is not like that: dropped in a task, it returns when the task there has ended.
// Results cross when their release may run on any thread; messages do. A list or a share of a
// loop's futures arrives as ORCH_ETHREAD.
//
// 14. Signals
//
// orch_signal(SIGHUP) is a future of the next time that a signal comes. orch_signals_new and
// orch_signals_next lose none between two waits. While somebody waits the process catches the
// signal, in whichever thread it arrives, and every loop that waits gets it; afterwards it is
// handled as before. Several that come before the loop looks count as one.
// With orch_loop_desc.handle_signals, SIGINT and SIGTERM cancel the main task of orch_run_with, its
// clean-up is waited for, and orch_exit returns 130 or 143; 0 when it succeeds all the same. A
// second one ends the process at once.
//
// 15. Processes
//
// orch_process_run runs a program, feeds it and captures what it prints, and returns when it has
// ended. orch_process_start is the same by hand: pipes, orch_process_wait, orch_process_kill. A
// child's life is its handle's: orch_process_free, a cancelled run and the end of the loop send
// SIGTERM to its process group, wait for grace_ms, and send SIGKILL. There are no zombies, and
// nobody else's children are reaped. What cannot be started is an error (-ENOENT), not an exit
// code. A status is a value; orch_exit_status_check makes an error of one that is not 0.
//
// 16. Pollers
//
// A loop begins with poll(2), which is fastest while much of what it looks at is ready. It moves to
// epoll (Linux) or kqueue (the BSDs, macOS) when looks at more than 64 descriptors find fewer than
// 1 in 32 of them ready, and back when they find more than 1 in 8, or look at fewer than 32: sooner
// the more is lost by not having moved, later with each move. orch_loop_desc.poller pins one;
// orch_loop_statistics says which it is and how often it moved. What is said here holds under each,
// but for what 19 names.
//
// 17. Guest mode
//
// A loop can live in another one. Make it with orch_loop_new, start tasks with orch_go, and each
// time the host goes round ask for orch_loop_pollfds and orch_loop_timeout, wait, and call
// orch_loop_dispatch. With a poller pinned to epoll or kqueue one descriptor, orch_loop_fd, stands
// for all. Examples 16 (poll), 17 (GLib) and 18 (libuv) are whole. Nobody reports a deadlock then.
//
// 18. Fork
//
// A child made by fork may close descriptors with orch_close, free the loop, exec or _exit, and
// takes nothing from its parent. It may run an inherited loop only under poll(2): an epoll set is
// the parent's too. Other threads' loops are gone there, the pool is empty, and what the parent's
// threads worked on is ORCH_ECANCELED. To run another program use orch_process_start.
//
// 19. Limits and caveats
//
// - A task's stack is 64 KiB by default, of which only touched pages cost memory. Compile with
//   -fstack-clash-protection: else one frame larger than the guard (16 KiB; 64 on aarch64) jumps
//   over it. orch_on_main_stack runs a hungry call on the thread's own stack.
// - Callbacks and hooks must not wait. C++ exceptions must not leave a task or callback; longjmp
//   must not cross a switch. MXCSR, its status flags too, and the x87 control word (aarch64: FPCR,
//   riscv64: fcsr) travel with a task; with ucontext it depends on the C library.
// - A call that blocks (sleep, a database client, a plain read of a slow disk) blocks every task of
//   its thread: orch_offload it. Queues and workflows are planned.
// - A read or write that ends with an error does not say how much was moved before it.
// - Under epoll and kqueue a descriptor that is closed with close() while somebody waits for it is
//   not reported (poll: -EBADF): the wait stays until it is cancelled. After close() of one that
//   was adopted or made here, waits of the number's next owner may hang. Out-of-band data alone
//   wakes nobody.
// - A loop makes one descriptor before its first sleep (two outside Linux), and each orch_signal
//   and orch_signals another.
// - In orch_offload signals are blocked, and children that fn starts itself inherit that. A value
//   that it returns must not point into its copied argument.
// - A signal that is blocked in every thread never arrives. Real-time signals are not queued.
// - A child process has a process group of its own, so Ctrl-C reaches the parent only: with
//   handle_signals that ends its children; a parent that just dies leaves them running. same_group
//   is for a child that reads from the terminal. Where there is no pidfd (not Linux, or before
//   5.3), a SIGCHLD handler installed after ours breaks waiting for children.
// - On a virtual clock time stands still while a child runs, so no time-out cuts it off.
// - A backtrace from inside a task ends at the task's function, from inside orch_on_main_stack in
//   the thread's main. riscv64 needs -fasynchronous-unwind-tables for it.
// - A process-wide handler for SIGSEGV and SIGBUS names the task on a stack overflow and then hands
//   on to what was installed before; orch_loop_desc.no_overflow_report leaves them alone.
// - Built with -fcf-protection for a processor whose shadow stack is on, and on processors without
//   assembly here, switching uses ucontext: right, but three system calls a switch.
// - Under qemu-user there are no cheap guards; mprotect takes their place. orch_loop_statistics
//   says which.
//
// ------------------------------------------------------------------------------------------------
// >>config
//
// Nothing has to be set. Where to define: before the include that has ASYNCORCH_IMPLEMENTATION.
//
//     NDEBUG                  not defined   a misuse prints a message and aborts; consumed futures
//                                           stay in quarantine, so that a later use is named
//                             defined       a misuse returns the documented error
//     ORCH_USE_UCONTEXT       not defined   define to 1 to switch with ucontext instead of assembly
//     ORCH_USE_SIGCHLD        not defined   define to 1 to wait for children by SIGCHLD where there
//                                           is a pidfd
//     ORCH_USE_KQUEUE         not defined   define to 1 for kqueue on Linux, over libkqueue:
//                                           for tests
//
// None changes a public struct. Run-time settings are fields of orch_loop_desc.

// The implementation needs more of the system headers than strict ISO C shows.
#if defined(ASYNCORCH_IMPLEMENTATION) && !defined(_GNU_SOURCE)
#define _GNU_SOURCE 1
#endif

#include <errno.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define ORCH_VERSION "0.1.0"

#if defined(__GNUC__) || defined(__clang__)
#define ORCH_NODISCARD __attribute__((warn_unused_result))
#define ORCH_PRINTF(text, first) __attribute__((__format__(__printf__, text, first)))
#else
#define ORCH_NODISCARD
#define ORCH_PRINTF(text, first)
#endif

#ifdef __cplusplus
extern "C" {
#endif

// ------------------------------------------------------------------------------------------------
// >>api
//
// Each function has a block that says what it does, what it Returns (with each error), its Context
// (any thread, loop thread, task only; whether it suspends) and what it Owns. Unless a block says
// otherwise, "a future" that is returned is never NULL: when it cannot be made it is a rejected one
// (ORCH_ENOMEM; where debug builds abort: ORCH_ENOLOOP outside a loop's thread, ORCH_EINVAL for
// NULL, ORCH_ECONSUMED for a future that was given away before, ORCH_ETHREAD for another thread's).
// A function that consumes futures and fails gives them up as orch_drop does: in a task it returns
// when their work has ended.

typedef struct orch_future orch_future;         // the read end of work in progress
typedef struct orch_loop orch_loop;             // one per thread
typedef struct orch_task orch_task;             // a running coroutine
typedef struct orch_completion orch_completion; // an iteration in order of completion
typedef struct orch_signals orch_signals;       // signals that are caught

// ---- errors

// The library's own codes: X(name, value, text). Others are -errno, or positive: the application's.
#define ORCH_ERRORS(X)                                                                             \
    X(ORCH_ENOMEM, -ENOMEM, "out of memory")                                                       \
    X(ORCH_EINVAL, -EINVAL, "invalid argument")                                                    \
    X(ORCH_ECANCELED, -ECANCELED, "cancelled")                                                     \
    X(ORCH_ETIMEDOUT, -ETIMEDOUT, "timed out")                                                     \
    X(ORCH_EDEADLK, -EDEADLK, "deadlock: all is blocked and nothing can wake it")                  \
    X(ORCH_EBUSY, -EBUSY, "still in use")                                                          \
    X(ORCH_ERANGE, -ERANGE, "no such element")                                                     \
    X(ORCH_ECYCLE, -10001, "the future would follow itself")                                       \
    X(ORCH_ECONSUMED, -10002, "the future was consumed before (orch_ref keeps one)")               \
    X(ORCH_ENOLOOP, -10003, "no loop on this thread (orch_run or orch_loop_new makes one)")        \
    X(ORCH_ENOTASK, -10004, "only a task can do this (start one with orch_go or orch_run)")        \
    X(ORCH_ETHREAD, -10005, "the future belongs to another thread's loop")                         \
    X(ORCH_EALLFAILED, -10006, "every input failed")                                               \
    X(ORCH_EQUORUM, -10007, "too many inputs failed for the quorum")                               \
    X(ORCH_EEND, -10008, "no more elements")                                                       \
    X(ORCH_ENESTED, -10009, "a loop is running on this thread already")                            \
    X(ORCH_ECLOSED, -10010, "closed")                                                              \
    X(ORCH_EOPEN, -10011, "the circuit breaker is open")                                           \
    X(ORCH_ELIMIT, -10012, "more than the limit allows")                                           \
    X(ORCH_ESCOPE, -10013, "the scope is not open here")                                           \
    X(ORCH_EHOST, -10014, "host or service not found")                                             \
    X(ORCH_ERESOLVE, -10015, "the name could not be resolved now")                                 \
    X(ORCH_ESIGNAL, -10016, "ended by a signal")

#define ORCHI_ERROR_ENUM(name, value, text) name = (value),
typedef enum orch_error {
    ORCH_OK = 0,
    ORCH_ERRORS(ORCHI_ERROR_ENUM) ORCH_ERROR_LAST = -10017
} orch_error;
#undef ORCHI_ERROR_ENUM

/* The text of an error code: the library's own, the system's for an -errno, "ok" for 0,
 * "application error" for a positive one.
 * Returns a string, never NULL.
 * Context: any thread.
 * Owns nothing; the string is static. */
const char *orch_error_text(int error);

/* The name of one of the library's codes ("ORCH_ETIMEDOUT").
 * Returns a string, or NULL when the code is not one of ORCH_ERRORS.
 * Context: any thread.
 * Owns nothing; the string is static. */
const char *orch_error_name(int error);

// ---- results

// How something ended. A result owns what it shows, exclusively (owner is the value) or as a share
// (owner is the future); orch_result_free is right in every case.
typedef struct orch_result {
    int error;      // 0: fulfilled; negative: -errno or ORCH_E...; positive: your own
    unsigned index; // of a combinator that one input decided: which one
    void *value;    // fulfilled: the value; rejected: optional detail (a message, a list)
    void *owner;    // what release gives back
    void (*release)(void *owner); // NULL: nothing to give back
} orch_result;

/* A fulfilled result with a value.
 * Returns the result.
 * Context: any thread.
 * Owns: the value, when release is not NULL; release(value) is called once, at the end of the last
 * share. */
static inline orch_result orch_ok(void *value, void (*release)(void *value)) {
    orch_result r = {0, 0, value, value, release};
    return r;
}

/* A fulfilled result with a number, to be read by orch_int.
 * Returns the result.
 * Context: any thread.
 * Owns nothing. */
static inline orch_result orch_ok_int(intptr_t value) { return orch_ok((void *)value, NULL); }

/* A rejected result. An error of 0 is a mistake and becomes ORCH_EINVAL.
 * Returns the result.
 * Context: any thread.
 * Owns nothing. */
static inline orch_result orch_fail(int error) {
    orch_result r = {error != 0 ? error : ORCH_EINVAL, 0, NULL, NULL, NULL};
    return r;
}

/* A rejected result with a message, formatted as by printf. Out of memory loses the message, not
 * the error.
 * Returns the result.
 * Context: any thread.
 * Owns: the result owns its message. */
orch_result orch_failf(int error, const char *format, ...) ORCH_PRINTF(2, 3);

/* What a person should read about a result: its own message, else the text of its error, "ok" for
 * none.
 * Returns a string, never NULL.
 * Context: any thread.
 * Owns nothing; the string lives as long as the result. */
const char *orch_message(const orch_result *r);

/* The number that orch_ok_int put in.
 * Returns it; 0 for a rejected result.
 * Context: any thread.
 * Owns nothing. */
static inline intptr_t orch_int(const orch_result *r) {
    return r != NULL && r->error == 0 ? (intptr_t)r->value : 0;
}

/* Element i of the list that all, all_settled, gather, quorum, or a failed any or quorum ends with.
 * Returns the element's result, never NULL: r itself when r is rejected and has no list (the outer
 * error), a result with ORCH_ERANGE when there is no such element.
 * Context: any thread.
 * Owns nothing; the element is lent and lives as long as r. */
const orch_result *orch_at(const orch_result *r, size_t i);

/* How many elements orch_at can read.
 * Returns the count; 0 when r has no list.
 * Context: any thread.
 * Owns nothing. */
size_t orch_count(const orch_result *r);

/* Moves the value out of a result that owns it exclusively.
 * Returns the value; NULL when it is shared or lent (it stays where it is). A value without a
 * release belongs to nobody and can always be taken.
 * Context: any thread.
 * Owns: hands the value over to the caller; the result no longer owns it. */
void *orch_take(orch_result *r);

/* Gives back what a result owns and clears it. Freeing twice is harmless; so is freeing a lent
 * result.
 * Returns nothing.
 * Context: the thread of the loop that made it; does not suspend.
 * Owns: consumes what r owns. */
void orch_result_free(orch_result *r);

// ---- futures
//
// Every function that takes a future consumes it, whatever happens, out of memory included.
// orch_ref gives one more reference. Giving up the last reference to pending work cancels it.

/* The write end: a ticket, passed by value. It owns nothing, and a late or second use is harmless,
 * until its loop is freed. */
typedef struct orch_promise {
    orch_future *future;
    uint64_t generation;
} orch_promise;

typedef orch_result (*orch_then_fn)(orch_result *in,
                                    void *context);         // in is lent: orch_take to keep it
typedef void (*orch_on_fn)(orch_result *in, void *context); // in is lent: orch_take to keep it
typedef bool (*orch_cancel_fn)(void *context, int reason);  // true: the work has ended

typedef struct orch_then_desc {
    orch_then_fn on_ok;             // NULL: value and state pass through
    orch_then_fn on_error;          // NULL: error and detail pass through
    void *context;                  // passed to both
    void (*release)(void *context); // called exactly once, also when nothing ever ran
} orch_then_desc;

/* A pending future and the ticket that settles it. With no memory the future is a rejected one and
 * the ticket is dead.
 * Returns the future.
 * Context: loop thread; does not suspend.
 * Owns: hands the future over; *promise owns nothing. */
ORCH_NODISCARD orch_future *orch_future_new(orch_promise *promise);

/* A future that is settled from the start.
 * Returns the future.
 * Context: loop thread; does not suspend.
 * Owns: consumes r (also when out of memory). */
ORCH_NODISCARD orch_future *orch_settled(orch_result r);

/* Settles a promise. r may be orch_chain(f), which follows f.
 * Returns whether this call decided it; if not (settled before, locked in, future gone, wrong
 * thread) r is freed, and the future of a chain dropped.
 * Context: the loop's own thread; suspends only as orch_drop does, with a chain that it drops;
 * never allocates, and calls nothing of the user's but on_unhandled for a detached future, and the
 * release of what nobody takes.
 * Owns: consumes *r. */
bool orch_settle_with(orch_promise promise, orch_result *r);

/* The same with a result by value. In line, as by address it need not be copied for the call.
 * Returns, Context: as orch_settle_with.
 * Owns: consumes r. */
static inline bool orch_settle(orch_promise promise, orch_result r) {
    return orch_settle_with(promise, &r);
}

/* Settles a promise as f will: locks in at once, so that later settles return false. A cycle made
 * only of follows rejects with ORCH_ECYCLE.
 * Returns whether this call decided it; if not, f is dropped.
 * Context: loop thread; suspends only as orch_drop does.
 * Owns: consumes f. */
bool orch_follow(orch_promise promise, orch_future *f);

/* Whether a ticket can still settle its future.
 * Returns true while the future is pending and not locked in.
 * Context: loop thread.
 * Owns nothing. */
bool orch_promise_pending(orch_promise promise);

/* Registers what to do when the future is cancelled, in place of what was registered before: fn
 * returns true when the work has ended, false when the producer will still settle. It is called
 * from the loop, at most once.
 * Returns false, and registers nothing, when the ticket can no longer settle.
 * Context: loop thread; fn is called on it and must not suspend.
 * Owns: borrows context until the future is settled. */
bool orch_promise_on_cancel(orch_promise promise, orch_cancel_fn fn, void *context);

/* Whether anybody can still see what a ticket settles with, so that a producer can keep what would
 * be lost: a queue its item, a semaphore its permit.
 * Returns false when the future is settled or was asked to end, or when a combinator around it is
 * decided without it (a lost race).
 * Context: loop thread. It follows the consumers up to the task or callback.
 * Owns nothing. */
bool orch_promise_wanted(orch_promise promise);

/* What reports call the future ("semaphore 'db'"), in place of nothing.
 * Returns false when the ticket can no longer settle.
 * Context: loop thread.
 * Owns: borrows label until the future is settled. */
bool orch_promise_describe(orch_promise promise, const char *label);

/* A ticket as one pointer, for C callbacks with a void *user. It needs no memory and cannot fail.
 * Returns the box, never NULL.
 * Context: loop thread.
 * Owns: hands over a box, which orch_promise_unbox takes back exactly once. A promise has at most
 * one box at a time (ORCH_EBUSY in debug builds). */
void *orch_promise_box(orch_promise promise);

/* The ticket out of its box.
 * Returns the ticket, dead when the future is gone, or another thread's (debug builds abort).
 * Context: loop thread.
 * Owns: consumes the box, not another thread's. */
orch_promise orch_promise_unbox(void *box);

/* One more reference.
 * Returns f.
 * Context: loop thread.
 * Owns: hands over a reference. */
ORCH_NODISCARD orch_future *orch_ref(orch_future *f);

/* Gives up a reference. The last one to pending work cancels it; inside a task the call then
 * returns as soon as that work has ended, outside one the work ends later.
 * Returns nothing.
 * Context: loop thread; in a task it may suspend.
 * Owns: consumes f. NULL does nothing. */
void orch_drop(orch_future *f);

/* Gives up a reference and lets the work run on. Its rejection, if nobody else looks at it, is
 * reported to on_unhandled.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns: consumes f. NULL does nothing. */
void orch_detach(orch_future *f);

/* Asks pending work to end, without giving up the reference. Work that others hold too is asked as
 * well: the caller decides. Settled work stays as it is.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns: borrows f. reason is for the work to read (0: ORCH_ECANCELED). */
void orch_cancel(orch_future *f, int reason);

/* Whether a future is settled.
 * Returns true or false.
 * Context: loop thread.
 * Owns: borrows f. */
bool orch_is_settled(const orch_future *f);

/* Looks at a future without waiting; for code that is not a task.
 * Returns the result, or NULL while it is pending.
 * Context: loop thread.
 * Owns: borrows f; the result is f's and lives as long as the caller's reference. */
const orch_result *orch_peek(orch_future *f);

/* A future of what a callback makes of f: on_ok for a value, on_error for an error, NULL passes on.
 * The callback may return a value, an error, orch_chain of another future, or *in. Cancelling the
 * new future cancels f, and the callback sees ORCH_ECANCELED.
 * Returns the new future.
 * Context: loop thread; callbacks run from the loop, never inside this call, and must not suspend.
 * Owns: consumes f; borrows context until the new future is settled. Source: Promises/A+ 2.2. */
ORCH_NODISCARD orch_future *orch_then(orch_future *f, orch_then_fn on_ok, orch_then_fn on_error,
                                      void *context);

/* orch_then with a context that it owns.
 * Returns the new future.
 * Context: as orch_then.
 * Owns: consumes f and desc->context, which release gets exactly once, on every path. */
ORCH_NODISCARD orch_future *orch_then_with(orch_future *f, const orch_then_desc *desc);

/* The end of a chain: fn is called once with the outcome of f, and there is no new future.
 * Returns nothing. When it cannot be registered, fn gets ORCH_ENOMEM or ORCH_ENOLOOP from this
 * call.
 * Context: loop thread; fn is called from the loop and must not suspend.
 * Owns: consumes f; borrows context until fn was called. */
void orch_on(orch_future *f, orch_on_fn fn, void *context);

/* Runs fn when f has settled either way, and passes its outcome on.
 * Returns the new future. When it cannot be made for want of memory, fn has run, and f was given
 * up.
 * Context: as orch_then.
 * Owns: consumes f; borrows context until fn was called. */
ORCH_NODISCARD orch_future *orch_finally(orch_future *f, void (*fn)(void *context), void *context);

/* What a callback or a task returns to settle as next does.
 * Returns a result that only a callback, a task or orch_settle may be given.
 * Context: loop thread.
 * Owns: consumes next; the result owns it. */
orch_result orch_chain(orch_future *next);

/* A future that is fulfilled after ms milliseconds; never early.
 * Returns the future. 0 is the next look at the clock.
 * Context: loop thread.
 * Owns: hands over the future. Units: milliseconds. */
ORCH_NODISCARD orch_future *orch_after(uint64_t ms);

// ---- combinators
//
// They consume their inputs, nest without limit and keep the inputs' order. When the outcome is
// decided, the losers are cancelled, and the outcome is delivered as soon as they have ended. A
// loser that others hold too is left alone and not waited for. An input that is no future (NULL,
// consumed) counts as one that is rejected with ORCH_EINVAL or ORCH_ECONSUMED. Cancelling a
// combinator cancels its inputs and rejects it with ORCH_ECANCELED. Each has an array form ending
// in _n and a variadic form.

/* Fulfilled with the list of all values when every input is; rejected with the first error (index:
 * whose) otherwise. No input: fulfilled with an empty list.
 * Returns the future.
 * Context: loop thread; does not suspend. futures is read during the call.
 * Owns: consumes every future, also when it fails. Source: ECMAScript Promise.all. */
ORCH_NODISCARD orch_future *orch_all_n(size_t count, orch_future *const *futures);

/* Fulfilled with the list of all outcomes when every input has settled.
 * Returns the future.
 * Context: as orch_all_n.
 * Owns: as orch_all_n. Source: ECMAScript Promise.allSettled. */
ORCH_NODISCARD orch_future *orch_all_settled_n(size_t count, orch_future *const *futures);

/* Fulfilled with the first value (index: whose); rejected with ORCH_EALLFAILED and the list of
 * errors when every input is, which an empty list is at once.
 * Returns the future.
 * Context: as orch_all_n.
 * Owns: as orch_all_n. Source: ECMAScript Promise.any. */
ORCH_NODISCARD orch_future *orch_any_n(size_t count, orch_future *const *futures);

/* Settles as the first input does (index: which one). No input: ORCH_EINVAL, as it could never
 * settle.
 * Returns the future.
 * Context: as orch_all_n.
 * Owns: as orch_all_n. Source: ECMAScript Promise.race. */
ORCH_NODISCARD orch_future *orch_race_n(size_t count, orch_future *const *futures);

/* Fulfilled with the list of outcomes as soon as `needed` inputs are fulfilled (what was cancelled
 * then shows ORCH_ECANCELED); rejected with ORCH_EQUORUM and the list when that has become
 * impossible.
 * Returns the future; needed > count: ORCH_EINVAL.
 * Context: as orch_all_n.
 * Owns: as orch_all_n. */
ORCH_NODISCARD orch_future *orch_quorum_n(size_t needed, size_t count, orch_future *const *futures);

/* all_settled with a deadline: decided after ms at the latest; what was not done by then is
 * cancelled and shows ORCH_ETIMEDOUT. As with every combinator, a loser that shields delays the
 * delivery.
 * Returns the future.
 * Context: as orch_all_n.
 * Owns: as orch_all_n. Units: milliseconds. */
ORCH_NODISCARD orch_future *orch_gather_n(size_t count, orch_future *const *futures, uint64_t ms);

/* A race of f and a timer: settles as f does, or with ORCH_ETIMEDOUT ("Timeout after 2000 ms"). A
 * result of f keeps its own index; a timeout has index 1.
 * Returns the future.
 * Context: loop thread; does not suspend.
 * Owns: consumes f. Units: milliseconds. */
ORCH_NODISCARD orch_future *orch_timeout(orch_future *f, uint64_t ms);

/* Starts an iteration over futures in the order in which they settle.
 * Returns the iteration, never NULL: with no memory its first element is ORCH_ENOMEM.
 * Context: loop thread.
 * Owns: consumes every future; hands over the iteration, which orch_completion_free ends. */
ORCH_NODISCARD orch_completion *orch_as_completed_n(size_t count, orch_future *const *futures);

/* The next outcome to come (index: whose), as a future of its own.
 * Returns the future; ORCH_EEND after the last element; ORCH_EBUSY while an earlier one is pending.
 * One that was dropped loses no element.
 * Context: loop thread.
 * Owns: borrows c; hands over the future. */
ORCH_NODISCARD orch_future *orch_completion_next(orch_completion *c);

/* Ends an iteration; what has not settled is cancelled, and in a task has ended when this returns.
 * Returns nothing.
 * Context: loop thread; in a task it may suspend.
 * Owns: consumes c. NULL does nothing. */
void orch_completion_free(orch_completion *c);

extern orch_future orch_end_mark; // the end of a variadic list: typed, and not NULL, so that a NULL
#define ORCH_END (&orch_end_mark) // among the futures is seen as the mistake that it is

/* The list forms behind the variadic macros: as the _n forms, the list ends with ORCH_END.
 * Returns the future.
 * Context: as the _n forms.
 * Owns: as the _n forms. */
ORCH_NODISCARD orch_future *orch_all_list(orch_future *const *futures);
ORCH_NODISCARD orch_future *orch_all_settled_list(orch_future *const *futures);
ORCH_NODISCARD orch_future *orch_any_list(orch_future *const *futures);
ORCH_NODISCARD orch_future *orch_race_list(orch_future *const *futures);
ORCH_NODISCARD orch_future *orch_quorum_list(size_t needed, orch_future *const *futures);
ORCH_NODISCARD orch_future *orch_gather_list(uint64_t ms, orch_future *const *futures);
ORCH_NODISCARD orch_completion *orch_as_completed_list(orch_future *const *futures);

#ifndef __cplusplus
#define ORCH_LIST(...) ((orch_future *[]){__VA_ARGS__, ORCH_END})
#define orch_all(...) orch_all_list(ORCH_LIST(__VA_ARGS__))
#define orch_all_settled(...) orch_all_settled_list(ORCH_LIST(__VA_ARGS__))
#define orch_any(...) orch_any_list(ORCH_LIST(__VA_ARGS__))
#define orch_race(...) orch_race_list(ORCH_LIST(__VA_ARGS__))
#define orch_quorum(needed, ...) orch_quorum_list((needed), ORCH_LIST(__VA_ARGS__))
#define orch_gather(ms, ...) orch_gather_list((ms), ORCH_LIST(__VA_ARGS__))
#define orch_as_completed(...) orch_as_completed_list(ORCH_LIST(__VA_ARGS__))
#endif

// ---- tasks
//
// A task is an ordinary C function on a stack of its own. It starts at once and runs until it first
// waits. Cancelling it is a request: from then on everything that would have to wait returns
// ORCH_ECANCELED until the task ends, except between orch_shield_begin and orch_shield_end.

typedef orch_result (*orch_task_fn)(void *arg);

typedef struct orch_task_desc {
    const char *name; // for reports, which number tasks as well; borrowed until it has ended
    orch_task_fn fn;  // required
    void *arg;        // passed to fn
    size_t arg_size;  // bytes; not 0: that many bytes of arg are copied, fn gets the copy
    void (*release)(void *arg); // called exactly once with what fn got (arg, if it never ran)
    size_t stack_size; // bytes, 16 KiB to 1 GiB, rounded up to a power of two; default: loop's
} orch_task_desc;

/* Starts a task.
 * Returns its future. The task may return a value, an error, or orch_chain of another future.
 * Context: loop thread; runs the task until it first waits.
 * Owns: borrows arg until the task has ended. */
ORCH_NODISCARD orch_future *orch_go(orch_task_fn fn, void *arg);

/* Starts a task with a name, a copied argument, a release or a stack size.
 * Returns its future; ORCH_EINVAL for no fn, a stack size out of range, or an arg_size above half
 * the stack.
 * Context: as orch_go.
 * Owns: consumes arg when there is a release, on every path. */
ORCH_NODISCARD orch_future *orch_go_with(const orch_task_desc *desc);

/* Starts a task and detaches it.
 * Returns 0; ORCH_ENOMEM, ORCH_EINVAL, ORCH_ENOLOOP when it did not start.
 * Context: as orch_go.
 * Owns: borrows arg until the task has ended. */
int orch_spawn(orch_task_fn fn, void *arg);

/* Waits for a future and takes its outcome.
 * Returns the result, which is the caller's to free. In a task that was cancelled before:
 * ORCH_ECANCELED, after the work of f has ended (if nobody else holds it). Cancelled while it
 * waits: f is asked to end, and what it came to is returned, mostly ORCH_ECANCELED. ORCH_ENOTASK
 * outside a task, where f is dropped.
 * Context: task only; suspends unless f is settled, and then too when it is the 128th call in a
 * row.
 * Owns: consumes f; hands over the result. */
orch_result orch_await(orch_future *f);

/* Waits for a future without taking it.
 * Returns the result, lent by f: freeing it does nothing. ORCH_ECANCELED in a cancelled task, where
 * f goes on (orch_is_settled tells it from f's own); ORCH_ENOTASK; ORCH_ENOMEM.
 * Context: task only; suspends as orch_await.
 * Owns: borrows f. */
orch_result orch_wait(orch_future *f);

/* Lets other ready work run first.
 * Returns 0; ORCH_ECANCELED in a cancelled task; ORCH_ENOTASK outside a task.
 * Context: task only; suspends.
 * Owns nothing. */
int orch_yield(void);

/* Waits for ms milliseconds; never less.
 * Returns 0; ORCH_ECANCELED; ORCH_ENOMEM; ORCH_ENOTASK outside a task.
 * Context: task only; suspends.
 * Owns nothing. Units: milliseconds. */
int orch_sleep(uint64_t ms);

/* From here to orch_shield_end a cancelled task may wait, for its clean-up. Shields nest. They hold
 * until the loop is deadlocked.
 * Returns nothing.
 * Context: task only; does not suspend.
 * Owns nothing. */
void orch_shield_begin(void);

/* Ends the innermost shield.
 * Returns nothing.
 * Context: task only; does not suspend.
 * Owns nothing. */
void orch_shield_end(void);

/* Whether the current task was asked to end (shielded or not).
 * Returns the reason, 0 when it was not or outside a task.
 * Context: loop thread.
 * Owns nothing. */
int orch_cancel_reason(void);

/* The current task.
 * Returns it, or NULL outside a task.
 * Context: loop thread.
 * Owns nothing; the task is valid until it ends. */
orch_task *orch_self(void);

/* The name of a task, as given.
 * Returns the name, or "" when it has none.
 * Context: loop thread.
 * Owns nothing. */
const char *orch_task_name(const orch_task *task);

/* The size of a task's stack.
 * Returns bytes.
 * Context: loop thread.
 * Owns nothing. Units: bytes. */
size_t orch_task_stack_size(const orch_task *task);

/* How much of its stack was ever touched, by this task or an earlier one on the same stack.
 * Returns bytes, whole pages; a system call.
 * Context: loop thread.
 * Owns nothing. Units: bytes. */
size_t orch_task_stack_peak(const orch_task *task);

/* A value that the current task has, or inherited from the task that started it: a trace id, a
 * logger, an allocator. Keys are addresses: take that of a static object.
 * Returns the value; NULL for an unknown key, and outside a task.
 * Context: loop thread.
 * Owns: borrows key; the value is the setter's. */
void *orch_local(const void *key);

/* Sets a value for the current task and all that it starts from now on.
 * Returns 0; ORCH_EINVAL for no key; ORCH_ENOMEM; ORCH_ENOTASK outside a task.
 * Context: task only; does not suspend.
 * Owns: borrows key; consumes the value when there is a release, which is called when the last task
 * that could see it has ended, or when its setter replaces it, or at once when it cannot be set. */
int orch_local_set(const void *key, void *value, void (*release)(void *value));

/* Calls fn on the thread's main stack, for calls that need a big one.
 * Returns what fn returns. Outside a task it is a plain call.
 * Context: loop thread; fn must not suspend.
 * Owns: borrows arg during the call. */
void *orch_on_main_stack(void *(*fn)(void *arg), void *arg);

// ---- scopes
//
// A scope is a nursery and a deadline in one. What is started in it ends before it closes; the
// first failure, or the deadline, cancels the rest and the body, which is what its task does
// between open and close: there everything that would have to wait returns ORCH_ECANCELED. Scopes
// nest; the nearest deadline counts. Of other tasks orch_go copies the absolute deadline that is in
// force for its caller, and is then cancelled at that time; orch_spawn inherits none.

typedef struct orch_scope_desc {
    const char *name;    // for reports; borrowed until it is closed
    uint64_t timeout_ms; // the deadline, from now; default: none
    bool keep_going;     // a failure does not cancel the others
} orch_scope_desc;

// On the stack of the task that opens it: a ticket, whose fields are the library's.
typedef struct orch_scope {
    orch_future *future;
    uint64_t generation;
} orch_scope;

#define ORCH_SCOPE_ERRORS 16 // so many errors of a scope are kept; all are counted
#define ORCH_NO_DEADLINE UINT64_MAX

/* Opens a scope, inside those that the task has open. Close it on every path.
 * Returns 0; ORCH_ENOMEM, with which the other calls fail and close says it again; ORCH_EINVAL;
 * ORCH_ENOTASK outside a task.
 * Context: task only; does not suspend.
 * Owns: hands over the scope, for orch_scope_close. desc NULL: all defaults. */
int orch_scope_open(orch_scope *scope, const orch_scope_desc *desc);

/* Starts a task in a scope. Any task that has the scope's address may do so, until it has closed.
 * Returns 0 when it was started; ORCH_ECANCELED, and fn is not called, when the scope was
 * cancelled; ORCH_ENOMEM and ORCH_EINVAL, which count as a failure of the scope; ORCH_ESCOPE.
 * Context: loop thread; runs the task until it first waits.
 * Owns: borrows arg until the task has ended. */
int orch_scope_go(orch_scope *scope, orch_task_fn fn, void *arg);

/* The same with a name, a copied argument, a release or a stack size.
 * Returns as orch_scope_go.
 * Context: as orch_scope_go.
 * Owns: consumes arg when there is a release, on every path. */
int orch_scope_go_with(orch_scope *scope, const orch_task_desc *desc);

/* Puts any work in progress into a scope: it ends before the scope does, and its failure counts.
 * With orch_ref the caller keeps a handle to await its value.
 * Returns as orch_scope_go. Work that cannot be put in is given up as by orch_drop.
 * Context: loop thread; suspends only as orch_drop does.
 * Owns: consumes f. */
int orch_scope_add(orch_scope *scope, orch_future *f);

/* Asks everything in a scope to end, its body included.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns: borrows scope. reason is what orch_cancel_reason says there (0: ORCH_ECANCELED). */
void orch_scope_cancel(orch_scope *scope, int reason);

/* Waits until everything in a scope has ended, cancelled or not, and closes it.
 * Returns success when nothing failed. Else ORCH_ETIMEDOUT when the deadline has passed before all
 * had ended; the first error otherwise; ORCH_ECANCELED when the scope was cancelled. What failed is
 * listed in the order of its end for orch_at, up to ORCH_SCOPE_ERRORS. What ended with
 * ORCH_ECANCELED because it was asked to is no failure. ORCH_ENOMEM when it could not be opened;
 * ORCH_ENOTASK; ORCH_ESCOPE for a scope that is closed, was opened by another task, or has others
 * open in it (release builds close those first).
 * Context: task only; suspends. A cancelled task waits here too.
 * Owns: consumes scope; the result is the caller's to free. */
ORCH_NODISCARD orch_result orch_scope_close(orch_scope *scope);

/* Moves a scope's deadline, sooner or later. What orch_go copied before stays as it is.
 * Returns 0; ORCH_ECANCELED when the scope was cancelled before; ORCH_ENOMEM: the old deadline
 * stays; ORCH_ESCOPE.
 * Context: loop thread.
 * Owns: borrows scope. Units: milliseconds from now; ORCH_NO_DEADLINE: none. */
int orch_scope_extend(orch_scope *scope, uint64_t ms);

/* How many have failed in a scope so far.
 * Returns the count.
 * Context: loop thread, while it is open.
 * Owns: borrows scope. */
size_t orch_scope_failures(const orch_scope *scope);

/* Failure i of a scope, in the order of their ends; the first ORCH_SCOPE_ERRORS are kept.
 * Returns the result, never NULL: one with ORCH_ERANGE when there is none.
 * Context: loop thread, while it is open.
 * Owns: borrows scope; the result is lent until it is closed. */
const orch_result *orch_scope_error(const orch_scope *scope, size_t i);

/* How long the current task may still wait: until the nearest deadline of its scopes, of the scope
 * it was started in and those around it, and of its own. Deadlines outside a shield do not count.
 * Returns milliseconds, rounded down; 0 when it has passed or the task was cancelled;
 * ORCH_NO_DEADLINE when there is none, and outside a task.
 * Context: loop thread; reads the clock.
 * Owns nothing. Units: milliseconds. */
uint64_t orch_time_left(void);

// ---- loop

typedef struct orch_allocator {
    // realloc with sizes: old NULL: allocate; size 0: free and return NULL; NULL otherwise: out of
    // memory
    void *(*resize)(void *user, void *old, size_t old_size, size_t size);
    void *user;
} orch_allocator;

typedef enum orch_poller {
    ORCH_POLLER_DEFAULT, // poll, and the system's own while that is better
    ORCH_POLLER_POLL,
    ORCH_POLLER_EPOLL, // Linux
    ORCH_POLLER_KQUEUE // the BSDs and macOS
} orch_poller;

typedef enum orch_clock {
    ORCH_CLOCK_MONOTONIC,
    ORCH_CLOCK_VIRTUAL // starts at 0, and jumps to the next timer when all is blocked: for tests
} orch_clock;

// What keeps a stack overflow from silent corruption.
typedef enum orch_guard {
    ORCH_GUARD_UNKNOWN,  // no stack was made yet
    ORCH_GUARD_CANARY,   // a word at the stack's end, checked when the task waits
    ORCH_GUARD_MPROTECT, // no-access pages, 16 KiB or more, two mappings a stack
    ORCH_GUARD_MADVISE   // the same without a mapping (Linux 6.13)
} orch_guard;

typedef struct orch_loop_desc {
    orch_allocator allocator; // default: malloc
    orch_poller poller;       // default: poll(2), and the system's own while that is better
    size_t stack_size;        // bytes of a task's stack; default: 64 KiB
    bool no_overflow_report;  // leave SIGSEGV alone: a stack overflow is not named
    orch_clock clock;         // default: CLOCK_MONOTONIC
    uint64_t seed;            // not 0: ready tasks and equal deadlines in an order drawn from it
    bool handle_signals;      // orch_run: SIGINT and SIGTERM cancel the main task, see there
    void *context;            // for the hooks below
    uint64_t (*now)(void *context); // a clock of your own: ns, never going back; default: clock
    void (*on_unhandled)(const orch_result *r, void *context); // default: one line on stderr
    void (*on_report)(const char *text,
                      void *context); // lines, newline included; default: stderr
} orch_loop_desc;

typedef struct orch_loop_stats {
    size_t futures;     // slots in use (futures, tasks, registrations)
    size_t tasks;       // tasks that have not ended
    size_t stacks;      // stacks made
    size_t timers;      // timers armed
    size_t watched;     // descriptors waited for
    uint64_t turns;     // turns run
    uint64_t polls;     // system calls that looked for descriptors or slept
    uint64_t resumes;   // tasks resumed and callbacks run
    uint64_t wakes;     // times another thread woke it from its sleep
    orch_guard guard;   // the weakest guard in force
    orch_poller poller; // the poller in force
    uint64_t moves;     // changes from one poller to another
} orch_loop_stats;

/* Makes this thread's loop.
 * Returns the loop; NULL when out of memory, when the thread has one, or when desc is invalid.
 * Context: any thread; becomes the loop thread.
 * Owns: hands over the loop, for orch_loop_free. desc NULL: all defaults. */
ORCH_NODISCARD orch_loop *orch_loop_new(const orch_loop_desc *desc);

/* Cancels everything, runs what is ready until it has ended, and frees the loop and every slot.
 * Returns 0; ORCH_EBUSY, and the loop lives on, while tasks shield, producers still have to settle,
 * boxes are out, or futures, lists or shared results are held outside. ORCH_EINVAL for NULL,
 * ORCH_ENESTED inside a task or callback.
 * Context: loop thread.
 * Owns: consumes loop when it returns 0. */
int orch_loop_free(orch_loop *loop);

/* Runs turns until nothing is left to do, or orch_loop_stop.
 * Returns 0; ORCH_EDEADLK when tasks or callbacks are left that nothing can wake (reported);
 * ORCH_ENESTED inside a task or callback; ORCH_EINVAL for NULL; ORCH_ETHREAD; an -errno of the
 * poller.
 * Context: loop thread.
 * Owns: borrows loop. */
int orch_loop_run(orch_loop *loop);

/* Runs one turn, sleeping in the poller for at most ms when nothing is ready.
 * Returns 1 when there is more to do, 0 when nothing can wake the loop any more (a deadlock too);
 * ORCH_ENESTED inside a task or callback; ORCH_EINVAL for NULL; ORCH_ETHREAD; an -errno of the
 * poller.
 * Context: loop thread.
 * Owns: borrows loop. Units: milliseconds. */
int orch_loop_step(orch_loop *loop, uint64_t ms);

/* Lets orch_loop_run return after this turn. It counts for the run that is under way, not for the
 * next.
 * Returns nothing.
 * Context: loop thread.
 * Owns: borrows loop. */
void orch_loop_stop(orch_loop *loop);

// Guest mode: another poll loop does the waiting. Each time round it asks for orch_loop_pollfds and
// orch_loop_timeout, waits, and calls orch_loop_dispatch:
//
//     int count = orch_loop_pollfds(loop, fds, capacity);
//     poll(fds, (nfds_t)count, (int)orch_loop_timeout(loop)); // with the host's own
//     orch_loop_dispatch(loop, fds, (size_t)count);
//
// There is no report of a deadlock then, since the host may settle what is waited for.

struct pollfd;

/* What the loop waits for, as poll(2) takes it. A loop that moves itself is pinned to poll by this;
 * one that is pinned to epoll or kqueue waits for one descriptor only.
 * Returns how many there are; the first `capacity` of them are in fds. ORCH_EINVAL for NULL, or
 * fds NULL with a capacity; ORCH_ENESTED inside a task or callback; an -errno of the move.
 * Context: loop thread.
 * Owns: borrows loop and fds. */
int orch_loop_pollfds(orch_loop *loop, struct pollfd *fds, size_t capacity);

/* How long the host may wait. Timers that were armed since the last dispatch count from this call.
 * Returns the time until orch_loop_dispatch is to be called: 0 at once; UINT64_MAX only when a
 * descriptor is ready. 0 for NULL or another thread's loop (debug builds abort).
 * Context: loop thread.
 * Owns: borrows loop. Units: milliseconds. */
uint64_t orch_loop_timeout(orch_loop *loop);

/* Takes what the host's poll has found (revents), fires due timers and runs one round of what is
 * ready. It does not sleep. What was closed, or waited for, after orch_loop_pollfds does not get
 * the event of a descriptor that had its number then.
 * Returns 1 when there is more to do, 0 when nothing can wake the loop any more; ORCH_ENESTED
 * inside a task or callback; ORCH_EINVAL for NULL, fds NULL with a count, or a virtual clock; an
 * -errno of the poller.
 * Context: loop thread.
 * Owns: borrows loop and fds. */
int orch_loop_dispatch(orch_loop *loop, const struct pollfd *fds, size_t count);

/* The descriptor of a loop that is pinned to epoll or kqueue, for a host that wants just one: when
 * it is readable, orch_loop_dispatch(loop, NULL, 0) is due.
 * Returns the descriptor; -ENOTSUP for another poller; ORCH_EINVAL for NULL.
 * Context: loop thread.
 * Owns: borrows loop, which keeps the descriptor. */
int orch_loop_fd(const orch_loop *loop);

/* This thread's loop.
 * Returns the loop, or NULL.
 * Context: any thread.
 * Owns nothing. */
orch_loop *orch_loop_current(void);

/* The settings in force, every default filled in.
 * Returns the desc; NULL for NULL.
 * Context: loop thread.
 * Owns nothing; lives as long as the loop. */
const orch_loop_desc *orch_loop_settings(const orch_loop *loop);

/* Counters. `futures` and `tasks` are counted now, which visits every slot.
 * Returns them; zeros for NULL.
 * Context: loop thread.
 * Owns nothing. */
orch_loop_stats orch_loop_statistics(const orch_loop *loop);

/* Reports who awaits what to on_report: one line for each task, callback and combinator that waits
 * and for each open scope, with up to 8 of its inputs or members by kind, name and number, and how
 * many more there are. A task may call it at any time, for instance on a signal or a slow request.
 * Returns nothing.
 * Context: loop thread; does not suspend. Visits every slot.
 * Owns: borrows loop. */
void orch_loop_dump(orch_loop *loop);

/* The clock of this thread's loop; the monotonic one without a loop.
 * Returns milliseconds since an arbitrary start; since the loop's, where it is virtual.
 * Context: any thread.
 * Owns nothing. Units: milliseconds. */
uint64_t orch_now(void);

/* A random number, for jitter and the like; not for secrets. A loop with a seed gives the same
 * numbers in every run.
 * Returns 64 random bits.
 * Context: loop thread; ORCH_ENOLOOP aborts in debug builds and gives 0.
 * Owns nothing. Source: SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
 * generators, 2014). */
uint64_t orch_random(void);

#define ORCH_READABLE 1 // also the end of the stream, and errors
#define ORCH_WRITABLE 2 // also errors

/* A future of a descriptor's readiness: orch_int of the result has the events that came, of those
 * asked for.
 * Returns the future; rejected: -EBADF for a bad descriptor, ORCH_EINVAL for no or unknown events,
 * ORCH_EBUSY for a second waiter in one direction, ORCH_ENOMEM.
 * Context: loop thread. Close the descriptor with orch_close, or drop the future before.
 * Owns: borrows fd until settled. */
ORCH_NODISCARD orch_future *orch_ready(int fd, int events);

/* Closes a descriptor after everything has been told that it goes: a wait for it is rejected with
 * ORCH_ECANCELED, the poller forgets it, and no late event reaches the next owner of its number.
 * Returns 0; -EBADF for a bad descriptor; another -errno of close, and it is closed all the same.
 * Context: loop thread, or any without a loop. Does not suspend.
 * Owns: consumes fd. */
int orch_close(int fd);

/* Promises that a descriptor will be closed with orch_close and by nothing else. Its waits then
 * cost no system call while the loop uses epoll or kqueue; without the promise one each, as the
 * number may have got a new owner. What the library makes itself needs none.
 * Returns 0; -EBADF for a bad descriptor; ORCH_ENOMEM; ORCH_ENOLOOP without a loop.
 * Context: loop thread. Does not suspend.
 * Owns: borrows fd until orch_close. */
int orch_adopt(int fd);

/* Makes a loop, runs one main task on it, and when that ends cancels and awaits the rest and frees
 * the loop.
 * Returns the main task's result; ORCH_EDEADLK when it can never end (reported); ORCH_ENESTED when
 * this thread has a loop already; ORCH_ENOMEM; -EMFILE and the like when the system has no poller
 * left.
 * Context: any thread without a loop; blocks until all has ended.
 * Owns: borrows arg; the result is the caller's to free. */
orch_result orch_run(orch_task_fn main, void *arg);

/* orch_run with settings. With handle_signals SIGINT or SIGTERM, unless it is ignored, cancels the
 * main task (orch_cancel_reason: 128 and the signal), and its clean-up is waited for. If it then
 * ends with any error, that becomes ORCH_ESIGNAL, index: the signal; a message of its own stays,
 * but not that of ORCH_ECANCELED. If it ends well all the same, that counts. A second signal ends
 * the process at once, even in the middle of a computation. Waiting for the two is no work: the
 * loop can still be deadlocked.
 * Returns as orch_run; ORCH_EINVAL for an invalid desc; ORCH_ESIGNAL; -EMFILE when signals cannot
 * be caught.
 * Context: as orch_run.
 * Owns: as orch_run. */
orch_result orch_run_with(const orch_loop_desc *desc, orch_task_fn main, void *arg);

/* What main() returns: prints a rejected result's message on stderr and frees it. ORCH_ESIGNAL
 * without a message of its own is not printed: who sent the signal knows.
 * Returns 0 or 1; 128 and the signal for ORCH_ESIGNAL, as a shell has it.
 * Context: any thread.
 * Owns: consumes r. */
int orch_exit(orch_result r);

// ---- threads
//
// Each thread may have a loop of its own. Thread-safe are exactly orch_post, orch_remote_settle,
// orch_remote_drop, orch_pool_limit and orch_pool_statistics, and what any thread may call anyway.
// None may be called from a signal handler. A result that comes from another thread keeps its value
// when its release may be called on any thread (free, and whatever else you say so of), and its
// message. Lists and shares of another loop's futures cannot leave their thread: what would be one
// arrives as ORCH_ETHREAD, or, where it was an error, as that error with its message.

typedef struct orch_remote orch_remote; // a promise's write end for other threads

/* Has a loop call fn: from the loop, as a callback, in the order of the posts of each thread. If
 * the loop sleeps it is woken, once for any number of posts under way.
 * Returns 0, and fn will be called, at the latest when the loop is freed; ORCH_ECLOSED when the
 * loop is gone or about to be; ORCH_ENOMEM; ORCH_EINVAL for NULL (debug builds abort). A loop that
 * was freed is known by its address, until a new one has the same.
 * Context: any thread; fn is called on the loop's and must not suspend.
 * Owns: borrows arg until fn was called. */
int orch_post(orch_loop *loop, void (*fn)(void *arg), void *arg);

/* A promise's write end for another thread. While one is out whose future is pending, the loop is
 * not deadlocked, and a virtual clock stands still when nothing is ready.
 * Returns it; NULL when out of memory (and where debug builds abort: no loop, another thread's).
 * Context: loop thread.
 * Owns: hands over the remote, for orch_remote_settle or orch_remote_drop; the promise stays good.
 */
ORCH_NODISCARD orch_remote *orch_promise_remote(orch_promise promise);

/* Settles the promise from any thread. It needs no memory and cannot fail; whether it decides the
 * future is found out on the loop's thread, where r is freed if not.
 * Returns true; false when the loop is gone: then r was freed here, by this thread. False for NULL,
 * which aborts in debug builds.
 * Context: any thread; does not block.
 * Owns: consumes remote and r. r must not be an orch_chain. */
bool orch_remote_settle(orch_remote *remote, orch_result r);

/* Gives a remote up without settling: its promise stays as it is. If nobody else settles that, a
 * loop that waits for it is deadlocked, and says so.
 * Returns nothing.
 * Context: any thread; does not block.
 * Owns: consumes remote. NULL does nothing. */
void orch_remote_drop(orch_remote *remote);

// Queues of the pool, each with threads of its own, so that one cannot starve another.
typedef enum orch_lane {
    ORCH_LANE_DEFAULT, // as many threads as processors, at least 4
    ORCH_LANE_FILE,    // orch_file_...: 4 threads
    ORCH_LANE_RESOLVE, // orch_resolve: 4 threads
    ORCH_LANE_OWN,     // from here to ORCH_LANES - 1: yours, 1 thread each: for a library that
                       // wants to be called by one thread at a time
    ORCH_LANES = 8
} orch_lane;

typedef struct orch_offload_desc {
    const char *name;           // for reports; borrowed until its future has settled
    orch_task_fn fn;            // required; runs on a thread of the pool, where no loop is
    void *arg;                  // passed to fn
    size_t arg_size;            // bytes; not 0: that many bytes of arg are copied, fn gets the copy
    void (*release)(void *arg); // called exactly once with what fn got (arg, if it never ran), on
                                // the thread that ran it, or the loop's
    orch_lane lane;             // default: ORCH_LANE_DEFAULT
} orch_offload_desc;

/* Runs fn, which may block or compute, on a thread of the process's pool: first come first served.
 * Cancelled before it has begun, it never runs. Work that has begun cannot be stopped: its future
 * ends at once, fn runs on, and what it returns is freed when it comes. So arg must live as long as
 * fn runs; orch_offload_with can own it. In fn no loop is there: it may return orch_ok, orch_fail
 * and the like, or run an orch_run of its own. Signals are blocked there.
 * Returns the future of what fn returns; ORCH_ENOMEM; the -errno of pthread_create when there is no
 * thread at all (with some it waits for one of them).
 * Context: loop thread; does not suspend.
 * Owns: borrows arg until fn has returned. */
ORCH_NODISCARD orch_future *orch_offload(orch_task_fn fn, void *arg);

/* The same with a name, a copied argument, a release or a lane.
 * Returns as orch_offload; ORCH_EINVAL for no fn or an unknown lane.
 * Context: as orch_offload.
 * Owns: consumes arg when there is a release, on every path. */
ORCH_NODISCARD orch_future *orch_offload_with(const orch_offload_desc *desc);

typedef struct orch_pool_stats {
    unsigned limit;   // of threads
    unsigned threads; // there are
    unsigned idle;    // of them; idle for 5 s, or when the last loop goes, a thread ends
    size_t queued;    // work that waits for a thread
    uint64_t begun;   // work that a thread has begun, ever
} orch_pool_stats;

/* How many threads a lane may have at a time. There are as many as have work; fewer than there are
 * now: the others end as they become idle.
 * Returns 0; ORCH_EINVAL for an unknown lane or no threads.
 * Context: any thread.
 * Owns nothing. */
int orch_pool_limit(orch_lane lane, unsigned threads);

/* A lane of the pool, as it is now.
 * Returns counters; zeros for an unknown lane.
 * Context: any thread.
 * Owns nothing. */
orch_pool_stats orch_pool_statistics(orch_lane lane);

/* Starts a task on another thread's loop, or later on this one; its future is here. Cancelling the
 * future cancels the task there. Dropped inside a task, the call returns when the task there has
 * ended, so arg may lie on the caller's stack; a loop whose thread does not run it makes that wait.
 * Returns the future; ORCH_ECLOSED when the loop is gone, or goes before the task has ended;
 * ORCH_ENOMEM; ORCH_EINVAL.
 * Context: loop thread; fn is called on the other loop's.
 * Owns: borrows arg until the future has settled. */
ORCH_NODISCARD orch_future *orch_go_on(orch_loop *loop, orch_task_fn fn, void *arg);

// A socket's address, of any family: a struct sockaddr for the system's calls.
typedef struct orch_address {
    unsigned size;        // bytes in use; 0: none
    uint64_t storage[16]; // as large and as aligned as a struct sockaddr_storage
} orch_address;

typedef struct orch_addresses {
    size_t count; // at least 1
    orch_address *items;
} orch_addresses;

/* The addresses of a host and a service (a name or a number; NULL: port 0), by getaddrinfo in a
 * lane of its own, in the order in which the system says to try them. A numeric host with a numeric
 * service needs no thread. host NULL: this machine.
 * Returns the future: its value is an orch_addresses, owned by the result. ORCH_EHOST: there is no
 * such host or service; ORCH_ERESOLVE: no name server could say; both with the system's message.
 * ORCH_ENOMEM; ORCH_EINVAL for neither host nor service; otherwise as orch_offload.
 * Context: loop thread. Cancelled, it ends at once.
 * Owns: copies the names; hands over the future. */
ORCH_NODISCARD orch_future *orch_resolve(const char *host, const char *service);

// ---- input and output
//
// For tasks, in direct style. Each call tries first and waits only when it would block; a wait
// obeys the innermost scope's deadline and cancellation. Two of one direction on one descriptor do
// not mix: while one waits in the middle, the second ends with ORCH_EBUSY. They return what they
// moved, or a negative error: -errno of the system's call, and
//     -EBADF           the descriptor is negative or not open
//     ORCH_ECANCELED   the task or its scope was cancelled or is late, or orch_close came meanwhile
//     ORCH_EBUSY       another task is in the same direction of the descriptor
//     ORCH_EINVAL      NULL for what is not empty, a size above PTRDIFF_MAX; aborts in debug builds
//     ORCH_ENOTASK     outside a task; aborts in debug builds (so does ORCH_ENOLOOP)
//     ORCH_ENOMEM
// After an error part of the data may have been moved. No call raises SIGPIPE. Sockets need not be
// non-blocking. Another blocking descriptor (a terminal, an inherited pipe) works too, with a wait
// before each piece of at most PIPE_BUF bytes. Close with orch_close what was used with these:
// hints about a descriptor are kept under its number. Calls that have waited are made in a row,
// before their tasks' turns: what has come by then is theirs, even if a close or a cancellation
// comes in between.

struct iovec; // of <sys/uio.h>

enum { ORCH_ADDRESS_TEXT = 160 }; // bytes that hold any address as text

/* Reads what is there, waiting until there is something.
 * Returns the number of bytes, 0 at the end (and at once for a size of 0); the errors above.
 * Context: task only; suspends.
 * Owns: borrows buffer. Units: bytes. */
ptrdiff_t orch_read(int fd, void *buffer, size_t size);

/* Reads until the buffer is full.
 * Returns size, less only at the end; the errors above.
 * Context: task only; suspends.
 * Owns: borrows buffer. Units: bytes. */
ptrdiff_t orch_read_full(int fd, void *buffer, size_t size);

/* Writes all of it, in order.
 * Returns size; the errors above, -EPIPE when nobody can read it any more.
 * Context: task only; suspends.
 * Owns: borrows data. Units: bytes. */
ptrdiff_t orch_write(int fd, const void *data, size_t size);

/* orch_read into, and orch_write from, several pieces of memory: what is there, and all of it.
 * Returns as those; ORCH_EINVAL too for a negative count, and from the system for too many parts to
 * read into (IOV_MAX).
 * Context: task only; suspends.
 * Owns: borrows parts and what they show. Units: bytes. */
ptrdiff_t orch_readv(int fd, const struct iovec *parts, int count);
ptrdiff_t orch_writev(int fd, const struct iovec *parts, int count);

/* Makes a descriptor non-blocking. For other processes that share it too.
 * Returns 0 or -errno.
 * Context: any thread.
 * Owns: borrows fd. */
int orch_nonblock(int fd);

/* A pipe, fds[0] to read and fds[1] to write, and two connected stream sockets: non-blocking and
 * close-on-exec.
 * Returns 0; ORCH_EINVAL for NULL; -errno, and fds is left alone.
 * Context: any thread.
 * Owns: hands the descriptors over, for orch_close. */
int orch_pipe(int fds[2]);
int orch_socketpair(int fds[2]);

// ---- lines

typedef struct orch_reader orch_reader; // a buffer over a descriptor that gives lines

/* A reader of lines of at most `limit` bytes, their end not counted; 0: 65536. It reads ahead:
 * what it took stays in it, so read on with orch_reader_read.
 * Returns the reader, never NULL; out of memory one whose calls say so.
 * Context: loop thread.
 * Owns: hands it over, for orch_reader_free; borrows fd until then. Units: bytes. */
ORCH_NODISCARD orch_reader *orch_reader_new(int fd, size_t limit);

/* The next line, without its end: "\n" or "\r\n". What follows the last one counts as a line unless
 * it is empty. Lines may hold zeros.
 * Returns its length, and *line is the line and a zero, until the next call; ORCH_EEND at the end;
 * -EMSGSIZE for a longer one than the limit, whose first bytes *line shows: the call after that
 * skips its rest and gives the line that follows. Errors as orch_read; none loses a byte.
 * Context: task only; suspends.
 * Owns: borrows r; the line is lent. Units: bytes. */
ptrdiff_t orch_reader_line(orch_reader *r, const char **line);

/* Reads on after the lines: first what was read ahead, else as orch_read.
 * Returns as orch_read.
 * Context: task only; suspends only when nothing was read ahead.
 * Owns: borrows r and buffer. Units: bytes. */
ptrdiff_t orch_reader_read(orch_reader *r, void *buffer, size_t size);

/* Frees the reader, not its descriptor. A call that another task is in ends first.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns: consumes r; NULL is nothing. */
void orch_reader_free(orch_reader *r);

// ---- sockets
//
// The same for sockets with flags of <sys/socket.h>. Those that the library makes are non-blocking
// and close-on-exec, and TCP sends at once (TCP_NODELAY) unless the desc says `nagle`.

/* The address of numbers that a text shows: "192.0.2.1", "::1", "fe80::1%eth0", with a port of
 * their own "192.0.2.1:80" and "[::1]:80", or the path of a Unix socket ("/run/x"; "@x": a name in
 * Linux' abstract space). NULL, "" and "*": every address of this machine.
 * Returns 0; ORCH_EINVAL for anything else, names included (orch_resolve); -ENAMETOOLONG for a
 * path, -ENODEV for an unknown zone.
 * Context: any thread.
 * Owns: fills *address. */
int orch_address_parse(orch_address *address, const char *text, uint16_t port);

/* The text that orch_address_parse understands. An unnamed Unix socket is "".
 * Returns buffer, cut to size.
 * Context: any thread.
 * Owns: borrows buffer, of ORCH_ADDRESS_TEXT bytes to hold any. */
const char *orch_address_text(const orch_address *address, char *buffer, size_t size);

/* The port of an address.
 * Returns it; 0 when it has none.
 * Context: any thread.
 * Owns nothing. */
uint16_t orch_address_port(const orch_address *address);

/* A socket's own address, and that of its other end.
 * Returns 0 or -errno.
 * Context: any thread.
 * Owns: borrows fd; fills *address. */
int orch_socket_address(int fd, orch_address *address);
int orch_socket_peer(int fd, orch_address *address);

/* Receives what is there (flags: MSG_PEEK, MSG_OOB, ...).
 * Returns the number of bytes, 0 at the end; the errors above, -ENOTSOCK.
 * Context: task only; suspends.
 * Owns: borrows buffer. Units: bytes. */
ptrdiff_t orch_socket_recv(int fd, void *buffer, size_t size, int flags);

/* Sends all of it (a stream), or one message.
 * Returns size; the errors above, -EPIPE, -ENOTSOCK, -EMSGSIZE for too large a message.
 * Context: task only; suspends.
 * Owns: borrows data. Units: bytes. */
ptrdiff_t orch_socket_send(int fd, const void *data, size_t size, int flags);

/* Receives one datagram, and where it came from unless `from` is NULL.
 * Returns its size, which may be 0; -EMSGSIZE for one that is longer than `size`: the buffer has
 * its first bytes, the rest is gone; the errors above, -ENOTSOCK, what ICMP said (-ECONNREFUSED).
 * Context: task only; suspends.
 * Owns: borrows buffer; fills *from. Units: bytes. */
ptrdiff_t orch_socket_recvfrom(int fd, void *buffer, size_t size, orch_address *from);

/* Sends one datagram.
 * Returns size; the errors above, -ENOTSOCK, -EMSGSIZE; ORCH_EINVAL too for NULL as address.
 * Context: task only; suspends.
 * Owns: borrows data and to. Units: bytes. */
ptrdiff_t orch_socket_sendto(int fd, const void *data, size_t size, const orch_address *to);

typedef struct orch_listen_desc {
    const char *host; // numbers or "localhost" (127.0.0.1); default: all, IPv6 and IPv4
    uint16_t port;    // default: a free one, see orch_socket_address
    const char *path; // of a Unix socket instead; "@name": in Linux' abstract space
    int backlog;      // connections that wait for accept; default: SOMAXCONN
    bool reuse_port;  // several sockets for one port, between which the system spreads clients
    bool nagle;       // small writes of connections may wait for more
} orch_listen_desc;

/* Makes a listening socket. A Unix socket's file that nobody listens at any more is replaced; one
 * in use, or another file of that name, is left alone.
 * Returns a descriptor; ORCH_EINVAL for a host that is no number, -EADDRINUSE, -ENAMETOOLONG or
 * another -errno; ORCH_EINVAL for NULL, which aborts in debug builds.
 * Context: any thread; does not suspend.
 * Owns: hands the descriptor over, for orch_serve or orch_close. */
ORCH_NODISCARD int orch_listen(const orch_listen_desc *desc);

/* Waits for a connection. Those that failed before they came this far are passed over.
 * Returns its descriptor, and its address in *from unless that is NULL; the errors above, -EMFILE
 * and the like: the connection still waits for a later call.
 * Context: task only; suspends.
 * Owns: hands the descriptor over, for orch_close. */
ORCH_NODISCARD int orch_accept(int listener, orch_address *from);

typedef struct orch_serve_desc {
    void *context;          // for the handler and on_error
    size_t max_connections; // at a time; more wait in the backlog; default: 16384
    uint64_t drain_ms;      // ms for connections to end by themselves; default: 5000
    bool no_drain;          // cancel connections at once when serving ends
    size_t stack_size;      // bytes, of a connection's task; default: the loop's
    const char *name;       // of these tasks, for reports; default: "connection"
    // What a handler failed with, and why no connection can be accepted for now (once for each
    // such time); default: the loop's on_unhandled
    void (*on_error)(const orch_result *r, void *context);
} orch_serve_desc;

/* Accepts connections and runs the handler for each in a task of its own, which has the caller's
 * locals but not its scope or deadline. Where descriptors or memory run out it waits until one of
 * its connections ends, or 100 ms. When the caller is cancelled it stops listening, gives the
 * connections drain_ms, cancels them, and returns when they have ended. A failed handler ends its
 * own connection only.
 * Returns ORCH_ECANCELED; ORCH_EINVAL for no handler, ORCH_ENOTASK (both abort in debug builds),
 * ORCH_ENOMEM, or the -errno that the listener fails with.
 * Context: task only; suspends until cancelled. desc NULL: all defaults.
 * Owns: consumes listener whatever happens; the handler's fd is lent, and closed after it. */
int orch_serve(int listener, orch_result (*handler)(int fd, void *context),
               const orch_serve_desc *desc);

typedef struct orch_connect_desc {
    const char *host;              // name or numbers; default: this machine
    const char *service;           // name or number of the port
    const char *path;              // of a Unix socket instead; "@name": in Linux' abstract space
    const orch_address *addresses; // or these, tried in RFC 8305's order
    size_t count;                  // of addresses
    uint64_t delay_ms;   // before the next address is tried at the same time; default: 250
    bool nagle;          // small writes may wait for more
    char *message;       // gets what became of each address when none could be reached
    size_t message_size; // bytes
    // Makes a socket and begins to connect it, for those that want to bind or mark it: returns a
    // non-blocking descriptor, connected or about to be, or -errno; default: socket() and connect()
    int (*begin)(const orch_address *to, void *context);
    void *context; // for begin
} orch_connect_desc;

/* Connects to a service of a host by name: resolves it, and tries its addresses, IPv6 and IPv4 in
 * turn. The next one starts when one fails or delay_ms have passed; the first that answers wins,
 * the others are closed. Where a Unix socket's backlog is full it waits.
 * Returns the descriptor; the errors above, those of orch_resolve, or the error of the first
 * address that failed.
 * Context: task only; suspends.
 * Owns: hands the descriptor over, for orch_close. Units: milliseconds. Source: RFC 8305 (Happy
 * Eyeballs version 2), with the resolver's order of addresses. */
ORCH_NODISCARD int orch_connect(const char *host, const char *service);
ORCH_NODISCARD int orch_connect_with(const orch_connect_desc *desc);

typedef struct orch_udp_desc {
    const char *host;         // numbers or "localhost"; default: all, IPv6 and IPv4
    uint16_t port;            // default: a free one
    const orch_address *peer; // not NULL: only from and to it, with orch_socket_recv and send
    bool reuse_port;          // several sockets for one port
} orch_udp_desc;

/* A UDP socket. desc NULL: all defaults.
 * Returns a descriptor; ORCH_EINVAL for a host that is no number, or -errno.
 * Context: any thread; does not suspend.
 * Owns: hands the descriptor over, for orch_close. */
ORCH_NODISCARD int orch_udp(const orch_udp_desc *desc);

// ---- files
//
// A file is always ready, and its disk is slow all the same: these calls run in ORCH_LANE_FILE, in
// the order in which they were made only as far as each is waited for. Cancelled, they return at
// once; what a thread has begun goes on without the caller, on memory of its own. So a cancelled
// write or save may or may not happen, and a cancelled read never touches the buffer. A descriptor
// is duplicated for the call, so that it may be closed after a cancelled one (closing the duplicate
// gives up fcntl's record locks, as closing always does). Where a block
// says nothing else, they return 0 or the -errno of the system's call, ORCH_ECANCELED, ORCH_ENOMEM,
// and, where debug builds abort, ORCH_EINVAL for NULL, ORCH_ENOTASK outside a task and ORCH_ENOLOOP
// without a loop.

typedef struct orch_buffer {
    char *data; // a NUL stands behind the last byte
    size_t size;
} orch_buffer;

typedef struct orch_file_info {
    uint64_t size;       // bytes
    int64_t modified_ns; // since 1970
    unsigned mode;       // permissions: the low 12 bits of st_mode
    bool is_file, is_directory;
} orch_file_info;

/* Opens a file, with O_CLOEXEC besides the flags. mode is for O_CREAT.
 * Returns the descriptor, or as above.
 * Context: task only; suspends.
 * Owns: hands over the descriptor, for orch_close. One that a cancelled call opened is closed. */
int orch_file_open(const char *path, int flags, int mode);

/* Reads, or writes, all of `size` bytes at an offset; the descriptor's own position stays. A read
 * returns less only at the end of the file. What is copied goes in pieces of 1 MiB, between which a
 * cancelled task stops.
 * Returns the bytes read, or written; or as above, when some may have been.
 * Context: task only; suspends.
 * Owns: borrows the descriptor and the memory during the call. Units: bytes. */
ptrdiff_t orch_file_read(int fd, void *buffer, size_t size, uint64_t offset);
ptrdiff_t orch_file_write(int fd, const void *data, size_t size, uint64_t offset);

/* Waits until what was written is on the disk; cuts a file, or extends it with zeros.
 * Returns as above.
 * Context: task only; suspends.
 * Owns: borrows the descriptor. Units: bytes. */
int orch_file_sync(int fd);
int orch_file_truncate(int fd, uint64_t size);

/* What there is to know about a path, links followed.
 * Returns as above; *info is written with 0 only.
 * Context: task only; suspends.
 * Owns: borrows path and info during the call. */
int orch_file_stat(const char *path, orch_file_info *info);

/* Renames a file, in place of one that has the new name; removes a file or an empty directory.
 * Returns as above.
 * Context: task only; suspends.
 * Owns: borrows the paths during the call. */
int orch_file_rename(const char *from, const char *to);
int orch_file_remove(const char *path);

/* Reads a whole file, of any kind that can be read to an end.
 * Returns the result: its value is an orch_buffer, owned by the result, which orch_take and free
 * work for as well. Else an error as above, with the path in its message.
 * Context: task only; suspends.
 * Owns: borrows path during the call; hands over the result. */
orch_result orch_file_load(const char *path);

/* Writes a whole file: into a new one beside it, which takes its place (and its permissions) when
 * it is on the disk. So others see the old one or the new one, whole, also after a crash. Right
 * after a power cut it may be the old one: the directory itself is not forced to the disk.
 * Returns as above.
 * Context: task only; suspends.
 * Owns: copies the data. Units: bytes. */
int orch_file_save(const char *path, const void *data, size_t size);

// ---- coordination
//
// What tasks share: a semaphore, an event, a channel, a topic. Waiters are served strictly in the
// order in which they came, tasks and futures alike. The int form waits in a task; the form that
// returns a future is for race, timeout, all and callbacks. Such a future takes nothing when it is
// made: it is served from the loop, and only while somebody can see what it would get. So a race of
// two receives takes one item, and what loses takes nothing. An object belongs to the loop that it
// was made on, and is freed before it. None of these constructors returns NULL: what could not be
// made says why (ORCH_ENOMEM; where debug builds abort: ORCH_ENOLOOP) in every operation. Where a
// block says nothing else, NULL for an object aborts or gives ORCH_EINVAL, and another thread's
// ORCH_ETHREAD. After a free, an operation that somebody is still in says ORCH_ECLOSED.

typedef struct orch_semaphore orch_semaphore;       // so many at a time
typedef struct orch_event orch_event;               // has happened, or not yet
typedef struct orch_channel orch_channel;           // items from senders to receivers
typedef struct orch_topic orch_topic;               // events for everybody who subscribed
typedef struct orch_subscription orch_subscription; // one who did

/* A semaphore with so many permits. None is a pause, until orch_semaphore_resize.
 * Returns the semaphore.
 * Context: loop thread.
 * Owns: hands it over, for orch_semaphore_free. */
ORCH_NODISCARD orch_semaphore *orch_semaphore_new(size_t permits);

/* Takes a permit, or `count` at once, and waits for its turn: a small request does not overtake a
 * large one.
 * Returns 0; ORCH_ECANCELED, and nothing was taken; ORCH_ELIMIT for more permits than there are,
 * unless there are none; ORCH_ECLOSED; ORCH_ENOMEM; ORCH_EINVAL for a count of 0; ORCH_ENOTASK.
 * Context: task only; suspends unless a permit is free, and then too when it is the 128th call.
 * Owns: the caller holds the permits until orch_release. */
int orch_acquire(orch_semaphore *s);
int orch_acquire_n(orch_semaphore *s, size_t count);

/* Takes permits if that needs no waiting and overtakes nobody.
 * Returns whether it did.
 * Context: loop thread; does not suspend.
 * Owns: as orch_acquire. */
bool orch_try_acquire(orch_semaphore *s);
bool orch_try_acquire_n(orch_semaphore *s, size_t count);

/* Gives back what orch_acquire or orch_try_acquire took, from any task or callback.
 * Returns 0; ORCH_EINVAL (debug builds abort) for more than was taken, or none.
 * Context: loop thread; does not suspend. Also after orch_semaphore_free, by who still holds one.
 * Owns: takes the permits back. */
int orch_release(orch_semaphore *s);
int orch_release_n(orch_semaphore *s, size_t count);

/* A future of permits. Its result holds them until it is freed: orch_result_free gives them back,
 * so that no outcome of all, race or timeout can lose one. There is no orch_release for it.
 * Returns the future; rejected as orch_acquire fails.
 * Context: loop thread. The result ends before the loop does.
 * Owns: hands over the future. */
ORCH_NODISCARD orch_future *orch_semaphore_acquire(orch_semaphore *s);
ORCH_NODISCARD orch_future *orch_semaphore_acquire_n(orch_semaphore *s, size_t count);

/* Changes how many permits there are. With fewer, what is taken stays taken, and nobody gets one
 * until enough came back; who waits for more than there are now gets ORCH_ELIMIT, unless there are
 * none.
 * Returns 0; ORCH_ENOMEM and the like as the semaphore itself.
 * Context: loop thread; does not suspend.
 * Owns nothing. */
int orch_semaphore_resize(orch_semaphore *s, size_t permits);

/* How many permits there are in all, how many are free, and how many wait for some (which is
 * counted now).
 * Returns the number; 0 for a broken one.
 * Context: loop thread.
 * Owns nothing. */
size_t orch_semaphore_permits(const orch_semaphore *s);
size_t orch_semaphore_available(const orch_semaphore *s);
size_t orch_semaphore_waiting(const orch_semaphore *s);

/* Ends a semaphore. Who waits gets ORCH_ECLOSED; the memory goes when every permit has come back.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns: consumes s. NULL does nothing. */
void orch_semaphore_free(orch_semaphore *s);

/* An event that has not happened.
 * Returns the event.
 * Context: loop thread.
 * Owns: hands it over, for orch_event_free. */
ORCH_NODISCARD orch_event *orch_event_new(void);

/* Says that it has happened: everybody who waits goes on, and nobody waits any more. Or that it has
 * not (again): who waits from now on waits for the next time.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns nothing. */
void orch_event_set(orch_event *e);
void orch_event_clear(orch_event *e);

/* Whether it has happened.
 * Returns true or false.
 * Context: loop thread.
 * Owns nothing. */
bool orch_event_is_set(const orch_event *e);

/* A future that is fulfilled when the event has happened; at once if it has.
 * Returns the future; ORCH_ECLOSED when the event is freed first.
 * Context: loop thread.
 * Owns: hands over the future. */
ORCH_NODISCARD orch_future *orch_event_wait(orch_event *e);

/* Ends an event. Who waits gets ORCH_ECLOSED.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns: consumes e. NULL does nothing. */
void orch_event_free(orch_event *e);

/* A channel in which so many items may wait. 0: none, so that a send ends when somebody has
 * received. SIZE_MAX: as many as memory holds. Room is made as it is needed.
 * Returns the channel.
 * Context: loop thread.
 * Owns: hands it over, for orch_channel_free. */
ORCH_NODISCARD orch_channel *orch_channel_new(size_t capacity);

/* Sends an item and waits while the channel is full. An item is any result: a value with its
 * release, a list, an error. Not one that is lent, and no orch_chain.
 * Returns 0; ORCH_ECANCELED; ORCH_ECLOSED; ORCH_ENOMEM; ORCH_ENOTASK. Not 0: the item was freed.
 * Context: task only; suspends while the channel is full, and else at the 128th call.
 * Owns: consumes item, on every path. */
int orch_send(orch_channel *c, orch_result item);

/* Receives the oldest item and waits while there is none.
 * Returns the item, which is the caller's to free. ORCH_ECLOSED when the channel is closed and
 * nothing is left; ORCH_ECANCELED, and no item was taken; ORCH_ENOMEM; ORCH_ENOTASK.
 * Context: task only; suspends while there is no item, and else at the 128th call.
 * Owns: hands over the item. */
orch_result orch_recv(orch_channel *c);

/* Sends, or receives, if that needs no waiting and overtakes nobody.
 * Returns 0; -EAGAIN when the channel is full, or empty; ORCH_ECLOSED; ORCH_ENOMEM.
 * Context: loop thread; does not suspend.
 * Owns: returns 0: *item was moved (send clears it). Else it is as it was. */
int orch_try_send(orch_channel *c, orch_result *item);
int orch_try_recv(orch_channel *c, orch_result *item);

/* A future of a send. Cancelled, or lost in a race, it has sent nothing and frees the item.
 * Returns the future; rejected as orch_send fails.
 * Context: loop thread.
 * Owns: consumes item, on every path; hands over the future. */
ORCH_NODISCARD orch_future *orch_channel_send(orch_channel *c, orch_result item);

/* A future of the next item: it settles as the item is. Cancelled, or lost in a race, it has taken
 * none: orch_race of several receives (index: whose) is a select. A callback that takes part in the
 * decision (orch_then) belongs around the race: inside, it has received before the race is decided.
 * Returns the future; rejected as orch_recv fails.
 * Context: loop thread.
 * Owns: hands over the future. */
ORCH_NODISCARD orch_future *orch_channel_receive(orch_channel *c);

/* No more sends: who waits to send gets ORCH_ECLOSED. What is in the channel can still be received,
 * then ORCH_ECLOSED. Closing twice is harmless.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns nothing. */
void orch_channel_close(orch_channel *c);

/* How many items wait in the channel, without those of senders that wait.
 * Returns the number; 0 for a broken one.
 * Context: loop thread.
 * Owns nothing. */
size_t orch_channel_count(const orch_channel *c);

/* Whether orch_channel_close was called.
 * Returns true or false; true for a broken one.
 * Context: loop thread.
 * Owns nothing. */
bool orch_channel_is_closed(const orch_channel *c);

/* Closes a channel and frees it and what is in it. Who waits gets ORCH_ECLOSED.
 * Returns nothing.
 * Context: loop thread; calls the release of every item.
 * Owns: consumes c. NULL does nothing. */
void orch_channel_free(orch_channel *c);

/* A topic: what is published reaches everybody who has subscribed, each in a queue of its own.
 * Returns the topic.
 * Context: loop thread.
 * Owns: hands it over, for orch_topic_free. */
ORCH_NODISCARD orch_topic *orch_topic_new(void);

/* Publishes an event. It never waits, and nothing of a subscriber's runs in this call.
 * Returns 0, also when nobody has subscribed or nobody had room; ORCH_ENOMEM: it reached nobody.
 * Context: loop thread; does not suspend.
 * Owns: consumes event; every subscriber gets a share, the last one frees it. */
int orch_publish(orch_topic *t, orch_result event);

// What happens to a subscription that has no room for an event. The others do not notice.
typedef enum orch_overflow {
    ORCH_OVERFLOW_DROP_OLDEST, // of those that wait
    ORCH_OVERFLOW_DROP_NEWEST, // the event that came
    ORCH_OVERFLOW_CLOSE        // it too, and every later one: what waits is the last
} orch_overflow;

typedef orch_result (*orch_subscriber_fn)(const orch_result *event, void *context);

typedef struct orch_subscribe_desc {
    const char *name;       // of on_event's task, for reports; borrowed until the end
    size_t capacity;        // events that may wait; default: 64; SIZE_MAX: any number
    orch_overflow overflow; // default: the oldest event is dropped
    // Called with each event, in order, one at a time, in a task of its own, which may wait. NULL:
    // whoever subscribed uses orch_subscription_next.
    orch_subscriber_fn on_event;
    // Told what on_event failed with, and ORCH_ECLOSED after an overflow that closes; default: the
    // loop's on_unhandled.
    void (*on_error)(const orch_result *error, void *context);
    void *context;                  // passed to both
    void (*release)(void *context); // called exactly once, when nothing uses context any more
} orch_subscribe_desc;

typedef struct orch_subscription_stats {
    size_t waiting;     // events
    uint64_t delivered; // handed to on_event, or to who asked for the next
    uint64_t dropped;   // for want of room
    uint64_t failed;    // that on_event failed with
} orch_subscription_stats;

/* Subscribes: every event that is published from now on is queued. desc NULL: all defaults.
 * Returns the subscription; broken as the topic is, or with ORCH_ENOMEM, or (where debug builds
 * abort) ORCH_EINVAL for an unknown overflow.
 * Context: loop thread; on_event and on_error are called from the loop.
 * Owns: consumes desc->context, on every path; hands over the subscription, for
 * orch_unsubscribe. */
ORCH_NODISCARD orch_subscription *orch_subscribe(orch_topic *t, const orch_subscribe_desc *desc);

/* A future of the next event. Cancelled, or lost in a race, it has taken none.
 * Returns the future: a share of the event. ORCH_ECLOSED when the topic was freed, or an overflow
 * closed the subscription, and nothing is left. ORCH_EINVAL (debug builds abort) with an on_event.
 * Context: loop thread.
 * Owns: hands over the future. */
ORCH_NODISCARD orch_future *orch_subscription_next(orch_subscription *s);

/* Counters, of a subscription that was not ended.
 * Returns them; zeros for NULL or a broken one.
 * Context: loop thread.
 * Owns nothing. */
orch_subscription_stats orch_subscription_statistics(const orch_subscription *s);

/* The settings in force, every default filled in.
 * Returns the desc; NULL for NULL or a broken one.
 * Context: loop thread.
 * Owns nothing; lives as long as the subscription. */
const orch_subscribe_desc *orch_subscription_settings(const orch_subscription *s);

/* Ends a subscription, before or after its topic. What waits is dropped, a next gets ORCH_ECLOSED,
 * and an on_event that is under way is cancelled; in a task, it has ended when this returns. Called
 * by on_event itself, that is the last call.
 * Returns nothing.
 * Context: loop thread; in a task it may suspend.
 * Owns: consumes s. NULL does nothing. */
void orch_unsubscribe(orch_subscription *s);

/* Ends a topic. Its subscriptions deliver what waits, and then end as closed ones; each is still to
 * be given to orch_unsubscribe.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns: consumes t. NULL does nothing. */
void orch_topic_free(orch_topic *t);

// ---- policy: retry, map, hedge
//
// How often, how many at once, and for how long. They take task functions and not futures, as work
// that runs already cannot be started again. What they return is a future like any other:
// cancelling it ends all of it, attempts and waits alike, and once it has settled nothing of it
// runs any more. Numbers of a desc may come from a configuration. Those that make no sense (a
// factor that is NaN, a negative time that was converted and is now 584 million years) are no
// misuse: the future is rejected with ORCH_EINVAL and a message that names the field. No function,
// no desc or a bad stack size is a misuse.

typedef enum orch_jitter {
    ORCH_JITTER_NONE,
    ORCH_JITTER_FULL,        // from 0 to the back-off
    ORCH_JITTER_DECORRELATED // from delay_ms to three times the one before; factor does not count
} orch_jitter;

// What on_attempt sees of an attempt that has failed.
typedef struct orch_attempt {
    unsigned number;           // 1: the first
    unsigned left;             // attempts that may follow; 0: this was the last
    const orch_result *result; // how it ended; lent for the call
    uint64_t elapsed_ms;       // since the first one began, hooks and waits included
    uint64_t delay_ms;         // until the next one begins; 0 when none follows
} orch_attempt;

typedef bool (*orch_retry_if_fn)(const orch_result *r, void *context);
typedef int (*orch_on_attempt_fn)(const orch_attempt *attempt, void *context);
typedef bool (*orch_retry_after_fn)(const orch_result *r, uint64_t *ms, void *context);

typedef struct orch_retry_desc {
    const char *name; // of its task, for reports; borrowed until it has ended
    orch_task_fn fn;  // required: one attempt
    void *arg;        // passed to fn
    size_t arg_size;  // bytes; not 0: that many bytes of arg are copied once, for all attempts
    void (*release)(void *arg);    // called exactly once with what fn got (arg, if it never ran)
    size_t stack_size;             // bytes of its task's stack; default: the loop's
    unsigned attempts;             // at most, the first included, to INT_MAX; default: 10
    uint64_t delay_ms;             // the first back-off; default: 1000
    bool no_delay;                 // no back-off: delay_ms, factor and jitter do not count
    double factor;                 // from one back-off to the next, 1 to 1000; default: 2
    uint64_t max_delay_ms;         // no back-off is longer; default: no cap
    orch_jitter jitter;            // default: ORCH_JITTER_NONE
    uint64_t timeout_ms;           // for each attempt; default: none
    uint64_t budget_ms;            // for all of it: attempts, hooks and waits; default: none
    orch_retry_if_fn retry_if;     // false: this error will not pass; default: only ORCH_ECANCELED
    orch_on_attempt_fn on_attempt; // told of each failed attempt; not 0: stop with this error
    orch_retry_after_fn retry_after; // true: *ms is how long to wait, as the server asks for it
    void *context;                   // passed to the three; borrowed until it has ended
} orch_retry_desc;

/* Calls a task function until it succeeds. The back-offs are delay_ms, delay_ms * factor,
 * delay_ms * factor * factor and so on, none above max_delay_ms, rounded up, then jittered; what
 * retry_after says takes the place of one, cap and jitter included. After a failed attempt come
 * retry_if and retry_after (if an attempt and time are left), on_attempt, and the wait. These hooks
 * run in the retry's task and may wait; a cancelled retry calls none. No attempt begins while the
 * one before it still runs, nor without time left in the budget: when a wait would take the rest,
 * it ends at once. An attempt that the end of the budget comes upon is cancelled.
 * Returns the future. Fulfilled: as the attempt that succeeded. Rejected: as the last attempt
 * (ORCH_ETIMEDOUT when timeout_ms or budget_ms cut it); with what on_attempt returned;
 * ORCH_ECANCELED, ORCH_ENOMEM; ORCH_EINVAL with a message for a number that makes no sense.
 * Context: loop thread; the first attempt runs until it first waits.
 * Owns: consumes arg when there is a release, on every path; borrows it otherwise.
 * Units: milliseconds. Source of the jitters: M. Brooker, Exponential Backoff And Jitter, AWS
 * Architecture Blog, 2015. */
ORCH_NODISCARD orch_future *orch_retry(const orch_retry_desc *desc);

/* Which attempt this is, of the innermost retry or hedge around the current task: for one that
 * asks another server than the attempt before.
 * Returns its number, from 1; 0 outside of one.
 * Context: loop thread.
 * Owns nothing. */
unsigned orch_attempt_number(void);

typedef orch_result (*orch_map_fn)(size_t index, void *context); // a task

typedef struct orch_map_desc {
    const char *name;               // of its tasks, for reports; borrowed until it has ended
    size_t count;                   // items
    orch_map_fn fn;                 // required: one item, in a task of its own
    void *context;                  // passed to fn
    void (*release)(void *context); // called exactly once, when the last item has ended
    size_t concurrency;             // at most so many at once; default: all
    // Each item holds one of its permits. Several maps may share it, and orch_semaphore_resize
    // changes it while they run. Borrowed until the map has ended; default: none.
    orch_semaphore *limit;
    bool keep_going;     // an error stops nothing: the list shows every outcome
    uint64_t timeout_ms; // for each item, all its attempts together; default: none
    // For each item: numbers and hooks, fn is to be NULL. Read during the call; default: one
    // attempt.
    const orch_retry_desc *retry;
    size_t stack_size; // bytes of an item's stack; default: the loop's
} orch_map_desc;

/* Runs fn for the indices 0 to count - 1, each in a task of its own, started in order, at most
 * `concurrency` at once. A place is free when the task has ended, and what it returned by
 * orch_chain too; an item keeps it through its retries. More permits for the limit start more items
 * at once; with fewer, those that run end. Items see the caller's task-local values and deadline,
 * and not what other items set.
 * Returns the future, as orch_all_n: the list of values in the order of the items, for orch_at; or
 * the first error (index: whose), after which no item starts and those that run are cancelled. With
 * keep_going as orch_all_settled_n. ORCH_ENOMEM; ORCH_EINVAL with a message for a number that makes
 * no sense; ORCH_ECLOSED for items whose limit was freed.
 * Context: loop thread; items run until they first wait, and at every 128th others get their turn.
 * Owns: consumes context when there is a release, on every path; borrows it otherwise. A result
 * must not show what that releases.
 * Units: milliseconds. */
ORCH_NODISCARD orch_future *orch_map(const orch_map_desc *desc);

typedef struct orch_hedge_desc {
    const char *name; // of its tasks, for reports; borrowed until it has ended
    orch_task_fn fn;  // required: one attempt; several run at a time
    void *arg;        // passed to fn
    size_t arg_size;  // bytes; not 0: that many bytes of arg are copied once, for all attempts
    void (*release)(void *arg); // called exactly once with what fn got (arg, if it never ran)
    size_t stack_size;          // bytes of an attempt's stack; default: the loop's
    unsigned attempts;          // at most, the first included, to 100; default: 2
    uint64_t delay_ms;          // from an attempt's start to the next one's; default: 100
    bool no_delay;              // all start at once
    orch_retry_if_fn retry_if;  // false: this error will not pass, no more attempts; default: true
    void *context;              // passed to it; borrowed until it has ended
} orch_hedge_desc;

/* Starts an attempt; another one when it has not succeeded after delay_ms, or at once when it
 * fails; and so on. The first success counts, and the other attempts are cancelled.
 * Returns the future, as orch_any_n: the first success (index: of which attempt, from 0); or
 * ORCH_EALLFAILED and the list of errors when every attempt failed, in which one that never
 * started shows ORCH_ECANCELED. ORCH_ENOMEM; ORCH_EINVAL with a message for a number that makes no
 * sense.
 * Context: loop thread; the first attempt runs until it first waits.
 * Owns: consumes arg when there is a release, on every path; borrows it otherwise.
 * Units: milliseconds. Source: J. Dean, L. A. Barroso, The Tail at Scale, CACM 56(2), 2013. */
ORCH_NODISCARD orch_future *orch_hedge(const orch_hedge_desc *desc);

// ---- guards: limiter, circuit breaker, single flight, adaptive concurrency
//
// They stand between callers and a service. A guard belongs to the loop of the thread that made it
// and is freed before it. A constructor never returns NULL: with no memory (and for a bad desc or
// outside a loop, where debug builds abort) it returns an object whose every operation says
// ORCH_ENOMEM (ORCH_EINVAL, ORCH_ENOLOOP); freeing it does nothing. NULL for a guard is
// ORCH_EINVAL, another thread's ORCH_ETHREAD; debug builds abort. The functions that take an
// orch_task_desc consume its arg on every path, also when the task never runs.

typedef struct orch_limiter orch_limiter;
typedef struct orch_breaker orch_breaker;
typedef struct orch_flight orch_flight;
typedef struct orch_adaptive orch_adaptive;

// What an outcome says about the service.
typedef enum orch_outcome {
    ORCH_OUTCOME_GOOD,
    ORCH_OUTCOME_BAD,    // it failed; for an adaptive limit: it is overloaded
    ORCH_OUTCOME_IGNORED // nothing
} orch_outcome;

typedef orch_outcome (*orch_judge_fn)(const orch_result *r, void *context); // must not suspend

// ---- limiter

typedef struct orch_limiter_desc {
    const char *name;     // for reports; borrowed until it is freed; default: ""
    uint32_t limit;       // starts in each interval; required
    uint64_t interval_ms; // required; at most 73 years
    uint32_t burst;       // token bucket: its size; default: limit; at most what 73 years bring
    bool strict;          // any limit + 1 starts in a row span the interval; limit at most 16777216
    uint32_t waiting;     // how many may wait, one more gets ORCH_ELIMIT; default: any number
} orch_limiter_desc;

/* A limit on starts: by default a token bucket (limit tokens come in each interval, evenly; burst
 * of them are kept), with strict a sliding window (8 bytes for each of limit). Whole tokens only
 * are given out, and no fraction of one is ever lost. A start is the moment in which the turn is
 * given.
 * Returns the limiter, never NULL: see above. ORCH_EINVAL for desc NULL, no limit or interval, a
 * burst with strict, a value out of range.
 * Context: loop thread; does not suspend.
 * Owns: hands over the limiter, for orch_limiter_free. Units: milliseconds. Source: GCRA (ITU-T
 * I.371); a log of starts. */
ORCH_NODISCARD orch_limiter *orch_limiter_new(const orch_limiter_desc *desc);

/* Frees a limiter. Who still waits gets ORCH_ECLOSED.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns: consumes l. NULL does nothing. */
void orch_limiter_free(orch_limiter *l);

/* Waits for its turn to start something that counts `weight` times. Turns are given in order: a
 * heavy start is not overtaken by light ones.
 * Returns 0; ORCH_ELIMIT at once when weight is above limit (token bucket: burst), or when too many
 * wait; ORCH_ECANCELED, which took nothing; ORCH_ECLOSED when the limiter is freed meanwhile;
 * ORCH_EINVAL for a weight of 0; ORCH_ENOMEM; ORCH_ENOTASK.
 * Context: task only; suspends unless it is its turn, and then too in every 128th call.
 * Owns nothing. */
int orch_limit(orch_limiter *l, uint32_t weight);

/* orch_limit as a future, for races and callbacks. It takes nothing at the time of the call, and
 * nothing at all when nobody wants it any more: a lost race costs no start.
 * Returns the future; fulfilled with nothing when it is its turn; rejected as orch_limit says.
 * Context: loop thread; does not suspend.
 * Owns: hands over the future; borrows l until it is freed. */
ORCH_NODISCARD orch_future *orch_limiter_acquire(orch_limiter *l, uint32_t weight);

/* Starts now or not at all. It does not overtake those who wait.
 * Returns whether it may start; false also when it never could (a weight of 0 or above the limit).
 * Context: loop thread; does not suspend.
 * Owns nothing. */
bool orch_limiter_try(orch_limiter *l, uint32_t weight);

/* How long until a start of that weight would be allowed if nobody else came: for a Retry-After.
 * Returns milliseconds, rounded up; 0: now, if nobody waits; UINT64_MAX: never.
 * Context: loop thread; does not suspend.
 * Owns nothing. Units: milliseconds. */
uint64_t orch_limiter_delay(orch_limiter *l, uint32_t weight);

/* No start for ms from now on, whatever the limit allows: for a server that says Retry-After. A
 * longer pause stands.
 * Returns 0, or the limiter's error.
 * Context: loop thread; does not suspend.
 * Owns nothing. Units: milliseconds. */
int orch_limiter_pause(orch_limiter *l, uint64_t ms);

/* Changes limit, interval_ms, burst and waiting. Tokens that are there stay (whole ones, at most
 * the new burst), and starts of the past count against the new limit. Who waits with more weight
 * than is allowed now gets ORCH_ELIMIT.
 * Returns 0; ORCH_EINVAL for a bad desc or another `strict`; ORCH_ENOMEM, and nothing has changed.
 * Context: loop thread; does not suspend.
 * Owns nothing; the name stays. */
int orch_limiter_change(orch_limiter *l, const orch_limiter_desc *desc);

/* How many wait for their turn.
 * Returns the number; 0 for an object that is not usable.
 * Context: loop thread.
 * Owns nothing. */
size_t orch_limiter_waiting(const orch_limiter *l);

/* The settings in force, every default filled in.
 * Returns the desc; NULL for an object that is not usable.
 * Context: loop thread.
 * Owns nothing; lives as long as the limiter. */
const orch_limiter_desc *orch_limiter_settings(const orch_limiter *l);

// ---- circuit breaker

typedef enum orch_breaker_state {
    ORCH_BREAKER_CLOSED,    // calls pass
    ORCH_BREAKER_HALF_OPEN, // a few pass, to see how it is
    ORCH_BREAKER_OPEN       // none passes
} orch_breaker_state;

typedef struct orch_breaker_desc {
    const char *name;    // for messages; borrowed until it is freed; default: ""
    uint32_t failures;   // opens at so many bad calls in a row; default: 5, with a rate: none
    double failure_rate; // opens at this share of bad calls, above 0 and at most 1; default: none
    uint32_t window;     // the share of how many last calls; at most 65536; default: 100
    uint32_t minimum;    // no rate before so many calls, at most window; default: 10, or window
    uint64_t open_ms;    // open for so long; at most 73 years; default: 30000
    uint32_t probes;     // half-open: so many pass, and all good ones close it; default: 1
    uint64_t probe_ms;   // half-open: opens again when probes take longer; default: open_ms
    uint64_t slow_ms;    // a call that took so long is bad, whatever it came to; default: none
    orch_judge_fn judge; // default: an error is bad
    void (*on_change)(orch_breaker_state from, orch_breaker_state to, void *context); // after it
    void *context; // for both, which must not suspend
} orch_breaker_desc;

typedef struct orch_breaker_stats {
    uint64_t passed;         // calls let through
    uint64_t refused;        // calls not let through
    uint64_t bad;            // outcomes that counted as bad
    uint64_t opened;         // times it opened
    uint32_t in_row;         // closed: bad calls in a row; half-open: good ones
    uint32_t seen, seen_bad; // calls in the window
} orch_breaker_stats;

/* A circuit breaker. A call that ends with an error after it was cancelled counts as nothing,
 * unless it had been under way for slow_ms. Outcomes of calls that began in an earlier state count
 * as nothing. There are no timers: time is looked at when somebody calls.
 * Returns the breaker, never NULL: see above. desc NULL: all defaults. ORCH_EINVAL for a value out
 * of range (NaN is).
 * Context: loop thread; does not suspend.
 * Owns: hands over the breaker, for orch_breaker_free. Units: milliseconds. Source: Nygard, Release
 * It!, 2007. */
ORCH_NODISCARD orch_breaker *orch_breaker_new(const orch_breaker_desc *desc);

/* Frees a breaker. Calls under way go on; nothing of the desc is called any more, and the memory
 * goes when the last call has ended.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns: consumes b. NULL does nothing. */
void orch_breaker_free(orch_breaker *b);

/* Runs fn as a task, if the breaker lets it pass.
 * Returns the task's future; rejected at once with ORCH_EOPEN and a message that says for how long,
 * in which case fn does not run; otherwise as orch_go.
 * Context: as orch_go.
 * Owns: borrows arg until the task has ended, b until it is freed. */
ORCH_NODISCARD orch_future *orch_breaker_run(orch_breaker *b, orch_task_fn fn, void *arg);

/* orch_breaker_run with a name, a copied argument, a release or a stack size.
 * Returns as orch_breaker_run; ORCH_EINVAL as orch_go_with.
 * Context: as orch_go_with.
 * Owns: consumes desc->arg when there is a release, on every path. */
ORCH_NODISCARD orch_future *orch_breaker_run_with(orch_breaker *b, const orch_task_desc *desc);

/* Asks for a pass, for a call that is no task.
 * Returns a result that owns a pass, for orch_breaker_record; freeing it instead says that the call
 * did not take place. ORCH_EOPEN with a message; ORCH_ENOMEM; the breaker's error.
 * Context: loop thread; does not suspend.
 * Owns: hands over the pass. */
ORCH_NODISCARD orch_result orch_breaker_allow(orch_breaker *b);

/* Says what the call came to. NULL, or ORCH_ECANCELED: nothing, as freeing the pass does.
 * Returns nothing. A rejected, freed or recorded pass does nothing.
 * Context: loop thread; does not suspend.
 * Owns: consumes *pass and clears it; borrows outcome. */
void orch_breaker_record(orch_result *pass, const orch_result *outcome);

/* Opens it for ms (0: open_ms; UINT64_MAX: until a reset).
 * Returns 0, or the breaker's error.
 * Context: loop thread; does not suspend.
 * Owns nothing. Units: milliseconds. */
int orch_breaker_trip(orch_breaker *b, uint64_t ms);

/* Closes it and forgets what was counted.
 * Returns 0, or the breaker's error.
 * Context: loop thread; does not suspend.
 * Owns nothing. */
int orch_breaker_reset(orch_breaker *b);

/* The state that the next call will find. on_change hears of an open one that has become half-open
 * with that call.
 * Returns the state; open for an object that is not usable.
 * Context: loop thread.
 * Owns nothing. */
orch_breaker_state orch_breaker_state_of(const orch_breaker *b);

/* Counters since it was made; the last three since the last change of state.
 * Returns them; zeros for an object that is not usable.
 * Context: loop thread.
 * Owns nothing. */
orch_breaker_stats orch_breaker_statistics(const orch_breaker *b);

/* The settings in force, every default filled in.
 * Returns the desc; NULL for an object that is not usable.
 * Context: loop thread.
 * Owns nothing; lives as long as the breaker. */
const orch_breaker_desc *orch_breaker_settings(const orch_breaker *b);

// ---- single flight

/* Lets concurrent calls for one key share one run.
 * Returns the flight, never NULL: see above.
 * Context: loop thread; does not suspend.
 * Owns: hands over the flight, for orch_flight_free. */
ORCH_NODISCARD orch_flight *orch_flight_new(void);

/* Frees a flight. Its runs are asked to end, and their callers get ORCH_ECLOSED when they have (or
 * what the run came to all the same). What was forgotten goes on.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns: consumes f. NULL does nothing. */
void orch_flight_free(orch_flight *f);

/* Joins the run for a key; the first caller starts it, as a task. A call after it has ended starts
 * the next. The last caller to give up cancels it; one that calls while that still winds down waits
 * for its end and then starts the next: at no time are there two runs for a key. No caller's
 * deadline ends a run that others wait for. The first caller can give up before the others, but if
 * it lent an arg (not NULL, without arg_size or release) it stays until the run has ended.
 * Returns the future of the caller's share (orch_take gives NULL when there were several); rejected
 * as the run; ORCH_EINVAL for no key, no fn, or a key that does not fit into half the task's stack;
 * ORCH_ECYCLE inside the run itself; ORCH_ENOMEM.
 * Context: as orch_go.
 * Owns: borrows key during the call, and the first caller's arg until the run has ended. */
ORCH_NODISCARD orch_future *orch_flight_run(orch_flight *f, const void *key, size_t key_size,
                                            orch_task_fn fn, void *arg);

/* orch_flight_run with a name, a copied argument, a release or a stack size. Of a caller that
 * joins, the arg is released at once.
 * Returns as orch_flight_run; the key and a copied argument together fit into half the stack.
 * Context: as orch_go_with.
 * Owns: consumes desc->arg when there is a release, on every path; borrows key during the call. */
ORCH_NODISCARD orch_future *orch_flight_run_with(orch_flight *f, const void *key, size_t key_size,
                                                 const orch_task_desc *desc);

/* The next call for the key starts a run of its own at once, whatever is under way; that goes on
 * for its callers.
 * Returns whether there was a run.
 * Context: loop thread; does not suspend.
 * Owns: borrows key during the call. */
bool orch_flight_forget(orch_flight *f, const void *key, size_t key_size);

/* How many callers share the run for a key.
 * Returns the number; 0: there is no run that a call would join.
 * Context: loop thread.
 * Owns: borrows key during the call. */
size_t orch_flight_callers(const orch_flight *f, const void *key, size_t key_size);

/* How many runs are under way, the forgotten ones included.
 * Returns the number; 0 for an object that is not usable.
 * Context: loop thread.
 * Owns nothing. */
size_t orch_flight_count(const orch_flight *f);

// ---- adaptive concurrency

typedef struct orch_adaptive_desc {
    const char *name;    // for reports; borrowed until it is freed; default: ""
    uint32_t min;        // calls at once at least; default: 1
    uint32_t max;        // calls at once at most; default: 200, or min when that is more
    uint32_t initial;    // at first; default: 20, or the nearest of min and max
    uint64_t latency_ms; // a call that takes longer says overload; default: none
    // So do 20 calls that in the mean take this times the usual and 1 ms longer; above 1; default:
    // 2, with latency_ms: none.
    double tolerance;
    double backoff;      // overload multiplies the limit by it; above 0, below 1; default: 0.9
    uint32_t waiting;    // how many may wait, one more gets ORCH_ELIMIT; default: any number
    bool no_wait;        // ORCH_ELIMIT at once instead of waiting
    orch_judge_fn judge; // default: ORCH_ETIMEDOUT is bad, other errors are ignored
    void *context;       // for judge
} orch_adaptive_desc;

/* A limit on calls at once that finds its own height. It grows by one for each good call until the
 * first overload, then by one for as many good calls as it has, and only while half of it is used;
 * it shrinks by `backoff`, once for all calls under way. The usual latency is the least mean of 20
 * good calls; it is learnt first, and anew when a limit of `min` does not help.
 * A cancelled call says nothing, or overload if it had taken too long by then.
 * Returns the limit, never NULL: see above. desc NULL: all defaults. ORCH_EINVAL for a value out of
 * range (NaN is).
 * Context: loop thread; does not suspend.
 * Owns: hands over the limit, for orch_adaptive_free. Units: milliseconds. Source: AIMD (Chiu, Jain
 * 1989), with slow start and one decrease a round trip (RFC 5681). */
ORCH_NODISCARD orch_adaptive *orch_adaptive_new(const orch_adaptive_desc *desc);

/* Frees a limit. Who waits gets ORCH_ECLOSED, calls under way go on; nothing of the desc is called
 * any more, and the memory goes when the last call has ended.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns: consumes a. NULL does nothing. */
void orch_adaptive_free(orch_adaptive *a);

/* Runs fn as a task, now or when its turn comes, in order. Waiting does not count as latency.
 * Returns the task's future; ORCH_ELIMIT at once when it may not wait; ORCH_ECLOSED when the limit
 * is freed while it waits; otherwise as orch_go.
 * Context: as orch_go; fn runs in the task that waited.
 * Owns: borrows arg until the task has ended, a until it is freed. */
ORCH_NODISCARD orch_future *orch_adaptive_run(orch_adaptive *a, orch_task_fn fn, void *arg);

/* orch_adaptive_run with a name, a copied argument, a release or a stack size.
 * Returns as orch_adaptive_run; ORCH_EINVAL as orch_go_with.
 * Context: as orch_go_with.
 * Owns: consumes desc->arg when there is a release, on every path. */
ORCH_NODISCARD orch_future *orch_adaptive_run_with(orch_adaptive *a, const orch_task_desc *desc);

/* Asks for a pass, for a call that is no task. A pass that nobody takes (a lost race) goes back.
 * Returns the future of a result that owns a pass, for orch_adaptive_record; freeing it instead
 * says nothing about the service. ORCH_ELIMIT at once when it may not wait; ORCH_ECLOSED;
 * ORCH_ENOMEM.
 * Context: loop thread; does not suspend.
 * Owns: hands over the future; its result owns the pass. */
ORCH_NODISCARD orch_future *orch_adaptive_acquire(orch_adaptive *a);

/* A pass now or not at all. It does not overtake those who wait.
 * Returns a result that owns a pass; ORCH_ELIMIT; ORCH_ENOMEM; the limit's error.
 * Context: loop thread; does not suspend.
 * Owns: hands over the pass. */
ORCH_NODISCARD orch_result orch_adaptive_try(orch_adaptive *a);

/* Says what the call came to. NULL, or ORCH_ECANCELED: nothing, as freeing the pass does.
 * Returns nothing. A rejected, freed or recorded pass does nothing.
 * Context: loop thread; does not suspend.
 * Owns: consumes *pass and clears it; borrows outcome. */
void orch_adaptive_record(orch_result *pass, const orch_result *outcome);

/* How many calls may be under way at once now.
 * Returns the limit; 0 for an object that is not usable.
 * Context: loop thread.
 * Owns nothing. */
size_t orch_adaptive_limit(const orch_adaptive *a);

/* How many calls are under way, and how many wait for their turn.
 * Returns the number; 0 for an object that is not usable.
 * Context: loop thread.
 * Owns nothing. */
size_t orch_adaptive_running(const orch_adaptive *a);
size_t orch_adaptive_waiting(const orch_adaptive *a);

/* The settings in force, every default filled in.
 * Returns the desc; NULL for an object that is not usable.
 * Context: loop thread.
 * Owns nothing; lives as long as the limit. */
const orch_adaptive_desc *orch_adaptive_settings(const orch_adaptive *a);

// ---- signals
//
// A signal as a future. While somebody waits for one, the process catches it, in whichever thread
// it arrives, and every loop that waits gets it; when the last one has gone, it is handled as it
// was before. Several that come before the loop looks are one, as they are for the system itself.
// A wait counts as one for a descriptor: the loop is not deadlocked, and it uses one (two outside
// Linux). A child made by fork is as it was before: a signal there does what it did before
// anybody waited.

/* A future of the next time that a signal comes, counted from this call: orch_int has its number.
 * Returns the future; rejected: ORCH_EINVAL for a signal that cannot be waited for (SIGKILL,
 * SIGSTOP, the program's own faults such as SIGSEGV and SIGABRT, those above 64), -EMFILE,
 * ORCH_ENOMEM.
 * Context: loop thread; does not suspend.
 * Owns: hands over the future. */
ORCH_NODISCARD orch_future *orch_signal(int signal);

/* Begins to catch several signals. Nothing is lost between one wait and the next. One that wakes
 * nobody waits, and different ones are told lowest number first.
 * Returns the object, never NULL: what could not be made says why in every next, as orch_signal;
 * ORCH_EINVAL (debug builds abort) for an empty list, ORCH_ENOLOOP.
 * Context: loop thread; does not suspend.
 * Owns: hands it over, for orch_signals_free; borrows signals during the call. */
ORCH_NODISCARD orch_signals *orch_signals_new(const int *signals, size_t count);

/* A future of the next of them: orch_int has its number. Cancelled, or lost in a race, it has taken
 * none.
 * Returns the future; ORCH_EBUSY while another one is pending; ORCH_ECLOSED when s is freed first.
 * Context: loop thread; does not suspend.
 * Owns: borrows s; hands over the future. */
ORCH_NODISCARD orch_future *orch_signals_next(orch_signals *s);

/* Stops catching them. Who waits gets ORCH_ECLOSED.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns: consumes s. NULL does nothing. */
void orch_signals_free(orch_signals *s);

// ---- processes
//
// A child process is an object whose life is its handle's: freeing it ends the process, and so does
// the end of the loop; no deadline of a scope does. However it ends, it is waited for by its own
// number: there are no zombies, and nobody else's children are touched (a program that reaps all
// children itself, or ignores SIGCHLD, gets -ECHILD in place of a status). The child has the
// descriptors 0, 1 and 2 and no other, also none that lacks close-on-exec; no signal is blocked;
// what the program caught is at its default, and so are SIGPIPE and SIGCHLD; what else it ignored
// stays ignored, as nohup wants. On a virtual clock time does not pass by itself while a child
// runs.

typedef struct orch_process orch_process;

enum { // what is behind a descriptor of the child, besides a descriptor of the caller's
    ORCH_STDIO_DEFAULT = 0,  // start: the caller's own; run: the input, and what is captured
    ORCH_STDIO_INHERIT = -1, // the caller's own
    ORCH_STDIO_NULL = -2,    // /dev/null
    ORCH_STDIO_PIPE = -3, // a pipe, whose other end is orch_process_stdin, ..._stdout, ..._stderr
    ORCH_STDIO_OUT = -4   // err: where out goes
};

typedef struct orch_process_desc {
    const char *const *argv; // required, with a NULL at the end; without a slash argv[0] is looked
                             // for in the caller's PATH
    const char *const *env;  // "NAME=value", with a NULL at the end; default: the caller's
    const char *directory;   // in which it starts, and from which a relative argv[0] is seen;
                             // default: the caller's
    int in, out, err;        // ORCH_STDIO_... or a descriptor, which stays the caller's
    bool same_group;         // stay in the caller's process group, for a child that uses the
                             // terminal; default: one of its own, which signals reach as a whole
    uint64_t grace_ms;       // from SIGTERM to SIGKILL; default: 2000
    bool no_grace;           // SIGKILL at once
    // orch_process_run only:
    const void *input; // written to its standard input
    size_t input_size; // bytes
    size_t limit;      // bytes kept of each output; default: 16 MiB
    bool truncate;     // what is above the limit is dropped; default: it is an error
} orch_process_desc;

// How a process has ended: what orch_process_wait is fulfilled with.
typedef struct orch_exit_status {
    int code;   // what it returned, 0 to 255
    int signal; // not 0: what killed it
} orch_exit_status;

/* Starts a program.
 * Returns the process, never NULL: what could not be started says why in every operation: what the
 * system said (-ENOENT, -EACCES, -ENOEXEC, -E2BIG, -EAGAIN, -EMFILE and so on; a directory's and a
 * descriptor's error too), ORCH_ENOMEM; ORCH_EINVAL (debug builds abort) for a bad desc,
 * ORCH_ENOLOOP.
 * Context: loop thread; does not suspend, but the thread waits until the program was loaded, about
 * a millisecond. Where SIGCHLD has to tell the end (no pidfd), it stays unblocked in this thread.
 * Owns: hands it over, for orch_process_free, before the loop ends; borrows what desc shows during
 * the call. Units: milliseconds. */
ORCH_NODISCARD orch_process *orch_process_start(const orch_process_desc *desc);

/* The number of a process, also when it has ended; it may then be another one's.
 * Returns the number; why it did not start.
 * Context: loop thread.
 * Owns nothing. */
int orch_process_id(const orch_process *p);

/* Our end of a pipe to or from a process: non-blocking and close-on-exec.
 * Returns the descriptor; -EBADF when there is no pipe, or when it was closed; why it did not
 * start.
 * Context: loop thread.
 * Owns nothing: orch_process_free closes it. */
int orch_process_stdin(const orch_process *p);
int orch_process_stdout(const orch_process *p);
int orch_process_stderr(const orch_process *p);

/* Closes our end of its standard input, which is how most filters are told to end.
 * Returns 0; -EBADF when there is no pipe; why it did not start.
 * Context: loop thread; wakes who waits for the descriptor with ORCH_ECANCELED.
 * Owns: closes the descriptor. */
int orch_process_close_stdin(orch_process *p);

/* A future of its end. Dropping or cancelling it does nothing to the process; there may be several.
 * Returns the future: its value is a const orch_exit_status *. Rejected: with why it did not start,
 * and a message; -ECHILD when somebody else has reaped it; ORCH_ENOMEM.
 * Context: loop thread.
 * Owns: hands over the future; the status lives as long as the result. */
ORCH_NODISCARD orch_future *orch_process_wait(orch_process *p);

/* Sends a signal to the process and its group.
 * Returns 0; -ESRCH when it has ended; -EINVAL for a number that is no signal (0 only looks);
 * -EPERM; why it did not start.
 * Context: loop thread; does not suspend.
 * Owns nothing. */
int orch_process_kill(orch_process *p, int signal);

/* Ends a process: SIGTERM to its group and, after grace_ms or as soon as it has ended, SIGKILL to
 * what is left of that. In a task this returns when it has ended, also in a cancelled one. One that
 * has ended by itself is left in peace, and so is what it started. Who waits gets the status.
 * Returns nothing.
 * Context: loop thread; in a task it may suspend.
 * Owns: consumes p; closes its input now and its outputs when it has ended. NULL does nothing. */
void orch_process_free(orch_process *p);

// What orch_process_run is fulfilled with. The texts have a NUL behind them, and are never NULL.
typedef struct orch_process_output {
    orch_exit_status status;
    char *out, *err; // "" when not captured
    size_t out_size, err_size;
    bool truncated; // something was dropped
} orch_process_output;

/* Runs a program to its end, feeds it `input` and captures its outputs, all at the same time. It
 * has ended when the program has and its captured outputs are at their end. A program that does
 * not read its input is no failure. Cancelled, or failed in between: the program is ended as by
 * orch_process_free.
 * Returns a result with a const orch_process_output *, whatever the status is:
 * orch_exit_status_check makes an error of it. Rejected: as orch_process_start, with a message;
 * ORCH_ELIMIT, with a message, for an output above the limit; ORCH_ECANCELED; ORCH_ENOMEM;
 * ORCH_ENOTASK; -errno of a pipe.
 * Context: task only; suspends.
 * Owns: borrows what desc shows; the result is the caller's to free. */
ORCH_NODISCARD orch_result orch_process_run(const orch_process_desc *desc);

/* A status in words: "exited with 3", "killed by signal 9 (Killed)".
 * Returns buffer, which is cut to fit.
 * Context: any thread.
 * Owns nothing. Units: bytes. */
const char *orch_exit_status_text(orch_exit_status status, char *buffer, size_t size);

/* A status as a result, for those to whom anything but 0 is a failure.
 * Returns success for code 0; else an error with the status in words: the code, or 128 and the
 * signal, as a shell has it.
 * Context: any thread.
 * Owns: the result owns its message. */
ORCH_NODISCARD orch_result orch_exit_status_check(orch_exit_status status);

#ifdef __cplusplus
} // extern "C"

#include <initializer_list>

// C++ has neither compound literals nor the address of a temporary: initialiser lists and
// references.
typedef std::initializer_list<orch_future *> orch_list;
static inline orch_future *orch_all_of(orch_list l) { return orch_all_n(l.size(), l.begin()); }
static inline orch_future *orch_all_settled_of(orch_list l) {
    return orch_all_settled_n(l.size(), l.begin());
}
static inline orch_future *orch_any_of(orch_list l) { return orch_any_n(l.size(), l.begin()); }
static inline orch_future *orch_race_of(orch_list l) { return orch_race_n(l.size(), l.begin()); }
static inline orch_future *orch_quorum_of(size_t needed, orch_list l) {
    return orch_quorum_n(needed, l.size(), l.begin());
}
static inline orch_future *orch_gather_of(uint64_t ms, orch_list l) {
    return orch_gather_n(l.size(), l.begin(), ms);
}
static inline orch_completion *orch_as_completed_of(orch_list l) {
    return orch_as_completed_n(l.size(), l.begin());
}
#define orch_all(...) orch_all_of({__VA_ARGS__})
#define orch_all_settled(...) orch_all_settled_of({__VA_ARGS__})
#define orch_any(...) orch_any_of({__VA_ARGS__})
#define orch_race(...) orch_race_of({__VA_ARGS__})
#define orch_quorum(needed, ...) orch_quorum_of((needed), {__VA_ARGS__})
#define orch_gather(ms, ...) orch_gather_of((ms), {__VA_ARGS__})
#define orch_as_completed(...) orch_as_completed_of({__VA_ARGS__})

static inline orch_future *orch_then_with(orch_future *f, const orch_then_desc &desc) {
    return orch_then_with(f, &desc);
}
static inline orch_future *orch_go_with(const orch_task_desc &desc) { return orch_go_with(&desc); }
static inline int orch_scope_open(orch_scope *scope, const orch_scope_desc &desc) {
    return orch_scope_open(scope, &desc);
}
static inline int orch_scope_go_with(orch_scope *scope, const orch_task_desc &desc) {
    return orch_scope_go_with(scope, &desc);
}
static inline orch_future *orch_offload_with(const orch_offload_desc &desc) {
    return orch_offload_with(&desc);
}
static inline orch_loop *orch_loop_new(const orch_loop_desc &desc) { return orch_loop_new(&desc); }
static inline orch_result orch_run_with(const orch_loop_desc &desc, orch_task_fn main, void *arg) {
    return orch_run_with(&desc, main, arg);
}
static inline int orch_listen(const orch_listen_desc &desc) { return orch_listen(&desc); }
static inline int orch_connect_with(const orch_connect_desc &desc) {
    return orch_connect_with(&desc);
}
static inline int orch_udp(const orch_udp_desc &desc) { return orch_udp(&desc); }
static inline int orch_serve(int listener, orch_result (*handler)(int fd, void *context),
                             const orch_serve_desc &desc) {
    return orch_serve(listener, handler, &desc);
}
static inline orch_subscription *orch_subscribe(orch_topic *t, const orch_subscribe_desc &desc) {
    return orch_subscribe(t, &desc);
}
static inline orch_future *orch_retry(const orch_retry_desc &desc) { return orch_retry(&desc); }
static inline orch_future *orch_map(const orch_map_desc &desc) { return orch_map(&desc); }
static inline orch_future *orch_hedge(const orch_hedge_desc &desc) { return orch_hedge(&desc); }
static inline orch_limiter *orch_limiter_new(const orch_limiter_desc &desc) {
    return orch_limiter_new(&desc);
}
static inline int orch_limiter_change(orch_limiter *l, const orch_limiter_desc &desc) {
    return orch_limiter_change(l, &desc);
}
static inline orch_breaker *orch_breaker_new(const orch_breaker_desc &desc) {
    return orch_breaker_new(&desc);
}
static inline orch_future *orch_breaker_run_with(orch_breaker *b, const orch_task_desc &desc) {
    return orch_breaker_run_with(b, &desc);
}
static inline orch_future *orch_flight_run_with(orch_flight *f, const void *key, size_t key_size,
                                                const orch_task_desc &desc) {
    return orch_flight_run_with(f, key, key_size, &desc);
}
static inline orch_adaptive *orch_adaptive_new(const orch_adaptive_desc &desc) {
    return orch_adaptive_new(&desc);
}
static inline orch_process *orch_process_start(const orch_process_desc &desc) {
    return orch_process_start(&desc);
}
static inline orch_result orch_process_run(const orch_process_desc &desc) {
    return orch_process_run(&desc);
}
static inline orch_future *orch_adaptive_run_with(orch_adaptive *a, const orch_task_desc &desc) {
    return orch_adaptive_run_with(a, &desc);
}
#endif

#endif // ASYNCORCH_H

#ifdef ASYNCORCH_IMPLEMENTATION

// ------------------------------------------------------------------------------------------------
// >>implementation
// ------------------------------------------------------------------------------------------------
// >>platform
//
// What this file is compiled on, as 0/1 macros computed once; every choice below is between whole
// blocks. Systems: Linux, the BSDs, macOS. Processors with an assembly switch: x86-64, aarch64,
// riscv64; others use ucontext, which costs three system calls a switch. musl has no ucontext.

#if defined(__linux__)
#define ORCHI_OS_LINUX 1
#else
#define ORCHI_OS_LINUX 0
#endif

#if defined(__APPLE__)
#define ORCHI_OS_MACOS 1
#else
#define ORCHI_OS_MACOS 0
#endif

// ppoll sleeps to the nanosecond, pipe2 and accept4 make descriptors private at once. They are
// declared where _GNU_SOURCE was seen before any system header.
#if ORCHI_OS_LINUX && defined(_GNU_SOURCE) && (!defined(__GLIBC__) || defined(__USE_GNU))
#define ORCHI_GNU 1
#else
#define ORCHI_GNU 0
#endif

// Elsewhere a descriptor is made, and then made private: a child that another thread forks between
// the two inherits it.
#if ORCHI_OS_MACOS || (ORCHI_OS_LINUX && !ORCHI_GNU)
#define ORCHI_MAKES_PRIVATE 0
#else
#define ORCHI_MAKES_PRIVATE 1
#endif

#if ORCHI_OS_MACOS || defined(__FreeBSD__) || defined(__NetBSD__) || defined(__OpenBSD__) ||       \
    defined(__DragonFly__) || (defined(ORCH_USE_KQUEUE) && ORCH_USE_KQUEUE)
#define ORCHI_KQUEUE 1
#else
#define ORCHI_KQUEUE 0
#endif

#if defined(_WIN32)
#error "asyncorch.h: Windows is not supported yet (it needs Fibers and WSAPoll)"
#endif

#if defined(__GLIBC__) && !defined(__USE_MISC)
#error                                                                                             \
    "asyncorch.h: include it before any system header, or compile with -D_GNU_SOURCE or -std=gnu99"
#endif

#include <arpa/inet.h>
#include <fcntl.h>
#include <limits.h>
#include <net/if.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#if ORCHI_OS_LINUX
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/syscall.h>
#endif
#if ORCHI_OS_LINUX && defined(SYS_epoll_pwait2)
#define ORCHI_EPOLL_PWAIT2 SYS_epoll_pwait2
#else
#define ORCHI_EPOLL_PWAIT2 -1 // ENOSYS
#endif
#if ORCHI_KQUEUE
#include <sys/types.h>

#include <sys/event.h>
#endif

#if defined(__has_include)
#define ORCHI_HAS_INCLUDE(file) __has_include(file)
#else
#define ORCHI_HAS_INCLUDE(file) 0
#endif

#if defined(__has_feature)
#define ORCHI_HAS_FEATURE(name) __has_feature(name)
#else
#define ORCHI_HAS_FEATURE(name) 0
#endif

#if defined(__SANITIZE_ADDRESS__) || ORCHI_HAS_FEATURE(address_sanitizer)
#define ORCHI_ASAN 1
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define ORCHI_ASAN 0
#endif

#if defined(__SANITIZE_THREAD__) || ORCHI_HAS_FEATURE(thread_sanitizer)
#define ORCHI_TSAN 1
#include <sanitizer/tsan_interface.h>
#else
#define ORCHI_TSAN 0
#endif

#if ORCHI_OS_MACOS // has only those with a name
#define ORCHI_SEMAPHORES 0
#else
#define ORCHI_SEMAPHORES 1
#include <semaphore.h>
#endif

#if ORCHI_HAS_INCLUDE(<execinfo.h>)
#include <execinfo.h>
#define ORCHI_BACKTRACE 1
#else
#define ORCHI_BACKTRACE 0
#endif

// Shadow stacks (Intel CET): whether they are on is known only at run time, see >>context.
#if defined(__CET__) && (__CET__ & 2)
#define ORCHI_CET 1
#else
#define ORCHI_CET 0
#endif

#if (defined(__x86_64__) && !defined(__ILP32__)) || defined(__aarch64__) ||                        \
    (defined(__riscv) && __riscv_xlen == 64)
#define ORCHI_HAS_ASSEMBLY 1
#else
#define ORCHI_HAS_ASSEMBLY 0
#endif

#if !ORCHI_HAS_ASSEMBLY || (defined(ORCH_USE_UCONTEXT) && ORCH_USE_UCONTEXT)
#define ORCHI_ASSEMBLY 0
#else
#define ORCHI_ASSEMBLY 1
#endif

// An object that may meet shadow stacks carries both ways to switch, and asks the processor.
#if !ORCHI_ASSEMBLY || ORCHI_CET
#define ORCHI_UCONTEXT 1
#include <ucontext.h>
#else
#define ORCHI_UCONTEXT 0
#endif

// ThreadSanitizer knows fork only, and macOS advises against vfork.
#if ORCHI_OS_LINUX && !ORCHI_TSAN
#define ORCHI_FORK vfork
#else
#define ORCHI_FORK fork
#endif

#if ORCHI_OS_LINUX && defined(SYS_pidfd_open) && !(defined(ORCH_USE_SIGCHLD) && ORCH_USE_SIGCHLD)
#define ORCHI_PIDFD 1
#else
#define ORCHI_PIDFD 0
#endif

// A constant rather than an #ifdef around code: both builds compile all of it, and neither rots.
#ifdef NDEBUG
#define ORCHI_DEBUG 0
#else
#define ORCHI_DEBUG 1
#endif

// COLD and NO_INLINE keep what is rare out of the functions that are called a hundred million times
// a second: what is inlined there costs registers to save, also when it does not run.
#define ORCHI_LIKELY(condition) __builtin_expect(!!(condition), 1)
#define ORCHI_UNLIKELY(condition) __builtin_expect(!!(condition), 0)
#define ORCHI_COLD __attribute__((cold, noinline))
#define ORCHI_NO_INLINE __attribute__((noinline))
#define ORCHI_INLINE inline __attribute__((always_inline))

#ifdef __cplusplus
extern "C" {
#endif

/* Monotonic nanoseconds: 17 ns a read, so only a look at timers and descriptors makes one. */
static uint64_t orchi_clock(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#if ORCHI_BACKTRACE
static void orchi_print_backtrace(void) {
    void *frames[32];
    fflush(stderr);
    backtrace_symbols_fd(frames, backtrace(frames, 32), 2);
}
#else
static void orchi_print_backtrace(void) {}
#endif

// ------------------------------------------------------------------------------------------------
// >>base
//
// Errors and misuse, the allocator, the objects every layer shares, slots for futures and the ready
// ring. Invariants:
//   - A slot's first word is its generation, odd while it is live; else a free-list link, which is
//     even. So a ticket or a consumed handle can be checked against a freed slot; slabs live as
//     long as the loop.
//   - A slot is 64 bytes in a 16 KiB page, whose head names the loop; frees go back to their own
//     page, because one list over all pages, scrambled by random frees, costs a cache miss per
//     allocation.
//   - The ring holds pointers to futures that have something to run, each at most once (QUEUED). It
//     grows with the slots, so that pushing never allocates. A queued slot is not reused before it
//     was popped.
//   - Settled means kind >= ORCHI_DONE. What a kind does is in one table, orchi_kinds, in
//     >>kinds: the function pointers by which lower layers reach upper ones.

typedef enum orchi_kind_id {
    ORCHI_PROMISE, // settled by a ticket
    ORCHI_THEN,    // a callback on a source
    ORCHI_TASK,
    ORCHI_TIMER,
    ORCHI_READY,
    ORCHI_SIGNAL, // a descriptor's readiness that takes a signal
    ORCHI_COUNTS, // from here on kinds have `decided` or `ended`: an input's end is not just queued
    ORCHI_FOLLOW = ORCHI_COUNTS, // locked in to a source
    ORCHI_PROXY,                 // one consumer's registration at a shared future
    ORCHI_TIMEOUT,
    ORCHI_COMBINE,
    ORCHI_HUB,      // the consumer of an as-completed iteration's inputs
    ORCHI_SCOPE,    // the consumer of what was started in a scope
    ORCHI_DEADLINE, // a timer of a scope or task
    ORCHI_DONE,     // settled
    ORCHI_ON,       // settled, with an orch_on callback to run
    ORCHI_EXTRA,    // not a future: 48 bytes of memory for a layer
    ORCHI_MAIL,     // not a future: what other threads have sent, see >>inbox
    ORCHI_KINDS
} orchi_kind_id;

enum orchi_flag {        // uint16_t
    ORCHI_QUEUED = 1,    // in the ready ring
    ORCHI_WAITED = 2,    // consumed; waiter.one is valid while pending
    ORCHI_LISTED = 4,    // waiter.list has proxies
    ORCHI_ENDS_ON = 8,   // consumed by orch_on; waiter.on is valid
    ORCHI_DETACHED = 16, // nobody has to hold it
    ORCHI_CANCEL = 32,   // was asked to end
    ORCHI_DECIDED = 64,  // the outcome is final, its delivery may still take a moment
    ORCHI_DECIDED_OK = 128,
    ORCHI_HOOKED = 256,    // promise: has an on_cancel hook
    ORCHI_OWNING = 512,    // then: context is an extra slot with the context and its release
    ORCHI_NAMED = 512,     // promise: has a label
    ORCHI_FINALLY = 1024,  // then: on_ok is a finaliser
    ORCHI_BOXED = 2048,    // a box points here: the slot must stay
    ORCHI_IMMORTAL = 4096, // static: never written
    ORCHI_LOOKING = 8192,  // proxy of orch_wait: never cancels its source
    ORCHI_LOSERS = 16384,  // combine: the losers were cancelled
    ORCHI_ASKED = 16384,   // promise: the hook was queued
    ORCHI_LOOKED = 32768   // somebody has seen the outcome
};

#define ORCHI_CONSUMED (ORCHI_WAITED | ORCHI_ENDS_ON)

typedef struct orchi_list orchi_list;
typedef struct orchi_page orchi_page;
typedef struct orchi_stack orchi_stack;

// A slot, byte by byte, is:
//
//      0  generation            odd: live; else the link to the next free slot of the page
//      8  references            handles and consumers
//     12  kind, mark, flags
//     16  as                    pending: what the kind needs; settled: the result
//     48  waiter                the one consumer, or the list of proxies, or an orch_on callback
//
// A million pending futures are 64 MB, and touching one that is not in the cache costs ten times
// what is done with it. So a slot is one cache line, and consumer and producer meet in it: nothing
// is allocated to connect two futures, and nothing has to be looked up.

// 64 bytes. Pending: what its kind needs, and who waits. Settled: the result.
struct orch_future {
    uint64_t generation;
    uint32_t references; // handles and consumers; pending work lives on without, until it settles
    uint8_t kind;
    uint8_t mark; // of a walk, see orchi_circles
    uint16_t flags;
    union {
        orch_result result; // first, so that static futures can be initialised in C++
        struct {
            orch_cancel_fn fn;
            void *context;
            const char *label;
            int reason;
        } promise;
        struct {
            orch_future *source;
            orch_then_fn on_ok, on_error;
            void *context;
        } then;
        struct {
            orch_future *source;
            void (*fn)(void *context);
            void *context;
        } finally;
        struct {
            orch_future *source, *link;   // link: see orchi_announce
            orch_future *previous, *next; // proxy: in the list of its source
        } follow;
        struct {
            orch_future *source, *link;
            uint64_t ms;
            uint32_t position; // in the timer heap
        } timed;               // timer, timeout
        struct {
            orchi_list *list;
            orch_future *link;
            uint32_t unended;   // inputs that have not settled
            uint32_t ok_left;   // successes until it is decided
            uint32_t fail_left; // failures until it is decided; afterwards the cancel reason
            uint32_t winner;
        } combine;
        struct {
            int fd, events;
        } ready;
        struct {
            int fd, events; // as in ready; 0: none, ORCHI_TOLD or an error: what came of it
            orch_task *task;
            uint64_t since; // the loop's generation then
        } task;
        struct {
            int fd, events; // as in ready
            orch_signals *from;
        } signal;
        struct {
            orch_completion *iteration;
        } hub;
        struct {
            struct orchi_scope *own;
            orch_task *task;
            orch_future *outer; // the scope around it, of the same task
            uint32_t count;     // members
            int reason;         // not 0: it was cancelled
        } scope;
    } as;
    union {
        struct {
            orch_future *target;
            uint32_t index;
        } one;
        struct {
            orch_future *first, *last;
        } list;
        struct {
            orch_on_fn fn;
            void *context;
        } on;
    } waiter;
};

// What a layer does for its kind of future; NULL where nothing special is needed.
typedef struct orchi_kind {
    const char *name;
    void (*run)(orch_future *f);                        // popped from the ready ring
    orch_future *(*cancel)(orch_future *f, int reason); // returns what to ask next
    // An input's outcome is final: whether that decides f, and how.
    bool (*decided)(orch_future *f, uint32_t input, bool *ok);
    void (*ended)(orch_future *f, uint32_t input); // an input has settled; NULL: queue f
    void (*retarget)(orch_future *f, uint32_t input, orch_future *to); // an input was replaced
    void (*fire)(orch_future *f, int events); // its timer or descriptor is due
    // For reports: what it waits for from place *at on, NULL: no more; and its name.
    orch_future *(*source)(const orch_future *f, uint32_t *at);
    const char *(*label)(const orch_future *f);
} orchi_kind;

// >>forward: what is declared before its definition, and why.
// Kinds belong to layers further down; the table in >>kinds is how lower ones reach
// them.
extern const orchi_kind orchi_kinds[ORCHI_KINDS];
// Giving up a reference may free a future, which releases its result, which may be a share: a
// reference. orchi_retire_owning turns this recursion into a loop.
static void orchi_release(orch_future *f);

// A region is one allocation; its pages are cut to 16 KiB borders:
//
//     region | page: head, 255 slots | page: head, 255 slots | ...
//
// The head has the size of a slot. Small pages keep the cost of an alignment border low: a program
// with ten futures asks for 80 KiB. With smaller ones, some hundred futures that come and go
// together would go from page to page all the time.

struct orchi_page { // 16 KiB, aligned to 16 KiB
    orch_loop *loop;
    orchi_page *next;  // in the list of pages with free slots
    orch_future *free; // slots given back
    uint32_t fresh;    // slots never used start here
    bool listed;
};

enum { ORCHI_PAGE = 16384, ORCHI_SLOT = 64, ORCHI_PAGE_SLOTS = ORCHI_PAGE / ORCHI_SLOT - 1 };

// How a slot is found and how it goes:
//
//     new       the free list of the current page, else its next fresh slot, else another page that
//               has one, else a page of a region, else a new region: four instructions, then rarer
//               and rarer
//     free      to its own page's list, which makes the page known as one with room
//     its loop  is named in the head of its page: the address with its low 14 bits cleared

typedef struct orchi_region { // memory for pages, from the allocator
    struct orchi_region *next;
    char *pages;
    size_t count, used; // pages
    size_t bytes;
} orchi_region;

typedef struct orchi_ring { // a queue of pointers; mask + 1 is a power of two, positions wrap
    orch_future **items;
    uint32_t mask, head, tail;
} orchi_ring;

typedef struct orchi_timer {
    uint64_t deadline; // ns; not stamped yet: the duration
    uint64_t sequence;
    orch_future *future;
} orchi_timer;

typedef struct orchi_timers { // entries[0 .. stamped) is a heap; the rest was armed in this round
    orchi_timer *entries;
    uint32_t stamped, count, capacity;
    uint64_t sequence;
} orchi_timers;

enum orchi_hint {               // uint16_t, of a descriptor
    ORCHI_DRY = ORCH_READABLE,  // the last read took all there was: wait before the next
    ORCHI_FULL = ORCH_WRITABLE, // the last write filled it
    ORCHI_OWN = 4,              // it will be closed by orch_close and not otherwise
    ORCHI_WAKE = 8,             // of the loop itself: its event calls loop->on_wake
    ORCHI_IN_READ = 16,         // a call that had to wait is in this direction
    ORCHI_IN_WRITE = 32,
    ORCHI_NO_SOCKET = 64,
    ORCHI_SLOW = 128, // is blocking: each piece is waited for
    ORCHI_DATAGRAMS = 256,
    ORCHI_QUIET = 512 // a socket that raises no SIGPIPE
};

enum { ORCHI_TOLD = 8 }; // orch_future.as.task.events: the descriptor is ready

enum { ORCHI_REGISTERED = 4 }; // orchi_watch.armed: the poller knows the descriptor

typedef struct orchi_watch {      // a descriptor, by its number
    orch_future *reader, *writer; // who waits; both directions may have the same one
    uint32_t position;            // poll: in the array, plus one
    uint16_t generation;          // goes up when the number gets, or may get, a new owner
    uint16_t hints;               // an event clears those of its direction
    uint8_t armed;                // not poll: the events that are looked for, ORCHI_REGISTERED
} orchi_watch;

typedef struct orchi_found { // a descriptor that a look found ready
    int fd, events;
} orchi_found;

typedef struct orchi_poller {
    const struct orchi_poller_ops *ops;
    orchi_watch *watches; // by descriptor
    size_t watch_count;
    uint32_t count;     // descriptors that the poller looks at
    orchi_found *found; // by the last look
    uint32_t found_count, found_capacity;
    struct pollfd *fds; // poll(2)
    uint32_t capacity;
    uint32_t muted, seen, pass; // where parts of fds end
    bool dense;                 // many of fds were ready: they are looked at in portions
    int queue;                  // epoll, kqueue: the descriptor of the set
    void *events;               // epoll, kqueue: where a look puts what it finds
    uint32_t event_capacity;
    pid_t owner;             // the process that made the set, which a child shares
    bool woken;              // on_wake is to be called
    bool stale;              // events come for a descriptor that is gone: see orchi_poller_renew
    bool pinned;             // it does not move
    uint64_t looked_at;      // so many descriptors, in all looks together
    int64_t lost, threshold; // by not having moved yet, and how much of that makes it move
} orchi_poller;

typedef struct orchi_context { // a point of execution that was left and can be entered again
    void *sp;                  // stack pointer, or the ucontext_t
    void *fake;                // ASan
    const void *bottom;        // ASan
    size_t size;               // ASan
    void *fiber;               // TSan
} orchi_context;

enum { ORCHI_STACK_MIN_LOG = 14, ORCHI_STACK_MAX_LOG = 30, ORCHI_STACK_POOLS = 17 };

typedef struct orchi_stack_pool {
    struct orchi_stack_top *hot; // last in, first out
    orchi_stack *clean;          // without memory behind them
    uint32_t hot_count;
    uint32_t low; // the lowest hot_count since the last trim
    uint32_t made;
} orchi_stack_pool;

// Results that wait to be released, by the call of orchi_retire that is furthest down this stack.
typedef struct orchi_trash {
    orch_future *list;
} orchi_trash;

enum { ORCHI_QUARANTINE = 256, ORCHI_BUDGET = 128 };

struct orch_loop {
    orch_task *current; // NULL: the thread's main stack
    orchi_ring ready;
    uint32_t limit;         // the round ends when the ring's head is here
    uint32_t round;         // resumptions that this round was given
    uint32_t streak;        // calls in a row that needed no wait
    orchi_page none;        // a page that is full
    orchi_page *page;       // slots come from here; `none` at first
    orchi_page *pages_free; // then from here
    uint64_t generation;
    orchi_region *regions;
    size_t slots;              // in all pages
    struct orchi_trash *trash; // what this context is freeing, see orchi_retire
    bool stopping;
    struct orchi_inbox *inbox;
    struct orchi_letter *letters, *letters_last; // taken, and to be opened
    orch_future mail;                            // stands for them in the ready ring
    struct orch_remote *remotes;                 // that are out
    struct orchi_visit *visits;                  // tasks for another loop
    void (*wake_open)(orch_loop *loop);          // makes what wakes a sleeping loop
    orch_future *until; // orch_run: a turn does not sleep when this has settled
    int interrupted;    // orch_run: the signal that has cancelled it
    uint32_t quiet;     // waits for descriptors that are no work: that of orch_run for signals
    uint32_t children;  // processes that have not ended: a virtual clock stands still
    bool running;       // inside a turn
    orchi_timers timers;
    orchi_poller poller;
    orchi_context main;
    struct orchi_stack_map *maps;
    orchi_stack_pool pools[ORCHI_STACK_POOLS];
    uint32_t stack_log;               // the default size
    void *alternate;                  // signal stack
    uint64_t looked;                  // when the poller was last asked
    uint32_t told;                    // where in the ready ring the backlog of a look ends
    uint64_t offered;                 // guest mode: what was made since then has not been offered
    uint64_t look_cost;               // ns
    uint64_t now;                     // ns, of a virtual clock
    uint64_t ticked;                  // resumes when a virtual clock was last moved
    uint64_t random;                  // state of the generator
    uint64_t trimmed;                 // when idle stacks were last given back
    void (*join)(orch_future *f);     // cancels, and in a task waits for the end; set by >>task
    void (*on_wake)(orch_loop *loop); // see orchi_wake_watch
    void (*close)(orch_loop *loop);   // frees a loop that was kept for a result; set by >>run
    struct {
        void *(*fn)(void *arg);
        void *arg;
        orch_task *task;
    } call; // orch_on_main_stack
    orch_loop_desc desc;
    orch_loop_stats stats;
    orch_result outcome;           // orch_run: what keeps the loop alive
    uint32_t failed_iterations[2]; // as-completed iterations whose error was not read yet
    orch_future *quarantine[ORCHI_QUARANTINE];
    uint32_t quarantined;
};

// This thread's; the only state outside of loops but >>context's.
static __thread orch_loop *orchi_loop;

// ---- errors

typedef struct orchi_error {
    int code;
    const char *name, *text;
} orchi_error;

#define ORCHI_ERROR_ROW(name, value, text) {name, #name, text},
static const orchi_error orchi_errors[] = {ORCH_ERRORS(ORCHI_ERROR_ROW)};
#undef ORCHI_ERROR_ROW

// Rejected futures for when there is no memory, no loop, or no sense: one per code, never written.
#define ORCHI_STATIC_FUTURE(name, value, text)                                                     \
    {1, 0, ORCHI_DONE, 0, ORCHI_IMMORTAL, {{name, 0, NULL, NULL, NULL}}, {{NULL, 0}}},
static const orch_future orchi_static_futures[] = {ORCH_ERRORS(ORCHI_STATIC_FUTURE)};
#undef ORCHI_STATIC_FUTURE

static const orch_result orchi_no_element = {ORCH_ERANGE, 0, NULL, NULL, NULL};
orch_future orch_end_mark;

enum { ORCHI_ERROR_COUNT = sizeof orchi_errors / sizeof orchi_errors[0] };

/* A linear search: codes are looked up only to be shown, or when something has gone wrong. */
static const orchi_error *orchi_find_error(int code) {
    for (size_t i = 0; i < ORCHI_ERROR_COUNT; i++) {
        if (orchi_errors[i].code == code) return &orchi_errors[i];
    }
    return NULL;
}

const char *orch_error_text(int error) {
    const orchi_error *known = orchi_find_error(error);
    if (known != NULL) return known->text;
    if (error == 0) return "ok";
    if (error > 0) return "application error";
    const char *text = strerror(error > INT_MIN ? -error : INT_MAX);
    return strncmp(text, "Unknown error", 13) != 0 ? text
                                                   : "unknown error"; // libc's is no static text
}

const char *orch_error_name(int error) {
    const orchi_error *known = orchi_find_error(error);
    return known != NULL ? known->name : NULL;
}

/* The immortal future of a code. It is const, and only ever read: every write is behind a check of
 * references or of ORCHI_IMMORTAL. */
static orch_future *orchi_rejected(int error) {
    const orchi_error *known = orchi_find_error(error);
    return (orch_future *)(uintptr_t)&orchi_static_futures[known - orchi_errors];
}

/* By its address alone: what a member of a scope was may be gone. */
static bool orchi_is_static(const orch_future *f) {
    return (uintptr_t)f - (uintptr_t)orchi_static_futures < sizeof orchi_static_futures;
}

static const char *orchi_hint(int error) {
    if (error == ORCH_EINVAL) return ": something is NULL or out of range, see the contract";
    if (error == ORCH_EBUSY) return ": there is one at a time, see the contract";
    if (error == ORCH_ESCOPE)
        return ": close each once, innermost first, in the task that opened it";
    return error == ORCH_ENOTASK ? "; callbacks and hooks must not wait" : "";
}

/* Says what was done wrong. Debug builds stop there; release builds go on, and the caller returns
 * the error that its contract names. */
ORCHI_COLD static int orchi_misuse(const char *function, int error) {
    if (!ORCHI_DEBUG) return error;
    fprintf(stderr, "asyncorch: %s: %s%s\n", function, orch_error_text(error), orchi_hint(error));
    unsigned long long seed = orchi_loop != NULL ? orchi_loop->desc.seed : 0;
    if (seed != 0) fprintf(stderr, "asyncorch: the loop's seed is %llu\n", seed);
    orchi_print_backtrace();
    abort();
}

// ---- memory

/* malloc's family behind the allocator's one function. Others may want the old size. */
static void *orchi_default_resize(void *user, void *old, size_t old_size, size_t size) {
    (void)user;
    (void)old_size;
    if (size > 0) return realloc(old, size);
    free(old);
    return NULL;
}

enum { ORCHI_HUGE = 1 << 22 }; // bytes

/* What is large is asked to be in huge pages: a million new futures would else be 15,000 page
 * faults. At most one such page is there that is not needed yet, of 2 MiB where 4 and more are. */
#if ORCHI_OS_LINUX && defined(MADV_HUGEPAGE)
ORCHI_COLD static void orchi_advise_huge(void *memory, size_t size) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t start = ((uintptr_t)memory + page - 1) & ~(page - 1);
    uintptr_t end = ((uintptr_t)memory + size) & ~(page - 1);
    madvise((void *)start, end - start, MADV_HUGEPAGE);
}
#else
static void orchi_advise_huge(void *memory, size_t size) {
    (void)memory;
    (void)size;
}
#endif

/* All memory of a loop goes through these, so that an allocator in the desc sees it balance. */
static void *orchi_resize(orch_loop *loop, void *old, size_t old_size, size_t size) {
    void *memory = loop->desc.allocator.resize(loop->desc.allocator.user, old, old_size, size);
    if (ORCHI_UNLIKELY(size >= ORCHI_HUGE) && memory != NULL) orchi_advise_huge(memory, size);
    return memory;
}

/* Not zeroed: whoever makes an object says what is in it. */
static void *orchi_allocate(orch_loop *loop, size_t size) {
    return orchi_resize(loop, NULL, 0, size);
}

/* With the size that it was made with, for allocators that keep none. */
static void orchi_free(orch_loop *loop, void *memory, size_t size) {
    if (memory != NULL) orchi_resize(loop, memory, size, 0);
}

/* Doubles an array until it has room for `wanted` elements. */
static bool orchi_grow(orch_loop *loop, void **array, uint32_t *capacity, size_t wanted,
                       size_t size) {
    size_t next = *capacity > 0 ? *capacity : 16;
    while (next < wanted) next *= 2;
    if (next == *capacity) return true;
    if (next > UINT32_MAX / 2) return false;
    void *grown = orchi_resize(loop, *array, *capacity * size, next * size);
    if (grown == NULL) return false;
    *array = grown;
    *capacity = (uint32_t)next;
    return true;
}

// ---- time and chance

/* The loop's time in nanoseconds. */
static uint64_t orchi_now(const orch_loop *loop) {
    if (loop->desc.clock == ORCH_CLOCK_VIRTUAL) return loop->now;
    return loop->desc.now != NULL ? loop->desc.now(loop->desc.context) : orchi_clock();
}

uint64_t orch_now(void) {
    return (orchi_loop != NULL ? orchi_now(orchi_loop) : orchi_clock()) / 1000000u;
}

/* SplitMix64: one addition of state, so that any seed will do. */
static uint64_t orchi_random(orch_loop *loop) {
    uint64_t z = loop->random += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

uint64_t orch_random(void) {
    if (orchi_loop != NULL) return orchi_random(orchi_loop);
    orchi_misuse("orch_random", ORCH_ENOLOOP);
    return 0;
}

// ---- ready ring

/* Makes room for `wanted` futures. Positions are taken modulo the capacity, so what is queued
 * moves. Places not used yet are NULL, as orchi_pop reads ahead. */
static bool orchi_ring_reserve(orch_loop *loop, size_t wanted) {
    orchi_ring *ring = &loop->ready;
    size_t old = ring->items != NULL ? (size_t)ring->mask + 1 : 0, capacity = old > 0 ? old : 512;
    if (wanted <= old) return true;
    while (capacity < wanted) capacity *= 2;
    if (capacity > UINT32_MAX / 2) return false;
    orch_future **items = (orch_future **)orchi_allocate(loop, capacity * sizeof *items);
    if (items == NULL) return false;
    uint32_t count = old > 0 ? ring->tail - ring->head : 0;
    memset(items, 0, capacity * sizeof *items);
    for (uint32_t i = 0; i < count; i++) items[i] = ring->items[(ring->head + i) & ring->mask];
    orchi_free(loop, ring->items, old * sizeof *items);
    ring->items = items;
    ring->mask = (uint32_t)capacity - 1;
    loop->limit -= ring->head;
    loop->told -= ring->head;
    ring->head = 0;
    ring->tail = count;
    return true;
}

static void orchi_ring_free(orch_loop *loop) {
    orchi_free(loop, loop->ready.items, ((size_t)loop->ready.mask + 1) * sizeof(orch_future *));
}

/* Equal positions: the ring has room for every slot, so it is never full. */
static inline bool orchi_ring_empty(const orch_loop *loop) {
    return loop->ready.head == loop->ready.tail;
}

/* Queues what is not queued. */
static inline void orchi_enqueue(orch_loop *loop, orch_future *f) {
    orchi_ring *ring = &loop->ready;
    f->flags |= ORCHI_QUEUED;
    ring->items[ring->tail++ & ring->mask] = f;
}

/* Queues what has something to run. Once is enough: what it then does is the same. */
static inline void orchi_push(orch_loop *loop, orch_future *f) {
    if (!(f->flags & ORCHI_QUEUED)) orchi_enqueue(loop, f);
}

/* Only when the ring is not empty. */
static inline orch_future *orchi_front(const orch_loop *loop) {
    return loop->ready.items[loop->ready.head & loop->ready.mask];
}

/* Pops the front, which somebody has looked at. */
static inline void orchi_pop_front(orch_loop *loop, orch_future *front) {
    loop->ready.head++;
    front->flags &= (uint16_t)~ORCHI_QUEUED;
}

/* Pops the front. One further back is fetched, as a million ready futures are not in the cache. */
static inline orch_future *orchi_pop(orch_loop *loop) {
    const orchi_ring *ring = &loop->ready;
    orch_future *f = orchi_front(loop);
    orchi_pop_front(loop, f);
    __builtin_prefetch(ring->items[(ring->head + 3) & ring->mask], 1);
    return f;
}

// ---- slots

/* The page of a slot, from its address alone: this is how a future finds its loop. */
static orchi_page *orchi_page_of(const void *slot) {
    return (orchi_page *)((uintptr_t)slot & ~(uintptr_t)(ORCHI_PAGE - 1));
}

/* The head takes the place of one slot. */
static orch_future *orchi_page_slot(orchi_page *page, uint32_t i) {
    return (orch_future *)(void *)((char *)page + (size_t)ORCHI_SLOT * (i + 1));
}

#if ORCHI_ASAN
// The first word stays readable: tickets and consumed handles look at it by design.
static void orchi_poison(orch_future *f) {
    __asan_poison_memory_region((char *)f + 8, ORCHI_SLOT - 8);
}
static void orchi_unpoison(orch_future *f) { __asan_unpoison_memory_region(f, ORCHI_SLOT); }
static void orchi_unpoison_range(void *p, size_t n) { __asan_unpoison_memory_region(p, n); }
#else
static void orchi_poison(orch_future *f) { (void)f; }
static void orchi_unpoison(orch_future *f) { (void)f; }
static void orchi_unpoison_range(void *p, size_t n) {
    (void)p;
    (void)n;
}
#endif

/* Regions double from 4 pages to 1,024, so that small programs stay small, and large ones get huge
 * pages. */
static orchi_region *orchi_region_new(orch_loop *loop) {
    size_t count = loop->regions == NULL ? 4 : loop->regions->count * 2;
    if (count > 1024) count = 1024;
    size_t slots = loop->slots + count * ORCHI_PAGE_SLOTS;
    if (!orchi_ring_reserve(loop, slots + 1)) return NULL; // and `mail`
    size_t bytes = sizeof(orchi_region) + (count + 1) * ORCHI_PAGE;
    orchi_region *region = (orchi_region *)orchi_allocate(loop, bytes);
    if (region == NULL) return NULL;
    uintptr_t start = (uintptr_t)(region + 1) + ORCHI_PAGE - 1;
    region->pages = (char *)(start & ~(uintptr_t)(ORCHI_PAGE - 1));
    region->count = count;
    region->used = 0;
    region->bytes = bytes;
    region->next = loop->regions;
    loop->regions = region;
    loop->slots = slots;
    return region;
}

/* Slots come from this page now. It counts as listed, so that a free does not list it. */
static orchi_page *orchi_page_use(orch_loop *loop, orchi_page *page) {
    loop->page->listed = false;
    page->listed = true;
    return loop->page = page;
}

/* A page with a free slot, or NULL. */
ORCHI_COLD static orchi_page *orchi_page_next(orch_loop *loop) {
    orchi_page *page = loop->pages_free;
    if (page != NULL) {
        loop->pages_free = page->next;
        return orchi_page_use(loop, page);
    }
    orchi_region *region = loop->regions;
    if (region == NULL || region->used == region->count) region = orchi_region_new(loop);
    if (region == NULL) return NULL;
    page = (orchi_page *)(void *)(region->pages + ORCHI_PAGE * region->used++);
    page->loop = loop;
    page->next = NULL;
    page->free = NULL;
    page->fresh = 0;
    return orchi_page_use(loop, page);
}

/* A slot given back, else one never used; NULL when the page is full. */
static inline orch_future *orchi_page_take(orchi_page *page) {
    orch_future *f = page->free;
    if (ORCHI_LIKELY(f != NULL)) {
        page->free = (orch_future *)(uintptr_t)f->generation;
        return f;
    }
    return page->fresh < ORCHI_PAGE_SLOTS ? orchi_page_slot(page, page->fresh++) : NULL;
}

/* A slot when the current page has none: from another page, or NULL when out of memory. */
ORCHI_COLD static orch_future *orchi_slot_find(orch_loop *loop) {
    orchi_page *page = orchi_page_next(loop);
    return page != NULL ? orchi_page_take(page) : NULL;
}

/* Makes a slot live, with one reference. The kind's part is the caller's to fill. */
static inline void orchi_slot_begin(orch_loop *loop, orch_future *f, orchi_kind_id kind) {
    orchi_unpoison(f);
    uint64_t generation = loop->generation;
    loop->generation = generation + 2;
    f->generation = generation;
    f->references = 1; // with the next three one store of eight bytes
    f->kind = (uint8_t)kind;
    f->mark = 0;
    f->flags = 0;
}

/* A live slot, or NULL when out of memory. What is on a hot path tries orchi_page_take itself, as
 * that calls nothing, and leaves the rest to a function of its own: a function without a call needs
 * no frame. */
static inline orch_future *orchi_slot_new(orch_loop *loop, orchi_kind_id kind) {
    orch_future *f = orchi_page_take(loop->page);
    if (ORCHI_UNLIKELY(f == NULL)) f = orchi_slot_find(loop);
    if (ORCHI_UNLIKELY(f == NULL)) return NULL;
    orchi_slot_begin(loop, f, kind);
    return f;
}

/* The slot's first word becomes the link. A page that had nothing free is listed again. */
static void orchi_slot_recycle(orch_loop *loop, orch_future *f) {
    orchi_page *page = orchi_page_of(f);
    f->generation = (uint64_t)(uintptr_t)page->free;
    page->free = f;
    if (ORCHI_LIKELY(page->listed)) return;
    page->listed = true;
    page->next = loop->pages_free;
    loop->pages_free = page;
}

/* Debug builds keep freed slots back for a while, so that a use after consumption finds an even
 * generation and not somebody else's future. */
static void orchi_slot_quarantine(orch_loop *loop, orch_future *f) {
    orch_future **place = &loop->quarantine[loop->quarantined++ % ORCHI_QUARANTINE];
    orch_future *oldest = *place;
    *place = f;
    f->generation = 0;
    if (oldest != NULL) orchi_slot_recycle(loop, oldest);
}

// Three things may point to a slot that is given back: the ring, a box, and handles that nobody may
// use any more. The first two keep it from being reused, and free it when they come by. The third
// is a mistake, and is why the first word of a slot stays readable for ever.

/* Gives a slot back, unless the ring or a box still points to it: then the last of these does. */
static inline void orchi_slot_free(orch_loop *loop, orch_future *f) {
    if (ORCHI_UNLIKELY(f->flags & (ORCHI_QUEUED | ORCHI_BOXED))) {
        f->kind = ORCHI_DONE;
        f->references = 0;
        f->as.result = orch_ok(NULL, NULL); // its own has been taken
        return;
    }
    orchi_poison(f);
    if (ORCHI_DEBUG) orchi_slot_quarantine(loop, f);
    else orchi_slot_recycle(loop, f);
}

// 48 bytes for a layer, inside a slot of kind EXTRA.
static void *orchi_extra_new(orch_loop *loop) {
    orch_future *slot = orchi_slot_new(loop, ORCHI_EXTRA);
    if (slot == NULL) return NULL;
    slot->flags = ORCHI_WAITED; // no handle: orchi_handle_error
    return &slot->as;
}

/* What a layer kept in the slot is its own to release before. */
static void orchi_extra_free(orch_loop *loop, void *extra) {
    orchi_slot_free(loop, (orch_future *)(void *)((char *)extra - offsetof(orch_future, as)));
}

/* Calls visit for every live slot. Futures may be settled or freed, but not made, meanwhile. */
static void orchi_each_slot(orch_loop *loop, void (*visit)(orch_future *f, void *context),
                            void *context) {
    for (orchi_region *region = loop->regions; region != NULL; region = region->next) {
        for (size_t p = 0; p < region->used; p++) {
            orchi_page *page = (orchi_page *)(void *)(region->pages + ORCHI_PAGE * p);
            for (uint32_t i = 0; i < page->fresh; i++) {
                orch_future *f = orchi_page_slot(page, i);
                if (f->generation & 1) visit(f, context);
            }
        }
    }
}

/* Settled once is settled for ever: no kind from DONE on goes back. */
static bool orchi_settled(const orch_future *f) { return f->kind >= ORCHI_DONE; }

ORCH_PRINTF(2, 3) static void orchi_report(orch_loop *loop, const char *format, ...) {
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    loop->desc.on_report(line, loop->desc.context);
}

// ---- results

/* Messages come from malloc and not from a loop's allocator: a result may outlive every loop. */
static void orchi_message_release(void *text) { free(text); }

/* Without memory the error comes without its text, and orch_message shows that of its code. */
orch_result orch_failf(int error, const char *format, ...) {
    orch_result r = orch_fail(error);
    va_list arguments, again;
    va_start(arguments, format);
    va_copy(again, arguments);
    int length = vsnprintf(NULL, 0, format, arguments);
    char *text = length < 0 ? NULL : (char *)malloc((size_t)length + 1);
    if (text != NULL) {
        vsnprintf(text, (size_t)length + 1, format, again);
        r.value = r.owner = text;
        r.release = orchi_message_release;
    }
    va_end(again);
    va_end(arguments);
    return r;
}

// How a result is copied. A load is forwarded from a store that is still under way only when it
// lies within that store; else it waits until the store has reached the cache. Who wrote a result
// did so field by field (error and index, if they are constants, as one word), and who reads it
// next copies it in two halves, as struct copies are compiled. So it is read in words here, and
// written in halves.

#if UINTPTR_MAX == UINT64_MAX
typedef uint64_t orchi_word __attribute__((may_alias));
typedef uint64_t orchi_half __attribute__((vector_size(16), aligned(8), may_alias));

/* The words are read as what they are: of one type, gcc would join them to halves again. */
static inline void orchi_move(orch_result *to, const orch_result *from) {
    uint64_t decided = *(const orchi_word *)(const void *)&from->error;
    orchi_half first = {decided, (uintptr_t)from->value};
    orchi_half second = {(uintptr_t)from->owner, (uintptr_t)from->release};
    orchi_half *halves = (orchi_half *)(void *)to;
    halves[0] = first;
    halves[1] = second;
}
#else
static inline void orchi_move(orch_result *to, const orch_result *from) { *to = *from; }
#endif

/* Only a value that is its own owner can leave its result. What shows another's memory, as a share
 * or a list does, is released as a whole. */
void *orch_take(orch_result *r) {
    if (r == NULL || r->owner != r->value) return NULL;
    void *value = r->value;
    r->value = r->owner = NULL;
    r->release = NULL;
    return value;
}

/* Emptied before the release runs, as that may come back to this result. */
void orch_result_free(orch_result *r) {
    if (r == NULL) return;
    void (*release)(void *) = r->release;
    void *owner = r->owner;
    r->release = NULL;
    r->owner = r->value = NULL;
    if (release != NULL) release(owner);
}

// ------------------------------------------------------------------------------------------------
// >>context
//
// The switch and the stacks. Invariants:
//   - orchi_switch is assembly at file scope, a function the compiler cannot see into. gcc takes
//     inline assembly, even with a memory clobber, never to change a non-escaping static; a task's
//     change to one was then read stale. It keeps callee-saved registers, MXCSR and x87 control
//     word (FPCR, fcsr).
//   - Of the two control words, MXCSR is the dear one: on AMD's processors storing it is slow and
//     loading it is not, so it is stored only where a task is left that will go on, and loaded
//     always: a compare that saves the load costs more. What a task has set cannot be known
//     otherwise, and the ABI says that it keeps it.
//   - It is left by `ret`. That is predicted when the other task waits at the same place, as tasks
//     that run the same code do, and a new task is a call and a return to the processor too
//     (orchi_switch_start). A register jump is faster between two bare switches, but leaves the
//     call behind on the processor's return stack, and then every return up to the user's loop is
//     mispredicted. orchi_hop, for orch_yield, which returns straight to the user, jumps.
//   - Built for shadow stacks (CET) the assembly is used only while they are off; else ucontext,
//     which glibc makes right. So an object marked SHSTK never lies.
//   - Stacks are cut from maps. Under each lies a guard of 16 KiB or more: one page is jumped over
//     by a large frame. Linux 6.13 guards without a mapping of its own; qemu-user says it does and
//     does not, so each map's guard is tried. Tops are coloured, or all would fight for one cache
//     set.
//   - What is idle for a second is given back to the system, all but 64 stacks of each size.

#if defined(__aarch64__)
#define ORCHI_GUARD_BYTES ((size_t)65536) // gcc's -fstack-clash-protection relies on as much there
#else
#define ORCHI_GUARD_BYTES ((size_t)16384)
#endif
#define ORCHI_CANARY 0x6f726368u

enum { ORCHI_STACK_HEAD = 256 }; // above top, for the task's control block

#if ORCHI_OS_LINUX
#define ORCHI_MINCORE(vector) (vector)
#else
#define ORCHI_MINCORE(vector) ((char *)(vector))
#endif

struct orchi_stack {
    struct orchi_stack *next;
    char *bottom; // lowest usable byte
    char *top;    // coloured
    void *fiber;  // TSan
    uint32_t valgrind;
    uint8_t size_log;
};

// With this the control block begins, from the first task of a stack on. The hot ones are linked
// here and not in their records: a new task is then where the list says, without another load.
typedef struct orchi_stack_top {
    orchi_stack *stack;
    struct orchi_stack_top *colder; // used before this one
} orchi_stack_top;

// A map holds stacks one after the other, each with the guard that it grows towards:
//
//     | guard | bottom ... frames <- top | control block | colour | guard | bottom ...
//
// The control block lies above the first frame, mostly on the same page. The colour, 0 to 1920
// bytes, moves the tops of neighbours to different cache sets.

typedef struct orchi_stack_map {
    struct orchi_stack_map *next;
    char *base;
    size_t bytes;
    uint32_t count, size_log;
    bool canary;
} orchi_stack_map; // followed by count orchi_stack

#if ORCHI_OS_MACOS
#define ORCHI_SYMBOL(name) "_" name
#define ORCHI_FUNCTION(name) ".globl _" name "\n.private_extern _" name "\n.p2align 4\n_" name ":\n"
#define ORCHI_FUNCTION_END(name) ""
#else
#define ORCHI_SYMBOL(name) name
#define ORCHI_FUNCTION(name)                                                                       \
    ".globl " name "\n.hidden " name "\n.type " name ", %function\n.p2align 4\n" name ":\n"
#define ORCHI_FUNCTION_END(name) ".size " name ", .-" name "\n"
#endif

typedef struct orchi_entry { // where to go on
    void *sp;                // what to load
    intptr_t returns;        // what the call that was left there returns, if that was orch_yield
} orchi_entry;

typedef orchi_entry (*orchi_context_fn)(void *arg); // returns what to enter when it has ended

#if ORCHI_ASSEMBLY
/* Saves this point of execution in *save and enters `load`, which on x86-64 may have been left in
 * orch_yield: that returns `returns`. */
extern void orchi_switch(void **save, void *load, intptr_t returns);
/* Saves this point of execution in *save, calls fn(arg) on a new stack, and enters what it returns.
 * That is a call and a return to the processor too, which predicts both. The call frame information
 * says that there is nothing above, so a backtrace ends here. */
extern void orchi_switch_start(void **save, void *top, orchi_context_fn fn, void *arg);
#if defined(__x86_64__)
/* As orchi_switch with 0, from and to the same frames, but left by a jump. Returns what whoever
 * enters this point again says: `returns`. */
extern int orchi_hop(void **save, void *load);
#endif
#endif

// clang-format off
#if ORCHI_ASSEMBLY && defined(__x86_64__)
#define ORCHI_X64_SAVE \
    "    subq $56, %rsp\n" \
    "    stmxcsr (%rsp)\n" \
    "    fnstcw 4(%rsp)\n" \
    "    movq %r15, 8(%rsp)\n    movq %r14, 16(%rsp)\n    movq %r13, 24(%rsp)\n" \
    "    movq %r12, 32(%rsp)\n    movq %rbx, 40(%rsp)\n    movq %rbp, 48(%rsp)\n" \
    "    movq %rsp, (%rdi)\n"
#define ORCHI_X64_LOAD \
    "    movq 8(%rsi), %r15\n    movq 16(%rsi), %r14\n    movq 24(%rsi), %r13\n" \
    "    movq 32(%rsi), %r12\n    movq 40(%rsi), %rbx\n    movq 48(%rsi), %rbp\n" \
    "    leaq 56(%rsi), %rsp\n"
// Loading MXCSR is cheaper than reading back what stmxcsr stored; for fnstcw it is the other way
// round.
#define ORCHI_X64_CONTROL \
    "    movzwl 4(%rsp), %ecx\n" \
    "    ldmxcsr (%rsi)\n" \
    "    cmpw 4(%rsi), %cx\n" \
    "    jne 1f\n" \
    "2:\n"
#define ORCHI_X64_CONTROL_OTHER \
    "1:  fldcw 4(%rsi)\n" \
    "    jmp 2b\n"
__asm__(
    ".text\n"
    ORCHI_FUNCTION("orchi_switch")
    ".cfi_startproc\n"
    ORCHI_X64_SAVE
    ORCHI_X64_CONTROL
    "    movl %edx, %eax\n"
    ORCHI_X64_LOAD
    "    ret\n"
    ORCHI_X64_CONTROL_OTHER
    ".cfi_endproc\n"
    ORCHI_FUNCTION_END("orchi_switch")
    ORCHI_FUNCTION("orchi_hop")
    ".cfi_startproc\n"
    ORCHI_X64_SAVE
    ORCHI_X64_CONTROL
    "    xorl %eax, %eax\n"
    ORCHI_X64_LOAD
    "    popq %rcx\n"
    "    jmp *%rcx\n"
    ORCHI_X64_CONTROL_OTHER
    ".cfi_endproc\n"
    ORCHI_FUNCTION_END("orchi_hop")
    ORCHI_FUNCTION("orchi_switch_start")
    ".cfi_startproc\n"
    ORCHI_X64_SAVE
    "    movq %rsi, %rsp\n"
    "    movq %rcx, %rdi\n"
    "    xorl %ebp, %ebp\n"
    ".cfi_undefined rip\n"
    "    callq *%rdx\n"
    "    movq %rax, %rsi\n"
    "    ldmxcsr (%rsi)\n"               // what they were here does not matter any more
    "    fldcw 4(%rsi)\n"
    "    movl %edx, %eax\n"
    ORCHI_X64_LOAD
    "    ret\n"
    ".cfi_endproc\n"
    ORCHI_FUNCTION_END("orchi_switch_start")
);

#elif ORCHI_ASSEMBLY && defined(__aarch64__)
#define ORCHI_A64_SAVE \
    "    sub sp, sp, #176\n" \
    "    stp x19, x20, [sp]\n    stp x21, x22, [sp, #16]\n    stp x23, x24, [sp, #32]\n" \
    "    stp x25, x26, [sp, #48]\n    stp x27, x28, [sp, #64]\n    stp x29, x30, [sp, #80]\n" \
    "    stp d8, d9, [sp, #96]\n    stp d10, d11, [sp, #112]\n" \
    "    stp d12, d13, [sp, #128]\n    stp d14, d15, [sp, #144]\n" \
    "    mrs x9, fpcr\n" \
    "    str x9, [sp, #160]\n" \
    "    mov x10, sp\n" \
    "    str x10, [x0]\n"
__asm__(
    ".text\n"
    ORCHI_FUNCTION("orchi_switch")
    ".cfi_startproc\n"
    "    hint #34\n"                       // bti c
    ORCHI_A64_SAVE
    "2:  mov sp, x1\n"
    "    ldr x10, [sp, #160]\n"
    "    cmp x9, x10\n"
    "    b.eq 1f\n"
    "    msr fpcr, x10\n"
    "1:  ldp x19, x20, [sp]\n    ldp x21, x22, [sp, #16]\n    ldp x23, x24, [sp, #32]\n"
    "    ldp x25, x26, [sp, #48]\n    ldp x27, x28, [sp, #64]\n    ldp x29, x30, [sp, #80]\n"
    "    ldp d8, d9, [sp, #96]\n    ldp d10, d11, [sp, #112]\n"
    "    ldp d12, d13, [sp, #128]\n    ldp d14, d15, [sp, #144]\n"
    "    add sp, sp, #176\n"
    "    ret\n"
    ".cfi_endproc\n"
    ORCHI_FUNCTION_END("orchi_switch")
    ORCHI_FUNCTION("orchi_switch_start")
    ".cfi_startproc\n"
    "    hint #34\n"
    ORCHI_A64_SAVE
    "    mov sp, x1\n"
    "    mov x29, xzr\n"
    "    mov x0, x3\n"
    ".cfi_undefined x30\n"
    "    blr x2\n"
    "    mov x1, x0\n"
    "    mrs x9, fpcr\n"
    "    b 2b\n"
    ".cfi_endproc\n"
    ORCHI_FUNCTION_END("orchi_switch_start")
);

#elif ORCHI_ASSEMBLY
#if defined(__riscv_flen) && __riscv_flen >= 64
#define ORCHI_SAVE_FLOATS                                                                          \
    "    fsd fs0, 104(sp)\n    fsd fs1, 112(sp)\n    fsd fs2, 120(sp)\n    fsd fs3, 128(sp)\n"     \
    "    fsd fs4, 136(sp)\n    fsd fs5, 144(sp)\n    fsd fs6, 152(sp)\n    fsd fs7, 160(sp)\n"     \
    "    fsd fs8, 168(sp)\n    fsd fs9, 176(sp)\n    fsd fs10, 184(sp)\n    fsd fs11, 192(sp)\n"   \
    "    frcsr t0\n    sd t0, 200(sp)\n"
#define ORCHI_LOAD_FLOATS                                                                          \
    "    fld fs0, 104(sp)\n    fld fs1, 112(sp)\n    fld fs2, 120(sp)\n    fld fs3, 128(sp)\n"     \
    "    fld fs4, 136(sp)\n    fld fs5, 144(sp)\n    fld fs6, 152(sp)\n    fld fs7, 160(sp)\n"     \
    "    fld fs8, 168(sp)\n    fld fs9, 176(sp)\n    fld fs10, 184(sp)\n    fld fs11, 192(sp)\n"   \
    "    ld t0, 200(sp)\n    fscsr t0\n"
#else
#define ORCHI_SAVE_FLOATS ""
#define ORCHI_LOAD_FLOATS ""
#endif
#define ORCHI_RISCV_SAVE \
    "    addi sp, sp, -208\n" \
    "    sd ra, 0(sp)\n    sd s0, 8(sp)\n    sd s1, 16(sp)\n" \
    "    sd s2, 24(sp)\n    sd s3, 32(sp)\n" \
    "    sd s4, 40(sp)\n    sd s5, 48(sp)\n    sd s6, 56(sp)\n" \
    "    sd s7, 64(sp)\n    sd s8, 72(sp)\n" \
    "    sd s9, 80(sp)\n    sd s10, 88(sp)\n    sd s11, 96(sp)\n" \
    ORCHI_SAVE_FLOATS \
    "    sd sp, 0(a0)\n"
__asm__(
    ".text\n"
    ORCHI_FUNCTION("orchi_switch")
    ".cfi_startproc\n"
    ORCHI_RISCV_SAVE
    "1:  mv sp, a1\n"
    ORCHI_LOAD_FLOATS
    "    ld ra, 0(sp)\n    ld s0, 8(sp)\n    ld s1, 16(sp)\n    ld s2, 24(sp)\n    ld s3, 32(sp)\n"
    "    ld s4, 40(sp)\n    ld s5, 48(sp)\n    ld s6, 56(sp)\n"
    "    ld s7, 64(sp)\n    ld s8, 72(sp)\n"
    "    ld s9, 80(sp)\n    ld s10, 88(sp)\n    ld s11, 96(sp)\n"
    "    addi sp, sp, 208\n"
    "    ret\n"
    ".cfi_endproc\n"
    ORCHI_FUNCTION_END("orchi_switch")
    ORCHI_FUNCTION("orchi_switch_start")
    ".cfi_startproc\n"
    ORCHI_RISCV_SAVE
    "    mv sp, a1\n"
    "    mv a0, a3\n"
    "    li s0, 0\n"
    ".cfi_undefined ra\n"
    "    jalr a2\n"
    "    mv a1, a0\n"
    "    j 1b\n"
    ".cfi_endproc\n"
    ORCHI_FUNCTION_END("orchi_switch_start")
);
#endif
// clang-format on

// ucontext is the way that works everywhere, and what the assembly is tested against. It keeps a
// signal mask for each context, but a thread has only one: what a task has blocked must stay
// blocked when another runs. So the mask of now goes with every switch: one system call to read it,
// and the two that ucontext makes. There is no portable way to ask for less.

#if ORCHI_UCONTEXT
typedef struct orchi_start { // at the top of a new stack
    ucontext_t context;
    orchi_context_fn fn;
    void *arg;
} orchi_start;

static __thread orchi_start *orchi_starting; // makecontext passes only ints

/* A context to enter, with the signal mask of now. */
static ucontext_t *orchi_ucontext_load(void *load) {
    ucontext_t *context = (ucontext_t *)load;
    pthread_sigmask(SIG_SETMASK, NULL, &context->uc_sigmask);
    return context;
}

/* The first function of a stack. What its function returns is the next context to enter. */
static void orchi_ucontext_entry(void) {
    setcontext(orchi_ucontext_load(orchi_starting->fn(orchi_starting->arg).sp));
}

/* The start record lies on the new stack. */
static orchi_start *orchi_ucontext_prepare(void *bottom, void *top, orchi_context_fn fn,
                                           void *arg) {
    size_t bytes = (sizeof(orchi_start) + 63) / 64 * 64;
    orchi_start *start = (orchi_start *)(void *)((char *)top - bytes);
    start->fn = fn;
    start->arg = arg;
    getcontext(&start->context);
    start->context.uc_stack.ss_sp = bottom;
    start->context.uc_stack.ss_size = (size_t)((char *)start - (char *)bottom);
    start->context.uc_link = NULL;
    makecontext(&start->context, orchi_ucontext_entry, 0);
    return start;
}

/* The context of the stack that is left is a local: it lives as long as that sleeps. */
static ORCHI_INLINE void orchi_ucontext_start(void **save, void *bottom, void *top,
                                              orchi_context_fn fn, void *arg) {
    ucontext_t here;
    *save = &here;
    orchi_starting = orchi_ucontext_prepare(bottom, top, fn, arg);
    swapcontext(&here, &orchi_starting->context);
}

/* The saved context is a local: it lives on the stack that it describes, as long as that sleeps. */
static ORCHI_INLINE void orchi_ucontext_switch(void **save, void *load) {
    ucontext_t here;
    *save = &here;
    swapcontext(&here, orchi_ucontext_load(load));
}
#endif

#if ORCHI_CET && ORCHI_ASSEMBLY
static bool orchi_shadow_stack(void) { // rdssp is a no-op where shadow stacks are off
    uint64_t pointer = 0;
    __asm__ volatile("rdsspq %0" : "+r"(pointer));
    return pointer != 0;
}
static ORCHI_INLINE void orchi_start_raw(void **save, void *bottom, void *top, orchi_context_fn fn,
                                         void *arg) {
    if (orchi_shadow_stack()) orchi_ucontext_start(save, bottom, top, fn, arg);
    else orchi_switch_start(save, top, fn, arg);
}
static ORCHI_INLINE void orchi_switch_raw(void **save, void *load, intptr_t returns) {
    if (orchi_shadow_stack()) orchi_ucontext_switch(save, load);
    else orchi_switch(save, load, returns);
}
#elif ORCHI_ASSEMBLY
static ORCHI_INLINE void orchi_start_raw(void **save, void *bottom, void *top, orchi_context_fn fn,
                                         void *arg) {
    (void)bottom;
    orchi_switch_start(save, top, fn, arg);
}
static ORCHI_INLINE void orchi_switch_raw(void **save, void *load, intptr_t returns) {
    orchi_switch(save, load, returns);
}
#else
static ORCHI_INLINE void orchi_start_raw(void **save, void *bottom, void *top, orchi_context_fn fn,
                                         void *arg) {
    orchi_ucontext_start(save, bottom, top, fn, arg);
}
static ORCHI_INLINE void orchi_switch_raw(void **save, void *load, intptr_t returns) {
    (void)returns;
    orchi_ucontext_switch(save, load);
}
#endif

// ---- tools are told of every switch
//
// All of it is inlined, also without optimisation: a function that enters on one of TSan's fibers
// and leaves on another would put both call stacks wrong.

#if ORCHI_ASAN
static ORCHI_INLINE void orchi_tool_leave(orchi_context *from, orchi_context *to, bool ends) {
    __sanitizer_start_switch_fiber(ends ? NULL : &from->fake, to->bottom, to->size);
}
static ORCHI_INLINE void orchi_tool_enter(orchi_context *self) {
    __sanitizer_finish_switch_fiber(self->fake, NULL, NULL);
}
/* The first arrival on a stack; the main stack's bounds become known here. */
static void orchi_tool_begin(orchi_context *main) {
    const void *bottom = NULL;
    size_t size = 0;
    __sanitizer_finish_switch_fiber(NULL, &bottom, &size);
    if (main->bottom == NULL) {
        main->bottom = bottom;
        main->size = size;
    }
}
#elif ORCHI_TSAN
static ORCHI_INLINE void orchi_tool_leave(orchi_context *from, orchi_context *to, bool ends) {
    (void)from;
    (void)ends;
    __tsan_switch_to_fiber(to->fiber, 0);
}
static ORCHI_INLINE void orchi_tool_enter(orchi_context *self) { (void)self; }
static void orchi_tool_begin(orchi_context *main) { (void)main; }
#else
static ORCHI_INLINE void orchi_tool_leave(orchi_context *from, orchi_context *to, bool ends) {
    (void)from;
    (void)to;
    (void)ends;
}
static ORCHI_INLINE void orchi_tool_enter(orchi_context *self) { (void)self; }
static inline void orchi_tool_begin(orchi_context *main) { (void)main; }
#endif

#if ORCHI_ASAN || ORCHI_TSAN
static void orchi_tool_describe(orchi_context *c, orchi_stack *stack, char *top) {
    c->fake = NULL;
    c->bottom = stack->bottom;
    c->size = (size_t)(top - stack->bottom);
    c->fiber = stack->fiber;
}
#else
static inline void orchi_tool_describe(orchi_context *c, orchi_stack *stack, char *top) {
    (void)c;
    (void)stack;
    (void)top;
}
#endif

#if ORCHI_TSAN
static void *orchi_fiber_self(void) { return __tsan_get_current_fiber(); }
/* A fiber for a task. One cannot serve two: its count of calls goes up with each task, which never
 * returns from its first function. */
static void *orchi_fiber_renew(void *fiber) {
    if (fiber != NULL) __tsan_destroy_fiber(fiber);
    return __tsan_create_fiber(0);
}
static void orchi_fiber_free(void *fiber) {
    if (fiber != NULL) __tsan_destroy_fiber(fiber);
}
#else
static void *orchi_fiber_self(void) { return NULL; }
static inline void *orchi_fiber_renew(void *fiber) { return fiber; }
static void orchi_fiber_free(void *fiber) { (void)fiber; }
#endif

/* Valgrind is told of a stack by a client request: an instruction sequence that does nothing
 * outside it, with the arguments' address in a register (its manual, "The client request
 * mechanism"). Written out here, since its header is seldom installed. Returns what Valgrind says,
 * 0 outside it. */
// clang-format off
#if defined(__x86_64__)
static uintptr_t orchi_valgrind_request(const uintptr_t *arguments) {
    uintptr_t answer = 0;
    __asm__ volatile("rolq $3, %%rdi\n rolq $13, %%rdi\n rolq $61, %%rdi\n rolq $51, %%rdi\n"
                     "xchgq %%rbx, %%rbx"
                     : "+d"(answer) : "a"(arguments) : "cc", "memory");
    return answer;
}
#elif defined(__aarch64__)
static uintptr_t orchi_valgrind_request(const uintptr_t *arguments) {
    uintptr_t answer;
    __asm__ volatile("mov x3, #0\n mov x4, %1\n"
                     "ror x12, x12, #3\n ror x12, x12, #13\n"
                     "ror x12, x12, #51\n ror x12, x12, #61\n"
                     "orr x10, x10, x10\n mov %0, x3"
                     : "=r"(answer) : "r"(arguments) : "cc", "memory", "x3", "x4");
    return answer;
}
#else
static uintptr_t orchi_valgrind_request(const uintptr_t *arguments) {
    (void)arguments;
    return 0;
}
#endif
// clang-format on

enum { ORCHI_VALGRIND_REGISTER = 0x1501, ORCHI_VALGRIND_DEREGISTER = 0x1502 };

/* Returns the number by which it is taken back. That has to be done: of two registrations of the
 * same memory, the one of a stack that is gone may be the one that Valgrind goes by. */
static uint32_t orchi_valgrind_stack(char *bottom, char *top) {
    uintptr_t arguments[6] = {ORCHI_VALGRIND_REGISTER, (uintptr_t)bottom, (uintptr_t)top, 0, 0, 0};
    return (uint32_t)orchi_valgrind_request(arguments);
}

static void orchi_valgrind_stack_gone(uint32_t id) {
    uintptr_t arguments[6] = {ORCHI_VALGRIND_DEREGISTER, id, 0, 0, 0, 0};
    orchi_valgrind_request(arguments);
}

/* What lies below the stack pointer of the last task here, but for 128 bytes, is out of bounds for
 * memcheck, and it sees a switch to a lower one as no push. So what is to be above the new one, and
 * 128 bytes below it, are opened (MAKE_MEM_UNDEFINED). */
enum { ORCHI_MEMCHECK_UNDEFINED = 0x4d430001, ORCHI_MEMCHECK_BELOW = 128 };

static void orchi_valgrind_lower(const char *sp, size_t above) {
    uintptr_t from = (uintptr_t)sp - ORCHI_MEMCHECK_BELOW;
    uintptr_t arguments[6] = {
        ORCHI_MEMCHECK_UNDEFINED, from, above + ORCHI_MEMCHECK_BELOW, 0, 0, 0};
    orchi_valgrind_request(arguments);
}

/* Leaves `from` and enters `to`. Returns when somebody enters `from`. */
static ORCHI_INLINE void orchi_context_switch(orchi_context *from, orchi_context *to,
                                              intptr_t returns) {
    orchi_tool_leave(from, to, false);
    orchi_switch_raw(&from->sp, to->sp, returns);
    orchi_tool_enter(from);
}

#if ORCHI_TSAN
/* Leaves for good at once: TSan counts returns, and they must not be the next fiber's. */
static orchi_entry orchi_context_end(orchi_context *from, orchi_context *to, intptr_t returns) {
    orchi_entry nowhere = {NULL, 0};
    orchi_context_switch(from, to, returns);
    return nowhere;
}
#else
/* Leaves `from` for good: its first function returns what this returns. */
static inline orchi_entry orchi_context_end(orchi_context *from, orchi_context *to,
                                            intptr_t returns) {
    orchi_entry entry = {to->sp, returns};
    orchi_tool_leave(from, to, true);
    return entry;
}
#endif

/* Leaves `from` and calls fn(arg) on a new stack below top; fn ends with orchi_context_end. */
static ORCHI_INLINE void orchi_context_start(orchi_context *from, orchi_context *to,
                                             orchi_stack *stack, char *top, orchi_context_fn fn,
                                             void *arg) {
    orchi_tool_describe(to, stack, top);
    orchi_tool_leave(from, to, false);
    orchi_start_raw(&from->sp, stack->bottom, top, fn, arg);
    orchi_tool_enter(from);
}

// ---- stacks

#if ORCHI_OS_LINUX
enum { ORCHI_MADV_GUARD_INSTALL = 102 };
static bool orchi_guard_madvise(char *start) {
    return madvise(start, ORCHI_GUARD_BYTES, ORCHI_MADV_GUARD_INSTALL) == 0;
}
#else
static bool orchi_guard_madvise(char *start) {
    (void)start;
    return false;
}
#endif

/* Whether a page is really out of bounds: the kernel refuses to write to it. An emulator that
 * swallows the request to guard it lets the write through. */
static bool orchi_guard_holds(char *start) {
    int before = errno;
    bool holds = uname((struct utsname *)(void *)start) != 0 && errno == EFAULT;
    errno = before;
    return holds;
}

/* Guards one stack as well as the loop has seen it can be done; the first of a map is tried. */
static orch_guard orchi_guard_install(orch_loop *loop, char *start, bool try_it) {
    bool hope = loop->stats.guard == ORCH_GUARD_UNKNOWN || loop->stats.guard == ORCH_GUARD_MADVISE;
    if (hope && orchi_guard_madvise(start) && (!try_it || orchi_guard_holds(start))) {
        return ORCH_GUARD_MADVISE;
    }
    if (mprotect(start, ORCHI_GUARD_BYTES, PROT_NONE) == 0) return ORCH_GUARD_MPROTECT;
    return ORCH_GUARD_CANARY;
}

/* Remembers the weakest guard, as that is what a program can rely on. */
static void orchi_guard_note(orch_loop *loop, orch_guard level) {
    if (loop->stats.guard == ORCH_GUARD_UNKNOWN || level < loop->stats.guard) {
        loop->stats.guard = level;
    }
}

// How a stack gets about:
//
//     clean    mapped, never touched or given back: costs address space only
//     used     a task's
//     hot      given back by a task that has ended, its pages still there; the next task takes the
//              one that was used last, as that is in the cache
//
// Once a second, before the loop sleeps, what was never needed in that second moves from hot to
// clean: the least that hot_count has been since then says how many that are. A peak of tasks does
// not hold its memory for ever, and a steady load never pays for a page fault twice.
//
// Left out: growing stacks (a copy would break every pointer into them), and segmented ones (each
// call would have to look). A page that is not touched is not there: that is most of what these
// would bring. And huge pages: with a thousand busy connections the lookup of each one's page
// is what an echo server pays for tasks, but each stack would be there as a whole.

/* The records stand behind the map's own, outside the stacks: a stack that is not used is not
 * touched. */
static orchi_stack *orchi_map_stacks(orchi_stack_map *map) {
    return (orchi_stack *)(void *)(map + 1);
}

/* From one stack to the next: its guard, then its bytes. */
static size_t orchi_map_stride(const orchi_stack_map *map) {
    return ((size_t)1 << map->size_log) + ORCHI_GUARD_BYTES;
}

static size_t orchi_map_record(uint32_t count) {
    return sizeof(orchi_stack_map) + count * sizeof(orchi_stack);
}

/* 16 stacks at first, then maps of up to 256 or 16 MiB. */
static uint32_t orchi_map_count(const orchi_stack_pool *pool, uint32_t size_log) {
    uint32_t count = pool->made == 0 ? 16 : 256;
    while (count > 1 && ((uint64_t)count << size_log) > ((uint64_t)16 << 20)) count /= 2;
    return count;
}

/* Makes a map's stacks, from the last to the first, so that the first is taken first. */
static void orchi_map_cut(orch_loop *loop, orchi_stack_map *map, orchi_stack_pool *pool) {
    size_t stride = orchi_map_stride(map);
    for (uint32_t i = map->count; i-- > 0;) {
        orchi_stack *stack = orchi_map_stacks(map) + i;
        char *start = map->base + i * stride;
        size_t colour = (size_t)(i % 16) * 128;
        stack->bottom = start + ORCHI_GUARD_BYTES;
        stack->top = start + stride - ORCHI_STACK_HEAD - colour;
        stack->size_log = (uint8_t)map->size_log;
        stack->fiber = NULL;
        stack->next = pool->clean;
        pool->clean = stack;
        orch_guard level = orchi_guard_install(loop, start, i + 1 == map->count);
        orchi_guard_note(loop, level);
        map->canary = map->canary || level == ORCH_GUARD_CANARY;
        stack->valgrind = orchi_valgrind_stack(stack->bottom, start + stride);
    }
}

/* NORESERVE: a stack costs address space until it is touched. */
static bool orchi_map_new(orch_loop *loop, orchi_stack_pool *pool, uint32_t size_log) {
    uint32_t count = orchi_map_count(pool, size_log);
    orchi_stack_map *map = (orchi_stack_map *)orchi_allocate(loop, orchi_map_record(count));
    if (map == NULL) return false;
    map->count = count;
    map->size_log = size_log;
    map->canary = false;
    map->bytes = count * orchi_map_stride(map);
    void *base = mmap(NULL, map->bytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        orchi_free(loop, map, orchi_map_record(count));
        return false;
    }
    map->base = (char *)base;
    map->next = loop->maps;
    loop->maps = map;
    pool->made += count;
    loop->stats.stacks += count;
    orchi_map_cut(loop, map, pool);
    return true;
}

/* All stacks at once. No task runs any more. */
static void orchi_maps_free(orch_loop *loop) {
    while (loop->maps != NULL) {
        orchi_stack_map *map = loop->maps;
        loop->maps = map->next;
        for (uint32_t i = 0; i < map->count; i++) {
            orchi_fiber_free(orchi_map_stacks(map)[i].fiber);
            orchi_valgrind_stack_gone(orchi_map_stacks(map)[i].valgrind);
        }
        munmap(map->base, map->bytes);
        orchi_free(loop, map, orchi_map_record(map->count));
    }
}

/* The exponent of a stack size, 0 when it is out of range. */
static uint32_t orchi_stack_log(size_t size) {
    if (size < (size_t)1 << ORCHI_STACK_MIN_LOG || size > (size_t)1 << ORCHI_STACK_MAX_LOG)
        return 0;
    uint32_t size_log = ORCHI_STACK_MIN_LOG;
    while (((size_t)1 << size_log) < size) size_log++;
    return size_log;
}

/* One that was not used yet, or has given its memory back. */
ORCHI_COLD static orchi_stack_top *orchi_stack_take_clean(orch_loop *loop, uint32_t size_log) {
    orchi_stack_pool *pool = &loop->pools[size_log - ORCHI_STACK_MIN_LOG];
    if (pool->clean == NULL && !orchi_map_new(loop, pool, size_log)) return NULL;
    orchi_stack *stack = pool->clean;
    orchi_stack_top *top = (orchi_stack_top *)(void *)stack->top;
    pool->clean = stack->next;
    orchi_unpoison_range(top, sizeof *top); // frames of a map that lay here before
    top->stack = stack;
    return top;
}

/* A stack of 2^size_log bytes, the hottest first; NULL when out of memory. */
static inline orchi_stack_top *orchi_stack_take(orch_loop *loop, uint32_t size_log) {
    orchi_stack_pool *pool = &loop->pools[size_log - ORCHI_STACK_MIN_LOG];
    orchi_stack_top *top = pool->hot;
    if (ORCHI_LIKELY(top != NULL)) {
        pool->hot = top->colder;
        if (--pool->hot_count < pool->low) pool->low = pool->hot_count;
    } else if ((top = orchi_stack_take_clean(loop, size_log)) == NULL) {
        return NULL;
    }
    top->stack->fiber = orchi_fiber_renew(top->stack->fiber);
    orchi_unpoison_range(top->stack->bottom, (size_t)1 << size_log);
    return top;
}

/* The stack goes on top of the hot ones. The task that gives it may still be running on it: nobody
 * takes it before that has been left. */
static void orchi_stack_give(orch_loop *loop, orchi_stack_top *top) {
    orchi_stack_pool *pool = &loop->pools[top->stack->size_log - ORCHI_STACK_MIN_LOG];
    top->colder = pool->hot;
    pool->hot = top;
    pool->hot_count++;
}

enum { ORCHI_HOT_STACKS = 64 };
static const uint64_t ORCHI_TRIM_NS = 1000000000u;

/* Gives `count` stacks' memory back to the system. The coldest are at the list's end. */
static void orchi_pool_trim(orchi_stack_pool *pool, uint32_t count) {
    orchi_stack_top **place = &pool->hot;
    for (uint32_t keep = pool->hot_count - count; keep > 0; keep--) place = &(*place)->colder;
    orchi_stack_top *top = *place;
    *place = NULL;
    pool->hot_count -= count;
    while (top != NULL) {
        orchi_stack *stack = top->stack;
        top = top->colder; // while it is still there
        madvise(stack->bottom, (size_t)1 << stack->size_log, MADV_DONTNEED);
        stack->next = pool->clean;
        pool->clean = stack;
    }
}

/* Before the loop sleeps: what no task has used for a second is given back. Returns how long the
 * loop may sleep at most, so that this is not forgotten. */
static uint64_t orchi_stacks_idle(orch_loop *loop, uint64_t now) {
    bool due = now - loop->trimmed >= ORCHI_TRIM_NS;
    bool more = false;
    for (int i = 0; i < ORCHI_STACK_POOLS; i++) {
        orchi_stack_pool *pool = &loop->pools[i];
        if (due && pool->low > ORCHI_HOT_STACKS) {
            orchi_pool_trim(pool, pool->low - ORCHI_HOT_STACKS);
        }
        if (due) pool->low = pool->hot_count;
        more = more || pool->hot_count > ORCHI_HOT_STACKS;
    }
    if (due) loop->trimmed = now;
    return more ? ORCHI_TRIM_NS : UINT64_MAX;
}

/* Bytes of a stack that have memory behind them, from its top. */
static size_t orchi_stack_touched(const orchi_stack *stack) {
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    size_t size = (size_t)1 << stack->size_log;
    for (size_t offset = 0; offset < size; offset += page) {
        unsigned char resident = 0;
        if (mincore(stack->bottom + offset, page, ORCHI_MINCORE(&resident)) != 0 ||
            (resident & 1)) {
            return size - offset;
        }
    }
    return 0;
}

/* The canary is the last word that a growing stack reaches. Checking it costs a load for each wait,
 * so it is used only where nothing better could be had. */
static void orchi_canary_set(orchi_stack *stack) {
    *(uint32_t *)(void *)stack->bottom = ORCHI_CANARY;
}

static bool orchi_canary_lives(const orchi_stack *stack) {
    return *(const uint32_t *)(const void *)stack->bottom == ORCHI_CANARY;
}

// ------------------------------------------------------------------------------------------------
// >>poller
//
// One contract for every way to ask the system which descriptors are ready:
//   open, close   make and free what the poller needs
//   update        look for the events that a descriptor is waited for (see orchi_wanted); `exact`:
//                 and for no others. An error code, 0, or ORCHI_ALWAYS
//   wait          sleep for at most `ns` (UINT64_MAX: without limit) and leave what is ready in
//                 `found`; an interruption by a signal counts as nothing ready
// Events are ORCH_READABLE and ORCH_WRITABLE, and ORCHI_BAD_FD for a descriptor that is none.
// Readiness is level-triggered. Nothing of the user's runs inside wait: what was found is told to
// the waiters after it, see orchi_poll. poll(2) is the reference: arming costs no system call.

enum { ORCHI_ALWAYS = 1 }; // update: the system cannot look for it, as a file is always ready
enum { ORCHI_BAD_FD = 4, ORCHI_BOTH = ORCH_READABLE | ORCH_WRITABLE };

// Left out: edge-triggered readiness. It saves an update for each wait, but one byte left unread
// would hang a connection, and poll(2) has no such thing. Left out as well: a descriptor's own
// object. The table of watches, by number, is all the state there is, and it dies with the loop.

typedef struct orchi_poller_ops {
    orch_poller id;
    int (*open)(orch_loop *loop);
    void (*close)(orch_loop *loop);
    int (*update)(orch_loop *loop, int fd, bool exact);
    int (*wait)(orch_loop *loop, uint64_t ns);
} orchi_poller_ops;

/* What a descriptor is waited for, in all. */
static inline int orchi_wanted(const orchi_watch *watch) {
    return (watch->reader != NULL || (watch->hints & ORCHI_WAKE) ? ORCH_READABLE : 0) |
           (watch->writer != NULL ? ORCH_WRITABLE : 0);
}

/* Makes room for what a look may find. */
static bool orchi_found_reserve(orch_loop *loop, size_t wanted) {
    orchi_poller *p = &loop->poller;
    void *found = p->found;
    if (ORCHI_LIKELY(wanted <= p->found_capacity)) return true;
    if (!orchi_grow(loop, &found, &p->found_capacity, wanted, sizeof *p->found)) return false;
    p->found = (orchi_found *)found;
    return true;
}

/* Nothing is armed in a set that is closed. */
static inline void orchi_watches_disarm(orchi_poller *p) {
    for (size_t i = 0; i < p->watch_count; i++) p->watches[i].armed = 0;
}

/* There is room: it was made when the descriptor was armed, so that a look never allocates. */
static void orchi_found_add(orchi_poller *p, int fd, int events) {
    orchi_found *found = &p->found[p->found_count++];
    found->fd = fd;
    found->events = events;
}

/* For the statistics, and to judge the poller by. Before each look. */
static inline void orchi_look_count(orch_loop *loop, uint32_t count) {
    loop->stats.polls++;
    loop->poller.looked_at += count;
}

// ---- poll(2)

#if ORCHI_GNU
static int orchi_poll_call(struct pollfd *fds, nfds_t count, uint64_t ns) {
    struct timespec timeout = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
    return ppoll(fds, count, ns == UINT64_MAX ? NULL : &timeout, NULL);
}
#else
static int orchi_poll_call(struct pollfd *fds, nfds_t count, uint64_t ns) {
    uint64_t ms = ns / 1000000u + (ns % 1000000u != 0);
    return poll(fds, count, ns == UINT64_MAX ? -1 : ms > INT_MAX ? INT_MAX : (int)ms);
}
#endif

static int orchi_poll_open(orch_loop *loop) {
    (void)loop; // the array is made when it is needed
    return 0;
}

/* Positions are those of this array, and go with it. */
static void orchi_poll_close(orch_loop *loop) {
    orchi_poller *p = &loop->poller;
    orchi_free(loop, p->fds, p->capacity * sizeof *p->fds);
    p->fds = NULL;
    p->capacity = p->muted = p->seen = p->pass = 0;
    p->dense = false;
    for (size_t i = 0; i < p->watch_count; i++) p->watches[i].position = 0;
}

// The array has parts, what is muted and what is looked at, of which this pass has seen some:
//
//     | muted ... | seen ... | to be seen ... | new ... |
//                 muted      seen             pass      count
//
// Who is told that a descriptor is ready mostly waits for it again before the next look. So an
// event leaves the entry in the array and only mutes it. It stays muted until all that were told
// have had their turn, also when it is waited for again: whoever is found sooner comes after them
// all the same. Then what is waited for is looked at again; where all of a thousand connections are
// busy, nothing moves for that. And looks between the rounds, which would else take as long as a
// tenth of the work, are short. What nobody waits for is swept out when it is more than half of
// all. A muted entry has events only if it is waited for again.
//
// So who had an event comes first, and who is idle last. The system has to prepare for being woken
// by each descriptor up to the first that is ready, which takes longer than the look itself.
//
// A look sees all, and a pass is one look. But where a look of an idle loop has found a quarter of
// many ready, the next pass goes in portions: 64 are looked at, and those found have their turn,
// before the next 64 are. What the system had to fetch to see that a descriptor is ready is then
// still in the cache when its turn comes. Nothing waits longer for it: who is seen in a later
// portion would have had a later turn. A portion in which fewer than a quarter are ready is the
// last one, and before the loop sleeps it looks at all.

/* How many are looked at. */
static uint32_t orchi_poll_heard(const orchi_poller *p) { return p->count - p->muted; }

static void orchi_poll_swap(orchi_poller *p, uint32_t a, uint32_t b) {
    if (ORCHI_LIKELY(a == b)) return;
    struct pollfd entry = p->fds[a];
    p->fds[a] = p->fds[b];
    p->fds[b] = entry;
    p->watches[p->fds[a].fd].position = a + 1;
    p->watches[p->fds[b].fd].position = b + 1;
}

/* Becomes the last of the muted ones. */
static void orchi_poll_mute(orchi_poller *p, uint32_t at) { orchi_poll_swap(p, at, p->muted++); }

/* The last of the muted ones becomes the first that is looked at. */
static void orchi_poll_hear(orchi_poller *p, uint32_t at) { orchi_poll_swap(p, at, --p->muted); }

/* Goes to the end, past every part, and is cut off: the last of each part changes places with it,
 * and so stays in its part. */
static void orchi_poll_remove(orchi_poller *p, orchi_watch *watch) {
    if (watch->position <= p->muted) orchi_poll_hear(p, watch->position - 1);
    if (watch->position <= p->seen) orchi_poll_swap(p, watch->position - 1, --p->seen);
    if (watch->position <= p->pass) orchi_poll_swap(p, watch->position - 1, --p->pass);
    orchi_poll_swap(p, watch->position - 1, --p->count);
    watch->position = 0;
}

/* A new pass: all that is waited for is looked at again. From the last on: what changes places with
 * it stays muted. */
static void orchi_poll_unmute(orchi_poller *p) {
    for (uint32_t i = p->muted; i-- > 0;) {
        if (p->fds[i].events != 0) orchi_poll_hear(p, i);
    }
    p->seen = p->muted;
    p->pass = p->count;
}

/* From the last on as well. */
static void orchi_poll_sweep(orchi_poller *p) {
    for (uint32_t i = p->muted; i-- > 0;) {
        if (p->fds[i].events == 0) orchi_poll_remove(p, &p->watches[p->fds[i].fd]);
    }
}

/* A new entry, at the end. */
static bool orchi_poll_add(orch_loop *loop, int fd, orchi_watch *watch) {
    orchi_poller *p = &loop->poller;
    void *fds = p->fds;
    if (!orchi_found_reserve(loop, p->count + 1u)) return false;
    if (!orchi_grow(loop, &fds, &p->capacity, p->count + 1u, sizeof *p->fds)) return false;
    p->fds = (struct pollfd *)fds;
    p->fds[p->count].fd = fd;
    p->fds[p->count].revents = 0;
    watch->position = ++p->count;
    return true;
}

/* Arming and disarming touch only the array. */
static int orchi_poll_update(orch_loop *loop, int fd, bool exact) {
    orchi_poller *p = &loop->poller;
    orchi_watch *watch = &p->watches[fd];
    int events = orchi_wanted(watch);
    if (events == 0) {
        if (exact && watch->position != 0) orchi_poll_remove(p, watch);
        return 0;
    }
    if (watch->position == 0 && !orchi_poll_add(loop, fd, watch)) return ORCH_ENOMEM;
    p->fds[watch->position - 1].events =
        (short)((events & ORCH_READABLE ? POLLIN : 0) | (events & ORCH_WRITABLE ? POLLOUT : 0));
    return 0;
}

/* Errors and hang-ups wake both directions, since either call would report them at once. */
static int orchi_poll_events(short revents) {
    if (ORCHI_LIKELY(revents == POLLIN)) return ORCH_READABLE;
    if (revents & POLLNVAL) return ORCHI_BAD_FD;
    int both = revents & (POLLERR | POLLHUP) ? ORCHI_BOTH : 0;
    return both | (revents & (POLLIN | POLLPRI) ? ORCH_READABLE : 0) |
           (revents & POLLOUT ? ORCH_WRITABLE : 0);
}

/* An entry that has an event is found, and muted. */
static inline void orchi_poll_found(orchi_poller *p, uint32_t at, short revents) {
    orchi_found_add(p, p->fds[at].fd, orchi_poll_events(revents));
    p->fds[at].events = 0;
    orchi_poll_mute(p, at);
}

/* Looks at `count` entries and finds those that have something; returns how many, or an error. The
 * array is read to the last of them: what is muted there changes places with what was read. */
static int orchi_poll_look(orch_loop *loop, uint32_t from, uint32_t count, uint64_t ns) {
    orchi_poller *p = &loop->poller;
    struct pollfd *first = from > 0 ? p->fds + from : p->fds; // there may be no array yet
    orchi_look_count(loop, count);
    int found = orchi_poll_call(first, count, ns);
    if (found < 0) return errno == EINTR ? 0 : -errno;
    for (uint32_t at = from, left = (uint32_t)found; left > 0; at++) {
        short revents = p->fds[at].revents;
        if (revents == 0) continue;
        left--;
        orchi_poll_found(p, at, revents);
    }
    return found;
}

enum { ORCHI_PORTION = 64 };

/* Whether there is a next portion. */
static bool orchi_poll_passing(const orchi_poller *p) { return p->dense && p->seen < p->pass; }

/* Whether it was a quarter. */
static bool orchi_poll_many(int found, uint32_t looked_at) {
    return (int64_t)found * 4 >= (int64_t)looked_at;
}

/* The next portion, without waiting. Returns how many are ready, or an error. */
static int orchi_poll_portion(orch_loop *loop) {
    orchi_poller *p = &loop->poller;
    uint32_t from = p->seen, left = p->pass - from;
    uint32_t count = left < ORCHI_PORTION ? left : (uint32_t)ORCHI_PORTION;
    int found = orchi_poll_look(loop, from, count, 0);
    p->seen = from + count;
    p->dense = orchi_poll_many(found, count);
    return found;
}

/* All that is not muted. Only in an idle loop that says how many are ready: else those that were
 * found before have not had their turn. */
static int orchi_poll_all(orch_loop *loop, uint64_t ns, bool idle) {
    orchi_poller *p = &loop->poller;
    uint32_t count = orchi_poll_heard(p);
    int found = orchi_poll_look(loop, p->muted, count, ns);
    p->seen = p->pass = p->count;
    if (idle) p->dense = count > 2 * ORCHI_PORTION && orchi_poll_many(found, count);
    return found;
}

/* Who is asleep looks at all. */
static int orchi_poll_wait(orch_loop *loop, uint64_t ns) {
    orchi_poller *p = &loop->poller;
    bool idle = orchi_ring_empty(loop);
    if (idle && orchi_poll_passing(p)) {
        int found = orchi_poll_portion(loop);
        if (found != 0) return found < 0 ? found : 0;
        orchi_poll_unmute(p);
    }
    if (idle && p->muted > p->count / 2) orchi_poll_sweep(p);
    int found = orchi_poll_all(loop, ns, idle);
    return found < 0 ? found : 0;
}

static const orchi_poller_ops orchi_poll_ops = {ORCH_POLLER_POLL, orchi_poll_open, orchi_poll_close,
                                                orchi_poll_update, orchi_poll_wait};

// ---- epoll
//
// An interest that is changed costs a system call, so it is changed as seldom as can be:
//
//     own descriptors      stay armed after an event. The next wait costs nothing, as long as it is
//                          for the same direction. An event that nobody waits for disarms them when
//                          the loop has nothing else to do; while it has, the waiter's turn may not
//                          have come yet
//     others               may be closed by anybody at any time (a client library's sockets), and
//                          the kernel forgets them then without a word. So each wait arms them
//                          anew, for one event: a descriptor that is new is noticed by that
//
// The kernel's entry belongs to the open file and not to the number: it lives on with a duplicate
// after the number was closed. orch_close takes it out first. Where somebody else closed it, the
// event of an entry of an earlier generation is dropped, and the entry taken out by making a new
// set, since no number leads to it any more. What cannot be saved: a wait for a descriptor that
// somebody else closes stays until it is cancelled, where poll(2) would report -EBADF; and an own
// descriptor closed with close() whose number then goes to one that is not own.

#if ORCHI_OS_LINUX

enum { ORCHI_EPOLL_OWN = 1 << 16 }; // in an event's data, above the generation

/* Makes room for one more, both for the kernel's events and for what is made of them. */
static bool orchi_epoll_reserve(orch_loop *loop) {
    orchi_poller *p = &loop->poller;
    size_t wanted = p->count + 1u;
    return orchi_found_reserve(loop, wanted) &&
           orchi_grow(loop, &p->events, &p->event_capacity, wanted, sizeof(struct epoll_event));
}

/* Also after half an open: what is not there is not closed. */
static void orchi_epoll_close(orch_loop *loop) {
    orchi_poller *p = &loop->poller;
    if (p->queue >= 0) close(p->queue); // in a child its own copy
    orchi_free(loop, p->events, p->event_capacity * sizeof(struct epoll_event));
    p->events = NULL;
    p->event_capacity = 0;
    orchi_watches_disarm(p);
}

static int orchi_epoll_open(orch_loop *loop) {
    orchi_poller *p = &loop->poller;
    p->owner = getpid();
    p->queue = epoll_create1(EPOLL_CLOEXEC);
    int error = p->queue < 0 ? -errno : orchi_epoll_reserve(loop) ? 0 : ORCH_ENOMEM;
    if (error != 0) orchi_epoll_close(loop);
    return error;
}

/* What the event will bring back: the number, and above it whose it was, see orchi_epoll_note. */
static int orchi_epoll_control(orchi_poller *p, int operation, int fd, int events) {
    const orchi_watch *watch = &p->watches[fd];
    bool own = (watch->hints & ORCHI_OWN) != 0;
    struct epoll_event event;
    memset(&event, 0, sizeof event);
    if (events & ORCH_READABLE) event.events |= EPOLLIN;
    if (events & ORCH_WRITABLE) event.events |= EPOLLOUT;
    if (!own) event.events |= EPOLLONESHOT;
    uint64_t high = watch->generation | (own ? (uint64_t)ORCHI_EPOLL_OWN : 0);
    event.data.u64 = high << 32 | (uint32_t)fd;
    return epoll_ctl(p->queue, operation, fd, &event) == 0 ? 0 : -errno;
}

/* Adds an entry or changes it. One that should be there and is not was of a file that somebody has
 * closed: the number has a new owner. One that is there and should not came back with dup2. */
static int orchi_epoll_set(orchi_poller *p, int fd, int events) {
    orchi_watch *watch = &p->watches[fd];
    bool known = (watch->armed & ORCHI_REGISTERED) != 0;
    int error = orchi_epoll_control(p, known ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, events);
    if (error == -ENOENT) {
        watch->generation++;
        watch->hints = 0;
        error = orchi_epoll_control(p, EPOLL_CTL_ADD, fd, events);
    } else if (error == -EEXIST) {
        error = orchi_epoll_control(p, EPOLL_CTL_MOD, fd, events);
    }
    if (error != 0) return error == -EPERM ? ORCHI_ALWAYS : error;
    p->count += !known;
    watch->armed = (uint8_t)(events | ORCHI_REGISTERED);
    return 0;
}

/* When that fails, the number was closed before, and perhaps used again: an event that comes all
 * the same is of an earlier generation. */
static int orchi_epoll_remove(orchi_poller *p, int fd) {
    orchi_watch *watch = &p->watches[fd];
    if (epoll_ctl(p->queue, EPOLL_CTL_DEL, fd, NULL) != 0) {
        watch->generation++;
        watch->hints = 0;
    }
    watch->armed = 0;
    p->count--;
    return 0;
}

/* A child of fork shares the set with its parent, and must not take anything out of it. */
static int orchi_epoll_update(orch_loop *loop, int fd, bool exact) {
    orchi_poller *p = &loop->poller;
    int armed = p->watches[fd].armed, events = orchi_wanted(&p->watches[fd]);
    if (exact && armed == (events != 0 ? events | ORCHI_REGISTERED : 0)) return 0;
    if (!exact && (events & ~armed) == 0) return 0;
    if (exact && getpid() != p->owner) return 0;
    if (events == 0) return orchi_epoll_remove(p, fd);
    return orchi_epoll_reserve(loop) ? orchi_epoll_set(p, fd, events) : ORCH_ENOMEM;
}

/* To the nanosecond where the kernel can (Linux 5.11), else rounded up. */
static int orchi_epoll_call(const orchi_poller *p, uint64_t ns) {
    struct epoll_event *events = (struct epoll_event *)p->events;
    int most = (int)(p->event_capacity < p->found_capacity ? p->event_capacity : p->found_capacity);
    if (ns == 0 || ns == UINT64_MAX) return epoll_wait(p->queue, events, most, ns == 0 ? 0 : -1);
    int64_t timeout[2] = {(int64_t)(ns / 1000000000u), (int64_t)(ns % 1000000000u)};
    long found = syscall(ORCHI_EPOLL_PWAIT2, p->queue, events, most, timeout, NULL, (size_t)0);
    if (found >= 0 || errno != ENOSYS) return (int)found;
    uint64_t ms = (ns - 1) / 1000000u + 1;
    return epoll_wait(p->queue, events, most, ms > INT_MAX ? INT_MAX : (int)ms);
}

/* What is not own has been disarmed by its event. */
static void orchi_epoll_note(orchi_poller *p, const struct epoll_event *event) {
    uint64_t data = event->data.u64;
    int fd = (int)(uint32_t)data;
    orchi_watch *watch = &p->watches[fd];
    if (watch->generation != (uint16_t)(data >> 32) || watch->armed == 0) {
        p->stale |= (data >> 32 & ORCHI_EPOLL_OWN) != 0; // it would come again and again
        return;
    }
    if (!(watch->hints & ORCHI_OWN)) watch->armed = ORCHI_REGISTERED;
    int events = event->events & (EPOLLERR | EPOLLHUP) ? ORCHI_BOTH : 0;
    if (event->events & EPOLLIN) events |= ORCH_READABLE;
    if (event->events & EPOLLOUT) events |= ORCH_WRITABLE;
    orchi_found_add(p, fd, events);
}

static int orchi_epoll_wait(orch_loop *loop, uint64_t ns) {
    orchi_poller *p = &loop->poller;
    orchi_look_count(loop, p->count);
    int found = orchi_epoll_call(p, ns);
    if (found < 0) return errno == EINTR ? 0 : -errno;
    const struct epoll_event *events = (const struct epoll_event *)p->events;
    for (int i = 0; i < found; i++) orchi_epoll_note(p, &events[i]);
    return 0;
}

static const orchi_poller_ops orchi_epoll_ops = {
    ORCH_POLLER_EPOLL, orchi_epoll_open, orchi_epoll_close, orchi_epoll_update, orchi_epoll_wait};
#endif

// ---- kqueue
//
// As with epoll, own descriptors stay armed and others are armed for one event. An entry belongs to
// the number and goes when that is closed, so nothing stale is left. A child of fork does not have
// the set at all: the number may be somebody else's there.

#if ORCHI_KQUEUE

/* A descriptor can have two entries, each with an event of its own. */
static bool orchi_kqueue_reserve(orch_loop *loop) {
    orchi_poller *p = &loop->poller;
    size_t wanted = 2 * (p->count + 1u);
    return orchi_found_reserve(loop, wanted) &&
           orchi_grow(loop, &p->events, &p->event_capacity, wanted, sizeof(struct kevent));
}

static void orchi_kqueue_close(orch_loop *loop) {
    orchi_poller *p = &loop->poller;
    if (p->queue >= 0 && p->owner == getpid()) close(p->queue);
    orchi_free(loop, p->events, p->event_capacity * sizeof(struct kevent));
    p->events = NULL;
    p->event_capacity = 0;
    orchi_watches_disarm(p);
}

static int orchi_kqueue_open(orch_loop *loop) {
    orchi_poller *p = &loop->poller;
    p->owner = getpid();
    p->queue = kqueue();
    int error = p->queue < 0 ? -errno : orchi_kqueue_reserve(loop) ? 0 : ORCH_ENOMEM;
    if (error != 0) orchi_kqueue_close(loop);
    else fcntl(p->queue, F_SETFD, FD_CLOEXEC);
    return error;
}

static int orchi_kqueue_change(orchi_poller *p, int fd, int direction, uint16_t flags) {
    struct kevent change;
    memset(&change, 0, sizeof change);
    change.ident = (uintptr_t)fd;
    change.filter = direction == ORCH_READABLE ? EVFILT_READ : EVFILT_WRITE;
    change.flags = flags;
    return kevent(p->queue, &change, 1, NULL, 0, NULL) == 0 ? 0 : -errno;
}

/* A file is always ready for poll(2), but for kqueue not at its end. The other errors: what kqueue
 * does not know (devices), and a pipe that nobody reads. */
static int orchi_kqueue_refused(int error) {
    return error == -EINVAL || error == -EPERM || error == -ENODEV || error == -EPIPE ? ORCHI_ALWAYS
                                                                                      : error;
}

static int orchi_kqueue_arm(orchi_poller *p, int fd, int direction) {
    orchi_watch *watch = &p->watches[fd];
    struct stat about;
    if (fstat(fd, &about) != 0) return -errno;
    if (S_ISREG(about.st_mode) || S_ISDIR(about.st_mode)) return ORCHI_ALWAYS;
    int error = orchi_kqueue_change(p, fd, direction,
                                    watch->hints & ORCHI_OWN ? EV_ADD : EV_ADD | EV_ONESHOT);
    if (error != 0) return orchi_kqueue_refused(error);
    p->count += watch->armed == 0;
    watch->armed |= (uint8_t)(direction | ORCHI_REGISTERED);
    return 0;
}

/* Of a number that was closed meanwhile there is nothing left to delete. */
static void orchi_kqueue_disarm(orchi_poller *p, int fd, int direction) {
    orchi_watch *watch = &p->watches[fd];
    orchi_kqueue_change(p, fd, direction, EV_DELETE);
    watch->armed &= (uint8_t)~direction;
}

static int orchi_kqueue_update(orch_loop *loop, int fd, bool exact) {
    orchi_poller *p = &loop->poller;
    orchi_watch *watch = &p->watches[fd];
    int events = orchi_wanted(watch), error = 0;
    int more = events & ~watch->armed, fewer = exact ? watch->armed & ORCHI_BOTH & ~events : 0;
    if (more != 0 && !orchi_kqueue_reserve(loop)) return ORCH_ENOMEM;
    if (fewer != 0 && getpid() != p->owner) return 0;
    if (fewer & ORCH_READABLE) orchi_kqueue_disarm(p, fd, ORCH_READABLE);
    if (fewer & ORCH_WRITABLE) orchi_kqueue_disarm(p, fd, ORCH_WRITABLE);
    if (more & ORCH_READABLE) error = orchi_kqueue_arm(p, fd, ORCH_READABLE);
    if ((more & ORCH_WRITABLE) && error == 0) error = orchi_kqueue_arm(p, fd, ORCH_WRITABLE);
    if (exact && watch->armed == ORCHI_REGISTERED && events == 0) {
        watch->armed = 0;
        p->count--;
    }
    return error;
}

/* The two directions of a descriptor come one by one, and are put together as one event: the upper
 * half of `armed` has what has come of it. */
static void orchi_kqueue_note(orchi_poller *p, const struct kevent *event) {
    int fd = (int)event->ident;
    int direction = event->filter == EVFILT_READ ? ORCH_READABLE : ORCH_WRITABLE;
    orchi_watch *watch = &p->watches[fd];
    if (!(watch->hints & ORCHI_OWN)) watch->armed &= (uint8_t)~direction;
    if (watch->armed >> 4 == 0) orchi_found_add(p, fd, 0);
    watch->armed |= (uint8_t)(direction << 4);
}

static int orchi_kqueue_wait(orch_loop *loop, uint64_t ns) {
    orchi_poller *p = &loop->poller;
    struct timespec timeout = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
    struct kevent *events = (struct kevent *)p->events;
    uint32_t most = p->event_capacity < p->found_capacity ? p->event_capacity : p->found_capacity;
    orchi_look_count(loop, p->count);
    int count = kevent(p->queue, NULL, 0, events, (int)most, ns == UINT64_MAX ? NULL : &timeout);
    if (count < 0) return errno == EINTR ? 0 : -errno;
    for (int i = 0; i < count; i++) orchi_kqueue_note(p, &events[i]);
    for (uint32_t i = 0; i < p->found_count; i++) {
        orchi_watch *watch = &p->watches[p->found[i].fd];
        p->found[i].events = watch->armed >> 4;
        watch->armed &= 15;
    }
    return 0;
}

static const orchi_poller_ops orchi_kqueue_ops = {ORCH_POLLER_KQUEUE, orchi_kqueue_open,
                                                  orchi_kqueue_close, orchi_kqueue_update,
                                                  orchi_kqueue_wait};
#endif

// ---- which one

#if ORCHI_OS_LINUX && ORCHI_KQUEUE // an emulation, for tests
#define ORCHI_NATIVE (&orchi_epoll_ops)
static const orchi_poller_ops *const orchi_pollers[] = {&orchi_poll_ops, &orchi_epoll_ops,
                                                        &orchi_kqueue_ops};
#elif ORCHI_OS_LINUX
#define ORCHI_NATIVE (&orchi_epoll_ops)
static const orchi_poller_ops *const orchi_pollers[] = {&orchi_poll_ops, &orchi_epoll_ops};
#elif ORCHI_KQUEUE
#define ORCHI_NATIVE (&orchi_kqueue_ops)
static const orchi_poller_ops *const orchi_pollers[] = {&orchi_poll_ops, &orchi_kqueue_ops};
#else
#define ORCHI_NATIVE (&orchi_poll_ops)
static const orchi_poller_ops *const orchi_pollers[] = {&orchi_poll_ops};
#endif

/* The poller that was asked for; the default begins as poll. NULL when the system has it not. */
static const orchi_poller_ops *orchi_poller_find(orch_poller asked) {
    if (asked == ORCH_POLLER_DEFAULT) return &orchi_poll_ops;
    for (size_t i = 0; i < sizeof orchi_pollers / sizeof orchi_pollers[0]; i++) {
        if (orchi_pollers[i]->id == asked) return orchi_pollers[i];
    }
    return NULL;
}

/* Hands a descriptor that is waited for to a poller. What it cannot look for is found at once. */
static int orchi_poller_take(orch_loop *loop, const orchi_poller_ops *to, int fd) {
    orchi_poller *p = &loop->poller;
    int events = orchi_wanted(&p->watches[fd]);
    if (events == 0) return 0;
    int error = to->update(loop, fd, false);
    if (error != ORCHI_ALWAYS && error != -EBADF) return error;
    if (!orchi_found_reserve(loop, p->found_count + 1u)) return ORCH_ENOMEM;
    orchi_found_add(p, fd, error == ORCHI_ALWAYS ? events : ORCHI_BAD_FD);
    return 0;
}

/* Moves every wait to another poller. Readiness is a level, so nothing is lost between the two, and
 * nothing repeated: what was found before has been told. If it fails, all is as it was. */
static int orchi_poller_move(orch_loop *loop, const orchi_poller_ops *to) {
    orchi_poller *p = &loop->poller;
    const orchi_poller_ops *from = p->ops;
    uint32_t count = p->count;
    int error = to->open(loop);
    if (error != 0) return error;
    p->count = p->found_count = 0;
    for (size_t fd = 0; fd < p->watch_count && error == 0; fd++) {
        error = orchi_poller_take(loop, to, (int)fd);
    }
    if (error == 0) from->close(loop);
    else to->close(loop);
    if (error == 0) p->ops = to;
    else p->count = count;
    if (error != 0) p->found_count = 0;
    return error;
}

/* Entries of files that no number leads to any more can only be left behind with their set. */
ORCHI_COLD static void orchi_poller_renew(orch_loop *loop) {
    const orchi_poller_ops *ops = loop->poller.ops;
    loop->poller.stale = false;
    if (orchi_poller_move(loop, &orchi_poll_ops) == 0) orchi_poller_move(loop, ops);
}

// When to move. A look of poll(2) costs something for each descriptor it looks at, one of epoll for
// each it finds, and more. So what counts is how many of those looked at are found: where they are
// few, epoll is faster by any factor; where a busy server's looks find a good part of them ready,
// poll is by a fifth. What is lost by not having moved is added up, look by look and never below 0,
// until it is enough: the cumulative sum of E. S. Page, Continuous inspection schemes (1954). Who
// loses much moves soon, and who loses little late. The unit is what poll takes for a descriptor:
//
//     on poll     what was looked at, less 32 for each one found; nothing up to 64, or a portion
//     on epoll    8 for each one found, less what is watched; 64 where that is below 32
//
// Between the two, 1 in 32 and 1 in 8, nothing is lost either way. A backlog, of what was told and
// has not been served yet, shows a busy server: epoll finds it again, so that it counts as found,
// and poll does not look at it, as it is muted. Counted as looked at, it would send a busy loop to
// epoll and back. Left out: trying both and measuring, which costs moves to find out what the
// counts say.

// By example, with 1,000 connections:
//
//     one is busy          each look of poll(2) loses 968. After 271 looks: epoll
//     all become busy      a look of epoll finds 300, and loses 1,400. After 749 looks: poll
//     it goes to and fro   each move makes the next one cost four times as much, up to 256 times as
//                          much as the first: a load on the border makes few moves
//     a program of ten     below 64 descriptors it stays with poll, and never makes another

static const int64_t ORCHI_THRESHOLD = 1 << 18, ORCHI_THRESHOLD_MOST = 1 << 26;

/* What a look of so many descriptors cost more than the other poller's would have. */
static int64_t orchi_poller_loss(const orchi_poller *p, uint64_t looked_at) {
    int64_t all = (int64_t)looked_at, found = (int64_t)p->found_count;
    if (p->ops == &orchi_poll_ops) return (all > 64 ? all : 0) - 32 * found;
    return all < 32 ? 64 : 8 * found - all;
}

/* Moves, if there is another one. Where that fails, it is tried again later. */
ORCHI_COLD static void orchi_poller_change(orch_loop *loop) {
    orchi_poller *p = &loop->poller;
    p->lost = 0;
    if (p->threshold < ORCHI_THRESHOLD_MOST) p->threshold *= 4;
    const orchi_poller_ops *to = p->ops == &orchi_poll_ops ? ORCHI_NATIVE : &orchi_poll_ops;
    if (to != p->ops) loop->stats.moves += orchi_poller_move(loop, to) == 0;
}

// ------------------------------------------------------------------------------------------------
// >>timer
//
// A 4-ary heap of deadlines, ordered by (deadline, sequence), so that equal ones fire in the order
// set. A timer armed in a round has no deadline yet, only a duration: it waits behind the heap, in
// the same array, and is stamped with the next clock read, after at most 128 resumptions. So
// arming costs no clock read, a timer is never early, and late by at most those. Arming and
// cancelling within a round never touches the heap. A future knows its position
// (as.timed.position). Left out: a timer wheel. It fires a million timers faster, but needs
// cascades and per-level state; for the common case, equal time-outs that are cancelled, the heap's
// push and remove are a few compares.

// The array, with three timers of earlier rounds and two of this one:
//
//     | 12 ms | 40 ms | 15 ms |  for 5 ms  |  for 100 ms  |
//       heap, by deadline       not stamped, in any order
//     0                       stamped                     count
//
// At the end of the round, at 10 ms, the fourth becomes 15 ms and moves up behind the third, which
// came first; the fifth becomes 110 ms and stays.

#define ORCHI_DISARMED UINT32_MAX // the position of a timer that is not in the array

/* The sequence breaks ties: what was armed first fires first. */
static bool orchi_timer_before(const orchi_timer *a, const orchi_timer *b) {
    return a->deadline != b->deadline ? a->deadline < b->deadline : a->sequence < b->sequence;
}

/* Every move of an entry tells its future, so that cancelling needs no search. */
static void orchi_timer_put(orchi_timers *t, uint32_t position, orchi_timer entry) {
    t->entries[position] = entry;
    entry.future->as.timed.position = position;
}

/* Moves a hole up from `position` until the entry fits. */
static void orchi_timer_up(orchi_timers *t, uint32_t position, orchi_timer entry) {
    while (position > 0) {
        uint32_t parent = (position - 1) / 4;
        if (!orchi_timer_before(&entry, &t->entries[parent])) break;
        orchi_timer_put(t, position, t->entries[parent]);
        position = parent;
    }
    orchi_timer_put(t, position, entry);
}

/* Moves a hole down from `position` until the entry fits. Four children lie in two cache lines. */
static void orchi_timer_down(orchi_timers *t, uint32_t position, orchi_timer entry) {
    for (;;) {
        uint32_t first = position * 4 + 1, best = first;
        if (first >= t->stamped) break;
        for (uint32_t child = first + 1; child < first + 4 && child < t->stamped; child++) {
            if (orchi_timer_before(&t->entries[child], &t->entries[best])) best = child;
        }
        if (!orchi_timer_before(&t->entries[best], &entry)) break;
        orchi_timer_put(t, position, t->entries[best]);
        position = best;
    }
    orchi_timer_put(t, position, entry);
}

/* Arms the timer of f (as.timed.ms). False when out of memory. */
static bool orchi_timer_arm(orch_loop *loop, orch_future *f) {
    orchi_timers *t = &loop->timers;
    void *entries = t->entries;
    if (ORCHI_UNLIKELY(t->count == t->capacity)) {
        if (!orchi_grow(loop, &entries, &t->capacity, t->count + 1u, sizeof *t->entries))
            return false;
        t->entries = (orchi_timer *)entries;
    }
    uint64_t ms = f->as.timed.ms;
    uint64_t ns = ms < UINT64_MAX / 1000000u ? ms * 1000000u : UINT64_MAX;
    orchi_timer entry = {ns, t->sequence++, f};
    orchi_timer_put(t, t->count++, entry);
    return true;
}

/* Arms the timer of f for a deadline that another one has been stamped with. The first unstamped
 * entry makes room. */
static bool orchi_timer_arm_at(orch_loop *loop, orch_future *f, uint64_t deadline) {
    orchi_timers *t = &loop->timers;
    if (!orchi_timer_arm(loop, f)) return false;
    orchi_timer entry = t->entries[t->count - 1];
    uint32_t first = t->stamped++;
    if (first != t->count - 1) orchi_timer_put(t, t->count - 1, t->entries[first]);
    entry.deadline = deadline;
    orchi_timer_up(t, first, entry);
    return true;
}

/* Takes an entry out of the heap; the last unstamped one fills the gap at the heap's end. */
static void orchi_timer_remove(orchi_timers *t, uint32_t position) {
    uint32_t last = --t->stamped;
    orchi_timer entry = t->entries[last];
    if (position != last) {
        if (position > 0 && orchi_timer_before(&entry, &t->entries[(position - 1) / 4])) {
            orchi_timer_up(t, position, entry);
        } else {
            orchi_timer_down(t, position, entry);
        }
    }
    if (--t->count != last) orchi_timer_put(t, last, t->entries[t->count]);
}

/* In the heap, or among those not stamped yet, where the order does not matter. */
static void orchi_timer_disarm(orch_loop *loop, orch_future *f) {
    orchi_timers *t = &loop->timers;
    uint32_t position = f->as.timed.position;
    if (position == ORCHI_DISARMED) return;
    f->as.timed.position = ORCHI_DISARMED;
    if (position < t->stamped) {
        orchi_timer_remove(t, position);
    } else if (position != --t->count) {
        orchi_timer_put(t, position, t->entries[t->count]);
    }
}

/* The nanoseconds until f fires; for one that was armed in this round its whole duration. */
static uint64_t orchi_timer_left(const orch_loop *loop, const orch_future *f, uint64_t now) {
    const orchi_timers *t = &loop->timers;
    uint32_t position = f->as.timed.position;
    if (position == ORCHI_DISARMED) return 0;
    uint64_t deadline = t->entries[position].deadline;
    if (position >= t->stamped) return deadline;
    return deadline > now ? deadline - now : 0;
}

/* The end of a round: gives what was armed in it its deadline. */
static void orchi_timers_stamp(orch_loop *loop, uint64_t now) {
    orchi_timers *t = &loop->timers;
    while (t->stamped < t->count) {
        orchi_timer entry = t->entries[t->stamped];
        entry.deadline = entry.deadline < UINT64_MAX - now ? now + entry.deadline : UINT64_MAX;
        if (loop->desc.seed != 0) entry.sequence = orchi_random(loop);
        orchi_timer_up(t, t->stamped++, entry);
    }
}

/* Fires what is due. Firing only queues and disarms. */
static void orchi_timers_fire(orch_loop *loop, uint64_t now) {
    orchi_timers *t = &loop->timers;
    while (t->stamped > 0 && t->entries[0].deadline <= now) {
        orch_future *f = t->entries[0].future;
        orchi_timer_remove(t, 0);
        orchi_kinds[f->kind].fire(f, 0);
    }
}

// ------------------------------------------------------------------------------------------------
// >>inbox
//
// What other threads leave for a loop: letters, each with a function that opens it on the loop's
// thread. Invariants:
//   - An inbox comes from malloc and is counted, as those who hold one outlive the loop. Everything
//     in it is guarded by its mutex; the list of all inboxes by one for the process, which is taken
//     first.
//   - A letter has its memory before it is put in: putting cannot fail, but for a loop that is
//     gone.
//   - The loop takes all letters at once and opens them from the ready ring, in which `mail` stands
//     for them: in their order, and in turn with what else is ready.
//   - A sleeping loop is woken through a descriptor, once: whoever finds it asleep and not woken
//     yet writes. A loop that never sleeps has none.
//   - After closing nothing is put in any more. What was put in before has been opened.
// Left out: a list without locks. Two uncontended locks a sleep cost less than a tenth of it, and
// every tool can check them. Only `posted` is read without: a hint that saves a busy loop the lock.

typedef struct orchi_letter {
    struct orchi_letter *next;
    void (*open)(orch_loop *loop, struct orchi_letter *letter); // and free it
    bool in;                                                    // it was put in
} orchi_letter;

typedef struct orchi_inbox {
    pthread_mutex_t mutex;
    orch_loop *loop;          // its name: others do not look into it
    struct orchi_inbox *next; // of all loops
    uint32_t holders;
    bool ending;      // only answers are put in: nothing new
    bool closed;      // nothing is
    bool asleep;      // the loop sleeps, or is about to
    bool woken;       // and a wake-up is on its way
    int posted;       // atomic: there are letters
    int ends[2];      // to read and to write; -1: none was needed yet
    uint32_t writers; // that wake the loop just now
    bool left;        // the loop has gone
    uint64_t wakes;
    orchi_letter *first, *last;
} orchi_inbox;

struct orch_remote {
    orchi_letter letter;  // first
    orchi_inbox *inbox;   // held
    orch_promise promise; // for the loop's thread
    orch_result result;
    orch_remote **place; // what points to it in the loop's list; NULL: it is out
    orch_remote *next;
    bool lent; // to a thread of this file's: after a fork it does not come back
};

// The only state of the process, with the pool's in >>thread, and what a signal handler needs.
static struct {
    pthread_mutex_t mutex;
    orchi_inbox *inboxes;  // of all loops
    orchi_inbox *spare;    // of none
    bool forks;            // the handlers are installed
    void (*on_fork)(void); // in the child, with all unlocked again: the pool's part
} orchi_shared = {PTHREAD_MUTEX_INITIALIZER, NULL, NULL, false, NULL};

// A post from thread 2 to the loop of thread 1, which has nothing to do:
//
//     1  orchi_doze        no letter: asleep; makes the descriptor the first time
//     1  the poller        sleeps
//     2  orch_post         a letter; the loop is asleep, so it is woken: one write
//     2  orch_post         a second letter; it was woken: no write
//     1  the poller        the descriptor is ready: one read
//     1  orchi_inbox_take  awake; both letters; `mail` is queued
//     1  the round         opens both: two callbacks

// ---- the wake-up

#if ORCHI_OS_LINUX
/* One descriptor serves as both ends. */
static int orchi_wake_pair(int ends[2]) {
    ends[0] = ends[1] = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    return ends[0] < 0 ? -errno : 0;
}
#else
static int orchi_wake_pair(int ends[2]) {
    if (pipe(ends) != 0) return -errno;
    for (int i = 0; i < 2; i++) {
        fcntl(ends[i], F_SETFD, FD_CLOEXEC);
        fcntl(ends[i], F_SETFL, O_NONBLOCK);
    }
    return 0;
}
#endif

static void orchi_wake_close_pair(const int ends[2]) {
    close(ends[0]);
    if (ends[1] != ends[0]) close(ends[1]);
}

/* Async-signal-safe. A full pipe rings already. */
static void orchi_wake_ring(int end) {
    uint64_t one = 1;
    ssize_t done = write(end, &one, sizeof one);
    (void)done;
}

static void orchi_wake_silence(int end) {
    uint64_t rings[16];
    while (read(end, rings, sizeof rings) == (ssize_t)sizeof rings) continue;
}

/* The loop was woken: what was written is taken, so that the next sleep is one. */
static void orchi_wake_drain(orch_loop *loop) { orchi_wake_silence(loop->inbox->ends[0]); }

/* The last that uses the descriptor closes it: the loop when it goes, or who just wakes it. */
static void orchi_wake_close(orchi_inbox *inbox) {
    if (!inbox->left || inbox->writers > 0 || inbox->ends[0] < 0) return;
    orchi_wake_close_pair(inbox->ends);
    inbox->ends[0] = inbox->ends[1] = -1;
}

/* The last holder keeps it for the next loop: a mutex that another thread has just unlocked is not
 * destroyed, as that thread may still be at it. There are as many as there ever were loops at a
 * time, and remotes without one. */
static void orchi_inbox_release(orchi_inbox *inbox) {
    pthread_mutex_lock(&inbox->mutex);
    bool last = --inbox->holders == 0;
    pthread_mutex_unlock(&inbox->mutex);
    if (!last) return;
    pthread_mutex_lock(&orchi_shared.mutex);
    inbox->next = orchi_shared.spare;
    orchi_shared.spare = inbox;
    pthread_mutex_unlock(&orchi_shared.mutex);
}

/* Without the lock: the loop may run at once on another processor, and would have to wait for it. A
 * full pipe is as good as one more byte. */
static void orchi_inbox_ring(orchi_inbox *inbox, int end) {
    if (end >= 0) orchi_wake_ring(end);
    pthread_mutex_lock(&inbox->mutex);
    inbox->writers--;
    orchi_wake_close(inbox);
    pthread_mutex_unlock(&inbox->mutex);
    orchi_inbox_release(inbox);
}

// ---- putting letters in

/* The inbox is locked, and is not when this returns. `fresh`: asks for something new. False when
 * the loop does not take it (any more); the letter is the caller's then. */
static bool orchi_inbox_put_locked(orchi_inbox *inbox, orchi_letter *letter, bool fresh) {
    bool open = !inbox->closed && !(fresh && inbox->ending),
         wakes = open && inbox->asleep && !inbox->woken;
    int end = inbox->ends[1];
    if (open) {
        letter->next = NULL;
        letter->in = true;
        if (inbox->first != NULL) inbox->last->next = letter;
        else inbox->first = letter;
        inbox->last = letter;
        __atomic_store_n(&inbox->posted, 1, __ATOMIC_RELAXED);
    }
    if (wakes) {
        inbox->woken = true;
        inbox->wakes++;
        inbox->writers++;
        inbox->holders++;
    }
    pthread_mutex_unlock(&inbox->mutex);
    if (wakes) orchi_inbox_ring(inbox, end);
    return open;
}

static bool orchi_inbox_put(orchi_inbox *inbox, orchi_letter *letter) {
    pthread_mutex_lock(&inbox->mutex);
    return orchi_inbox_put_locked(inbox, letter, false);
}

/* The inbox of a loop, locked; NULL when there is no such loop (any more). */
static orchi_inbox *orchi_inbox_find(const orch_loop *loop) {
    pthread_mutex_lock(&orchi_shared.mutex);
    orchi_inbox *inbox = orchi_shared.inboxes;
    while (inbox != NULL && inbox->loop != loop) inbox = inbox->next;
    if (inbox != NULL) pthread_mutex_lock(&inbox->mutex);
    pthread_mutex_unlock(&orchi_shared.mutex);
    return inbox;
}

static orchi_inbox *orchi_inbox_hold(orchi_inbox *inbox) {
    pthread_mutex_lock(&inbox->mutex);
    inbox->holders++;
    pthread_mutex_unlock(&inbox->mutex);
    return inbox;
}

// ---- what the loop does

/* Whether there may be letters. */
static inline bool orchi_inbox_posted(const orch_loop *loop) {
    return __atomic_load_n(&loop->inbox->posted, __ATOMIC_RELAXED) != 0;
}

/* Takes all letters, awake from now on, and queues what opens them. */
ORCHI_NO_INLINE static void orchi_inbox_take(orch_loop *loop) {
    orchi_inbox *inbox = loop->inbox;
    pthread_mutex_lock(&inbox->mutex);
    orchi_letter *first = inbox->first, *last = inbox->last;
    inbox->first = inbox->last = NULL;
    inbox->asleep = inbox->woken = false;
    __atomic_store_n(&inbox->posted, 0, __ATOMIC_RELAXED);
    pthread_mutex_unlock(&inbox->mutex);
    if (first == NULL) return;
    if (loop->letters != NULL) loop->letters_last->next = first;
    else loop->letters = first;
    loop->letters_last = last;
    orchi_push(loop, &loop->mail);
}

static uint64_t orchi_inbox_wakes(const orch_loop *loop) {
    pthread_mutex_lock(&loop->inbox->mutex);
    uint64_t wakes = loop->inbox->wakes;
    pthread_mutex_unlock(&loop->inbox->mutex);
    return wakes;
}

enum { ORCHI_NAP_NS = 10000000 };

/* Before a sleep: says that there is somebody to wake. Returns how long it may be, which is 0 when
 * a letter has come. */
static uint64_t orchi_doze(orch_loop *loop, uint64_t ns) {
    orchi_inbox *inbox = loop->inbox;
    if (ORCHI_UNLIKELY(inbox->ends[0] < 0)) loop->wake_open(loop);
    pthread_mutex_lock(&inbox->mutex);
    inbox->asleep = inbox->first == NULL;
    bool asleep = inbox->asleep;
    pthread_mutex_unlock(&inbox->mutex);
    if (!asleep) return 0;
    return inbox->ends[0] >= 0 || ns < ORCHI_NAP_NS ? ns : (uint64_t)ORCHI_NAP_NS;
}

/* Opens letters from the ready ring, each of which counts as a resumption; what is left when the
 * round is over waits for its turn. It has no page that would name its loop, which is this
 * thread's. */
static void orchi_mail_run(orch_future *mail) {
    orch_loop *loop = orchi_loop;
    while (loop->letters != NULL) {
        orchi_letter *letter = loop->letters;
        loop->letters = letter->next;
        letter->open(loop, letter);
        if (loop->limit == loop->ready.head) break;
        loop->limit--;
    }
    if (loop->letters != NULL) orchi_push(loop, mail);
}

// ---- remotes
//
// A loop knows its remotes, as it must not call itself deadlocked while one can bring something.
// One whose promise has settled brings nothing: it is taken out when it is met.

/* Each knows what points to it, so taking one out needs neither search nor head. */
static void orchi_remote_out(orch_remote *remote) {
    if (remote->place == NULL) return;
    *remote->place = remote->next;
    if (remote->next != NULL) remote->next->place = remote->place;
    remote->place = NULL;
}

static void orchi_remote_in(orch_loop *loop, orch_remote *remote) {
    remote->next = loop->remotes;
    remote->place = &loop->remotes;
    if (remote->next != NULL) remote->next->place = &remote->next;
    loop->remotes = remote;
}

/* Whether a thread can still settle something here. Each that cannot is met once. */
static bool orchi_remotes_wait(orch_loop *loop) {
    orch_remote *remote = loop->remotes;
    while (remote != NULL) {
        const orch_future *f = remote->promise.future;
        if (f->generation == remote->promise.generation && f->kind == ORCHI_PROMISE) return true;
        orchi_remote_out(remote);
        remote = loop->remotes;
    }
    return false;
}

// ---- the life of an inbox

// Around a fork all inboxes and the list of them are locked, so that the child finds them whole.
// There, no other thread is left: their loops are gone. Its own loop has to make a descriptor of
// its own before it sleeps, as this one is the parent's too.

static void orchi_fork_prepare(void) {
    pthread_mutex_lock(&orchi_shared.mutex);
    for (orchi_inbox *i = orchi_shared.inboxes; i != NULL; i = i->next) {
        pthread_mutex_lock(&i->mutex);
    }
}

static void orchi_fork_parent(void) {
    for (orchi_inbox *i = orchi_shared.inboxes; i != NULL; i = i->next) {
        pthread_mutex_unlock(&i->mutex);
    }
    pthread_mutex_unlock(&orchi_shared.mutex);
}

/* In a child: an array is its own and forgets the number; a set is the parent's, and is left. */
static void orchi_wake_unwatch(orch_loop *loop, int fd) {
    loop->poller.watches[fd].hints = 0;
    if (loop->poller.ops == &orchi_poll_ops) orchi_poll_update(loop, fd, true);
}

static void orchi_wake_forget(orchi_inbox *inbox) {
    if (inbox->ends[0] < 0) return;
    orchi_wake_close_pair(inbox->ends);
    if (inbox->loop == orchi_loop) orchi_wake_unwatch(orchi_loop, inbox->ends[0]);
    inbox->ends[0] = inbox->ends[1] = -1;
    inbox->asleep = inbox->woken = false;
    inbox->writers = 0;
}

static void orchi_fork_child(void) {
    orchi_inbox *all = orchi_shared.inboxes;
    orchi_shared.inboxes = NULL;
    for (orchi_inbox *i = all, *next; i != NULL; i = next) {
        next = i->next;
        i->next = NULL;
        i->closed = i->closed || i->loop != orchi_loop;
        if (i->loop == orchi_loop) orchi_shared.inboxes = i;
        orchi_wake_forget(i);
        pthread_mutex_unlock(&i->mutex);
    }
    pthread_mutex_unlock(&orchi_shared.mutex);
    if (orchi_shared.on_fork != NULL) orchi_shared.on_fork();
}

/* helgrind takes a relaxed read for a race: it is told to leave the flag alone (its client request
 * ARANGE_MAKE_UNTRACKED). */
enum { ORCHI_HELGRIND_UNTRACKED = 0x48470127 };

static orchi_inbox *orchi_inbox_make(void) {
    orchi_inbox *inbox = (orchi_inbox *)calloc(1, sizeof *inbox);
    if (inbox == NULL) return NULL;
    pthread_mutex_init(&inbox->mutex, NULL);
    uintptr_t request[6] = {
        ORCHI_HELGRIND_UNTRACKED, (uintptr_t)&inbox->posted, sizeof inbox->posted, 0, 0, 0};
    orchi_valgrind_request(request);
    return inbox;
}

/* One that was used before, or a new one. */
static orchi_inbox *orchi_inbox_take_spare(void) {
    pthread_mutex_lock(&orchi_shared.mutex);
    orchi_inbox *inbox = orchi_shared.spare;
    if (inbox != NULL) orchi_shared.spare = inbox->next;
    pthread_mutex_unlock(&orchi_shared.mutex);
    return inbox != NULL ? inbox : orchi_inbox_make();
}

static void orchi_inbox_init(orchi_inbox *inbox, orch_loop *loop) {
    pthread_mutex_lock(&inbox->mutex);
    inbox->loop = loop;
    inbox->holders = 1;
    inbox->ending = inbox->closed = inbox->left = false;
    inbox->asleep = inbox->woken = false;
    inbox->ends[0] = inbox->ends[1] = -1;
    inbox->wakes = 0;
    pthread_mutex_unlock(&inbox->mutex);
}

/* Makes a loop's inbox and enters it into the list. */
static int orchi_inbox_new(orch_loop *loop) {
    orchi_inbox *inbox = orchi_inbox_take_spare();
    if (inbox == NULL) return ORCH_ENOMEM;
    orchi_inbox_init(inbox, loop);
    loop->inbox = inbox;
    loop->mail.kind = ORCHI_MAIL;
    loop->on_wake = orchi_wake_drain;
    pthread_mutex_lock(&orchi_shared.mutex);
    if (!orchi_shared.forks) {
        orchi_shared.forks =
            pthread_atfork(orchi_fork_prepare, orchi_fork_parent, orchi_fork_child) == 0;
    }
    inbox->next = orchi_shared.inboxes;
    orchi_shared.inboxes = inbox;
    pthread_mutex_unlock(&orchi_shared.mutex);
    return 0;
}

/* The loop is about to end, or lives on after all. */
static void orchi_inbox_ending(orch_loop *loop, bool ending) {
    pthread_mutex_lock(&loop->inbox->mutex);
    loop->inbox->ending = ending;
    loop->inbox->closed = false;
    pthread_mutex_unlock(&loop->inbox->mutex);
}

/* From now on nothing is put in. What was put in before is taken. The loop forgets its remotes
 * first, as from then on who settles one frees it. */
static void orchi_inbox_close(orch_loop *loop) {
    while (loop->remotes != NULL) orchi_remote_out(loop->remotes);
    pthread_mutex_lock(&loop->inbox->mutex);
    loop->inbox->closed = true;
    pthread_mutex_unlock(&loop->inbox->mutex);
    orchi_inbox_take(loop);
}

/* Then what another thread was to answer would be freed there, while the loop knows it. Only this
 * thread writes it. */
static bool orchi_inbox_is_closed(const orch_loop *loop) { return loop->inbox->closed; }

/* The loop goes. Whether it was the last one. */
static bool orchi_inbox_leave(orch_loop *loop) {
    orchi_inbox *inbox = loop->inbox, **at = &orchi_shared.inboxes;
    pthread_mutex_lock(&orchi_shared.mutex);
    while (*at != inbox) at = &(*at)->next;
    *at = inbox->next;
    bool last = orchi_shared.inboxes == NULL;
    pthread_mutex_unlock(&orchi_shared.mutex);
    pthread_mutex_lock(&inbox->mutex);
    inbox->left = true;
    orchi_wake_close(inbox);
    pthread_mutex_unlock(&inbox->mutex);
    orchi_inbox_release(inbox);
    return last;
}

// ------------------------------------------------------------------------------------------------
// >>loop
//
// A turn is a round of ready work, then a look: stamp new timers, ask the poller, fire what is due.
// Invariants:
//   - A round runs 128 things or fewer. Descriptors and timers are looked at when nothing is ready,
//     and otherwise after a round, unless the last look was less than ten times its own cost ago:
//     so nothing starves, and looking costs at most a tenth where it is dear. When that is all that
//     a turn would find, the round goes on at once, and saves the way over the main stack and back.
//     With poll(2) whoever was found is left out until all that were found have run: each has a
//     turn before any has its second; and where many are ready, a look is at the next portion of
//     them.
//   - The clock is read once for 128 things or fewer, and up to three times when the poller was
//     asked while work was ready.
//   - Asleep means asleep in the poller: with nothing ready there is no turn without an event.
//   - Everything runs on this thread's main stack, or on a task's that it switched to; only turns
//     run it.

/* How many tasks were resumed and callbacks run, this round included. */
static uint64_t orchi_resumes(const orch_loop *loop) {
    return loop->stats.resumes + loop->round - (loop->limit - loop->ready.head);
}

/* Every resumption takes one from the ring, so the budget of a round is a position in it. */
static void orchi_round_set(orch_loop *loop, uint32_t budget) {
    loop->round = budget;
    loop->limit = loop->ready.head + budget;
}

/* Whether something is ready and the budget not spent. */
static inline bool orchi_round_has_next(const orch_loop *loop) {
    return loop->ready.head != loop->ready.tail && loop->ready.head != loop->limit;
}

/* Whether the turn is to be the last one for now. */
static bool orchi_is_stopping(const orch_loop *loop) {
    return loop->stopping || (loop->until != NULL && orchi_settled(loop->until));
}

/* Stamps what was armed, and says how long the next timer is off. */
static uint64_t orchi_until_timer(orch_loop *loop, uint64_t now) {
    orchi_timers_stamp(loop, now);
    uint64_t next = loop->timers.count > 0 ? loop->timers.entries[0].deadline : UINT64_MAX;
    return next == UINT64_MAX ? UINT64_MAX : next > now ? next - now : 0;
}

/* Looking while work is ready: not sooner than ten times its cost after the last one. */
static bool orchi_look_is_due(const orch_loop *loop, uint64_t now) {
    return now - loop->looked >= 10 * loop->look_cost;
}

enum { ORCHI_BUDGETS = 32 * ORCHI_BUDGET }; // a round ends, even if its clock stands still

/* The budget is spent. The round gets another one when all that this turn would find is that it is
 * too early for a look. */
ORCHI_NO_INLINE static bool orchi_round_prolong(orch_loop *loop) {
    bool ends = orchi_is_stopping(loop) || orchi_inbox_posted(loop) || loop->desc.seed != 0;
    if (ends || loop->stats.watched == 0 || loop->round >= ORCHI_BUDGETS) return false;
    uint64_t now = orchi_now(loop);
    if (orchi_look_is_due(loop, now) || orchi_until_timer(loop, now) == 0) return false;
    loop->round += ORCHI_BUDGET;
    loop->limit += ORCHI_BUDGET;
    return true;
}

/* Whether the round goes on. */
static inline bool orchi_round_goes_on(orch_loop *loop) {
    if (ORCHI_LIKELY(orchi_round_has_next(loop))) return true;
    return !orchi_ring_empty(loop) && orchi_round_prolong(loop);
}

/* Whether all that the last look at everything found have had their turn. When `told` is old, and
 * the positions have gone once around, it may say no for as long as what is ready now takes: never
 * of an empty ring. */
static bool orchi_backlog_served(const orch_loop *loop) {
    uint32_t left = loop->told - loop->ready.head;
    return left == 0 || left > loop->ready.tail - loop->ready.head;
}

// A turn, as a list of phases:
//
//     1  round   128 at a time from the ready ring: callbacks here, tasks on their stacks
//     2  stamp   timers armed in the round get their deadline from the one clock read
//     3  poll    with a limit of 0 when work is ready, else until the next deadline
//     4  fire    what is due is settled, which fills the ring for the next round
//
// Nothing of the user's runs in 2 to 4.

/* A loop with a seed draws which of the ready tasks come next, one swap for each, and has short
 * rounds, as tasks that become ready in a round keep their order. Callbacks stay where they are. */
ORCHI_COLD static void orchi_shuffle(orch_loop *loop) {
    orchi_ring *ring = &loop->ready;
    uint32_t ready = ring->tail - ring->head;
    orchi_round_set(loop, 1 + (uint32_t)(orchi_random(loop) % 8));
    for (uint32_t i = 0; i < ready && i < loop->round; i++) {
        uint64_t drawn = i + orchi_random(loop) % (ready - i);
        orch_future **a = &ring->items[(ring->head + i) & ring->mask];
        orch_future **b = &ring->items[(ring->head + (uint32_t)drawn) & ring->mask];
        if ((*a)->kind != ORCHI_TASK || (*b)->kind != ORCHI_TASK) continue;
        orch_future *f = *a;
        *a = *b;
        *b = f;
    }
}

/* Runs what was popped. The table is constant, so the two kinds of callbacks are called directly
 * here, or put in line: that saves 5 of 50 cycles each. */
static inline void orchi_run_one(orch_future *f) {
    if (f->kind == ORCHI_ON) orchi_kinds[ORCHI_ON].run(f);
    else if (f->kind == ORCHI_THEN) orchi_kinds[ORCHI_THEN].run(f);
    else orchi_kinds[f->kind].run(f);
}

/* Runs what is ready, in order. Tasks that switch directly take from the same ring and budget. */
static void orchi_round(orch_loop *loop) {
    while (orchi_round_goes_on(loop)) orchi_run_one(orchi_pop(loop));
    loop->stats.resumes = orchi_resumes(loop);
    orchi_round_set(loop, ORCHI_BUDGET);
}

/* Takes a waiting future out of the table. `exact`: without an event, so the poller is to stop;
 * after one, orchi_tell sees to it. */
static inline void orchi_unwatch(orch_loop *loop, orch_future *f, bool exact) {
    int fd = f->as.ready.fd;
    orchi_watch *watch = &loop->poller.watches[fd];
    if (watch->reader == f) watch->reader = NULL;
    if (watch->writer == f) watch->writer = NULL;
    loop->stats.watched--;
    if (exact) loop->poller.ops->update(loop, fd, true);
}

/* Whether an event is for this waiter. One that was made after the look waits for the next: the
 * descriptor may have been closed, and its number used again, by a rejection's hook. */
static bool orchi_meant(const orch_future *f, uint64_t generation, int events, int direction) {
    if (f == NULL || !(events & (direction | ORCHI_BAD_FD))) return false;
    return (f->kind == ORCHI_TASK ? f->as.task.since : f->generation) < generation;
}

/* An event for its waiter. The table is constant: a task is told directly, or in line. */
static inline void orchi_fire(orch_future *f, int events) {
    if (ORCHI_LIKELY(f->kind == ORCHI_TASK)) orchi_kinds[ORCHI_TASK].fire(f, events);
    else orchi_kinds[f->kind].fire(f, events);
}

/* Tells the waiters of a descriptor that was found ready. The table is read again after each, as a
 * rejection's hook may have changed it. Who waits on has to be looked for on. */
static bool orchi_tell(orch_loop *loop, orchi_found found, uint64_t generation) {
    orchi_watch *watch = &loop->poller.watches[found.fd];
    orch_future *reader = watch->reader;
    bool told = (watch->hints & ORCHI_WAKE) != 0;
    watch->hints &= (uint16_t) ~(found.events & ORCHI_BOTH);
    loop->poller.woken |= told;
    if (orchi_meant(reader, generation, found.events, ORCH_READABLE)) {
        orchi_fire(reader, found.events); // the writer too, if that is the same
        told = true;
    }
    orch_future *writer = loop->poller.watches[found.fd].writer;
    if (orchi_meant(writer, generation, found.events, ORCH_WRITABLE)) {
        orchi_fire(writer, found.events);
        told = true;
    }
    bool more = orchi_wanted(&loop->poller.watches[found.fd]) != 0;
    if (ORCHI_UNLIKELY(more)) loop->poller.ops->update(loop, found.fd, false);
    return told;
}

/* A loop with a seed draws the order of what was found. Sorted first, as every poller finds it in
 * another order. */
static int orchi_found_compare(const void *a, const void *b) {
    return ((const orchi_found *)a)->fd - ((const orchi_found *)b)->fd;
}

ORCHI_COLD static void orchi_found_shuffle(orch_loop *loop) {
    orchi_poller *p = &loop->poller;
    if (p->found_count == 0) return; // there may be no list yet
    qsort(p->found, p->found_count, sizeof *p->found, orchi_found_compare);
    for (uint32_t i = p->found_count; i > 1; i--) {
        uint32_t drawn = (uint32_t)(orchi_random(loop) % i);
        orchi_found last = p->found[i - 1];
        p->found[i - 1] = p->found[drawn];
        p->found[drawn] = last;
    }
}

/* Tells all that was found. What nobody waits for is disarmed, so that it comes once; but while
 * there is other work, it may be that the turn of who was told has not come yet. */
static void orchi_tell_all(orch_loop *loop, uint64_t generation, bool idle) {
    orchi_poller *p = &loop->poller;
    if (ORCHI_UNLIKELY(loop->desc.seed != 0)) orchi_found_shuffle(loop);
    for (uint32_t i = 0; i < p->found_count; i++) {
        bool told = orchi_tell(loop, p->found[i], generation);
        if (!told && idle) p->ops->update(loop, p->found[i].fd, true);
    }
    p->found_count = 0;
}

/* The loop's own descriptor was among what was found. */
static void orchi_wake(orch_loop *loop) {
    if (!loop->poller.woken) return;
    loop->poller.woken = false;
    loop->on_wake(loop);
}

/* A new pass of poll's array begins when the last one has seen all, and all that were told have had
 * their turn. */
static void orchi_pass_begin(orch_loop *loop) {
    orchi_poller *p = &loop->poller;
    if (p->ops != &orchi_poll_ops || orchi_poll_passing(p)) return;
    if (orchi_backlog_served(loop)) orchi_poll_unmute(p);
}

/* The only place where the loop makes a system call. What was found is told afterwards. */
static int orchi_poll(orch_loop *loop, uint64_t ns) {
    orchi_poller *p = &loop->poller;
    bool idle = orchi_ring_empty(loop);
    uint64_t generation = loop->generation;
    uint64_t before = p->looked_at;
    bool sleeps = ns > 0, served = orchi_backlog_served(loop);
    if (sleeps) ns = orchi_doze(loop, ns);
    orchi_pass_begin(loop);
    int error = p->ops->wait(loop, ns);
    p->lost += orchi_poller_loss(p, p->looked_at - before);
    if (p->lost < 0) p->lost = 0;
    orchi_tell_all(loop, generation, idle);
    if (served) loop->told = loop->ready.tail;
    if (ORCHI_UNLIKELY(p->stale)) orchi_poller_renew(loop);
    if (ORCHI_UNLIKELY(p->lost > p->threshold) && !p->pinned) orchi_poller_change(loop);
    orchi_tell_all(loop, loop->generation, idle); // what a move found
    orchi_wake(loop);
    if (sleeps) orchi_inbox_take(loop);
    return error;
}

/* What a look costs. It may at most double from one to the next, as one that was interrupted by
 * another program would keep the loop from looking for ten times as long. */
static uint64_t orchi_look_cost(const orch_loop *loop, uint64_t measured) {
    uint64_t most = 2 * loop->look_cost + 1000;
    return measured < most ? measured : most;
}

enum { ORCHI_BUSY = 25 * ORCHI_BUDGET, ORCHI_TICK_NS = 1000000 };

/* Tasks that only yield until some time has passed would wait for ever on a virtual clock: after so
 * many resumptions it moves on by a little. */
static void orchi_tick(orch_loop *loop) {
    if (loop->desc.clock != ORCH_CLOCK_VIRTUAL) return;
    if (orchi_resumes(loop) - loop->ticked < ORCHI_BUSY) return;
    loop->ticked = orchi_resumes(loop);
    if (loop->now < UINT64_MAX - ORCHI_TICK_NS) loop->now += ORCHI_TICK_NS;
}

/* A look while work is ready. */
static int orchi_look_busy(orch_loop *loop) {
    orchi_tick(loop);
    if (loop->timers.count == 0 && loop->stats.watched == 0) return 0;
    uint64_t now = orchi_now(loop);
    orchi_timers_stamp(loop, now);
    int error = 0;
    bool due = orchi_look_is_due(loop, now);
    if (due) orchi_pass_begin(loop);
    if (due && orchi_poll_heard(&loop->poller) > 0) {
        error = orchi_poll(loop, 0);
        loop->looked = orchi_now(loop);
        loop->look_cost = orchi_look_cost(loop, loop->looked - now);
    }
    orchi_timers_fire(loop, now);
    return error;
}

/* Sleeps for `ns` in the poller, or until an event. */
static int orchi_sleep(orch_loop *loop, uint64_t now, uint64_t ns) {
    uint64_t trim = ns > 0 ? orchi_stacks_idle(loop, now) : 0;
    if (ns > trim) ns = trim;
    return ns > 0 || loop->stats.watched > 0 ? orchi_poll(loop, ns) : 0;
}

/* The same on a virtual clock: descriptors are looked at once, and with nothing ready still the
 * time has passed. Only without a timer the sleep is real, as nothing but a descriptor can end it;
 * and without either, the last timer is one for the end of time. While threads work for the loop,
 * the sleep is real and time stands still. */
static int orchi_jump(orch_loop *loop, uint64_t ns, uint64_t limit) {
    bool watched = loop->stats.watched > 0;
    loop->ticked = orchi_resumes(loop);
    bool outside = orchi_remotes_wait(loop) || loop->children > 0;
    if (outside && ns > 0) return orchi_poll(loop, limit);
    int error = watched ? orchi_poll(loop, ns == UINT64_MAX ? ns : 0) : 0;
    if (error != 0 || !orchi_ring_empty(loop) || (watched && ns == UINT64_MAX)) return error;
    loop->now = ns < UINT64_MAX - loop->now ? loop->now + ns : UINT64_MAX;
    return 0;
}

/* A look with nothing ready: sleeps until an event, the next deadline, or the limit. */
static int orchi_look_idle(orch_loop *loop, uint64_t limit) {
    uint64_t now = orchi_now(loop), sleep = orchi_until_timer(loop, now);
    if (sleep > limit) sleep = limit;
    bool jumps = loop->desc.clock == ORCH_CLOCK_VIRTUAL;
    int error = jumps ? orchi_jump(loop, sleep, limit) : orchi_sleep(loop, now, sleep);
    loop->looked = sleep > 0 ? orchi_now(loop) : now;
    orchi_timers_fire(loop, loop->looked);
    return error;
}

/* Whether anything is left that could make work ready. */
static bool orchi_can_wake(orch_loop *loop) {
    return !orchi_ring_empty(loop) || loop->timers.count > 0 || loop->stats.watched > loop->quiet ||
           orchi_inbox_posted(loop) || orchi_remotes_wait(loop);
}

/* One turn. Returns 1 when there is more to do, 0 when nothing can wake the loop, or an error. */
static int orchi_turn(orch_loop *loop, uint64_t limit) {
    loop->running = true;
    loop->stats.turns++;
    if (ORCHI_UNLIKELY(loop->desc.seed != 0)) orchi_shuffle(loop);
    orchi_round(loop);
    if (ORCHI_UNLIKELY(orchi_inbox_posted(loop))) orchi_inbox_take(loop);
    int error = 0;
    if (orchi_is_stopping(loop)) limit = 0;
    if (!orchi_ring_empty(loop)) error = orchi_look_busy(loop);
    else if (orchi_can_wake(loop)) error = orchi_look_idle(loop, limit);
    loop->running = false;
    return error != 0 ? error : orchi_can_wake(loop);
}

// ---- who awaits what

/* A name for reports: the kind, the task's name if it has one, and a number that no other future
 * has. */
static void orchi_describe(const orch_future *f, char *buffer, size_t size) {
    const orchi_kind *kind = &orchi_kinds[f->kind];
    unsigned long long id = (unsigned long long)f->generation / 2;
    const char *label = kind->label != NULL ? kind->label(f) : "";
    const char *quote = label[0] != '\0' ? "'" : "";
    char descriptor[32] = "";
    if (f->kind == ORCHI_READY) {
        snprintf(descriptor, sizeof descriptor, "of descriptor %d", f->as.ready.fd);
    }
    snprintf(buffer, size, "%s %s%s%s%s#%llu", kind->name, descriptor, quote, label, quote, id);
}

/* What f waits for from place *at on; NULL: no more. A holder stands for what it holds. */
static orch_future *orchi_next_source(const orch_future *f, uint32_t *at) {
    orch_future *source = orchi_kinds[f->kind].source(f, at);
    while (source != NULL && source->kind == ORCHI_PROXY) source = source->as.follow.source;
    return source;
}

/* Whether a future stands for somebody who waits: these are what a deadlock is made of. An
 * iteration waits when somebody has asked it for more. */
static bool orchi_awaits(const orch_future *f) {
    uint32_t at = 0;
    if (orchi_settled(f)) return false;
    if (f->kind == ORCHI_HUB) return orchi_next_source(f, &at) != NULL;
    return orchi_kinds[f->kind].source != NULL || (f->flags & ORCHI_ENDS_ON);
}

/* Whether it is a task that waits for a descriptor, which needs no future for it. */
static bool orchi_on_descriptor(const orch_future *f) {
    return f->kind == ORCHI_TASK && (f->as.task.events & ORCHI_BOTH) && f->as.task.events > 0;
}

enum { ORCHI_SHOWN = 8 }; // sources a line of a report names

/* Names what f waits for, and counts what does not fit on a line: a combinator may have a million
 * inputs. */
static void orchi_describe_sources(const orch_future *f, char *text, size_t size) {
    uint32_t at = 0, shown = 0, more = 0;
    const size_t reserve = sizeof " and 4294967295 more";
    snprintf(text, size, "nothing: it runs, or is ready to");
    if (orchi_on_descriptor(f)) {
        snprintf(text, size, "readiness of descriptor %d", f->as.task.fd);
    }
    for (;;) {
        orch_future *source = orchi_next_source(f, &at);
        char name[160];
        if (source == NULL) break;
        size_t used = shown > 0 ? strlen(text) : 0;
        if (more == 0) orchi_describe(source, name, sizeof name);
        if (more > 0 || shown == ORCHI_SHOWN || used + strlen(name) + reserve > size) more++;
        else snprintf(text + used, size - used, "%s%s", shown++ > 0 ? ", " : "", name);
    }
    size_t used = strlen(text);
    if (more > 0) snprintf(text + used, size - used, " and %u more", (unsigned)more);
}

/* Holders are left out: whoever holds is shown with what it holds. */
static void orchi_dump_visit(orch_future *f, void *context) {
    if (!orchi_awaits(f) || (f->kind == ORCHI_PROXY && (f->flags & ORCHI_WAITED))) return;
    orch_loop *loop = (orch_loop *)context;
    char who[160], what[320] = "its producer";
    orchi_describe(f, who, sizeof who);
    if (orchi_kinds[f->kind].source != NULL) orchi_describe_sources(f, what, sizeof what);
    orchi_report(loop, "asyncorch:   %s awaits %s\n", who, what);
}

static void orchi_blocked_visit(orch_future *f, void *context) {
    if (orchi_awaits(f)) ++*(size_t *)context;
}

/* How many tasks and callbacks wait for something. */
static size_t orchi_blocked(orch_loop *loop) {
    size_t count = 0;
    orchi_each_slot(loop, orchi_blocked_visit, &count);
    return count;
}

/* Looks at every slot there is: for a hang, not for a program that works. */
void orch_loop_dump(orch_loop *loop) {
    if (loop == NULL) return;
    if (loop == orchi_loop) orchi_each_slot(loop, orchi_dump_visit, loop);
    else orchi_misuse("orch_loop_dump", ORCH_ETHREAD);
}

/* What it takes to see a failure again. */
static void orchi_report_seed(orch_loop *loop) {
    unsigned long long seed = loop->desc.seed;
    if (seed != 0) orchi_report(loop, "asyncorch: the loop's seed is %llu\n", seed);
}

/* Says who awaits what, so that a hang names its cause. */
static int orchi_deadlock(orch_loop *loop) {
    orchi_report(loop, "asyncorch: deadlock: all is blocked, with no timer and no descriptor\n");
    orch_loop_dump(loop);
    orchi_report_seed(loop);
    return ORCH_EDEADLK;
}

// ---- running it

/* Whether a task, a callback or a hook of this loop is running now. */
static bool orchi_inside(const orch_loop *loop) {
    return loop->running || loop->trash != NULL || loop->current != NULL;
}

/* Checks what every public call on a loop checks. */
static int orchi_loop_check(const orch_loop *loop, const char *function) {
    if (loop == NULL) return orchi_misuse(function, ORCH_EINVAL);
    if (loop != orchi_loop) return orchi_misuse(function, ORCH_ETHREAD);
    return orchi_inside(loop) ? orchi_misuse(function, ORCH_ENESTED) : 0;
}

/* A stop holds for the step or run that is under way: each begins without it. */
int orch_loop_step(orch_loop *loop, uint64_t ms) {
    int error = orchi_loop_check(loop, "orch_loop_step");
    if (error != 0) return error;
    loop->stopping = false;
    return orchi_turn(loop, ms < UINT64_MAX / 1000000u ? ms * 1000000u : UINT64_MAX);
}

int orch_loop_run(orch_loop *loop) {
    int more = orchi_loop_check(loop, "orch_loop_run");
    if (more != 0) return more;
    loop->stopping = false;
    do more = orchi_turn(loop, UINT64_MAX);
    while (more == 1 && !loop->stopping);
    if (more != 0 || loop->stopping) return more < 0 ? more : 0;
    return orchi_blocked(loop) > 0 ? orchi_deadlock(loop) : 0;
}

// ---- guest mode

/* Only where it was asked for: the poller that moves by itself has none that stays. */
int orch_loop_fd(const orch_loop *loop) {
    if (loop == NULL) return orchi_misuse("orch_loop_fd", ORCH_EINVAL);
    bool one = loop->poller.pinned && loop->poller.ops != &orchi_poll_ops;
    return one ? loop->poller.queue : -ENOTSUP;
}

/* From now on poll, as what the host waits for has to stay the same. */
static int orchi_pin(orch_loop *loop) {
    orchi_poller *p = &loop->poller;
    int error =
        p->pinned || p->ops == &orchi_poll_ops ? 0 : orchi_poller_move(loop, &orchi_poll_ops);
    if (error != 0) return error;
    p->pinned = true;
    orchi_tell_all(loop, loop->generation, false);
    return 0;
}

int orch_loop_pollfds(orch_loop *loop, struct pollfd *fds, size_t capacity) {
    int error = orchi_loop_check(loop, "orch_loop_pollfds");
    if (error != 0) return error;
    if (fds == NULL && capacity > 0) return orchi_misuse("orch_loop_pollfds", ORCH_EINVAL);
    error = orchi_pin(loop);
    if (error != 0) return error;
    if (loop->inbox->ends[0] < 0) loop->wake_open(loop); // posts end the host's sleep too
    loop->offered = loop->generation;
    struct pollfd one = {loop->poller.queue, POLLIN, 0};
    bool all = loop->poller.ops == &orchi_poll_ops;
    if (all) { // then nothing is muted
        loop->poller.dense = false;
        orchi_poll_unmute(&loop->poller);
        orchi_poll_sweep(&loop->poller);
    }
    size_t count = all ? loop->poller.count : 1;
    const struct pollfd *from = all ? loop->poller.fds : &one;
    for (size_t i = 0; i < count && i < capacity; i++) fds[i] = from[i];
    return (int)count;
}

/* The host is about to sleep, so from now on others have to wake it: orchi_doze. */
uint64_t orch_loop_timeout(orch_loop *loop) {
    if (orchi_loop_check(loop, "orch_loop_timeout") != 0) return 0;
    if (!orchi_ring_empty(loop)) return 0;
    uint64_t now = orchi_now(loop), ns = orchi_until_timer(loop, now);
    if (ns > 0) ns = orchi_doze(loop, ns);
    return ns == UINT64_MAX ? ns : ns / 1000000u + (ns % 1000000u != 0);
}

static void orchi_guest_found(orchi_poller *p, const struct pollfd *at) {
    bool known = at->fd >= 0 && (size_t)at->fd < p->watch_count;
    uint32_t position = known ? p->watches[at->fd].position : 0;
    if (position > p->muted && at->revents != 0) {
        orchi_poll_found(p, position - 1, at->revents);
    }
}

/* What the host has found, as a look would have. It may ask about descriptors that nobody waits for
 * any more. */
static int orchi_guest_look(orch_loop *loop, const struct pollfd *fds, size_t count) {
    orchi_poller *p = &loop->poller;
    int error = 0;
    if (p->ops != &orchi_poll_ops) {
        error = orchi_poll(loop, 0);
    } else if (!orchi_found_reserve(loop, count)) {
        error = ORCH_ENOMEM;
    } else {
        for (size_t i = 0; i < count; i++) orchi_guest_found(p, &fds[i]);
        orchi_tell_all(loop, loop->offered, false);
        orchi_wake(loop);
    }
    orchi_inbox_take(loop);
    return error;
}

/* A turn the other way round: the host has slept, so the look comes first, then the round. */
int orch_loop_dispatch(orch_loop *loop, const struct pollfd *fds, size_t count) {
    int error = orchi_loop_check(loop, "orch_loop_dispatch");
    if (error != 0) return error;
    bool valid = (fds != NULL || count == 0) && loop->desc.clock != ORCH_CLOCK_VIRTUAL;
    if (!valid) return orchi_misuse("orch_loop_dispatch", ORCH_EINVAL);
    loop->running = true;
    loop->stats.turns++;
    error = orchi_guest_look(loop, fds, count);
    uint64_t now = orchi_now(loop);
    orchi_timers_stamp(loop, now);
    orchi_timers_fire(loop, now);
    if (loop->desc.seed != 0) orchi_shuffle(loop);
    orchi_round(loop);
    loop->running = false;
    return error != 0 ? error : orchi_can_wake(loop);
}

void orch_loop_stop(orch_loop *loop) {
    if (loop == NULL) return;
    if (loop == orchi_loop) loop->stopping = true;
    else orchi_misuse("orch_loop_stop", ORCH_ETHREAD);
}

orch_loop *orch_loop_current(void) { return orchi_loop; }

const orch_loop_desc *orch_loop_settings(const orch_loop *loop) {
    return loop != NULL ? &loop->desc : NULL;
}

/* Counted when asked: counters would be written four times for each callback, and twice for each
 * task. */
static void orchi_count_visit(orch_future *f, void *context) {
    orch_loop_stats *stats = (orch_loop_stats *)context;
    stats->futures++;
    stats->tasks += f->kind == ORCHI_TASK;
}

orch_loop_stats orch_loop_statistics(const orch_loop *loop) {
    orch_loop_stats stats;
    memset(&stats, 0, sizeof stats);
    if (loop == NULL) return stats;
    stats = loop->stats;
    stats.timers = loop->timers.count;
    stats.poller = loop->poller.ops->id;
    orchi_each_slot((orch_loop *)(uintptr_t)loop, orchi_count_visit, &stats); // changes none
    stats.resumes = orchi_resumes(loop);
    stats.wakes = orchi_inbox_wakes(loop);
    return stats;
}

// ------------------------------------------------------------------------------------------------
// >>future
//
// Who owns what. Invariants:
//   - references counts handles and consumers. Pending work needs none: it lives until it settles.
//     Settled and without references it is freed.
//   - Every consumer holds its input exclusively. A future with one reference is consumed itself:
//     the consumer's address goes into waiter.one, for ever, as nobody else has a handle. One with
//     more gets a proxy per consumer: a slot in its list that is settled with a share of it. So
//     each input has one consumer, cancelling walks up one chain, and a second consumption of one
//     handle is seen.
//   - Settling and cancelling only queue: no callback, hook or wake-up runs inside them, and
//     nothing recurses, however long a chain or deep a nesting.
//   - Cancelling walks from consumer to source: what passes results on asks its source and stays,
//     until that has ended; only the source at the end of the walk settles. A proxy whose source
//     others hold too lets go of it instead.
//   - A follower with a single holder is bypassed: its consumer moves to its source. So a loop of
//     follows stays flat.
//   - A decision (outcome final, losers still ending) climbs at once through followers, proxies and
//     combinators: see orchi_announce.
//   - A result is freed iteratively: see orchi_retire.

/* Not for immortal futures, which belong to no loop. */
static orch_loop *orchi_loop_of(const orch_future *f) { return orchi_page_of(f)->loop; }

// How a value travels. Take
//
//     a = orch_future_new(&p);  b = orch_then(a, f, ...);  r = orch_await(b);
//
// and later orch_settle(p, v):
//
//     orch_then    claims a (one reference, so a itself); a.waiter is b, b's source is a
//     orch_await   claims b; b.waiter is the task's future; the task leaves its stack
//     orch_settle  writes v into a, and queues b, as a.waiter says
//     the loop     pops b: calls f with a's result where it lies, frees a's slot, writes
//                  what f returned into b, and queues the task's future
//     the loop     pops that: enters the task, which moves the result out of b
//
// Two slots, no allocation, no search. Had a been shared, orch_then would have put a proxy into a's
// list and claimed that. Had f returned orch_chain(c), c would have taken b's place: its waiter
// would be the task, and b would be gone.
//
// How a cancellation travels. orch_drop(b) in place of the await: b has no references left, so it
// is asked to end. It asks its source, a, which is a promise: without a hook it settles with
// ORCH_ECANCELED there and then, b is queued, f sees the error, b settles, and as nobody holds it,
// is freed.

// ---- sharing and freeing results

/* Whether a release may give up a future: on its loop's thread. Elsewhere it is kept, as its slot
 * may be in use there. */
static bool orchi_may_release(const orch_future *f) {
    if ((f->flags & ORCHI_IMMORTAL) || orchi_loop_of(f) == orchi_loop) return true;
    orchi_misuse("orch_result_free", ORCH_ETHREAD);
    return false;
}

/* The release of a share: its owner is the future. */
static void orchi_share_release(void *owner) {
    orch_future *f = (orch_future *)owner;
    if (orchi_may_release(f)) orchi_release(f);
}

/* The release of a lent result: nothing to give back. */
static void orchi_lent_release(void *future) { (void)future; }

/* The release of a result that outlives its loop: the loop was kept for it. */
static void orchi_kept_release(void *loop) { ((orch_loop *)loop)->close((orch_loop *)loop); }

/* The result that a share, a lent or a kept one shows. */
static const orch_result *orchi_shown(const orch_result *r) {
    for (;;) {
        if (r->release == orchi_share_release || r->release == orchi_lent_release) {
            r = &((const orch_future *)r->owner)->as.result;
        } else if (r->release == orchi_kept_release) {
            r = &((const orch_loop *)r->owner)->outcome;
        } else {
            return r;
        }
    }
}

/* The release of a chain: what orch_chain returns, unless somebody settles with it. */
static void orchi_chain_release(void *future) { orchi_release((orch_future *)future); }

/* Frees a settled future without references whose result owns something. Releasing that may retire
 * others, and so on: then the outermost call does the work, from a list. */
ORCHI_NO_INLINE static void orchi_retire_owning(orch_loop *loop, orch_future *f) {
    f->kind = ORCHI_EXTRA; // a pop or an unboxing meanwhile leaves it alone
    f->flags |= ORCHI_WAITED;
    if (loop->trash != NULL) {
        f->waiter.list.first = loop->trash->list;
        loop->trash->list = f;
        return;
    }
    orchi_trash mine = {NULL};
    loop->trash = &mine;
    while (f != NULL) {
        orch_result r = f->as.result;
        orchi_slot_free(loop, f);
        r.release(r.owner);
        f = mine.list;
        if (f != NULL) mine.list = f->waiter.list.first;
    }
    loop->trash = NULL;
}

/* Frees a settled future without references. */
static inline void orchi_retire(orch_loop *loop, orch_future *f) {
    if (f->as.result.release == NULL) orchi_slot_free(loop, f);
    else orchi_retire_owning(loop, f);
}

/* Consumes one of several references, or that to an immortal future. */
ORCHI_NO_INLINE static orch_result orchi_take_share(orch_future *f) {
    orch_result r = f->as.result;
    if (f->flags & ORCHI_IMMORTAL) return r;
    f->flags |= ORCHI_LOOKED;
    if (r.release == NULL) {
        f->references--; // nothing to own
        return r;
    }
    r.owner = f;
    r.release = orchi_share_release;
    return r;
}

/* Consumes a reference to a settled future: its outcome, moved out of it or as a share. */
static inline orch_result orchi_take_result(orch_future *f) {
    if (ORCHI_UNLIKELY(f->references != 1)) return orchi_take_share(f);
    orch_result r;
    orchi_move(&r, &f->as.result);
    orchi_slot_free(orchi_loop_of(f), f);
    return r;
}

/* The outcome of a settled future that stays its own. */
static orch_result orchi_lend(orch_future *f) {
    orch_result r = f->as.result;
    if (f->flags & ORCHI_IMMORTAL) return r;
    f->flags |= ORCHI_LOOKED;
    r.owner = f;
    r.release = orchi_lent_release;
    return r;
}

/* The hook is called from here only, when nobody can look at the rejection any more. */
static void orchi_unhandled(orch_loop *loop, const orch_result *r) {
    loop->desc.on_unhandled(r, loop->desc.context);
}

/* A future has settled and nobody holds it. */
ORCHI_NO_INLINE static void orchi_abandon(orch_loop *loop, orch_future *f) {
    if (f->as.result.error != 0 && !(f->flags & (ORCHI_CANCEL | ORCHI_LOOKED))) {
        orchi_unhandled(loop, &f->as.result);
    }
    orchi_retire(loop, f);
}

/* The same, where mostly nothing is to be reported or released. */
static inline void orchi_leave_behind(orch_loop *loop, orch_future *f) {
    bool light = f->as.result.error == 0 && f->as.result.release == NULL;
    if (ORCHI_LIKELY(light)) orchi_slot_free(loop, f);
    else orchi_abandon(loop, f);
}

// ---- decisions

/* Follows a decision upwards until somebody is not decided by it. What is shared on the way goes on
 * a worklist, linked through `link`. */
static void orchi_climb(orch_future *f, bool ok, orch_future **shared) {
    for (;;) {
        f->flags |= (uint16_t)(ORCHI_DECIDED | (ok ? ORCHI_DECIDED_OK : 0));
        if (f->flags & ORCHI_LISTED) {
            f->as.follow.link = *shared;
            *shared = f;
        }
        if (!(f->flags & ORCHI_WAITED)) return;
        orch_future *target = f->waiter.one.target;
        bool (*decided)(orch_future *, uint32_t, bool *) = orchi_kinds[target->kind].decided;
        if (decided == NULL || !decided(target, f->waiter.one.index, &ok)) return;
        f = target;
    }
}

/* Tells everything that encloses f, whose outcome is final from now on though it may not be
 * settled. */
static void orchi_announce(orch_future *f, bool ok) {
    orch_future *shared = NULL;
    orchi_climb(f, ok, &shared);
    while (shared != NULL) {
        orch_future *from = shared, *next = NULL;
        shared = from->as.follow.link;
        ok = (from->flags & ORCHI_DECIDED_OK) != 0;
        for (orch_future *proxy = from->waiter.list.first; proxy != NULL; proxy = next) {
            next = proxy->as.follow.next;
            if (!(proxy->flags & ORCHI_DECIDED)) orchi_climb(proxy, ok, &shared);
        }
    }
}

// ---- settling

/* An input of a kind that counts has settled. */
ORCHI_NO_INLINE static void orchi_count(orch_loop *loop, orch_future *f, bool ok) {
    orch_future *target = f->waiter.one.target;
    uint32_t index = f->waiter.one.index;
    const orchi_kind *kind = &orchi_kinds[target->kind];
    if (kind->decided != NULL && !(f->flags & ORCHI_DECIDED)) {
        if (kind->decided(target, index, &ok)) orchi_announce(target, ok);
    }
    if (kind->ended != NULL) kind->ended(target, index);
    else orchi_push(loop, target);
}

/* Tells the consumer of f, which has settled. */
static inline void orchi_notify(orch_loop *loop, orch_future *f, bool ok) {
    orch_future *target = f->waiter.one.target;
    if (ORCHI_LIKELY(target->kind < ORCHI_COUNTS)) orchi_push(loop, target);
    else orchi_count(loop, f, ok);
}

/* Tells the consumer of a settled future, or queues its own orch_on callback. */
static inline void orchi_deliver(orch_loop *loop, orch_future *f, bool ok) {
    if (f->flags & ORCHI_WAITED) {
        orchi_notify(loop, f, ok);
    } else {
        f->kind = ORCHI_ON;
        orchi_push(loop, f);
    }
}

// Whom a settled future tells, and there is one of these only:
//
//     a consumer         is queued, or, where it counts its inputs, told now: that only counts
//     proxies            each settles with a share, and tells its own consumer; none is left
//     an orch_on         is queued in the future's own slot
//     a handle           nobody: whoever has it will ask
//     nobody             it is freed, and a rejection that was never looked at is reported

/* Settles every proxy of a settled future with a share of it, in the order in which they
 * registered. */
ORCHI_NO_INLINE static void orchi_settle_proxies(orch_loop *loop, orch_future *f) {
    orch_future *proxy = f->waiter.list.first;
    f->flags &= (uint16_t)~ORCHI_LISTED;
    while (proxy != NULL) {
        orch_future *next = proxy->as.follow.next;
        bool last = f->references == 1;
        proxy->as.result = orchi_take_result(f);
        proxy->kind = ORCHI_DONE;
        if (proxy->flags & ORCHI_CONSUMED) orchi_deliver(loop, proxy, proxy->as.result.error == 0);
        else if (proxy->references == 0)
            orchi_push(loop, proxy); // given up: orchi_done_run frees it
        if (last) return;
        proxy = next;
    }
}

/* Settles a pending future with a plain result, which moves into it. In line where a call would
 * show: one costs 4 to 5 cycles of the 60 that a future with a callback takes. */
static ORCHI_INLINE void orchi_settle_inline(orch_loop *loop, orch_future *f,
                                             const orch_result *r) {
    orchi_move(&f->as.result, r);
    f->kind = ORCHI_DONE;
    if (ORCHI_LIKELY(f->flags & ORCHI_CONSUMED)) orchi_deliver(loop, f, r->error == 0);
    else if (f->flags & ORCHI_LISTED) orchi_settle_proxies(loop, f);
    else if (f->references == 0) orchi_leave_behind(loop, f);
}

ORCHI_NO_INLINE static void orchi_settle(orch_loop *loop, orch_future *f, const orch_result *r) {
    orchi_settle_inline(loop, f, r);
}

/* Settles with an error that needs no message. */
static void orchi_reject(orch_loop *loop, orch_future *f, int error) {
    orch_result r = orch_fail(error);
    orchi_settle(loop, f, &r);
}

/* Settles a future as its settled source has; consumes the source. */
static void orchi_settle_as(orch_loop *loop, orch_future *f, orch_future *source) {
    orch_result r = orchi_take_result(source);
    orchi_settle(loop, f, &r);
}

// ---- cancelling and giving up

// What each kind answers to a request, and whom it names as the next to ask:
//
//     promise                    without a hook it settles now; with one, that is queued, once
//     timer, readiness, signal   settles now, and leaves heap or table
//     then, follower, timeout    the source; it settles when that has
//     proxy                      the source, if nobody else holds it; else lets go, and settles now
//     combinator                 is decided; asks its inputs when it runs
//     task                       remembers it; what it waits for, unless a shield or a join forbids
//     scope                      nothing: its task asks the members
//
// So a request walks along one chain to where the work is done, and costs its length.

/* Asks pending work to end: from what was asked up to where the work is done. */
static void orchi_cancel(orch_future *f, int reason) {
    while (f != NULL && !orchi_settled(f)) f = orchi_kinds[f->kind].cancel(f, reason);
}

/* Nobody holds pending work any more. */
ORCHI_NO_INLINE static void orchi_release_pending(orch_future *f) {
    if (f->flags & ORCHI_DETACHED) return;
    f->flags |= ORCHI_CANCEL;
    orchi_cancel(f, ORCH_ECANCELED);
}

/* Gives up a reference without waiting. */
static void orchi_release(orch_future *f) {
    if (f->references == 0) return; // immortal
    if (--f->references > 0) return;
    if (ORCHI_LIKELY(orchi_settled(f))) orchi_retire(orchi_loop_of(f), f);
    else orchi_release_pending(f);
}

// ---- consuming

/* What is wrong with a handle, or 0. Immortal futures are right everywhere. */
static inline int orchi_handle_error(const orch_future *f) {
    if (f == NULL) return ORCH_EINVAL;
    if (!(f->generation & 1)) return ORCH_ECONSUMED;
    if (f->flags & (ORCHI_IMMORTAL | ORCHI_CONSUMED)) {
        return f->flags & ORCHI_IMMORTAL ? 0 : ORCH_ECONSUMED;
    }
    if (f->references == 0) return ORCH_ECONSUMED; // given up, and still ending
    return orchi_loop_of(f) != orchi_loop ? ORCH_ETHREAD : 0;
}

/* The common case of a handle: this loop's, to something that nobody else holds and nobody
 * consumes. Everything else is told apart by orchi_handle_error. */
static inline bool orchi_is_exclusive(const orch_future *f) {
    return f != NULL && (f->generation & 1) && f->references == 1 &&
           !(f->flags & (ORCHI_IMMORTAL | ORCHI_CONSUMED)) && orchi_loop_of(f) == orchi_loop;
}

/* The most common one: pending, and of a kind that consumers need no care for. */
static inline bool orchi_is_plain(const orch_future *f) {
    return orchi_is_exclusive(f) && f->kind < ORCHI_COUNTS;
}

/* The end mark's first word is 0, as a freed slot's is even: it is no future. */
static int orchi_check(const orch_future *f, const char *function) {
    int error = orchi_handle_error(f);
    return ORCHI_UNLIKELY(error != 0) ? orchi_misuse(function, error) : 0;
}

/* Gives up an array of futures that was handed over, when it cannot be used. All are asked to end
 * before any is waited for. */
static void orchi_give_up(size_t count, orch_future *const *futures) {
    for (size_t i = 0; i < count; i++) {
        orch_future *f = futures[i];
        if (orchi_handle_error(f) == 0 && f->references == 1) orchi_cancel(f, ORCH_ECANCELED);
    }
    for (size_t i = 0; i < count; i++) orch_drop(futures[i]);
}

/* In the order of registration, which is the order in which they will be told. */
static void orchi_list_append(orch_future *f, orch_future *proxy) {
    orch_future *last = f->flags & ORCHI_LISTED ? f->waiter.list.last : NULL;
    proxy->as.follow.previous = last;
    proxy->as.follow.next = NULL;
    if (last != NULL) last->as.follow.next = proxy;
    else f->waiter.list.first = proxy;
    f->waiter.list.last = proxy;
    f->flags |= ORCHI_LISTED;
}

/* In constant time: a cancelled consumer must not cost more because a future is popular. */
static void orchi_list_remove(orch_future *f, orch_future *proxy) {
    orch_future *previous = proxy->as.follow.previous, *next = proxy->as.follow.next;
    if (previous != NULL) previous->as.follow.next = next;
    else f->waiter.list.first = next;
    if (next != NULL) next->as.follow.previous = previous;
    else f->waiter.list.last = previous;
    if (f->waiter.list.first == NULL) f->flags &= (uint16_t)~ORCHI_LISTED;
}

/* One consumer's registration at a pending future; it takes over one reference. */
static orch_future *orchi_proxy_new(orch_future *f, unsigned flags) {
    orch_future *proxy = orchi_slot_new(orchi_loop, ORCHI_PROXY);
    if (proxy == NULL) return NULL;
    proxy->flags = (uint16_t)(flags | (f->flags & (ORCHI_DECIDED | ORCHI_DECIDED_OK)));
    proxy->as.follow.source = f;
    orchi_list_append(f, proxy);
    return proxy;
}

/* The consumer's reference becomes the proxy's. Without memory it is given back. */
static orch_future *orchi_claim_shared(orch_future *f) {
    orch_future *proxy = orchi_proxy_new(f, 0);
    if (proxy != NULL) return proxy;
    f->references--;
    return orchi_rejected(ORCH_ENOMEM);
}

/* The rare handles: unusable, shared, or a follower, whose source takes its place. */
ORCHI_NO_INLINE static orch_future *orchi_claim_special(orch_future *f, const char *function) {
    int error = orchi_check(f, function);
    if (error != 0) return orchi_rejected(error);
    if (orchi_settled(f)) return f;
    if (f->references != 1) return orchi_claim_shared(f);
    if (f->kind != ORCHI_FOLLOW || (f->flags & ORCHI_QUEUED)) return f;
    orch_future *source = f->as.follow.source;
    if (orchi_settled(source)) return f;
    source->flags &= (uint16_t)~ORCHI_WAITED;
    source->flags |= f->flags & (ORCHI_CANCEL | ORCHI_DETACHED);
    orchi_slot_free(orchi_loop_of(f), f);
    return source;
}

/* What every consuming function does first with a handle. Returns a future that the caller now
 * holds exclusively if it is pending: f, a proxy of it, or, where f only follows, what it follows.
 * An unusable handle gives an immortal rejected future. */
static inline orch_future *orchi_claim(orch_future *f, const char *function) {
    bool common = orchi_is_exclusive(f) && f->kind != ORCHI_FOLLOW;
    return ORCHI_LIKELY(common) ? f : orchi_claim_special(f, function);
}

/* Makes target the consumer of a claimed pending future. */
static inline void orchi_attach(orch_future *f, orch_future *target, uint32_t index) {
    f->flags |= ORCHI_WAITED;
    f->waiter.one.target = target;
    f->waiter.one.index = index;
}

/* The same for a consumer that is queued as soon as f has settled. */
static inline void orchi_attach_or_push(orch_future *f, orch_future *target) {
    if (orchi_settled(f)) {
        if (!(f->flags & ORCHI_IMMORTAL) && f->references == 1) f->flags |= ORCHI_WAITED;
        orchi_push(orchi_loop, target);
    } else {
        orchi_attach(f, target, 0);
    }
}

/* The loop that a constructor works on, NULL outside of one. */
static orch_loop *orchi_here(const char *function) {
    if (ORCHI_UNLIKELY(orchi_loop == NULL)) orchi_misuse(function, ORCH_ENOLOOP);
    return orchi_loop;
}

// ---- following

/* What f follows in the end. */
static orch_future *orchi_root(orch_future *f) {
    while (f->kind == ORCHI_FOLLOW || f->kind == ORCHI_PROXY) f = f->as.follow.source;
    return f;
}

/* Whether a follower consumes a. */
static bool orchi_followed(const orch_future *a) {
    if (a->flags & ORCHI_WAITED) return a->waiter.one.target->kind == ORCHI_FOLLOW;
    const orch_future *p = a->flags & ORCHI_LISTED ? a->waiter.list.first : NULL;
    while (p != NULL &&
           !((p->flags & ORCHI_WAITED) && p->waiter.one.target->kind == ORCHI_FOLLOW)) {
        p = p->as.follow.next;
    }
    return p != NULL;
}

/* Whether a would follow itself. Only what a follower consumes can stand further up the chain of f:
 * so chains built from their end are not walked again for each link. */
static bool orchi_cycles(const orch_future *a, orch_future *f) {
    if (f == a || (f->kind == ORCHI_PROXY && f->as.follow.source == a)) return true;
    return orchi_followed(a) && orchi_root(f) == a;
}

/* Whether a has at most one holder, and that one is a consumer or nobody. */
static bool orchi_can_bypass(const orch_future *a) {
    return a->references == 0 || (a->references == 1 && (a->flags & ORCHI_CONSUMED));
}

/* Puts f in the place of a, which follows it and has one holder: a's consumer becomes f's. */
static void orchi_bypass(orch_loop *loop, orch_future *a, orch_future *f) {
    bool asked = (a->flags & ORCHI_CANCEL) != 0, decided = (f->flags & ORCHI_DECIDED) != 0;
    f->references = a->references;
    f->flags |= a->flags & (ORCHI_CONSUMED | ORCHI_DETACHED);
    f->waiter = a->waiter;
    if (f->flags & ORCHI_WAITED) {
        orch_future *target = f->waiter.one.target;
        orchi_kinds[target->kind].retarget(target, f->waiter.one.index, f);
    }
    orchi_slot_free(loop, a);
    if (asked) f->flags |= ORCHI_CANCEL;
    if (decided) orchi_announce(f, (f->flags & ORCHI_DECIDED_OK) != 0);
    else if (asked) orchi_cancel(f, ORCH_ECANCELED);
}

/* Locks the pending future a in to a claimed f. */
static void orchi_lock_in(orch_loop *loop, orch_future *a, orch_future *f) {
    if (orchi_cycles(a, f)) {
        orchi_reject(loop, a, ORCH_ECYCLE);
        orchi_release(f);
    } else if (orchi_settled(f)) {
        orchi_settle_as(loop, a, f);
    } else if (orchi_can_bypass(a)) {
        orchi_bypass(loop, a, f);
    } else {
        a->kind = ORCHI_FOLLOW;
        a->as.follow.source = f;
        a->as.follow.link = NULL;
        orchi_attach(f, a, 0);
        if (f->flags & ORCHI_DECIDED) orchi_announce(f, (f->flags & ORCHI_DECIDED_OK) != 0);
        else if (a->flags & ORCHI_CANCEL) orchi_cancel(f, ORCH_ECANCELED);
    }
}

/* What orch_wait lent becomes a share when it is given away. */
static void orchi_own(orch_result *r) {
    if (r->release != orchi_lent_release) return;
    ((orch_future *)r->owner)->references++;
    r->release = orchi_share_release;
}

/* A result that owns something: that may be a chain. */
ORCHI_NO_INLINE static void orchi_resolve_owning(orch_loop *loop, orch_future *f, orch_result *r) {
    if (r->release == orchi_chain_release) {
        orchi_lock_in(loop, f, (orch_future *)r->owner);
    } else {
        orchi_own(r);
        orchi_settle_inline(loop, f, r);
    }
}

/* Settles a pending future with what a user gave. */
static ORCHI_INLINE void orchi_resolve(orch_loop *loop, orch_future *f, orch_result *r) {
    if (ORCHI_LIKELY(r->release == NULL)) orchi_settle_inline(loop, f, r);
    else orchi_resolve_owning(loop, f, r);
}

/* A promise whose cancel hook was queued may have locked in meanwhile: then there is nothing to do
 * yet. */
static void orchi_follow_run(orch_future *f) {
    if (!orchi_settled(f->as.follow.source)) return;
    orchi_settle_as(orchi_loop_of(f), f, f->as.follow.source);
}

/* What passes a result on asks its source, and settles when that has ended. A decision stands. */
static orch_future *orchi_follow_cancel(orch_future *f, int reason) {
    (void)reason;
    f->flags |= ORCHI_CANCEL;
    return f->flags & ORCHI_DECIDED ? NULL : f->as.follow.source;
}

/* What follows is decided as its source is: once. */
static bool orchi_follow_decided(orch_future *f, uint32_t input, bool *ok) {
    (void)input;
    (void)ok;
    return !(f->flags & ORCHI_DECIDED);
}

static void orchi_follow_retarget(orch_future *f, uint32_t input, orch_future *to) {
    (void)input;
    f->as.follow.source = to; // for every kind whose source stands first
}

static orch_future *orchi_follow_source(const orch_future *f, uint32_t *at) {
    return (*at)++ == 0 ? f->as.follow.source : NULL;
}

/* Asks the source when nobody else holds it; lets go of it otherwise. */
static orch_future *orchi_proxy_cancel(orch_future *f, int reason) {
    (void)reason;
    orch_future *source = f->as.follow.source;
    f->flags |= ORCHI_CANCEL;
    if (f->flags & ORCHI_DECIDED) return NULL;
    bool last = source->references == 1 && !(source->flags & ORCHI_DETACHED);
    if (last && !(f->flags & ORCHI_LOOKING)) return source;
    orchi_list_remove(source, f);
    source->references--;
    orchi_reject(orchi_loop_of(f), f, ORCH_ECANCELED);
    return NULL;
}

// ---- promises

ORCHI_COLD static orch_future *orchi_future_new(orch_promise *promise) {
    if (promise == NULL) return orchi_rejected(orchi_misuse("orch_future_new", ORCH_EINVAL));
    orch_loop *loop = orchi_here("orch_future_new");
    orch_future *f = loop != NULL ? orchi_slot_new(loop, ORCHI_PROMISE) : NULL;
    if (f == NULL) f = orchi_rejected(loop != NULL ? ORCH_ENOMEM : ORCH_ENOLOOP);
    promise->future = f;
    promise->generation = f->generation;
    return f;
}

orch_future *orch_future_new(orch_promise *promise) {
    orch_loop *loop = orchi_loop;
    orch_future *f = promise != NULL && loop != NULL ? orchi_page_take(loop->page) : NULL;
    if (ORCHI_UNLIKELY(f == NULL)) return orchi_future_new(promise);
    orchi_slot_begin(loop, f, ORCHI_PROMISE);
    promise->future = f;
    promise->generation = f->generation;
    return f;
}

bool orch_promise_pending(orch_promise p) {
    return p.future != NULL && p.future->generation == p.generation &&
           p.future->kind == ORCHI_PROMISE;
}

/* Whether this thread may settle with a ticket that is still good. */
static bool orchi_may_settle(orch_promise p, const char *function) {
    if (!orch_promise_pending(p)) return false;
    if (ORCHI_LIKELY(orchi_loop_of(p.future) == orchi_loop)) return true;
    orchi_misuse(function, ORCH_ETHREAD);
    return false;
}

/* What a settle that decides nothing was given. A chain is dropped, as orch_follow does. */
static void orchi_settle_refused(orch_result *r) {
    if (r->release == orchi_chain_release) {
        orch_future *f = (orch_future *)r->owner;
        r->release = NULL;
        orch_drop(f);
    } else {
        orch_result_free(r);
    }
}

bool orch_settle_with(orch_promise p, orch_result *r) {
    if (ORCHI_UNLIKELY(r == NULL)) {
        orchi_misuse("orch_settle_with", ORCH_EINVAL);
        return false;
    }
    if (ORCHI_UNLIKELY(!orchi_may_settle(p, "orch_settle"))) {
        orchi_settle_refused(r);
        return false;
    }
    orchi_resolve(orchi_loop, p.future, r);
    return true;
}

bool orch_follow(orch_promise p, orch_future *f) {
    if (!orchi_may_settle(p, "orch_follow")) {
        orch_drop(f);
        return false;
    }
    orchi_lock_in(orchi_loop, p.future, orchi_claim(f, "orch_follow"));
    return true;
}

/* Whether what f comes to gets anywhere: a task or callback sees whatever comes, a combinator that
 * is decided, or a scope that was cancelled, nothing. */
static bool orchi_is_seen(const orch_future *f) {
    while ((f->flags & ORCHI_WAITED) && f->kind != ORCHI_TASK) {
        f = f->waiter.one.target;
        if (f->flags & ORCHI_DECIDED) return false;
    }
    return true;
}

/* One of many holders is enough, and a handle that nobody has used yet. */
static bool orchi_is_wanted(const orch_future *f) {
    if (f->flags & ORCHI_CANCEL) return false;
    if (!(f->flags & ORCHI_LISTED)) return orchi_is_seen(f);
    uint32_t holders = 0;
    const orch_future *proxy = f->waiter.list.first;
    for (; proxy != NULL; proxy = proxy->as.follow.next) {
        if (orchi_is_seen(proxy)) return true;
        holders++;
    }
    return holders < f->references;
}

bool orch_promise_wanted(orch_promise p) {
    return orch_promise_pending(p) && orchi_is_wanted(p.future);
}

bool orch_promise_describe(orch_promise p, const char *label) {
    if (!orchi_may_settle(p, "orch_promise_describe") || label == NULL) return false;
    p.future->as.promise.label = label;
    p.future->flags |= ORCHI_NAMED;
    return true;
}

static const char *orchi_promise_label(const orch_future *f) {
    return f->flags & ORCHI_NAMED ? f->as.promise.label : "";
}

bool orch_promise_on_cancel(orch_promise p, orch_cancel_fn fn, void *context) {
    if (!orchi_may_settle(p, "orch_promise_on_cancel")) return false;
    if (fn == NULL) return orchi_misuse("orch_promise_on_cancel", ORCH_EINVAL) == 0;
    p.future->as.promise.fn = fn;
    p.future->as.promise.context = context;
    p.future->flags |= ORCHI_HOOKED;
    return true;
}

/* Without a hook there is nobody who could end later: it ends now. With one, the loop asks it,
 * once. */
static orch_future *orchi_promise_cancel(orch_future *f, int reason) {
    f->flags |= ORCHI_CANCEL;
    if (!(f->flags & ORCHI_HOOKED)) {
        orchi_reject(orchi_loop_of(f), f, ORCH_ECANCELED);
    } else if (!(f->flags & ORCHI_ASKED)) {
        f->flags |= ORCHI_ASKED;
        f->as.promise.reason = reason;
        orchi_push(orchi_loop_of(f), f);
    }
    return NULL;
}

/* Runs the cancel hook. QUEUED keeps the slot from being reused if the hook settles. */
static void orchi_promise_run(orch_future *f) {
    orch_loop *loop = orchi_loop_of(f);
    f->flags |= ORCHI_QUEUED;
    bool ended = f->as.promise.fn(f->as.promise.context, f->as.promise.reason);
    f->flags &= (uint16_t)~ORCHI_QUEUED;
    if (f->kind == ORCHI_PROMISE) {
        if (ended) orchi_reject(loop, f, ORCH_ECANCELED);
    } else {
        orchi_kinds[f->kind].run(f);
    }
}

/* What the ring points to after it was settled: nothing is left to do but to free it. */
static void orchi_done_run(orch_future *f) {
    if (f->references == 0) orchi_abandon(orchi_loop_of(f), f);
}

void *orch_promise_box(orch_promise p) {
    if (!orchi_may_settle(p, "orch_promise_box")) return &orch_end_mark;
    if (p.future->flags & ORCHI_BOXED) orchi_misuse("orch_promise_box", ORCH_EBUSY);
    p.future->flags |= ORCHI_BOXED;
    return p.future;
}

orch_promise orch_promise_unbox(void *box) {
    orch_promise dead = {NULL, 0};
    orch_future *f = (orch_future *)box;
    if (f == NULL) orchi_misuse("orch_promise_unbox", ORCH_EINVAL);
    if (f == NULL || f == ORCH_END || !(f->generation & 1) || !(f->flags & ORCHI_BOXED))
        return dead;
    if (orchi_loop_of(f) != orchi_loop) {
        orchi_misuse("orch_promise_unbox", ORCH_ETHREAD);
        return dead;
    }
    f->flags &= (uint16_t)~ORCHI_BOXED;
    if (f->kind != ORCHI_PROMISE) {
        bool last = f->kind == ORCHI_DONE && f->references == 0;
        if (last) orchi_slot_free(orchi_loop_of(f), f);
        return dead;
    }
    orch_promise p = {f, f->generation};
    return p;
}

/* A handle for what orch_chain claimed. A proxy has one consumer: handles need a future that
 * follows it. */
static orch_future *orchi_unchain(orch_loop *loop, orch_future *f) {
    if (f == NULL || loop == NULL) return orchi_rejected(ORCH_ENOLOOP);
    if (f->kind != ORCHI_PROXY) return f;
    orch_future *own = orchi_slot_new(loop, ORCHI_PROMISE);
    if (own == NULL) {
        orch_drop(f);
        return orchi_rejected(ORCH_ENOMEM);
    }
    orchi_lock_in(loop, own, f);
    return own;
}

orch_future *orch_settled(orch_result r) {
    orch_loop *loop = orchi_here("orch_settled");
    if (r.release == orchi_chain_release) return orchi_unchain(loop, (orch_future *)r.owner);
    orch_future *f = loop != NULL ? orchi_slot_new(loop, ORCHI_DONE) : NULL;
    if (f == NULL) {
        orch_result_free(&r);
        return orchi_rejected(loop != NULL ? ORCH_ENOMEM : ORCH_ENOLOOP);
    }
    orchi_own(&r);
    f->as.result = r;
    return f;
}

// ---- references

/* One more holder, in constant time and without memory: it fails by misuse only. */
orch_future *orch_ref(orch_future *f) {
    int error = orchi_check(f, "orch_ref");
    if (error != 0) return orchi_rejected(error);
    if (!(f->flags & ORCHI_IMMORTAL)) f->references++;
    return f;
}

/* Everything but a settled future that owns nothing. */
ORCHI_NO_INLINE static void orchi_drop(orch_future *f) {
    if (f == NULL || orchi_check(f, "orch_drop") != 0) return;
    bool ends = !orchi_settled(f) && f->references == 1 && !(f->flags & ORCHI_DETACHED);
    if (ends && orchi_loop->current != NULL) orchi_loop->join(f);
    else orchi_release(f);
}

void orch_drop(orch_future *f) {
    bool light = orchi_is_exclusive(f) && orchi_settled(f) && f->as.result.release == NULL;
    if (ORCHI_LIKELY(light)) orchi_slot_free(orchi_loop, f);
    else orchi_drop(f);
}

// Detaching and dropping both give up a handle. Detached work goes on, and frees itself when it has
// settled; its rejection is reported, unless somebody has looked. Dropped work is asked to end.

/* Whether there is a handle to be given up. */
static bool orchi_may_detach(const orch_future *f) {
    return f != NULL && orchi_check(f, "orch_detach") == 0 && !(f->flags & ORCHI_IMMORTAL);
}

void orch_detach(orch_future *f) {
    if (ORCHI_UNLIKELY(!orchi_is_exclusive(f)) && !orchi_may_detach(f)) return;
    f->flags |= ORCHI_DETACHED;
    if (--f->references == 0 && orchi_settled(f)) orchi_abandon(orchi_loop, f);
}

void orch_cancel(orch_future *f, int reason) {
    if (orchi_check(f, "orch_cancel") != 0 || orchi_settled(f)) return;
    f->flags |= ORCHI_CANCEL;
    orchi_cancel(f, reason != 0 ? reason : ORCH_ECANCELED);
}

bool orch_is_settled(const orch_future *f) {
    return orchi_check(f, "orch_is_settled") == 0 && orchi_settled(f);
}

/* A rejection that was looked at is not reported as unhandled: somebody knows. */
const orch_result *orch_peek(orch_future *f) {
    int error = orchi_check(f, "orch_peek");
    if (error != 0) return &orchi_rejected(error)->as.result;
    if (!orchi_settled(f)) return NULL;
    if (!(f->flags & ORCHI_IMMORTAL)) f->flags |= ORCHI_LOOKED;
    return &f->as.result;
}

// ---- then

typedef struct orchi_owned { // in an extra slot
    void *context;
    void (*release)(void *context);
} orchi_owned;

typedef char orchi_owned_fits[sizeof(orchi_owned) <= 48 ? 1 : -1]; // an extra slot

/* A pending slot that consumes a claimed f and is queued when it has settled; NULL when out of
 * memory, and f is given up. */
static orch_future *orchi_consumer(orch_future *f, orchi_kind_id kind) {
    orch_future *t = orchi_slot_new(orchi_loop, kind);
    if (t == NULL) {
        orch_drop(f);
        return NULL;
    }
    t->as.follow.source = f;
    t->as.follow.link = NULL;
    orchi_attach_or_push(f, t);
    return t;
}

ORCHI_NO_INLINE static orch_future *orchi_then(orch_future *f, orch_then_fn on_ok,
                                               orch_then_fn on_error, void *context,
                                               const char *function) {
    if (orchi_here(function) == NULL) return orchi_rejected(ORCH_ENOLOOP);
    orch_future *t = orchi_consumer(orchi_claim(f, function), ORCHI_THEN);
    if (t == NULL) return orchi_rejected(ORCH_ENOMEM);
    t->as.then.on_ok = on_ok;
    t->as.then.on_error = on_error;
    t->as.then.context = context;
    return t;
}

orch_future *orch_then(orch_future *f, orch_then_fn on_ok, orch_then_fn on_error, void *context) {
    orch_loop *loop = orchi_loop;
    orch_future *t = orchi_is_plain(f) ? orchi_page_take(loop->page) : NULL;
    if (ORCHI_UNLIKELY(t == NULL)) return orchi_then(f, on_ok, on_error, context, "orch_then");
    orchi_attach(f, t, 0);
    orchi_slot_begin(loop, t, ORCHI_THEN);
    t->as.then.source = f;
    t->as.then.on_ok = on_ok;
    t->as.then.on_error = on_error;
    t->as.then.context = context;
    return t;
}

/* The context's release is optional, its slot is not. */
static void orchi_owned_release(const orchi_owned *owned) {
    if (owned->release != NULL) owned->release(owned->context);
}

/* The context and its release do not fit into the slot: they get one of their own. */
static orch_future *orchi_then_owning(orch_future *f, const orch_then_desc *desc) {
    if (orchi_here("orch_then_with") == NULL) return orchi_rejected(ORCH_ENOLOOP);
    orchi_owned *owned = (orchi_owned *)orchi_extra_new(orchi_loop);
    if (owned == NULL) {
        orch_drop(f);
        return orchi_rejected(ORCH_ENOMEM);
    }
    owned->context = desc->context;
    owned->release = desc->release;
    orch_future *t = orchi_then(f, desc->on_ok, desc->on_error, owned, "orch_then_with");
    if (t->flags & ORCHI_IMMORTAL) orchi_extra_free(orchi_loop, owned);
    else t->flags |= ORCHI_OWNING;
    return t;
}

orch_future *orch_then_with(orch_future *f, const orch_then_desc *desc) {
    if (desc == NULL) {
        orch_drop(f);
        return orchi_rejected(orchi_misuse("orch_then_with", ORCH_EINVAL));
    }
    if (desc->release == NULL) {
        return orchi_then(f, desc->on_ok, desc->on_error, desc->context, "orch_then_with");
    }
    orch_future *t = orchi_then_owning(f, desc);
    if (t->flags & ORCHI_IMMORTAL) desc->release(desc->context);
    return t;
}

/* Frees what a callback was lent, unless it took it, or returned it: then it has moved along. */
static inline void orchi_called(orch_result *in, const orch_result *r) {
    if (ORCHI_LIKELY(in->release == NULL)) return;
    if (r->release != in->release || r->owner != in->owner) orch_result_free(in);
}

/* A finaliser. What it finalises passes through. */
static orch_result orchi_then_finally(orch_future *t, const orch_result *in) {
    t->as.finally.fn(t->as.finally.context);
    return *in;
}

/* A context that is owned. */
static orch_result orchi_then_owned(orch_loop *loop, orch_future *t, orch_then_fn fn,
                                    orch_result *in) {
    orchi_owned owned = *(orchi_owned *)t->as.then.context;
    orchi_extra_free(loop, t->as.then.context);
    orch_result r = fn != NULL ? fn(in, owned.context) : *in;
    if (fn != NULL) orchi_called(in, &r);
    orchi_owned_release(&owned);
    return r;
}

/* The rare forms. */
ORCHI_NO_INLINE static void orchi_then_special(orch_loop *loop, orch_future *t, orch_then_fn fn,
                                               orch_result *in) {
    bool finalises = (t->flags & ORCHI_FINALLY) != 0;
    orch_result r = finalises ? orchi_then_finally(t, in) : orchi_then_owned(loop, t, fn, in);
    orchi_resolve(loop, t, &r);
}

/* Calls what t is for and settles it. While a callback runs there is no source: cancelling t does
 * nothing. */
static ORCHI_INLINE void orchi_then_with(orch_loop *loop, orch_future *t, orch_result *in) {
    orch_then_fn fn = in->error == 0 ? t->as.then.on_ok : t->as.then.on_error;
    t->as.then.source = NULL;
    if (ORCHI_UNLIKELY(t->flags & (ORCHI_FINALLY | ORCHI_OWNING))) {
        orchi_then_special(loop, t, fn, in);
    } else if (ORCHI_LIKELY(fn != NULL)) {
        orch_result r = fn(in, t->as.then.context);
        orchi_called(in, &r);
        orchi_resolve(loop, t, &r);
    } else {
        orchi_settle(loop, t, in);
    }
}

/* Others hold the source too: the callback gets a share. */
ORCHI_NO_INLINE static void orchi_then_shared(orch_loop *loop, orch_future *t) {
    orch_result share = orchi_take_result(t->as.then.source);
    orchi_then_with(loop, t, &share);
}

/* The source has settled. The callback reads its result where it is, unless it is shared. */
static ORCHI_INLINE void orchi_then_run(orch_future *t) {
    orch_loop *loop = orchi_loop_of(t);
    orch_future *source = t->as.then.source;
    if (ORCHI_UNLIKELY(source->references != 1)) {
        orchi_then_shared(loop, t);
        return;
    }
    orchi_then_with(loop, t, &source->as.result);
    orchi_slot_free(loop, source);
}

orch_future *orch_finally(orch_future *f, void (*fn)(void *context), void *context) {
    if (fn == NULL) {
        orch_drop(f);
        return orchi_rejected(orchi_misuse("orch_finally", ORCH_EINVAL));
    }
    orch_future *t = orchi_then(f, NULL, NULL, NULL, "orch_finally");
    if (t->flags & ORCHI_IMMORTAL) {
        fn(context); // a finaliser is clean-up: it runs on every path
        return t;
    }
    t->flags |= ORCHI_FINALLY;
    t->as.finally.fn = fn;
    t->as.finally.context = context;
    return t;
}

/* Claimed here and now, so that a misuse is reported where it was made. */
orch_result orch_chain(orch_future *next) {
    orch_result r = {0, 0, NULL, orchi_claim(next, "orch_chain"), orchi_chain_release};
    return r;
}

// ---- on

/* The slot of what is claimed serves as the callback's. */
static inline void orchi_on_attach(orch_future *f, orch_on_fn fn, void *context) {
    f->flags |= ORCHI_ENDS_ON;
    f->waiter.on.fn = fn;
    f->waiter.on.context = context;
}

/* f is settled and exclusive. */
static void orchi_on_queue(orch_future *f, orch_on_fn fn, void *context) {
    f->kind = ORCHI_ON;
    orchi_on_attach(f, fn, context);
    orchi_push(orchi_loop, f);
}

/* f is settled, and others hold it too: its share goes to a slot of its own. */
static void orchi_on_shared(orch_future *f, orch_on_fn fn, void *context) {
    orch_future *own = orchi_slot_new(orchi_loop, ORCHI_DONE);
    if (own == NULL) {
        orch_result r = orch_fail(ORCH_ENOMEM);
        orchi_release(f);
        fn(&r, context);
        return;
    }
    own->as.result = orchi_take_result(f);
    orchi_on_queue(own, fn, context);
}

/* Everything but plain pending work. */
ORCHI_NO_INLINE static void orchi_on(orch_future *f, orch_on_fn fn, void *context) {
    if (fn == NULL || orchi_here("orch_on") == NULL) {
        if (fn == NULL) orchi_misuse("orch_on", ORCH_EINVAL);
        orch_result r = orch_fail(ORCH_ENOLOOP);
        orch_drop(f);
        if (fn != NULL) fn(&r, context);
        return;
    }
    f = orchi_claim(f, "orch_on");
    if (!orchi_settled(f)) {
        orchi_on_attach(f, fn, context);
    } else if (f->references == 1) {
        orchi_on_queue(f, fn, context);
    } else {
        orchi_on_shared(f, fn, context);
    }
}

void orch_on(orch_future *f, orch_on_fn fn, void *context) {
    if (ORCHI_LIKELY(orchi_is_plain(f) && fn != NULL)) orchi_on_attach(f, fn, context);
    else orchi_on(f, fn, context);
}

/* The callback reads the result where it is. What it leaves there is freed. */
static inline void orchi_on_run(orch_future *f) {
    f->waiter.on.fn(&f->as.result, f->waiter.on.context);
    if (ORCHI_UNLIKELY(f->as.result.release != NULL)) orch_result_free(&f->as.result);
    orchi_slot_free(orchi_loop_of(f), f);
}

// ---- timers as futures

/* A slot of a timed kind with its timer armed, or NULL. */
static orch_future *orchi_timed_new(orch_loop *loop, orchi_kind_id kind, uint64_t ms) {
    orch_future *f = orchi_slot_new(loop, kind);
    if (f == NULL) return NULL;
    f->as.timed.source = NULL;
    f->as.timed.link = NULL;
    f->as.timed.ms = ms;
    if (orchi_timer_arm(loop, f)) return f;
    orchi_slot_free(loop, f);
    return NULL;
}

orch_future *orch_after(uint64_t ms) {
    orch_loop *loop = orchi_here("orch_after");
    if (loop == NULL) return orchi_rejected(ORCH_ENOLOOP);
    orch_future *f = orchi_timed_new(loop, ORCHI_TIMER, ms);
    return f != NULL ? f : orchi_rejected(ORCH_ENOMEM);
}

/* A timer's value is nothing. */
static void orchi_timer_fire_future(orch_future *f, int events) {
    (void)events;
    orch_result r = orch_ok(NULL, NULL);
    orchi_settle(orchi_loop_of(f), f, &r);
}

/* A timer has nothing to wind down. */
static orch_future *orchi_timer_cancel(orch_future *f, int reason) {
    (void)reason;
    orch_loop *loop = orchi_loop_of(f);
    f->flags |= ORCHI_CANCEL;
    orchi_timer_disarm(loop, f);
    orchi_reject(loop, f, ORCH_ECANCELED);
    return NULL;
}

// ------------------------------------------------------------------------------------------------
// >>combinator
//
// all, all_settled, any, race, quorum and gather are one kind: a list of inputs, how many successes
// and how many failures decide it, and how many inputs have not ended. Two moments:
//   - The decision: the counters say so, from settle or from an input's own early decision. It is
//     final and climbs at once (orchi_announce). The combinator queues itself.
//   - The delivery: when it runs it cancels the losers; when the last has ended it runs again,
//     builds the result and settles. Finishing from the queue keeps nesting flat, however deep.
// Losers stay registered; their ordinary settling counts them out. A loser whose work others hold
// too is a proxy, which lets go. The deadline of gather is one more, hidden, input behind the
// others. The list of inputs is the list that orch_at reads. Timeout is the race of one input and a
// timer, in one slot. As-completed iteration is written on the public API alone.

// For example, orch_timeout(orch_race(x, y), 50), where y's producer takes its time to end:
//
//     x settles      the race counts it, is decided, queues itself; the timeout hears of it at
//                    once and disarms its timer: whatever happens now, this success stands
//     the race runs  asks y to end; y's hook says that it will settle later
//     y settles      the race counts it out and queues itself
//     the race runs  moves x's outcome into its result and settles; the timeout follows

// What decides one with n inputs, as the two counters that go down:
//
//                   ok_left   fail_left   value or error
//     all           n         1           the list; the first error
//     all_settled   n         not used    the list: every outcome counts down ok_left
//     any           1         n           the first success; ORCH_EALLFAILED and the list
//     race          1         1           the first outcome
//     quorum of k   k         n - k + 1   the list; ORCH_EQUORUM and the list
//     gather        n         not used    the list; its deadline decides it at once
//
// Adding an input is constant, so is counting one; cancelling the losers is one walk over the list.
// Left out: a result of its own for each combinator, as a struct or a callback per input. orch_at
// reads them all alike, and a list can be handed on like any other value.

// A head of 8 bytes and five pointers are the 48 bytes of an extra slot. The most is what 32 bits
// count with room to spare, as the hidden deadline comes on top of it, and what memory can hold
// where addresses have 32 bits.
enum { ORCHI_LIST_IN_SLOT = 5 };
static const size_t ORCHI_LIST_MOST = SIZE_MAX / 16 < 0x7ffffff0 ? SIZE_MAX / 16 : 0x7ffffff0;
#define ORCHI_NO_WINNER UINT32_MAX

typedef enum orchi_mode {
    ORCHI_ALL,
    ORCHI_SETTLED, // all_settled, gather
    ORCHI_ANY,
    ORCHI_RACE,
    ORCHI_QUORUM
} orchi_mode;

// One allocation serves from beginning to end. While inputs are open, its places say where each one
// is, so that losers can be asked. When all have ended, the same places hold settled futures, and
// the list becomes the owner of the result. Nothing is copied in between.

struct orchi_list { // followed by its futures
    uint32_t count; // what orch_at shows
    uint16_t mode;
    uint16_t hidden; // 1: a deadline stands behind them
};

/* The inputs, and later the outcomes. */
static orch_future **orchi_items(const orchi_list *list) {
    return (orch_future **)(uintptr_t)(list + 1);
}

static size_t orchi_list_bytes(size_t count) {
    return sizeof(orchi_list) + count * sizeof(orch_future *);
}

/* Up to five inputs fit into a slot, which saves small combinators an allocation. */
static orchi_list *orchi_list_new(orch_loop *loop, size_t count, orchi_mode mode, bool hidden) {
    size_t places = count + hidden;
    void *memory = places <= ORCHI_LIST_IN_SLOT ? orchi_extra_new(loop)
                                                : orchi_allocate(loop, orchi_list_bytes(places));
    orchi_list *list = (orchi_list *)memory;
    if (list == NULL) return NULL;
    list->count = (uint32_t)count;
    list->mode = (uint16_t)mode;
    list->hidden = hidden;
    return list;
}

/* The list itself; its elements have been given up. */
static void orchi_list_free(orch_loop *loop, orchi_list *list) {
    size_t places = (size_t)list->count + list->hidden;
    if (places <= ORCHI_LIST_IN_SLOT) orchi_extra_free(loop, list);
    else orchi_free(loop, list, orchi_list_bytes(places));
}

/* The release of a list: gives up every element. A release runs on the loop's thread. */
static void orchi_list_release(void *owner) {
    orchi_list *list = (orchi_list *)owner;
    if (list->count > 0 && !orchi_may_release(orchi_items(list)[0])) return;
    for (uint32_t i = 0; i < list->count; i++) orchi_release(orchi_items(list)[i]);
    orchi_list_free(orchi_loop, list);
}

/* The list a result shows: its own, or that of the future it is a share of. */
static const orchi_list *orchi_list_of(const orch_result *r) {
    if (r == NULL) return NULL;
    r = orchi_shown(r);
    return r->release == orchi_list_release ? (const orchi_list *)r->owner : NULL;
}

const orch_result *orch_at(const orch_result *r, size_t i) {
    const orchi_list *list = orchi_list_of(r);
    if (list == NULL) return r != NULL && r->error != 0 ? r : &orchi_no_element;
    return i < list->count ? &orchi_items(list)[i]->as.result : &orchi_no_element;
}

size_t orch_count(const orch_result *r) {
    const orchi_list *list = orchi_list_of(r);
    return list != NULL ? list->count : 0;
}

/* A list of failures shows the message of the first, when that is what it was rejected with. */
const char *orch_message(const orch_result *r) {
    if (r == NULL) return orch_error_text(ORCH_EINVAL);
    const orchi_list *list = orchi_list_of(r);
    while (r->error != 0 && list != NULL && list->count > 0) {
        const orch_result *first = &orchi_items(list)[0]->as.result;
        if (first->error != r->error) break;
        r = first;
        list = orchi_list_of(r);
    }
    const orch_result *own = orchi_shown(r);
    if (own->release == orchi_message_release) return (const char *)own->value;
    return orch_error_text(r->error);
}

/* From here the outcome is final. The losers are cancelled from the queue: cancelling them here
 * would come back to this combinator while its counters change. */
static bool orchi_combine_decide(orch_future *c, uint32_t winner) {
    c->as.combine.winner = winner;
    c->as.combine.fail_left = (uint32_t)ORCH_ECANCELED;
    orchi_push(orchi_loop_of(c), c);
    return true;
}

// A counter only goes down, and who takes it to 0 decides. What comes later is of no account, as
// DECIDED is asked first: so no counter wraps, though losers go on settling behind the decision.

/* Counts an input's outcome. The deadline's own decides at once, and as a success. */
static bool orchi_combine_decided(orch_future *c, uint32_t input, bool *ok) {
    const orchi_list *list = c->as.combine.list;
    if (c->flags & ORCHI_DECIDED) return false;
    if (list->mode == ORCHI_SETTLED) {
        *ok = true;
        if (input == list->count || --c->as.combine.ok_left == 0)
            return orchi_combine_decide(c, input);
        return false;
    }
    uint32_t *left = *ok ? &c->as.combine.ok_left : &c->as.combine.fail_left;
    return --*left == 0 && orchi_combine_decide(c, input);
}

// A decision and an end are counted apart. An input that passes on a decision early (a race whose
// loser is still ending) is heard twice: first it decides, later it is counted out.

/* When the last input has ended, the result can be built. */
static void orchi_combine_ended(orch_future *c, uint32_t input) {
    (void)input;
    if (--c->as.combine.unended == 0) orchi_push(orchi_loop_of(c), c);
}

/* A request to end is a decision too. It keeps the reason for the losers. */
static orch_future *orchi_combine_cancel(orch_future *c, int reason) {
    c->flags |= ORCHI_CANCEL;
    if (c->flags & ORCHI_DECIDED) return NULL;
    orchi_combine_decide(c, ORCHI_NO_WINNER);
    c->as.combine.fail_left = (uint32_t)reason;
    orchi_announce(c, false);
    return NULL;
}

/* An input that gather or quorum cancelled: the list shows the reason in its place, whatever comes
 * of it. Its own reference goes when its work has ended; bit 0 of its place remembers it. */
static bool orchi_is_late(const orch_future *item) { return ((uintptr_t)item & 1) != 0; }

static orch_future *orchi_late(orch_future *item) { return (orch_future *)((uintptr_t)item | 1); }

static orch_future *orchi_not_late(orch_future *item) {
    return (orch_future *)((uintptr_t)item & ~(uintptr_t)1);
}

/* The mark of a cancelled input stays with its place. */
static void orchi_combine_retarget(orch_future *c, uint32_t input, orch_future *to) {
    orch_future **item = &orchi_items(c->as.combine.list)[input];
    *item = orchi_is_late(*item) ? orchi_late(to) : to;
}

/* A decided input is as good as settled: its success must not be lost to a deadline. */
static bool orchi_open(const orch_future *item) {
    return !orchi_settled(item) && !(item->flags & ORCHI_DECIDED);
}

// `unended` is in the loop's head because a promise without a hook settles inside the walk: when
// the last one has, the rest of the list need not be looked at.

/* Asks every input that is still open. Some end at once, which counts them out during the walk. */
static void orchi_cancel_losers(orch_future *c) {
    const orchi_list *list = c->as.combine.list;
    orch_future **items = orchi_items(list);
    uint32_t places = list->count + list->hidden;
    bool deadline = list->hidden && c->as.combine.winner == list->count;
    bool replace = deadline || list->mode == ORCHI_QUORUM;
    int reason = deadline ? ORCH_ETIMEDOUT : (int)c->as.combine.fail_left;
    c->flags |= ORCHI_LOSERS;
    for (uint32_t i = 0; i < places && c->as.combine.unended > 0; i++) {
        orch_future *item = items[i];
        if (!orchi_open(item)) continue;
        if (replace) items[i] = orchi_late(item);
        item->flags |= ORCHI_CANCEL;
        orchi_cancel(item, reason);
    }
}

/* Formatted when it fires, which is seldom, and not when it is armed, which is often. */
static orch_result orchi_timeout_result(uint64_t ms) {
    orch_result r = orch_failf(ORCH_ETIMEDOUT, "Timeout after %llu ms", (unsigned long long)ms);
    r.index = 1;
    return r;
}

/* Replaces what was cancelled by one shared rejected future. */
static void orchi_show_late(orch_loop *loop, orchi_list *list) {
    orch_future **items = orchi_items(list), *shown = NULL;
    int error = list->hidden ? ORCH_ETIMEDOUT : ORCH_ECANCELED;
    if (list->hidden) orchi_release(items[list->count]); // the deadline
    for (uint32_t i = 0; i < list->count; i++) {
        if (!orchi_is_late(items[i])) continue;
        orchi_release(orchi_not_late(items[i]));
        if (shown == NULL) {
            shown = orchi_slot_new(loop, ORCHI_DONE);
            if (shown == NULL) shown = orchi_rejected(error);
            else shown->as.result = orch_fail(error);
        } else if (!(shown->flags & ORCHI_IMMORTAL)) {
            shown->references++;
        }
        items[i] = shown;
    }
}

/* The list owns what it shows: one release gives up all its places. */
static orch_result orchi_list_result(int error, uint32_t winner, orchi_list *list) {
    orch_result r = {error, winner, orchi_items(list), list, orchi_list_release};
    return r;
}

// all that fails, any that succeeds and race have one outcome; the other inputs' results are freed
// with the list. The place that was moved out gets an immortal future, so that the release can walk
// over it like over any other.

/* The outcome of one input, moved out of the list; the others are given up. */
static orch_result orchi_pick(orchi_list *list, uint32_t winner) {
    orch_future **place = &orchi_items(list)[winner];
    orch_result r = orchi_take_result(*place);
    r.index = winner;
    *place = orchi_rejected(ORCH_ECONSUMED);
    orchi_list_release(list);
    return r;
}

/* Builds the outcome from the settled inputs. Needs no memory that could be missing: what cannot be
 * had is replaced by a static future. */
static orch_result orchi_combine_result(orch_future *c, orchi_list *list) {
    uint32_t winner = c->as.combine.winner;
    bool ok = (c->flags & ORCHI_DECIDED_OK) != 0;
    orchi_show_late(orchi_loop_of(c), list);
    if (winner == ORCHI_NO_WINNER) {
        orchi_list_release(list);
        return orch_fail(ORCH_ECANCELED);
    }
    if (list->mode == ORCHI_RACE) return orchi_pick(list, winner);
    if (list->mode == ORCHI_ANY && ok) return orchi_pick(list, winner);
    if (list->mode == ORCHI_ALL && !ok) return orchi_pick(list, winner);
    int error = list->mode == ORCHI_ANY ? ORCH_EALLFAILED : ORCH_EQUORUM;
    return orchi_list_result(ok ? 0 : error, list->mode == ORCHI_SETTLED ? 0 : winner, list);
}

/* Runs at most twice: when it is decided, and when the last input has ended. */
static void orchi_combine_run(orch_future *c) {
    if (!(c->flags & ORCHI_LOSERS)) orchi_cancel_losers(c);
    if (c->as.combine.unended > 0) return;
    orchi_list *list = c->as.combine.list;
    c->as.combine.list = NULL; // what a release reports meanwhile must not look into it
    orch_result r = orchi_combine_result(c, list);
    orchi_settle(orchi_loop_of(c), c, &r);
}

/* For reports: the inputs that are still open. */
static orch_future *orchi_combine_source(const orch_future *c, uint32_t *at) {
    const orchi_list *list = c->as.combine.list;
    while (list != NULL && *at < list->count) {
        orch_future *item = orchi_not_late(orchi_items(list)[(*at)++]);
        if (!orchi_settled(item)) return item;
    }
    return NULL;
}

// ---- building one

// A constructor takes over every input that it can read, whatever comes of it: each is claimed, or
// given up when there is no memory or the call makes no sense. So no caller has a path on which it
// still owns some of them.
//
// A settled input is marked as WAITED here, though nobody will be told: that is what makes a second
// use of the same handle a misuse which is seen.

/* Registers at a claimed input. What is settled or decided counts now; nobody waits for c yet. */
static void orchi_combine_add(orch_future *c, uint32_t i, orch_future *item) {
    bool ended = orchi_settled(item);
    bool ok = ended ? item->as.result.error == 0 : (item->flags & ORCHI_DECIDED_OK) != 0;
    orchi_items(c->as.combine.list)[i] = item;
    if (!ended) orchi_attach(item, c, i);
    else if (item->references == 1) item->flags |= ORCHI_WAITED;
    if ((ended || (item->flags & ORCHI_DECIDED)) && orchi_combine_decided(c, i, &ok)) {
        c->flags |= (uint16_t)(ORCHI_DECIDED | (ok ? ORCHI_DECIDED_OK : 0));
    }
    if (ended) orchi_combine_ended(c, i);
}

/* What is wrong with a list before any of it was read. */
static int orchi_combine_error(size_t count, orch_future *const *futures) {
    if (orchi_loop == NULL) return ORCH_ENOLOOP;
    return count > ORCHI_LIST_MOST || (count > 0 && futures == NULL) ? ORCH_EINVAL : 0;
}

/* Any combinator but timeout. deadline is NULL or gather's timer. */
static orch_future *orchi_combine(const char *function, orchi_mode mode, size_t ok_left,
                                  size_t fail_left, size_t count, orch_future *const *futures,
                                  orch_future *deadline) {
    orch_loop *loop = orchi_loop;
    orch_future *c = orchi_slot_new(loop, ORCHI_COMBINE);
    orchi_list *list = c != NULL ? orchi_list_new(loop, count, mode, deadline != NULL) : NULL;
    if (list == NULL) {
        if (c != NULL) orchi_slot_free(loop, c);
        orchi_give_up(count, futures);
        orch_drop(deadline);
        return orchi_rejected(ORCH_ENOMEM);
    }
    c->as.combine.list = list;
    c->as.combine.link = NULL;
    c->as.combine.unended = (uint32_t)count + list->hidden;
    c->as.combine.ok_left = (uint32_t)ok_left;
    c->as.combine.fail_left = (uint32_t)fail_left;
    if (ok_left == 0) { // a quorum of none: nothing of what follows counts
        c->flags |= ORCHI_DECIDED | ORCHI_DECIDED_OK;
        orchi_combine_decide(c, 0);
    }
    for (uint32_t i = 0; i < count; i++) {
        bool reused = futures[i] == c; // a freed handle whose slot became this combinator
        orchi_combine_add(c, i,
                          reused ? orchi_rejected(orchi_misuse(function, ORCH_ECONSUMED))
                                 : orchi_claim(futures[i], function));
    }
    if (deadline != NULL) orchi_combine_add(c, (uint32_t)count, deadline);
    return c;
}

/* The combinators of no inputs that fulfil at once. */
static orch_future *orchi_empty_list(orchi_mode mode) {
    orchi_list *list = orchi_list_new(orchi_loop, 0, mode, false);
    return list != NULL ? orch_settled(orchi_list_result(0, 0, list)) : orchi_rejected(ORCH_ENOMEM);
}

/* What every constructor answers to bad arguments; inputs that can be read are given up. */
static orch_future *orchi_combine_refuse(const char *function, int error, size_t count,
                                         orch_future *const *futures) {
    if (futures != NULL && count <= ORCHI_LIST_MOST && orchi_loop != NULL) {
        orchi_give_up(count, futures);
    }
    return orchi_rejected(orchi_misuse(function, error));
}

// From here on each constructor is a line of the table at the head of this section: its mode and
// its two counters. An empty list needs no combinator: all, all_settled, quorum and gather of
// nothing fulfil at once, any of nothing has failed, and a race of nothing would never end, so it
// is refused. That, and a quorum of more than there are, is a rejection and not a misuse: how many
// inputs there are is often known at run time only.

orch_future *orch_all_n(size_t count, orch_future *const *futures) {
    int error = orchi_combine_error(count, futures);
    if (error != 0) return orchi_combine_refuse("orch_all", error, count, futures);
    if (count == 0) return orchi_empty_list(ORCHI_ALL);
    return orchi_combine("orch_all", ORCHI_ALL, count, 1, count, futures, NULL);
}

orch_future *orch_all_settled_n(size_t count, orch_future *const *futures) {
    int error = orchi_combine_error(count, futures);
    if (error != 0) return orchi_combine_refuse("orch_all_settled", error, count, futures);
    if (count == 0) return orchi_empty_list(ORCHI_SETTLED);
    return orchi_combine("orch_all_settled", ORCHI_SETTLED, count, 1, count, futures, NULL);
}

orch_future *orch_any_n(size_t count, orch_future *const *futures) {
    int error = orchi_combine_error(count, futures);
    if (error != 0) return orchi_combine_refuse("orch_any", error, count, futures);
    if (count == 0) return orch_settled(orch_fail(ORCH_EALLFAILED));
    return orchi_combine("orch_any", ORCHI_ANY, 1, count, count, futures, NULL);
}

orch_future *orch_race_n(size_t count, orch_future *const *futures) {
    int error = orchi_combine_error(count, futures);
    if (error != 0) return orchi_combine_refuse("orch_race", error, count, futures);
    if (count == 0) return orch_settled(orch_fail(ORCH_EINVAL));
    return orchi_combine("orch_race", ORCHI_RACE, 1, 1, count, futures, NULL);
}

orch_future *orch_quorum_n(size_t needed, size_t count, orch_future *const *futures) {
    int error = orchi_combine_error(count, futures);
    if (error != 0) return orchi_combine_refuse("orch_quorum", error, count, futures);
    if (needed > count) {
        orchi_give_up(count, futures);
        return orch_settled(orch_fail(ORCH_EINVAL));
    }
    if (count == 0) return orchi_empty_list(ORCHI_QUORUM);
    return orchi_combine("orch_quorum", ORCHI_QUORUM, needed, count - needed + 1, count, futures,
                         NULL);
}

/* The deadline is made first: until then no input was touched, and all can be given up. */
orch_future *orch_gather_n(size_t count, orch_future *const *futures, uint64_t ms) {
    int error = orchi_combine_error(count, futures);
    if (error != 0) return orchi_combine_refuse("orch_gather", error, count, futures);
    if (count == 0) return orchi_empty_list(ORCHI_SETTLED);
    orch_future *deadline = orchi_timed_new(orchi_loop, ORCHI_TIMER, ms);
    if (deadline == NULL) {
        orchi_give_up(count, futures);
        return orchi_rejected(ORCH_ENOMEM);
    }
    return orchi_combine("orch_gather", ORCHI_SETTLED, count, 1, count, futures, deadline);
}

/* A NULL among the futures does not end the list: it is reported as the mistake that it is. So is
 * NULL for the list, by what counts one future in it. */
static size_t orchi_list_length(orch_future *const *futures) {
    size_t count = 0;
    if (futures == NULL) return 1;
    while (futures[count] != ORCH_END) count++;
    return count;
}

orch_future *orch_all_list(orch_future *const *futures) {
    return orch_all_n(orchi_list_length(futures), futures);
}

orch_future *orch_all_settled_list(orch_future *const *futures) {
    return orch_all_settled_n(orchi_list_length(futures), futures);
}

orch_future *orch_any_list(orch_future *const *futures) {
    return orch_any_n(orchi_list_length(futures), futures);
}

orch_future *orch_race_list(orch_future *const *futures) {
    return orch_race_n(orchi_list_length(futures), futures);
}

orch_future *orch_quorum_list(size_t needed, orch_future *const *futures) {
    return orch_quorum_n(needed, orchi_list_length(futures), futures);
}

orch_future *orch_gather_list(uint64_t ms, orch_future *const *futures) {
    return orch_gather_n(orchi_list_length(futures), futures, ms);
}

// ---- timeout

// The life of a timeout, t, of an input:
//
//     the input decides   the timer is disarmed; when the input has settled, t settles as it has
//     the timer fires     t is decided, as a failure, and says so at once; the input is asked to
//                         end; when it has, t settles with ORCH_ETIMEDOUT
//     t is cancelled      the timer is disarmed and the input is asked; then as the first
//
// In no case does it settle before the input has ended: what that uses may lie in the frame of
// whoever awaits t. A timeout that must not wait so long is a race with orch_after.

orch_future *orch_timeout(orch_future *f, uint64_t ms) {
    orch_loop *loop = orchi_here("orch_timeout");
    if (loop == NULL) return orchi_rejected(ORCH_ENOLOOP);
    f = orchi_claim(f, "orch_timeout");
    if (orchi_settled(f)) return f; // decided: there is nothing to race
    orch_future *t = orchi_timed_new(loop, ORCHI_TIMEOUT, ms);
    if (t == NULL) {
        orch_drop(f);
        return orchi_rejected(ORCH_ENOMEM);
    }
    t->as.timed.source = f;
    orchi_attach(f, t, 0);
    if (f->flags & ORCHI_DECIDED) orchi_announce(f, (f->flags & ORCHI_DECIDED_OK) != 0);
    return t;
}

/* The input decides it, if the timer has not. */
static bool orchi_timeout_decided(orch_future *t, uint32_t input, bool *ok) {
    (void)input;
    (void)ok;
    if (t->flags & ORCHI_DECIDED) return false;
    orchi_timer_disarm(orchi_loop_of(t), t);
    return true;
}

/* Once it was asked to end, its timer could only change the error, and keep the loop awake. */
static orch_future *orchi_timeout_cancel(orch_future *t, int reason) {
    (void)reason;
    t->flags |= ORCHI_CANCEL;
    if (t->flags & ORCHI_DECIDED) return NULL;
    orchi_timer_disarm(orchi_loop_of(t), t);
    return t->as.timed.source;
}

/* The timer decides it. LOSERS marks that, for the result. */
static void orchi_timeout_fire(orch_future *t, int events) {
    (void)events;
    t->flags |= ORCHI_LOSERS;
    orchi_announce(t, false);
    t->as.timed.source->flags |= ORCHI_CANCEL;
    orchi_cancel(t->as.timed.source, ORCH_ETIMEDOUT);
}

/* The input has ended: by itself, or because the timer cancelled it, and then its outcome is
 * dropped. */
static void orchi_timeout_run(orch_future *t) {
    orch_loop *loop = orchi_loop_of(t);
    if (t->flags & ORCHI_LOSERS) {
        orch_result r = orchi_timeout_result(t->as.timed.ms);
        orch_future *source = t->as.timed.source;
        t->as.timed.source = NULL;
        orchi_release(source);
        orchi_settle(loop, t, &r);
    } else {
        orchi_settle_as(loop, t, t->as.timed.source);
    }
}

// ---- as completed

// An iteration is no combinator: it never settles, it is asked. The hub stands as the consumer of
// all inputs, and notes the order in which they settle; `next` is a promise that is answered from
// that order, at once or when the next input settles. Two of them at a time would make the order of
// the answers a matter of chance, so a second one is refused. Left out: cancelling the others when
// one fails. Whoever iterates decides that, by freeing the iteration.

struct orch_completion {
    orch_future *hub;     // stands as the consumer of every input
    orch_promise waiting; // of the last next that was not answered
    uint32_t count, done, delivered;
    uint32_t *order; // inputs in the order in which they settled; behind the items
    orch_future **items;
};

// What stands for an iteration that could not be made: its first element is the error, see next.
// One for each error, never written, so that all threads can share them. How many of each are out
// is counted in the loop.
static orch_completion orchi_failed_iterations[2]; // ORCH_ENOMEM, ORCH_EINVAL

static bool orchi_is_failed(const orch_completion *c) {
    return c == &orchi_failed_iterations[0] || c == &orchi_failed_iterations[1];
}

/* Pointers before numbers, as both are then aligned. */
static size_t orchi_completion_bytes(size_t count) {
    return sizeof(orch_completion) + count * (sizeof(orch_future *) + sizeof(uint32_t));
}

static orch_completion *orchi_completion_fail(const char *function, int error, size_t count,
                                              orch_future *const *futures) {
    orchi_give_up(count, futures);
    if (error != ORCH_ENOMEM) orchi_misuse(function, error);
    int which = error != ORCH_ENOMEM;
    if (orchi_loop != NULL) orchi_loop->failed_iterations[which]++;
    return &orchi_failed_iterations[which];
}

/* One allocation and a slot: the hub has to be one, as consumers of futures are slots. */
static orch_completion *orchi_completion_new(orch_loop *loop, size_t count) {
    void *memory = orchi_allocate(loop, orchi_completion_bytes(count));
    orch_completion *c = (orch_completion *)memory;
    if (c == NULL) return NULL;
    memset(c, 0, sizeof *c);
    c->hub = orchi_slot_new(loop, ORCHI_HUB);
    if (c->hub == NULL) {
        orchi_free(loop, c, orchi_completion_bytes(count));
        return NULL;
    }
    c->hub->as.hub.iteration = c;
    c->count = (uint32_t)count;
    c->items = (orch_future **)(void *)(c + 1);
    c->order = (uint32_t *)(void *)(c->items + count);
    return c;
}

orch_completion *orch_as_completed_n(size_t count, orch_future *const *futures) {
    int error = orchi_combine_error(count, futures);
    if (error != 0) return orchi_completion_fail("orch_as_completed", error, 0, NULL);
    orch_completion *c = orchi_completion_new(orchi_loop, count);
    if (c == NULL) return orchi_completion_fail("orch_as_completed", ORCH_ENOMEM, count, futures);
    for (uint32_t i = 0; i < count; i++) {
        bool reused = futures[i] == c->hub; // a freed handle whose slot became the hub
        orch_future *item = reused
                                ? orchi_rejected(orchi_misuse("orch_as_completed", ORCH_ECONSUMED))
                                : orchi_claim(futures[i], "orch_as_completed");
        c->items[i] = item;
        if (!orchi_settled(item)) orchi_attach(item, c->hub, i);
        else c->order[c->done++] = i;
        if (orchi_settled(item) && item->references == 1) item->flags |= ORCHI_WAITED;
    }
    return c;
}

orch_completion *orch_as_completed_list(orch_future *const *futures) {
    return orch_as_completed_n(orchi_list_length(futures), futures);
}

/* Notes the order; the outcome stays in its future until somebody asks. */
static void orchi_hub_ended(orch_future *hub, uint32_t input) {
    orch_completion *c = hub->as.hub.iteration;
    c->order[c->done++] = input;
    orchi_push(orchi_loop_of(hub), hub);
}

/* An input that followed was bypassed: its source stands in its place. */
static void orchi_hub_retarget(orch_future *hub, uint32_t input, orch_future *to) {
    hub->as.hub.iteration->items[input] = to;
}

/* For reports: what may answer a next that was not answered yet. */
static orch_future *orchi_hub_source(const orch_future *hub, uint32_t *at) {
    const orch_completion *c = hub->as.hub.iteration;
    while (orch_promise_pending(c->waiting) && *at < c->count) {
        orch_future *item = c->items[(*at)++];
        if (item != NULL && !orchi_settled(item)) return item;
    }
    return NULL;
}

/* The next outcome, moved out of its future. */
static orch_result orchi_completion_take(orch_completion *c) {
    uint32_t input = c->order[c->delivered++];
    orch_result r = orchi_take_result(c->items[input]);
    c->items[input] = NULL;
    r.index = input;
    return r;
}

/* Answers a next that came before its element. */
static void orchi_hub_run(orch_future *hub) {
    orch_completion *c = hub->as.hub.iteration;
    if (c->delivered < c->done && orch_promise_pending(c->waiting)) {
        orch_settle(c->waiting, orchi_completion_take(c));
    }
}

/* The error once, then the end: a loop over such an iteration ends as any other. */
static orch_future *orchi_failed_next(const orch_completion *c) {
    orch_loop *loop = orchi_loop;
    if (loop == NULL) return orchi_rejected(ORCH_ENOLOOP);
    int which = c != &orchi_failed_iterations[0];
    if (loop->failed_iterations[which] == 0) return orchi_rejected(ORCH_EEND);
    loop->failed_iterations[which]--;
    return orchi_rejected(which == 0 ? ORCH_ENOMEM : ORCH_EINVAL);
}

orch_future *orch_completion_next(orch_completion *c) {
    if (c == NULL) return orchi_rejected(orchi_misuse("orch_completion_next", ORCH_EINVAL));
    if (orchi_is_failed(c)) return orchi_failed_next(c);
    if (orch_promise_pending(c->waiting)) {
        return orchi_rejected(orchi_misuse("orch_completion_next", ORCH_EBUSY));
    }
    if (c->delivered == c->count) return orchi_rejected(ORCH_EEND);
    orch_future *f = orch_future_new(&c->waiting);
    if (c->delivered < c->done)
        orch_settle(c->waiting, (f->flags & ORCHI_IMMORTAL) != 0 ? orch_fail(ORCH_ENOMEM)
                                                                 : orchi_completion_take(c));
    return f;
}

/* Every input is asked to end before any is waited for; nothing reaches the hub any more. */
void orch_completion_free(orch_completion *c) {
    if (c == NULL || orchi_is_failed(c)) return;
    orch_loop *loop = orchi_loop;
    if (loop == NULL || orchi_loop_of(c->hub) != loop) {
        orchi_misuse("orch_completion_free", loop != NULL ? ORCH_ETHREAD : ORCH_ENOLOOP);
        return;
    }
    for (uint32_t i = 0; i < c->count; i++) {
        if (c->items[i] == NULL || (c->items[i]->flags & ORCHI_IMMORTAL)) continue;
        c->items[i]->flags &= (uint16_t)~ORCHI_WAITED;
    }
    orch_settle(c->waiting, orch_fail(ORCH_ECANCELED));
    orchi_slot_free(loop, c->hub);
    orchi_give_up(c->count, c->items);
    orchi_free(loop, c, orchi_completion_bytes(c->count));
}

// ------------------------------------------------------------------------------------------------
// >>task
//
// A task is a stack, a control block at its top (on the same page as the first frames, so that a
// sleeping task is one page), and a future. Invariants:
//   - A new task runs at once, nested in whoever started it, and control returns there when it
//     first waits. Later it is entered from the ready ring: by the loop, or directly by the task
//     that waits before it, within the same budget.
//   - What a task waits for is one claimed future (waiting); its future is queued when that has
//     settled. Or it is a descriptor: then its own future is the waiter in the table of watches,
//     and is queued by the event. A request for it to end takes it out there.
//   - Cancelling a task is remembered (reason). If it waits and is neither shielded nor joining,
//     what it waits for is asked to end; it goes on when that has ended. A wait that begins when
//     the task is cancelled is refused: its future is given up, and has ended when ORCH_ECANCELED
//     is returned.
//   - Joining is waiting for an end that was asked for (a drop, a refused wait): it cannot be
//     refused.
//   - A task that ends settles its future last, gives its stack back and is left for good.
// Suspending functions end in orchi_switch or orchi_hop: no compiler sees into those, so statics
// are read again after them.

// The life of a task:
//
//     orch_go      slot, stack, control block; a call on the new stack (orchi_switch_start)
//     first wait   back to whoever started it, inside orch_go, which returns its future
//     later waits  over to the next ready task, or to the loop at the end of ring or round
//     settled      what it waited for queues its future; popped, that enters it again
//     the end      its result settles its future, its stack is given back, and its first
//                  function returns the context to go on with

struct orch_task { // first what every wait touches: one cache line
    orchi_stack_top top;
    orch_future *future;
    orch_future *waiting;       // NULL: it runs, is ready, or has not waited yet
    struct orchi_io_call *call; // what it waits to make on a descriptor, see >>io
    int reason;                 // not 0: it, or a scope that it has open, was asked to end
    bool nested;
    bool joining;
    bool ended;
    bool canary;
    orch_task *starter;    // nested: where to return at the first wait; NULL is the main stack
    orchi_context context; // begins with the stack pointer; what follows is for tools
    const char *name;
    orch_task_fn fn;
    void *arg;
    void (*release)(void *arg);
    orch_future *scope;    // the innermost one that it has open. From here on 0 at first
    orch_future *home;     // the scope it was started in
    orch_future *deadline; // copied by orch_go
    struct orchi_locals *locals;
    int asked;      // not 0: it was asked to end
    uint32_t level; // how many shields were there when the reason's scope was opened
    uint32_t shields;
    uint32_t refused; // waits, since it was asked to end
    bool heir;        // it has, or had, something that what it starts inherits
    bool exposed;     // the loop is deadlocked: shields do not hold any more
};

typedef char orchi_task_fits[sizeof(struct orch_task) <= ORCHI_STACK_HEAD ? 1 : -1];
enum { ORCHI_ODD = offsetof(struct orch_task, canary) - offsetof(struct orch_task, reason) + 1 };
typedef char orchi_odd_fits[ORCHI_ODD == sizeof(uint64_t) ? 1 : -1]; // orchi_leaves_simply

// Two fields say what a request does to a task. `asked` is the task's own, for ever. `reason` is
// what counts for the next wait: orchi_task_judge works it out from the open scopes and `asked`, so
// that a wait has one integer to test, however many scopes there are.

enum { ORCHI_PATIENCE = 1000 }; // refused waits until a task is reported

// ---- entering and leaving

// Who may enter a task: the main stack (orchi_enter), a task that leaves (orchi_leave), and whoever
// starts one (orchi_task_start). All three set loop->current before they switch; nobody sets it
// after, as by then another stack runs. A task that leaves switches to the next one directly, which
// is one switch where going by the loop would be two.

/* Whether a wait is to be refused now. */
static bool orchi_must_end(const orch_task *task) {
    return ORCHI_UNLIKELY(task->reason != 0) && (task->shields <= task->level || task->exposed);
}

/* What orch_yield returns in a task that is entered after it. */
static inline int orchi_answer(const orch_task *task) {
    return task != NULL && orchi_must_end(task) ? ORCH_ECANCELED : 0;
}

/* On the main stack, when a task has left to it: it may have left a call to be made here. */
static inline void orchi_serve(orch_loop *loop) {
    while (ORCHI_UNLIKELY(loop->call.fn != NULL)) {
        void *(*fn)(void *) = loop->call.fn;
        orch_task *caller = loop->call.task;
        bool outer = loop->running;
        loop->call.fn = NULL;
        loop->running = true;
        void *result = fn(loop->call.arg);
        loop->running = outer;
        loop->call.arg = result;
        loop->current = caller;
        orchi_context_switch(&loop->main, &caller->context, 0);
    }
}

/* Enters a task from the main stack. */
static void orchi_enter(orch_loop *loop, orch_task *task) {
    loop->current = task;
    orchi_context_switch(&loop->main, &task->context, orchi_answer(task));
    orchi_serve(loop);
}

/* Where a task goes when it leaves: back to its starter, to the next ready task, or to the main
 * stack. */
static inline orch_task *orchi_next_task(orch_loop *loop, orch_task *task) {
    if (task->nested) {
        task->nested = false;
        return task->starter;
    }
    loop->streak = 0;
    if (!orchi_round_goes_on(loop)) return NULL;
    orch_future *front = orchi_front(loop);
    if (front->kind != ORCHI_TASK) return NULL;
    orchi_pop(loop);
    return front->as.task.task;
}

/* The canary is dead: memory below the stack was written, so nothing can be trusted any more. */
ORCHI_COLD static void orchi_overflowed(orch_loop *loop, orch_task *task) {
    orchi_report(loop, "asyncorch: stack overflow in task '%s'#%llu: give it a bigger stack_size\n",
                 task->name, (unsigned long long)task->future->generation / 2);
    abort();
}

/* No task stands for the main stack. */
static inline orchi_context *orchi_context_of(orch_loop *loop, orch_task *task) {
    return task != NULL ? &task->context : &loop->main;
}

/* Leaves a task until somebody enters it again. */
static inline void orchi_leave(orch_loop *loop, orch_task *task) {
    if (ORCHI_UNLIKELY(task->canary) && !orchi_canary_lives(task->top.stack)) {
        orchi_overflowed(loop, task);
    }
    orch_task *next = orchi_next_task(loop, task);
    if (next == task) return;
    loop->current = next;
    orchi_context_switch(&task->context, orchi_context_of(loop, next), orchi_answer(next));
}

// loop->trash is a list on the stack of whoever is freeing results. It must not be left in place
// over a switch: what another task retires meanwhile would be put on this list, and be freed when
// this task comes back, which may be never.

/* Waits inside a release: others must not wait for what this task frees after it. */
ORCHI_COLD static void orchi_suspend_freeing(orch_loop *loop, orch_task *task) {
    orchi_trash *mine = loop->trash;
    loop->trash = NULL;
    orchi_leave(loop, task);
    loop->trash = mine;
}

/* Waits until somebody queues the task and its turn comes. */
static inline void orchi_suspend(orch_loop *loop, orch_task *task) {
    if (ORCHI_UNLIKELY(loop->trash != NULL)) orchi_suspend_freeing(loop, task);
    else orchi_leave(loop, task);
}

/* Four cache lines, one after the other. */
static ORCHI_INLINE void orchi_fetch_four(const char *at) {
    __builtin_prefetch(at, 1);
    __builtin_prefetch(at + 64, 1);
    __builtin_prefetch(at + 128, 1);
    __builtin_prefetch(at + 192, 1);
}

/* Fetches what a task in the ready ring touches first, the top of its stack; and what is read here
 * for those after it: a control block, a future. For who is about to enter the kernel: of a
 * thousand tasks that wait for descriptors none is in the cache when its turn comes, and each of
 * these lines would be waited for. Inlined, as gcc takes a function that only fetches for one
 * without effect. */
static ORCHI_INLINE void orchi_fetch_ahead(const orch_loop *loop, uint32_t at) {
    const orchi_ring *ring = &loop->ready;
    uint32_t ready = ring->tail - at;
    if (ready == 0) return;
    const orch_future *front = ring->items[at & ring->mask];
    const orch_future *second = ring->items[(at + 1) & ring->mask];
    __builtin_prefetch(ring->items[(at + 3) & ring->mask], 1);
    if (ready > 1 && second->kind == ORCHI_TASK) __builtin_prefetch(second->as.task.task, 1);
    if (front->kind != ORCHI_TASK) return;
    const char *sp = (const char *)front->as.task.task->context.sp;
    orchi_fetch_four(sp);       // the frames of a wait in orch_read
    orchi_fetch_four(sp + 256); // and its buffer
}

/* Waits until a claimed pending future has settled. Returns it, or what it was replaced by. */
static orch_future *orchi_wait_for(orch_loop *loop, orch_task *task, orch_future *f) {
    orchi_attach(f, task->future, 0);
    task->waiting = f;
    orchi_suspend(loop, task);
    f = task->waiting;
    task->waiting = NULL;
    return f;
}

/* Lets everything that is ready run first. */
static void orchi_take_turn(orch_loop *loop, orch_task *task) {
    orchi_push(loop, task->future);
    orchi_suspend(loop, task);
}

// ---- cancelling
//
// A task can be asked to end as a whole, or as far as a scope goes that it has open. Both are
// level-triggered: the reason stays until task or scope ends, and every wait sees it. A shield
// holds off what was opened before it began, so each scope remembers how many shields there were
// (its level), and a request counts when no shield has begun since.

// For example, with a task that has scope A open, begins a shield, opens scope B in it, and waits:
//
//     request to A, or to the task     A is marked (level 0), B is not (level 1); the wait goes on,
//                                      as the task's one shield is newer than that request
//     B's deadline                     B is marked (level 1): as many shields as the task has now,
//                                      so the wait is refused. The clean-up is bounded
//     B closes, the shield ends        what is left is the request to A, at level 0 like the task:
//                                      the next wait is refused

typedef struct orchi_scope { // in an extra slot
    orch_future **members;
    orch_future *ended;  // members that have settled: a circle, this is its last
    orch_future *errors; // members that failed and are kept: the same
    orch_future *deadline;
    const char *name;
    uint32_t failures;
    uint16_t level;   // shields when it was opened
    uint8_t capacity; // of members: 0, 6 (in a slot), or 2 to this power
    uint8_t bits;
} orchi_scope;

typedef char orchi_scope_fits[sizeof(orchi_scope) <= 48 ? 1 : -1]; // an extra slot

enum { ORCHI_KEEP_GOING = 1, ORCHI_EXPIRED = 2, ORCHI_CLOSING = 4, ORCHI_ASKED_ALL = 8 };

/* What counts for a task: the request to the innermost scope that has one, else its own. */
static void orchi_task_judge(orch_task *task) {
    orch_future *f = task->scope;
    while (f != NULL && f->as.scope.reason == 0) f = f->as.scope.outer;
    task->reason = f != NULL ? f->as.scope.reason : task->asked;
    task->level = f != NULL ? f->as.scope.own->level : 0;
}

/* A request reaches all scopes from the innermost out to `last` (NULL: every one), but those that a
 * shield protects. Each asks its members when it runs, so that nothing recurses. */
static void orchi_scopes_mark(orch_task *task, const orch_future *last, uint32_t level,
                              int reason) {
    for (orch_future *f = task->scope; f != NULL; f = f->as.scope.outer) {
        if (f->as.scope.reason == 0 && f->as.scope.own->level == level) {
            f->as.scope.reason = reason;
            f->flags |= ORCHI_DECIDED; // what its members come to is not seen
            orchi_push(orchi_loop_of(f), f);
        }
        if (f == last) break;
    }
    orchi_task_judge(task);
}

/* A shield has ended. Scopes that were opened in it are not protected any more: they hear of what
 * came from outside meanwhile. */
static void orchi_scopes_lower(orch_task *task) {
    orch_future *f = task->scope, *last = NULL;
    for (; f != NULL && f->as.scope.own->level > task->shields; f = f->as.scope.outer) {
        f->as.scope.own->level = (uint16_t)task->shields;
        last = f;
    }
    if (last == NULL) return;
    while (f != NULL && f->as.scope.reason == 0) f = f->as.scope.outer;
    bool same = f != NULL && f->as.scope.own->level == task->shields;
    int reason = same ? f->as.scope.reason : f == NULL && task->shields == 0 ? task->asked : 0;
    if (reason != 0) orchi_scopes_mark(task, last, task->shields, reason);
    else orchi_task_judge(task);
}

/* The wait of a task for a descriptor has ended: with an event, or an error. */
static inline void orchi_task_tell(orch_loop *loop, orch_future *f, int outcome, bool exact) {
    orchi_unwatch(loop, f, exact);
    f->as.task.events = outcome;
    orchi_push(loop, f);
}

static void orchi_task_fire(orch_future *f, int events) {
    int outcome = events & ORCHI_BAD_FD ? -EBADF : (int)ORCHI_TOLD;
    orchi_task_tell(orchi_loop_of(f), f, outcome, false);
}

/* What a request has to ask next: what the task waits for, unless it may go on waiting. A wait for
 * a descriptor ends at once, so that the descriptor can be closed. */
static orch_future *orchi_task_asks(orch_task *task) {
    orch_future *f = task->future;
    if (!orchi_must_end(task) || task->joining) return NULL;
    if (orchi_on_descriptor(f)) orchi_task_tell(orchi_loop_of(f), f, ORCH_ECANCELED, true);
    return task->waiting;
}

/* Only the first request to a task walks on; tasks that await each other end the walk. */
static orch_future *orchi_task_cancel(orch_future *f, int reason) {
    orch_task *task = f->as.task.task;
    f->flags |= ORCHI_CANCEL;
    if (task->asked != 0) return NULL;
    task->asked = reason;
    orchi_scopes_mark(task, NULL, 0, reason);
    return orchi_task_asks(task);
}

/* Asks a scope, the scopes in it, and its body. */
static void orchi_scope_ask(orch_future *f, int reason) {
    orch_task *task = f->as.scope.task;
    if (f->as.scope.reason != 0) return;
    orchi_scopes_mark(task, f, f->as.scope.own->level, reason);
    orchi_cancel(orchi_task_asks(task), reason);
}

// ---- members of a scope

/* Settled members wait in a circle, linked by a field that they need no more. */
static void orchi_circle_append(orch_future **last, orch_future *f) {
    f->waiter.one.target = *last != NULL ? (*last)->waiter.one.target : f;
    if (*last != NULL) (*last)->waiter.one.target = f;
    *last = f;
}

/* From the front, so that failures are seen in the order in which they came. */
static orch_future *orchi_circle_take(orch_future **last) {
    orch_future *first = (*last)->waiter.one.target;
    (*last)->waiter.one.target = first->waiter.one.target;
    if (first == *last) *last = NULL;
    return first;
}

/* A walk over at most ORCH_SCOPE_ERRORS failures, once, at close. */
static size_t orchi_circle_length(const orch_future *last) {
    size_t length = last != NULL;
    const orch_future *f = last;
    while (f != NULL && (f = f->waiter.one.target) != last) length++;
    return length;
}

// What settling does for a scope is constant: a swap in the array, a link, a push. Counting the
// failure, releasing the member and asking the others run later, from the queue, as each of them
// may run code of the user's or recurse into other scopes.

/* A member has settled: the last one takes its place. */
static void orchi_scope_ended(orch_future *f, uint32_t input) {
    orchi_scope *scope = f->as.scope.own;
    orch_future *member = scope->members[input];
    orch_future *last = scope->members[--f->as.scope.count];
    scope->members[input] = last;
    last->waiter.one.index = input;
    orchi_circle_append(&scope->ended, member);
    orchi_push(orchi_loop_of(f), f);
}

/* What ended because it was asked to has not failed. */
static void orchi_scope_count(orch_future *f, orch_future *member) {
    orchi_scope *scope = f->as.scope.own;
    int error = member->as.result.error;
    bool failed = error != 0 && !(error == ORCH_ECANCELED && (member->flags & ORCHI_CANCEL));
    if (failed && scope->failures++ < ORCH_SCOPE_ERRORS) {
        orchi_circle_append(&scope->errors, member);
    } else {
        orchi_release(member);
    }
    if (failed && !(scope->bits & ORCHI_KEEP_GOING)) orchi_scope_ask(f, error);
}

/* Work that others hold too is asked as well, for it has to end before the scope does. */
static void orchi_scope_ask_member(orch_future *f, orch_future *member) {
    orch_future *work = member->kind == ORCHI_PROXY ? member->as.follow.source : member;
    member->flags |= ORCHI_CANCEL;
    work->flags |= ORCHI_CANCEL;
    orchi_cancel(work, f->as.scope.reason);
}

/* Asks every member, once; none can come after that. From the end, as some settle at once, and the
 * last one takes their place. */
static void orchi_scope_ask_members(orch_future *f) {
    f->as.scope.own->bits |= ORCHI_ASKED_ALL;
    for (uint32_t i = f->as.scope.count; i-- > 0;) {
        if (i >= f->as.scope.count) continue;
        orchi_scope_ask_member(f, f->as.scope.own->members[i]);
    }
}

// How a tree of scopes is cancelled, where a member of scope A is a task with a scope B of its own:
//
//     orch_scope_cancel(A)   A is marked and queued; the wait of A's body is broken off
//     A runs                 asks its members: the task is marked, and with it B, which is queued
//     B runs                 asks its own members
//     they end               B closes, its task ends, A has a member less
//
// So each level is one turn of the queue, the depth of the C stack does not depend on the depth of
// the tree, and the ends come from the leaves up. Every scope asks its members once (ASKED_ALL); as
// it takes no new ones after it was marked, that is enough.

/* Brings a scope up to date. */
static void orchi_scope_sweep(orch_future *f) {
    orchi_scope *scope = f->as.scope.own;
    while (scope->ended != NULL) orchi_scope_count(f, orchi_circle_take(&scope->ended));
    if (f->as.scope.reason != 0 && !(scope->bits & ORCHI_ASKED_ALL)) orchi_scope_ask_members(f);
    while (scope->ended != NULL) orchi_scope_count(f, orchi_circle_take(&scope->ended));
}

/* The same at once, where a release that waits can do no harm: in another task, the scope might be
 * closed meanwhile, and it is done from the queue. */
static void orchi_scope_update(orch_future *f) {
    const orch_task *current = orchi_loop->current;
    if (current == NULL || current == f->as.scope.task) orchi_scope_sweep(f);
    else orchi_push(orchi_loop, f);
}

/* Whether a member is a task, which can be made to end by breaking off what it waits for. */
static bool orchi_scope_has_task(const orch_future *f) {
    for (uint32_t i = 0; i < f->as.scope.count; i++) {
        if (f->as.scope.own->members[i]->kind == ORCHI_TASK) return true;
    }
    return false;
}

/* From the queue: also wakes the task that waits for the last member. */
static void orchi_scope_run(orch_future *f) {
    orchi_scope_sweep(f);
    if (f->as.scope.count > 0 || !(f->as.scope.own->bits & ORCHI_CLOSING)) return;
    orchi_push(orchi_loop_of(f), f->as.scope.task->future);
}

/* A member that followed was bypassed: its source has the place now. */
static void orchi_scope_retarget(orch_future *f, uint32_t input, orch_future *to) {
    f->as.scope.own->members[input] = to;
}

/* For reports: its members, in no order. */
static orch_future *orchi_scope_source(const orch_future *f, uint32_t *at) {
    return *at < f->as.scope.count ? f->as.scope.own->members[(*at)++] : NULL;
}

/* It ends when its members have, and its task asks them. */
static orch_future *orchi_scope_cancel(orch_future *f, int reason) {
    (void)f;
    (void)reason;
    return NULL;
}

static const char *orchi_scope_label(const orch_future *f) { return f->as.scope.own->name; }

// The capacity is a byte: 0, then 6 for a slot's worth, then the exponents from 7 on. So 6 is never
// an exponent, and the step is from 6 members to 128. Doubling makes admitting constant on average;
// an array never shrinks, as a scope lives about as long as its busiest moment.

enum { ORCHI_SCOPE_SMALL = 6 };

/* Six members fit into a slot, which saves small scopes an allocation. */
static size_t orchi_scope_capacity(const orchi_scope *scope) {
    size_t small = ORCHI_SCOPE_SMALL;
    if (scope->capacity == 0) return 0;
    return scope->capacity == small ? small : (size_t)1 << scope->capacity;
}

/* Of no capacity there is nothing to free: orchi_free takes NULL. */
static void orchi_scope_free_members(orch_loop *loop, orchi_scope *scope) {
    if (scope->capacity == ORCHI_SCOPE_SMALL) orchi_extra_free(loop, scope->members);
    else orchi_free(loop, scope->members, orchi_scope_capacity(scope) * sizeof(orch_future *));
}

/* Room for one more member. */
static bool orchi_scope_reserve(orch_loop *loop, orchi_scope *scope, uint32_t count) {
    if (count < orchi_scope_capacity(scope)) return true;
    unsigned next = scope->capacity == 0 ? 0u + ORCHI_SCOPE_SMALL : scope->capacity + 1u;
    if (next > 31) return false;
    void *grown = next == ORCHI_SCOPE_SMALL
                      ? orchi_extra_new(loop)
                      : orchi_allocate(loop, ((size_t)1 << next) * sizeof(orch_future *));
    if (grown == NULL) return false;
    if (count > 0) memcpy(grown, scope->members, count * sizeof(orch_future *));
    orchi_scope_free_members(loop, scope);
    scope->members = (orch_future **)grown;
    scope->capacity = (uint8_t)next;
    return true;
}

/* Makes a pending future that is held exclusively a member. False when out of memory. */
static bool orchi_scope_admit(orch_loop *loop, orch_future *f, orch_future *member) {
    if (!orchi_scope_reserve(loop, f->as.scope.own, f->as.scope.count)) return false;
    orchi_attach(member, f, f->as.scope.count);
    f->as.scope.own->members[f->as.scope.count++] = member;
    return true;
}

// ---- deadlines

/* Of a scope, or of a task (its future). */
static orch_future *orchi_deadline_new(orch_loop *loop, orch_future *owner, uint64_t ms) {
    orch_future *f = orchi_timed_new(loop, ORCHI_DEADLINE, ms);
    if (f != NULL) orchi_attach(f, owner, 0);
    return f;
}

/* Also for one that has fired: disarming it again does nothing. */
static void orchi_deadline_free(orch_loop *loop, orch_future *f) {
    if (f == NULL) return;
    orchi_timer_disarm(loop, f);
    orchi_slot_free(loop, f);
}

/* A task is asked like by anybody else. A scope also notes that it was the time: close says so. */
static void orchi_deadline_fire(orch_future *f, int events) {
    (void)events;
    orch_future *owner = f->waiter.one.target;
    f->as.timed.position = ORCHI_DISARMED;
    if (owner->kind != ORCHI_SCOPE) {
        orchi_cancel(owner, ORCH_ETIMEDOUT);
        return;
    }
    owner->as.scope.own->bits |= ORCHI_EXPIRED;
    orchi_scope_ask(owner, ORCH_ETIMEDOUT);
}

/* The one of two that fires first; either may be NULL. Only for two of them the clock is read. */
static orch_future *orchi_nearer(orch_loop *loop, orch_future *a, orch_future *b) {
    if (a == NULL || b == NULL) return a != NULL ? a : b;
    uint64_t now = orchi_now(loop);
    return orchi_timer_left(loop, b, now) < orchi_timer_left(loop, a, now) ? b : a;
}

/* The deadline that would cancel a task first, or NULL: of its scopes, its own, and of the scopes
 * around it. A shield ends the search. */
static orch_future *orchi_nearest(orch_loop *loop, const orch_task *task) {
    orch_future *nearest = NULL, *f = task->scope;
    uint32_t level = task->shields;
    for (;;) {
        for (; f != NULL; f = f->as.scope.outer) {
            if (f->as.scope.own->level != level) continue;
            nearest = orchi_nearer(loop, nearest, f->as.scope.own->deadline);
        }
        if (level > 0) return nearest;
        nearest = orchi_nearer(loop, nearest, task->deadline);
        f = task->home;
        if (f == NULL) return nearest;
        level = f->as.scope.own->level;
        task = f->as.scope.task;
    }
}

/* Gives a new task the deadline that is in force for its starter. False when out of memory. */
static bool orchi_deadline_copy(orch_loop *loop, orch_task *task, orch_future *from) {
    const orchi_timers *t = &loop->timers;
    uint32_t position = from->as.timed.position;
    orch_future *f = orchi_slot_new(loop, ORCHI_DEADLINE);
    if (f == NULL) return false;
    f->as.timed = from->as.timed;
    f->as.timed.position = ORCHI_DISARMED;
    orchi_attach(f, task->future, 0);
    task->deadline = f;
    if (position == ORCHI_DISARMED) task->asked = task->reason = ORCH_ETIMEDOUT;
    else if (position >= t->stamped) return orchi_timer_arm(loop, f);
    else return orchi_timer_arm_at(loop, f, t->entries[position].deadline);
    return true;
}

// ---- locals

// A value is set seldom, inherited with every task that is started, and read in between. So a task
// has a pointer to a table, starting one copies the pointer, and only setting a value copies the
// table. Tables are short lists: a program has a handful of keys (a trace, a logger, an allocator),
// and comparing five pointers is cheaper than any hash.

typedef struct orchi_local { // in an extra slot
    const void *key;
    void *value;
    void (*release)(void *value);
    uint32_t holders; // tables
} orchi_local;

typedef char orchi_local_fits[sizeof(orchi_local) <= 48 ? 1 : -1]; // an extra slot

// All that a task has. It is shared with the tasks that inherit it, until one of them sets a value:
// that one gets a table of its own.
typedef struct orchi_locals { // followed by pointers to its values
    uint32_t holders, count;
} orchi_locals;

static orchi_local **orchi_locals_items(orchi_locals *locals) {
    return (orchi_local **)(void *)(locals + 1);
}

static size_t orchi_locals_bytes(uint32_t count) {
    return sizeof(orchi_locals) + count * sizeof(orchi_local *);
}

/* The slot goes before the user's release is called, which may set a value and need one. */
static void orchi_local_drop(orch_loop *loop, orchi_local *local) {
    if (--local->holders > 0) return;
    orchi_local gone = *local;
    orchi_extra_free(loop, local);
    if (gone.release != NULL) gone.release(gone.value);
}

/* A table goes with the last task that shares it, and lets go of each of its values. */
static void orchi_locals_drop(orch_loop *loop, orchi_locals *locals) {
    if (locals == NULL || --locals->holders > 0) return;
    for (uint32_t i = 0; i < locals->count; i++) {
        orchi_local_drop(loop, orchi_locals_items(locals)[i]);
    }
    orchi_free(loop, locals, orchi_locals_bytes(locals->count));
}

/* What starting a task costs for all its values: one increment. */
static orchi_locals *orchi_locals_share(orchi_locals *locals) {
    if (locals != NULL) locals->holders++;
    return locals;
}

/* The place of a key: `count` when it has none. */
static uint32_t orchi_locals_find(orchi_locals *locals, const void *key) {
    uint32_t i = 0;
    if (locals == NULL) return 0;
    while (i < locals->count && orchi_locals_items(locals)[i]->key != key) i++;
    return i;
}

/* A copy with room for `count`, which are as many or one more, or NULL. */
static orchi_locals *orchi_locals_copy(orch_loop *loop, orchi_locals *from, uint32_t count) {
    orchi_locals *locals = (orchi_locals *)orchi_allocate(loop, orchi_locals_bytes(count));
    if (locals == NULL) return NULL;
    locals->holders = 1;
    locals->count = count;
    for (uint32_t i = 0; from != NULL && i < from->count; i++) {
        orchi_locals_items(locals)[i] = orchi_locals_items(from)[i];
        orchi_locals_items(locals)[i]->holders++;
    }
    return locals;
}

/* What a task has inherited, or left to others. */
ORCHI_NO_INLINE static void orchi_task_disown(orch_loop *loop, orch_task *task) {
    orchi_locals *locals = task->locals;
    orch_future *deadline = task->deadline;
    task->locals = NULL; // the releases may look around
    task->deadline = NULL;
    orchi_deadline_free(loop, deadline);
    orchi_locals_drop(loop, locals);
}

// ---- running

ORCHI_NO_INLINE static void orchi_take_turn_late(orch_loop *loop, orch_task *task) {
    orchi_take_turn(loop, task);
}

/* What need not wait goes on at once, but the 128th in a row takes its turn. */
static inline void orchi_no_wait(orch_loop *loop, orch_task *task) {
    if (ORCHI_UNLIKELY(++loop->streak >= ORCHI_BUDGET)) orchi_take_turn_late(loop, task);
}

static void orchi_task_run(orch_future *f) { orchi_enter(orchi_loop_of(f), f->as.task.task); }

// ---- closing a scope

/* The loop has broken off the wait: what has not ended never will, and goes on alone. */
static void orchi_scope_abandon(orch_future *f) {
    while (f->as.scope.count > 0) {
        orch_future *member = f->as.scope.own->members[--f->as.scope.count];
        member->flags = (uint16_t)((member->flags & ~ORCHI_WAITED) | ORCHI_DETACHED);
        member->references--;
    }
}

/* Asks nothing of anybody: waits until all members have ended. It cannot be refused. */
static void orchi_scope_wait(orch_loop *loop, orch_task *task, orch_future *f) {
    bool outer = task->joining;
    task->joining = true;
    f->as.scope.own->bits |= ORCHI_CLOSING;
    bool broken = orchi_wait_for(loop, task, f) != f;
    f->as.scope.own->bits &= (uint8_t)~ORCHI_CLOSING; // releases may wait for other things
    task->joining = outer;
    if (broken) orchi_scope_abandon(f);
}

/* The kept failures as a list, or the first alone where there is no memory for one. */
static orch_result orchi_scope_failed(orch_loop *loop, orchi_scope *scope) {
    size_t kept = orchi_circle_length(scope->errors);
    if (kept == 0) return orch_fail(ORCH_ENOMEM); // there was no memory to keep any
    orchi_list *list = orchi_list_new(loop, kept, ORCHI_SETTLED, false);
    if (list == NULL) {
        orch_result r = orchi_take_result(orchi_circle_take(&scope->errors));
        while (scope->errors != NULL) orchi_release(orchi_circle_take(&scope->errors));
        return r;
    }
    for (size_t i = 0; i < kept; i++) {
        orchi_items(list)[i] = orchi_circle_take(&scope->errors);
    }
    return orchi_list_result(orchi_items(list)[0]->as.result.error, 0, list);
}

/* What close returns. */
static orch_result orchi_scope_outcome(orch_loop *loop, orch_future *f) {
    orchi_scope *scope = f->as.scope.own;
    bool expired = (scope->bits & ORCHI_EXPIRED) != 0;
    if (scope->failures > 0) {
        orch_result r = orchi_scope_failed(loop, scope);
        if (expired) r.error = ORCH_ETIMEDOUT;
        return r;
    }
    if (expired) return orchi_timeout_result(scope->deadline->as.timed.ms);
    return f->as.scope.reason != 0 ? orch_fail(ORCH_ECANCELED) : orch_ok(NULL, NULL);
}

/* Waits for the innermost scope's members and takes it off its task. */
static orch_result orchi_scope_end(orch_loop *loop, orch_task *task, orch_future *f) {
    orchi_scope *scope = f->as.scope.own;
    orchi_scope_sweep(f);
    if (f->as.scope.count == 0) orchi_no_wait(loop, task);
    orchi_scope_sweep(f);
    while (f->as.scope.count > 0) {
        orchi_scope_wait(loop, task, f);
        orchi_scope_sweep(f);
    }
    orch_result r = orchi_scope_outcome(loop, f);
    task->scope = f->as.scope.outer;
    if (ORCHI_UNLIKELY(task->reason != 0)) orchi_task_judge(task);
    orchi_deadline_free(loop, scope->deadline);
    orchi_scope_free_members(loop, scope);
    orchi_extra_free(loop, scope);
    orchi_slot_free(loop, f);
    return r;
}

/* A task has ended with scopes open: their tickets were on its stack. */
ORCHI_COLD static void orchi_scopes_left(orch_loop *loop, orch_task *task) {
    char who[160], scope[160];
    orchi_describe(task->future, who, sizeof who);
    orchi_describe(task->scope, scope, sizeof scope);
    orchi_report(loop, "asyncorch: %s ended with %s open: close it on every path\n", who, scope);
    orchi_misuse("orch_scope_close", ORCH_ESCOPE);
    while (task->scope != NULL) {
        orchi_scope_ask(task->scope, ORCH_ECANCELED);
        orch_result r = orchi_scope_end(loop, task, task->scope);
        orch_result_free(&r);
    }
}

// ---- the end of a task

/* The end of a task. Nothing may wait in here any more: releases and hooks are refused as outside a
 * task. The stack is given back first of all that comes after it, and nobody can take it before it
 * is left. */
static inline orchi_entry orchi_task_end(orch_loop *loop, orch_task *task, orch_result *r) {
    task->ended = true;
    if (task->release != NULL) task->release(task->arg);
    if (ORCHI_UNLIKELY(task->heir)) orchi_task_disown(loop, task);
    orchi_resolve(loop, task->future, r);
    orch_task *next = orchi_next_task(loop, task);
    orchi_stack_give(loop, &task->top);
    loop->current = next;
    return orchi_context_end(&task->context, orchi_context_of(loop, next), orchi_answer(next));
}

/* The first and last function on a task's stack. */
static orchi_entry orchi_task_main(void *argument) {
    orch_task *task = (orch_task *)argument;
    orch_loop *loop = orchi_loop_of(task->future);
    orchi_tool_begin(&loop->main);
    orch_result r = task->fn(task->arg);
    if (ORCHI_UNLIKELY(task->scope != NULL)) orchi_scopes_left(loop, task);
    return orchi_task_end(loop, task, &r);
}

// ---- waiting for an end

/* What it waits for has followed something: from now on it waits for that. */
static void orchi_task_retarget(orch_future *f, uint32_t input, orch_future *to) {
    (void)input;
    f->as.task.task->waiting = to;
}

/* For reports: NULL while it runs or is ready. */
static orch_future *orchi_task_source(const orch_future *f, uint32_t *at) {
    return (*at)++ == 0 ? f->as.task.task->waiting : NULL;
}

static const char *orchi_task_label(const orch_future *f) { return f->as.task.task->name; }

/* Whether f is, or waits through others for, the future `inner`. */
static bool orchi_encloses(const orch_future *f, const orch_future *inner) {
    while (inner != f && (inner->flags & ORCHI_WAITED)) inner = inner->waiter.one.target;
    return inner == f;
}

// Why a drop waits. A child may write through a pointer into its parent's frame: its argument, the
// list it fills. When the parent gives the child up and moves on, that frame is soon another
// function's. So inside a task giving up is asking and waiting; that takes no I/O and no time of
// the clock, unless the child shields. Outside a task nobody could wait, and work must own what it
// uses.

/* Cancels a claimed future, waits for its end and frees it. What encloses the task itself is asked
 * to end and not waited for: its end waits for this task. */
static void orchi_join_in(orch_loop *loop, orch_task *task, orch_future *f) {
    if (orchi_encloses(f, task->future)) {
        orchi_release(f);
        return;
    }
    f->flags |= ORCHI_CANCEL;
    orchi_cancel(f, task->reason != 0 ? task->reason : ORCH_ECANCELED);
    if (!orchi_settled(f)) {
        bool outer = task->joining;
        task->joining = true;
        f = orchi_wait_for(loop, task, f);
        task->joining = outer;
    }
    orchi_release(f);
}

/* What orch_drop calls inside a task. One that has ended has no stack to come back to: it asks, and
 * the work ends alone. */
static void orchi_join(orch_future *f) {
    orch_task *task = orchi_loop->current;
    if (task->ended) orchi_release(f);
    else orchi_join_in(orchi_loop, task, f);
}

/* Reported once: a task that swallows ORCH_ECANCELED in a loop would otherwise look like a hang. */
ORCHI_COLD static void orchi_impatient(orch_loop *loop, orch_task *task) {
    char who[160];
    orchi_describe(task->future, who, sizeof who);
    orchi_report(
        loop,
        "asyncorch: %s was cancelled and goes on: %d waits were refused with ORCH_ECANCELED; "
        "return when a wait says so, or shield the clean-up\n",
        who, ORCHI_PATIENCE);
    orchi_print_backtrace();
}

/* A wait is refused. The task that does not listen is reported once, and takes turns. */
static int orchi_refuse(orch_loop *loop, orch_task *task) {
    if (++task->refused == ORCHI_PATIENCE) orchi_impatient(loop, task);
    if (task->refused % ORCHI_BUDGET == 0) orchi_take_turn(loop, task);
    return ORCH_ECANCELED;
}

// ---- starting

/* In the order of the fields: stores to one cache line in a row leave two a cycle. */
static ORCHI_INLINE void orchi_task_init(orch_loop *loop, orch_task *task, orch_future *f,
                                         const orch_task_desc *desc) {
    task->future = f;
    task->waiting = NULL;
    task->call = NULL;
    task->reason = 0; // with the next four one store of eight bytes
    task->nested = true;
    task->joining = task->ended = task->canary = false;
    task->starter = loop->current;
    task->name = desc->name != NULL ? desc->name : "";
    task->fn = desc->fn;
    task->arg = desc->arg;
    task->release = desc->release;
    memset(&task->scope, 0, sizeof *task - offsetof(struct orch_task, scope));
    if (ORCHI_UNLIKELY(loop->stats.guard == ORCH_GUARD_CANARY)) {
        task->canary = true;
        orchi_canary_set(task->top.stack);
    }
}

/* Copies the argument to the top of the stack. Returns where the stack begins below it. */
static char *orchi_task_copy(orch_task *task, char *top, const orch_task_desc *desc) {
    size_t bytes = (desc->arg_size + 63) / 64 * 64;
    top -= bytes;
    orchi_valgrind_lower(top, bytes);
    memcpy(top, desc->arg, desc->arg_size);
    task->arg = top;
    return top;
}

/* Runs a new task until it first waits. */
static inline void orchi_task_start(orch_loop *loop, orch_task *task, char *top) {
    orch_task *self = loop->current;
    orchi_trash *trash = loop->trash;
    loop->trash = NULL;
    loop->current = task;
    orchi_context_start(orchi_context_of(loop, self), &task->context, task->top.stack, top,
                        orchi_task_main, task);
    if (self == NULL) orchi_serve(loop);
    loop->trash = trash;
}

// What orch_go, orch_scope_go and orch_spawn differ in is only what the new task inherits:
//
//                      deadline            ends with starter's scope   locals
//     orch_go          a copy, by value    no                          yes
//     orch_scope_go    the scope's own     yes                         yes
//     orch_spawn       none                no                          yes
//
// A copy, and not a link: who started the task may be gone before the deadline is. Tasks that have
// nothing to hand on, as most, pay one test of `heir`.

/* What a new task has from whoever starts it: locals, and a scope, a deadline or neither. */
ORCHI_NO_INLINE static bool orchi_task_inherit(orch_loop *loop, orch_task *task, orch_future *home,
                                               bool bounded) {
    const orch_task *from = loop->current;
    task->heir = true;
    task->home = home;
    if (from != NULL) task->locals = orchi_locals_share(from->locals);
    orch_future *nearest = bounded && from != NULL ? orchi_nearest(loop, from) : NULL;
    bool ok = nearest == NULL || orchi_deadline_copy(loop, task, nearest);
    if (ok && home != NULL) ok = orchi_scope_admit(loop, home, task->future);
    if (!ok) orchi_task_disown(loop, task);
    return ok;
}

/* The slot first, then the stack: what fails gives back what it had. */
static ORCHI_INLINE orch_future *orchi_go(orch_loop *loop, const orch_task_desc *desc,
                                          uint32_t size_log, orch_future *home, bool bounded) {
    orch_future *f = orchi_slot_new(loop, ORCHI_TASK);
    if (f == NULL) return NULL;
    orchi_stack_top *block = orchi_stack_take(loop, size_log);
    if (block == NULL) {
        orchi_slot_free(loop, f);
        return NULL;
    }
    orch_task *task = (orch_task *)(void *)block;
    char *top = (char *)block;
    orchi_task_init(loop, task, f, desc);
    f->as.task.task = task;
    f->as.task.events = 0;
    bool heir = home != NULL || (task->starter != NULL && task->starter->heir);
    if (ORCHI_UNLIKELY(heir) && !orchi_task_inherit(loop, task, home, bounded)) {
        orchi_stack_give(loop, block);
        orchi_slot_free(loop, f);
        return NULL;
    }
    if (desc->arg_size > 0) top = orchi_task_copy(task, top, desc);
    orchi_task_start(loop, task, top);
    return f;
}

/* What is wrong with a desc; the exponent of its stack size when nothing is. */
static ORCHI_INLINE int orchi_task_error(const orch_task_desc *desc, uint32_t *size_log) {
    if (orchi_loop == NULL) return ORCH_ENOLOOP;
    if (desc == NULL || desc->fn == NULL) return ORCH_EINVAL;
    *size_log = desc->stack_size != 0 ? orchi_stack_log(desc->stack_size) : orchi_loop->stack_log;
    if (*size_log == 0) return ORCH_EINVAL;
    if (ORCHI_LIKELY(desc->arg_size == 0)) return 0;
    bool fits = desc->arg != NULL && desc->arg_size <= ((size_t)1 << *size_log) / 2;
    return fits ? 0 : ORCH_EINVAL;
}

/* Starts what a desc says, or a rejected future and the argument released. */
static ORCHI_INLINE orch_future *orchi_begin_inline(const orch_task_desc *desc, orch_future *home,
                                                    bool bounded, const char *function) {
    uint32_t size_log = 0;
    int error = orchi_task_error(desc, &size_log);
    if (error != 0) orchi_misuse(function, error);
    orch_future *f = error == 0 ? orchi_go(orchi_loop, desc, size_log, home, bounded) : NULL;
    if (ORCHI_LIKELY(f != NULL)) return f;
    if (desc != NULL && desc->release != NULL) desc->release(desc->arg);
    return orchi_rejected(error != 0 ? error : ORCH_ENOMEM);
}

ORCHI_NO_INLINE static orch_future *orchi_begin(const orch_task_desc *desc, orch_future *home,
                                                bool bounded, const char *function) {
    return orchi_begin_inline(desc, home, bounded, function);
}

orch_future *orch_go_with(const orch_task_desc *desc) {
    return orchi_begin(desc, NULL, true, "orch_go_with");
}

orch_future *orch_go(orch_task_fn fn, void *arg) {
    orch_task_desc desc = {NULL, fn, arg, 0, NULL, 0};
    return orchi_begin_inline(&desc, NULL, true, "orch_go"); // what it leaves out is not looked at
}

/* There is no future to carry an error, so it is returned. A detached task needs no reference while
 * it runs, and frees its slot when it settles. */
int orch_spawn(orch_task_fn fn, void *arg) {
    orch_task_desc desc = {NULL, fn, arg, 0, NULL, 0};
    orch_future *f = orchi_begin(&desc, NULL, false, "orch_spawn");
    int error = f->flags & ORCHI_IMMORTAL ? f->as.result.error : 0;
    orch_detach(f);
    return error;
}

// ---- waiting

/* The current task, or NULL and a misuse. */
static orch_task *orchi_here_task(const char *function, int *error) {
    orch_task *task = orchi_loop != NULL ? orchi_loop->current : NULL;
    *error = 0;
    if (ORCHI_LIKELY(task != NULL && !task->ended)) return task;
    *error = orchi_misuse(function, orchi_loop != NULL ? ORCH_ENOTASK : ORCH_ENOLOOP);
    return NULL;
}

/* In line, as every return between the switch and the user's code that is not one of the task left
 * is mispredicted. */
static ORCHI_INLINE orch_result orchi_await_pending(orch_loop *loop, orch_task *task,
                                                    orch_future *f) {
    if (orchi_must_end(task) && !(f->flags & ORCHI_DECIDED)) {
        orchi_join_in(loop, task, f);
        return orch_fail(orchi_refuse(loop, task));
    }
    return orchi_take_result(orchi_wait_for(loop, task, f));
}

// The order of checks in a wait, here and in everything that is built on it:
//
//     in a task?         if not, the future is given up: it was handed over
//     the handle         misuse gives an immortal rejected future, which is settled
//     settled            the result at once, also for a cancelled task: it costs no wait
//     asked to end       the future is cancelled, waited for and dropped; ORCH_ECANCELED
//     else               leave, and come back when it has settled
//
// A future that is decided is waited for even by a cancelled task: its success must not be lost.

orch_result orch_await(orch_future *f) {
    int error;
    orch_task *task = orchi_here_task("orch_await", &error);
    if (task == NULL) {
        orch_drop(f);
        return orch_fail(error);
    }
    orch_loop *loop = orchi_loop;
    f = orchi_claim(f, "orch_await");
    if (!orchi_settled(f)) return orchi_await_pending(loop, task, f);
    orchi_no_wait(loop, task);
    return orchi_take_result(f);
}

/* What a task function has returned, to be looked at: a chain is awaited. Chains, shares and what
 * is lent do not own what they show. */
static orch_result orchi_outcome(orch_result r) {
    return r.owner == r.value ? r : orch_await(orch_settled(r));
}

/* Waits on a proxy that lets go when the task is cancelled. */
static int orchi_look(orch_loop *loop, orch_task *task, orch_future *f) {
    if (orchi_must_end(task)) return orchi_refuse(loop, task);
    orch_future *proxy = orchi_proxy_new(f, ORCHI_LOOKING);
    if (proxy == NULL) return ORCH_ENOMEM;
    f->references++;
    proxy = orchi_wait_for(loop, task, proxy);
    bool let_go = (proxy->flags & (ORCHI_CANCEL | ORCHI_IMMORTAL)) != 0;
    orchi_release(proxy);
    return let_go ? ORCH_ECANCELED : 0;
}

/* Looks and does not consume, so the handle stays good whatever comes, and the result is lent. */
orch_result orch_wait(orch_future *f) {
    int error;
    orch_task *task = orchi_here_task("orch_wait", &error);
    if (task == NULL) return orch_fail(error);
    error = orchi_check(f, "orch_wait");
    if (error != 0) return orch_fail(error);
    if (orchi_settled(f)) orchi_no_wait(orchi_loop, task);
    else error = orchi_look(orchi_loop, task, f);
    return orchi_settled(f) ? orchi_lend(f) : orch_fail(error);
}

/* orch_yield, whatever else there is to be done. */
ORCHI_NO_INLINE static int orchi_yield(void) {
    int error;
    orch_task *task = orchi_here_task("orch_yield", &error);
    if (task == NULL) return error;
    orch_loop *loop = orchi_loop;
    if (orchi_must_end(task)) return orchi_refuse(loop, task);
    orchi_take_turn(loop, task);
    return orchi_answer(task);
}

// A yield mostly goes from one ready task to the next, and nothing else is to be done. On x86-64
// that is a path of its own, for what the processor makes of it:
//
//   - It ends in orchi_hop, which becomes a jump: so nothing stands between the user's frame and
//     the other task's, and no register is saved but in the switch.
//   - Loads first. A load waits for the stores before it whose addresses are not known yet, and
//     below a stack pointer that has just been loaded no save's is.
//   - It is left by a jump. orch_yield is often called from another place than by the task that it
//     switches to, and its return would be mispredicted; a jump is predicted by its history. The
//     price: one later return of the caller's is mispredicted. orch_await keeps to the return, as
//     tasks that wait mostly run the same code.

#if ORCHI_ASSEMBLY && !ORCHI_CET && !ORCHI_ASAN && !ORCHI_TSAN && defined(__x86_64__)
/* Whether leaving a task is a switch and no more: nobody has asked it to end, it has waited before,
 * and its guard needs no look. From reason to canary, read as one. */
static inline bool orchi_leaves_simply(const orch_task *task) {
    uint64_t odd;
    memcpy(&odd, (const char *)task + offsetof(struct orch_task, reason), sizeof odd);
    return odd == 0 && !(task->future->flags & ORCHI_QUEUED);
}

int orch_yield(void) {
    orch_loop *loop = orchi_loop;
    orch_task *task = loop != NULL ? loop->current : NULL;
    if (ORCHI_UNLIKELY(task == NULL || loop->trash != NULL)) return orchi_yield();
    if (ORCHI_UNLIKELY(!orchi_round_has_next(loop))) return orchi_yield();
    orch_future *front = orchi_front(loop);
    if (ORCHI_UNLIKELY(front->kind != ORCHI_TASK)) return orchi_yield();
    orch_task *next = front->as.task.task;
    bool simple = orchi_leaves_simply(task) && next->reason == 0;
    if (ORCHI_UNLIKELY(!simple)) return orchi_yield();
    loop->streak = 0;
    loop->current = next;
    orchi_pop_front(loop, front);
    orchi_enqueue(loop, task->future);
    return orchi_hop(&task->context.sp, next->context.sp);
}
#else
int orch_yield(void) { return orchi_yield(); }
#endif

/* Refused before a timer is made, so a cancelled task in a loop of sleeps needs none. */
int orch_sleep(uint64_t ms) {
    int error;
    orch_task *task = orchi_here_task("orch_sleep", &error);
    if (task == NULL) return error;
    if (orchi_must_end(task)) return orchi_refuse(orchi_loop, task);
    orch_result r = orch_await(orch_after(ms));
    return r.error;
}

// Shields are a count, as they nest. Beginning one changes no reason: a request that came before it
// is held off by comparing counts, see orchi_must_end. Ending one may let through what came
// meanwhile; the wait after it is then refused, not the end itself.

void orch_shield_begin(void) {
    int error;
    orch_task *task = orchi_here_task("orch_shield_begin", &error);
    if (task != NULL) task->shields++;
}

void orch_shield_end(void) {
    int error;
    orch_task *task = orchi_here_task("orch_shield_end", &error);
    if (task == NULL) return;
    if (task->shields == 0) {
        orchi_misuse("orch_shield_end", ORCH_EINVAL);
        return;
    }
    task->shields--;
    if (task->scope != NULL) orchi_scopes_lower(task);
}

// ---- looking at a task

orch_task *orch_self(void) { return orchi_loop != NULL ? orchi_loop->current : NULL; }

void *orch_local(const void *key) {
    const orch_task *task = orch_self();
    orchi_locals *locals = task != NULL ? task->locals : NULL;
    uint32_t i = orchi_locals_find(locals, key);
    return locals != NULL && i < locals->count ? orchi_locals_items(locals)[i]->value : NULL;
}

/* Puts a value in its place in a table of the task's own. */
static int orchi_local_put(orch_loop *loop, orch_task *task, orchi_local *local) {
    orchi_locals *locals = task->locals;
    uint32_t i = orchi_locals_find(locals, local->key), count = locals != NULL ? locals->count : 0;
    orchi_local *old = i < count ? orchi_locals_items(locals)[i] : NULL;
    if (old == NULL || locals->holders > 1) {
        task->locals = orchi_locals_copy(loop, locals, i < count ? count : count + 1);
        if (task->locals == NULL) {
            task->locals = locals;
            return ORCH_ENOMEM;
        }
        orchi_locals_drop(loop, locals);
    }
    orchi_locals_items(task->locals)[i] = local;
    task->heir = true;
    if (old != NULL) orchi_local_drop(loop, old);
    return 0;
}

/* Without memory nothing has changed. */
static int orchi_local_set(orch_task *task, orchi_local set) {
    orchi_local *local = (orchi_local *)orchi_extra_new(orchi_loop);
    if (local == NULL) return ORCH_ENOMEM;
    *local = set;
    int error = orchi_local_put(orchi_loop, task, local);
    if (error != 0) orchi_extra_free(orchi_loop, local);
    return error;
}

int orch_local_set(const void *key, void *value, void (*release)(void *value)) {
    int error;
    orch_task *task = orchi_here_task("orch_local_set", &error);
    if (task != NULL && key == NULL) error = orchi_misuse("orch_local_set", ORCH_EINVAL);
    orchi_local set = {key, value, release, 1};
    if (error == 0) error = orchi_local_set(task, set);
    if (error != 0 && release != NULL) release(value);
    return error;
}

int orch_cancel_reason(void) {
    orch_task *task = orch_self();
    return task != NULL ? task->reason : 0;
}

// What follows only looks, is allowed anywhere, and takes NULL as "no task": it is called from
// hooks and loggers, which may run outside of one.

const char *orch_task_name(const orch_task *task) { return task != NULL ? task->name : ""; }

size_t orch_task_stack_size(const orch_task *task) {
    return task != NULL ? (size_t)1 << task->top.stack->size_log : 0;
}

size_t orch_task_stack_peak(const orch_task *task) {
    return task != NULL ? orchi_stack_touched(task->top.stack) : 0;
}

// The call is left in the loop and made by orchi_serve when the main stack is back: fn gets its
// whole depth, for libraries that need megabytes. Meanwhile there is no current task, so whatever
// would wait is refused, and the loop counts as running, so that it cannot be stepped from there.

void *orch_on_main_stack(void *(*fn)(void *arg), void *arg) {
    orch_task *task = orch_self();
    if (fn == NULL) orchi_misuse("orch_on_main_stack", ORCH_EINVAL);
    if (fn == NULL) return NULL;
    if (task == NULL) return fn(arg);
    orch_loop *loop = orchi_loop;
    loop->call.fn = fn;
    loop->call.arg = arg;
    loop->call.task = task;
    loop->current = NULL;
    orchi_trash *trash = loop->trash;
    loop->trash = NULL;
    orchi_context_switch(&task->context, &loop->main, 0);
    loop->trash = trash;
    return loop->call.arg;
}

// ---- stack overflow
//
// A handler for the whole process, installed with the first loop: when a guard was hit, it names
// the task that runs, and puts back what was installed before, which then sees the same fault. It
// runs on an alternate stack. The guard need not be the task's own: a large frame may jump over it.

static struct {
    int installed;
    struct sigaction segv, bus;
} orchi_fault;

enum { ORCHI_SIGNAL_STACK = 65536 };

/* Whether an address lies in the guard of a stack. */
static bool orchi_is_guard(const orch_loop *loop, const char *address) {
    for (orchi_stack_map *map = loop->maps; map != NULL; map = map->next) {
        if (address < map->base || address >= map->base + map->bytes) continue;
        return (size_t)(address - map->base) % orchi_map_stride(map) < ORCHI_GUARD_BYTES;
    }
    return false;
}

/* write and not stdio, which a signal handler must not call. */
static void orchi_fault_write(const char *text) {
    if (write(2, text, strlen(text)) < 0) return;
}

/* In decimal, by hand: printf is not allowed here. */
static void orchi_fault_number(uint64_t number) {
    char digits[24], *p = digits + sizeof digits - 1;
    *p = '\0';
    do *--p = (char)('0' + number % 10);
    while ((number /= 10) > 0);
    orchi_fault_write(p);
}

/* Only async-signal-safe calls. */
static void orchi_fault_handler(int signal, siginfo_t *info, void *context) {
    (void)context;
    const char *address = (const char *)info->si_addr;
    const orch_task *task = orchi_loop != NULL ? orchi_loop->current : NULL;
    if (task != NULL && orchi_is_guard(orchi_loop, address)) {
        orchi_fault_write("asyncorch: stack overflow in task '");
        orchi_fault_write(task->name);
        orchi_fault_write("'#");
        orchi_fault_number(task->future->generation / 2);
        orchi_fault_write(": give it a bigger stack_size, or use orch_on_main_stack\n");
    }
    sigaction(signal, signal == SIGBUS ? &orchi_fault.bus : &orchi_fault.segv, NULL);
}

/* The thread gets an alternate stack if it has none: the one that overflowed has no room. */
static void orchi_fault_install(orch_loop *loop) {
    stack_t now;
    if (loop->desc.no_overflow_report) return;
    memset(&now, 0, sizeof now);
    if (sigaltstack(NULL, &now) == 0 && (now.ss_flags & SS_DISABLE)) {
        loop->alternate = orchi_allocate(loop, ORCHI_SIGNAL_STACK);
        stack_t mine;
        memset(&mine, 0, sizeof mine);
        mine.ss_sp = loop->alternate;
        mine.ss_size = ORCHI_SIGNAL_STACK;
        if (loop->alternate != NULL) sigaltstack(&mine, NULL);
    }
    if (__atomic_exchange_n(&orchi_fault.installed, 1, __ATOMIC_ACQ_REL)) return;
    struct sigaction action;
    memset(&action, 0, sizeof action);
    action.sa_sigaction = orchi_fault_handler;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &orchi_fault.segv);
    sigaction(SIGBUS, &action, &orchi_fault.bus);
}

/* Only the alternate stack goes; the handler serves other threads' loops too. */
static void orchi_fault_uninstall(orch_loop *loop) {
    if (loop->alternate == NULL) return;
    stack_t off;
    memset(&off, 0, sizeof off);
    off.ss_flags = SS_DISABLE;
    sigaltstack(&off, NULL);
    orchi_free(loop, loop->alternate, ORCHI_SIGNAL_STACK);
    loop->alternate = NULL;
}

// ------------------------------------------------------------------------------------------------
// >>scope
//
// The public face of scopes; what tasks need of them stands in >>task. Invariants:
//   - A scope is a slot, which its members have as their consumer, and an extra one with the rest.
//     The orch_scope on the user's stack is a ticket, so closing twice, or from another task, is
//     seen, and a scope that was never closed can be ended with its task.
//   - A task's open scopes are a chain, innermost first; only the innermost can close.
//   - Members are an array with holes filled from the end; a member knows its place.
//   - Failures and cancellation are worked off from the queue, or at close: never inside settle.
//   - The deadline is a timer of the scope's own, so the nearest counts by firing first.
// Left out: a result for each member. Await a reference of it, or let it write to its argument.

// For example, a scope with a deadline of 100 ms, two members and a body that sleeps:
//
//     open           a slot, and behind it the rest; a timer for 100 ms; the task's innermost scope
//     go, go         each member runs until it first waits; the scope is its consumer, and its
//                    place in the array is written into it
//     sleep          the body waits like any task
//     90 ms          member 0 fails: settling takes it out of the array, appends it to `ended` and
//                    queues the scope, no more
//     the scope runs keeps the failure, marks itself and what is open inside as cancelled, asks
//                    member 1 to end, and the timer that the body waits for
//     the body       its sleep says ORCH_ECANCELED, and so would every wait until close
//     close          waits for member 1, which settles, queues the scope, which wakes the task; the
//                    list of failures becomes the result, timer and slots are given back
//
// Had the deadline come first, the same would have happened with ORCH_ETIMEDOUT for a reason. Had
// the task been cancelled from outside, all its open scopes would have been marked at once, each
// asking its members when it runs: that is how a request reaches a tree of any depth without
// recursion.

/* The slot of an open scope, or NULL and a misuse. */
static orch_future *orchi_scope_of(const orch_scope *scope, const char *function) {
    orch_future *f = scope != NULL ? scope->future : NULL;
    bool open = f != NULL && f->generation == scope->generation && f->kind == ORCHI_SCOPE;
    if (ORCHI_LIKELY(open && orchi_loop_of(f) == orchi_loop)) return f;
    orchi_misuse(function, scope == NULL ? ORCH_EINVAL : open ? ORCH_ETHREAD : ORCH_ESCOPE);
    return NULL;
}

/* A scope opened in a cancelled one is cancelled from the start. */
static void orchi_scope_init(orch_task *task, orch_future *f, orchi_scope *own) {
    memset(own, 0, sizeof *own);
    own->name = "";
    own->level = (uint16_t)task->shields;
    f->as.scope.own = own;
    f->as.scope.task = task;
    f->as.scope.outer = task->scope;
    f->as.scope.count = 0;
    f->as.scope.reason = task->level == task->shields ? task->reason : 0;
    if (f->as.scope.reason != 0) f->flags |= ORCHI_DECIDED;
    orchi_attach(f, task->future, 0);
    task->scope = f;
    task->heir = true;
}

/* Both slots, or none. */
static orch_future *orchi_scope_new(orch_loop *loop, orch_task *task) {
    orch_future *f = orchi_slot_new(loop, ORCHI_SCOPE);
    if (f == NULL) return NULL;
    orchi_scope *own = (orchi_scope *)orchi_extra_new(loop);
    if (own == NULL) {
        orchi_slot_free(loop, f);
        return NULL;
    }
    orchi_scope_init(task, f, own);
    return f;
}

/* What the desc says. */
static int orchi_scope_set(orch_loop *loop, orch_future *f, const orch_scope_desc *desc) {
    orchi_scope *own = f->as.scope.own;
    if (desc->name != NULL) own->name = desc->name;
    if (desc->keep_going) own->bits = ORCHI_KEEP_GOING;
    if (desc->timeout_ms == 0 || desc->timeout_ms == ORCH_NO_DEADLINE) return 0;
    own->deadline = orchi_deadline_new(loop, f, desc->timeout_ms);
    return own->deadline != NULL ? 0 : ORCH_ENOMEM;
}

/* The ticket of a scope that could not be opened: no scope, and not a misuse. */
static int orchi_scope_none(orch_scope *scope, int error) {
    scope->future = orchi_rejected(error);
    scope->generation = scope->future->generation;
    return error;
}

int orch_scope_open(orch_scope *scope, const orch_scope_desc *desc) {
    int error;
    orch_task *task = orchi_here_task("orch_scope_open", &error);
    if (scope == NULL) return orchi_misuse("orch_scope_open", ORCH_EINVAL);
    if (task == NULL) return orchi_scope_none(scope, error);
    orch_future *f = orchi_scope_new(orchi_loop, task);
    if (f == NULL) return orchi_scope_none(scope, ORCH_ENOMEM);
    scope->future = f;
    scope->generation = f->generation;
    if (desc == NULL || orchi_scope_set(orchi_loop, f, desc) == 0) return 0;
    orch_result r = orchi_scope_end(orchi_loop, task, f);
    orch_result_free(&r);
    return orchi_scope_none(scope, ORCH_ENOMEM);
}

/* The error of a ticket that never was a scope, else 0. */
static int orchi_scope_broken(const orch_scope *scope) {
    bool broken = scope != NULL && scope->future != NULL && scope->generation == 1;
    return broken ? scope->future->as.result.error : 0;
}

/* The slot of a scope that takes new work, or NULL and why not. */
static orch_future *orchi_scope_enter(const orch_scope *scope, const char *function, int *error) {
    *error = orchi_scope_broken(scope);
    if (*error != 0) return NULL;
    orch_future *f = orchi_scope_of(scope, function);
    *error = f == NULL ? ORCH_ESCOPE : f->as.scope.reason != 0 ? ORCH_ECANCELED : 0;
    return *error == 0 ? f : NULL;
}

/* A failure that there is no memory to keep. */
static void orchi_scope_lost(orch_future *f, int error) {
    f->as.scope.own->failures++;
    if (!(f->as.scope.own->bits & ORCHI_KEEP_GOING)) orchi_scope_ask(f, error);
}

/* Counts what has settled, behind what has before. It may be a rejected future that is nobody's, or
 * others may hold it too: then a slot of its own stands for it. */
static void orchi_scope_take(orch_future *f, orch_future *member) {
    if ((member->flags & ORCHI_IMMORTAL) || member->references != 1) {
        orch_result r = orchi_take_result(member);
        int error = r.error;
        member = orchi_slot_new(orchi_loop, ORCHI_DONE);
        if (member != NULL) member->as.result = r;
        else orch_result_free(&r);
        if (member == NULL && error != 0) orchi_scope_lost(f, error);
    }
    if (member != NULL) orchi_circle_append(&f->as.scope.own->ended, member);
    orchi_scope_update(f);
}

/* Something could not be put in: that is a failure like any other. */
static int orchi_scope_fail(orch_future *f, int error) {
    orchi_scope_take(f, orchi_rejected(error));
    return error;
}

/* Starting does not fail alone: what could not be started is a failure of the scope, too, so that
 * nobody has to look at each return value. */
static int orchi_scope_start(const orch_scope *scope, const orch_task_desc *desc,
                             const char *function) {
    int error;
    orch_future *f = orchi_scope_enter(scope, function, &error);
    if (f == NULL) {
        if (desc != NULL && desc->release != NULL) desc->release(desc->arg);
        return error;
    }
    orch_future *task = orchi_begin(desc, f, false, function);
    if (orchi_is_static(task)) return orchi_scope_fail(f, task->as.result.error);
    orchi_scope_update(f); // it may have ended
    return 0;
}

int orch_scope_go(orch_scope *scope, orch_task_fn fn, void *arg) {
    orch_task_desc desc = {NULL, fn, arg, 0, NULL, 0};
    return orchi_scope_start(scope, &desc, "orch_scope_go");
}

int orch_scope_go_with(orch_scope *scope, const orch_task_desc *desc) {
    return orchi_scope_start(scope, desc, "orch_scope_go_with");
}

/* A settled future is counted at once and never takes a place in the array. */
int orch_scope_add(orch_scope *scope, orch_future *added) {
    int error;
    orch_future *f = orchi_scope_enter(scope, "orch_scope_add", &error);
    if (f == NULL) {
        orch_drop(added);
        return error;
    }
    orch_future *member = orchi_claim(added, "orch_scope_add");
    if (member->flags & ORCHI_IMMORTAL) return orchi_scope_fail(f, member->as.result.error);
    if (orchi_settled(member)) {
        orchi_scope_take(f, member);
    } else if (!orchi_scope_admit(orchi_loop, f, member)) {
        orchi_scope_fail(f, ORCH_ENOMEM);
        orch_drop(member);
        return ORCH_ENOMEM;
    }
    return 0;
}

void orch_scope_cancel(orch_scope *scope, int reason) {
    if (orchi_scope_broken(scope) != 0) return;
    orch_future *f = orchi_scope_of(scope, "orch_scope_cancel");
    if (f != NULL) orchi_scope_ask(f, reason != 0 ? reason : ORCH_ECANCELED);
}

/* Whether the task may close f now. Release builds first close what is open in it. */
static bool orchi_scope_closes(orch_loop *loop, orch_task *task, orch_future *f) {
    if (f == NULL || f->as.scope.task != task) {
        if (f != NULL) orchi_misuse("orch_scope_close", ORCH_ESCOPE);
        return false;
    }
    if (task->scope != f) orchi_misuse("orch_scope_close", ORCH_ESCOPE);
    while (task->scope != f) {
        orch_result r = orchi_scope_end(loop, task, task->scope);
        orch_result_free(&r);
    }
    return true;
}

// Close cannot be refused and returns when every member has ended, also in a cancelled task: who
// comes back from it knows that nothing of the scope uses the frame any more. To bound it, give the
// scope a deadline, or have members that end when they are asked.

orch_result orch_scope_close(orch_scope *scope) {
    int error;
    orch_task *task = orchi_here_task("orch_scope_close", &error);
    if (task == NULL) return orch_fail(error);
    error = orchi_scope_broken(scope);
    if (error != 0) return orch_fail(error);
    orch_future *f = orchi_scope_of(scope, "orch_scope_close");
    if (!orchi_scope_closes(orchi_loop, task, f)) return orch_fail(ORCH_ESCOPE);
    return orchi_scope_end(orchi_loop, task, f);
}

/* A new timer, whose duration counts from the end of this round as any other's does. The old one
 * goes last: without memory for the new one the scope keeps it. */
int orch_scope_extend(orch_scope *scope, uint64_t ms) {
    int error;
    orch_future *f = orchi_scope_enter(scope, "orch_scope_extend", &error);
    if (f == NULL) return error;
    bool none = ms == ORCH_NO_DEADLINE;
    orch_future *deadline = none ? NULL : orchi_deadline_new(orchi_loop, f, ms);
    if (!none && deadline == NULL) return ORCH_ENOMEM;
    orch_future *old = f->as.scope.own->deadline;
    f->as.scope.own->deadline = deadline;
    orchi_deadline_free(orchi_loop, old);
    return 0;
}

size_t orch_scope_failures(const orch_scope *scope) {
    if (orchi_scope_broken(scope) != 0) return 0;
    orch_future *f = orchi_scope_of(scope, "orch_scope_failures");
    if (f == NULL) return 0;
    orchi_scope_update(f);
    return f->as.scope.own->failures;
}

const orch_result *orch_scope_error(const orch_scope *scope, size_t i) {
    if (orchi_scope_broken(scope) != 0) return &orchi_no_element;
    orch_future *f = orchi_scope_of(scope, "orch_scope_error");
    if (f != NULL) orchi_scope_update(f);
    const orch_future *last = f != NULL ? f->as.scope.own->errors : NULL;
    if (last == NULL) return &orchi_no_element;
    const orch_future *at = last->waiter.one.target;
    for (; i > 0 && at != last; i--) at = at->waiter.one.target;
    return i == 0 ? &at->as.result : &orchi_no_element;
}

/* Rounded down: a call that is given what is left must not come back after the deadline. */
uint64_t orch_time_left(void) {
    const orch_task *task = orch_self();
    if (task == NULL) return ORCH_NO_DEADLINE;
    if (orchi_must_end(task)) return 0;
    const orch_future *nearest = orchi_nearest(orchi_loop, task);
    if (nearest == NULL) return ORCH_NO_DEADLINE;
    return orchi_timer_left(orchi_loop, nearest, orchi_now(orchi_loop)) / 1000000u;
}

// ------------------------------------------------------------------------------------------------
// >>io
//
// A descriptor's readiness as a future. The table of watches, by descriptor, holds at most one
// waiter for each direction; a future that settles or is cancelled has left it.

// The life of a wait for a descriptor:
//
//     orch_ready     a slot, and its place in the table: reader, writer or both; the poller is told
//                    what the descriptor is waited for in all
//     the look       the poller passes the descriptor and its events to orchi_fd_ready, which finds
//                    the waiters in the table
//     fire           takes the wait out of the table and the poller, and settles it: one event, one
//                    settling. A descriptor that stays ready is reported again to who asks again
//     cancel         the same without an event; what it leaves is as if it had never been
//
// A task that makes a call waits the same way, with its own future in the table instead of a new
// one: the event queues it, see orchi_task_tell. That saves a slot, and with a thousand connections
// a cache line that would be waited for.
//
// The table is indexed by number, as poll's array is of numbers, and a process has few of them.

/* Makes room for a descriptor. One that is not open is refused before the table grows to its
 * number. */
static int orchi_watch_reserve(orch_loop *loop, int fd) {
    orchi_poller *p = &loop->poller;
    size_t wanted = (size_t)fd + 1;
    if (wanted <= p->watch_count) return 0;
    if (fcntl(fd, F_GETFD) < 0) return -errno;
    size_t count = p->watch_count > 0 ? p->watch_count : 64;
    while (count < wanted) count *= 2;
    size_t old_bytes = p->watch_count * sizeof *p->watches, bytes = count * sizeof *p->watches;
    void *grown = orchi_resize(loop, p->watches, old_bytes, bytes);
    if (grown == NULL) return ORCH_ENOMEM;
    memset((char *)grown + old_bytes, 0, bytes - old_bytes);
    p->watches = (orchi_watch *)grown;
    p->watch_count = count;
    return 0;
}

/* At most one waiter in each direction: a second one would steal the first one's event. */
static int orchi_watch_start(orch_loop *loop, orch_future *f) {
    int fd = f->as.ready.fd, events = f->as.ready.events;
    orchi_watch *watch = &loop->poller.watches[fd];
    if ((events & ORCH_READABLE) && watch->reader != NULL) return ORCH_EBUSY;
    if ((events & ORCH_WRITABLE) && watch->writer != NULL) return ORCH_EBUSY;
    if (events & ORCH_READABLE) watch->reader = f;
    if (events & ORCH_WRITABLE) watch->writer = f;
    loop->stats.watched++;
    int error = loop->poller.ops->update(loop, fd, false);
    if (error != 0) orchi_unwatch(loop, f, true);
    return error;
}

/* What can be told before anything is registered. */
static int orchi_ready_error(int fd, int events) {
    if (orchi_loop == NULL) return orchi_misuse("orch_ready", ORCH_ENOLOOP);
    bool known = (events & ~(ORCH_READABLE | ORCH_WRITABLE)) == 0;
    if (events == 0 || !known) return orchi_misuse("orch_ready", ORCH_EINVAL);
    return fd < 0 ? -EBADF : orchi_watch_reserve(orchi_loop, fd);
}

orch_future *orch_ready(int fd, int events) {
    int error = orchi_ready_error(fd, events);
    if (error == ORCH_ENOLOOP) return orchi_rejected(error);
    orch_loop *loop = orchi_loop;
    if (error != 0) return orch_settled(orch_fail(error));
    orch_future *f = orchi_slot_new(loop, ORCHI_READY);
    if (f == NULL) return orchi_rejected(ORCH_ENOMEM);
    f->as.ready.fd = fd;
    f->as.ready.events = events;
    error = orchi_watch_start(loop, f);
    orch_result r = error == ORCHI_ALWAYS ? orch_ok_int(events) : orch_fail(error);
    if (error != 0) orchi_settle(loop, f, &r);
    return f;
}

/* One event settles it and takes it out of the poller: nobody is woken for what nobody waits for.
 */
static void orchi_ready_fire(orch_future *f, int events) {
    orch_loop *loop = orchi_loop_of(f);
    int came = events & f->as.ready.events;
    orchi_unwatch(loop, f, false);
    orch_result r = events & ORCHI_BAD_FD ? orch_fail(-EBADF) : orch_ok_int(came);
    orchi_settle_inline(loop, f, &r);
}

/* Tells a waiter that there will be no event. */
static void orchi_watch_lose(orch_loop *loop, orch_future *f, int error) {
    if (f->kind == ORCHI_TASK) {
        orchi_task_tell(loop, f, error, true);
        return;
    }
    f->flags |= ORCHI_CANCEL; // not reported
    orchi_unwatch(loop, f, true);
    orchi_reject(loop, f, error);
}

/* Leaves the poller at once, so that the descriptor can be closed. */
static orch_future *orchi_ready_cancel(orch_future *f, int reason) {
    (void)reason;
    orchi_watch_lose(orchi_loop_of(f), f, ORCH_ECANCELED);
    return NULL;
}

/* A number loses its owner: who waits for it is told, and nothing of it is left. */
static void orchi_watch_end(orch_loop *loop, int fd, int error) {
    if (fd < 0 || (size_t)fd >= loop->poller.watch_count) return;
    orchi_watch *watch = &loop->poller.watches[fd];
    orch_future *waiting[2] = {watch->reader,
                               watch->reader == watch->writer ? NULL : watch->writer};
    for (int i = 0; i < 2; i++) {
        if (waiting[i] != NULL) orchi_watch_lose(loop, waiting[i], error);
    }
    watch->generation++;
    watch->hints = 0;
    loop->poller.ops->update(loop, fd, true);
}

/* What the library makes itself: it will be closed by orch_close, so that the poller may look for
 * it as long as it is open. Whoever still waits for the number closed its last owner without. */
static inline int orchi_watch_own(orch_loop *loop, int fd) {
    int error = orchi_watch_reserve(loop, fd);
    if (error != 0) return error;
    orchi_watch_end(loop, fd, -EBADF);
    loop->poller.watches[fd].hints = ORCHI_OWN;
    return 0;
}

/* What is armed for one event is armed anew, to stay. */
int orch_adopt(int fd) {
    orch_loop *loop = orchi_loop;
    if (loop == NULL) return orchi_misuse("orch_adopt", ORCH_ENOLOOP);
    int error = fd < 0 ? -EBADF : orchi_watch_reserve(loop, fd);
    if (error != 0) return error;
    orchi_watch *watch = &loop->poller.watches[fd];
    watch->hints |= ORCHI_OWN;
    watch->armed &= ORCHI_REGISTERED;
    return loop->poller.ops->update(loop, fd, false);
}

/* After EINTR the descriptor is gone on every system here; calling again would close another's. */
int orch_close(int fd) {
    if (orchi_loop != NULL) orchi_watch_end(orchi_loop, fd, ORCH_ECANCELED);
    return close(fd) == 0 || errno == EINTR ? 0 : -errno;
}

/* A descriptor that wakes the loop from its sleep, until it is closed with orch_close: whenever it
 * is readable, loop->on_wake is called, after the look and outside the poller. It is nobody's wait:
 * with nothing else to wait for the loop ends, or is deadlocked. */
static inline int orchi_wake_watch(orch_loop *loop, int fd) {
    int error = orchi_watch_own(loop, fd);
    if (error != 0) return error;
    loop->poller.watches[fd].hints |= ORCHI_WAKE;
    error = loop->poller.ops->update(loop, fd, false);
    if (error != 0) loop->poller.watches[fd].hints = 0;
    return error;
}

// ---- calls
//
// A call of a task is an attempt: a function that makes the system call and returns what came of
// it, or -EAGAIN for as long as it has to wait. orchi_io tries, and waits in between. What the last
// attempt saw is kept in the watch of the descriptor:
//
//     a read that came short    the next one waits first, as it would only be told EAGAIN
//     a short write             the same for writes
//
// So a request costs one recv and one send. Waiting first is always right, since readiness is
// level-triggered. And whoever comes back from a wait makes its own call and those of the tasks
// that were told with it and come next: sixteen times recv and then sixteen times send, each of
// which finds the kernel's code in the cache, and meanwhile what the next task needs is fetched.
// A call that had to wait holds its direction of the descriptor until it returns:
// a second writer would put its bytes between those of the first.
// Left out: the number of bytes that were moved before an error. A protocol cannot go on after a
// write that was cut; after a read, orch_read says it byte by byte.

#ifdef MSG_NOSIGNAL
#define ORCHI_NOSIGNAL MSG_NOSIGNAL
#else
#define ORCHI_NOSIGNAL 0
#endif

#if ORCHI_OS_MACOS
/* Where send knows no MSG_NOSIGNAL the socket is told, once. */
static void orchi_quiet(int fd, orchi_watch *watch) {
    int on = 1;
    if (watch->hints & ORCHI_QUIET) return;
    setsockopt(fd, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
    watch->hints |= ORCHI_QUIET;
}
#else
static inline void orchi_quiet(int fd, const orchi_watch *watch) {
    (void)fd;
    (void)watch;
}
#endif

typedef struct orchi_transfer { // what an attempt works on
    char *data;
    size_t size, done; // bytes
    int flags;
    int count; // of parts
    const struct iovec *parts;
    orch_address *address;
} orchi_transfer;

typedef ptrdiff_t (*orchi_attempt)(int fd, orchi_watch *watch, orchi_transfer *t);

/* What makes a caller's memory unusable. */
static bool orchi_no_memory_at(const void *data, size_t size) {
    return (data == NULL && size > 0) || size > PTRDIFF_MAX;
}

/* Leaves the task until an event has come for it. Meanwhile the direction is taken. Whoever comes
 * back to a number that was closed in between must not touch its next owner. */
static int orchi_watch_suspend(orch_loop *loop, orch_task *task, int fd, int direction) {
    orchi_watch *watch = &loop->poller.watches[fd];
    uint16_t generation = watch->generation;
    uint16_t busy = (uint16_t)(direction * ORCHI_IN_READ);
    watch->hints |= busy;
    orchi_suspend(loop, task);
    int outcome = task->future->as.task.events;
    task->future->as.task.events = 0;
    watch = &loop->poller.watches[fd]; // the table may have moved
    if (ORCHI_UNLIKELY(watch->generation != generation)) return ORCH_ECANCELED;
    watch->hints &= (uint16_t)~busy;
    return outcome == ORCHI_TOLD ? 0 : outcome;
}

/* What no poller can watch, a file for instance, is always ready, but not for one task alone. */
static int orchi_watch_always(orch_loop *loop, orch_task *task, int fd) {
    uint16_t generation = loop->poller.watches[fd].generation;
    orchi_no_wait(loop, task);
    return loop->poller.watches[fd].generation == generation ? 0 : ORCH_ECANCELED;
}

/* Waits for one direction. The task's own future stands in the table. */
static int orchi_watch_wait(orch_loop *loop, orch_task *task, int fd, int direction) {
    orch_future *f = task->future;
    if (orchi_must_end(task)) return orchi_refuse(loop, task);
    f->as.task.fd = fd;
    f->as.task.events = direction;
    f->as.task.since = loop->generation;
    loop->generation += 2;
    int error = orchi_watch_start(loop, f);
    if (ORCHI_LIKELY(error == 0)) return orchi_watch_suspend(loop, task, fd, direction);
    f->as.task.events = 0;
    return error == ORCHI_ALWAYS ? orchi_watch_always(loop, task, fd) : error;
}

// A call that a task waits to make, on its stack.
typedef struct orchi_io_call {
    orchi_attempt attempt;
    orchi_transfer *t;
    ptrdiff_t n; // what came of it, or ORCHI_UNTRIED
    int fd;
    uint16_t generation;
} orchi_io_call;

enum { ORCHI_UNTRIED = INT_MIN, ORCHI_AHEAD = 15 };

/* Whether a ready task has been told that its call can be made. Not when it was cancelled, or the
 * number has a new owner. */
static bool orchi_io_due(const orch_loop *loop, const orch_future *f) {
    if (f->kind != ORCHI_TASK || f->as.task.events != ORCHI_TOLD) return false;
    const orchi_io_call *call = f->as.task.task->call;
    return call != NULL && call->n == ORCHI_UNTRIED &&
           loop->poller.watches[call->fd].generation == call->generation;
}

static void orchi_io_try(orch_loop *loop, orchi_io_call *call) {
    call->n = call->attempt(call->fd, &loop->poller.watches[call->fd], call->t);
}

/* Makes the calls of the tasks that come next as well. What has come is theirs, whatever becomes of
 * them or of the descriptor until their turn. */
static void orchi_io_ahead(orch_loop *loop) {
    const orchi_ring *ring = &loop->ready;
    uint32_t most = ring->tail - ring->head;
    if (most > ORCHI_AHEAD) most = ORCHI_AHEAD;
    for (uint32_t i = ring->head; i != ring->head + most; i++) {
        const orch_future *f = ring->items[i & ring->mask];
        if (!orchi_io_due(loop, f)) continue;
        orchi_fetch_ahead(loop, i + 1);
        orchi_io_try(loop, f->as.task.task->call);
    }
}

/* Tries until it need not wait any more. Who was cancelled tries once, unless that could block: a
 * hint may be old. */
ORCHI_NO_INLINE static ptrdiff_t orchi_io_wait(orch_task *task, int fd, int direction,
                                               orchi_attempt attempt, orchi_transfer *t) {
    orch_loop *loop = orchi_loop;
    orchi_watch *watch = &loop->poller.watches[fd];
    orchi_io_call call = {attempt, t, -EAGAIN, fd, watch->generation};
    if (orchi_must_end(task) && !(watch->hints & ORCHI_SLOW)) orchi_io_try(loop, &call);
    while (call.n == -EAGAIN) {
        call.n = ORCHI_UNTRIED;
        task->call = &call;
        int error = orchi_watch_wait(loop, task, fd, direction);
        task->call = NULL;
        bool done = call.n != ORCHI_UNTRIED && call.n != -EAGAIN; // by another task, ahead
        if (error != 0 && !done) return error;
        if (call.n != ORCHI_UNTRIED) continue;
        orchi_fetch_ahead(loop, loop->ready.head);
        orchi_io_try(loop, &call);
        orchi_io_ahead(loop);
    }
    return call.n;
}

/* What every call does. The caller has looked at its own arguments. Inlined where a request comes
 * by, so that the attempt is. */
static ORCHI_INLINE ptrdiff_t orchi_io(const char *function, int fd, int direction,
                                       orchi_attempt attempt, orchi_transfer *t) {
    int error;
    orch_task *task = orchi_here_task(function, &error);
    if (task == NULL) return error;
    orch_loop *loop = orchi_loop;
    if (ORCHI_UNLIKELY((size_t)fd >= loop->poller.watch_count)) { // negative ones too
        error = fd < 0 ? -EBADF : orchi_watch_reserve(loop, fd);
        if (error != 0) return error;
    }
    orchi_watch *watch = &loop->poller.watches[fd];
    int busy = direction * ORCHI_IN_READ, wait_first = direction * ORCHI_DRY | ORCHI_SLOW;
    if (ORCHI_UNLIKELY(watch->hints & busy)) return ORCH_EBUSY;
    ptrdiff_t n = watch->hints & wait_first ? -EAGAIN : attempt(fd, watch, t);
    if (n == -EAGAIN) return orchi_io_wait(task, fd, direction, attempt, t);
    orchi_no_wait(loop, task);
    return n;
}

/* A call that has nothing to do. recv(2) of no bytes may wait for some. */
static ptrdiff_t orchi_io_nothing(const char *function, int fd) {
    int error;
    if (orchi_here_task(function, &error) == NULL) return error;
    return fd < 0 ? -EBADF : 0;
}

/* The same with the check of memory that most calls need. */
static ORCHI_INLINE ptrdiff_t orchi_io_memory(const char *function, int fd, int direction,
                                              orchi_attempt attempt, orchi_transfer *t) {
    if (orchi_no_memory_at(t->data, t->size)) return orchi_misuse(function, ORCH_EINVAL);
    return orchi_io(function, fd, direction, attempt, t);
}

/* A hint saves a call that would say EAGAIN. A wrong one costs a wait that ends at once. */
static void orchi_watch_hint(orchi_watch *watch, int bit, bool set) {
    watch->hints = (uint16_t)(set ? watch->hints | bit : watch->hints & ~bit);
}

// ---- descriptors that are no sockets
//
// All are taken for sockets until a call says ENOTSOCK: recv and send need not know whether the
// descriptor is non-blocking, and send raises no signal. What is none is remembered in the watch.

/* A terminal or an inherited pipe may be blocking, and others share that setting: it is left alone,
 * and each piece is waited for. A write of PIPE_BUF bytes to what is writable does not block. */
static void orchi_watch_classify(int fd, orchi_watch *watch) {
    struct stat about;
    int flags = fcntl(fd, F_GETFL);
    bool known = fstat(fd, &about) == 0;
    bool waits = !known || (!S_ISREG(about.st_mode) && !S_ISBLK(about.st_mode));
    watch->hints |= ORCHI_NO_SOCKET;
    if (waits && flags >= 0 && !(flags & O_NONBLOCK)) watch->hints |= ORCHI_SLOW;
}

/* Whether an attempt goes on with read or write. A blocking descriptor waits first: *error. */
static bool orchi_no_socket(int fd, orchi_watch *watch, ptrdiff_t *error) {
    if (*error != -ENOTSOCK) return false;
    orchi_watch_classify(fd, watch);
    if (watch->hints & ORCHI_SLOW) *error = -EAGAIN;
    return !(watch->hints & ORCHI_SLOW);
}

typedef struct orchi_sigpipe {
    sigset_t before;
    bool held;    // the signal was blocked before
    bool pending; // and had come already
} orchi_sigpipe;

/* A write to a pipe without a reader raises SIGPIPE in the thread that writes. It is blocked around
 * the call and taken back: two short system calls, for all that is no socket, since a number that
 * was a file's may be a pipe's by now. Left out: ignoring the signal, which would change it for the
 * whole process and all it starts. */
static void orchi_sigpipe_begin(orchi_sigpipe *s) {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &set, &s->before);
    s->held = sigismember(&s->before, SIGPIPE) == 1;
    s->pending = s->held && sigpending(&set) == 0 && sigismember(&set, SIGPIPE) == 1;
}

/* Takes the signal that the write has raised, but not one that was there before. */
static void orchi_sigpipe_end(const orchi_sigpipe *s, bool broken) {
    sigset_t set;
    int number;
    if (broken && !s->pending && sigpending(&set) == 0 && sigismember(&set, SIGPIPE) == 1) {
        sigemptyset(&set);
        sigaddset(&set, SIGPIPE);
        sigwait(&set, &number);
    }
    if (!s->held) pthread_sigmask(SIG_SETMASK, &s->before, NULL);
}

/* writev for what is no socket. */
static ptrdiff_t orchi_write_parts(int fd, const struct iovec *parts, int count) {
    orchi_sigpipe s;
    ptrdiff_t n;
    orchi_sigpipe_begin(&s);
    do n = writev(fd, parts, count);
    while (n < 0 && errno == EINTR);
    if (n < 0) n = -errno;
    orchi_sigpipe_end(&s, n == -EPIPE);
    return n;
}

// ---- reading

static ORCHI_INLINE ptrdiff_t orchi_attempt_recv(int fd, orchi_watch *watch, orchi_transfer *t) {
    ptrdiff_t n;
    do n = recv(fd, t->data, t->size, t->flags | MSG_DONTWAIT);
    while (ORCHI_UNLIKELY(n < 0 && errno == EINTR));
    if (ORCHI_UNLIKELY(n < 0)) return -errno;
    // A short stream has no more just now; a datagram says nothing about the next one.
    if ((size_t)n < t->size && !(watch->hints & ORCHI_DATAGRAMS)) watch->hints |= ORCHI_DRY;
    return n;
}

/* As a socket, which most are. What is none says so once, and is read with read from then on. */
static ptrdiff_t orchi_attempt_read(int fd, orchi_watch *watch, orchi_transfer *t) {
    ptrdiff_t n = -ENOTSOCK;
    if (!(watch->hints & ORCHI_NO_SOCKET)) {
        n = orchi_attempt_recv(fd, watch, t);
        if (ORCHI_LIKELY(!orchi_no_socket(fd, watch, &n))) return n;
    }
    do n = read(fd, t->data, t->size);
    while (n < 0 && errno == EINTR);
    if (n < 0) return -errno;
    orchi_watch_hint(watch, ORCHI_DRY, (size_t)n < t->size);
    return n;
}

/* Goes on while there is more. `done` is kept from one attempt to the next. */
static ptrdiff_t orchi_attempt_read_full(int fd, orchi_watch *watch, orchi_transfer *t) {
    orchi_transfer rest = *t;
    while (t->done < t->size) {
        rest.data = t->data + t->done;
        rest.size = t->size - t->done;
        ptrdiff_t n = orchi_attempt_read(fd, watch, &rest);
        if (n < 0) return n;
        if (n == 0) break;
        t->done += (size_t)n;
        if (t->done < t->size && (watch->hints & (ORCHI_DRY | ORCHI_SLOW))) return -EAGAIN;
    }
    return (ptrdiff_t)t->done;
}

/* The parts are filled once: no attempt goes on where another has stopped. */
static ptrdiff_t orchi_attempt_readv(int fd, orchi_watch *watch, orchi_transfer *t) {
    struct msghdr message;
    ptrdiff_t n = -ENOTSOCK;
    memset(&message, 0, sizeof message);
    message.msg_iov = (struct iovec *)(uintptr_t)t->parts;
    message.msg_iovlen = (size_t)t->count;
    if (!(watch->hints & ORCHI_NO_SOCKET)) {
        do n = recvmsg(fd, &message, MSG_DONTWAIT);
        while (n < 0 && errno == EINTR);
        if (n < 0) n = -errno;
    }
    if (n == -ENOTSOCK && ((watch->hints & ORCHI_NO_SOCKET) || orchi_no_socket(fd, watch, &n))) {
        do n = readv(fd, t->parts, t->count);
        while (n < 0 && errno == EINTR);
        if (n < 0) n = -errno;
    }
    if (n >= 0) orchi_watch_hint(watch, ORCHI_DRY, (size_t)n < t->size);
    return n;
}

// The public calls fill in a transfer and name the attempt; whether, when and for whom to wait is
// orchi_io's. A transfer lies on the caller's stack: what is left to do outlives a wait there, and
// costs no memory.

ptrdiff_t orch_read(int fd, void *buffer, size_t size) {
    orchi_transfer t = {(char *)buffer, size, 0, 0, 0, NULL, NULL};
    if (size == 0) return orchi_io_nothing("orch_read", fd);
    return orchi_io_memory("orch_read", fd, ORCH_READABLE, orchi_attempt_read, &t);
}

ptrdiff_t orch_read_full(int fd, void *buffer, size_t size) {
    orchi_transfer t = {(char *)buffer, size, 0, 0, 0, NULL, NULL};
    if (size == 0) return orchi_io_nothing("orch_read_full", fd);
    return orchi_io_memory("orch_read_full", fd, ORCH_READABLE, orchi_attempt_read_full, &t);
}

/* The bytes of all parts, or a misuse. */
static ptrdiff_t orchi_parts_size(const char *function, const struct iovec *parts, int count) {
    size_t size = 0;
    bool bad = count < 0 || (parts == NULL && count > 0);
    for (int i = 0; !bad && i < count; i++) {
        bad = orchi_no_memory_at(parts[i].iov_base, parts[i].iov_len) ||
              parts[i].iov_len > PTRDIFF_MAX - size;
        size += parts[i].iov_len;
    }
    return bad ? orchi_misuse(function, ORCH_EINVAL) : (ptrdiff_t)size;
}

ptrdiff_t orch_readv(int fd, const struct iovec *parts, int count) {
    ptrdiff_t size = orchi_parts_size("orch_readv", parts, count);
    if (size <= 0) return size < 0 ? size : orchi_io_nothing("orch_readv", fd);
    orchi_transfer t = {NULL, (size_t)size, 0, 0, count, parts, NULL};
    return orchi_io("orch_readv", fd, ORCH_READABLE, orchi_attempt_readv, &t);
}

// ---- writing

/* A stream takes as much as it has room for: then it is full, and the rest waits. */
static ptrdiff_t orchi_wrote(orchi_watch *watch, orchi_transfer *t, ptrdiff_t n) {
    if (n < 0) return n;
    t->done += (size_t)n;
    orchi_watch_hint(watch, ORCHI_FULL, t->done < t->size);
    return t->done < t->size ? -EAGAIN : (ptrdiff_t)t->done;
}

/* What is not written yet. Nothing may have no address, which cannot be counted from. */
static inline char *orchi_transfer_rest(const orchi_transfer *t) {
    return t->done > 0 ? t->data + t->done : t->data;
}

static ORCHI_INLINE ptrdiff_t orchi_attempt_send(int fd, orchi_watch *watch, orchi_transfer *t) {
    ptrdiff_t n;
    orchi_quiet(fd, watch);
    char *rest = orchi_transfer_rest(t);
    do n = send(fd, rest, t->size - t->done, t->flags | MSG_DONTWAIT | ORCHI_NOSIGNAL);
    while (ORCHI_UNLIKELY(n < 0 && errno == EINTR));
    if (ORCHI_UNLIKELY(n < 0)) return -errno;
    return orchi_wrote(watch, t, n);
}

static ORCHI_INLINE ptrdiff_t orchi_attempt_write(int fd, orchi_watch *watch, orchi_transfer *t) {
    ptrdiff_t n = -ENOTSOCK;
    if (!(watch->hints & ORCHI_NO_SOCKET)) {
        n = orchi_attempt_send(fd, watch, t);
        if (ORCHI_LIKELY(!orchi_no_socket(fd, watch, &n))) return n;
    }
    struct iovec part = {orchi_transfer_rest(t), t->size - t->done};
    if ((watch->hints & ORCHI_SLOW) && part.iov_len > PIPE_BUF) part.iov_len = PIPE_BUF;
    return orchi_wrote(watch, t, orchi_write_parts(fd, &part, 1));
}

enum { ORCHI_PARTS = 32, ORCHI_PARTS_MOST = 1024 }; // the latter: what the systems here take

/* The next parts that are not written yet, from byte `done` on, at most ORCHI_PARTS and `most`
 * bytes. */
static int orchi_parts_left(const orchi_transfer *t, size_t most, struct iovec *left) {
    size_t skip = t->done;
    int count = 0;
    for (int i = 0; i < t->count && count < ORCHI_PARTS && most > 0; i++) {
        size_t size = t->parts[i].iov_len;
        size_t take = size > skip ? size - skip : 0;
        if (take > most) take = most;
        if (take > 0) {
            left[count].iov_base = (char *)t->parts[i].iov_base + skip;
            left[count++].iov_len = take;
        }
        skip = skip > size ? skip - size : 0;
        most -= take;
    }
    return count;
}

static ptrdiff_t orchi_send_parts(int fd, orchi_watch *watch, struct iovec *parts, int count) {
    struct msghdr message;
    ptrdiff_t n;
    memset(&message, 0, sizeof message);
    message.msg_iov = parts;
    message.msg_iovlen = (size_t)count;
    orchi_quiet(fd, watch);
    do n = sendmsg(fd, &message, MSG_DONTWAIT | ORCHI_NOSIGNAL);
    while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

/* One call for some parts, whatever the descriptor is. */
static ptrdiff_t orchi_put_parts(int fd, orchi_watch *watch, const struct iovec *parts, int count) {
    ptrdiff_t n = -ENOTSOCK;
    if (!(watch->hints & ORCHI_NO_SOCKET)) {
        n = orchi_send_parts(fd, watch, (struct iovec *)(uintptr_t)parts, count);
        if (!orchi_no_socket(fd, watch, &n)) return n;
    }
    return orchi_write_parts(fd, parts, count);
}

/* All at once where that can be, as a datagram's parts have to stay together. What is left goes in
 * several calls: only one that comes short ends the attempt. */
static ptrdiff_t orchi_attempt_writev(int fd, orchi_watch *watch, orchi_transfer *t) {
    struct iovec left[ORCHI_PARTS];
    ptrdiff_t n;
    do {
        bool slow = (watch->hints & ORCHI_SLOW) != 0,
             all = !slow && t->done == 0 && t->count <= ORCHI_PARTS_MOST;
        int count = all ? t->count : orchi_parts_left(t, slow ? PIPE_BUF : SIZE_MAX, left);
        size_t size = 0;
        const struct iovec *parts = all ? t->parts : left;
        for (int i = 0; i < count; i++) size += parts[i].iov_len;
        n = orchi_put_parts(fd, watch, parts, count);
        bool whole = n >= 0 && (size_t)n == size && !(watch->hints & ORCHI_SLOW);
        n = orchi_wrote(watch, t, n);
        if (!whole) break;
    } while (n == -EAGAIN);
    return n;
}

ptrdiff_t orch_write(int fd, const void *data, size_t size) {
    orchi_transfer t = {(char *)(uintptr_t)data, size, 0, 0, 0, NULL, NULL};
    return orchi_io_memory("orch_write", fd, ORCH_WRITABLE, orchi_attempt_write, &t);
}

ptrdiff_t orch_writev(int fd, const struct iovec *parts, int count) {
    ptrdiff_t size = orchi_parts_size("orch_writev", parts, count);
    if (size < 0) return size;
    orchi_transfer t = {NULL, (size_t)size, 0, 0, count, parts, NULL};
    return orchi_io("orch_writev", fd, ORCH_WRITABLE, orchi_attempt_writev, &t);
}

// ---- making descriptors

int orch_nonblock(int fd) {
    int flags = fcntl(fd, F_GETFL);
    if (flags < 0) return -errno;
    if (flags & O_NONBLOCK) return 0;
    return fcntl(fd, F_SETFL, flags | O_NONBLOCK) < 0 ? -errno : 0;
}

/* A descriptor that was just made: what was known of its number is forgotten. */
static int orchi_adopt(int fd, uint16_t hints) {
    orch_loop *loop = orchi_loop;
    if (fd >= 0 && loop != NULL && orchi_watch_own(loop, fd) == 0) {
        loop->poller.watches[fd].hints |= hints;
    }
    return fd;
}

#if !ORCHI_MAKES_PRIVATE
/* Non-blocking and close-on-exec, where no call makes descriptors so. */
static int orchi_private(int fd) {
    if (fd < 0) return fd;
    fcntl(fd, F_SETFD, FD_CLOEXEC);
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    return fd;
}
static int orchi_pipe2(int fds[2]) {
    if (pipe(fds) < 0) return -errno;
    orchi_private(fds[0]);
    orchi_private(fds[1]);
    return 0;
}
static int orchi_socketpair2(int fds[2]) {
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0) return -errno;
    orchi_private(fds[0]);
    orchi_private(fds[1]);
    return 0;
}
#else
static int orchi_pipe2(int fds[2]) { return pipe2(fds, O_NONBLOCK | O_CLOEXEC) < 0 ? -errno : 0; }
static int orchi_socketpair2(int fds[2]) {
    int type = SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC;
    return socketpair(AF_UNIX, type, 0, fds) < 0 ? -errno : 0;
}
#endif

/* Both, or neither: what makes them leaves nothing behind when it fails. */
static int orchi_two(const char *function, int fds[2], int (*make)(int fds[2]), uint16_t hints) {
    int made[2];
    if (fds == NULL) return orchi_misuse(function, ORCH_EINVAL);
    int error = make(made);
    if (error != 0) return error;
    fds[0] = orchi_adopt(made[0], hints);
    fds[1] = orchi_adopt(made[1], hints);
    return 0;
}

int orch_pipe(int fds[2]) { return orchi_two("orch_pipe", fds, orchi_pipe2, ORCHI_NO_SOCKET); }

int orch_socketpair(int fds[2]) { return orchi_two("orch_socketpair", fds, orchi_socketpair2, 0); }

// ---- lines
//
// The buffer, with two lines taken and one begun:
//
//     | first line \n second \0 | third li |            |
//     0                         start   end         capacity
//
// A line's end is overwritten with the zero. The buffer grows up to the limit; what was taken makes
// room when the next read needs it, so that no byte is moved for a line that is there already.

// The order of checks, on what is in the buffer: a newline ends a line, also one that was skipped;
// without one, more than the limit and a "\r" is too long; at the end of the stream the rest is a
// line; else more is read. `seen` keeps a long line from being searched again after each read, so
// that finding lines is linear however small the reads are.

struct orch_reader {
    orch_loop *loop;
    char *buffer;
    size_t start, end, capacity;
    size_t seen; // bytes from start that have no newline
    size_t limit;
    int fd;
    int error;     // could not be made
    bool skipping; // the rest of a line that was too long
    bool ended;    // the descriptor has
    bool busy, freed;
};

enum { ORCHI_LINE_LIMIT = 65536, ORCHI_LINE_FIRST = 1024 };

static orch_reader orchi_reader_failed = {NULL, NULL,        0,     0,     0,     0,    0,
                                          -1,   ORCH_ENOMEM, false, false, false, false};

orch_reader *orch_reader_new(int fd, size_t limit) {
    orch_loop *loop = orchi_loop;
    if (loop == NULL) orchi_misuse("orch_reader_new", ORCH_ENOLOOP);
    void *memory = loop != NULL ? orchi_allocate(loop, sizeof(orch_reader)) : NULL;
    orch_reader *r = (orch_reader *)memory;
    if (r == NULL) return &orchi_reader_failed;
    memset(r, 0, sizeof *r);
    r->loop = loop;
    r->fd = fd;
    r->limit = limit == 0 ? (size_t)ORCHI_LINE_LIMIT : limit < SIZE_MAX / 4 ? limit : SIZE_MAX / 4;
    return r;
}

/* Room for at least one more byte, and for the zero behind it. */
static int orchi_reader_room(orch_reader *r) {
    if (r->start > 0) {
        memmove(r->buffer, r->buffer + r->start, r->end - r->start);
        r->end -= r->start;
        r->start = 0;
    }
    if (r->end + 1 < r->capacity) return 0;
    size_t most = r->limit + 3,
           wanted = r->capacity > 0 ? r->capacity * 2 : (size_t)ORCHI_LINE_FIRST;
    if (wanted > most) wanted = most;
    void *grown = orchi_resize(r->loop, r->buffer, r->capacity, wanted);
    if (grown == NULL) return ORCH_ENOMEM;
    r->buffer = (char *)grown;
    r->capacity = wanted;
    return 0;
}

/* Reads on. Returns 0, also at the end. */
static int orchi_reader_fill(orch_reader *r) {
    int error = orchi_reader_room(r);
    if (error != 0) return error;
    ptrdiff_t n = orch_read(r->fd, r->buffer + r->end, r->capacity - 1 - r->end);
    if (n < 0) return (int)n;
    r->ended = n == 0;
    r->end += (size_t)n;
    return 0;
}

/* Takes `size` bytes and the line's end of `extra` bytes out of the buffer. */
static ptrdiff_t orchi_reader_take(orch_reader *r, size_t size, size_t extra, const char **line) {
    char *text = r->buffer + r->start;
    if (extra > 0 && size > 0 && text[size - 1] == '\r') size--, extra++;
    r->start += size + extra;
    r->seen = 0;
    text[size] = '\0';
    *line = text;
    return (ptrdiff_t)size;
}

/* A line above the limit: shows its first bytes. What was read of it is given up, and the rest will
 * be, unless its end is here. */
static ptrdiff_t orchi_reader_too_long(orch_reader *r, size_t size, bool whole, const char **line) {
    char *text = r->buffer + r->start;
    text[r->limit] = '\0';
    *line = text;
    r->start += size;
    r->seen = 0;
    r->skipping = !whole;
    return -EMSGSIZE;
}

/* A line whose end is in the buffer, `size` bytes from the start. Its "\r" does not count. */
static ptrdiff_t orchi_reader_whole(orch_reader *r, size_t size, const char **line) {
    const char *text = r->buffer + r->start;
    size_t length = size > 0 && text[size - 1] == '\r' ? size - 1 : size;
    if (length > r->limit) return orchi_reader_too_long(r, size + 1, true, line);
    return orchi_reader_take(r, size, 1, line);
}

/* What is left at the end of the stream. */
static ptrdiff_t orchi_reader_last(orch_reader *r, size_t size, const char **line) {
    if (size == 0) return ORCH_EEND;
    if (size > r->limit) return orchi_reader_too_long(r, size, true, line);
    return orchi_reader_take(r, size, 0, line);
}

/* Gives up the rest of a line that was too long, as far as it is here. */
static void orchi_reader_skip(orch_reader *r, const char *newline) {
    r->start = newline != NULL ? (size_t)(newline - r->buffer) + 1 : r->end;
    r->skipping = newline == NULL;
    r->seen = 0;
}

/* A line that is skipped may have no end, and come so fast that there is no wait to be refused. */
static ptrdiff_t orchi_reader_line(orch_reader *r, const char **line) {
    for (int skips = 0;;) {
        size_t have = r->end - r->start; // nothing: there may be no buffer yet
        const char *text = have > 0 ? r->buffer + r->start : NULL, *newline = NULL;
        if (have > r->seen) {
            newline = (const char *)memchr(text + r->seen, '\n', have - r->seen);
        }
        if (r->skipping && have > 0) {
            orchi_reader_skip(r, newline);
            if (skips++ > ORCHI_BUDGET && orchi_must_end(r->loop->current)) return ORCH_ECANCELED;
            continue;
        }
        if (newline != NULL) return orchi_reader_whole(r, (size_t)(newline - text), line);
        r->seen = have;
        if (have > r->limit + 1) return orchi_reader_too_long(r, have, false, line);
        if (r->ended) return orchi_reader_last(r, have, line);
        int error = orchi_reader_fill(r);
        if (error != 0) return error;
    }
}

static void orchi_reader_dispose(orch_reader *r) {
    orchi_free(r->loop, r->buffer, r->capacity);
    orchi_free(r->loop, r, sizeof *r);
}

/* One call at a time: it may wait while it fills the buffer. */
static int orchi_reader_enter(orch_reader *r, const char *function) {
    int error;
    if (orchi_here_task(function, &error) == NULL) return error;
    if (r == NULL) return orchi_misuse(function, ORCH_EINVAL);
    if (r->error != 0) return r->error;
    if (r->loop != orchi_loop) return orchi_misuse(function, ORCH_ETHREAD);
    if (r->busy) return ORCH_EBUSY;
    r->busy = true;
    return 0;
}

/* It may have been freed meanwhile. */
static ptrdiff_t orchi_reader_leave(orch_reader *r, ptrdiff_t n) {
    r->busy = false;
    if (!r->freed) return n;
    orchi_reader_dispose(r);
    return ORCH_ECLOSED;
}

/* *line is good until the next call, and an empty text with every error but -EMSGSIZE. */
ptrdiff_t orch_reader_line(orch_reader *r, const char **line) {
    static const char nothing[] = "";
    if (line == NULL) return orchi_misuse("orch_reader_line", ORCH_EINVAL);
    *line = nothing;
    int error = orchi_reader_enter(r, "orch_reader_line");
    if (error != 0) return error;
    ptrdiff_t n = orchi_reader_leave(r, orchi_reader_line(r, line));
    if (n == ORCH_ECLOSED) *line = nothing;
    return n;
}

/* What was read ahead, but not what belongs to a line that was too long. */
static ptrdiff_t orchi_reader_ahead(orch_reader *r, char *buffer, size_t size) {
    size_t have = r->end - r->start;
    if (have > size) have = size;
    if (have > 0) memcpy(buffer, r->buffer + r->start, have);
    r->start += have;
    r->seen = 0;
    return (ptrdiff_t)have;
}

ptrdiff_t orch_reader_read(orch_reader *r, void *buffer, size_t size) {
    bool bad = orchi_no_memory_at(buffer, size);
    if (bad) return orchi_misuse("orch_reader_read", ORCH_EINVAL);
    int error = orchi_reader_enter(r, "orch_reader_read");
    if (error != 0) return error;
    ptrdiff_t n = orchi_reader_ahead(r, (char *)buffer, size);
    if (n == 0 && size > 0 && !r->ended) n = orch_read(r->fd, buffer, size);
    return orchi_reader_leave(r, n);
}

/* Inside of a call it is left to that call, which comes back to this memory. */
void orch_reader_free(orch_reader *r) {
    if (r == NULL || r->error != 0) return;
    if (r->busy) r->freed = true;
    else orchi_reader_dispose(r);
}

// ------------------------------------------------------------------------------------------------
// >>thread
//
// What works across threads: posts, remotes, the pool with offloaded work, tasks on another loop,
// names that are resolved. On >>inbox, and on promises, which only their own thread settles.
// Invariants:
//   - Whatever another thread writes is a letter's own memory, from malloc. Slots are touched by
//     their loop's thread alone.
//   - A remote is settled by putting its letter in; the loop opens it, settles the promise, which
//     may be gone, and frees it. When the loop is gone the settling thread frees both.
//   - Work is queued, running or over, under the lock; only what is queued can be taken back.
//   - A lane has threads while there is work, and some time after; all idle ones end with the last
//     loop, which waits for them. One that is busy then ends alone.
//   - A thread whose work follows shortly on work watches for more before it sleeps, for 20 us: to
//     fall asleep and to be woken is most of what a short piece of work takes.
//   - What crosses threads is plain: see orchi_carry.
// Left out: stealing, priorities and a way to stop a thread. Lanes keep apart what must not wait
// for each other, and a thread that is stopped from outside leaves locks behind.

// ---- the descriptor that wakes

/* Makes the descriptor. Without one (EMFILE) the loop sleeps in short pieces. */
ORCHI_COLD static void orchi_wake_open(orch_loop *loop) {
    int ends[2];
    if (orchi_wake_pair(ends) != 0) return;
    if (orchi_wake_watch(loop, ends[0]) != 0) {
        orchi_wake_close_pair(ends);
        return;
    }
    pthread_mutex_lock(&loop->inbox->mutex);
    loop->inbox->ends[0] = ends[0];
    loop->inbox->ends[1] = ends[1];
    pthread_mutex_unlock(&loop->inbox->mutex);
}

// ---- results that cross

/* What a thread's own futures hold cannot leave it. Values and messages can, and so can what
 * orch_run returned, whose loop is nobody's any more. Of an error the message is copied. */
ORCHI_COLD static orch_result orchi_carry_copy(orch_result *r) {
    const orch_result *shown = r;
    if (r->release == orchi_chain_release) shown = &((orch_future *)r->owner)->as.result;
    else if (r->release != orchi_list_release) shown = orchi_shown(r);
    bool plain = shown->release == NULL;
    orch_result copy = *shown;
    if (!plain && r->error != 0) {
        copy = orch_failf(r->error, "%s", orch_message(r));
        copy.index = r->index;
    } else if (!plain) {
        copy = orch_failf(ORCH_ETHREAD, "a list or a shared result cannot leave its thread");
    }
    orch_result_free(r);
    return copy;
}

/* A chain is one of this thread's, or, without a loop, stands for that mistake. */
static orch_result orchi_carry(orch_result r) {
    if (r.release == orchi_chain_release && !(((orch_future *)r.owner)->flags & ORCHI_IMMORTAL)) {
        orch_result_free(&r);
        return orch_fail(ORCH_ETHREAD);
    }
    bool own = r.release == orchi_chain_release || r.release == orchi_share_release ||
               r.release == orchi_lent_release || r.release == orchi_list_release;
    return own ? orchi_carry_copy(&r) : r;
}

// ---- post

typedef struct orchi_post {
    orchi_letter letter; // first
    void (*fn)(void *arg);
    void *arg;
} orchi_post;

static void orchi_post_open(orch_loop *loop, orchi_letter *letter) {
    orchi_post post = *(orchi_post *)(void *)letter;
    (void)loop;
    free(letter);
    post.fn(post.arg);
}

int orch_post(orch_loop *loop, void (*fn)(void *arg), void *arg) {
    if (loop == NULL || fn == NULL) return orchi_misuse("orch_post", ORCH_EINVAL);
    orchi_post *post = (orchi_post *)malloc(sizeof *post);
    if (post == NULL) return ORCH_ENOMEM;
    post->letter.open = orchi_post_open;
    post->fn = fn;
    post->arg = arg;
    orchi_inbox *inbox = orchi_inbox_find(loop);
    bool open = inbox != NULL && orchi_inbox_put_locked(inbox, &post->letter, true);
    if (!open) free(post);
    return open ? 0 : ORCH_ECLOSED;
}

// ---- remote

/* Back on the loop's thread, with a result. */
static void orchi_remote_open(orch_loop *loop, orchi_letter *letter) {
    orch_remote *remote = (orch_remote *)(void *)letter;
    orchi_remote_out(remote);
    orch_promise promise = remote->promise;
    orch_result r = remote->result;
    orchi_inbox_release(loop->inbox);
    free(remote);
    orch_settle(promise, r);
}

/* Back without one. */
static void orchi_remote_return(orch_loop *loop, orchi_letter *letter) {
    orch_remote *remote = (orch_remote *)(void *)letter;
    orchi_remote_out(remote);
    orchi_inbox_release(loop->inbox);
    free(remote);
}

static void orchi_remote_init(orch_loop *loop, orch_remote *remote, orch_promise promise) {
    remote->letter.open = orchi_remote_open;
    remote->inbox = orchi_inbox_hold(loop->inbox);
    remote->promise = promise;
    remote->result = orch_ok(NULL, NULL);
    remote->letter.in = false;
    remote->lent = false;
    orchi_remote_in(loop, remote);
}

/* Also for a promise that has settled: the thread that gets it need not know, and what it sends is
 * freed when it comes home. */
orch_remote *orch_promise_remote(orch_promise promise) {
    if (orchi_here("orch_promise_remote") == NULL) return NULL;
    bool pending = orch_promise_pending(promise);
    if (pending && !orchi_may_settle(promise, "orch_promise_remote")) return NULL;
    orch_remote *remote = (orch_remote *)malloc(sizeof *remote);
    if (remote == NULL) return NULL;
    orchi_remote_init(orchi_loop, remote, promise);
    if (!pending || orchi_inbox_is_closed(orchi_loop)) orchi_remote_out(remote);
    return remote;
}

/* Sends a remote home. False when there is no home any more. */
static bool orchi_remote_send(orch_remote *remote) {
    orchi_inbox *inbox = remote->inbox;
    if (orchi_inbox_put(inbox, &remote->letter)) return true;
    orch_result_free(&remote->result);
    free(remote);
    orchi_inbox_release(inbox);
    return false;
}

/* The remote is gone after this, whatever it returns: the loop may have freed it before this call
 * is back. */
bool orch_remote_settle(orch_remote *remote, orch_result r) {
    r = orchi_carry(r);
    if (remote == NULL) {
        orch_result_free(&r);
        return orchi_misuse("orch_remote_settle", ORCH_EINVAL) == 0;
    }
    remote->result = r;
    return orchi_remote_send(remote);
}

void orch_remote_drop(orch_remote *remote) {
    if (remote == NULL) return;
    remote->letter.open = orchi_remote_return;
    orchi_remote_send(remote);
}

// ---- the pool
//
// The life of a piece of work:
//
//     orch_offload   a job: a remote, what to call, a copy of its argument; at the end of its
//                    lane's queue. An idle thread is told, or, while there are fewer than allowed,
//                    another one is started
//     a thread       takes the first, calls it, gives its argument back, and sends the remote home
//     cancelled      queued: it is taken out and freed. Running: only its future ends. The remote
//                    comes home later, finds its promise gone, and what it brings is freed
//     the loop goes  nothing is queued any more, as every future was cancelled; what runs finds no
//                    home, and frees its result itself

// A thread's bell keeps a ring that comes before the wait. Each thread has its own, so that exactly
// the one that was chosen wakes up, and no other looks whether it was meant.

#if ORCHI_SEMAPHORES
typedef sem_t orchi_bell;
static void orchi_bell_init(orchi_bell *bell) { sem_init(bell, 0, 0); }
static void orchi_bell_free(orchi_bell *bell) { sem_destroy(bell); }
static void orchi_bell_ring(orchi_bell *bell) { sem_post(bell); }
static int orchi_bell_try(orchi_bell *bell, const struct timespec *until) {
    return until != NULL ? sem_timedwait(bell, until) : sem_wait(bell);
}
static bool orchi_bell_rung(orchi_bell *bell) { return sem_trywait(bell) == 0; }
#else
typedef struct orchi_bell {
    pthread_mutex_t mutex;
    pthread_cond_t cond;
    bool rung;
} orchi_bell;
static void orchi_bell_init(orchi_bell *bell) {
    pthread_mutex_init(&bell->mutex, NULL);
    pthread_cond_init(&bell->cond, NULL);
    bell->rung = false;
}
static void orchi_bell_free(orchi_bell *bell) {
    pthread_cond_destroy(&bell->cond);
    pthread_mutex_destroy(&bell->mutex);
}
static void orchi_bell_ring(orchi_bell *bell) {
    pthread_mutex_lock(&bell->mutex);
    bell->rung = true;
    pthread_cond_signal(&bell->cond);
    pthread_mutex_unlock(&bell->mutex);
}
static int orchi_bell_try(orchi_bell *bell, const struct timespec *until) {
    int error = 0;
    pthread_mutex_lock(&bell->mutex);
    while (!bell->rung && error == 0) {
        error = until != NULL ? pthread_cond_timedwait(&bell->cond, &bell->mutex, until)
                              : pthread_cond_wait(&bell->cond, &bell->mutex);
    }
    errno = error;
    bool rung = bell->rung;
    bell->rung = false; // a ring is for one wait
    pthread_mutex_unlock(&bell->mutex);
    return rung ? 0 : -1;
}
static bool orchi_bell_rung(orchi_bell *bell) {
    pthread_mutex_lock(&bell->mutex);
    bool rung = bell->rung;
    bell->rung = false;
    pthread_mutex_unlock(&bell->mutex);
    return rung;
}
#endif

/* Waits for the ring, for so many seconds; 0: for ever. Whether it came. */
static bool orchi_bell_wait(orchi_bell *bell, int seconds) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += seconds;
    int error = 0;
    do error = orchi_bell_try(bell, seconds > 0 ? &until : NULL);
    while (error != 0 && errno == EINTR);
    return error == 0;
}

// About what falling asleep and being woken takes. Whoever watches for as long as that before it
// sleeps takes at most twice the time of the better choice (Karlin, Li, Manasse, Owicki: "Empirical
// studies of competitive spinning for a shared-memory multiprocessor", 1991).
enum { ORCHI_WATCH_NS = 20000 };

/* Watches for the ring without falling asleep. Whether it came. */
static bool orchi_bell_watch(orchi_bell *bell, uint64_t since) {
    do {
        if (orchi_bell_rung(bell)) return true;
    } while (orchi_clock() - since < ORCHI_WATCH_NS);
    return false;
}

typedef struct orchi_job {
    orch_remote remote; // first
    orch_task_fn fn;
    void *arg;
    void (*release)(void *arg);
    struct orchi_lane *lane; // NULL: not queued (any more)
    struct orchi_job *next, *previous;
} orchi_job; // the copied argument follows

// Who owns a job: its lane while it is queued, the thread while it runs, the inbox on its way home,
// the loop when it is opened. `lane` says which of the first two, under the lock, and that decides
// what a cancellation may do: take it back and free it, or leave it alone.

typedef struct orchi_worker { // of a thread, as long as it lives
    orchi_bell bell;
    struct orchi_worker *next;
    bool parked; // in the list of its lane
    bool brisk;  // the last wait was short: watch before sleeping
} orchi_worker;

typedef struct orchi_lane {
    orchi_job *first, *last;
    orchi_worker *parked; // last in, first out: the others get to end
    orch_pool_stats stats;
} orchi_lane;

// Guarded by orchi_shared.mutex.
static struct {
    bool made;
    bool watches; // there are processors to spare: idle threads watch a little before they sleep
    orchi_lane lanes[ORCH_LANES];
    unsigned threads, busy; // in all lanes
    unsigned joining;       // last loops that wait for idle threads
    pthread_cond_t left;    // one has ended
    bool unjoined;          // `last` has ended, and the next one to end joins it
    pthread_t last;
} orchi_pool;

enum { ORCHI_IDLE_SECONDS = 5, ORCHI_LANE_THREADS = 4 };

static unsigned orchi_lane_default(int lane) {
    if (lane >= ORCH_LANE_OWN) return 1;
    long cores = lane == ORCH_LANE_DEFAULT ? sysconf(_SC_NPROCESSORS_ONLN) : 0;
    return cores > ORCHI_LANE_THREADS ? (unsigned)cores : 0u + ORCHI_LANE_THREADS;
}

/* In a new process there are no threads, no work, and nobody waits. Limits stay. */
static void orchi_pool_reset(void) {
    for (int i = 0; i < ORCH_LANES; i++) {
        orchi_lane *lane = &orchi_pool.lanes[i];
        for (orchi_job *job = lane->first; job != NULL; job = job->next) job->lane = NULL;
        lane->first = lane->last = NULL;
        lane->parked = NULL;
        lane->stats.threads = lane->stats.idle = 0;
        lane->stats.queued = 0;
    }
    orchi_pool.threads = orchi_pool.busy = 0;
    orchi_pool.joining = 0;
    orchi_pool.unjoined = false;
    pthread_cond_init(&orchi_pool.left, NULL);
}

/* What the parent's threads have, or would have taken, never comes: in the child it has ended. The
 * inboxes are unlocked by then. */
static void orchi_pool_fork(void) {
    orchi_pool_reset();
    orch_remote *remote = orchi_loop != NULL ? orchi_loop->remotes : NULL;
    for (; remote != NULL; remote = remote->next) {
        if (!remote->lent || remote->letter.in) continue;
        remote->result = orch_fail(ORCH_ECANCELED);
        orchi_inbox_put(remote->inbox, &remote->letter);
    }
}

/* The first use, with the lock held. */
static void orchi_pool_make(void) {
    if (orchi_pool.made) return;
    orchi_pool.made = true;
    orchi_pool_reset();
    orchi_pool.watches = sysconf(_SC_NPROCESSORS_ONLN) > 1;
    for (int i = 0; i < ORCH_LANES; i++) orchi_pool.lanes[i].stats.limit = orchi_lane_default(i);
    orchi_shared.on_fork = orchi_pool_fork;
}

// ---- threads of the pool

/* Whoever takes a thread out of the list rings for it, and with the lock released: so it does not
 * wake up to wait for the lock. */
static orchi_worker *orchi_lane_unpark(orchi_lane *lane) {
    orchi_worker *worker = lane->parked;
    if (worker == NULL) return NULL;
    lane->parked = worker->next;
    worker->parked = false;
    lane->stats.idle--;
    return worker;
}

/* It has waited long enough. */
static void orchi_lane_remove(orchi_lane *lane, orchi_worker *worker) {
    orchi_worker **at = &lane->parked;
    while (*at != worker) at = &(*at)->next;
    *at = worker->next;
    lane->stats.idle--;
}

/* Work that follows on work, as that of a task which reads a file piece by piece, finds the thread
 * awake; work now and then costs no watching. */
static bool orchi_worker_rests(orchi_worker *worker) {
    uint64_t since = orchi_clock();
    bool rung = worker->brisk && orchi_bell_watch(&worker->bell, since);
    if (!rung) rung = orchi_bell_wait(&worker->bell, ORCHI_IDLE_SECONDS);
    worker->brisk = orchi_pool.watches && orchi_clock() - since < ORCHI_WATCH_NS;
    return rung;
}

/* Waits until it is rung for. False when it has waited for so long that the thread is to end. */
static bool orchi_lane_park(orchi_lane *lane, orchi_worker *worker) {
    worker->next = lane->parked;
    worker->parked = true;
    lane->parked = worker;
    lane->stats.idle++;
    if (orchi_pool.joining > 0) pthread_cond_broadcast(&orchi_pool.left); // it stays: do not wait
    pthread_mutex_unlock(&orchi_shared.mutex);
    bool rung = orchi_worker_rests(worker);
    pthread_mutex_lock(&orchi_shared.mutex);
    if (rung) return true;
    if (worker->parked) {
        orchi_lane_remove(lane, worker);
        return false;
    }
    pthread_mutex_unlock(&orchi_shared.mutex); // it is just being rung for
    orchi_bell_wait(&worker->bell, 0);
    pthread_mutex_lock(&orchi_shared.mutex);
    return true;
}

/* The next piece of work, waited for. NULL: the thread is to end. */
static orchi_job *orchi_lane_wait(orchi_lane *lane, orchi_worker *worker) {
    bool stays = true;
    while (lane->stats.threads <= lane->stats.limit) {
        if (lane->first != NULL) return lane->first;
        if (!stays || orchi_shared.inboxes == NULL) break;
        stays = orchi_lane_park(lane, worker);
    }
    return NULL;
}

/* Every idle thread of a lane looks whether it is still wanted. */
static void orchi_lane_wake(orchi_lane *lane) {
    for (orchi_worker *w = orchi_lane_unpark(lane); w != NULL; w = orchi_lane_unpark(lane)) {
        orchi_bell_ring(&w->bell);
    }
}

/* Takes a job out of its lane. */
static void orchi_job_unlink(orchi_job *job) {
    orchi_lane *lane = job->lane;
    if (job->previous != NULL) job->previous->next = job->next;
    else lane->first = job->next;
    if (job->next != NULL) job->next->previous = job->previous;
    else lane->last = job->previous;
    job->lane = NULL;
    lane->stats.queued--;
}

/* Runs a job without the lock, and sends its result home, which frees it. */
static void orchi_job_run(orchi_job *job) {
    orch_result r = job->fn(job->arg);
    if (job->release != NULL) job->release(job->arg);
    pthread_mutex_lock(&orchi_shared.mutex);
    orchi_pool.busy--; // before anybody can know that it is done: the last loop waits for it
    pthread_mutex_unlock(&orchi_shared.mutex);
    orch_remote_settle(&job->remote, r);
}

/* The last act of a thread, with the lock held: it joins the one that has ended before it, so that
 * at most one is not joined. The last loop joins that. Later ones nobody waits for. */
static void orchi_worker_end(orchi_lane *lane) {
    bool joins = orchi_pool.unjoined;
    pthread_t before = orchi_pool.last;
    lane->stats.threads--;
    orchi_pool.threads--;
    orchi_pool.unjoined = orchi_pool.joining > 0 || orchi_shared.inboxes != NULL;
    orchi_pool.last = pthread_self();
    if (!orchi_pool.unjoined) pthread_detach(orchi_pool.last);
    pthread_cond_broadcast(&orchi_pool.left);
    pthread_mutex_unlock(&orchi_shared.mutex);
    if (joins) pthread_join(before, NULL);
}

static void *orchi_worker_main(void *argument) {
    orchi_lane *lane = (orchi_lane *)argument;
    orchi_job *job = NULL;
    orchi_worker worker;
    worker.brisk = false;
    orchi_bell_init(&worker.bell);
    pthread_mutex_lock(&orchi_shared.mutex);
    while ((job = orchi_lane_wait(lane, &worker)) != NULL) {
        orchi_job_unlink(job);
        lane->stats.begun++;
        orchi_pool.busy++;
        if (orchi_pool.joining > 0) pthread_cond_broadcast(&orchi_pool.left); // another loop's work
        pthread_mutex_unlock(&orchi_shared.mutex);
        orchi_job_run(job);
        pthread_mutex_lock(&orchi_shared.mutex);
    }
    orchi_worker_end(lane);
    orchi_bell_free(&worker.bell);
    return NULL;
}

/* Signals are the program's own threads' to handle; but a fault's handler runs where it happens. */
static void orchi_worker_signals(sigset_t *set) {
    static const int faults[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT};
    sigfillset(set);
    for (size_t i = 0; i < sizeof faults / sizeof *faults; i++) sigdelset(set, faults[i]);
}

/* One more thread. A new one inherits the mask of who starts it. */
static int orchi_worker_start(orchi_lane *lane) {
    pthread_t thread;
    sigset_t blocked, before;
    orchi_worker_signals(&blocked);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    int error = pthread_create(&thread, NULL, orchi_worker_main, lane);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0) return -error;
    lane->stats.threads++;
    orchi_pool.threads++;
    return 0;
}

/* First in, first out: lanes have no priorities. */
static void orchi_job_link(orchi_lane *lane, orchi_job *job) {
    job->lane = lane;
    job->next = NULL;
    job->previous = lane->last;
    if (lane->last != NULL) lane->last->next = job;
    else lane->first = job;
    lane->last = job;
    lane->stats.queued++;
}

/* Work for a lane: an idle thread for it, a new one, or the next that has time. */
static int orchi_pool_add(orch_lane id, orchi_job *job) {
    pthread_mutex_lock(&orchi_shared.mutex);
    orchi_pool_make();
    orchi_lane *lane = &orchi_pool.lanes[id];
    int error = 0;
    orchi_job_link(lane, job);
    orchi_worker *worker = orchi_lane_unpark(lane);
    if (worker == NULL && lane->stats.threads < lane->stats.limit) error = orchi_worker_start(lane);
    if (lane->stats.threads > 0) error = 0;
    if (error != 0) orchi_job_unlink(job);
    pthread_mutex_unlock(&orchi_shared.mutex);
    if (worker != NULL) orchi_bell_ring(&worker->bell);
    return error;
}

/* The last loop has gone: idle threads end now, and are waited for, so that a tool that looks for
 * leaks at the end of the process finds nothing. Busy ones end when they have finished. */
static void orchi_pool_rest(void) {
    pthread_mutex_lock(&orchi_shared.mutex);
    orchi_pool.joining++;
    for (int i = 0; i < ORCH_LANES; i++) orchi_lane_wake(&orchi_pool.lanes[i]);
    while (orchi_pool.threads > orchi_pool.busy && orchi_shared.inboxes == NULL) {
        pthread_cond_wait(&orchi_pool.left, &orchi_shared.mutex);
    }
    bool joins = orchi_pool.unjoined;
    pthread_t last = orchi_pool.last;
    orchi_pool.joining--;
    orchi_pool.unjoined = false;
    pthread_mutex_unlock(&orchi_shared.mutex);
    if (joins) pthread_join(last, NULL);
}

/* Fewer threads: those that are too many end when they next look for work. More: those that work is
 * waiting for are started now, the others when there is work. */
int orch_pool_limit(orch_lane lane, unsigned threads) {
    if ((unsigned)lane >= ORCH_LANES || threads == 0) {
        return orchi_misuse("orch_pool_limit", ORCH_EINVAL);
    }
    pthread_mutex_lock(&orchi_shared.mutex);
    orchi_pool_make();
    orchi_lane *own = &orchi_pool.lanes[lane];
    own->stats.limit = threads;
    orchi_lane_wake(own); // those that are too many end
    while (own->stats.queued > 0 && own->stats.threads < threads) {
        if (orchi_worker_start(own) != 0) break;
    }
    pthread_mutex_unlock(&orchi_shared.mutex);
    return 0;
}

orch_pool_stats orch_pool_statistics(orch_lane lane) {
    orch_pool_stats stats;
    memset(&stats, 0, sizeof stats);
    if ((unsigned)lane >= ORCH_LANES) return stats;
    pthread_mutex_lock(&orchi_shared.mutex);
    orchi_pool_make();
    stats = orchi_pool.lanes[lane].stats;
    pthread_mutex_unlock(&orchi_shared.mutex);
    return stats;
}

// ---- offload

/* The future was cancelled. It ends now, whatever the thread does. */
static bool orchi_job_cancel(void *context, int reason) {
    orchi_job *job = (orchi_job *)context;
    (void)reason;
    pthread_mutex_lock(&orchi_shared.mutex);
    bool queued = job->lane != NULL;
    if (queued) orchi_job_unlink(job);
    pthread_mutex_unlock(&orchi_shared.mutex);
    if (!queued) return true;
    orchi_remote_out(&job->remote);
    orchi_inbox_release(job->remote.inbox);
    if (job->release != NULL) job->release(job->arg);
    free(job);
    return true;
}

/* A job without its future: what a desc says. */
static orchi_job *orchi_job_new(const orch_offload_desc *desc) {
    size_t head = (sizeof(orchi_job) + 63) / 64 * 64; // so the copy is aligned for anything
    if (desc->arg_size > SIZE_MAX - head) return NULL;
    orchi_job *job = (orchi_job *)malloc(head + desc->arg_size);
    if (job == NULL) return NULL;
    job->fn = desc->fn;
    job->release = desc->release;
    job->arg = desc->arg;
    if (desc->arg_size > 0) job->arg = memcpy((char *)job + head, desc->arg, desc->arg_size);
    return job;
}

/* Queues a job that its future cannot see yet. */
static orch_future *orchi_job_begin(orchi_job *job, const orch_offload_desc *desc, int *error) {
    orch_promise promise;
    orch_future *f = orch_future_new(&promise);
    *error = orchi_is_static(f) ? ORCH_ENOMEM : 0;
    if (*error != 0) return f;
    orchi_remote_init(orchi_loop, &job->remote, promise);
    job->remote.lent = true;
    orch_promise_describe(promise, desc->name);
    *error = orchi_pool_add(desc->lane, job);
    if (*error == 0) {
        orch_promise_on_cancel(promise, orchi_job_cancel, job);
        return f;
    }
    orchi_remote_out(&job->remote);
    orchi_inbox_release(job->remote.inbox);
    orch_settle(promise, orch_failf(*error, "no thread: %s", orch_error_text(*error)));
    return f;
}

/* The argument's size is bounded by malloc alone: it does not lie on a stack. */
static int orchi_offload_error(const orch_offload_desc *desc) {
    if (orchi_loop == NULL) return ORCH_ENOLOOP;
    if (desc == NULL || desc->fn == NULL || (unsigned)desc->lane >= ORCH_LANES) return ORCH_EINVAL;
    return desc->arg_size > 0 && desc->arg == NULL ? ORCH_EINVAL : 0;
}

/* What could not be started gives its argument back. */
static orch_future *orchi_offload_begin(const orch_offload_desc *desc) {
    orchi_job *job = orchi_job_new(desc);
    int error = ORCH_ENOMEM;
    orch_future *f = orchi_rejected(ORCH_ENOMEM);
    if (job != NULL) f = orchi_job_begin(job, desc, &error);
    if (error == 0) return f;
    if (desc->release != NULL) desc->release(job != NULL ? job->arg : desc->arg);
    free(job);
    return f;
}

static orch_future *orchi_offload(const orch_offload_desc *desc, const char *function) {
    int error = orchi_offload_error(desc);
    if (error != 0) orchi_misuse(function, error);
    else if (orchi_inbox_is_closed(orchi_loop)) error = ORCH_ECLOSED;
    if (error == 0) return orchi_offload_begin(desc);
    if (desc != NULL && desc->release != NULL) desc->release(desc->arg);
    return orchi_rejected(error);
}

orch_future *orch_offload_with(const orch_offload_desc *desc) {
    return orchi_offload(desc, "orch_offload_with");
}

orch_future *orch_offload(orch_task_fn fn, void *arg) {
    orch_offload_desc desc = {NULL, fn, arg, 0, NULL, ORCH_LANE_DEFAULT};
    return orchi_offload(&desc, "orch_offload");
}

// ---- a task on another loop
//
// A visit is a remote that has a way there. Its letters, as A's task runs fn on B's loop:
//
//     A  orch_go_on         go, to B; the future's cancel hook is set
//     B  go is opened       a task runs fn
//     A  cancelled          stop, to B; the future waits on, as fn may use the caller's stack
//     B  stop is opened     the task is cancelled, if it is still there
//     B  fn returns         the remote is sent home
//     A  it is opened       the future settles
//
// The stop may be on its way when the answer is: whichever is opened last frees the visit. When B's
// loop is freed while a visit could not end (its task was given up), it answers ORCH_ECLOSED.

typedef struct orchi_visit {
    orch_remote remote; // first
    orchi_letter go, stop;
    orchi_inbox *there; // held
    orch_task_fn fn;
    void *arg;
    orch_future *future;               // there: of the task; NULL: it has not begun, or has ended
    struct orchi_visit *next, **place; // there: in the list of visits
    int reason;
    uint32_t holders; // orchi_shared.mutex: the answer, a stop, who begins it
} orchi_visit;

/* A count under the lock and not an atomic one: it changes a few times in a visit's life. */
static void orchi_visit_hold(orchi_visit *visit) {
    pthread_mutex_lock(&orchi_shared.mutex);
    visit->holders++;
    pthread_mutex_unlock(&orchi_shared.mutex);
}

static void orchi_visit_release(orchi_visit *visit) {
    pthread_mutex_lock(&orchi_shared.mutex);
    bool last = --visit->holders == 0;
    pthread_mutex_unlock(&orchi_shared.mutex);
    if (!last) return;
    if (visit->there != NULL) orchi_inbox_release(visit->there);
    orchi_inbox_release(visit->remote.inbox);
    free(visit);
}

/* Here again, with the answer. */
static void orchi_visit_home(orch_loop *loop, orchi_letter *letter) {
    orchi_visit *visit = (orchi_visit *)(void *)letter;
    (void)loop;
    orchi_remote_out(&visit->remote);
    orch_settle(visit->remote.promise, visit->remote.result);
    orchi_visit_release(visit);
}

/* There: it has ended. */
static void orchi_visit_answer(orchi_visit *visit, orch_result r) {
    if (visit->place != NULL) {
        *visit->place = visit->next;
        if (visit->next != NULL) visit->next->place = visit->place;
        visit->place = NULL;
    }
    visit->remote.result = orchi_carry(r);
    if (orchi_inbox_put(visit->remote.inbox, &visit->remote.letter)) return;
    orch_result_free(&visit->remote.result);
    orchi_visit_release(visit);
}

/* There: the task. A chain is followed here, where its futures are. */
static orch_result orchi_visit_task(void *arg) {
    orchi_visit *visit = (orchi_visit *)arg;
    orch_result r = visit->fn(visit->arg);
    if (r.release == orchi_chain_release) r = orch_await(orch_settled(r));
    orch_future *own = visit->future;
    visit->future = NULL;
    orchi_visit_answer(visit, r);
    orch_detach(own);
    return orch_ok(NULL, NULL);
}

/* There: the first letter. */
static void orchi_visit_begin(orch_loop *loop, orchi_letter *letter) {
    orchi_visit *visit = (orchi_visit *)(void *)((char *)letter - offsetof(orchi_visit, go));
    orch_task_desc desc = {"visitor", orchi_visit_task, visit, 0, NULL, 0};
    if (loop->inbox->ending) {
        orchi_visit_answer(visit, orch_fail(ORCH_ECLOSED));
        return;
    }
    orchi_visit_hold(visit);
    visit->next = loop->visits;
    visit->place = &loop->visits;
    if (visit->next != NULL) visit->next->place = &visit->next;
    loop->visits = visit;
    orch_future *f = orch_go_with(&desc);
    if (orchi_is_static(f)) orchi_visit_answer(visit, orch_fail(ORCH_ENOMEM));
    else if (visit->place == NULL) orch_detach(f); // has ended
    else visit->future = f;
    orchi_visit_release(visit);
}

/* There: the caller does not want it any more. */
static void orchi_visit_stop(orch_loop *loop, orchi_letter *letter) {
    orchi_visit *visit = (orchi_visit *)(void *)((char *)letter - offsetof(orchi_visit, stop));
    (void)loop;
    if (visit->future != NULL) orch_cancel(visit->future, visit->reason);
    orchi_visit_release(visit);
}

/* Here: the hook. The future ends when the task has. */
static bool orchi_visit_cancel(void *context, int reason) {
    orchi_visit *visit = (orchi_visit *)context;
    visit->reason = reason;
    orchi_visit_hold(visit);
    if (!orchi_inbox_put(visit->there, &visit->stop)) orchi_visit_release(visit);
    return false;
}

/* The loop ends, and tasks are left that never will: their callers are told. */
static void orchi_visits_end(orch_loop *loop) {
    while (loop->visits != NULL) orchi_visit_answer(loop->visits, orch_fail(ORCH_ECLOSED));
}

/* The letters are part of it, so that neither going, stopping nor answering needs memory later. */
static orchi_visit *orchi_visit_new(orch_promise promise, orch_task_fn fn, void *arg) {
    orchi_visit *visit = (orchi_visit *)calloc(1, sizeof *visit);
    if (visit == NULL) return NULL;
    orchi_remote_init(orchi_loop, &visit->remote, promise);
    visit->remote.letter.open = orchi_visit_home;
    visit->remote.lent = true;
    visit->go.open = orchi_visit_begin;
    visit->stop.open = orchi_visit_stop;
    visit->fn = fn;
    visit->arg = arg;
    visit->holders = 1;
    return visit;
}

/* Sends it there. The inbox that it holds is known before the letter can be opened. */
static bool orchi_visit_send(orchi_visit *visit, const orch_loop *loop) {
    orchi_inbox *there = orchi_inbox_find(loop);
    if (there == NULL) return false;
    visit->there = there;
    there->holders++;
    return orchi_inbox_put_locked(there, &visit->go, true);
}

orch_future *orch_go_on(orch_loop *loop, orch_task_fn fn, void *arg) {
    if (loop == NULL || fn == NULL) return orchi_rejected(orchi_misuse("orch_go_on", ORCH_EINVAL));
    orch_promise promise;
    orch_future *f = orch_future_new(&promise);
    if (orchi_is_static(f)) return f;
    bool closed = orchi_inbox_is_closed(orchi_loop);
    orchi_visit *visit = closed ? NULL : orchi_visit_new(promise, fn, arg);
    if (visit == NULL) {
        orch_settle(promise, orch_fail(closed ? ORCH_ECLOSED : ORCH_ENOMEM));
    } else if (orchi_visit_send(visit, loop)) {
        orch_promise_on_cancel(promise, orchi_visit_cancel, visit);
    } else {
        orchi_remote_out(&visit->remote);
        orchi_visit_release(visit);
        orch_settle(promise, orch_fail(ORCH_ECLOSED));
    }
    return f;
}

// ---- resolving

/* Static text of the system's; its error may be hidden in errno. */
static orch_result orchi_resolve_error(int code, int saved) {
    if (code == EAI_SYSTEM) return orch_fail(saved != 0 ? -saved : ORCH_ERESOLVE);
    if (code == EAI_MEMORY) return orch_fail(ORCH_ENOMEM);
    int error = code == EAI_AGAIN || code == EAI_FAIL ? ORCH_ERESOLVE : ORCH_EHOST;
    return orch_failf(error, "%s", gai_strerror(code));
}

/* One piece of memory, so that it can be taken out of the result and freed with free. */
static orch_addresses *orchi_addresses_new(const struct addrinfo *list) {
    size_t count = 0;
    for (const struct addrinfo *at = list; at != NULL; at = at->ai_next) count++;
    size_t bytes = sizeof(orch_addresses) + count * sizeof(orch_address);
    orch_addresses *all = (orch_addresses *)calloc(1, bytes);
    if (all == NULL) return NULL;
    all->items = (orch_address *)(void *)(all + 1);
    for (const struct addrinfo *at = list; at != NULL; at = at->ai_next) {
        if (at->ai_addrlen > sizeof all->items->storage) continue;
        orch_address *address = &all->items[all->count++];
        address->size = (unsigned)at->ai_addrlen;
        memcpy(address->storage, at->ai_addr, at->ai_addrlen);
    }
    return all;
}

/* Asks for streams only, as each address would come once for every type of socket. */
static int orchi_getaddrinfo(const char *host, const char *service, int flags,
                             struct addrinfo **list) {
    struct addrinfo hints;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = flags;
    errno = 0;
    return getaddrinfo(host, service, &hints, list);
}

/* Blocks, unless the flags say that all is numeric. */
static orch_result orchi_resolve_now(const char *host, const char *service, int flags) {
    struct addrinfo *list = NULL;
    int code = orchi_getaddrinfo(host, service, flags, &list);
    if (code != 0) return orchi_resolve_error(code, errno);
    orch_addresses *all = orchi_addresses_new(list);
    freeaddrinfo(list);
    if (all == NULL) return orch_fail(ORCH_ENOMEM);
    return orch_ok(all, free);
}

typedef struct orchi_names { // with both names behind it
    bool host, service;
    size_t service_at;
} orchi_names;

static orch_result orchi_resolve_job(void *arg) {
    const orchi_names *names = (const orchi_names *)arg;
    const char *text = (const char *)(names + 1);
    return orchi_resolve_now(names->host ? text : NULL,
                             names->service ? text + names->service_at : NULL, 0);
}

/* The names come along, as the caller's may go. */
static orchi_names *orchi_names_new(const char *host, const char *service) {
    size_t host_bytes = host != NULL ? strlen(host) + 1 : 0;
    size_t service_bytes = service != NULL ? strlen(service) + 1 : 0;
    orchi_names *names = (orchi_names *)malloc(sizeof *names + host_bytes + service_bytes);
    if (names == NULL) return NULL;
    char *text = (char *)(names + 1);
    names->host = host != NULL;
    names->service = service != NULL;
    names->service_at = host_bytes;
    if (host_bytes > 0) memcpy(text, host, host_bytes);
    if (service_bytes > 0) memcpy(text + host_bytes, service, service_bytes);
    return names;
}

static orch_future *orchi_resolve_offload(const char *host, const char *service) {
    orchi_names *names = orchi_names_new(host, service);
    if (names == NULL) return orchi_rejected(ORCH_ENOMEM);
    orch_offload_desc desc = {"resolve", orchi_resolve_job, names, 0, free, ORCH_LANE_RESOLVE};
    return orchi_offload(&desc, "orch_resolve");
}

/* Numbers are resolved here and now, which blocks nobody. Names are asked for on a lane of their
 * own, as a name server that does not answer must not hold up files. */
orch_future *orch_resolve(const char *host, const char *service) {
    if (orchi_here("orch_resolve") == NULL) return orchi_rejected(ORCH_ENOLOOP);
    if (host == NULL && service == NULL) {
        return orchi_rejected(orchi_misuse("orch_resolve", ORCH_EINVAL));
    }
    orch_result r = orchi_resolve_now(host, service, AI_NUMERICHOST | AI_NUMERICSERV);
    if (r.error != ORCH_EHOST) return orch_settled(r);
    orch_result_free(&r);
    return orchi_resolve_offload(host, service);
}

// ---- the end of a loop

/* Nothing of a loop is touched by another thread after this. */
static void orchi_thread_leave(orch_loop *loop) {
    orchi_visits_end(loop);
    if (orchi_inbox_leave(loop)) orchi_pool_rest();
}

// ------------------------------------------------------------------------------------------------
// >>signal
//
// Signals as futures. A handler may do next to nothing, and may run in any thread, so it only sets
// a bit in each object that wants the signal and rings its bell, a descriptor; the loop that waits
// for the descriptor takes the bit. Invariants:
//   - The handler reads a list that it never locks. An object that goes is unlinked, and then
//     waited for until no handler is inside: none can ring a bell that was closed.
//   - A bell is silenced before the bits are looked at, and rung again when some are left. So a bit
//     that is set is never without a ringing bell, and nothing is lost between two waits.
//   - A bit is taken in the look that found the bell, and only for a future that is wanted: what
//     loses a race takes nothing, see orch_promise_wanted.
//   - The first object that wants a signal installs the handler, the last puts back what was there.
//   - A child made by fork shares the bells with its parent and must not ring them. The handler
//     compares process numbers, and in a child does what was done before.
// Left out: signalfd. It needs the signals blocked in every thread, and in no child.

static void orchi_signals_close(const int bell[2]) {
    orch_close(bell[0]); // the loop has waited for it
    if (bell[1] != bell[0]) close(bell[1]);
}

enum { ORCHI_SIGNALS = 64 };

struct orch_signals {
    int error; // not 0: nothing is caught
    orch_loop *loop;
    orch_signals *next;          // in the list of the handler
    orch_future *waiting;        // the one next that is pending
    bool single;                 // of orch_signal: goes with its future
    bool final;                  // of orch_run: the second signal is not caught
    pid_t process;               // that made it
    int bell[2];                 // what is waited for, what rings it
    uint32_t wanted[2], came[2]; // a bit for each signal
    uint32_t caught;             // how many, for `final`
};

// Of the process, as dispositions are. Static, as a handler gets no pointer.
static struct orchi_registry {
    orch_signals *first; // read by the handler
    uint32_t inside;     // handlers that are reading
    uint32_t lock;       // of those who write; held for a few instructions and system calls
    pid_t process;
    uint32_t users[ORCHI_SIGNALS];
    struct sigaction previous[ORCHI_SIGNALS];
} orchi_registry;

// A signal on its way, with the loop asleep:
//
//     the handler   in any thread: sets the bit in every object that wants the signal, and rings
//                   its bell
//     the look      the bell is readable: it is silenced, the lowest bit is taken, and it is rung
//                   again when more are left
//     the future    settles with the number; the next wait finds the bell as it is
//
// A signal that comes twice before it is taken is one bit, as it would be one pending signal of the
// system's. Sets are two words of 32 bits: atomic on them is lock-free everywhere, as it has to be
// in a handler.

static bool orchi_signal_in(const uint32_t set[2], int number) {
    return (__atomic_load_n(&set[(number - 1) / 32], __ATOMIC_ACQUIRE) >> (number - 1) % 32) & 1;
}

static void orchi_signal_put(uint32_t set[2], int number) {
    __atomic_fetch_or(&set[(number - 1) / 32], 1u << (number - 1) % 32, __ATOMIC_ACQ_REL);
}

static void orchi_signal_remove(uint32_t set[2], int number) {
    __atomic_fetch_and(&set[(number - 1) / 32], ~(1u << (number - 1) % 32), __ATOMIC_ACQ_REL);
}

// ---- the handler

/* Handles a signal as if the handler were not there: it comes again when the handler returns. */
static void orchi_signal_pass(int number, const struct sigaction *action) {
    sigaction(number, action, NULL);
    raise(number);
}

/* Whether the process is to end. */
static bool orchi_signal_note(orch_signals *s, int number) {
    if (!orchi_signal_in(s->wanted, number)) return false;
    orchi_signal_put(s->came, number);
    orchi_wake_ring(s->bell[1]);
    return s->final && __atomic_fetch_add(&s->caught, 1, __ATOMIC_ACQ_REL) > 0;
}

/* Walks over a list that others change. What it may meet is either still in, or out and waited for
 * (orchi_signals_unlink): `inside` says that somebody walks. errno is the interrupted code's. */
static void orchi_signal_handler(int number) {
    struct orchi_registry *registry = &orchi_registry;
    int saved = errno;
    if (__atomic_load_n(&registry->process, __ATOMIC_ACQUIRE) != getpid()) {
        orchi_signal_pass(number, &registry->previous[number - 1]);
        errno = saved;
        return;
    }
    bool over = false;
    __atomic_fetch_add(&registry->inside, 1, __ATOMIC_SEQ_CST);
    orch_signals *s = __atomic_load_n(&registry->first, __ATOMIC_SEQ_CST);
    for (; s != NULL; s = __atomic_load_n(&s->next, __ATOMIC_SEQ_CST)) {
        if (orchi_signal_note(s, number)) over = true;
    }
    __atomic_fetch_sub(&registry->inside, 1, __ATOMIC_SEQ_CST);
    struct sigaction standard;
    memset(&standard, 0, sizeof standard);
    standard.sa_handler = SIG_DFL;
    if (over) orchi_signal_pass(number, &standard);
    errno = saved;
}

// ---- the registry

static bool orchi_signal_is_ours(const struct sigaction *action) {
    return !(action->sa_flags & SA_SIGINFO) && action->sa_handler == orchi_signal_handler;
}

/* Puts back what was there, unless somebody has replaced the handler meanwhile. */
static void orchi_signal_restore(int number) {
    struct sigaction now;
    if (sigaction(number, NULL, &now) == 0 && orchi_signal_is_ours(&now)) {
        sigaction(number, &orchi_registry.previous[number - 1], NULL);
    }
}

/* The first use in a child made by fork: the parent's objects are not its own. */
static void orchi_registry_reset(void) {
    struct orchi_registry *registry = &orchi_registry;
    registry->first = NULL;
    registry->inside = registry->lock = 0;
    for (int number = 1; number <= ORCHI_SIGNALS; number++) {
        if (registry->users[number - 1] > 0) orchi_signal_restore(number);
        registry->users[number - 1] = 0;
    }
}

static void orchi_registry_lock(void) {
    pid_t here = getpid(), was = __atomic_load_n(&orchi_registry.process, __ATOMIC_ACQUIRE);
    if (was != here && __atomic_compare_exchange_n(&orchi_registry.process, &was, here, false,
                                                   __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE)) {
        if (was != 0) orchi_registry_reset();
    }
    while (__atomic_exchange_n(&orchi_registry.lock, 1, __ATOMIC_ACQUIRE)) sched_yield();
}

static void orchi_registry_unlock(void) {
    __atomic_store_n(&orchi_registry.lock, 0, __ATOMIC_RELEASE);
}

/* The first user of a signal installs the handler. Calls that are interrupted are restarted, and
 * the stack of a task is spared. */
static int orchi_signal_use(int number) {
    if (orchi_registry.users[number - 1] == 0) {
        struct sigaction action;
        memset(&action, 0, sizeof action);
        action.sa_handler = orchi_signal_handler;
        action.sa_flags = SA_RESTART | SA_ONSTACK;
        if (sigaction(number, NULL, &orchi_registry.previous[number - 1]) != 0) return -errno;
        if (sigaction(number, &action, NULL) != 0) return -errno;
    }
    orchi_registry.users[number - 1]++;
    return 0;
}

/* With the lock held, as users are counted over all objects of the process. */
static void orchi_signal_leave(int number) {
    if (--orchi_registry.users[number - 1] == 0) orchi_signal_restore(number);
}

/* Gives back the signals below `end` that an object uses. */
static void orchi_signals_leave(const orch_signals *s, int end) {
    for (int number = 1; number < end; number++) {
        if (orchi_signal_in(s->wanted, number)) orchi_signal_leave(number);
    }
}

/* In the list before the handler is there, so that a signal finds it. */
static int orchi_signals_enter(orch_signals *s) {
    int error = 0;
    orchi_registry_lock();
    s->next = orchi_registry.first;
    __atomic_store_n(&orchi_registry.first, s, __ATOMIC_SEQ_CST);
    for (int number = 1; number <= ORCHI_SIGNALS && error == 0; number++) {
        if (!orchi_signal_in(s->wanted, number)) continue;
        error = orchi_signal_use(number);
        if (error != 0) orchi_signals_leave(s, number);
    }
    orchi_registry_unlock();
    return error;
}

/* Out of the list; nobody rings its bell any more when this returns. */
static void orchi_signals_unlink(orch_signals *s) {
    orch_signals **at = &orchi_registry.first;
    while (*at != s) at = &(*at)->next;
    __atomic_store_n(at, s->next, __ATOMIC_SEQ_CST);
    while (__atomic_load_n(&orchi_registry.inside, __ATOMIC_SEQ_CST) != 0) sched_yield();
}

/* The signals first: when the last user of one has left, nothing new comes for it. */
static void orchi_signals_exit(orch_signals *s) {
    if (s->process != getpid()) return; // a copy, in a child made by fork
    orchi_registry_lock();
    if (s->error == 0) orchi_signals_leave(s, ORCHI_SIGNALS + 1);
    orchi_signals_unlink(s);
    orchi_registry_unlock();
}

// ---- objects

static const orch_signals orchi_broken_signals[] = {
    {ORCH_ENOMEM, NULL, NULL, NULL, false, false, 0, {-1, -1}, {0, 0}, {0, 0}, 0},
    {ORCH_ENOLOOP, NULL, NULL, NULL, false, false, 0, {-1, -1}, {0, 0}, {0, 0}, 0},
    {ORCH_EINVAL, NULL, NULL, NULL, false, false, 0, {-1, -1}, {0, 0}, {0, 0}, 0}};

/* Never written: every operation looks at the error first, and a free at the loop. */
static orch_signals *orchi_signals_broken(int error) {
    size_t i = error == ORCH_ENOMEM ? 0 : error == ORCH_ENOLOOP ? 1 : 2;
    return (orch_signals *)(uintptr_t)&orchi_broken_signals[i];
}

/* A program's own faults would come again at once if a handler returned. */
static bool orchi_signal_can_wait(int number) {
    static const int not_these[] = {SIGKILL, SIGSTOP, SIGSEGV, SIGBUS, SIGFPE,
                                    SIGILL,  SIGABRT, SIGTRAP, SIGSYS};
    for (size_t i = 0; i < sizeof not_these / sizeof not_these[0]; i++) {
        if (number == not_these[i]) return false;
    }
    return number >= 1 && number <= ORCHI_SIGNALS;
}

/* Asked before anything is installed: a list is taken as a whole, or not at all. */
static int orchi_signals_want(orch_signals *s, const int *signals, size_t count) {
    for (size_t i = 0; i < count; i++) {
        if (!orchi_signal_can_wait(signals[i])) return ORCH_EINVAL;
        orchi_signal_put(s->wanted, signals[i]);
    }
    return 0;
}

/* A bell, and a place in the list; or neither. */
static int orchi_signals_open(orch_signals *s) {
    int error = orchi_wake_pair(s->bell);
    if (error != 0) return error;
    s->error = error = orchi_signals_enter(s);
    if (error == 0) return 0;
    orchi_signals_exit(s);
    orchi_signals_close(s->bell);
    return error;
}

/* Some fields are the caller's to set before it opens it. */
static orch_signals *orchi_signals_make(orch_loop *loop) {
    orch_signals *s = (orch_signals *)orchi_allocate(loop, sizeof *s);
    if (s == NULL) return orchi_signals_broken(ORCH_ENOMEM);
    memset(s, 0, sizeof *s);
    s->loop = loop;
    s->process = getpid();
    return s;
}

orch_signals *orch_signals_new(const int *signals, size_t count) {
    int error = orchi_loop == NULL ? ORCH_ENOLOOP : signals == NULL || count == 0 ? ORCH_EINVAL : 0;
    if (error != 0) return orchi_signals_broken(orchi_misuse("orch_signals_new", error));
    orch_signals *s = orchi_signals_make(orchi_loop);
    if (s->error != 0) return s;
    s->error = orchi_signals_want(s, signals, count);
    if (s->error == 0) s->error = orchi_signals_open(s);
    return s;
}

/* What is wrong with an object here and now, or 0. */
static int orchi_signals_error(const orch_signals *s, const char *function) {
    if (s == NULL) return orchi_misuse(function, ORCH_EINVAL);
    if (s->error != 0 || s->loop == orchi_loop) return s->error;
    return orchi_misuse(function, orchi_loop != NULL ? ORCH_ETHREAD : ORCH_ENOLOOP);
}

/* Of one that could not be made there is only the memory. */
static void orchi_signals_dispose(orch_signals *s) {
    if (s->error == 0) {
        orchi_signals_exit(s);
        orchi_signals_close(s->bell);
    }
    orchi_free(s->loop, s, sizeof *s);
}

/* Takes the lowest signal that came, or 0. */
static int orchi_signals_take(orch_signals *s) {
    int taken = 0;
    orchi_wake_silence(s->bell[0]);
    for (int number = 1; number <= ORCHI_SIGNALS; number++) {
        if (!orchi_signal_in(s->came, number)) continue;
        if (taken != 0) {
            orchi_wake_ring(s->bell[1]);
            break;
        }
        taken = number;
        orchi_signal_remove(s->came, number);
    }
    return taken;
}

// ---- futures

static orch_future *orchi_signals_wait(orch_signals *s) {
    orch_loop *loop = s->loop;
    int error = orchi_watch_reserve(loop, s->bell[0]);
    orch_future *f = error == 0 ? orchi_slot_new(loop, ORCHI_SIGNAL) : NULL;
    if (f == NULL) return orch_settled(orch_fail(error != 0 ? error : ORCH_ENOMEM));
    f->as.signal.fd = s->bell[0];
    f->as.signal.events = ORCH_READABLE;
    f->as.signal.from = s;
    error = orchi_watch_start(loop, f);
    if (error != 0) orchi_reject(loop, f, error);
    else s->waiting = f;
    return f;
}

/* What every end of a wait does: the object of orch_signal goes with it. */
static void orchi_signal_settle(orch_future *f, orch_result r, bool exact) {
    orch_loop *loop = orchi_loop_of(f);
    orch_signals *s = f->as.signal.from;
    orchi_unwatch(loop, f, exact);
    s->waiting = NULL;
    if (s->single) orchi_signals_dispose(s);
    orchi_settle(loop, f, &r);
}

/* A bell without a bit was rung before the last look. A wait that nobody wants any more is about to
 * be cancelled. */
static void orchi_signal_fire(orch_future *f, int events) {
    bool bad = (events & ORCHI_BAD_FD) != 0, wanted = orchi_is_wanted(f);
    int number = wanted && !bad ? orchi_signals_take(f->as.signal.from) : 0;
    if (number != 0) orchi_signal_settle(f, orch_ok_int(number), false);
    else if (bad || !wanted)
        orchi_signal_settle(f, orch_fail(bad ? -EBADF : ORCH_ECANCELED), false);
}

/* It takes no bit: what has come stays for the next wait. */
static orch_future *orchi_signal_cancel(orch_future *f, int reason) {
    (void)reason;
    f->flags |= ORCHI_CANCEL;
    orchi_signal_settle(f, orch_fail(ORCH_ECANCELED), true);
    return NULL;
}

orch_future *orch_signals_next(orch_signals *s) {
    int error = orchi_signals_error(s, "orch_signals_next");
    if (error == 0 && s->waiting != NULL) error = ORCH_EBUSY;
    return error == 0 ? orchi_signals_wait(s) : orch_settled(orch_fail(error));
}

void orch_signals_free(orch_signals *s) {
    if (s == NULL || s->loop == NULL) return;
    if (s->loop != orchi_loop) {
        orchi_misuse("orch_signals_free", ORCH_ETHREAD);
        return;
    }
    if (s->waiting != NULL) orchi_signal_settle(s->waiting, orch_fail(ORCH_ECLOSED), true);
    orchi_signals_dispose(s);
}

/* The object is made and goes with the future: the signal has its old meaning again after it. */
orch_future *orch_signal(int signal) {
    if (orchi_loop == NULL) return orchi_rejected(orchi_misuse("orch_signal", ORCH_ENOLOOP));
    orch_signals *s = orch_signals_new(&signal, 1);
    orch_future *f = s->error == 0 ? orchi_signals_wait(s) : orch_settled(orch_fail(s->error));
    if (s->error == 0 && s->waiting == f) s->single = true;
    else orch_signals_free(s);
    return f;
}

// ---- what orch_run does

/* Catches what ends programs, but not what was ignored: nohup, and shells for their background
 * jobs, ignore it for a reason. */
static orch_signals *orchi_signals_final(orch_loop *loop) {
    static const int numbers[] = {SIGINT, SIGTERM};
    orch_signals *s = orchi_signals_make(loop);
    if (s->error != 0) return s;
    for (size_t i = 0; i < 2; i++) {
        struct sigaction now;
        if (sigaction(numbers[i], NULL, &now) == 0 && now.sa_handler != SIG_IGN) {
            orchi_signal_put(s->wanted, numbers[i]);
        }
    }
    s->final = true;
    s->error = orchi_signals_open(s);
    return s;
}

// ------------------------------------------------------------------------------------------------
// >>run
//
// The life of a loop: made, run, closed. orch_run is a loop, a main task, and everything cleaned
// up: when main has ended, what is left is asked to end and run until it has; what shields, holds
// until nothing else can happen. A result that main returned may show futures of the loop (a list,
// a share): then the loop's memory lives until that result is freed.

// Who frees what, when a loop goes:
//
//     slots, ring, timers, watches    orchi_loop_dispose, whole regions at a time
//     what slots own                  orchi_discard_visit, before that: results, contexts, lists
//     stacks                          orchi_stacks_free; tasks have ended by then, or never will
//     messages                        their results, with malloc's free: they may outlive the loop
//     the loop itself                 last, through the allocator that came with the desc
//
// A task that cannot be ended (its producer never settles) is left where it is: its frames are
// gone with its stack, and nothing of it runs any more.

static void orchi_print_unhandled(const orch_result *r, void *context) {
    (void)context;
    fprintf(stderr, "asyncorch: unhandled rejection: %s (error %d)\n", orch_message(r), r->error);
}

/* To stderr as it is: a report is a whole line. */
static void orchi_print_report(const char *text, void *context) {
    (void)context;
    fputs(text, stderr);
}

/* The only place where defaults are filled in. */
static orch_loop_desc orchi_loop_defaults(const orch_loop_desc *given) {
    orch_loop_desc desc;
    memset(&desc, 0, sizeof desc);
    if (given != NULL) desc = *given;
    if (desc.allocator.resize == NULL) desc.allocator.resize = orchi_default_resize;
    if (desc.stack_size == 0) desc.stack_size = 65536;
    if (desc.on_unhandled == NULL) desc.on_unhandled = orchi_print_unhandled;
    if (desc.on_report == NULL) desc.on_report = orchi_print_report;
    return desc;
}

/* Everything that is not zero at first. */
static void orchi_loop_init(orch_loop *loop, const orch_loop_desc *desc) {
    memset(loop, 0, sizeof *loop);
    loop->desc = *desc;
    loop->generation = 3; // 1 belongs to the static futures
    loop->main.fiber = orchi_fiber_self();
    loop->poller.ops = orchi_poller_find(desc->poller);
    loop->poller.pinned = desc->poller != ORCH_POLLER_DEFAULT;
    loop->poller.threshold = ORCHI_THRESHOLD;
    loop->poller.queue = -1;
    loop->none.fresh = ORCHI_PAGE_SLOTS;
    loop->page = &loop->none;
    orchi_round_set(loop, ORCHI_BUDGET);
    loop->random = desc->seed != 0 ? desc->seed : orchi_clock() ^ (uintptr_t)loop;
    loop->stack_log = orchi_stack_log(desc->stack_size);
    loop->join = orchi_join;
    loop->wake_open = orchi_wake_open;
    loop->trimmed = orchi_now(loop);
}

/* Makes a loop and says what went wrong. */
static int orchi_loop_make(const orch_loop_desc *given, orch_loop **made) {
    orch_loop_desc desc = orchi_loop_defaults(given);
    bool valid = orchi_poller_find(desc.poller) != NULL && orchi_stack_log(desc.stack_size) != 0 &&
                 (desc.clock == ORCH_CLOCK_MONOTONIC ||
                  (desc.clock == ORCH_CLOCK_VIRTUAL && desc.now == NULL));
    if (orchi_loop != NULL) return ORCH_ENESTED;
    if (!valid) return ORCH_EINVAL;
    void *memory = desc.allocator.resize(desc.allocator.user, NULL, 0, sizeof(orch_loop));
    if (memory == NULL) return ORCH_ENOMEM;
    orch_loop *loop = (orch_loop *)memory;
    orchi_loop_init(loop, &desc);
    int error = orchi_ring_reserve(loop, 1) ? loop->poller.ops->open(loop) : ORCH_ENOMEM;
    if (error == 0) {
        error = orchi_inbox_new(loop);
        if (error != 0) loop->poller.ops->close(loop);
    }
    if (error != 0) {
        orchi_free(loop, loop->poller.found, loop->poller.found_capacity * sizeof(orchi_found));
        orchi_ring_free(loop);
        desc.allocator.resize(desc.allocator.user, loop, sizeof *loop, 0);
        return error;
    }
    orchi_loop = *made = loop;
    orchi_fault_install(loop);
    return 0;
}

/* NULL for whatever is wrong: there is no loop that could say more. */
orch_loop *orch_loop_new(const orch_loop_desc *desc) {
    orch_loop *loop = NULL;
    int error = orchi_loop_make(desc, &loop);
    if (error == ORCH_EINVAL || error == ORCH_ENESTED) orchi_misuse("orch_loop_new", error);
    return loop;
}

/* A task that never ended, as after an error of the poller: its frames are lost, and only what it
 * was given is given back. */
static void orchi_task_discard(orch_future *f, void *context) {
    if (f->kind != ORCHI_TASK || f->as.task.task == NULL) return;
    orch_task *task = f->as.task.task;
    f->as.task.task = NULL;
    if (task->release != NULL) task->release(task->arg);
    orchi_locals_drop((orch_loop *)context, task->locals);
}

/* All stacks, and what tasks that are still on them own. */
static void orchi_stacks_free(orch_loop *loop) {
    orchi_each_slot(loop, orchi_task_discard, loop);
    orchi_maps_free(loop);
}

/* What a slot that is left still owns. */
static void orchi_discard_visit(orch_future *f, void *context) {
    orch_loop *loop = (orch_loop *)context;
    if (f->kind == ORCHI_DONE || f->kind == ORCHI_ON) {
        orch_result_free(&f->as.result);
    } else if (f->kind == ORCHI_THEN && (f->flags & ORCHI_OWNING)) {
        orchi_owned_release((orchi_owned *)f->as.then.context);
    } else if (f->kind == ORCHI_COMBINE && f->as.combine.list != NULL) {
        orchi_list_free(loop, f->as.combine.list);
    } else if (f->kind == ORCHI_HUB) {
        orch_completion *c = f->as.hub.iteration;
        orchi_free(loop, c, orchi_completion_bytes(c->count));
    } else if (f->kind == ORCHI_SCOPE) {
        orchi_scope_free_members(loop, f->as.scope.own);
    } else if (f->kind == ORCHI_SIGNAL && f->as.signal.from->single) {
        orchi_signals_dispose(f->as.signal.from);
    }
}

/* Gives everything back, whatever is left. */
static void orchi_loop_dispose(orch_loop *loop) {
    orchi_each_slot(loop, orchi_discard_visit, loop);
    orchi_fault_uninstall(loop);
    orchi_stacks_free(loop);
    loop->poller.ops->close(loop);
    orchi_free(loop, loop->poller.watches, loop->poller.watch_count * sizeof(orchi_watch));
    orchi_free(loop, loop->poller.found, loop->poller.found_capacity * sizeof(orchi_found));
    orchi_free(loop, loop->timers.entries, loop->timers.capacity * sizeof(orchi_timer));
    orchi_ring_free(loop);
    while (loop->regions != NULL) {
        orchi_region *region = loop->regions;
        loop->regions = region->next;
        orchi_unpoison_range(region, region->bytes);
        orchi_free(loop, region, region->bytes);
    }
    orch_allocator allocator = loop->desc.allocator;
    allocator.resize(allocator.user, loop, sizeof *loop, 0);
}

// How a loop ends. Only what nobody consumes is asked, and asks in turn what it waits for: so a
// task that shields keeps what it waits for, as its own request to end does not get past the
// shield. What cannot end is let go step by step, each only when nothing else can happen: first
// shields, then waits in a circle, at last (orch_run only) waits for producers that never settle.

/* What has a consumer is left to it: a task that shields keeps what it waits for. */
static void orchi_cancel_visit(orch_future *f, void *context) {
    (void)context;
    if (orchi_settled(f) || f->kind == ORCHI_HUB || (f->flags & ORCHI_LISTED)) return;
    if ((f->flags & ORCHI_WAITED) && f->waiter.one.target->kind != ORCHI_HUB) return;
    f->flags |= ORCHI_CANCEL;
    orchi_cancel(f, ORCH_ECANCELED);
}

/* Asks everything that nobody consumes, and through it all that it waits for. */
static void orchi_cancel_all(orch_loop *loop) { orchi_each_slot(loop, orchi_cancel_visit, NULL); }

/* A shielded task that was asked to end: its wait is cancelled now. */
static void orchi_expose_visit(orch_future *f, void *context) {
    if (f->kind != ORCHI_TASK) return;
    orch_task *task = f->as.task.task;
    if (task->reason == 0 || task->exposed) return;
    task->exposed = true;
    *(bool *)context = true;
    for (uint32_t level = 1; level <= task->shields; level++) {
        orchi_scopes_mark(task, NULL, level, task->reason);
    }
    orchi_cancel(orchi_task_asks(task), ORCH_ECANCELED);
}

/* In a deadlock the shields of cancelled tasks do not hold any more. Whether there were any. */
static bool orchi_expose(orch_loop *loop) {
    bool any = false;
    orchi_each_slot(loop, orchi_expose_visit, &any);
    return any;
}

/* What a pending future waits for; NULL at the end of the chain. Of many inputs the first open one
 * will do: an `all` that circles through another one is broken off as a wait that never ends. */
static orch_future *orchi_source_of(const orch_future *f) {
    uint32_t first = 0;
    if (f == NULL || orchi_settled(f) || orchi_kinds[f->kind].source == NULL) return NULL;
    return orchi_kinds[f->kind].source(f, &first);
}

enum { ORCHI_NEW, ORCHI_WALKED, ORCHI_ENDS, ORCHI_CIRCLES }; // orch_future.mark

static void orchi_unmark_visit(orch_future *f, void *context) {
    (void)context;
    f->mark = ORCHI_NEW;
}

/* Whether what f waits for goes round in a circle. Every future on the way is marked with the
 * answer, so that all walks together visit each once. */
static bool orchi_circles(orch_future *f) {
    orch_future *from = f, *at = f;
    while (at != NULL && at->mark == ORCHI_NEW) {
        at->mark = ORCHI_WALKED;
        at = orchi_source_of(at);
    }
    bool circles = at != NULL && (at->mark == ORCHI_WALKED || at->mark == ORCHI_CIRCLES);
    for (; from != NULL && from->mark == ORCHI_WALKED; from = orchi_source_of(from)) {
        from->mark = circles ? ORCHI_CIRCLES : ORCHI_ENDS;
    }
    return circles;
}

typedef struct orchi_breaking {
    bool circles; // only tasks that await each other
    bool any;
} orchi_breaking;

/* Breaks off what a task waits for: that goes on alone. */
static void orchi_break_visit(orch_future *f, void *context) {
    orchi_breaking *breaking = (orchi_breaking *)context;
    if (f->kind != ORCHI_TASK || orchi_settled(f)) return;
    orch_task *task = f->as.task.task;
    orch_future *lost = task->waiting; // NULL as well: for a descriptor, which needs no producer
    if (lost == NULL || orchi_settled(lost) || (breaking->circles && !orchi_circles(f))) return;
    if (lost->kind == ORCHI_SCOPE && orchi_scope_has_task(lost)) return; // a close waits for those
    lost->flags = (uint16_t)((lost->flags & ~ORCHI_WAITED) | ORCHI_DETACHED | ORCHI_CANCEL);
    lost->references--;
    task->waiting = orchi_rejected(ORCH_ECANCELED);
    if (task->asked == 0) task->asked = ORCH_ECANCELED;
    orchi_task_judge(task);
    orchi_push(orchi_loop_of(f), f);
    breaking->any = true;
    orchi_cancel(lost, ORCH_ECANCELED);
}

/* Nothing can end any more, as tasks await each other, or (not only `circles`) as producers do not
 * settle: their waits are broken off. Whether there were any. */
static bool orchi_break(orch_loop *loop, bool circles) {
    orchi_breaking breaking = {circles, false};
    orchi_each_slot(loop, orchi_unmark_visit, NULL);
    orchi_each_slot(loop, orchi_break_visit, &breaking);
    return breaking.any;
}

/* Asks again whenever something ran since, as what it left may have been waited for before. Answers
 * that have come are opened, too. */
static void orchi_cancel_rest(orch_loop *loop) {
    uint64_t seen;
    do {
        seen = orchi_resumes(loop);
        orchi_cancel_all(loop);
        while (!orchi_ring_empty(loop) || orchi_inbox_posted(loop)) orchi_turn(loop, 0);
    } while (seen != orchi_resumes(loop));
}

/* A circle ends only when one of its waits is broken off; what that ends may free others. */
static void orchi_end_all(orch_loop *loop) {
    do orchi_cancel_rest(loop);
    while (orchi_break(loop, true));
}

// In two steps, as answers of other threads may come during the first: after the inbox was closed,
// what was in it is worked off by the second. What lives then is held by somebody, who has never
// dropped a handle: the loop is not freed under it, and can be run on.

int orch_loop_free(orch_loop *loop) {
    int error = orchi_loop_check(loop, "orch_loop_free");
    if (error != 0) return error;
    orchi_inbox_ending(loop, true);
    orchi_end_all(loop);
    if (orch_loop_statistics(loop).futures == 0) { // what is left may get an answer yet
        orchi_inbox_close(loop);
        orchi_end_all(loop);
    }
    if (orch_loop_statistics(loop).futures > 0) {
        orchi_inbox_ending(loop, false);
        return ORCH_EBUSY;
    }
    orchi_thread_leave(loop);
    orchi_loop_dispose(loop);
    orchi_loop = NULL;
    return 0;
}

// ---- orch_run

/* What a signal does to main. */
static void orchi_run_interrupted(orch_result *in, void *context) {
    orch_loop *loop = (orch_loop *)context;
    loop->quiet = 0;
    if (in->error != 0 || loop->until == NULL || orchi_settled(loop->until)) return;
    loop->interrupted = (int)orch_int(in);
    orch_cancel(loop->until, 128 + loop->interrupted);
}

/* Waits for the two, which is no work. Not an error: there is nothing to wait for. */
static int orchi_run_catch(orch_loop *loop, orch_signals **caught) {
    *caught = NULL;
    if (!loop->desc.handle_signals) return 0;
    *caught = orchi_signals_final(loop);
    if ((*caught)->error != 0) return (*caught)->error;
    orch_future *next = orch_signals_next(*caught);
    if (orchi_settled(next)) {
        int error = next->as.result.error;
        orch_drop(next);
        return error;
    }
    loop->quiet = 1;
    orch_on(next, orchi_run_interrupted, loop);
    return 0;
}

/* What a main task that was cancelled by a signal and failed has come to. */
static orch_result orchi_run_signalled(const orch_loop *loop, orch_result r) {
    if (loop->interrupted == 0 || r.error == 0) return r;
    if (r.error == ORCH_ECANCELED) orch_result_free(&r);
    r.error = ORCH_ESIGNAL;
    r.index = (unsigned)loop->interrupted;
    return r;
}
// The steps of orch_run:
//
//     1  make a loop, start main, which runs until it first waits
//     2  turns, until main's future has settled. Nothing ready, no timer and no descriptor is a
//        deadlock; before it is reported, the shields of cancelled tasks are broken
//     3  ask all that is left to end, and turn until it has, or until nothing happens any more
//     4  free the loop, or hand it to the result of main, if that shows futures of the loop
//
// So main needs no clean-up for what it started, and valgrind finds nothing after orch_run. Step 3
// has no limit of time: a producer that said in its hook that it will still settle is waited for.

/* Runs until main has ended; a deadlock that exposing shields does not resolve is an error. */
static int orchi_run_main(orch_loop *loop, orch_future *main) {
    loop->until = main;
    while (!orchi_settled(main)) {
        int more = orchi_turn(loop, UINT64_MAX);
        if (more < 0) return more;
        if (more == 0 && !orchi_settled(main) && !orchi_expose(loop)) return orchi_deadlock(loop);
    }
    return 0;
}

/* Asks all that is left to end, what was started meanwhile included, and runs it until it has, or
 * until nothing can happen any more. What is ready may end by itself; but not for long, as a busy
 * server would go on for ever. */
static void orchi_run_rest(orch_loop *loop) {
    uint64_t seen = orchi_resumes(loop) - 1;
    for (;;) {
        uint64_t since = orchi_resumes(loop) - seen;
        if (orchi_ring_empty(loop) ? since > 0 : since > ORCHI_BUSY) {
            orchi_cancel_all(loop);
            seen = orchi_resumes(loop);
        }
        int more = orchi_turn(loop, orchi_ring_empty(loop) ? UINT64_MAX : 0);
        if (more < 0) return;
        if (more == 1 || seen != orchi_resumes(loop)) continue; // it may be asked to end first
        if (!orchi_expose(loop) && !orchi_break(loop, false)) return;
    }
}

/* The end of a loop that was kept for its result. */
static void orchi_close_kept(orch_loop *loop) {
    orch_loop *here = orchi_loop;
    orchi_loop = loop;
    orch_result_free(&loop->outcome);
    orchi_loop_dispose(loop);
    orchi_loop = here;
}

/* Whether a result needs its loop's memory. Messages and plain values do not. */
static bool orchi_shows_loop(const orch_result *r) {
    return r->release == orchi_list_release || r->release == orchi_share_release;
}

/* Frees the loop, or hands it to the result that shows its futures. */
static orch_result orchi_run_outcome(orch_loop *loop, orch_result r) {
    if (!orchi_shows_loop(&r)) {
        orchi_loop_dispose(loop);
        orchi_loop = NULL;
        return r;
    }
    orchi_fault_uninstall(loop);
    orchi_stacks_free(loop);
    orchi_loop = NULL;
    loop->outcome = r;
    loop->close = orchi_close_kept;
    r.owner = loop;
    r.release = orchi_kept_release;
    return r;
}

/* The main task of a loop, and then the rest. */
static orch_result orchi_run_all(orch_loop *loop, orch_task_fn main, void *arg) {
    orch_task_desc task = {"main", main, arg, 0, NULL, 0};
    orch_future *f = orch_go_with(&task);
    int error = orchi_run_main(loop, f);
    loop->until = NULL;
    orch_result r = orch_fail(error);
    if (error == 0) r = orchi_take_result(f);
    else orchi_release(f);
    r = orchi_run_signalled(loop, r);
    if (error == 0 && r.error != 0 && r.error != ORCH_ESIGNAL) orchi_report_seed(loop);
    orchi_inbox_ending(loop, true);
    orchi_run_rest(loop);
    orchi_inbox_close(loop);
    if (!orchi_ring_empty(loop)) orchi_run_rest(loop);
    return r;
}

/* The handler of signals is put back before the loop goes, whichever way it went. */
orch_result orch_run_with(const orch_loop_desc *desc, orch_task_fn main, void *arg) {
    orch_loop *loop = NULL;
    orch_signals *caught = NULL;
    int error = main == NULL ? ORCH_EINVAL : orchi_loop_make(desc, &loop);
    bool misuse = error == ORCH_EINVAL || error == ORCH_ENESTED;
    if (error != 0) return orch_fail(misuse ? orchi_misuse("orch_run", error) : error);
    error = orchi_run_catch(loop, &caught);
    orch_result r = error == 0 ? orchi_run_all(loop, main, arg) : orch_fail(error);
    orch_signals_free(caught);
    orchi_thread_leave(loop);
    return orchi_run_outcome(loop, r);
}

orch_result orch_run(orch_task_fn main, void *arg) { return orch_run_with(NULL, main, arg); }

/* 128 and the number, as a shell says of a program that a signal has ended. */
int orch_exit(orch_result r) {
    bool by_signal = r.error == ORCH_ESIGNAL;
    int code = by_signal ? 128 + (int)r.index : r.error != 0;
    const char *message = orch_message(&r);
    bool quiet = by_signal && message == orch_error_text(ORCH_ESIGNAL);
    if (code != 0 && !quiet) fprintf(stderr, "%s\n", message);
    orch_result_free(&r);
    return code;
}

// ------------------------------------------------------------------------------------------------
// >>kinds
//
// What each kind of future does: the function pointers by which lower layers reach upper ones (an
// input has ended, a timer is due, who waits for what). It stands below every layer that has a kind
// of its own. Left out: pointers in the futures themselves, which would cost eight bytes a slot.

static void orchi_extra_run(orch_future *f) { (void)f; } // was retired while it was queued

// One row a kind, in the order of orchi_kind_id: name, run, cancel / decided, ended, retarget, fire
// / source, label.
const orchi_kind orchi_kinds[ORCHI_KINDS] = {
    {"promise", orchi_promise_run, orchi_promise_cancel, //
     NULL, NULL, NULL, NULL,                             //
     NULL, orchi_promise_label},
    {"then", orchi_then_run, orchi_follow_cancel, //
     NULL, NULL, orchi_follow_retarget, NULL,     //
     orchi_follow_source, NULL},
    {"task", orchi_task_run, orchi_task_cancel,        //
     NULL, NULL, orchi_task_retarget, orchi_task_fire, //
     orchi_task_source, orchi_task_label},
    {"timer", orchi_done_run, orchi_timer_cancel, //
     NULL, NULL, NULL, orchi_timer_fire_future,   //
     NULL, NULL},
    {"readiness", orchi_done_run, orchi_ready_cancel, //
     NULL, NULL, NULL, orchi_ready_fire,              //
     NULL, NULL},
    {"signal", orchi_done_run, orchi_signal_cancel, //
     NULL, NULL, NULL, orchi_signal_fire,           //
     NULL, NULL},
    {"follower", orchi_follow_run, orchi_follow_cancel,       //
     orchi_follow_decided, NULL, orchi_follow_retarget, NULL, //
     orchi_follow_source, NULL},
    {"holder", orchi_done_run, orchi_proxy_cancel, //
     NULL, NULL, NULL, NULL,                       //
     orchi_follow_source, NULL},
    {"timeout", orchi_timeout_run, orchi_timeout_cancel,                     //
     orchi_timeout_decided, NULL, orchi_follow_retarget, orchi_timeout_fire, //
     orchi_follow_source, NULL},
    {"combinator", orchi_combine_run, orchi_combine_cancel,                    //
     orchi_combine_decided, orchi_combine_ended, orchi_combine_retarget, NULL, //
     orchi_combine_source, NULL},
    {"iteration", orchi_hub_run, NULL,                //
     NULL, orchi_hub_ended, orchi_hub_retarget, NULL, //
     orchi_hub_source, NULL},
    {"scope", orchi_scope_run, orchi_scope_cancel,        //
     NULL, orchi_scope_ended, orchi_scope_retarget, NULL, //
     orchi_scope_source, orchi_scope_label},
    {"deadline", orchi_done_run, NULL,      //
     NULL, NULL, NULL, orchi_deadline_fire, //
     NULL, NULL},
    {"settled", orchi_done_run, NULL, NULL, NULL, NULL, NULL, NULL, NULL},
    {"settled", orchi_on_run, NULL, NULL, NULL, NULL, NULL, NULL, NULL},
    {"memory", orchi_extra_run, NULL, NULL, NULL, NULL, NULL, NULL, NULL},
    {"mail", orchi_mail_run, NULL, NULL, NULL, NULL, NULL, NULL, NULL},
};

// ------------------------------------------------------------------------------------------------
// >>net
//
// Sockets: addresses, listening, accepting, serving, connecting, datagrams; all of it attempts, as
// section >>io calls them. Invariants:
//   - A descriptor that a call has made and not returned is closed by that call, on every path.
//   - A server (orch_serve) is an object of its own: each connection holds it, so that nothing of
//     it is gone before the last one, whatever ends first. A connection's place in the server's
//     list lies on its task's stack, and its argument is copied there: a connection costs a task
//     and no allocation.
//   - Out of descriptors, the listener is not waited for: what is readable and cannot be accepted
//     would spin.
// Left out: names in orch_listen (which address of several is meant?), socket options one by one
// (setsockopt takes the descriptor), and unlinking a Unix socket's file at the end: its name may
// be another server's by then. A file without a listener is replaced when the next one starts.

// ---- addresses

// An address is bytes, of any family. Its fields are written and read by memcpy through the struct
// of its family; the cast is for system calls, and for the family, which comes first in each.

static struct sockaddr *orchi_sockaddr(const orch_address *address) {
    return (struct sockaddr *)(uintptr_t)address->storage;
}

static int orchi_family(const orch_address *address) {
    return address->size > 0 ? orchi_sockaddr(address)->sa_family : AF_UNSPEC;
}

static void orchi_address_ipv4(orch_address *address, struct in_addr host, uint16_t port) {
    struct sockaddr_in in;
    memset(&in, 0, sizeof in);
    in.sin_family = AF_INET;
    in.sin_port = htons(port);
    in.sin_addr = host;
    address->size = sizeof in;
    memcpy(address->storage, &in, sizeof in);
}

static void orchi_address_ipv6(orch_address *address, struct in6_addr host, uint16_t port,
                               unsigned zone) {
    struct sockaddr_in6 in;
    memset(&in, 0, sizeof in);
    in.sin6_family = AF_INET6;
    in.sin6_port = htons(port);
    in.sin6_addr = host;
    in.sin6_scope_id = zone;
    address->size = sizeof in;
    memcpy(address->storage, &in, sizeof in);
}

/* "@name" is a name without a file, whose first byte is zero and whose length counts. */
static int orchi_address_path(orch_address *address, const char *path) {
    struct sockaddr_un un;
    size_t length = strlen(path), head = offsetof(struct sockaddr_un, sun_path);
    bool abstract = path[0] == '@';
    if (abstract && !ORCHI_OS_LINUX) return ORCH_EINVAL;
    if (length >= sizeof un.sun_path) return -ENAMETOOLONG;
    memset(&un, 0, sizeof un);
    un.sun_family = AF_UNIX;
    memcpy(un.sun_path, path, length);
    if (abstract) un.sun_path[0] = '\0';
    address->size = (unsigned)(abstract ? head + length : head + length + 1);
    memcpy(address->storage, &un, address->size);
    return 0;
}

// What is understood, with a port of 80 given beside it:
//
//     "127.0.0.1"       port 80            "::1"             port 80
//     "127.0.0.1:443"   port 443           "[::1]:443"       port 443
//     "fe80::1%eth0"    port 80, a zone    "", NULL, "*"     every address, port 80
//     "/run/x.sock"     a path             "@name"           a name without a file (Linux)

/* A port in digits to the end of the text. */
static int orchi_parse_port(const char *text, uint16_t *port) {
    unsigned long number = 0;
    const char *p = text;
    for (; *p >= '0' && *p <= '9' && number <= UINT16_MAX; p++) {
        number = number * 10 + (unsigned long)(*p - '0');
    }
    if (p == text || *p != '\0' || number > UINT16_MAX) return ORCH_EINVAL;
    *port = (uint16_t)number;
    return 0;
}

/* IPv6 numbers, with a zone behind a "%": the name or number of an interface. */
static int orchi_parse_ipv6(orch_address *address, char *text, uint16_t port) {
    struct in6_addr host;
    unsigned zone = 0;
    char *mark = strchr(text, '%');
    if (mark != NULL) {
        *mark = '\0';
        uint16_t number = 0;
        zone = if_nametoindex(mark + 1);
        if (zone == 0 && orchi_parse_port(mark + 1, &number) == 0) zone = number;
        if (zone == 0) return -ENODEV;
    }
    if (inet_pton(AF_INET6, text, &host) != 1) return ORCH_EINVAL;
    orchi_address_ipv6(address, host, port, zone);
    return 0;
}

/* Numbers of either kind; `text` is the caller's copy and is cut to pieces. Only one colon: what is
 * behind it is a port. */
static int orchi_parse_numbers(orch_address *address, char *text, uint16_t port) {
    struct in_addr host;
    char *close = text[0] == '[' ? strchr(text, ']') : NULL;
    char *colon = close != NULL ? close + 1 : strchr(text, ':');
    if (close != NULL) {
        *close = '\0';
        if (*colon != '\0' && *colon != ':') return ORCH_EINVAL;
        if (*colon == ':' && orchi_parse_port(colon + 1, &port) != 0) return ORCH_EINVAL;
        return orchi_parse_ipv6(address, text + 1, port);
    }
    if (colon != NULL && strchr(colon + 1, ':') != NULL) {
        return orchi_parse_ipv6(address, text, port);
    }
    if (colon != NULL) {
        *colon = '\0';
        if (orchi_parse_port(colon + 1, &port) != 0) return ORCH_EINVAL;
    }
    if (inet_pton(AF_INET, text, &host) != 1) return ORCH_EINVAL;
    orchi_address_ipv4(address, host, port);
    return 0;
}

int orch_address_parse(orch_address *address, const char *text, uint16_t port) {
    char copy[ORCH_ADDRESS_TEXT];
    if (address == NULL) return orchi_misuse("orch_address_parse", ORCH_EINVAL);
    memset(address, 0, sizeof *address);
    if (text == NULL || text[0] == '\0' || strcmp(text, "*") == 0) {
        orchi_address_ipv6(address, in6addr_any, port, 0);
        return 0;
    }
    if (text[0] == '/' || text[0] == '@') return orchi_address_path(address, text);
    if (strlen(text) >= sizeof copy) return ORCH_EINVAL;
    memcpy(copy, text, strlen(text) + 1);
    return orchi_parse_numbers(address, copy, port);
}

/* A path ends at the first zero or at the address' size; one without a file begins with a zero. */
static void orchi_path_text(const orch_address *address, char *buffer, size_t size) {
    struct sockaddr_un un;
    size_t head = offsetof(struct sockaddr_un, sun_path);
    memset(&un, 0, sizeof un);
    memcpy(&un, address->storage, address->size < sizeof un ? address->size : sizeof un);
    size_t length = address->size > head ? address->size - head : 0;
    if (length > sizeof un.sun_path) length = sizeof un.sun_path; // Linux counts a zero behind it
    bool abstract = length > 0 && un.sun_path[0] == '\0';
    if (abstract) un.sun_path[0] = '@';
    snprintf(buffer, size, "%.*s", (int)length, un.sun_path);
}

static void orchi_ipv6_text(const struct sockaddr_in6 *in, char *buffer, size_t size) {
    char host[INET6_ADDRSTRLEN] = "", zone[IF_NAMESIZE + 1] = "%";
    bool zoned = in->sin6_scope_id != 0;
    inet_ntop(AF_INET6, &in->sin6_addr, host, sizeof host);
    if (zoned && if_indextoname(in->sin6_scope_id, zone + 1) == NULL) {
        snprintf(zone + 1, sizeof zone - 1, "%u", (unsigned)in->sin6_scope_id);
    }
    snprintf(buffer, size, "[%s%s]:%u", host, zoned ? zone : "", (unsigned)ntohs(in->sin6_port));
}

const char *orch_address_text(const orch_address *address, char *buffer, size_t size) {
    char host[INET_ADDRSTRLEN] = "";
    struct sockaddr_in in;
    struct sockaddr_in6 in6;
    if (buffer == NULL || size == 0) return "";
    buffer[0] = '\0';
    int family = address != NULL ? orchi_family(address) : AF_UNSPEC;
    if (family == AF_UNIX) orchi_path_text(address, buffer, size);
    if (family == AF_INET) {
        memcpy(&in, address->storage, sizeof in);
        inet_ntop(AF_INET, &in.sin_addr, host, sizeof host);
        snprintf(buffer, size, "%s:%u", host, (unsigned)ntohs(in.sin_port));
    }
    if (family == AF_INET6) {
        memcpy(&in6, address->storage, sizeof in6);
        orchi_ipv6_text(&in6, buffer, size);
    }
    return buffer;
}

uint16_t orch_address_port(const orch_address *address) {
    struct sockaddr_in in; // the port is at the same place in both
    int family = address != NULL ? orchi_family(address) : AF_UNSPEC;
    if (family != AF_INET && family != AF_INET6) return 0;
    memcpy(&in, address->storage, sizeof in);
    return ntohs(in.sin_port);
}

/* What both ask for; they differ in the call. */
static int orchi_address_of(const char *function, int fd, orch_address *address,
                            int (*ask)(int, struct sockaddr *, socklen_t *)) {
    socklen_t size = sizeof address->storage;
    if (address == NULL) return orchi_misuse(function, ORCH_EINVAL);
    memset(address, 0, sizeof *address);
    if (ask(fd, orchi_sockaddr(address), &size) < 0) return -errno;
    address->size = (unsigned)size;
    return 0;
}

/* Not passed by name, as some systems declare getsockname with a parameter type of their own. */
static int orchi_getsockname(int fd, struct sockaddr *to, socklen_t *size) {
    return getsockname(fd, to, size);
}

static int orchi_getpeername(int fd, struct sockaddr *to, socklen_t *size) {
    return getpeername(fd, to, size);
}

int orch_socket_address(int fd, orch_address *address) {
    return orchi_address_of("orch_socket_address", fd, address, orchi_getsockname);
}

int orch_socket_peer(int fd, orch_address *address) {
    return orchi_address_of("orch_socket_peer", fd, address, orchi_getpeername);
}

// ---- making sockets

#if !ORCHI_MAKES_PRIVATE
static int orchi_socket(int family, int type) { return orchi_private(socket(family, type, 0)); }
static int orchi_accept_call(int fd, struct sockaddr *from, socklen_t *size) {
    return orchi_private(accept(fd, from, size));
}
#else
static int orchi_socket(int family, int type) {
    return socket(family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
}
static int orchi_accept_call(int fd, struct sockaddr *from, socklen_t *size) {
    return accept4(fd, from, size, SOCK_NONBLOCK | SOCK_CLOEXEC);
}
#endif

/* Closes a descriptor that is not handed over after all. Returns the error that it is for. */
static int orchi_close_for(int fd, int error) {
    orch_close(fd);
    return error;
}

static int orchi_option(int fd, int level, int name, int value) {
    return setsockopt(fd, level, name, &value, sizeof value) < 0 ? -errno : 0;
}

static bool orchi_is_inet(const orch_address *address) {
    int family = orchi_family(address);
    return family == AF_INET || family == AF_INET6;
}

// SO_REUSEADDR for streams only: it lets a server start again while connections of its predecessor
// linger, and for datagrams it would let two programs take the same port.

/* A socket bound to an address. On IPv6 "every address" takes IPv4 too. */
static int orchi_bound(const orch_address *address, int type, bool reuse_port) {
    int fd = orchi_socket(orchi_family(address), type);
    if (fd < 0) return -errno;
    bool inet = orchi_is_inet(address), stream = type == SOCK_STREAM;
    int error = inet && stream ? orchi_option(fd, SOL_SOCKET, SO_REUSEADDR, 1) : 0;
    if (error == 0 && reuse_port) error = orchi_option(fd, SOL_SOCKET, SO_REUSEPORT, 1);
    if (orchi_family(address) == AF_INET6) orchi_option(fd, IPPROTO_IPV6, IPV6_V6ONLY, 0);
    if (error == 0 && bind(fd, orchi_sockaddr(address), address->size) < 0) error = -errno;
    return error != 0 ? orchi_close_for(fd, error) : fd;
}

/* The same by host; where a machine has no IPv6, "every address" is every IPv4 address. */
static int orchi_bound_host(const char *host, uint16_t port, int type, bool reuse_port) {
    orch_address address;
    struct in_addr any;
    if (host != NULL && strcmp(host, "localhost") == 0) host = "127.0.0.1";
    int error = orch_address_parse(&address, host, port);
    if (error != 0) return error;
    if (!orchi_is_inet(&address)) return ORCH_EINVAL;
    int fd = orchi_bound(&address, type, reuse_port);
    bool everywhere = host == NULL || host[0] == '\0' || host[0] == '*';
    if (!everywhere || (fd != -EAFNOSUPPORT && fd != -EADDRNOTAVAIL)) return fd;
    any.s_addr = htonl(INADDR_ANY);
    orchi_address_ipv4(&address, any, port);
    return orchi_bound(&address, type, reuse_port);
}

/* Whether a Unix socket's file is there and nobody listens at it. A full backlog is somebody. */
static bool orchi_is_stale(const orch_address *address, const char *path) {
    struct stat about;
    if (path[0] == '@' || lstat(path, &about) < 0 || !S_ISSOCK(about.st_mode)) return false;
    int fd = orchi_socket(AF_UNIX, SOCK_STREAM);
    if (fd < 0) return false;
    bool refused = connect(fd, orchi_sockaddr(address), address->size) < 0 && errno == ECONNREFUSED;
    orch_close(fd);
    return refused;
}

static int orchi_bound_path(const char *path) {
    orch_address address;
    memset(&address, 0, sizeof address);
    int error = path[0] != '\0' ? orchi_address_path(&address, path) : ORCH_EINVAL;
    if (error != 0) return error;
    int fd = orchi_bound(&address, SOCK_STREAM, false);
    if (fd != -EADDRINUSE || !orchi_is_stale(&address, path)) return fd;
    if (unlink(path) < 0) return -errno;
    return orchi_bound(&address, SOCK_STREAM, false);
}

/* Accepted connections inherit TCP_NODELAY from the listener, so that it costs none of them a
 * call. */
int orch_listen(const orch_listen_desc *desc) {
    if (desc == NULL) return orchi_misuse("orch_listen", ORCH_EINVAL);
    int fd = desc->path != NULL
                 ? orchi_bound_path(desc->path)
                 : orchi_bound_host(desc->host, desc->port, SOCK_STREAM, desc->reuse_port);
    if (fd < 0) return fd;
    if (desc->path == NULL && !desc->nagle) orchi_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    if (listen(fd, desc->backlog > 0 ? desc->backlog : SOMAXCONN) < 0) {
        return orchi_close_for(fd, -errno);
    }
    return orchi_adopt(fd, 0);
}

/* With a peer and no address of its own it is not bound: the system chooses one. */
static int orchi_udp_socket(const orch_udp_desc *desc) {
    const orch_address *peer = desc->peer;
    if (peer == NULL || desc->host != NULL || desc->port != 0) {
        return orchi_bound_host(desc->host, desc->port, SOCK_DGRAM, desc->reuse_port);
    }
    int fd = orchi_socket(orchi_family(peer), SOCK_DGRAM);
    return fd < 0 ? -errno : fd;
}

int orch_udp(const orch_udp_desc *desc) {
    orch_udp_desc none;
    memset(&none, 0, sizeof none);
    if (desc == NULL) desc = &none;
    int fd = orchi_udp_socket(desc);
    if (fd < 0) return fd;
    const orch_address *peer = desc->peer;
    if (peer != NULL && connect(fd, orchi_sockaddr(peer), peer->size) < 0) {
        return orchi_close_for(fd, -errno);
    }
    return orchi_adopt(fd, ORCHI_DATAGRAMS);
}

// ---- sending and receiving

/* Out-of-band data makes nothing readable: what the last read saw says nothing of it. */
static void orchi_watch_forget_dry(int fd) {
    orch_loop *loop = orchi_loop;
    bool known = loop != NULL && fd >= 0 && (size_t)fd < loop->poller.watch_count;
    if (known) orchi_watch_hint(&loop->poller.watches[fd], ORCHI_DRY, false);
}

ptrdiff_t orch_socket_recv(int fd, void *buffer, size_t size, int flags) {
    orchi_transfer t = {(char *)buffer, size, 0, flags, 0, NULL, NULL};
    if (flags & MSG_OOB) orchi_watch_forget_dry(fd);
    return orchi_io_memory("orch_socket_recv", fd, ORCH_READABLE, orchi_attempt_recv, &t);
}

/* Flags are the system's own, and MSG_DONTWAIT is always among them: none can block the loop. */
ptrdiff_t orch_socket_send(int fd, const void *data, size_t size, int flags) {
    orchi_transfer t = {(char *)(uintptr_t)data, size, 0, flags, 0, NULL, NULL};
    return orchi_io_memory("orch_socket_send", fd, ORCH_WRITABLE, orchi_attempt_send, &t);
}

/* What was cut off is told by the system in a flag. */
static ptrdiff_t orchi_attempt_recvfrom(int fd, orchi_watch *watch, orchi_transfer *t) {
    struct iovec part = {t->data, t->size};
    struct msghdr message;
    orch_address from;
    ptrdiff_t n;
    (void)watch;
    memset(&message, 0, sizeof message);
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_name = from.storage;
    do {
        message.msg_namelen = sizeof from.storage;
        n = recvmsg(fd, &message, MSG_DONTWAIT);
    } while (n < 0 && errno == EINTR);
    if (n < 0) return -errno;
    from.size = (unsigned)message.msg_namelen;
    if (t->address != NULL) {
        t->address->size = from.size;
        memcpy(t->address->storage, from.storage, from.size);
    }
    return message.msg_flags & MSG_TRUNC ? -EMSGSIZE : n;
}

ptrdiff_t orch_socket_recvfrom(int fd, void *buffer, size_t size, orch_address *from) {
    orchi_transfer t = {(char *)buffer, size, 0, 0, 0, NULL, from};
    return orchi_io_memory("orch_socket_recvfrom", fd, ORCH_READABLE, orchi_attempt_recvfrom, &t);
}

/* A datagram goes as a whole or not at all: there is nothing to go on with. */
static ptrdiff_t orchi_attempt_sendto(int fd, orchi_watch *watch, orchi_transfer *t) {
    const orch_address *to = t->address;
    ptrdiff_t n;
    orchi_quiet(fd, watch);
    do {
        n = sendto(fd, t->data, t->size, MSG_DONTWAIT | ORCHI_NOSIGNAL, orchi_sockaddr(to),
                   to->size);
    } while (n < 0 && errno == EINTR);
    return n < 0 ? -errno : n;
}

ptrdiff_t orch_socket_sendto(int fd, const void *data, size_t size, const orch_address *to) {
    orch_address *address = (orch_address *)(uintptr_t)to;
    orchi_transfer t = {(char *)(uintptr_t)data, size, 0, 0, 0, NULL, address};
    if (to == NULL) return orchi_misuse("orch_socket_sendto", ORCH_EINVAL);
    return orchi_io_memory("orch_socket_sendto", fd, ORCH_WRITABLE, orchi_attempt_sendto, &t);
}

// ---- accepting

/* A connection that failed while it waited: accept(2) reports it, and the next one may be fine. */
static bool orchi_accept_again(int error) {
    static const int passed[] = {EINTR, ECONNABORTED, EPROTO,      ENETDOWN,    ENOPROTOOPT,
                                 EPERM, EHOSTDOWN,    ENETUNREACH, EHOSTUNREACH};
    for (size_t i = 0; i < sizeof passed / sizeof passed[0]; i++) {
        if (error == passed[i]) return true;
    }
    return false;
}

enum { ORCHI_PASSED_OVER = 64 }; // failed connections, until others have their turn

/* A client that connects and resets in a loop must not keep this one from ever waiting. */
static ptrdiff_t orchi_attempt_accept(int fd, orchi_watch *watch, orchi_transfer *t) {
    (void)watch;
    for (int i = 0; i < ORCHI_PASSED_OVER; i++) {
        socklen_t size = sizeof t->address->storage;
        struct sockaddr *from = t->address != NULL ? orchi_sockaddr(t->address) : NULL;
        int made = orchi_accept_call(fd, from, from != NULL ? &size : NULL);
        if (made < 0 && orchi_accept_again(errno)) continue;
        if (made < 0) return -errno;
        if (t->address != NULL) t->address->size = (unsigned)size;
        return orchi_adopt(made, 0);
    }
    return -EAGAIN;
}

int orch_accept(int listener, orch_address *from) {
    orchi_transfer t = {NULL, 0, 0, 0, 0, NULL, from};
    return (int)orchi_io("orch_accept", listener, ORCH_READABLE, orchi_attempt_accept, &t);
}

// ---- serving
//
// The life of a server:
//
//     accepting   a task for each connection, which runs at once until it first waits
//     pausing     at max_connections, or out of descriptors or memory: woken by each connection
//                 that ends; in the second case after 100 ms too, as others may hold what it needs
//     draining    listens no more; connections have drain_ms to end, then are cancelled; it waits
//                 for the last one. This is shielded, and nothing in it can fail for good

typedef struct orchi_connection orchi_connection;

typedef struct orchi_server {
    orch_loop *loop;
    orchi_connection *first;
    orch_promise wake; // settled when a connection ends
    size_t count;      // connections
    size_t holders;    // and orch_serve itself: the last one frees it
    bool short_of;     // descriptors or memory, which was told
    orch_result (*handler)(int fd, void *context);
    orch_serve_desc desc;
} orchi_server;

typedef struct orchi_accepted { // the argument of a connection's task
    orchi_server *server;
    int fd;
} orchi_accepted;

struct orchi_connection { // on its stack
    orchi_connection *next, **link;
    orch_future *future;
};

enum { ORCHI_CONNECTIONS = 16384, ORCHI_DRAIN_MS = 5000, ORCHI_SHORT_MS = 100 };

static void orchi_server_leave(orchi_server *s) {
    if (--s->holders == 0) orchi_free(s->loop, s, sizeof *s);
}

/* A connection's error is nobody's result, so it is told, and where nobody listens, reported. */
static void orchi_server_tell(const orchi_server *s, const orch_result *r) {
    if (s->desc.on_error != NULL) s->desc.on_error(r, s->desc.context);
    else orchi_unhandled(s->loop, r);
}

// The order at the end: the descriptor first, so that the client hears at once; out of the list
// before on_error runs, so that a drain does not ask a task that is as good as gone; the count
// last, as it is what a full server and a drain wait for. After it nothing of the user's runs.

static orch_result orchi_connection_main(void *arg) {
    const orchi_accepted *accepted = (const orchi_accepted *)arg;
    orchi_server *s = accepted->server;
    orchi_connection self = {s->first, &s->first, s->loop->current->future};
    if (s->first != NULL) s->first->link = &self.next;
    s->first = &self;
    orch_result r = orchi_outcome(s->handler(accepted->fd, s->desc.context));
    orch_close(accepted->fd);
    *self.link = self.next;
    if (self.next != NULL) self.next->link = self.link;
    bool asked = r.error == ORCH_ECANCELED && (self.future->flags & ORCHI_CANCEL);
    if (r.error != 0 && !asked) orchi_server_tell(s, &r);
    orch_result_free(&r);
    s->count--;
    orch_settle(s->wake, orch_ok(NULL, NULL));
    orchi_server_leave(s);
    return orch_ok(NULL, NULL);
}

/* A connection's task. Without memory for one its client is closed, and told about. */
static void orchi_server_start(orchi_server *s, int fd) {
    orchi_accepted accepted = {s, fd};
    orch_task_desc task = {s->desc.name, orchi_connection_main, &accepted, sizeof accepted,
                           NULL,         s->desc.stack_size};
    s->count++;
    s->holders++;
    orch_future *f = orchi_begin(&task, NULL, false, "orch_serve");
    if (!orchi_is_static(f)) {
        orch_detach(f);
        return;
    }
    s->count--;
    s->holders--;
    orch_close(fd);
    orchi_server_tell(s, &f->as.result);
}

/* Waits until a connection ends. Out of memory for that others have a turn. Returns 0, or
 * ORCH_ECANCELED. */
static int orchi_server_pause(orchi_server *s, uint64_t ms) {
    orch_future *f = orch_future_new(&s->wake);
    if (ms != UINT64_MAX) f = orch_timeout(f, ms);
    orch_result r = orch_await(f);
    int error = r.error;
    orch_result_free(&r);
    if (error == ORCH_ENOMEM) error = orch_yield();
    return error == ORCH_ECANCELED ? error : 0;
}

static bool orchi_is_short(int error) {
    return error == -EMFILE || error == -ENFILE || error == -ENOBUFS || error == -ENOMEM;
}

/* Told once until a connection was accepted again. */
static int orchi_server_short(orchi_server *s, int error) {
    if (!s->short_of) {
        orch_result r = orch_fail(error);
        orchi_server_tell(s, &r);
    }
    s->short_of = true;
    return orchi_server_pause(s, ORCHI_SHORT_MS);
}

/* Whether to stop listening. Where clients never end, accepting never waits and is never refused;
 * and a listener that was closed while nobody waited for it may be another's number by now. */
static bool orchi_server_ends(const orchi_server *s, int listener, uint16_t generation) {
    return orchi_must_end(s->loop->current) ||
           s->loop->poller.watches[listener].generation != generation;
}

static int orchi_server_accept(orchi_server *s, int listener, uint16_t generation) {
    int error = 0;
    while (error == 0) {
        if (orchi_server_ends(s, listener, generation)) return ORCH_ECANCELED;
        if (s->count >= s->desc.max_connections) {
            error = orchi_server_pause(s, UINT64_MAX);
            continue;
        }
        int fd = orch_accept(listener, NULL);
        if (fd >= 0) {
            s->short_of = false;
            orchi_server_start(s, fd);
        } else {
            error = orchi_is_short(fd) ? orchi_server_short(s, fd) : fd;
        }
    }
    return error;
}

/* Asking runs nothing, so the list stays as it is. */
static void orchi_server_cancel(orchi_server *s) {
    for (orchi_connection *c = s->first; c != NULL; c = c->next) {
        c->future->flags |= ORCHI_CANCEL;
        orchi_cancel(c->future, ORCH_ECANCELED);
    }
}

/* Each connection that ends ends a pause, so the time that is left is worked out anew. Behind the
 * shield a cancellation is no reason to leave connections behind. */
static void orchi_server_drain(orchi_server *s) {
    orch_shield_begin();
    uint64_t start = orch_now(), gone = 0;
    int error = s->desc.no_drain ? ORCH_ECANCELED : 0;
    while (error == 0 && s->count > 0 && gone < s->desc.drain_ms) {
        error = orchi_server_pause(s, s->desc.drain_ms - gone);
        gone = orch_now() - start;
    }
    orchi_server_cancel(s);
    error = 0;
    while (error == 0 && s->count > 0) error = orchi_server_pause(s, UINT64_MAX);
    orch_shield_end();
}

static orchi_server *orchi_server_new(orch_result (*handler)(int fd, void *context),
                                      const orch_serve_desc *desc) {
    orchi_server *s = (orchi_server *)orchi_allocate(orchi_loop, sizeof *s);
    if (s == NULL) return NULL;
    memset(s, 0, sizeof *s);
    s->loop = orchi_loop;
    s->holders = 1;
    s->handler = handler;
    if (desc != NULL) s->desc = *desc;
    if (s->desc.max_connections == 0) s->desc.max_connections = ORCHI_CONNECTIONS;
    if (s->desc.drain_ms == 0) s->desc.drain_ms = ORCHI_DRAIN_MS;
    if (s->desc.name == NULL) s->desc.name = "connection";
    return s;
}

/* Asked once and before: a stack size that no task can have would fail every connection. */
static int orchi_serve_error(orch_result (*handler)(int fd, void *context),
                             const orch_serve_desc *desc) {
    int error;
    uint32_t size_log = 0;
    orch_task_desc task = {NULL, orchi_connection_main, NULL, 0, NULL, 0};
    if (orchi_here_task("orch_serve", &error) == NULL) return error;
    if (desc != NULL) task.stack_size = desc->stack_size;
    error = handler == NULL ? ORCH_EINVAL : orchi_task_error(&task, &size_log);
    return error != 0 ? orchi_misuse("orch_serve", error) : 0;
}

/* Closes the listener, unless somebody did, which ended the accepting: the number may be another's
 * by then. */
int orch_serve(int listener, orch_result (*handler)(int fd, void *context),
               const orch_serve_desc *desc) {
    int error = orchi_serve_error(handler, desc);
    if (error == 0) error = listener < 0 ? -EBADF : orchi_watch_reserve(orchi_loop, listener);
    orchi_server *s = error == 0 ? orchi_server_new(handler, desc) : NULL;
    if (s == NULL) return orchi_close_for(listener, error != 0 ? error : ORCH_ENOMEM);
    uint16_t generation = orchi_loop->poller.watches[listener].generation;
    error = orchi_server_accept(s, listener, generation);
    if (orchi_loop->poller.watches[listener].generation == generation) orch_close(listener);
    orchi_server_drain(s);
    orchi_server_leave(s);
    return error;
}

// ---- connecting
//
// RFC 8305: addresses are tried in the order given, but families take turns, so that a broken IPv6
// costs one delay and not one for each address. Attempts that are under way stay; the first one to
// connect wins. Here with three addresses, of which the first hangs and the second refuses:
//
//     0 ms    2001:db8::1 begins                     waits
//     250 ms  192.0.2.1 begins, is refused           noted, and the next one starts at once
//     250 ms  2001:db8::2 begins, and connects       wins; the first is closed
//
// All of this is one task's loop over a list of descriptors: nothing can win after the call has
// returned, and nothing but this list has to be closed.

typedef struct orchi_dialed {
    const orch_address *address; // in the order of trying
    const orch_address *to;      // of an attempt under way
    int fd;
} orchi_dialed;

typedef struct orchi_dial {
    orch_loop *loop;
    const orch_connect_desc *desc;
    orchi_dialed *tries;
    orch_future **futures; // room for one per attempt, and a timer
    size_t count, started, open;
    size_t written; // of desc->message
    int error;      // of the first that failed
} orchi_dial;

/* What became of an address. */
static void orchi_dial_note(orchi_dial *d, const orch_address *to, int error) {
    char text[ORCH_ADDRESS_TEXT];
    const orch_connect_desc *desc = d->desc;
    if (d->error == 0) d->error = error;
    if (desc->message == NULL || d->written >= desc->message_size) return;
    orch_address_text(to, text, sizeof text);
    const char *between = d->written > 0 ? "; " : "";
    int n = snprintf(desc->message + d->written, desc->message_size - d->written, "%s%s: %s",
                     between, text, orch_error_text(error));
    if (n > 0) d->written += (size_t)n;
}

/* Begins to connect one address: a descriptor, or an error. */
static int orchi_dial_begin(const orch_connect_desc *desc, const orch_address *to) {
    if (desc->begin != NULL) return desc->begin(to, desc->context);
    int fd = orchi_socket(orchi_family(to), SOCK_STREAM);
    if (fd < 0) return -errno;
    if (orchi_is_inet(to) && !desc->nagle) orchi_option(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    bool begun =
        connect(fd, orchi_sockaddr(to), to->size) == 0 || errno == EINPROGRESS || errno == EINTR;
    return begun ? fd : orchi_close_for(fd, -errno);
}

/* A Unix socket whose backlog is full says EAGAIN, and nothing tells when there is room. */
static int orchi_dial_patiently(const orch_connect_desc *desc, const orch_address *to) {
    int fd = orchi_dial_begin(desc, to), error = 0;
    for (uint64_t ms = 1; fd == -EAGAIN && orchi_family(to) == AF_UNIX;
         ms = ms < 64 ? 2 * ms : ms) {
        error = orch_sleep(ms);
        if (error != 0) return error;
        fd = orchi_dial_begin(desc, to);
    }
    return fd;
}

/* Starts the next attempt. Returns -EAGAIN to go on, whatever became of it, or ORCH_ECANCELED. */
static int orchi_dial_start(orchi_dial *d) {
    const orch_address *to = d->tries[d->started++].address;
    int fd = orchi_dial_patiently(d->desc, to);
    if (fd == ORCH_ECANCELED && orchi_must_end(d->loop->current)) return fd;
    if (fd < 0) {
        orchi_dial_note(d, to, fd);
        return -EAGAIN;
    }
    orchi_adopt(fd, 0);
    d->tries[d->open].to = to;
    d->tries[d->open++].fd = fd;
    return -EAGAIN;
}

/* What a descriptor that is writable came to. What is no socket is connected. */
static int orchi_dial_outcome(int fd) {
    int error = 0;
    socklen_t size = sizeof error;
    if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &error, &size) < 0) return 0;
    return -error;
}

/* An attempt has ended: its descriptor, or the next one starts at once. */
static int orchi_dial_ended(orchi_dial *d, size_t i, int error, bool *next) {
    orchi_dialed ended = d->tries[i];
    d->tries[i].to = d->tries[--d->open].to;
    d->tries[i].fd = d->tries[d->open].fd;
    if (error == 0) error = orchi_dial_outcome(ended.fd);
    if (error == 0) return ended.fd;
    orch_close(ended.fd);
    orchi_dial_note(d, ended.to, error);
    *next = true;
    return -EAGAIN;
}

// Each wait is a race made anew over the attempts that are under way, and a timer. Rebuilding it
// costs as many slots as there are attempts, which are few, and nothing of one is left in the next.

/* Waits until an attempt ends or the next is due. Returns a connected descriptor, -EAGAIN to go on,
 * or an error that ends it all. */
static int orchi_dial_wait(orchi_dial *d, bool *next) {
    size_t count = d->open;
    for (size_t i = 0; i < count; i++) d->futures[i] = orch_ready(d->tries[i].fd, ORCH_WRITABLE);
    if (d->started < d->count) d->futures[count++] = orch_after(d->desc->delay_ms);
    orch_result r = orch_await(orch_race_n(count, d->futures));
    size_t index = r.index;
    int error = r.error;
    orch_result_free(&r);
    if (error == ORCH_ECANCELED || error == ORCH_ENOMEM) return error;
    if (index < d->open) return orchi_dial_ended(d, index, error, next);
    *next = true;
    return -EAGAIN;
}

/* `next`: the next attempt need not wait for its delay. With none under way there is nothing to
 * wait for, and with none left either, the first error is what all came to. */
static int orchi_dial_run(orchi_dial *d) {
    bool next = true;
    int fd = -EAGAIN;
    while (fd == -EAGAIN) {
        if (d->started < d->count && (next || d->open == 0)) {
            size_t open = d->open;
            fd = orchi_dial_start(d);
            next = d->open == open; // it has failed at once
        } else {
            fd = d->open > 0 ? orchi_dial_wait(d, &next) : d->error;
        }
    }
    return fd;
}

/* RFC 8305, section 4: the first address leads; families take turns while both are left. */
static void orchi_dial_order(orchi_dial *d, const orch_address *list) {
    size_t at[2] = {0, 0}; // where the first family's, and the others', were taken up to
    int first = orchi_family(&list[0]);
    for (size_t i = 0; i < d->count; i++) {
        size_t turn = i % 2, tried = 0;
        for (; tried < 2; tried++, turn = 1 - turn) {
            while (at[turn] < d->count && (orchi_family(&list[at[turn]]) == first) != (turn == 0)) {
                at[turn]++;
            }
            if (at[turn] < d->count) break;
        }
        d->tries[i].address = &list[at[turn]++];
    }
}

/* Tries a list of addresses. What is still open at the end has lost. */
static int orchi_dial_list(const orch_connect_desc *desc, const orch_address *list, size_t count) {
    orch_loop *loop = orchi_loop;
    size_t bytes = count * sizeof(orchi_dialed) + (count + 1) * sizeof(orch_future *);
    if (count > UINT16_MAX) return ORCH_EINVAL;
    if (count == 0) return ORCH_EHOST; // a name whose addresses were all too large
    char *memory = (char *)orchi_allocate(loop, bytes);
    if (memory == NULL) return ORCH_ENOMEM;
    orchi_dial d;
    memset(&d, 0, sizeof d);
    d.loop = loop;
    d.desc = desc;
    d.tries = (orchi_dialed *)(void *)memory;
    d.futures = (orch_future **)(void *)(memory + count * sizeof(orchi_dialed));
    d.count = count;
    orchi_dial_order(&d, list);
    int fd = orchi_dial_run(&d);
    while (d.open > 0) orch_close(d.tries[--d.open].fd);
    orchi_free(loop, memory, bytes);
    return fd;
}

/* What was resolved belongs to the result, and is looked at until the dialing is over. */
static int orchi_dial_name(const orch_connect_desc *desc) {
    orch_result r = orch_await(orch_resolve(desc->host, desc->service));
    int fd = r.error;
    if (r.error == 0) {
        const orch_addresses *found = (const orch_addresses *)r.value;
        fd = orchi_dial_list(desc, found->items, found->count);
    } else if (desc->message != NULL && desc->message_size > 0) {
        snprintf(desc->message, desc->message_size, "%s", orch_message(&r));
    }
    orch_result_free(&r);
    return fd;
}

static int orchi_dial_path(const orch_connect_desc *desc) {
    orch_address address;
    memset(&address, 0, sizeof address);
    int error = desc->path[0] != '\0' ? orchi_address_path(&address, desc->path) : ORCH_EINVAL;
    return error != 0 ? error : orchi_dial_list(desc, &address, 1);
}

/* The desc is copied for its defaults, as the caller's is const. */
static int orchi_connect(const char *function, const orch_connect_desc *desc) {
    int error;
    if (orchi_here_task(function, &error) == NULL) return error;
    if (desc == NULL) return orchi_misuse(function, ORCH_EINVAL);
    bool listed = desc->addresses != NULL, named = desc->host != NULL || desc->service != NULL;
    if ((listed && desc->count == 0) || (!listed && !named && desc->path == NULL)) {
        return orchi_misuse(function, ORCH_EINVAL);
    }
    orch_connect_desc full = *desc;
    if (full.delay_ms == 0) full.delay_ms = 250;
    if (full.message != NULL && full.message_size > 0) full.message[0] = '\0';
    if (listed) return orchi_dial_list(&full, full.addresses, full.count);
    return full.path != NULL ? orchi_dial_path(&full) : orchi_dial_name(&full);
}

int orch_connect_with(const orch_connect_desc *desc) {
    return orchi_connect("orch_connect_with", desc);
}

int orch_connect(const char *host, const char *service) {
    orch_connect_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.host = host;
    desc.service = service;
    return orchi_connect("orch_connect", &desc);
}

// ------------------------------------------------------------------------------------------------
// >>file
//
// Files, for tasks: each call is a piece of offloaded work on memory of its own. Invariants:
//   - An operation has copies of all that it needs, and room for what it brings. The thread has it
//     while it works, then the result; whoever frees the result frees it, so that a call that was
//     cancelled leaves nothing behind, not even a descriptor.
//   - The caller's memory is read before the work begins, and written after it has come back, by
//     the caller: never while the caller may be gone.
// Left out: io_uring, which does this without a thread, but only on Linux and not in every
// container; and a call for every system call there is: orch_offload runs the others.

// The life of an operation:
//
//     the task     makes it, with copies of all that it needs, and offloads it
//     the thread   calls fn, and marks it as moved: the result owns it now, and the job's release,
//                  which runs next, leaves it alone
//     the task     copies out what it has brought, and frees the result, which frees it all
//     cancelled    queued: the job's release frees it. Running: its result comes home to nobody,
//                  and is freed there: an opened descriptor is closed, what was read is dropped

typedef struct orchi_file {
    int (*fn)(struct orchi_file *op); // on the thread: 0, or -errno
    int error;
    int fd, flags, mode;
    bool opened; // fd is its own
    bool moved;  // the result owns it
    uint64_t offset;
    size_t size, done;   // bytes, of `bytes`
    orch_file_info info; // brought
    orch_buffer *loaded; // brought
    char *path, *to;     // behind it, as is
    char *bytes;
} orchi_file;

enum { ORCHI_FILE_PIECE = 1 << 20, ORCHI_FILE_FIRST = 4096, ORCHI_FILE_TRIES = 100 };

#if ORCHI_OS_MACOS
#define ORCHI_MODIFIED(st) ((st).st_mtimespec)
#else
#define ORCHI_MODIFIED(st) ((st).st_mtim)
#endif

// ---- on the thread

/* A call that a signal interrupted is made again; a pool thread gets none, but others may. */
static ssize_t orchi_file_some(const orchi_file *op, bool writes, char *at, size_t size) {
    off_t offset = (off_t)(op->offset + op->done);
    ssize_t n = -1;
    do n = writes ? pwrite(op->fd, at, size, offset) : pread(op->fd, at, size, offset);
    while (n < 0 && errno == EINTR);
    return n;
}

/* A read that brings nothing is at the end. A write that takes nothing would go on for ever. */
static int orchi_file_move(orchi_file *op, bool writes) {
    while (op->done < op->size) {
        ssize_t n = orchi_file_some(op, writes, op->bytes + op->done, op->size - op->done);
        if (n < 0) return -errno;
        if (n == 0) return writes ? -EIO : 0;
        op->done += (size_t)n;
    }
    return 0;
}

static int orchi_file_do_read(orchi_file *op) { return orchi_file_move(op, false); }
static int orchi_file_do_write(orchi_file *op) { return orchi_file_move(op, true); }
static int orchi_file_do_sync(orchi_file *op) { return fsync(op->fd) == 0 ? 0 : -errno; }
static int orchi_file_do_remove(orchi_file *op) { return remove(op->path) == 0 ? 0 : -errno; }
static int orchi_file_do_rename(orchi_file *op) {
    return rename(op->path, op->to) == 0 ? 0 : -errno;
}
static int orchi_file_do_truncate(orchi_file *op) {
    return ftruncate(op->fd, (off_t)op->offset) == 0 ? 0 : -errno;
}

/* Close-on-exec always: the program has threads, and any of them may start another one. */
static int orchi_file_do_open(orchi_file *op) {
    do op->fd = open(op->path, op->flags | O_CLOEXEC, op->mode);
    while (op->fd < 0 && errno == EINTR);
    op->opened = op->fd >= 0;
    return op->opened ? 0 : -errno;
}

static int orchi_file_do_stat(orchi_file *op) {
    struct stat st;
    if (stat(op->path, &st) != 0) return -errno;
    op->info.size = (uint64_t)st.st_size;
    op->info.modified_ns =
        (int64_t)ORCHI_MODIFIED(st).tv_sec * 1000000000 + (int64_t)ORCHI_MODIFIED(st).tv_nsec;
    op->info.mode = (unsigned)st.st_mode & 07777u;
    op->info.is_file = S_ISREG(st.st_mode);
    op->info.is_directory = S_ISDIR(st.st_mode);
    return 0;
}

/* Room for so many bytes and the NUL, in the block that the result will show. */
static bool orchi_file_reserve(orchi_file *op, size_t size) {
    void *grown = realloc(op->loaded, sizeof(orch_buffer) + size + 1);
    if (grown == NULL) return false;
    op->loaded = (orch_buffer *)grown;
    op->loaded->data = (char *)(op->loaded + 1);
    return true;
}

/* To the end, whatever the size was said to be: it may grow meanwhile, and /proc says 0. */
static int orchi_file_read_all(orchi_file *op, size_t room) {
    for (;;) {
        if (op->done == room) room *= 2;
        if (!orchi_file_reserve(op, room)) return ORCH_ENOMEM;
        ssize_t n = read(op->fd, op->loaded->data + op->done, room - op->done);
        if (n == 0) break;
        if (n < 0 && errno != EINTR) return -errno;
        if (n > 0) op->done += (size_t)n;
    }
    op->loaded->size = op->done;
    op->loaded->data[op->done] = '\0';
    return 0;
}

/* The size that was said is a first guess, with one byte more to see the end by. */
static int orchi_file_do_load(orchi_file *op) {
    struct stat st;
    op->flags = O_RDONLY;
    int error = orchi_file_do_open(op);
    if (error != 0) return error;
    if (fstat(op->fd, &st) != 0) return -errno;
    bool known = st.st_size > 0 && (uint64_t)st.st_size < SIZE_MAX / 4;
    return orchi_file_read_all(op, known ? (size_t)st.st_size + 1 : 0u + ORCHI_FILE_FIRST);
}

// How a file is replaced: "data.json" is written as "data.json.<number>.tmp" in the same directory,
// since a rename is one step only within a file system. Whoever reads meanwhile has the old file to
// its end; whoever opens it after has the new one. A failure at any step unlinks the new file and
// leaves the old one as it was.

/* The new file, under a name that nobody has. */
static int orchi_file_beside(orchi_file *op, const char *path, char *name, size_t size) {
    unsigned long long seed = orchi_clock() ^ (uintptr_t)op;
    for (int i = 0; i < ORCHI_FILE_TRIES; i++) {
        snprintf(name, size, "%s.%llx.tmp", path, seed + (unsigned)i);
        op->fd = open(name, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
        op->opened = op->fd >= 0;
        if (op->opened) return 0;
        if (errno != EEXIST) break;
    }
    return -errno;
}

/* Written, with the permissions of what it replaces, on the disk, closed, renamed; or not at all.
 */
static int orchi_file_replace(orchi_file *op, const char *path, char *name, size_t size) {
    struct stat st;
    int error = orchi_file_beside(op, path, name, size);
    if (error != 0) return error;
    error = orchi_file_do_write(op);
    if (error == 0 && stat(path, &st) == 0) {
        error = fchmod(op->fd, st.st_mode & 07777) == 0 ? 0 : -errno;
    }
    if (error == 0) error = orchi_file_do_sync(op);
    op->opened = false;
    if (close(op->fd) != 0 && error == 0) error = -errno;
    if (error == 0 && rename(name, path) != 0) error = -errno;
    if (error != 0) unlink(name);
    return error;
}

/* A link stays one: what it leads to is replaced. */
static int orchi_file_do_save(orchi_file *op) {
    char *real = realpath(op->path, NULL);
    const char *path = real != NULL ? real : op->path;
    size_t size = strlen(path) + 32;
    char *name = (char *)malloc(size);
    int error = name != NULL ? orchi_file_replace(op, path, name, size) : ORCH_ENOMEM;
    free(name);
    free(real); // the C library's
    return error;
}

// ---- around it

/* The release of a result: closes what nobody has taken over. */
static void orchi_file_free(void *memory) {
    orchi_file *op = (orchi_file *)memory;
    if (op->opened) close(op->fd);
    free(op->loaded);
    free(op);
}

/* The release of a job: frees what never ran. */
static void orchi_file_release(void *memory) {
    if (!((orchi_file *)memory)->moved) orchi_file_free(memory);
}

static orch_result orchi_file_job(void *memory) {
    orchi_file *op = (orchi_file *)memory;
    op->error = op->fn(op);
    op->moved = true;
    return orch_ok(op, orchi_file_free);
}

/* Up to two paths, and room for bytes. NULL: out of memory. */
static orchi_file *orchi_file_new(int (*fn)(orchi_file *op), const char *path, const char *to,
                                  size_t size) {
    size_t path_bytes = path != NULL ? strlen(path) + 1 : 0;
    size_t to_bytes = to != NULL ? strlen(to) + 1 : 0, head = sizeof(orchi_file);
    if (size > SIZE_MAX / 2) return NULL;
    orchi_file *op = (orchi_file *)malloc(head + path_bytes + to_bytes + size);
    if (op == NULL) return NULL;
    memset(op, 0, head);
    op->fn = fn;
    op->fd = -1;
    op->size = size;
    op->path = (char *)(op + 1);
    op->to = op->path + path_bytes;
    op->bytes = op->to + to_bytes;
    if (path_bytes > 0) memcpy(op->path, path, path_bytes);
    if (to_bytes > 0) memcpy(op->to, to, to_bytes);
    return op;
}

/* On a descriptor of its own: when the call was cancelled the caller may close his, and the number
 * may be another file's before the thread writes. Returns 0, or an error, and op is gone. */
static int orchi_file_dup(orchi_file **op, int fd) {
    if (*op == NULL) return ORCH_ENOMEM;
    (*op)->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    (*op)->opened = (*op)->fd >= 0;
    if ((*op)->opened) return 0;
    int error = -errno;
    orchi_file_free(*op);
    *op = NULL;
    return error;
}

/* A task may begin it. A cancelled one does not, as nobody would know whether it happened. */
static int orchi_file_error(bool valid, const char *function) {
    int error = 0;
    orch_task *task = orchi_here_task(function, &error);
    if (task == NULL) return error;
    if (!valid) return orchi_misuse(function, ORCH_EINVAL);
    return orchi_must_end(task) ? orchi_refuse(orchi_loop, task) : 0;
}

/* Runs it on a thread; consumes it. With 0 the result has it. */
static int orchi_file_run(orchi_file *op, orch_result *r) {
    *r = orch_fail(ORCH_ENOMEM);
    if (op == NULL) return ORCH_ENOMEM;
    orch_offload_desc desc = {"file", orchi_file_job, op, 0, orchi_file_release, ORCH_LANE_FILE};
    *r = orch_await(orch_offload_with(&desc));
    int error = r->error != 0 ? r->error : ((const orchi_file *)r->value)->error;
    if (error != 0) orch_result_free(r);
    return error;
}

/* The same where nothing is brought. */
static int orchi_file_only(orchi_file *op) {
    orch_result r;
    int error = orchi_file_run(op, &r);
    if (error == 0) orch_result_free(&r);
    return error;
}

int orch_file_open(const char *path, int flags, int mode) {
    int error = orchi_file_error(path != NULL, "orch_file_open");
    if (error != 0) return error;
    orch_result r;
    orchi_file *op = orchi_file_new(orchi_file_do_open, path, NULL, 0);
    if (op != NULL) op->flags = flags;
    if (op != NULL) op->mode = mode;
    error = orchi_file_run(op, &r);
    if (error != 0) return error;
    op = (orchi_file *)r.value;
    int fd = op->fd;
    op->opened = false; // it is the caller's now
    orch_result_free(&r);
    return fd;
}

/* One piece, in or out. Returns how much, or the error. */
static ptrdiff_t orchi_file_piece(int fd, char *in, const char *out, size_t size, uint64_t offset) {
    orch_result r;
    if ((uint64_t)(off_t)offset != offset || (off_t)offset < 0) return -EOVERFLOW;
    orchi_file *op =
        orchi_file_new(out != NULL ? orchi_file_do_write : orchi_file_do_read, NULL, NULL, size);
    int error = orchi_file_dup(&op, fd);
    if (error != 0) return error;
    op->offset = offset;
    if (out != NULL) memcpy(op->bytes, out, size);
    error = orchi_file_run(op, &r);
    if (error != 0) return error;
    op = (orchi_file *)r.value;
    size_t done = op->done;
    if (in != NULL) memcpy(in, op->bytes, done);
    orch_result_free(&r);
    return (ptrdiff_t)done;
}

// In pieces of 1 MiB: so the copies need no more memory than that, whatever the caller's size, and
// a request to end is seen between two. After an error in the middle, how much was done is not
// told: the offset is the caller's, who can do it again.

ptrdiff_t orch_file_read(int fd, void *buffer, size_t size, uint64_t offset) {
    bool valid = (buffer != NULL || size == 0) && size <= PTRDIFF_MAX;
    for (size_t done = 0;;) {
        if (done == size && done > 0) return (ptrdiff_t)done;
        int error = orchi_file_error(valid, "orch_file_read");
        if (error != 0 || size == 0) return error;
        size_t piece = size - done < ORCHI_FILE_PIECE ? size - done : 0u + ORCHI_FILE_PIECE;
        ptrdiff_t n = orchi_file_piece(fd, (char *)buffer + done, NULL, piece, offset + done);
        if (n < 0) return n;
        done += (size_t)n;
        if ((size_t)n < piece) return (ptrdiff_t)done;
    }
}

ptrdiff_t orch_file_write(int fd, const void *data, size_t size, uint64_t offset) {
    bool valid = (data != NULL || size == 0) && size <= PTRDIFF_MAX;
    for (size_t done = 0;;) {
        if (done == size && done > 0) return (ptrdiff_t)done;
        int error = orchi_file_error(valid, "orch_file_write");
        if (error != 0 || size == 0) return error;
        size_t piece = size - done < ORCHI_FILE_PIECE ? size - done : 0u + ORCHI_FILE_PIECE;
        ptrdiff_t n = orchi_file_piece(fd, NULL, (const char *)data + done, piece, offset + done);
        if (n < 0) return n;
        done += (size_t)n;
    }
}

/* The disk is what is waited for, so it runs on a thread like the rest. */
int orch_file_sync(int fd) {
    int error = orchi_file_error(true, "orch_file_sync");
    if (error != 0) return error;
    orchi_file *op = orchi_file_new(orchi_file_do_sync, NULL, NULL, 0);
    error = orchi_file_dup(&op, fd);
    return error != 0 ? error : orchi_file_only(op);
}

int orch_file_truncate(int fd, uint64_t size) {
    int error = orchi_file_error(true, "orch_file_truncate");
    if (error != 0) return error;
    if ((uint64_t)(off_t)size != size || (off_t)size < 0) return -EOVERFLOW;
    orchi_file *op = orchi_file_new(orchi_file_do_truncate, NULL, NULL, 0);
    error = orchi_file_dup(&op, fd);
    if (error != 0) return error;
    op->offset = size;
    return orchi_file_only(op);
}

int orch_file_stat(const char *path, orch_file_info *info) {
    int error = orchi_file_error(path != NULL && info != NULL, "orch_file_stat");
    if (error != 0) return error;
    orch_result r;
    error = orchi_file_run(orchi_file_new(orchi_file_do_stat, path, NULL, 0), &r);
    if (error != 0) return error;
    *info = ((const orchi_file *)r.value)->info;
    orch_result_free(&r);
    return 0;
}

int orch_file_rename(const char *from, const char *to) {
    int error = orchi_file_error(from != NULL && to != NULL, "orch_file_rename");
    if (error != 0) return error;
    return orchi_file_only(orchi_file_new(orchi_file_do_rename, from, to, 0));
}

int orch_file_remove(const char *path) {
    int error = orchi_file_error(path != NULL, "orch_file_remove");
    return error != 0 ? error
                      : orchi_file_only(orchi_file_new(orchi_file_do_remove, path, NULL, 0));
}

/* Its error names the path: it returns a result, which has room for a message. */
orch_result orch_file_load(const char *path) {
    int error = orchi_file_error(path != NULL, "orch_file_load");
    if (error != 0) return orch_fail(error);
    orch_result r;
    error = orchi_file_run(orchi_file_new(orchi_file_do_load, path, NULL, 0), &r);
    if (error == ORCH_ENOMEM || error == ORCH_ECANCELED) return orch_fail(error);
    if (error != 0) return orch_failf(error, "%s: %s", path, orch_error_text(error));
    orchi_file *op = (orchi_file *)r.value;
    orch_buffer *loaded = op->loaded;
    op->loaded = NULL;
    orch_result_free(&r);
    return orch_ok(loaded, free);
}

int orch_file_save(const char *path, const void *data, size_t size) {
    bool valid = path != NULL && (data != NULL || size == 0);
    int error = orchi_file_error(valid, "orch_file_save");
    if (error != 0) return error;
    orchi_file *op = orchi_file_new(orchi_file_do_save, path, NULL, size);
    if (op != NULL && size > 0) memcpy(op->bytes, data, size);
    return orchi_file_only(op);
}

// ------------------------------------------------------------------------------------------------
// >>coordination
//
// Semaphore, event, channel and topic, on the public API and >>base. Invariants:
//   - Who waits is a promise in a ring, in the order of coming. The waiter of a task lies on its
//     stack, and the task takes it out when its wait was cancelled. The waiter of a future has a
//     slot, and the promise's cancel hook takes it out. Who settles it takes it out first.
//   - Only what is wanted (orch_promise_wanted) is served: a lost race gets nothing, so that there
//     is never anything to put back.
//   - A waiting task is served by the call that makes it possible. A future is served by a pump: a
//     callback from the loop, as by then the expression around the future is complete. Whoever
//     stands behind it waits for the pump too.
//   - Nobody overtakes: a call that need not wait looks for wanted waiters first.
//   - An object lives until its handle was freed and nobody is inside (users). A free takes every
//     waiter out: a task or a hook that finds itself out does not look at the object again.

// How an item travels. In orch_race(orch_channel_receive(a), orch_channel_receive(b)) both channels
// have one:
//
//     receive a, b    a waiter each, and a pump each, as there is something to serve
//     orch_race       consumes both futures; the task waits
//     the pump of a   the waiter is wanted: its promise settles with the item, and so the race
//     the pump of b   the waiter is not wanted any more: the item stays
//     the race        cancels its loser: the hook frees the waiter
//
// Had the race been decided before, both items would have stayed. Had a task been in orch_recv, the
// sender would have settled the task's promise, with no pump between them.

// How a channel's parts work together, with room for two items:
//
//     senders             items            receivers
//     w3 -> w4            [ 1 | 2 ]        -
//
// recv takes 1 and calls orchi_channel_match, which goes round until nothing moves: no receiver
// waits, so nothing is handed over; there is room, so w3's item moves into the ring and w3's
// promise settles. What is left is [ 2 | 3 ] and w4. An item goes only to the right, and senders
// and receivers are each in order, so what was sent first is received first.

typedef struct orchi_object { // what each of them begins with
    int error;                // not 0: broken or freed; what every operation says
    uint32_t users;           // the handle, a pump on its way, calls that are inside
    uint32_t calls;           // since somebody who called let others run
    bool pumping;             // a pump is on its way
    orch_on_fn pump;
    orch_loop *loop;
} orchi_object;

typedef struct orchi_link { // of a ring; its head is in the object
    struct orchi_link *next, *previous;
} orchi_link;

typedef struct orchi_waiter {
    orchi_link link; // next is NULL: taken out
    orch_promise promise;
    void *object; // of a future: for its hook; NULL: it is a task's
    union {
        size_t count;      // permits
        orch_result *item; // to send
    } wants;
} orchi_waiter;

typedef char orchi_waiter_fits[sizeof(orchi_waiter) <= 48 ? 1 : -1]; // an extra slot

struct orch_semaphore {
    orchi_object object;
    size_t permits, taken; // after a resize more may be taken than there are
    orchi_link waiters;
    void (*release)(void *waiter); // of a future's permits
};

struct orch_event {
    orchi_object object;
    bool set;
    orchi_link waiters;
};

struct orch_channel {
    orchi_object object;
    bool closed;
    size_t capacity, count, head;
    size_t room; // places of items: 0 or a power of two
    orch_result *items;
    orchi_link senders, receivers;
};

struct orch_topic {
    orchi_object object;
    orchi_link subscriptions;
};

struct orch_subscription {
    orchi_object object;
    orchi_link link; // in its topic; next is NULL: it is out, and gets nothing more
    orch_subscribe_desc desc;
    orch_channel *channel; // of chains to the events
    orch_future *worker;   // calls on_event; NULL: does not run, or has not waited yet
    orch_task *task;       // the same, while it runs
    bool working;
    bool orphan;     // ended by somebody else before it had waited: to be dropped then
    bool overflowed; // and was closed, which was not reported yet
    uint64_t queued, evicted, refused, failed;
};

// ---- objects
//
// An object that could not be made is one that says why in every operation: a program that makes
// ten of them checks where it uses them, as it must anyway. What stands for it is one of four const
// objects, of which only `error` is read.

typedef union orchi_broken_object {
    orchi_object object;
    orch_semaphore semaphore;
    orch_event event;
    orch_channel channel;
    orch_topic topic;
    orch_subscription subscription;
} orchi_broken_object;

#define ORCHI_BROKEN(error)                                                                        \
    {                                                                                              \
        { error, 0, 0, false, NULL, NULL }                                                         \
    }
static const orchi_broken_object orchi_broken_objects[] = {
    ORCHI_BROKEN(ORCH_ENOMEM), ORCHI_BROKEN(ORCH_ENOLOOP), ORCHI_BROKEN(ORCH_EINVAL),
    ORCHI_BROKEN(ORCH_ETHREAD)};
#undef ORCHI_BROKEN

/* Const, and never written: every operation looks at the error first. */
static void *orchi_broken(int error) {
    size_t i = 0;
    while (orchi_broken_objects[i].object.error != error) i++;
    return (void *)(uintptr_t)&orchi_broken_objects[i];
}

/* Zeroed memory behind an object, or a broken one. */
static void *orchi_object_new(size_t size, orch_on_fn pump, const char *function) {
    orch_loop *loop = orchi_loop;
    if (loop == NULL) return orchi_broken(orchi_misuse(function, ORCH_ENOLOOP));
    orchi_object *o = (orchi_object *)orchi_allocate(loop, size);
    if (o == NULL) return orchi_broken(ORCH_ENOMEM);
    memset(o, 0, size);
    o->users = 1;
    o->pump = pump;
    o->loop = loop;
    return o;
}

/* What is wrong with an object here and now, or 0. */
static int orchi_object_error(const void *object, const char *function) {
    const orchi_object *o = (const orchi_object *)object;
    if (o == NULL) {
        orchi_misuse(function, ORCH_EINVAL);
        return ORCH_EINVAL; // not 0, as a compiler can see
    }
    if (o->error != 0) return o->error;
    if (o->loop == orchi_loop) return 0;
    return orchi_misuse(function, orchi_loop != NULL ? ORCH_ETHREAD : ORCH_ENOLOOP);
}

/* The same for what only a task may do. */
static int orchi_object_wait_error(const void *object, const char *function) {
    int error = orchi_object_error(object, function);
    return error == 0 && orch_self() == NULL ? orchi_misuse(function, ORCH_ENOTASK) : error;
}

/* Both in short, for calls that are to be fast, which are counted. The others find out what is the
 * matter, and may call: the fast ones then need not save a register. */
static inline bool orchi_object_fast(void *object) {
    orchi_object *o = (orchi_object *)object;
    return o != NULL && o->error == 0 && o->loop == orchi_loop && orch_self() != NULL &&
           o->calls++ < ORCHI_BUDGET;
}

/* What need not wait goes on at once, but one call of 128 lets others run when it is done. It has
 * succeeded then: a cancelled task is told by the next call that has to wait. */
static bool orchi_object_turn(orchi_object *o) {
    if (o->calls < ORCHI_BUDGET) return false;
    o->calls = 0;
    return true;
}

/* Whether a free has something to free; after it every operation says ORCH_ECLOSED. */
static bool orchi_object_close(void *object, const char *function) {
    if (object == NULL || orchi_object_error(object, function) != 0) return false;
    ((orchi_object *)object)->error = ORCH_ECLOSED;
    return true;
}

/* Has the loop call the pump. False when out of memory. */
static bool orchi_pump_soon(orchi_object *o) {
    if (o->pumping) return true;
    orch_future *turn = orch_settled(orch_ok(NULL, NULL));
    if (turn == orchi_rejected(ORCH_ENOMEM)) return false;
    o->pumping = true;
    o->users++;
    orch_on(turn, o->pump, o);
    return true;
}

// ---- waiters

static void orchi_ring_init(orchi_link *ring) { ring->next = ring->previous = ring; }

/* Nobody is in. Where somebody is, it may be nobody who is still wanted: see orchi_first. */
static inline bool orchi_ring_alone(const orchi_link *ring) { return ring->next == ring; }

static void orchi_ring_append(orchi_link *ring, orchi_link *link) {
    link->next = ring;
    link->previous = ring->previous;
    ring->previous->next = link;
    ring->previous = link;
}

/* Whether it was in. */
static bool orchi_take_out(orchi_link *link) {
    if (link->next == NULL) return false;
    link->next->previous = link->previous;
    link->previous->next = link->next;
    link->next = NULL;
    return true;
}

// Being wanted is asked when somebody could be served, and not noted when it changes: a race that
// is decided would otherwise have to tell every object that its losers wait at. Who is not wanted
// is taken out when it is met, and so is met once.

/* The first that is wanted. Those before it never will be again, and are taken out, so that a
 * thousand that are cancelled at once are not looked at a thousand times; their tasks and hooks
 * find themselves out. */
static orchi_waiter *orchi_first(orchi_link *ring) {
    while (!orchi_ring_alone(ring)) {
        orchi_waiter *w = (orchi_waiter *)(void *)ring->next;
        if (orch_promise_wanted(w->promise)) return w;
        orchi_take_out(&w->link);
    }
    return NULL;
}

/* A task's waiter. The future is to be awaited; out of memory it is a rejected one. */
static orch_future *orchi_waiter_init(orchi_waiter *w, orchi_link *ring, const char *label) {
    orch_future *f = orch_future_new(&w->promise);
    orch_promise_describe(w->promise, label);
    w->object = NULL;
    orchi_ring_append(ring, &w->link);
    return f;
}

/* A future's waiter, or NULL when out of memory, and *f is a rejected one. */
static orchi_waiter *orchi_waiter_new(void *object, orchi_link *ring, const char *label,
                                      orch_cancel_fn cancel, orch_future **f) {
    orchi_waiter *w = (orchi_waiter *)orchi_extra_new(orchi_loop);
    *f = w != NULL ? orch_future_new(&w->promise) : orchi_rejected(ORCH_ENOMEM);
    if (w == NULL) return NULL;
    if (!orch_promise_on_cancel(w->promise, cancel, w)) {
        orchi_extra_free(orchi_loop, w);
        return NULL;
    }
    orch_promise_describe(w->promise, label);
    w->object = object;
    orchi_ring_append(ring, &w->link);
    return w;
}

/* Takes a waiter out to settle it. A future's slot goes: its hook is not called any more. */
static orch_promise orchi_waiter_end(orchi_waiter *w) {
    orch_promise promise = w->promise;
    orchi_take_out(&w->link);
    if (w->object != NULL) orchi_extra_free(orchi_loop, w);
    return promise;
}

/* Settles everybody in a ring with a result that owns nothing. A rejection's hook may call anything
 * meanwhile. */
static void orchi_ring_settle(orchi_link *ring, orch_result r) {
    while (!orchi_ring_alone(ring)) {
        orchi_waiter *w = (orchi_waiter *)(void *)ring->next;
        orch_settle(orchi_waiter_end(w), r);
    }
}

/* How many are wanted. */
static size_t orchi_ring_count(const orchi_link *ring) {
    size_t count = 0;
    for (orchi_link *link = ring->next; link != ring; link = link->next) {
        count += orch_promise_wanted(((orchi_waiter *)(void *)link)->promise);
    }
    return count;
}

// ---- semaphore
//
// Two ways to hold permits. A task counts them by hand: acquire, release. A future owns them: its
// result gives them back when it is freed, so that they travel with it through then, all and
// timeout, and cannot be lost. FIFO is strict, by weight too: a request for five at the head is not
// overtaken by one for one, or it would wait for ever under load. The fast path of acquire is a
// handful of compares and an addition; it looks at the ring only to see that nobody waits.

// `taken` counts what is out, `permits` what there may be. They are two numbers and not one that
// goes down, as a resize may set permits below what is out: nothing is taken away from anybody, and
// the next permits to come back are not given out again.

static void orchi_semaphore_leave(orch_semaphore *s) {
    if (--s->object.users == 0) orchi_free(s->object.loop, s, sizeof *s);
}

/* Whether so many are free; more may be taken than there are. */
static inline bool orchi_permits_fit(const orch_semaphore *s, size_t count) {
    return s->permits > s->taken && count <= s->permits - s->taken;
}

/* Permits come back, and no waiter was served yet. What was freed lives until the last is back. */
static inline bool orchi_permits_back(orch_semaphore *s, size_t count) {
    s->taken -= count;
    if (ORCHI_UNLIKELY(s->object.error != 0) && s->taken == 0) {
        orchi_semaphore_leave(s);
        return false;
    }
    return !orchi_ring_alone(&s->waiters);
}

/* Serves who waits, as far as the permits go. Of those of a future the waiter stays: it is what
 * gives them back, see orchi_permits_release. */
static void orchi_semaphore_serve(orch_semaphore *s, bool pump) {
    orchi_waiter *w;
    s->object.users++;
    while ((w = orchi_first(&s->waiters)) != NULL && orchi_permits_fit(s, w->wants.count)) {
        if (w->object != NULL && !pump && orchi_pump_soon(&s->object)) break;
        orch_result r = orch_ok(NULL, NULL);
        if (w->object != NULL) {
            r.value = s;
            r.owner = w;
            r.release = s->release;
        }
        orchi_take_out(&w->link);
        s->taken += w->wants.count;
        orch_settle(w->promise, r);
    }
    orchi_semaphore_leave(s);
}

/* The release of a future's permits. */
static void orchi_permits_release(void *waiter) {
    orchi_waiter *w = (orchi_waiter *)waiter;
    orch_semaphore *s = (orch_semaphore *)w->object;
    size_t count = w->wants.count;
    orchi_extra_free(s->object.loop, w);
    if (orchi_permits_back(s, count)) orchi_semaphore_serve(s, false);
}

static void orchi_semaphore_pump(orch_result *in, void *context) {
    (void)in;
    orch_semaphore *s = (orch_semaphore *)context;
    s->object.pumping = false;
    orchi_semaphore_serve(s, true);
    orchi_semaphore_leave(s);
}

/* A small request may have stood behind a large one that goes. */
static bool orchi_semaphore_cancel(void *context, int reason) {
    (void)reason;
    orchi_waiter *w = (orchi_waiter *)context;
    orch_semaphore *s = (orch_semaphore *)w->object;
    bool was_in = orchi_take_out(&w->link); // else s may be gone
    orchi_waiter_end(w);
    if (was_in) orchi_semaphore_serve(s, false);
    return true;
}

orch_semaphore *orch_semaphore_new(size_t permits) {
    void *memory =
        orchi_object_new(sizeof(orch_semaphore), orchi_semaphore_pump, "orch_semaphore_new");
    orch_semaphore *s = (orch_semaphore *)memory;
    if (s->object.error != 0) return s;
    s->permits = permits;
    s->release = orchi_permits_release;
    orchi_ring_init(&s->waiters);
    return s;
}

/* What is wrong with a request by itself. With no permits at all it waits for a resize. */
static int orchi_permits_error(const orch_semaphore *s, size_t count, const char *function) {
    if (count == 0) return orchi_misuse(function, ORCH_EINVAL);
    return count > s->permits && s->permits > 0 ? ORCH_ELIMIT : 0;
}

/* A waiter that is still in when the wait is over was not served: it was cancelled, or there was no
 * memory for its promise. Those behind it may fit now. */
static int orchi_acquire_wait(orch_semaphore *s, size_t count) {
    orchi_waiter w;
    w.wants.count = count;
    int error = orch_await(orchi_waiter_init(&w, &s->waiters, "semaphore")).error;
    if (orchi_take_out(&w.link)) orchi_semaphore_serve(s, false);
    return error;
}

/* Who need not wait may still stand behind somebody: only a ring without anybody who is wanted lets
 * it pass. */
ORCHI_NO_INLINE static int orchi_acquire_slow(orch_semaphore *s, size_t count,
                                              const char *function) {
    int error = orchi_object_wait_error(s, function);
    if (error == 0) error = orchi_permits_error(s, count, function);
    if (error != 0) return error;
    if (!orchi_permits_fit(s, count) || orchi_first(&s->waiters) != NULL) {
        return orchi_acquire_wait(s, count);
    }
    s->taken += count;
    if (orchi_object_turn(&s->object)) orch_yield();
    return 0;
}

static inline int orchi_acquire(orch_semaphore *s, size_t count, const char *function) {
    if (ORCHI_UNLIKELY(!orchi_object_fast(s) || !orchi_permits_fit(s, count) ||
                       !orchi_ring_alone(&s->waiters) || count == 0)) {
        return orchi_acquire_slow(s, count, function);
    }
    s->taken += count;
    return 0;
}

int orch_acquire(orch_semaphore *s) { return orchi_acquire(s, 1, "orch_acquire"); }

int orch_acquire_n(orch_semaphore *s, size_t count) {
    return orchi_acquire(s, count, "orch_acquire_n");
}

/* Callable outside a task, as it never waits. It does not overtake either. */
bool orch_try_acquire_n(orch_semaphore *s, size_t count) {
    int error = orchi_object_error(s, "orch_try_acquire");
    if (error == 0) error = orchi_permits_error(s, count, "orch_try_acquire");
    if (error != 0 || !orchi_permits_fit(s, count)) return false;
    if (orchi_first(&s->waiters) != NULL) return false;
    s->taken += count;
    return true;
}

bool orch_try_acquire(orch_semaphore *s) { return orch_try_acquire_n(s, 1); }

/* More came back than was taken, or there is no such semaphore. */
ORCHI_COLD static int orchi_release_error(const orch_semaphore *s, const char *function) {
    int error = orchi_object_error(s, function);
    return error == 0 || error == ORCH_ECLOSED ? orchi_misuse(function, ORCH_EINVAL) : error;
}

/* More than was taken is refused and changes nothing. What was freed takes permits back, too. */
static inline int orchi_release_permits(orch_semaphore *s, size_t count, const char *function) {
    bool good = s != NULL && s->object.loop == orchi_loop && count - 1 < s->taken; // 0 is large
    if (ORCHI_UNLIKELY(!good)) return orchi_release_error(s, function);
    if (orchi_permits_back(s, count)) orchi_semaphore_serve(s, false);
    return 0;
}

int orch_release(orch_semaphore *s) { return orchi_release_permits(s, 1, "orch_release"); }

int orch_release_n(orch_semaphore *s, size_t count) {
    return orchi_release_permits(s, count, "orch_release_n");
}

/* The pump is ordered before there is a waiter: when that fails, nothing has to be undone. */
orch_future *orch_semaphore_acquire_n(orch_semaphore *s, size_t count) {
    orch_future *f;
    int error = orchi_object_error(s, "orch_semaphore_acquire");
    if (error == 0) error = orchi_permits_error(s, count, "orch_semaphore_acquire");
    if (error == 0 && orchi_permits_fit(s, count) && !orchi_pump_soon(&s->object))
        error = ORCH_ENOMEM;
    if (error != 0) return orchi_rejected(error);
    orchi_waiter *w = orchi_waiter_new(s, &s->waiters, "semaphore", orchi_semaphore_cancel, &f);
    if (w != NULL) w->wants.count = count;
    return f;
}

orch_future *orch_semaphore_acquire(orch_semaphore *s) { return orch_semaphore_acquire_n(s, 1); }

/* Those who can not be served any more move to a ring of their own first. */
int orch_semaphore_resize(orch_semaphore *s, size_t permits) {
    int error = orchi_object_error(s, "orch_semaphore_resize");
    if (error != 0) return error;
    orchi_link limited, *next;
    orchi_ring_init(&limited);
    s->permits = permits;
    for (orchi_link *link = s->waiters.next; link != &s->waiters; link = next) {
        next = link->next;
        orchi_waiter *w = (orchi_waiter *)(void *)link;
        if (w->wants.count <= permits || permits == 0) continue;
        orchi_take_out(link);
        orchi_ring_append(&limited, link);
    }
    s->object.users++;
    orchi_ring_settle(&limited, orch_fail(ORCH_ELIMIT));
    orchi_semaphore_serve(s, false);
    orchi_semaphore_leave(s);
    return 0;
}

size_t orch_semaphore_permits(const orch_semaphore *s) {
    return orchi_object_error(s, "orch_semaphore_permits") == 0 ? s->permits : 0;
}

size_t orch_semaphore_available(const orch_semaphore *s) {
    bool good = orchi_object_error(s, "orch_semaphore_available") == 0;
    return good && s->permits > s->taken ? s->permits - s->taken : 0;
}

size_t orch_semaphore_waiting(const orch_semaphore *s) {
    bool good = orchi_object_error(s, "orch_semaphore_waiting") == 0;
    return good ? orchi_ring_count(&s->waiters) : 0;
}

/* With permits out, the handle's part is left for the last of them. */
void orch_semaphore_free(orch_semaphore *s) {
    if (!orchi_object_close(s, "orch_semaphore_free")) return;
    s->object.users++;
    if (s->taken == 0) orchi_semaphore_leave(s);
    orchi_ring_settle(&s->waiters, orch_fail(ORCH_ECLOSED));
    orchi_semaphore_leave(s);
}

// ---- event
//
// It stays set until it is cleared, so a wait that comes late passes. Setting wakes all, in the
// order in which they came. Left out: a set that wakes one (that is a semaphore) and a pulse that
// wakes only who waits now (who comes a moment later would wait for ever).

/* Takes out its own waiter. Nobody stood behind it, as an event serves all at once. */
static bool orchi_event_cancel(void *waiter, int reason) {
    (void)reason;
    orchi_waiter_end((orchi_waiter *)waiter);
    return true;
}

orch_event *orch_event_new(void) {
    orch_event *e = (orch_event *)orchi_object_new(sizeof(orch_event), NULL, "orch_event_new");
    if (e->object.error == 0) orchi_ring_init(&e->waiters);
    return e;
}

void orch_event_set(orch_event *e) {
    if (orchi_object_error(e, "orch_event_set") != 0) return;
    e->set = true;
    orchi_ring_settle(&e->waiters, orch_ok(NULL, NULL));
}

void orch_event_clear(orch_event *e) {
    if (orchi_object_error(e, "orch_event_clear") == 0) e->set = false;
}

bool orch_event_is_set(const orch_event *e) {
    return orchi_object_error(e, "orch_event_is_set") == 0 && e->set;
}

/* An event takes nothing away, so a future needs no pump. */
orch_future *orch_event_wait(orch_event *e) {
    orch_future *f;
    int error = orchi_object_error(e, "orch_event_wait");
    if (error != 0) return orchi_rejected(error);
    if (e->set) return orch_settled(orch_ok(NULL, NULL));
    orchi_waiter_new(e, &e->waiters, "event", orchi_event_cancel, &f);
    return f;
}

void orch_event_free(orch_event *e) {
    if (!orchi_object_close(e, "orch_event_free")) return;
    orchi_ring_settle(&e->waiters, orch_fail(ORCH_ECLOSED));
    orchi_free(e->object.loop, e, sizeof *e);
}

// ---- channel
//
// A ring of items between a ring of senders and a ring of receivers. In between calls at most one
// of these holds:
//
//     receivers wait    no item, no sender: what is sent goes straight to the first receiver
//     senders wait      the ring is full (with a capacity of 0: always), nobody receives
//     neither           some items, and room for more
//
// But for who waits as a future: it is served a moment later, by the pump, and then both may be
// there for a moment. With a capacity of 0 sender and receiver meet: an item is never in the ring.
// The ring grows with what is in it, so that a capacity of SIZE_MAX is a queue without bound.
// Left out: a send that overwrites the oldest. A topic's subscription can do that.

/* What was in it has been freed by then: a free empties it first. */
static void orchi_channel_leave(orch_channel *c) {
    if (--c->object.users > 0) return;
    orchi_free(c->object.loop, c->items, c->room * sizeof *c->items);
    orchi_free(c->object.loop, c, sizeof *c);
}

/* Room for one more item: doubles, and puts the oldest first. */
static bool orchi_channel_reserve(orch_channel *c) {
    if (c->count < c->room) return true;
    size_t room = c->room > 0 ? c->room * 2 : 8;
    if (room > SIZE_MAX / 2 / sizeof *c->items) return false;
    void *memory = orchi_allocate(c->object.loop, room * sizeof *c->items);
    orch_result *items = (orch_result *)memory;
    if (items == NULL) return false;
    for (size_t i = 0; i < c->count; i++) items[i] = c->items[(c->head + i) & (c->room - 1)];
    orchi_free(c->object.loop, c->items, c->room * sizeof *c->items);
    c->items = items;
    c->room = room;
    c->head = 0;
    return true;
}

/* With room for it. */
static inline void orchi_channel_push(orch_channel *c, const orch_result *item) {
    orchi_move(&c->items[(c->head + c->count++) & (c->room - 1)], item);
}

/* With an item in it. */
static inline void orchi_channel_pop(orch_channel *c, orch_result *item) {
    *item = c->items[c->head++ & (c->room - 1)];
    c->count--;
}

/* Takes a sender's item and the sender out. The copy of a future's item has a slot. */
static orch_promise orchi_sender_end(orchi_waiter *sender, orch_result *item) {
    *item = *sender->wants.item;
    if (sender->object != NULL) orchi_extra_free(orchi_loop, sender->wants.item);
    return orchi_waiter_end(sender);
}

/* Whether a future takes part, and is to be served by a pump that is on its way now. */
static bool orchi_channel_later(orch_channel *c, const orchi_waiter *a, const orchi_waiter *b,
                                bool pump) {
    bool future = (a != NULL && a->object != NULL) || (b != NULL && b->object != NULL);
    return future && !pump && orchi_pump_soon(&c->object);
}

/* Hands one item to the first receiver, from the channel or else from the first sender. Whether
 * there may be more to do. */
static bool orchi_channel_hand_over(orch_channel *c, bool pump) {
    orch_result item;
    orchi_waiter *receiver = orchi_first(&c->receivers);
    if (receiver == NULL) return false;
    orchi_waiter *sender = c->count == 0 ? orchi_first(&c->senders) : NULL;
    if (c->count == 0 && sender == NULL) return false;
    if (orchi_channel_later(c, receiver, sender, pump)) return false;
    orch_promise received = orchi_waiter_end(receiver);
    if (sender != NULL) orch_settle(orchi_sender_end(sender, &item), orch_ok(NULL, NULL));
    else orchi_channel_pop(c, &item);
    orch_settle(received, item);
    return true;
}

/* Takes one item into the channel from the first sender. Whether there may be more to do. */
static bool orchi_channel_refill(orch_channel *c, bool pump) {
    orch_result item;
    orchi_waiter *sender = c->count < c->capacity ? orchi_first(&c->senders) : NULL;
    if (sender == NULL || orchi_channel_later(c, sender, NULL, pump)) return false;
    bool task = sender->object == NULL, room = orchi_channel_reserve(c);
    orch_promise sent = orchi_sender_end(sender, &item);
    if (room) orchi_channel_push(c, &item);
    orch_settle(sent, room ? orch_ok(NULL, NULL) : orch_fail(ORCH_ENOMEM));
    if (!room && !task) orch_result_free(&item); // a task frees its own
    return true;
}

/* Does all that can be done for those who wait. */
static void orchi_channel_match(orch_channel *c, bool pump) {
    c->object.users++;
    while (orchi_channel_hand_over(c, pump) || orchi_channel_refill(c, pump)) continue;
    if (c->closed && c->count == 0) orchi_ring_settle(&c->receivers, orch_fail(ORCH_ECLOSED));
    orchi_channel_leave(c);
}

static void orchi_channel_pump(orch_result *in, void *context) {
    (void)in;
    orch_channel *c = (orch_channel *)context;
    c->object.pumping = false;
    orchi_channel_match(c, true);
    orchi_channel_leave(c);
}

orch_channel *orch_channel_new(size_t capacity) {
    void *memory = orchi_object_new(sizeof(orch_channel), orchi_channel_pump, "orch_channel_new");
    orch_channel *c = (orch_channel *)memory;
    if (c->object.error != 0) return c;
    c->capacity = capacity;
    orchi_ring_init(&c->senders);
    orchi_ring_init(&c->receivers);
    return c;
}

/* Sends without waiting: 0, or -EAGAIN, ORCH_ENOMEM, and the item is still the caller's. `spare`:
 * where no item may wait, one may, for a receiver that the pump is about to serve. */
static int orchi_channel_give(orch_channel *c, orch_result *item, bool spare) {
    if (orchi_first(&c->senders) != NULL) return -EAGAIN;
    orchi_waiter *receiver = c->count == 0 ? orchi_first(&c->receivers) : NULL;
    if (receiver != NULL && receiver->object == NULL) {
        orch_settle(orchi_waiter_end(receiver), *item);
        return 0;
    }
    bool room = c->count < c->capacity || (spare && receiver != NULL);
    if (!room) return -EAGAIN;
    if (!orchi_channel_reserve(c)) return ORCH_ENOMEM;
    orchi_channel_push(c, item);
    if (!orchi_ring_alone(&c->receivers)) orchi_channel_match(c, false);
    return 0;
}

/* Receives without waiting: 0, or -EAGAIN, ORCH_ECLOSED. `any`: from a future, too. */
static int orchi_channel_get(orch_channel *c, orch_result *item, bool any) {
    if (orchi_first(&c->receivers) != NULL) return -EAGAIN;
    if (c->count > 0) {
        orchi_channel_pop(c, item);
        if (!orchi_ring_alone(&c->senders)) orchi_channel_match(c, false);
        return 0;
    }
    if (c->closed) return ORCH_ECLOSED;
    orchi_waiter *sender = orchi_first(&c->senders);
    if (sender == NULL || (sender->object != NULL && !any)) return -EAGAIN;
    orch_settle(orchi_sender_end(sender, item), orch_ok(NULL, NULL));
    return 0;
}

/* The item stays where it is, in orch_send's frame, until somebody takes it. */
static int orchi_send_wait(orch_channel *c, orch_result *item) {
    orchi_waiter w;
    w.wants.item = item;
    orch_future *f = orchi_waiter_init(&w, &c->senders, "channel, to send");
    orchi_channel_match(c, false);
    int error = orch_await(f).error;
    orchi_take_out(&w.link);
    return error;
}

// Sending consumes the item whatever happens, so that every path but success frees it. The turn
// that is due comes last: by then the send has its outcome, and what orch_yield says is not looked
// at, as a cancellation would hide that the item was sent.

ORCHI_NO_INLINE static int orchi_send_slow(orch_channel *c, orch_result *item) {
    int error = orchi_object_wait_error(c, "orch_send");
    bool turn = error == 0 && orchi_object_turn(&c->object);
    if (error == 0 && c->closed) error = ORCH_ECLOSED;
    if (error == 0) error = orchi_channel_give(c, item, false);
    if (error == -EAGAIN) error = orchi_send_wait(c, item);
    if (error != 0) orch_result_free(item);
    if (turn) orch_yield();
    return error;
}

int orch_send(orch_channel *c, orch_result item) {
    if (ORCHI_UNLIKELY(!orchi_object_fast(c) || c->closed || c->count >= c->capacity ||
                       c->count >= c->room || !orchi_ring_alone(&c->senders) ||
                       !orchi_ring_alone(&c->receivers))) {
        return orchi_send_slow(c, &item);
    }
    orchi_channel_push(c, &item);
    return 0;
}

static orch_result orchi_recv_wait(orch_channel *c) {
    orchi_waiter w;
    w.wants.item = NULL;
    orch_future *f = orchi_waiter_init(&w, &c->receivers, "channel, to receive");
    orchi_channel_match(c, false);
    orch_result item = orch_await(f);
    orchi_take_out(&w.link);
    return item;
}

ORCHI_NO_INLINE static orch_result orchi_recv_slow(orch_channel *c) {
    orch_result item;
    int error = orchi_object_wait_error(c, "orch_recv");
    bool turn = error == 0 && orchi_object_turn(&c->object);
    if (error == 0) error = orchi_channel_get(c, &item, false);
    if (error == -EAGAIN) item = orchi_recv_wait(c);
    else if (error != 0) item = orch_fail(error);
    if (turn) orch_yield();
    return item;
}

orch_result orch_recv(orch_channel *c) {
    orch_result item;
    if (ORCHI_UNLIKELY(!orchi_object_fast(c) || c->count == 0 || !orchi_ring_alone(&c->senders) ||
                       !orchi_ring_alone(&c->receivers))) {
        return orchi_recv_slow(c);
    }
    orchi_channel_pop(c, &item);
    return item;
}

/* The item is the caller's until it was taken, and is empty after: so a retry needs no copy. */
int orch_try_send(orch_channel *c, orch_result *item) {
    int error = orchi_object_error(c, "orch_try_send");
    if (error == 0 && item == NULL) error = orchi_misuse("orch_try_send", ORCH_EINVAL);
    if (error == 0 && c->closed) error = ORCH_ECLOSED;
    if (error == 0) error = orchi_channel_give(c, item, true);
    if (error == 0) memset(item, 0, sizeof *item);
    return error;
}

int orch_try_recv(orch_channel *c, orch_result *item) {
    int error = orchi_object_error(c, "orch_try_recv");
    if (error == 0 && item == NULL) error = orchi_misuse("orch_try_recv", ORCH_EINVAL);
    return error != 0 ? error : orchi_channel_get(c, item, true);
}

/* Its item goes with it. Whoever stood behind it waits for room, of which this makes none. */
static bool orchi_send_cancel(void *context, int reason) {
    (void)reason;
    orch_result item;
    orchi_sender_end((orchi_waiter *)context, &item);
    orch_result_free(&item);
    return true;
}

/* Whether a send can not even be tried. If it may be served soon, the pump is needed first. */
static int orchi_send_error(orch_channel *c) {
    int error = orchi_object_error(c, "orch_channel_send");
    if (error == 0 && c->closed) error = ORCH_ECLOSED;
    if (error != 0) return error;
    bool soon = c->count < c->capacity || !orchi_ring_alone(&c->receivers);
    return soon && !orchi_pump_soon(&c->object) ? ORCH_ENOMEM : 0;
}

orch_future *orch_channel_send(orch_channel *c, orch_result item) {
    orch_future *f;
    int error = orchi_send_error(c);
    void *copy = error == 0 ? orchi_extra_new(orchi_loop) : NULL;
    f = orchi_rejected(error != 0 ? error : ORCH_ENOMEM);
    orchi_waiter *w = NULL;
    if (copy != NULL)
        w = orchi_waiter_new(c, &c->senders, "channel, to send", orchi_send_cancel, &f);
    if (w == NULL) {
        if (copy != NULL) orchi_extra_free(orchi_loop, copy);
        orch_result_free(&item);
        return f;
    }
    w->wants.item = (orch_result *)copy;
    *w->wants.item = item;
    return f;
}

/* An item that it would have had stays in the channel for the next receiver. */
static bool orchi_receive_cancel(void *context, int reason) {
    (void)reason;
    orchi_waiter_end((orchi_waiter *)context);
    return true;
}

orch_future *orch_channel_receive(orch_channel *c) {
    orch_future *f;
    int error = orchi_object_error(c, "orch_channel_receive");
    if (error != 0) return orchi_rejected(error);
    if (c->closed && c->count == 0) return orchi_rejected(ORCH_ECLOSED);
    bool soon = c->count > 0 || !orchi_ring_alone(&c->senders);
    if (soon && !orchi_pump_soon(&c->object)) return orchi_rejected(ORCH_ENOMEM);
    orchi_waiter_new(c, &c->receivers, "channel, to receive", orchi_receive_cancel, &f);
    return f;
}

/* Senders are told, and their items freed: a task frees its own. */
static void orchi_channel_shut(orch_channel *c) {
    orch_result item;
    c->closed = true;
    c->object.users++;
    while (!orchi_ring_alone(&c->senders)) {
        orchi_waiter *sender = (orchi_waiter *)(void *)c->senders.next;
        bool task = sender->object == NULL;
        orch_settle(orchi_sender_end(sender, &item), orch_fail(ORCH_ECLOSED));
        if (!task) orch_result_free(&item);
    }
    orchi_channel_match(c, false);
    orchi_channel_leave(c);
}

void orch_channel_close(orch_channel *c) {
    if (orchi_object_error(c, "orch_channel_close") == 0) orchi_channel_shut(c);
}

/* Without those of senders that wait: they are not in the channel yet. */
size_t orch_channel_count(const orch_channel *c) {
    return orchi_object_error(c, "orch_channel_count") == 0 ? c->count : 0;
}

bool orch_channel_is_closed(const orch_channel *c) {
    return orchi_object_error(c, "orch_channel_is_closed") != 0 || c->closed;
}

/* Receivers that wait for the pump find nothing any more when it comes. */
void orch_channel_free(orch_channel *c) {
    orch_result item;
    if (!orchi_object_close(c, "orch_channel_free")) return;
    orchi_channel_shut(c);
    while (c->count > 0) {
        orchi_channel_pop(c, &item);
        orch_result_free(&item);
    }
    orchi_channel_leave(c);
}

// ---- topic
//
// An event is a settled future. A subscription is a channel whose items are chains to it: what they
// settle gets a share, whatever the event is. Nothing of the user's runs inside publish: on_event
// is started from the loop, and what is dropped is given up there.

// What an event costs: one slot for the event, however many subscribe, and for each subscription a
// reference and a place in its ring. Publishing is linear in subscriptions and waits for nobody;
// what a full subscription does is its own choice (overflow), as the publisher cannot know it.

orch_topic *orch_topic_new(void) {
    orch_topic *t = (orch_topic *)orchi_object_new(sizeof(orch_topic), NULL, "orch_topic_new");
    if (t->object.error == 0) orchi_ring_init(&t->subscriptions);
    return t;
}

static orch_subscription *orchi_subscription_of(orchi_link *link) {
    size_t offset = offsetof(orch_subscription, link);
    return (orch_subscription *)(void *)((char *)link - offset);
}

/* The callback of an event that was dropped for want of room. */
static void orchi_event_gone(orch_result *in, void *context) {
    (void)in;
    (void)context;
}

/* Makes room. The event may be the last of its kind: its release runs from the loop. */
static void orchi_subscription_evict(orch_subscription *s) {
    orch_result oldest;
    orchi_channel_pop(s->channel, &oldest);
    s->evicted++;
    orch_on(orch_settled(oldest), orchi_event_gone, NULL);
}

/* The subscription ends with what waits. */
static void orchi_subscription_shut(orch_subscription *s) {
    orchi_take_out(&s->link);
    orchi_channel_shut(s->channel);
}

/* Queues an event, or does what is to be done without room. Out of memory, the worker is started
 * with the next event. */
static void orchi_subscription_offer(orch_subscription *s, orch_future *event) {
    orch_result item = orch_chain(orch_ref(event));
    bool full = s->channel->count >= s->desc.capacity;
    if (full && s->desc.overflow == ORCH_OVERFLOW_DROP_OLDEST) orchi_subscription_evict(s);
    int error = orchi_channel_give(s->channel, &item, false);
    if (error == 0) s->queued++;
    else s->refused++;
    if (error != 0) orch_result_free(&item); // the publisher still has one
    if (full && s->desc.overflow == ORCH_OVERFLOW_CLOSE) {
        s->overflowed = true;
        orchi_subscription_shut(s);
    }
    if (s->desc.on_event != NULL && !s->working) orchi_pump_soon(&s->object);
}

int orch_publish(orch_topic *t, orch_result event) {
    orchi_link *next;
    int error = orchi_object_error(t, "orch_publish");
    if (error != 0 || orchi_ring_alone(&t->subscriptions)) {
        orch_result_free(&event);
        return error;
    }
    orch_future *f = orch_settled(event);
    if (f == orchi_rejected(ORCH_ENOMEM)) return ORCH_ENOMEM;
    for (orchi_link *link = t->subscriptions.next; link != &t->subscriptions; link = next) {
        next = link->next; // an overflow may take this one out
        orchi_subscription_offer(orchi_subscription_of(link), f);
    }
    orch_drop(f);
    return 0;
}

// ---- subscription
//
// The life of a reactor (a subscription with on_event):
//
//     publish     puts a chain to the event into the channel, and sees to it that the pump comes
//     the pump    starts a task, unless one runs
//     the task    calls on_event for one event after the other, and ends when there is none: a
//                 thousand idle subscribers have no stack
//     a failure   of on_event goes to on_error; the next event is handed over all the same
//     the end     the worker is dropped, which in a task waits until on_event has returned; release
//                 is called when neither subscription nor worker can call anything any more
//
// A worker may end its own subscription from inside on_event. Then nobody waits for it: it finds
// that out when on_event returns, and is itself the last user.

static void orchi_subscription_leave(orch_subscription *s) {
    if (--s->object.users == 0) orchi_free(s->object.loop, s, sizeof *s);
}

/* The subscription has ended, and so has what on_event was doing. */
static void orchi_subscription_done(orch_subscription *s) {
    void (*release)(void *context) = s->desc.release;
    s->desc.release = NULL;
    if (release != NULL) release(s->desc.context);
}

/* A failure goes to on_error, or where every rejection goes that nobody looks at. */
static void orchi_subscription_fail(orch_subscription *s, orch_result error) {
    if (s->desc.on_error == NULL) {
        orch_detach(orch_settled(error));
        return;
    }
    s->desc.on_error(&error, s->desc.context);
    orch_result_free(&error);
}

/* Hands one event to on_event, whose result may be a chain. What fails because it was cancelled is
 * no failure. */
static void orchi_subscription_call(orch_subscription *s, orch_result item) {
    orch_result event = orch_await(orch_settled(item)), r = orch_ok(NULL, NULL);
    if (s->object.error == 0) r = s->desc.on_event(&event, s->desc.context);
    bool passed = r.release != NULL && r.release == event.release && r.owner == event.owner;
    if (!passed) orch_result_free(&event);
    if (r.release != NULL) r = orch_await(orch_settled(r));
    if (r.error == 0 || orch_cancel_reason() != 0) {
        orch_result_free(&r);
        return;
    }
    s->failed++;
    orchi_subscription_fail(s, r);
}

/* The task of a subscription: runs while there are events. */
static orch_result orchi_subscription_work(void *arg) {
    orch_subscription *s = (orch_subscription *)arg;
    orch_result item;
    s->task = orch_self();
    while (s->object.error == 0 && orch_cancel_reason() == 0) {
        if (orchi_channel_get(s->channel, &item, false) != 0) break;
        orchi_subscription_call(s, item);
    }
    if (s->overflowed && s->object.error == 0 && s->channel->count == 0) {
        s->overflowed = false;
        orchi_subscription_fail(s, orch_fail(ORCH_ECLOSED));
    }
    s->working = false;
    s->task = NULL;
    orch_detach(s->worker);
    s->worker = NULL;
    if (s->object.error != 0) orchi_subscription_done(s);
    orchi_subscription_leave(s);
    return orch_ok(NULL, NULL);
}

/* Starts the task. It may wait, end, or end the subscription before orch_go_with returns. */
static void orchi_subscription_start(orch_subscription *s) {
    orch_task_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.name = s->desc.name;
    desc.fn = orchi_subscription_work;
    desc.arg = s;
    s->working = true;
    s->object.users++;
    orch_future *f = orch_go_with(&desc);
    if (f == orchi_rejected(ORCH_ENOMEM)) {
        s->working = false;
        s->object.users--; // not the last: the pump is inside
        orchi_subscription_fail(s, orch_fail(ORCH_ENOMEM));
    } else if (s->working && !s->orphan) {
        s->worker = f;
    } else {
        orch_drop(f);
    }
}

static void orchi_subscription_pump(orch_result *in, void *context) {
    (void)in;
    orch_subscription *s = (orch_subscription *)context;
    s->object.pumping = false;
    if (s->object.error == 0) orchi_subscription_start(s); // nobody else starts it
    orchi_subscription_leave(s);
}

/* The only place where defaults are filled in. */
static orch_subscribe_desc orchi_subscribe_defaults(const orch_subscribe_desc *given) {
    orch_subscribe_desc desc;
    memset(&desc, 0, sizeof desc);
    if (given != NULL) desc = *given;
    if (desc.capacity == 0) desc.capacity = 64;
    if (desc.name == NULL) desc.name = "subscription";
    return desc;
}

/* The channel first: it can be given up without a trace when the rest fails. */
static orch_subscription *orchi_subscribe(orch_topic *t, const orch_subscribe_desc *desc) {
    int error = orchi_object_error(t, "orch_subscribe");
    if (error == 0 && (unsigned)desc->overflow > ORCH_OVERFLOW_CLOSE)
        error = orchi_misuse("orch_subscribe", ORCH_EINVAL);
    if (error != 0) return (orch_subscription *)orchi_broken(error);
    orch_channel *channel = orch_channel_new(desc->capacity);
    if (channel->object.error != 0) return (orch_subscription *)orchi_broken(ORCH_ENOMEM);
    void *memory =
        orchi_object_new(sizeof(orch_subscription), orchi_subscription_pump, "orch_subscribe");
    orch_subscription *s = (orch_subscription *)memory;
    if (s->object.error != 0) {
        orch_channel_free(channel);
        return s;
    }
    s->desc = *desc;
    s->channel = channel;
    orchi_ring_append(&t->subscriptions, &s->link);
    return s;
}

/* What could not subscribe still owes its release: the caller has given the context away. */
orch_subscription *orch_subscribe(orch_topic *t, const orch_subscribe_desc *given) {
    orch_subscribe_desc desc = orchi_subscribe_defaults(given);
    orch_subscription *s = orchi_subscribe(t, &desc);
    if (s->object.error != 0 && desc.release != NULL) desc.release(desc.context);
    return s;
}

orch_future *orch_subscription_next(orch_subscription *s) {
    int error = orchi_object_error(s, "orch_subscription_next");
    if (error == 0 && s->desc.on_event != NULL)
        error = orchi_misuse("orch_subscription_next", ORCH_EINVAL);
    if (error != 0) return orchi_rejected(error);
    return orch_channel_receive(s->channel);
}

orch_subscription_stats orch_subscription_statistics(const orch_subscription *s) {
    orch_subscription_stats stats;
    memset(&stats, 0, sizeof stats);
    if (orchi_object_error(s, "orch_subscription_statistics") != 0) return stats;
    stats.waiting = s->channel->count;
    stats.delivered = s->queued - s->evicted - s->channel->count;
    stats.dropped = s->evicted + s->refused;
    stats.failed = s->failed;
    return stats;
}

const orch_subscribe_desc *orch_subscription_settings(const orch_subscription *s) {
    return s != NULL && s->object.error == 0 ? &s->desc : NULL;
}

// Who ends a subscription, and what becomes of its worker:
//
//     another task, or the loop   the worker is dropped; a task waits until on_event has returned
//     the worker itself           nobody waits; the worker ends as the last user
//     before the worker waited    orch_go_with has not returned its future yet (orphan): whoever
//                                 started it drops it when it has
//
// In each case release is called once, after the last on_event.

void orch_unsubscribe(orch_subscription *s) {
    if (!orchi_object_close(s, "orch_unsubscribe")) return;
    orch_future *worker = NULL;
    if (s->working && s->task != orch_self()) {
        worker = s->worker;
        s->worker = NULL;
        s->orphan = worker == NULL;
    }
    orchi_take_out(&s->link);
    orch_channel_free(s->channel);
    orch_drop(worker);
    if (!s->working) orchi_subscription_done(s);
    orchi_subscription_leave(s);
}

/* Subscriptions outlive their topic: what they have queued can still be received. */
void orch_topic_free(orch_topic *t) {
    if (!orchi_object_close(t, "orch_topic_free")) return;
    while (!orchi_ring_alone(&t->subscriptions)) {
        orchi_subscription_shut(orchi_subscription_of(t->subscriptions.next));
    }
    orchi_free(t->object.loop, t, sizeof *t);
}

// ------------------------------------------------------------------------------------------------
// >>policy
//
// Retry, map and hedge, on the public API. Invariants:
//   - A retry is one task that loops. An attempt runs in that task or, when its time is limited, in
//     one of its own, which can be cancelled while the loop goes on.
//   - A map or hedge is a batch: a future for each item; a combinator of them, which gives outcome,
//     order and cancellation; and a leader, a task that starts the items' tasks one by one.
//   - Until the leader waits for the first time nothing else runs, and a future of an item is that
//     of its task. Then what has not begun gets promises, which will follow their tasks, and all
//     are combined. The leader ends with the combinator in its place.
//   - Items are children of the leader and not of each other: so they inherit from the caller only.
//   - A promise whose task has not begun ends at once when it is cancelled. The one that the leader
//     waits to begin wakes the leader by its hook; so nobody has to tell it that all is decided.
//   - A batch is freed, and its release called, by the last of the leader and the items' tasks,
//     which is before its future settles.

// For example, orch_map over four items, two at once, of which item 1 fails after 10 ms:
//
//     orch_map   allocates the batch and starts the leader, which starts 0 and 1: their tasks' own
//                futures are noted. For 2 there is no place: 2 and 3 get promises, all four are
//                combined, 2 gets the hook, and the leader waits. orch_map returns its future.
//     5 ms       0 ends and wakes the leader, which starts 2 and lets its promise follow the task.
//                So the task takes the promise's place in the combinator. For 3 it waits again.
//     10 ms      1 ends with an error: its place wakes the leader. Its future settles, and the
//                combinator is decided. The leader sees that 3 is not wanted, ends it, and returns
//                the combinator by orch_chain, which takes the place of the leader's future.
//                Meanwhile that has cancelled 2. When 2 has ended, the error is delivered.
//
// What was tried and left: workers that take one item after the other save a task's start, but what
// cancels an item would stay with the worker, and so would task-local values and open shields.

// ---- what all three share

// A hundred years: what is above is a mistake.
static const uint64_t ORCHI_POLICY_MOST_MS = 3155760000000;
enum { ORCHI_POLICY_STACK_LEAST = 16 << 10, ORCHI_POLICY_STACK_MOST = 1 << 30 };

/* What is wrong with the part that every desc has. */
static int orchi_policy_error(bool has_fn, const void *arg, size_t arg_size, size_t stack_size) {
    if (orchi_loop == NULL) return ORCH_ENOLOOP;
    if (!has_fn || (arg_size > 0 && arg == NULL) || arg_size > SIZE_MAX / 4) return ORCH_EINVAL;
    bool in_range = stack_size >= ORCHI_POLICY_STACK_LEAST && stack_size <= ORCHI_POLICY_STACK_MOST;
    return stack_size == 0 || in_range ? 0 : ORCH_EINVAL;
}

/* Whether a time makes sense; if not, *refusal says so. */
static bool orchi_policy_time(const char *who, const char *field, uint64_t ms,
                              orch_result *refusal) {
    if (ms <= ORCHI_POLICY_MOST_MS) return true;
    *refusal = orch_failf(ORCH_EINVAL, "%s: %s is %llu ms, more than a hundred years", who, field,
                          (unsigned long long)ms);
    return false;
}

/* The answer to a call that cannot be done: it gives back what it was to own. */
static orch_future *orchi_policy_refuse(orch_future *answer, void (*release)(void *arg),
                                        void *arg) {
    if (release != NULL) release(arg);
    return answer;
}

/* Where a copy of arg is put behind `size` bytes of state: aligned as malloc aligns. */
static size_t orchi_state_end(size_t size) { return (size + 15) / 16 * 16; }

/* Memory for the state of a call with its copy of arg, if it wants one; *arg is then the copy. */
static void *orchi_state_new(size_t size, void **arg, size_t arg_size) {
    size_t end = orchi_state_end(size);
    char *state = (char *)orchi_allocate(orchi_loop, end + arg_size);
    if (state == NULL || arg_size == 0) return state;
    memcpy(state + end, *arg, arg_size);
    *arg = state + end;
    return state;
}

static const char orchi_attempt_key = 0; // of the task-local number of the attempt

/* Says which attempt begins, to the current task and what it starts. */
static int orchi_attempt_begin(size_t number) {
    return orch_local_set(&orchi_attempt_key, (void *)(uintptr_t)number, NULL);
}

unsigned orch_attempt_number(void) { return (unsigned)(uintptr_t)orch_local(&orchi_attempt_key); }

// ---- retry
//
// A retry needs no timer and no state machine: it is a loop with a sleep in it. What is asked after
// a failed attempt, in this order, is orchi_retry_again:
//
//     attempts, budget    is one left, and time for it
//     retry_if            can another one help
//     retry_after         how long to wait, as the server says; else the back-off
//     on_attempt          told of it, with the delay and how many are left; may stop it
//     budget              again, as hooks may take time
//     the wait            ends at once when the task is cancelled
//
// The n-th delay of attempts at 100 ms with factor 2 and a cap of 1000 is 100, 200, 400, 800, 1000,
// 1000 ...; with full jitter anything from 0 to that; with decorrelated jitter anything from 100 to
// three times the delay before, below the cap. (M. Brooker, "Exponential Backoff And Jitter", AWS
// Architecture Blog, 2015.)

// In numbers: attempts at 100 ms without jitter, a budget of 500 ms, each failing after 50 ms. They
// begin at 0, 150 and 400 ms (delays 100 and 200). The third fails at 450; the next delay, of 400,
// would end at 850, after the budget, so the retry ends at 450 with the third's error, and does not
// sleep first only to find that out.

typedef struct orchi_attempts {  // a retry under way
    const orch_retry_desc *desc; // its defaults filled in
    orch_task_fn fn;
    void *arg;
    uint64_t start;  // ms
    double backoff;  // the next one, before cap and jitter
    uint64_t drawn;  // decorrelated jitter: the delay before
    unsigned number; // attempts begun
} orchi_attempts;

/* Numbers that make no sense are refused by name. A comparison with NaN is false. */
static bool orchi_retry_valid(const char *who, const orch_retry_desc *d, orch_result *refusal) {
    if (!orchi_policy_time(who, "delay_ms", d->delay_ms, refusal)) return false;
    if (!orchi_policy_time(who, "max_delay_ms", d->max_delay_ms, refusal)) return false;
    if (!orchi_policy_time(who, "timeout_ms", d->timeout_ms, refusal)) return false;
    if (!orchi_policy_time(who, "budget_ms", d->budget_ms, refusal)) return false;
    bool no_factor = d->factor >= 0 && d->factor <= 0;
    if (d->attempts > INT_MAX) {
        *refusal =
            orch_failf(ORCH_EINVAL, "%s: attempts is %u, more than %d", who, d->attempts, INT_MAX);
    } else if (!no_factor && !(d->factor >= 1 && d->factor <= 1000)) {
        *refusal = orch_failf(ORCH_EINVAL, "%s: factor is %g, not from 1 to 1000", who, d->factor);
    } else if ((unsigned)d->jitter > ORCH_JITTER_DECORRELATED) {
        *refusal = orch_failf(ORCH_EINVAL, "%s: jitter is %d, none of ORCH_JITTER_...", who,
                              (int)d->jitter);
    } else {
        return true;
    }
    return false;
}

/* A valid desc with its defaults filled in. */
static orch_retry_desc orchi_retry_defaults(const orch_retry_desc *desc) {
    orch_retry_desc d = *desc;
    if (d.attempts == 0) d.attempts = 10;
    if (d.delay_ms == 0) d.delay_ms = 1000;
    if (d.factor < 1) d.factor = 2;
    if (d.max_delay_ms == 0) d.max_delay_ms = ORCHI_POLICY_MOST_MS;
    return d;
}

/* Since the first attempt began. */
static uint64_t orchi_retry_elapsed(const orchi_attempts *a) { return orch_now() - a->start; }

/* Whether the budget leaves no time for an attempt after another `ms`. */
static bool orchi_retry_spent(const orchi_attempts *a, uint64_t ms) {
    uint64_t budget = a->desc->budget_ms;
    return budget > 0 && orchi_retry_elapsed(a) + ms >= budget;
}

/* The time for the next attempt; 0: no limit. The budget was not spent when it was last asked. */
static uint64_t orchi_retry_limit(const orchi_attempts *a) {
    uint64_t limit = a->desc->timeout_ms, budget = a->desc->budget_ms;
    if (budget == 0) return limit;
    uint64_t elapsed = orchi_retry_elapsed(a), left = elapsed < budget ? budget - elapsed : 1;
    return limit == 0 || left < limit ? left : limit;
}

// The budget is no timer over the whole: it limits each attempt's time and decides whether another
// one begins. So a hook of the user's is never cut off.

/* One attempt, to its end. Without a limit it costs no task. With one it has its own, so that the
 * cancellation ends with it, whatever it has left behind: shields, task-local values. */
static orch_result orchi_retry_attempt(orchi_attempts *a) {
    const orch_retry_desc *d = a->desc;
    uint64_t limit = orchi_retry_limit(a);
    int error = orchi_attempt_begin(++a->number);
    if (error != 0) return orch_fail(error);
    if (limit == 0) return orchi_outcome(a->fn(a->arg));
    orch_task_desc task = {d->name, a->fn, a->arg, 0, NULL, d->stack_size};
    orch_result r = orch_await(orch_timeout(orch_go_with(&task), limit));
    if (r.error != ORCH_ETIMEDOUT || !orchi_retry_spent(a, 0)) return r;
    orch_result_free(&r);
    return orch_failf(ORCH_ETIMEDOUT, "Timeout after %llu ms, the budget of the retry",
                      (unsigned long long)d->budget_ms);
}

// The modulus prefers low numbers by less than one in 2^20 or so, as the span is below 2^44 and the
// draw has 64 bits. That does not matter for a jitter.

/* From low to high, both included. High is at most three times a hundred years. */
static uint64_t orchi_retry_draw(uint64_t low, uint64_t high) {
    return high > low ? low + orch_random() % (high - low + 1) : high;
}

/* The back-off after the attempt that has just failed, and prepares the next one. Rounded up, as
 * times never come early. */
static uint64_t orchi_retry_backoff(orchi_attempts *a) {
    const orch_retry_desc *d = a->desc;
    uint64_t cap = d->max_delay_ms, ms = cap;
    if (d->no_delay) return 0;
    if (d->jitter == ORCH_JITTER_DECORRELATED) {
        ms = orchi_retry_draw(d->delay_ms, a->drawn * 3);
        return a->drawn = ms < cap ? ms : cap;
    }
    if (a->backoff < (double)cap) {
        ms = (uint64_t)a->backoff;
        if ((double)ms < a->backoff) ms++;
        a->backoff *= d->factor;
    }
    return d->jitter == ORCH_JITTER_FULL ? orchi_retry_draw(0, ms) : ms;
}

/* The wait before the next attempt: what the server asks for, else the back-off. That goes on
 * growing with the attempts either way. */
static uint64_t orchi_retry_delay(orchi_attempts *a, const orch_result *r) {
    const orch_retry_desc *d = a->desc;
    uint64_t backoff = orchi_retry_backoff(a), asked = 0;
    if (d->retry_after == NULL || !d->retry_after(r, &asked, d->context)) return backoff;
    return asked < ORCHI_POLICY_MOST_MS ? asked : ORCHI_POLICY_MOST_MS;
}

/* Whether an attempt is left that could help. */
static bool orchi_retry_may(const orchi_attempts *a, const orch_result *r) {
    const orch_retry_desc *d = a->desc;
    if (a->number >= d->attempts || orchi_retry_spent(a, 0)) return false;
    return d->retry_if != NULL ? d->retry_if(r, d->context) : r->error != ORCH_ECANCELED;
}

/* Tells on_attempt. False: it stops the retry, and *r is its error. If that is the one that the
 * attempt ended with, the message stays. */
static bool orchi_retry_tell(orchi_attempts *a, orch_result *r, unsigned left, uint64_t delay) {
    const orch_retry_desc *d = a->desc;
    orch_attempt attempt = {a->number, left, r, orchi_retry_elapsed(a), delay};
    int stop = d->on_attempt != NULL ? d->on_attempt(&attempt, d->context) : 0;
    if (stop == 0) return true;
    if (stop != r->error) {
        orch_result_free(r);
        *r = orch_fail(stop);
    }
    return false;
}

/* Waits, at least for a turn: attempts that never wait must not keep the loop to themselves. */
static bool orchi_retry_wait(orch_result *r, uint64_t delay) {
    int error = delay > 0 ? orch_sleep(delay) : orch_yield();
    if (error == 0) return true;
    orch_result_free(r);
    *r = orch_fail(error);
    return false;
}

/* After a failed attempt: whether another one is to begin now. If not, *r is what all ends with.
 * The budget is asked again after whatever may take time. */
static bool orchi_retry_again(orchi_attempts *a, orch_result *r) {
    bool again = orchi_retry_may(a, r);
    uint64_t delay = again ? orchi_retry_delay(a, r) : 0;
    if (orchi_retry_spent(a, delay)) again = false;
    unsigned left = again ? a->desc->attempts - a->number : 0;
    if (!orchi_retry_tell(a, r, left, again ? delay : 0) || !again) return false;
    if (orchi_retry_spent(a, delay) || !orchi_retry_wait(r, delay)) return false;
    return !orchi_retry_spent(a, 0);
}

/* All attempts, in the current task. Once that was asked to end, no hook is called and no attempt
 * begins: the last outcome is what it came to. */
static orch_result orchi_retry_run(const orch_retry_desc *desc, orch_task_fn fn, void *arg) {
    orchi_attempts a = {desc, fn, arg, orch_now(), (double)desc->delay_ms, desc->delay_ms, 0};
    for (;;) {
        orch_result r = orchi_retry_attempt(&a);
        if (r.error == 0 || orch_cancel_reason() != 0) return r;
        if (!orchi_retry_again(&a, &r)) return r;
        orch_result_free(&r);
    }
}

typedef struct orchi_retry { // the state of a retry that is a task
    orch_retry_desc desc;    // arg is the copy, if there is one
    size_t bytes;
} orchi_retry;

/* fn and arg are in the state: the task's stack holds the attempts only. */
static orch_result orchi_retry_main(void *state) {
    const orch_retry_desc *desc = &((orchi_retry *)state)->desc;
    return orchi_retry_run(desc, desc->fn, desc->arg);
}

/* The task has ended, or could not be started. */
static void orchi_retry_release(void *state) {
    orchi_retry *retry = (orchi_retry *)state;
    if (retry->desc.release != NULL) retry->desc.release(retry->desc.arg);
    orchi_free(orchi_loop, retry, retry->bytes);
}

/* The desc is copied first, so that one path serves for NULL as well. */
orch_future *orch_retry(const orch_retry_desc *desc) {
    orch_retry_desc d;
    orch_result refusal;
    memset(&d, 0, sizeof d);
    if (desc != NULL) d = *desc;
    int error = orchi_policy_error(d.fn != NULL, d.arg, d.arg_size, d.stack_size);
    if (error != 0) {
        error = orchi_misuse("orch_retry", error);
        return orchi_policy_refuse(orchi_rejected(error), d.release, d.arg);
    }
    if (!orchi_retry_valid("orch_retry", &d, &refusal)) {
        return orchi_policy_refuse(orch_settled(refusal), d.release, d.arg);
    }
    void *arg = d.arg;
    orchi_retry *retry = (orchi_retry *)orchi_state_new(sizeof *retry, &arg, d.arg_size);
    if (retry == NULL) return orchi_policy_refuse(orchi_rejected(ORCH_ENOMEM), d.release, d.arg);
    retry->desc = orchi_retry_defaults(&d);
    retry->desc.arg = arg;
    retry->bytes = orchi_state_end(sizeof *retry) + d.arg_size;
    orch_task_desc task = {d.name, orchi_retry_main, retry, 0, orchi_retry_release, d.stack_size};
    return orch_go_with(&task);
}

// ---- batches: items that a leader starts one by one
//
// A batch is one allocation:
//
//     orchi_batch and what map or hedge adds | generations | futures | copy of arg
//
// Futures and generations are the two halves of the promises. Futures of their own are needed once,
// when all are combined, and an array less is worth it: a map over trivial items is mostly memory.

typedef struct orchi_batch orchi_batch;

typedef struct orchi_item { // on the stack of its task
    orchi_batch *batch;
    size_t index;
    orch_future *held; // what is dropped when it has ended: its permit; or NULL
} orchi_item;

struct orchi_batch {
    const char *name;
    orch_result (*run)(orchi_item *item);                // in the item's task
    void (*ended)(orchi_batch *b, const orch_result *r); // an item has
    orch_future *(*combine)(size_t count, orch_future *const *futures);
    size_t stack_size;
    uint64_t timeout_ms;
    void *arg; // the user's
    void (*release)(void *arg);
    orch_future **futures; // of the items; once they are combined, only of those with a promise
    uint64_t *generations; // of those
    size_t count, running;
    bool failed;          // an item has
    size_t references;    // the leader's and those of the items that run
    orchi_item starting;  // handed to a task that begins
    bool handed;          // it has begun
    orch_promise wake;    // what the leader waits for
    orch_future *outcome; // the combinator; NULL: not yet
    size_t bytes;
};

/* A batch of `size` bytes that begins with an orchi_batch, its promises and the copy of arg behind
 * it, or NULL. What it is made of besides is the caller's to fill in. */
static orchi_batch *orchi_batch_new(size_t size, size_t count, void *arg, size_t arg_size) {
    size_t items = orchi_state_end(size);
    size_t end = items + count * (sizeof(orch_future *) + sizeof(uint64_t));
    if (count > SIZE_MAX / 32) return NULL; // where addresses have 32 bits
    orchi_batch *b = (orchi_batch *)orchi_state_new(end, &arg, arg_size);
    if (b == NULL) return NULL;
    memset(b, 0, size);
    b->generations = (uint64_t *)(void *)((char *)b + items);
    b->futures = (orch_future **)(void *)(b->generations + count);
    b->arg = arg;
    b->count = count;
    b->references = 1;
    b->bytes = orchi_state_end(end) + arg_size;
    return b;
}

/* Combines all items, if they are not yet. Those from `begun` on get promises. Those before are not
 * looked at any more: the combinator has consumed their futures. */
static void orchi_batch_combine(orchi_batch *b, size_t begun) {
    orch_promise promise;
    if (b->outcome != NULL) return;
    for (size_t i = begun; i < b->count; i++) {
        b->futures[i] = orch_future_new(&promise);
        b->generations[i] = promise.generation;
    }
    b->outcome = b->combine(b->count, b->futures);
}

/* The ticket of an item that had not begun when all were combined. */
static orch_promise orchi_batch_item(const orchi_batch *b, size_t i) {
    orch_promise promise = {b->futures[i], b->generations[i]};
    return promise;
}

/* The leader or an item has ended. */
static void orchi_batch_leave(void *batch) {
    orchi_batch *b = (orchi_batch *)batch;
    if (--b->references > 0) return;
    if (b->release != NULL) b->release(b->arg);
    orchi_free(orchi_loop, b, b->bytes);
}

/* Starts the leader, which begins with the first items at once. If it cannot be started, nothing
 * was: no future is left, and its release frees the batch. */
static orch_future *orchi_batch_lead(orchi_batch *b, orch_task_fn lead) {
    orch_task_desc task = {b->name, lead, b, 0, orchi_batch_leave, 0};
    return orch_go_with(&task);
}

/* What the leader returns: its future becomes the combinator. */
static orch_result orchi_batch_hand_over(orchi_batch *b) {
    orchi_batch_combine(b, b->count);
    return orch_chain(b->outcome);
}

/* Whether item i is still to be started; what is not ends here, before its hook could be called.
 * A cancelled leader cancels all. */
static bool orchi_batch_open(orchi_batch *b, size_t i) {
    if (b->outcome == NULL) return true;
    int reason = orch_cancel_reason();
    orch_promise item = orchi_batch_item(b, i);
    if (reason != 0) orch_cancel(b->outcome, reason);
    if (orch_promise_wanted(item)) return true;
    orch_settle(item, orch_fail(ORCH_ECANCELED));
    return false;
}

/* Wakes the leader, if it waits. */
static void orchi_batch_wake(orchi_batch *b) { orch_settle(b->wake, orch_ok(NULL, NULL)); }

/* The hook of the item that the leader waits for: it has not begun, so it has ended. */
static bool orchi_batch_asked(void *batch, int reason) {
    (void)reason;
    orchi_batch_wake((orchi_batch *)batch);
    return true;
}

/* The leader waits for `what`, if it is not NULL, or until it is woken (index 1), to start item i.
 * The hook stays when that begins, but is not called: its promise then follows the task. */
static orch_result orchi_batch_wait(orchi_batch *b, size_t i, orch_future *what) {
    orch_future *pair[2];
    pair[0] = what;
    pair[1] = orch_future_new(&b->wake);
    orch_promise_describe(b->wake, b->name != NULL ? b->name : "");
    orch_promise_on_cancel(orchi_batch_item(b, i), orchi_batch_asked, b);
    return orch_await(what != NULL ? orch_race_n(2, pair) : pair[1]);
}

/* An item has ended, or its task could not be started. That is before its future settles; but
 * whoever is woken here runs after that, from the queue. */
static void orchi_item_end(orchi_item *item, const orch_result *r) {
    orchi_batch *b = item->batch;
    b->running--;
    if (r->error != 0) b->failed = true;
    orch_drop(item->held);
    b->ended(b, r);
    orchi_batch_leave(b);
}

/* An item's task. It begins inside of orch_go_with, so it finds there which item it is. */
static orch_result orchi_item_main(void *batch) {
    orchi_batch *b = (orchi_batch *)batch;
    orchi_item item;
    item.batch = b; // not as a whole: it has just been written in parts
    item.index = b->starting.index;
    item.held = b->starting.held;
    b->handed = true;
    orch_result r = b->run(&item);
    orchi_item_end(&item, &r);
    return r;
}

/* Starts item i, which is to own what is held for it. Its timeout counts the item only, not the
 * wait for a place. */
static void orchi_batch_start(orchi_batch *b, size_t i, orch_future *held) {
    orch_task_desc task = {b->name, orchi_item_main, b, 0, NULL, b->stack_size};
    b->starting.batch = b;
    b->starting.index = i;
    b->starting.held = held;
    b->handed = false;
    b->running++;
    b->references++;
    orch_future *f = orch_go_with(&task);
    if (!b->handed) orchi_item_end(&b->starting, orch_peek(f));
    if (b->timeout_ms > 0) f = orch_timeout(f, b->timeout_ms);
    if (b->outcome != NULL) orch_follow(orchi_batch_item(b, i), f);
    else b->futures[i] = f;
}

// ---- map
//
// What waits is the leader, for one place at a time, so items start in order and a map over a
// million items has at most `concurrency` tasks and one more. The bound comes from two sides:
// `concurrency` is the map's own, and `limit` a semaphore that several maps may share and that can
// be resized while they run. A permit is held by the item's task and given back when that has
// ended, not when its future was read. Left out: a queue of items that grows while it is mapped. A
// channel with a few tasks that receive from it is that.

enum { ORCHI_MAP_TURN = 128 }; // items that are started without a wait until others get their turn
static const size_t ORCHI_MAP_MOST = 0x7ffffff0; // what a combinator takes

typedef struct orchi_mapping {
    orchi_batch batch;
    orch_map_fn fn;
    size_t concurrency;
    orch_semaphore *limit; // or NULL
    int closed;            // the limit's error, once it has one
    bool full;             // the leader waits for one of the map's own places
    bool retries;
    orch_retry_desc retry;
} orchi_mapping;

/* One attempt at an item. */
static orch_result orchi_mapping_call(void *argument) {
    const orchi_item *item = (const orchi_item *)argument;
    return orchi_outcome(((orchi_mapping *)item->batch)->fn(item->index, item->batch->arg));
}

/* An item, with its retries: they are a loop in its task. */
static orch_result orchi_mapping_run(orchi_item *item) {
    const orchi_mapping *m = (const orchi_mapping *)item->batch;
    if (!m->retries) return orchi_mapping_call(item);
    return orchi_retry_run(&m->retry, orchi_mapping_call, item);
}

/* Wakes a leader that waits for one of the map's own places. One that waits for a permit is served
 * by the semaphore, and would lose its turn there if it was woken. */
static void orchi_mapping_ended(orchi_batch *b, const orch_result *r) {
    (void)r;
    if (((orchi_mapping *)b)->full) orchi_batch_wake(b);
}

/* The release of a permit that needed no wait. */
static void orchi_mapping_give_back(void *limit) { orch_release((orch_semaphore *)limit); }

/* A permit of the limit, or why there is none. A semaphore that was closed is not asked again, as
 * it may be gone. */
static orch_result orchi_mapping_permit(orchi_mapping *m, size_t i) {
    if (m->closed != 0) return orch_fail(m->closed);
    if (orch_try_acquire(m->limit)) return orch_ok(m->limit, orchi_mapping_give_back);
    orch_result permit = orchi_batch_wait(&m->batch, i, orch_semaphore_acquire(m->limit));
    if (permit.error == ORCH_ECLOSED) m->closed = permit.error;
    return permit;
}

/* Waits until item i may run. Returns what it is to hold, or an error. */
static orch_result orchi_mapping_place(orchi_mapping *m, size_t i) {
    orch_result place = orch_ok(NULL, NULL);
    while (m->batch.running >= m->concurrency) {
        m->full = true;
        place = orchi_batch_wait(&m->batch, i, NULL);
        m->full = false;
        if (place.error != 0 || !orchi_batch_open(&m->batch, i)) return place;
    }
    return m->limit != NULL ? orchi_mapping_permit(m, i) : place;
}

/* Starts item i as soon as there is a place, unless that comes too late. A settled future holds the
 * permit, whichever way it came: dropping it gives the permit back. */
static void orchi_mapping_queue(orchi_mapping *m, size_t i) {
    orch_result place = orchi_mapping_place(m, i);
    orch_future *held = place.release != NULL ? orch_settled(place) : NULL;
    int error = held != NULL ? orch_peek(held)->error : place.error;
    bool open = orchi_batch_open(&m->batch, i);
    if (open && error == 0) {
        orchi_batch_start(&m->batch, i, held);
    } else {
        if (open) orch_settle(orchi_batch_item(&m->batch, i), orch_fail(error));
        orch_drop(held);
    }
}

/* Lets others run. What runs may fail meanwhile, and needs its combinator. */
static void orchi_mapping_turn(orchi_batch *b, size_t i) {
    if (b->running > 0) orchi_batch_combine(b, i);
    if (orch_cancel_reason() == 0) orch_yield();
}

/* The items one by one. Once all is decided, those that are left end in here, too. */
static orch_result orchi_mapping_lead(void *state) {
    orchi_mapping *m = (orchi_mapping *)state;
    orchi_batch *b = &m->batch;
    for (size_t i = 0; i < b->count; i++) {
        if (i % ORCHI_MAP_TURN == ORCHI_MAP_TURN - 1) orchi_mapping_turn(b, i);
        bool waits = m->limit != NULL || b->running >= m->concurrency;
        if (waits || b->failed || orch_cancel_reason() != 0) orchi_batch_combine(b, i);
        if (!orchi_batch_open(b, i)) continue;
        if (waits) orchi_mapping_queue(m, i);
        else orchi_batch_start(b, i, NULL);
    }
    return orchi_batch_hand_over(b);
}

/* The map of a valid desc, ready to be led; NULL when out of memory. Of the desc's retry the task's
 * name and stack are those of the items. */
static orchi_mapping *orchi_mapping_make(const orch_map_desc *d) {
    orchi_mapping *m = (orchi_mapping *)(void *)orchi_batch_new(sizeof *m, d->count, d->context, 0);
    if (m == NULL) return NULL;
    m->batch.name = d->name;
    m->batch.run = orchi_mapping_run;
    m->batch.ended = orchi_mapping_ended;
    m->batch.stack_size = d->stack_size;
    m->batch.timeout_ms = d->timeout_ms;
    m->fn = d->fn;
    m->concurrency = d->concurrency > 0 ? d->concurrency : SIZE_MAX;
    m->limit = d->limit;
    m->retries = d->retry != NULL;
    if (m->retries) m->retry = orchi_retry_defaults(d->retry);
    m->retry.name = d->name;
    m->retry.stack_size = d->stack_size;
    m->batch.release = d->release;
    m->batch.combine = d->keep_going ? orch_all_settled_n : orch_all_n;
    return m;
}

/* What is wrong with a desc's numbers. */
static bool orchi_mapping_valid(const orch_map_desc *d, orch_result *refusal) {
    if (!orchi_policy_time("orch_map", "timeout_ms", d->timeout_ms, refusal)) return false;
    if (d->retry == NULL) return true;
    if (d->retry->fn == NULL) return orchi_retry_valid("orch_map: retry", d->retry, refusal);
    *refusal = orch_failf(ORCH_EINVAL, "orch_map: retry.fn is set: what is retried is fn");
    return false;
}

// The desc's copy has zeros for NULL, so one path serves: a missing fn is the mistake it would be
// anyway. Whatever is refused gives the context back at once; else the batch owns it, and its
// release comes with the last reference, on every path.

orch_future *orch_map(const orch_map_desc *desc) {
    orch_map_desc d;
    orch_result refusal;
    memset(&d, 0, sizeof d);
    if (desc != NULL) d = *desc;
    int error = orchi_policy_error(d.fn != NULL, NULL, 0, d.stack_size);
    if (error == 0 && d.count > ORCHI_MAP_MOST) error = ORCH_EINVAL;
    if (error != 0) {
        error = orchi_misuse("orch_map", error);
        return orchi_policy_refuse(orchi_rejected(error), d.release, d.context);
    }
    if (!orchi_mapping_valid(&d, &refusal)) {
        return orchi_policy_refuse(orch_settled(refusal), d.release, d.context);
    }
    orchi_mapping *m = orchi_mapping_make(&d);
    if (m != NULL) return orchi_batch_lead(&m->batch, orchi_mapping_lead);
    return orchi_policy_refuse(orchi_rejected(ORCH_ENOMEM), d.release, d.context);
}

// ---- hedge
//
// The tail of latencies is cut by asking a second server when the first one takes longer than most
// do: with a delay at the 95th percentile that is one more request in twenty. (J. Dean and L. A.
// Barroso, "The Tail at Scale", CACM 2013.) It is an `any` whose inputs start late: by the delay,
// or at once when one fails. What is asked must stand being done twice.

typedef struct orchi_hedge {
    orchi_batch batch;
    orch_hedge_desc desc; // its defaults filled in
    size_t due;           // attempts that should have begun by now
    bool hopeless;        // retry_if has said no
} orchi_hedge;

/* One attempt. After an error that will not pass, those that run go on: they may be luckier. */
static orch_result orchi_hedge_run(orchi_item *item) {
    orchi_hedge *h = (orchi_hedge *)item->batch;
    const orch_hedge_desc *d = &h->desc;
    orch_result r = orchi_outcome(d->fn(h->batch.arg));
    if (r.error != 0 && d->retry_if != NULL && !d->retry_if(&r, d->context)) h->hopeless = true;
    return r;
}

/* A failure makes the next attempt due. A success reaches the leader through its hook. */
static void orchi_hedge_ended(orchi_batch *b, const orch_result *r) {
    if (r->error == 0) return;
    ((orchi_hedge *)b)->due++;
    orchi_batch_wake(b);
}

/* Waits until attempt i is due: by the delay, or by a failure for each attempt after the first. */
static int orchi_hedge_wait(orchi_hedge *h, size_t i) {
    while (h->due <= i && !h->hopeless && orchi_batch_open(&h->batch, i)) {
        orch_result r = orchi_batch_wait(&h->batch, i, orch_after(h->desc.delay_ms));
        if (r.error != 0) return r.error;
        if (r.index == 0) h->due++;
    }
    return h->hopeless ? ORCH_ECANCELED : 0;
}

/* The attempts one by one. They are combined from the start, as the leader mostly waits. */
static orch_result orchi_hedge_lead(void *state) {
    orchi_hedge *h = (orchi_hedge *)state;
    orchi_batch_combine(&h->batch, 0);
    for (size_t i = 0; i < h->batch.count; i++) {
        int error = orchi_hedge_wait(h, i);
        if (!orchi_batch_open(&h->batch, i)) continue;
        if (error == 0) error = orchi_attempt_begin(i + 1);
        if (error != 0) orch_settle(orchi_batch_item(&h->batch, i), orch_fail(error));
        else orchi_batch_start(&h->batch, i, NULL);
    }
    return orchi_batch_hand_over(&h->batch);
}

/* What is wrong with a desc's numbers. */
static bool orchi_hedge_valid(const orch_hedge_desc *d, orch_result *refusal) {
    if (!orchi_policy_time("orch_hedge", "delay_ms", d->delay_ms, refusal)) return false;
    if (d->attempts <= 100) return true;
    *refusal = orch_failf(ORCH_EINVAL, "orch_hedge: attempts is %u, more than 100", d->attempts);
    return false;
}

/* The hedge of a valid desc, ready to be led; NULL when out of memory. */
static orchi_hedge *orchi_hedge_make(const orch_hedge_desc *d) {
    size_t attempts = d->attempts > 0 ? d->attempts : 2;
    orchi_batch *b = orchi_batch_new(sizeof(orchi_hedge), attempts, d->arg, d->arg_size);
    orchi_hedge *h = (orchi_hedge *)(void *)b;
    if (h == NULL) return NULL;
    b->name = d->name;
    b->run = orchi_hedge_run;
    b->ended = orchi_hedge_ended;
    b->stack_size = d->stack_size;
    h->desc = *d;
    h->desc.delay_ms = d->delay_ms > 0 ? d->delay_ms : 100;
    h->due = d->no_delay ? attempts : 1;
    b->release = d->release;
    b->combine = orch_any_n;
    return h;
}

// As with orch_map. A race of attempts is not enough here: the first outcome may be a failure, and
// a hedge wants the first success. So it combines by orch_any_n, and fails when every attempt has.

orch_future *orch_hedge(const orch_hedge_desc *desc) {
    orch_hedge_desc d;
    orch_result refusal;
    memset(&d, 0, sizeof d);
    if (desc != NULL) d = *desc;
    int error = orchi_policy_error(d.fn != NULL, d.arg, d.arg_size, d.stack_size);
    if (error != 0) {
        error = orchi_misuse("orch_hedge", error);
        return orchi_policy_refuse(orchi_rejected(error), d.release, d.arg);
    }
    if (!orchi_hedge_valid(&d, &refusal)) {
        return orchi_policy_refuse(orch_settled(refusal), d.release, d.arg);
    }
    orchi_hedge *h = orchi_hedge_make(&d);
    if (h != NULL) return orchi_batch_lead(&h->batch, orchi_hedge_lead);
    return orchi_policy_refuse(orchi_rejected(ORCH_ENOMEM), d.release, d.arg);
}

// ------------------------------------------------------------------------------------------------
// >>guard
//
// Policy, second half: limiter, circuit breaker, single flight, adaptive concurrency. On the public
// API and >>base alone. Invariants:
//   - Every guard begins with an orchi_gate; a broken one is nothing else, and never written.
//   - A guard that was freed keeps its memory while calls that it let through are under way, and
//     calls nothing of the user's any more.
//   - Who waits stands in a line, in an extra slot, and is served in order; who is not wanted any
//     more is taken out and gets nothing. A cancel hook takes out its own.
//   - A limiter has one alarm, for the first in its line, however many wait. The clock is read once
//     when it rings, and once for a start that need not wait.
//   - Calls run in a task whose first function is the guard's: it knows whether the task was
//     cancelled, and needs no memory but the task's stack, to which its block is copied.
//   - A state changes as a whole before anything of the user's runs, and is looked at again after.

// ---- what guards have in common

// Why no guard has a task or a timer of its own: a program has a breaker for each service it calls,
// and most of them are idle. An idle guard is a few words that nobody looks at. What time would
// change is worked out when somebody comes; only a line of waiters needs an alarm.

typedef struct orchi_gate { // first in every guard
    int error;              // not 0: broken, and this is all there is
    bool freed;             // by its owner, while calls are under way
    orch_loop *loop;
} orchi_gate;

static const orchi_gate orchi_broken_gates[] = {
    {ORCH_ENOMEM, false, NULL}, {ORCH_EINVAL, false, NULL}, {ORCH_ENOLOOP, false, NULL}};

/* The immortal object of an error. */
static void *orchi_gate_broken(int error) {
    size_t i = error == ORCH_ENOMEM ? 0 : error == ORCH_EINVAL ? 1 : 2;
    return (void *)(uintptr_t)&orchi_broken_gates[i];
}

/* A guard with zeros behind its gate, or a broken one. */
static void *orchi_gate_new(size_t size, bool valid, const char *function) {
    int error = orchi_loop == NULL ? ORCH_ENOLOOP : valid ? 0 : ORCH_EINVAL;
    if (error != 0) return orchi_gate_broken(orchi_misuse(function, error));
    orchi_gate *gate = (orchi_gate *)orchi_allocate(orchi_loop, size);
    if (gate == NULL) return orchi_gate_broken(ORCH_ENOMEM);
    memset(gate, 0, size);
    gate->loop = orchi_loop;
    return gate;
}

/* Why a guard cannot be used. */
ORCHI_COLD static int orchi_gate_wrong(const orchi_gate *gate, const char *function) {
    if (gate == NULL) return orchi_misuse(function, ORCH_EINVAL);
    if (gate->error != 0) return gate->error;
    return orchi_misuse(function, orchi_loop == NULL ? ORCH_ENOLOOP : ORCH_ETHREAD);
}

/* What every operation asks first. */
static inline int orchi_gate_error(const void *guard, const char *function) {
    const orchi_gate *gate = (const orchi_gate *)guard;
    if (ORCHI_LIKELY(gate != NULL && gate->error == 0 && gate->loop == orchi_loop)) return 0;
    return orchi_gate_wrong(gate, function);
}

/* The same for what only looks, and has no error to return. */
static bool orchi_gate_usable(const void *guard, const char *function) {
    return orchi_gate_error(guard, function) == 0;
}

// 73 years: so sums of a few times stay far from where 64 bits overflow.
static const int64_t ORCHI_LONG_NS = INT64_MAX / 4;

static bool orchi_long_ms(uint64_t ms) { return ms > (uint64_t)ORCHI_LONG_NS / 1000000u; }

/* In nanoseconds; what is too long counts as 73 years. */
static int64_t orchi_ms_ns(uint64_t ms) {
    return orchi_long_ms(ms) ? ORCHI_LONG_NS : (int64_t)ms * 1000000;
}

/* In milliseconds, rounded up: a wait must not be too short. */
static uint64_t orchi_ns_ms(int64_t ns) { return ns > 0 ? ((uint64_t)ns + 999999u) / 1000000u : 0; }

static int64_t orchi_gate_now(const orchi_gate *gate) { return (int64_t)orchi_now(gate->loop); }

/* What reports call a future that waits at a guard. */
static void orchi_gate_label(char *label, size_t size, const char *kind, const char *name) {
    const char *quote = name[0] != '\0' ? "'" : "";
    snprintf(label, size, "%s%s%s%s%s", kind, name[0] != '\0' ? " " : "", quote, name, quote);
}

enum { ORCHI_LABEL = 48 };

// ---- a line of those who wait
//
// What a semaphore does for tasks, a guard does for promises: a call under a guard is a future from
// its beginning, so who waits never lies on a stack. First come, first served, and joining, leaving
// and serving are constant, however long the line is.

// The places of a line are linked both ways, as a hook takes one out of the middle. Waiting is a
// promise in the line's order:
//
//     join        a place at the end; its promise gets the hook and the label
//     served      the place goes first, then the promise settles: whoever hears of it may join anew
//     cancelled   the hook takes the place out and lets the promise end at once
//     not wanted  its hook may be on its way still. Serving passes over it, and settles it then and
//                 there, so that the hook, which would find its place gone, is not called

typedef struct orchi_place { // in an extra slot
    orch_promise promise;
    void *owner; // whose line it is
    struct orchi_place *previous, *next;
    uint32_t weight;
} orchi_place;

typedef char orchi_place_fits[sizeof(orchi_place) <= 48 ? 1 : -1]; // an extra slot

typedef struct orchi_line {
    orchi_place *first, *last;
    size_t count;
} orchi_line;

/* The last place, whose cancellation is told to `leave`; NULL when out of memory. */
static orchi_place *orchi_line_join(orchi_line *line, orch_promise promise, void *owner,
                                    orch_cancel_fn leave, const char *label) {
    orchi_place *place =
        orch_promise_pending(promise) ? (orchi_place *)orchi_extra_new(orchi_loop) : NULL;
    if (place == NULL) {
        orch_settle(promise, orch_fail(ORCH_ENOMEM));
        return NULL;
    }
    place->promise = promise;
    place->owner = owner;
    place->previous = line->last;
    place->next = NULL;
    place->weight = 0;
    if (line->last != NULL) line->last->next = place;
    else line->first = place;
    line->last = place;
    line->count++;
    orch_promise_on_cancel(promise, leave, place);
    orch_promise_describe(promise, label);
    return place;
}

/* Takes a place out of its line. The place stays. */
static void orchi_line_remove(orchi_line *line, orchi_place *place) {
    if (place->previous != NULL) place->previous->next = place->next;
    else line->first = place->next;
    if (place->next != NULL) place->next->previous = place->previous;
    else line->last = place->previous;
    line->count--;
}

/* Takes a place out of its line and frees it. Returns the ticket, for a settle that comes last. */
static orch_promise orchi_line_leave(orchi_line *line, orchi_place *place) {
    orch_promise promise = place->promise;
    orchi_line_remove(line, place);
    orchi_extra_free(orchi_loop, place);
    return promise;
}

/* The first that is still wanted. Those before it get nothing: their hooks may not have run yet. */
static orchi_place *orchi_line_first(orchi_line *line) {
    while (line->first != NULL && !orch_promise_wanted(line->first->promise)) {
        orch_settle(orchi_line_leave(line, line->first), orch_fail(ORCH_ECANCELED));
    }
    return line->first;
}

/* Sends everybody away. The line is empty before the first hears of it. */
static void orchi_line_close(orchi_line *line, int error) {
    orchi_line gone = *line;
    line->first = line->last = NULL;
    line->count = 0;
    while (gone.first != NULL) {
        orch_settle(orchi_line_leave(&gone, gone.first), orch_fail(error));
    }
}

// ---- an alarm: a call from the loop that can be called off
//
// It is a `then` on a timer or on a settled future. Calling it off drops nothing that would have to
// be waited for: it forgets its owner, and cleans up after itself when the loop comes by.

// Its life: `future` is held by whoever may call it off. Rung or called off, it is detached, and
// the callback frees the slot; nobody else does, so it is freed once. An alarm that was called off
// has NULL for an owner: the owner may be gone before the loop comes by.

typedef struct orchi_alarm { // in an extra slot
    void (*ring)(void *owner, int error);
    void *owner; // NULL: it was called off
    orch_future *future;
} orchi_alarm;

typedef char orchi_alarm_fits[sizeof(orchi_alarm) <= 48 ? 1 : -1]; // an extra slot

static orch_result orchi_alarm_run(orch_result *in, void *context) {
    orchi_alarm alarm = *(orchi_alarm *)context;
    orchi_extra_free(orchi_loop, context);
    if (alarm.owner != NULL) {
        orch_detach(alarm.future);
        alarm.ring(alarm.owner, in->error);
    }
    return orch_ok(NULL, NULL);
}

/* Calls ring(owner, error) from the loop when f, which can be dropped without waiting, has settled.
 * NULL when out of memory. */
static orchi_alarm *orchi_alarm_new(orch_future *f, void (*ring)(void *owner, int error),
                                    void *owner) {
    orchi_alarm *alarm = (orchi_alarm *)orchi_extra_new(orchi_loop);
    if (alarm == NULL) {
        orch_drop(f);
        return NULL;
    }
    alarm->ring = ring;
    alarm->owner = owner;
    alarm->future = orch_then(f, orchi_alarm_run, orchi_alarm_run, alarm);
    if (!orch_is_settled(alarm->future)) return alarm;
    orch_drop(alarm->future); // rejected: nothing will call
    orchi_extra_free(orchi_loop, alarm);
    return NULL;
}

/* Calls it off. The loop comes by once more and finds nobody. */
static void orchi_alarm_off(orchi_alarm *alarm) {
    if (alarm == NULL) return;
    alarm->owner = NULL;
    orch_cancel(alarm->future, 0);
    orch_detach(alarm->future);
}

// ---- a call: a task whose first function is a guard's

// The block, as it is built by the caller and then copied to the top of the new task's stack:
//
//     | orchi_call, and what the guard needs | copy of the argument | more: the key of a flight |
//     0                                      copied                 more
//
// The offsets stay right wherever it lies, while pointers into it would not. `started` points to
// the caller's frame: the task begins inside of orch_go_with, so that frame is still there, and
// false says that nobody has taken over the argument.

typedef struct orchi_call { // first in the block that the guard's function gets
    orch_task_fn fn;
    void *arg;
    void (*release)(void *arg);
    size_t copied; // where in the block the argument's copy begins; 0: it was not copied
    size_t more;   // where what the guard added begins
    bool *started; // of who starts it: false when there was no memory
} orchi_call;

static orch_task_desc orchi_call_desc(orch_task_fn fn, void *arg) {
    orch_task_desc desc;
    memset(&desc, 0, sizeof desc);
    desc.fn = fn;
    desc.arg = arg;
    return desc;
}

/* Gives up the argument of a call that will not take place. */
static void orchi_call_give_up(const orch_task_desc *desc) {
    if (desc != NULL && desc->release != NULL) desc->release(desc->arg);
}

static orch_future *orchi_call_refuse(const orch_task_desc *desc, orch_result r) {
    orchi_call_give_up(desc);
    return orch_settled(r);
}

/* What is wrong with the desc of a call whose guard adds `size` bytes to the argument: what
 * orch_go_with would say of the whole block, but in the name of the guard's function. */
static int orchi_call_error(const orch_task_desc *desc, size_t size, const char *function) {
    bool wrong = desc == NULL || desc->fn == NULL || desc->arg_size > SIZE_MAX / 4 ||
                 (desc->arg_size > 0 && desc->arg == NULL);
    if (wrong) return orchi_misuse(function, ORCH_EINVAL);
    uint32_t size_log = 0;
    orch_task_desc block = *desc;
    block.arg = &block; // any: it is only compared with NULL
    block.arg_size += orchi_state_end(size);
    int error = orchi_task_error(&block, &size_log);
    return error != 0 ? orchi_misuse(function, error) : 0;
}

enum { ORCHI_CALL_WORDS = 64 }; // blocks up to this size are built without an allocation

/* Builds the block: head, argument, more. */
static void orchi_call_fill(char *block, orchi_call *head, size_t size, const orch_task_desc *desc,
                            const void *more, size_t more_size) {
    head->copied = desc->arg_size > 0 ? orchi_state_end(size) : 0;
    head->more = orchi_state_end(size) + desc->arg_size;
    memcpy(block, head, size);
    if (desc->arg_size > 0) memcpy(block + head->copied, desc->arg, desc->arg_size);
    if (more_size > 0) memcpy(block + head->more, more, more_size);
}

/* Starts `guard` with a block that begins with `head`, of `size` bytes. If it could not start, the
 * argument has been given up, and the future is rejected. */
static orch_future *orchi_call_go(const orch_task_desc *desc, orch_task_fn guard, orchi_call *head,
                                  size_t size, const void *more, size_t more_size) {
    uint64_t few[ORCHI_CALL_WORDS];
    size_t total = orchi_state_end(size) + desc->arg_size + more_size;
    head->fn = desc->fn;
    head->arg = desc->arg;
    head->release = desc->release;
    void *block = total <= sizeof few ? few : orchi_allocate(orchi_loop, total);
    if (block == NULL) return orchi_call_refuse(desc, orch_fail(ORCH_ENOMEM));
    orchi_call_fill((char *)block, head, size, desc, more, more_size);
    orch_task_desc task = *desc;
    task.fn = guard;
    task.arg = block;
    task.arg_size = total;
    task.release = NULL;
    orch_future *f = orch_go_with(&task);
    if (block != few) orchi_free(orchi_loop, block, total);
    if (!*head->started) orchi_call_give_up(desc);
    return f;
}

/* What fn gets. */
static void *orchi_call_arg(orchi_call *call) {
    return call->copied > 0 ? (char *)call + call->copied : call->arg;
}

/* Of the copy, if there is one, as that is what fn was given. */
static void orchi_call_release(orchi_call *call) {
    if (call->release != NULL) call->release(orchi_call_arg(call));
}

/* Runs what the user gave, to its very end: what was returned may be a chain. */
static orch_result orchi_call_run(orchi_call *call) {
    orch_result r = call->fn(orchi_call_arg(call));
    orchi_call_release(call);
    return r.release != NULL ? orch_await(orch_settled(r)) : r;
}

/* Whether an error says no more than that the call was cancelled. */
static bool orchi_call_cancelled(const orch_result *r, int reason) {
    return r->error != 0 && (reason != 0 || r->error == ORCH_ECANCELED);
}

// ---- a pass: leave for one call, owned by a result until it is recorded
//
// For calls that are no task of the guard's: one may ask for a pass, do the call in any way, and
// record its outcome. A pass that is dropped and not recorded is given back by its release, and
// says nothing about the service: so a way out in between cannot leave a breaker half-open for
// ever.

typedef struct orchi_pass { // in an extra slot, or in a call's block
    void *guard;
    uint64_t number; // of the guard's state when the call began
    int64_t began;   // ns
    double limit;    // adaptive: when it began
    uint32_t beside; // adaptive: calls that were under way when it began, itself included
} orchi_pass;

typedef char orchi_pass_fits[sizeof(orchi_pass) <= 48 ? 1 : -1]; // an extra slot

/* Takes the pass out of a result that owns it. What else the result may be is a mistake, unless it
 * owns nothing. */
static bool orchi_pass_take(orch_result *r, void (*unused)(void *pass), orchi_pass *pass,
                            const char *function) {
    if (r == NULL) orchi_misuse(function, ORCH_EINVAL);
    if (r == NULL) return false;
    bool good = r->error == 0 && r->release == unused;
    if (good) {
        *pass = *(orchi_pass *)r->value;
        orchi_extra_free(orchi_loop, orch_take(r));
    } else if (r->error == 0 && r->release != NULL) {
        orchi_misuse(function, ORCH_EINVAL); // another guard's, or shared with others
    }
    if (!good) orch_result_free(r);
    return good;
}

// ---- limiter
//
// Token bucket, as a point in time: `empty` is when the bucket was last empty, had it been filling
// ever since. Tokens are there for now - empty; a start moves `empty` on by what its tokens cost,
// and a full bucket drags it along. Costs are exact: nanoseconds, and parts of one in units of
// 1 / limit.
// Sliding window: a ring with, for each of the last `limit` starts, when it has left the window. A
// start of weight w takes the w oldest, so the youngest of these says when it may come.
//
// For example, limit 10 in 1000 ms: a token costs 100 ms. At 5000 ms, with `empty` at 4000, there
// are ten; three starts move it to 4300, and seven are left. Nothing has to be added by a timer: at
// 5100 there are eight, as 5100 - 4300 says. After a pause until 9000 a full bucket has dragged
// `empty` to 8000: ten, and no more. This is the generic cell rate algorithm, as ATM networks
// police with (ITU-T I.371), seen from the other end.
//
// A bucket allows limit starts at the end of an interval and limit at the beginning of the next.
// Servers that count by windows of their own answer that with 429: for them there is `strict`.

// Why exact: 3 starts in 1000 ms cost 333,333,333 ns and a third each. Rounded down, a limiter
// would let through more than its limit in the long run; rounded up, fewer. The thirds add up to
// whole nanoseconds in `part`, and only a wait is rounded, upwards.

typedef struct orchi_instant {
    int64_t ns;
    uint32_t part; // of ns, in 1 / limit
} orchi_instant;

struct orch_limiter {
    orchi_gate gate;
    orch_limiter_desc desc;
    uint64_t step;       // ns for a token
    uint32_t rest;       // and parts
    uint32_t passes;     // starts that did not wait, since one was made to
    orchi_instant empty; // token bucket
    int64_t fill_ns;     // from empty to full
    uint32_t fill_part;
    uint32_t next;   // sliding window: the oldest in the ring
    int64_t *leaves; // the ring
    int64_t paused;  // ns: no start before
    orchi_line line;
    orchi_alarm *alarm; // for the first in the line, NULL when nobody waits
    void (*ring)(void *owner, int error);
    bool soon; // the alarm rings without a timer
    char label[ORCHI_LABEL];
};

enum { ORCHI_STRICT_MOST = 1 << 24, ORCHI_PASSES = 128 };

/* The most that one start can weigh. */
static uint32_t orchi_limiter_most(const orch_limiter *l) {
    return l->desc.strict ? l->desc.limit : l->desc.burst;
}

/* The one place for defaults. Whether the desc is valid: the bucket must fill in 73 years. */
static bool orchi_limiter_resolve(const orch_limiter_desc *given, orch_limiter_desc *desc) {
    if (given == NULL || given->limit == 0 || given->interval_ms == 0) return false;
    if (orchi_long_ms(given->interval_ms)) return false;
    if (given->strict && (given->burst != 0 || given->limit > ORCHI_STRICT_MOST)) return false;
    *desc = *given;
    if (desc->name == NULL) desc->name = "";
    if (desc->burst == 0 && !desc->strict) desc->burst = desc->limit;
    uint64_t token = (uint64_t)orchi_ms_ns(desc->interval_ms) / desc->limit + 1;
    return desc->strict || token <= (uint64_t)ORCHI_LONG_NS / desc->burst;
}

/* When `weight` more tokens have come. weight and rest are below 2^32, so their product and a part
 * fit 64 bits. */
static orchi_instant orchi_limiter_add(const orch_limiter *l, orchi_instant t, uint32_t weight) {
    uint64_t parts = (uint64_t)weight * l->rest + t.part;
    t.ns += (int64_t)(weight * l->step + parts / l->desc.limit);
    t.part = (uint32_t)(parts % l->desc.limit);
    return t;
}

/* Takes over a resolved desc. */
static void orchi_limiter_set(orch_limiter *l, const orch_limiter_desc *desc) {
    uint64_t interval = (uint64_t)orchi_ms_ns(desc->interval_ms);
    orchi_instant zero = {0, 0};
    l->desc = *desc;
    l->step = interval / desc->limit;
    l->rest = (uint32_t)(interval % desc->limit);
    orchi_instant full = orchi_limiter_add(l, zero, desc->burst);
    l->fill_ns = full.ns;
    l->fill_part = full.part;
}

/* The ring of a sliding window in which nothing has started; NULL when out of memory. */
static int64_t *orchi_limiter_window(orch_loop *loop, uint32_t limit) {
    int64_t *leaves = (int64_t *)orchi_allocate(loop, limit * sizeof *leaves);
    if (leaves != NULL) memset(leaves, 0, limit * sizeof *leaves);
    return leaves;
}

static void orchi_limiter_dispose(orch_limiter *l) {
    orch_loop *loop = l->gate.loop;
    orchi_free(loop, l->leaves, l->desc.limit * sizeof *l->leaves);
    orchi_free(loop, l, sizeof *l);
}

/* A bucket that has been full drags `empty` along: it holds no more than burst, exactly. */
static void orchi_limiter_fill(orch_limiter *l, int64_t now) {
    orchi_instant full = {now - l->fill_ns, 0};
    if (l->fill_part > 0) {
        full.ns--;
        full.part = l->desc.limit - l->fill_part;
    }
    bool behind = l->empty.ns < full.ns || (l->empty.ns == full.ns && l->empty.part < full.part);
    if (behind) l->empty = full;
}

/* When a start of this weight is allowed, rounded up to whole nanoseconds. */
static int64_t orchi_limiter_when(orch_limiter *l, uint32_t weight, int64_t now) {
    int64_t when;
    if (l->desc.strict) {
        when = l->leaves[((uint64_t)l->next + weight - 1) % l->desc.limit];
    } else {
        orchi_limiter_fill(l, now);
        orchi_instant at = orchi_limiter_add(l, l->empty, weight);
        when = at.ns + (at.part > 0);
    }
    return when > l->paused ? when : l->paused;
}

/* A start that is allowed now. */
static void orchi_limiter_take(orch_limiter *l, uint32_t weight, int64_t now) {
    if (!l->desc.strict) {
        l->empty = orchi_limiter_add(l, l->empty, weight);
        return;
    }
    int64_t leaves = now + orchi_ms_ns(l->desc.interval_ms);
    for (uint32_t i = 0; i < weight; i++) {
        l->leaves[l->next] = leaves;
        l->next = l->next + 1 < l->desc.limit ? l->next + 1 : 0;
    }
}

/* No alarm without a line: one left behind would keep the loop awake for nobody. */
static void orchi_limiter_off(orch_limiter *l) {
    orchi_alarm_off(l->alarm);
    l->alarm = NULL;
    l->soon = false;
}

/* No alarm is left for a line that is gone. */
static void orchi_limiter_close(orch_limiter *l, int error) {
    orchi_limiter_off(l);
    orchi_line_close(&l->line, error);
}

/* Serves the line when `when` has settled: the turn of the loop (soon), or a timer. */
static void orchi_limiter_wake(orch_limiter *l, orch_future *when, bool soon) {
    orchi_limiter_off(l);
    l->alarm = orchi_alarm_new(when, l->ring, l);
    l->soon = soon;
    if (l->alarm == NULL) orchi_limiter_close(l, ORCH_ENOMEM);
}

/* In the loop's next round and not at once: whoever has just joined does not hold the future
 * yet, and may drop it or hand it to a race first. */
static void orchi_limiter_soon(orch_limiter *l) {
    if (!l->soon) orchi_limiter_wake(l, orch_settled(orch_ok(NULL, NULL)), true);
}

/* Gives out the turns that there are, and sets the alarm for the next. */
static void orchi_limiter_serve(orch_limiter *l) {
    orchi_place *first = orchi_line_first(&l->line);
    if (first == NULL) return;
    int64_t now = orchi_gate_now(&l->gate), when = 0;
    for (; first != NULL; first = orchi_line_first(&l->line)) {
        bool fits = first->weight <= orchi_limiter_most(l);
        if (fits && (when = orchi_limiter_when(l, first->weight, now)) > now) break;
        if (fits) orchi_limiter_take(l, first->weight, now);
        orch_result r = fits ? orch_ok(NULL, NULL) : orch_fail(ORCH_ELIMIT);
        orch_settle(orchi_line_leave(&l->line, first), r);
    }
    if (first != NULL) orchi_limiter_wake(l, orch_after(orchi_ns_ms(when - now)), false);
}

/* An alarm that somebody else called off means that the loop ends. */
static void orchi_limiter_ring(void *owner, int error) {
    orch_limiter *l = (orch_limiter *)owner;
    l->alarm = NULL;
    l->soon = false;
    if (error != 0) orchi_line_close(&l->line, error);
    else orchi_limiter_serve(l);
}

/* Who waited is cancelled. The next may be lighter and start at once. */
static bool orchi_limiter_leave(void *context, int reason) {
    (void)reason;
    orchi_place *place = (orchi_place *)context;
    orch_limiter *l = (orch_limiter *)place->owner;
    bool first = place == l->line.first;
    orchi_line_leave(&l->line, place);
    if (l->line.first == NULL) orchi_limiter_off(l);
    else if (first) orchi_limiter_soon(l);
    return true;
}

orch_limiter *orch_limiter_new(const orch_limiter_desc *given) {
    orch_limiter_desc desc;
    bool valid = orchi_limiter_resolve(given, &desc);
    orch_limiter *l = (orch_limiter *)orchi_gate_new(sizeof *l, valid, "orch_limiter_new");
    if (l->gate.error != 0) return l;
    orchi_limiter_set(l, &desc);
    l->ring = orchi_limiter_ring;
    l->empty.ns = -ORCHI_LONG_NS - ORCHI_LONG_NS; // full
    orchi_gate_label(l->label, sizeof l->label, "limiter", desc.name);
    if (!desc.strict) return l;
    l->leaves = orchi_limiter_window(l->gate.loop, desc.limit);
    if (l->leaves != NULL) return l;
    orchi_limiter_dispose(l);
    return (orch_limiter *)orchi_gate_broken(ORCH_ENOMEM);
}

void orch_limiter_free(orch_limiter *l) {
    if (l == NULL || orchi_gate_error(l, "orch_limiter_free") != 0) return;
    l->gate.error = ORCH_ECLOSED; // those who hear of it now may ask again
    orchi_limiter_close(l, ORCH_ECLOSED);
    orchi_limiter_dispose(l);
}

/* What is wrong with a start, before its turn. */
static inline int orchi_limiter_error(const orch_limiter *l, uint32_t weight,
                                      const char *function) {
    int error = orchi_gate_error(l, function);
    if (ORCHI_UNLIKELY(error != 0)) return error;
    if (weight == 0) return orchi_misuse(function, ORCH_EINVAL);
    return weight <= orchi_limiter_most(l) ? 0 : ORCH_ELIMIT;
}

/* A start that need not wait. */
static bool orchi_limiter_pass(orch_limiter *l, uint32_t weight) {
    if (orchi_line_first(&l->line) != NULL) return false;
    int64_t now = orchi_gate_now(&l->gate);
    if (orchi_limiter_when(l, weight, now) > now) return false;
    orchi_limiter_take(l, weight, now);
    return true;
}

/* Also outside a task. It takes nothing from those who stand in line. */
bool orch_limiter_try(orch_limiter *l, uint32_t weight) {
    return orchi_limiter_error(l, weight, "orch_limiter_try") == 0 && orchi_limiter_pass(l, weight);
}

/* A place at the end of the line. */
static orch_future *orchi_limiter_queue(orch_limiter *l, uint32_t weight) {
    orch_promise promise;
    orch_future *f = orch_future_new(&promise);
    orchi_place *place = orchi_line_join(&l->line, promise, l, orchi_limiter_leave, l->label);
    if (place == NULL) return f;
    place->weight = weight;
    if (place == l->line.first) orchi_limiter_soon(l);
    return f;
}

orch_future *orch_limiter_acquire(orch_limiter *l, uint32_t weight) {
    int error = orchi_limiter_error(l, weight, "orch_limiter_acquire");
    if (error != 0) return orch_settled(orch_fail(error));
    bool full = l->desc.waiting > 0 && l->line.count >= l->desc.waiting;
    return full ? orch_settled(orch_fail(ORCH_ELIMIT)) : orchi_limiter_queue(l, weight);
}

/* Every 128th start stands in line, so that a task which never has to wait starves nobody. */
int orch_limit(orch_limiter *l, uint32_t weight) {
    int error = orchi_limiter_error(l, weight, "orch_limit");
    if (ORCHI_UNLIKELY(error != 0)) return error;
    if (orch_self() == NULL) return orchi_misuse("orch_limit", ORCH_ENOTASK);
    if (++l->passes < ORCHI_PASSES && orchi_limiter_pass(l, weight)) return 0;
    l->passes = 0;
    orch_result r = orch_await(orch_limiter_acquire(l, weight));
    orch_result_free(&r);
    return r.error;
}

/* For a start made now: of those in line it knows nothing, and who joins comes after them. */
uint64_t orch_limiter_delay(orch_limiter *l, uint32_t weight) {
    if (orchi_limiter_error(l, weight, "orch_limiter_delay") != 0) return UINT64_MAX;
    int64_t now = orchi_gate_now(&l->gate);
    return orchi_ns_ms(orchi_limiter_when(l, weight, now) - now);
}

/* An alarm that is set already is left: when it rings, serving sees `paused` and sets the next. A
 * pause only ever gets longer, so that two clients that were told to wait do not shorten it. */
int orch_limiter_pause(orch_limiter *l, uint64_t ms) {
    int error = orchi_gate_error(l, "orch_limiter_pause");
    if (error != 0) return error;
    int64_t until = orchi_gate_now(&l->gate) + orchi_ms_ns(ms);
    if (until > l->paused) l->paused = until;
    return 0;
}

/* How many whole tokens there are: a search, as a division would need more than 64 bits. */
static uint32_t orchi_limiter_tokens(orch_limiter *l, int64_t now) {
    uint32_t low = 0, high = l->desc.burst;
    while (low < high) {
        uint32_t middle = low + (high - low + 1) / 2;
        if (orchi_limiter_when(l, middle, now) <= now) low = middle;
        else high = middle - 1;
    }
    return low;
}

/* Changes the bucket: `empty` is put where the tokens that are there are there again. */
static void orchi_limiter_refill(orch_limiter *l, const orch_limiter_desc *desc) {
    int64_t now = orchi_gate_now(&l->gate), paused = l->paused;
    l->paused = 0;
    uint32_t tokens = orchi_limiter_tokens(l, now);
    l->paused = paused;
    orchi_limiter_set(l, desc);
    orchi_instant zero = {0, 0};
    if (tokens > desc->burst) tokens = desc->burst; // more would overflow
    orchi_instant cost = orchi_limiter_add(l, zero, tokens);
    l->empty.ns = now - cost.ns - (cost.part > 0);
    l->empty.part = cost.part > 0 ? desc->limit - cost.part : 0;
}

/* Changes the window: the youngest starts of the old ring stay, in order, and leave by the new
 * interval. */
static void orchi_limiter_rewind(orch_limiter *l, const orch_limiter_desc *desc, int64_t *leaves) {
    uint32_t old = l->desc.limit, keep = old < desc->limit ? old : desc->limit;
    int64_t longer = orchi_ms_ns(desc->interval_ms) - orchi_ms_ns(l->desc.interval_ms);
    for (uint32_t i = 0; i < keep; i++) {
        int64_t left = l->leaves[((uint64_t)l->next + old - keep + i) % old];
        leaves[desc->limit - keep + i] = left != 0 ? left + longer : 0;
    }
    orchi_free(l->gate.loop, l->leaves, old * sizeof *leaves);
    l->leaves = leaves;
    l->next = 0;
    orchi_limiter_set(l, desc);
}

/* What needs memory comes before anything is changed. Those in line are looked at anew: what
 * was allowed later may be allowed now. */
int orch_limiter_change(orch_limiter *l, const orch_limiter_desc *given) {
    orch_limiter_desc desc;
    int error = orchi_gate_error(l, "orch_limiter_change");
    if (error != 0) return error;
    bool valid = orchi_limiter_resolve(given, &desc) && desc.strict == l->desc.strict;
    if (!valid) return orchi_misuse("orch_limiter_change", ORCH_EINVAL);
    desc.name = l->desc.name;
    int64_t *leaves = desc.strict ? orchi_limiter_window(l->gate.loop, desc.limit) : NULL;
    if (desc.strict && leaves == NULL) return ORCH_ENOMEM;
    if (desc.strict) orchi_limiter_rewind(l, &desc, leaves);
    else orchi_limiter_refill(l, &desc);
    if (l->line.first != NULL) orchi_limiter_soon(l);
    return 0;
}

size_t orch_limiter_waiting(const orch_limiter *l) {
    return orchi_gate_usable(l, "orch_limiter_waiting") ? l->line.count : 0;
}

const orch_limiter_desc *orch_limiter_settings(const orch_limiter *l) {
    return orchi_gate_usable(l, "orch_limiter_settings") ? &l->desc : NULL;
}

// ---- circuit breaker
//
//     closed      calls pass. Enough failures in a row, or a rate of them over the last calls: open
//     open        calls are refused at once, for open_ms; then half-open
//     half-open   as many calls as `probes` pass, the others are refused. All good: closed. One bad
//                 or not back in probe_ms: open
//
// No timer: time is looked at when a call comes. Each state has a number, and a call remembers the
// one it began in, as the end of a call from before it opened says nothing about the service now.
// (M. Nygard, "Release It!", 2007.)

//                 enough bad calls                      open_ms, and a call comes
//     +--------+ ------------------> +------+ -------------------------------> +-----------+
//     | closed |                     | open |                                  | half-open |
//     +--------+                     +------+ <------------------------------- +-----------+
//          ^                            a bad probe, or one not back in probe_ms     |
//          +-------------------------------------------------------------------------+
//                                  `probes` good ones
//
// orch_breaker_trip leads to open from anywhere, orch_breaker_reset to closed. Every arrow goes
// through orchi_breaker_enter, which counts up `number`: that is what makes outcomes of before
// worthless, without a list of the calls under way.

struct orch_breaker {
    orchi_gate gate;
    orch_breaker_desc desc;
    orch_breaker_state state;
    uint64_t number;  // of the state: outcomes of calls from earlier ones do not count
    int64_t until;    // ns; open: so long; half-open: when the probes under way count as bad
    uint32_t in_row;  // closed: bad calls; half-open: good ones
    uint32_t probing; // half-open: probes under way
    uint32_t at, seen, seen_bad; // the window
    size_t users; // calls under way, and whoever must find it alive when on_change returns
    orch_breaker_stats stats;
    uint64_t *window; // a bit for each of the last calls: bad; behind the struct
};

enum { ORCHI_WINDOW_MOST = 65536 };

/* The one place for defaults. Comparisons are such that NaN is out of range. */
static bool orchi_breaker_resolve(const orch_breaker_desc *given, orch_breaker_desc *desc) {
    memset(desc, 0, sizeof *desc);
    if (given != NULL) *desc = *given;
    bool rates = !(desc->failure_rate == 0.0);
    if (desc->name == NULL) desc->name = "";
    if (desc->failures == 0) desc->failures = rates ? UINT32_MAX : 5;
    if (desc->window == 0) desc->window = 100;
    if (desc->minimum == 0) desc->minimum = desc->window < 10 ? desc->window : 10;
    if (desc->open_ms == 0) desc->open_ms = 30000;
    if (desc->probes == 0) desc->probes = 1;
    if (desc->probe_ms == 0) desc->probe_ms = desc->open_ms;
    if (rates && !(desc->failure_rate > 0.0 && desc->failure_rate <= 1.0)) return false;
    if (desc->window > ORCHI_WINDOW_MOST || desc->minimum > desc->window) return false;
    return !orchi_long_ms(desc->open_ms) && !orchi_long_ms(desc->probe_ms) &&
           !orchi_long_ms(desc->slow_ms);
}

/* A window is there only where a rate counts; failures in a row need a number. */
static size_t orchi_breaker_bytes(const orch_breaker_desc *desc) {
    size_t words = desc->failure_rate > 0.0 ? (desc->window + 63u) / 64u : 0;
    return sizeof(orch_breaker) + words * sizeof(uint64_t);
}

orch_breaker *orch_breaker_new(const orch_breaker_desc *given) {
    orch_breaker_desc desc;
    bool valid = orchi_breaker_resolve(given, &desc);
    size_t bytes = valid ? orchi_breaker_bytes(&desc) : 0;
    orch_breaker *b = (orch_breaker *)orchi_gate_new(bytes, valid, "orch_breaker_new");
    if (b->gate.error != 0) return b;
    b->desc = desc;
    b->window = (uint64_t *)(void *)(b + 1);
    return b;
}

/* One user less. The last of a freed breaker takes its memory along. */
static void orchi_breaker_leave(orch_breaker *b) {
    if (--b->users > 0 || !b->gate.freed) return;
    orchi_free(b->gate.loop, b, orchi_breaker_bytes(&b->desc));
}

/* It may be freed from on_change or judge: then the call that is under way is the last user. */
void orch_breaker_free(orch_breaker *b) {
    if (b == NULL || orchi_gate_error(b, "orch_breaker_free") != 0) return;
    b->gate.freed = true;
    b->users++;
    orchi_breaker_leave(b);
}

/* Changes the state, forgets what was counted in the old one, then tells. The caller is a user. */
static void orchi_breaker_enter(orch_breaker *b, orch_breaker_state state, int64_t until) {
    orch_breaker_state from = b->state;
    b->state = state;
    b->until = until;
    b->number++;
    b->in_row = b->probing = 0;
    b->at = b->seen = b->seen_bad = 0;
    if (state == from) return;
    if (state == ORCH_BREAKER_OPEN) b->stats.opened++;
    if (b->desc.on_change != NULL) b->desc.on_change(from, state, b->desc.context);
}

/* Counts from now, also when the bad call began long ago. */
static void orchi_breaker_open(orch_breaker *b) {
    int64_t now = orchi_gate_now(&b->gate);
    orchi_breaker_enter(b, ORCH_BREAKER_OPEN, now + orchi_ms_ns(b->desc.open_ms));
}

/* Whether as many probes are under way, or were good, as there may be. */
static bool orchi_breaker_probed(const orch_breaker *b) {
    return (uint64_t)b->in_row + b->probing >= b->desc.probes;
}

/* What time alone changes. Probes that take too long count as bad: a call that never ends would
 * keep it half-open for ever. */
static void orchi_breaker_look(orch_breaker *b) {
    if (b->state == ORCH_BREAKER_CLOSED || orchi_gate_now(&b->gate) < b->until) return;
    if (b->state == ORCH_BREAKER_OPEN) orchi_breaker_enter(b, ORCH_BREAKER_HALF_OPEN, 0);
    else if (orchi_breaker_probed(b)) orchi_breaker_open(b);
}

/* Why a call does not pass. */
ORCHI_COLD static orch_result orchi_breaker_refusal(const orch_breaker *b) {
    const char *name = b->desc.name, *quote = name[0] != '\0' ? "'" : "";
    const char *space = name[0] != '\0' ? " " : "";
    if (b->gate.freed) return orch_fail(ORCH_ECLOSED);
    if (b->state == ORCH_BREAKER_HALF_OPEN) {
        return orch_failf(ORCH_EOPEN,
                          "the circuit breaker%s%s%s%s is half-open, and is being tried", space,
                          quote, name, quote);
    }
    if (b->until == INT64_MAX) {
        return orch_failf(ORCH_EOPEN, "the circuit breaker%s%s%s%s is open until it is reset",
                          space, quote, name, quote);
    }
    uint64_t left = orchi_ns_ms(b->until - orchi_gate_now(&b->gate));
    return orch_failf(ORCH_EOPEN, "the circuit breaker%s%s%s%s is open for another %llu ms", space,
                      quote, name, quote, (unsigned long long)left);
}

/* A call that passes becomes a user. */
static bool orchi_breaker_admit(orch_breaker *b, orchi_pass *pass, orch_result *refusal) {
    b->users++;
    orchi_breaker_look(b);
    bool half = b->state == ORCH_BREAKER_HALF_OPEN;
    bool passes = b->state == ORCH_BREAKER_CLOSED || (half && !orchi_breaker_probed(b));
    if (ORCHI_UNLIKELY(!passes || b->gate.freed)) {
        *refusal = orchi_breaker_refusal(b);
        b->stats.refused++;
        orchi_breaker_leave(b);
        return false;
    }
    pass->guard = b;
    pass->number = b->number;
    pass->began = half || b->desc.slow_ms > 0 ? orchi_gate_now(&b->gate) : 0;
    b->stats.passed++;
    if (!half) return true;
    b->probing++;
    b->until = pass->began + orchi_ms_ns(b->desc.probe_ms);
    return true;
}

/* The window's next bit. */
static void orchi_breaker_note(orch_breaker *b, bool bad) {
    uint64_t *word = &b->window[b->at / 64], bit = (uint64_t)1 << b->at % 64;
    if (b->seen == b->desc.window) b->seen_bad -= (*word & bit) != 0;
    else b->seen++;
    *word = bad ? *word | bit : *word & ~bit;
    b->seen_bad += bad;
    b->at = b->at + 1 < b->desc.window ? b->at + 1 : 0;
}

/* Whether the closed breaker has seen enough. */
static bool orchi_breaker_enough(const orch_breaker *b) {
    if (b->in_row >= b->desc.failures) return true;
    return b->desc.failure_rate > 0.0 && b->seen >= b->desc.minimum &&
           b->seen_bad >= b->desc.failure_rate * b->seen;
}

/* A good call ends the row, and never opens it, even if with it enough calls were seen. */
static void orchi_breaker_count_closed(orch_breaker *b, bool bad) {
    if (b->in_row < UINT32_MAX || !bad) b->in_row = bad ? b->in_row + 1 : 0;
    if (b->desc.failure_rate > 0.0) orchi_breaker_note(b, bad);
    if (bad && orchi_breaker_enough(b)) orchi_breaker_open(b);
}

/* One bad probe is enough, whatever the others say: their outcomes are of an earlier state then. */
static void orchi_breaker_count_probe(orch_breaker *b, orch_outcome outcome) {
    b->probing--;
    if (outcome == ORCH_OUTCOME_IGNORED) return; // somebody else may try
    if (outcome == ORCH_OUTCOME_BAD) orchi_breaker_open(b);
    else if (++b->in_row >= b->desc.probes) orchi_breaker_enter(b, ORCH_BREAKER_CLOSED, 0);
}

/* The end of a call. Outcomes from earlier states come too late. */
static void orchi_breaker_end(orch_breaker *b, const orchi_pass *pass, orch_outcome outcome) {
    if (pass->number == b->number && !b->gate.freed) {
        if (outcome == ORCH_OUTCOME_BAD) b->stats.bad++;
        if (b->state == ORCH_BREAKER_HALF_OPEN) orchi_breaker_count_probe(b, outcome);
        else if (outcome != ORCH_OUTCOME_IGNORED)
            orchi_breaker_count_closed(b, outcome == ORCH_OUTCOME_BAD);
    }
    orchi_breaker_leave(b);
}

/* What an outcome says. A cancelled call says nothing, unless it had been slow by then. */
static orch_outcome orchi_breaker_judge(const orch_breaker *b, const orch_result *r, int reason,
                                        int64_t began) {
    if (b->gate.freed) return ORCH_OUTCOME_IGNORED;
    bool slow =
        b->desc.slow_ms > 0 && orchi_gate_now(&b->gate) - began >= orchi_ms_ns(b->desc.slow_ms);
    orch_outcome outcome = r->error != 0 ? ORCH_OUTCOME_BAD : ORCH_OUTCOME_GOOD;
    if (orchi_call_cancelled(r, reason)) outcome = ORCH_OUTCOME_IGNORED;
    else if (b->desc.judge != NULL) outcome = b->desc.judge(r, b->desc.context);
    return slow ? ORCH_OUTCOME_BAD : outcome;
}

typedef struct orchi_breaker_call {
    orchi_call call;
    orchi_pass pass;
} orchi_breaker_call;

/* The first function of a task that a breaker let pass. */
static orch_result orchi_breaker_task(void *arg) {
    orchi_breaker_call *c = (orchi_breaker_call *)arg;
    orch_breaker *b = (orch_breaker *)c->pass.guard;
    *c->call.started = true;
    orch_result r = orchi_call_run(&c->call);
    int reason = orch_cancel_reason();
    orchi_breaker_end(b, &c->pass, orchi_breaker_judge(b, &r, reason, c->pass.began));
    return r;
}

/* Admitted first, started then: what could not start for want of memory was no call, and gives its
 * place back without a word about the service. */
orch_future *orch_breaker_run_with(orch_breaker *b, const orch_task_desc *desc) {
    int error = orchi_gate_error(b, "orch_breaker_run");
    if (error == 0) error = orchi_call_error(desc, sizeof(orchi_breaker_call), "orch_breaker_run");
    if (error != 0) return orchi_call_refuse(desc, orch_fail(error));
    orchi_breaker_call c;
    orch_result refusal;
    bool started = false;
    memset(&c, 0, sizeof c);
    if (!orchi_breaker_admit(b, &c.pass, &refusal)) return orchi_call_refuse(desc, refusal);
    c.call.started = &started;
    orch_future *f = orchi_call_go(desc, orchi_breaker_task, &c.call, sizeof c, NULL, 0);
    if (!started) orchi_breaker_end(b, &c.pass, ORCH_OUTCOME_IGNORED);
    return f;
}

orch_future *orch_breaker_run(orch_breaker *b, orch_task_fn fn, void *arg) {
    orch_task_desc desc = orchi_call_desc(fn, arg);
    return orch_breaker_run_with(b, &desc);
}

/* The release of a pass that was not recorded. */
static void orchi_breaker_unused(void *context) {
    orchi_pass pass = *(orchi_pass *)context;
    orchi_extra_free(orchi_loop, context);
    orchi_breaker_end((orch_breaker *)pass.guard, &pass, ORCH_OUTCOME_IGNORED);
}

/* The slot first: once it was admitted, nothing may fail. */
orch_result orch_breaker_allow(orch_breaker *b) {
    orch_result refusal;
    int error = orchi_gate_error(b, "orch_breaker_allow");
    if (error != 0) return orch_fail(error);
    orchi_pass *pass = (orchi_pass *)orchi_extra_new(orchi_loop);
    if (pass == NULL) return orch_fail(ORCH_ENOMEM);
    if (orchi_breaker_admit(b, pass, &refusal)) return orch_ok(pass, orchi_breaker_unused);
    orchi_extra_free(orchi_loop, pass);
    return refusal;
}

void orch_breaker_record(orch_result *pass, const orch_result *outcome) {
    orchi_pass p;
    if (!orchi_pass_take(pass, orchi_breaker_unused, &p, "orch_breaker_record")) return;
    orch_breaker *b = (orch_breaker *)p.guard;
    orch_outcome counts = ORCH_OUTCOME_IGNORED;
    if (outcome != NULL) counts = orchi_breaker_judge(b, outcome, 0, p.began);
    orchi_breaker_end(b, &p, counts);
}

/* Changes the state because somebody says so. */
static int orchi_breaker_force(orch_breaker *b, orch_breaker_state state, int64_t until) {
    b->users++;
    orchi_breaker_enter(b, state, until);
    orchi_breaker_leave(b);
    return 0;
}

int orch_breaker_trip(orch_breaker *b, uint64_t ms) {
    int error = orchi_gate_error(b, "orch_breaker_trip");
    if (error != 0) return error;
    int64_t until = INT64_MAX;
    if (ms == 0) ms = b->desc.open_ms;
    if (ms != UINT64_MAX) until = orchi_gate_now(&b->gate) + orchi_ms_ns(ms);
    return orchi_breaker_force(b, ORCH_BREAKER_OPEN, until);
}

int orch_breaker_reset(orch_breaker *b) {
    int error = orchi_gate_error(b, "orch_breaker_reset");
    return error != 0 ? error : orchi_breaker_force(b, ORCH_BREAKER_CLOSED, 0);
}

/* What the next call would find. It changes nothing, so that looking does not tell on_change. */
orch_breaker_state orch_breaker_state_of(const orch_breaker *b) {
    if (!orchi_gate_usable(b, "orch_breaker_state_of")) return ORCH_BREAKER_OPEN;
    bool due = b->state != ORCH_BREAKER_CLOSED && orchi_gate_now(&b->gate) >= b->until;
    if (due && b->state == ORCH_BREAKER_OPEN) return ORCH_BREAKER_HALF_OPEN;
    return due && orchi_breaker_probed(b) ? ORCH_BREAKER_OPEN : b->state;
}

orch_breaker_stats orch_breaker_statistics(const orch_breaker *b) {
    orch_breaker_stats stats;
    memset(&stats, 0, sizeof stats);
    if (!orchi_gate_usable(b, "orch_breaker_statistics")) return stats;
    stats = b->stats;
    stats.in_row = b->in_row;
    stats.seen = b->seen;
    stats.seen_bad = b->seen_bad;
    return stats;
}

const orch_breaker_desc *orch_breaker_settings(const orch_breaker *b) {
    return orchi_gate_usable(b, "orch_breaker_settings") ? &b->desc : NULL;
}

// ---- single flight
//
// A run's block, on its task's stack, is its entry in the table. Each caller has a promise of its
// own in the run's line, so that the last one to leave is known. For a key, the table has at most
// one run that can be joined, and at most one that all have left and that has not ended: what a new
// one waits for.

// Two callers, A and B, of one key, and a third, C, after them:
//
//     A   no run: its block is built, the task starts and links it into the table; fn is called
//     B   finds the run: joins its line, and gives up its own argument
//     A   is cancelled: its place goes (unless the run works on A's own argument: then A's future
//         waits for its end); B still wants it, and the run goes on
//     B   is cancelled: it was the last; the run is asked to end, and B's future waits for that
//     C   finds a run that all have left: a new one, linked beside it, which waits for its end
//
// So fn never runs twice at a time for a key, and nobody gets what was cancelled for others.

typedef struct orchi_flight_run {
    orchi_call call;
    orch_flight *flight;
    struct orchi_flight_run *next;  // in its bucket
    struct orchi_flight_run **live; // of who starts it: this, once it waits
    orch_future *task;              // NULL until it first waits
    orch_future *after;             // the run before, which all have left; or NULL
    orch_task *self;
    orchi_line callers; // weight 1: lent the argument
    uint64_t hash;
    size_t key_size;
    size_t wanted; // callers that have not given up
    bool linked;   // in the table
    bool began;    // fn was called
    bool left;     // all have given up, or the flight was freed
} orchi_flight_run;

enum { ORCHI_BUCKETS = 16 };

struct orch_flight {
    orchi_gate gate;
    orchi_flight_run **buckets; // a power of two
    size_t mask;
    size_t linked; // in the table
    size_t runs;   // that have not ended
    uint64_t seed;
    orchi_flight_run *few[ORCHI_BUCKETS]; // the buckets of a small table
};

orch_flight *orch_flight_new(void) {
    orch_flight *f = (orch_flight *)orchi_gate_new(sizeof *f, true, "orch_flight_new");
    if (f->gate.error != 0) return f;
    f->buckets = f->few;
    f->mask = ORCHI_BUCKETS - 1;
    f->seed = orch_random();
    return f;
}

/* Those of a small table are part of it. */
static void orchi_flight_free_buckets(orch_flight *f) {
    size_t bytes = (f->mask + 1) * sizeof *f->buckets;
    if (f->buckets != f->few) orchi_free(f->gate.loop, f->buckets, bytes);
}

/* When the last run has ended. */
static void orchi_flight_dispose(orch_flight *f) {
    if (f->runs > 0 || !f->gate.freed) return;
    orchi_flight_free_buckets(f);
    orchi_free(f->gate.loop, f, sizeof *f);
}

/* FNV-1a, from a seed, with the high bits brought down. */
static uint64_t orchi_flight_hash(const orch_flight *f, const void *key, size_t key_size) {
    const unsigned char *byte = (const unsigned char *)key;
    uint64_t hash = f->seed;
    for (size_t i = 0; i < key_size; i++) hash = (hash ^ byte[i]) * 0x100000001b3u;
    return hash ^ hash >> 32;
}

/* Behind the run in its block, as the caller's key need not outlive the call. */
static const void *orchi_flight_key(const orchi_flight_run *run) {
    return (const char *)run + run->call.more;
}

/* The run for a key that can be joined; else the one that all have left; or NULL. */
static orchi_flight_run *orchi_flight_find(const orch_flight *f, const void *key, size_t key_size) {
    uint64_t hash = orchi_flight_hash(f, key, key_size);
    orchi_flight_run *run = f->buckets[hash & f->mask], *found = NULL;
    for (; run != NULL && (found == NULL || found->left); run = run->next) {
        bool same = run->hash == hash && run->key_size == key_size;
        if (same && memcmp(orchi_flight_key(run), key, key_size) == 0) found = run;
    }
    return found;
}

/* In front, which is constant. The order in a bucket says nothing: see orchi_flight_find. */
static void orchi_flight_put(orchi_flight_run **buckets, size_t mask, orchi_flight_run *run) {
    run->next = buckets[run->hash & mask];
    buckets[run->hash & mask] = run;
}

/* Four times the buckets. Out of memory, chains get longer. */
static void orchi_flight_grow(orch_flight *f) {
    size_t mask = (f->mask + 1) * 4 - 1, bytes = (mask + 1) * sizeof *f->buckets;
    orchi_flight_run **buckets = (orchi_flight_run **)orchi_allocate(f->gate.loop, bytes);
    if (buckets == NULL) return;
    memset(buckets, 0, bytes);
    for (size_t i = 0; i <= f->mask; i++) {
        for (orchi_flight_run *run = f->buckets[i], *next; run != NULL; run = next) {
            next = run->next;
            orchi_flight_put(buckets, mask, run);
        }
    }
    orchi_flight_free_buckets(f);
    f->buckets = buckets;
    f->mask = mask;
}

/* It grows at two runs a bucket, on average. It never shrinks. */
static void orchi_flight_link(orch_flight *f, orchi_flight_run *run) {
    if (f->linked > 2 * f->mask) orchi_flight_grow(f);
    orchi_flight_put(f->buckets, f->mask, run);
    run->linked = true;
    f->linked++;
}

/* A walk along its bucket. A run that was forgotten is out already, and goes on for its callers. */
static void orchi_flight_unlink(orch_flight *f, orchi_flight_run *run) {
    if (!run->linked) return;
    orchi_flight_run **at = &f->buckets[run->hash & f->mask];
    while (*at != run) at = &(*at)->next;
    *at = run->next;
    run->linked = false;
    f->linked--;
}

/* Asks a run to end. One that is still inside its first stretch is asked when it has a future. One
 * whose fn was not called never calls it: the next need not wait for it, but for the run before. */
static void orchi_flight_stop(orchi_flight_run *run, int reason) {
    run->left = true;
    if (!run->began) orchi_flight_unlink(run->flight, run);
    if (run->task != NULL) orch_cancel(run->task, reason);
}

/* A caller gives up. The last one waits for the end of the run that it stops, and so does one whose
 * argument the run may still use. */
static bool orchi_flight_leave(void *context, int reason) {
    orchi_place *place = (orchi_place *)context;
    orchi_flight_run *run = (orchi_flight_run *)place->owner;
    bool last = --run->wanted == 0, lent = place->weight != 0;
    bool stays = run->began ? last || lent : lent && !last;
    if (last) orchi_flight_stop(run, reason);
    if (!stays) orchi_line_leave(&run->callers, place);
    return !stays;
}

/* One more caller; its place is NULL when out of memory. */
static orch_future *orchi_flight_join(orchi_flight_run *run, orchi_place **place) {
    orch_promise promise;
    orch_future *f = orch_future_new(&promise);
    *place = orchi_line_join(&run->callers, promise, run, orchi_flight_leave, "flight");
    if (*place != NULL) run->wanted++;
    return f;
}

/* Tells the callers: one gets the result itself, several get shares. */
static void orchi_flight_share(orchi_line *callers, orch_result r) {
    if (callers->count == 1) {
        orch_settle(orchi_line_leave(callers, callers->first), r);
        return;
    }
    orch_future *f = orch_settled(r);
    while (callers->first != NULL) {
        orch_follow(orchi_line_leave(callers, callers->first), orch_ref(f));
    }
    orch_drop(f);
}

/* The end of a run: its entry is gone before anybody hears of it. */
static void orchi_flight_end(orchi_flight_run *run, orch_result r) {
    orch_flight *f = run->flight;
    orchi_flight_unlink(f, run);
    if (run->task != NULL) orch_detach(run->task);
    else *run->live = NULL;
    if (f->gate.freed && run->left && r.error == ORCH_ECANCELED) {
        orch_result_free(&r);
        r = orch_fail(ORCH_ECLOSED);
    }
    orchi_flight_share(&run->callers, r);
    f->runs--;
    orchi_flight_dispose(f);
}

/* Waits for the end of the run before, if there is one. */
static void orchi_flight_queue(orchi_flight_run *run) {
    if (run->after == NULL) return;
    orch_result r = orch_await(run->after);
    orch_result_free(&r);
}

/* The first function of a run's task. */
static orch_result orchi_flight_task(void *arg) {
    orchi_flight_run *run = (orchi_flight_run *)arg;
    *run->call.started = true;
    *run->live = run;
    run->self = orch_self();
    run->callers.first->owner = run;
    run->flight->runs++;
    orchi_flight_link(run->flight, run);
    orchi_flight_queue(run);
    orch_result r = orch_fail(ORCH_ECANCELED);
    run->began = !run->left && orch_cancel_reason() == 0;
    if (run->began) r = orchi_call_run(&run->call);
    else orchi_call_release(&run->call);
    orchi_flight_end(run, r);
    return orch_ok(NULL, NULL);
}

typedef struct orchi_flight_first { // what the first caller starts a run with
    const orch_task_desc *desc;
    orchi_flight_run *run; // moves to the task's stack
    const void *key;
    orch_future *task;
} orchi_flight_first;

static void orchi_flight_go(orchi_flight_first *first) {
    orchi_flight_run *run = first->run;
    first->task = orchi_call_go(first->desc, orchi_flight_task, &run->call, sizeof *run, first->key,
                                run->key_size);
}

static orch_result orchi_flight_go_task(void *arg) {
    orchi_flight_go((orchi_flight_first *)arg);
    return orch_ok(NULL, NULL);
}

/* A run belongs to all its callers, so the first one's deadline must not end it: what a spawned
 * task starts has none. */
static orch_future *orchi_flight_launch(orchi_flight_first *first) {
    int error = 0;
    first->task = NULL;
    if (orch_time_left() == ORCH_NO_DEADLINE) orchi_flight_go(first);
    else error = orch_spawn(orchi_flight_go_task, first);
    if (error == 0) return first->task;
    orchi_call_give_up(first->desc);
    return orch_settled(orch_fail(error));
}

/* The entry has moved to the task's stack, and may have ended there. */
static void orchi_flight_started(orchi_flight_run *live, orch_future *task) {
    if (live == NULL) {
        orch_drop(task);
        return;
    }
    live->task = task;
    if (live->left) orchi_flight_stop(live, ORCH_ECANCELED);
}

static orch_future *orchi_flight_start(orch_flight *f, const void *key, size_t key_size,
                                       const orch_task_desc *desc, orchi_flight_run *before) {
    orchi_flight_run run, *live = NULL;
    orchi_place *place;
    bool started = false;
    memset(&run, 0, sizeof run);
    orch_future *future = orchi_flight_join(&run, &place);
    if (place == NULL) {
        orchi_call_give_up(desc);
        return future;
    }
    place->weight = desc->arg != NULL && desc->arg_size == 0 && desc->release == NULL;
    run.call.started = &started;
    run.flight = f;
    run.live = &live;
    run.after = before != NULL ? orch_ref(before->task) : NULL;
    run.hash = orchi_flight_hash(f, key, key_size);
    run.key_size = key_size;
    orchi_flight_first first = {desc, &run, key, NULL};
    orch_future *task = orchi_flight_launch(&first);
    if (!started) {
        orch_drop(run.after);
        orch_settle(orchi_line_leave(&run.callers, place), orch_fail(orch_peek(task)->error));
    }
    orchi_flight_started(live, task);
    return future;
}

/* What is wrong with a call, before it is known whether it joins. */
static int orchi_flight_error(const orch_flight *f, const void *key, size_t key_size,
                              const char *function) {
    int error = orchi_gate_error(f, function);
    if (error != 0) return error;
    bool wrong = key == NULL || key_size == 0 || key_size > SIZE_MAX / 4;
    return wrong ? orchi_misuse(function, ORCH_EINVAL) : 0;
}

orch_future *orch_flight_run_with(orch_flight *f, const void *key, size_t key_size,
                                  const orch_task_desc *desc) {
    int error = orchi_flight_error(f, key, key_size, "orch_flight_run");
    size_t added = orchi_state_end(sizeof(orchi_flight_run)) + key_size;
    if (error == 0) error = orchi_call_error(desc, added, "orch_flight_run");
    if (error != 0) return orchi_call_refuse(desc, orch_fail(error));
    orchi_flight_run *run = orchi_flight_find(f, key, key_size);
    bool inside = run != NULL && run->self == orch_self();
    if (inside) return orchi_call_refuse(desc, orch_fail(ORCH_ECYCLE));
    if (run == NULL || run->left) return orchi_flight_start(f, key, key_size, desc, run);
    orchi_place *place;
    orch_future *future = orchi_flight_join(run, &place);
    orchi_call_give_up(desc);
    return future;
}

orch_future *orch_flight_run(orch_flight *f, const void *key, size_t key_size, orch_task_fn fn,
                             void *arg) {
    orch_task_desc desc = orchi_call_desc(fn, arg);
    return orch_flight_run_with(f, key, key_size, &desc);
}

bool orch_flight_forget(orch_flight *f, const void *key, size_t key_size) {
    if (orchi_flight_error(f, key, key_size, "orch_flight_forget") != 0) return false;
    orchi_flight_run *run = orchi_flight_find(f, key, key_size);
    bool any = run != NULL;
    for (; run != NULL; run = orchi_flight_find(f, key, key_size)) orchi_flight_unlink(f, run);
    return any;
}

/* Each run in the table is asked to end, and tells its callers when it has: one that was cancelled
 * says ORCH_ECLOSED. */
void orch_flight_free(orch_flight *f) {
    if (f == NULL || orchi_gate_error(f, "orch_flight_free") != 0) return;
    f->gate.freed = true;
    for (size_t i = 0; i <= f->mask; i++) {
        while (f->buckets[i] != NULL) {
            orchi_flight_run *run = f->buckets[i];
            orchi_flight_unlink(f, run);
            orchi_flight_stop(run, ORCH_ECLOSED);
        }
    }
    orchi_flight_dispose(f);
}

/* Those who have given up do not count, though they may wait for the end. */
size_t orch_flight_callers(const orch_flight *f, const void *key, size_t key_size) {
    if (orchi_flight_error(f, key, key_size, "orch_flight_callers") != 0) return 0;
    const orchi_flight_run *run = orchi_flight_find(f, key, key_size);
    return run != NULL ? run->wanted : 0;
}

size_t orch_flight_count(const orch_flight *f) {
    return orchi_gate_usable(f, "orch_flight_count") ? f->runs : 0;
}

// ---- adaptive concurrency
//
// How many calls a service stands at once is not known, and changes. So the limit rises by one when
// calls come back as fast as usual, and falls by a factor when they are slow or fail: additive
// increase, multiplicative decrease, which lets many clients of one service share it fairly (D.
// Chiu and R. Jain, 1989). What is usual is the least mean of 20 calls that was seen: a service
// without a queue. Left out: a target latency that adapts by gradients; it is quicker on a steady
// load, and on a bursty one takes the burst for the service.

// By example, from a limit of 20, with the defaults, for a service that answers in 10 ms and can do
// 40 calls at once:
//
//     the first round   20 good calls: the usual latency is 10 ms. Until it is known nothing rises
//     then              each good call adds one, as long as half of the limit is in use
//     beyond 40         calls queue up at the service. When the mean of a round is above 21 ms
//                       (twice the usual and a millisecond), the limit falls to nine tenths of what
//                       it was, once for all calls that were under way
//     from then on      cautious: as many good calls as the limit has add one
//
// So it swings about what the service can do.

struct orch_adaptive {
    orchi_gate gate;
    orch_adaptive_desc desc;
    double limit;
    bool cautious; // it was overloaded before
    uint32_t running;
    uint64_t number;  // of decreases: a call that began before the last one says nothing new
    double usual;     // ns: the least mean latency of a round; negative: not known yet
    double sum;       // ns, of this round
    uint32_t samples; // good calls of this round
    orchi_line line;
    void (*unused)(void *pass); // the release of a pass
    char label[ORCHI_LABEL];
};

enum { ORCHI_ROUND = 20 }; // so many calls, as a single latency says little

/* The one place for defaults. Comparisons are such that NaN is out of range. */
static bool orchi_adaptive_resolve(const orch_adaptive_desc *given, orch_adaptive_desc *desc) {
    memset(desc, 0, sizeof *desc);
    if (given != NULL) *desc = *given;
    if (desc->name == NULL) desc->name = "";
    if (desc->min == 0) desc->min = 1;
    if (desc->max == 0) desc->max = desc->min > 200 ? desc->min : 200;
    if (desc->initial == 0) {
        desc->initial = desc->max < 20 ? desc->max : desc->min > 20 ? desc->min : 20;
    }
    bool tolerates = !(desc->tolerance == 0.0);
    if (!tolerates && desc->latency_ms == 0) desc->tolerance = 2.0;
    if (tolerates && !(desc->tolerance > 1.0)) return false;
    if (desc->backoff == 0.0) desc->backoff = 0.9;
    if (!(desc->backoff > 0.0 && desc->backoff < 1.0)) return false;
    if (orchi_long_ms(desc->latency_ms)) return false;
    return desc->min <= desc->initial && desc->initial <= desc->max;
}

/* Passes are still out, or nobody has freed it: then it stays. */
static void orchi_adaptive_dispose(orch_adaptive *a) {
    if (a->running == 0 && a->gate.freed) orchi_free(a->gate.loop, a, sizeof *a);
}

/* Whether one more call may be under way. */
static bool orchi_adaptive_room(const orch_adaptive *a) { return a->running + 1.0 <= a->limit; }

/* Whether one more may wait. */
static bool orchi_adaptive_waits(const orch_adaptive *a) {
    return !a->desc.no_wait && (a->desc.waiting == 0 || a->line.count < a->desc.waiting);
}

/* What the end of the call is compared with is written down at its beginning. */
static void orchi_adaptive_begin(orch_adaptive *a, orchi_pass *pass, int64_t now) {
    pass->beside = ++a->running;
    pass->limit = a->limit;
    pass->guard = a;
    pass->number = a->number;
    pass->began = now;
}

/* The place of the first in the line becomes its pass. */
static void orchi_adaptive_give(orch_adaptive *a, orchi_place *place, int64_t now) {
    orch_promise promise = place->promise;
    orchi_pass *pass = (orchi_pass *)(void *)place;
    orchi_line_remove(&a->line, place);
    orchi_adaptive_begin(a, pass, now);
    orch_settle(promise, orch_ok(pass, a->unused));
}

/* Lets in whom there is room for: so nobody waits while there is some. */
static void orchi_adaptive_serve(orch_adaptive *a) {
    if (a->line.first == NULL || !orchi_adaptive_room(a)) return;
    int64_t now = orchi_gate_now(&a->gate);
    while (orchi_adaptive_room(a)) {
        orchi_place *first = orchi_line_first(&a->line);
        if (first == NULL) return;
        orchi_adaptive_give(a, first, now);
    }
}

/* A millisecond more than the factor says: the loop's own turns take some of that. */
static bool orchi_adaptive_unusual(const orch_adaptive *a, double latency) {
    return a->desc.tolerance > 1.0 && a->usual >= 0.0 &&
           latency > a->desc.tolerance * a->usual + 1e6;
}

/* Whether a single call took too long. */
static bool orchi_adaptive_slow(const orch_adaptive *a, int64_t latency) {
    return a->desc.latency_ms > 0 && latency > orchi_ms_ns(a->desc.latency_ms);
}

/* One up for each call at first, later for as many as the limit has. Only when the limit is used,
 * at the call's beginning or end, as the rest would be a guess; not before the usual latency is
 * known. */
static void orchi_adaptive_rise(orch_adaptive *a, const orchi_pass *pass) {
    uint32_t beside = pass->beside > a->running ? pass->beside : a->running;
    bool blind = a->desc.tolerance > 1.0 && a->usual < 0.0;
    if (blind || pass->number != a->number || 2.0 * beside < a->limit) return;
    a->limit += a->cautious ? 1.0 / a->limit : 1.0;
    if (a->limit > a->desc.max) a->limit = a->desc.max;
}

/* Down, and once for all calls that are under way, as they meet the same overload. It came of the
 * limit that there was when the call began: what has been added since goes too. */
static void orchi_adaptive_fall(orch_adaptive *a, const orchi_pass *pass) {
    if (pass->number != a->number) return;
    a->number++;
    a->cautious = true;
    a->limit = (pass->limit < a->limit ? pass->limit : a->limit) * a->desc.backoff;
    if (a->limit < a->desc.min) a->limit = a->desc.min;
    a->sum = 0.0;
    a->samples = 0;
}

/* Compares the mean of a round with the least one known. Where even the least limit does not help,
 * it is not this limit's calls that make the service slow: what is usual is learnt anew. A least
 * that was forgotten after some time would rise with the load that is to be found. */
static void orchi_adaptive_sample(orch_adaptive *a, const orchi_pass *pass, int64_t latency) {
    if (pass->number != a->number) return;
    a->sum += (double)latency;
    if (++a->samples < ORCHI_ROUND) return;
    double mean = a->sum / a->samples;
    a->sum = 0.0;
    a->samples = 0;
    if (a->usual < 0.0 || mean < a->usual) a->usual = mean;
    if (!orchi_adaptive_unusual(a, mean)) return;
    if (a->limit <= a->desc.min) {
        a->usual = mean;
        a->cautious = false;
    } else {
        orchi_adaptive_fall(a, pass);
    }
}

/* The end of a call. */
static void orchi_adaptive_end(orch_adaptive *a, const orchi_pass *pass, orch_outcome outcome) {
    if (outcome == ORCH_OUTCOME_GOOD) orchi_adaptive_rise(a, pass);
    if (outcome == ORCH_OUTCOME_BAD) orchi_adaptive_fall(a, pass);
    a->running--;
    orchi_adaptive_serve(a);
    orchi_adaptive_dispose(a);
}

/* What an outcome says. A cancelled call says nothing, unless it had been slow by then. */
static orch_outcome orchi_adaptive_judge(orch_adaptive *a, const orch_result *r, int reason,
                                         const orchi_pass *pass) {
    if (a->gate.freed) return ORCH_OUTCOME_IGNORED;
    int64_t latency = orchi_gate_now(&a->gate) - pass->began;
    bool slow = orchi_adaptive_slow(a, latency);
    if (orchi_call_cancelled(r, reason)) {
        slow = slow || orchi_adaptive_unusual(a, (double)latency);
        return slow ? ORCH_OUTCOME_BAD : ORCH_OUTCOME_IGNORED;
    }
    orch_outcome outcome = r->error == 0 ? ORCH_OUTCOME_GOOD : ORCH_OUTCOME_IGNORED;
    if (r->error == ORCH_ETIMEDOUT) outcome = ORCH_OUTCOME_BAD;
    if (a->desc.judge != NULL) outcome = a->desc.judge(r, a->desc.context);
    if (outcome != ORCH_OUTCOME_GOOD) return outcome;
    if (slow) return ORCH_OUTCOME_BAD;
    orchi_adaptive_sample(a, pass, latency);
    return outcome;
}

/* The release of a pass that was not recorded. */
static void orchi_adaptive_unused(void *context) {
    orchi_pass pass = *(orchi_pass *)context;
    orchi_extra_free(orchi_loop, context);
    orchi_adaptive_end((orch_adaptive *)pass.guard, &pass, ORCH_OUTCOME_IGNORED);
}

orch_adaptive *orch_adaptive_new(const orch_adaptive_desc *given) {
    orch_adaptive_desc desc;
    bool valid = orchi_adaptive_resolve(given, &desc);
    orch_adaptive *a = (orch_adaptive *)orchi_gate_new(sizeof *a, valid, "orch_adaptive_new");
    if (a->gate.error != 0) return a;
    a->desc = desc;
    a->limit = desc.initial;
    a->usual = -1.0;
    a->unused = orchi_adaptive_unused;
    orchi_gate_label(a->label, sizeof a->label, "adaptive limit", desc.name);
    return a;
}

void orch_adaptive_free(orch_adaptive *a) {
    if (a == NULL || orchi_gate_error(a, "orch_adaptive_free") != 0) return;
    a->gate.freed = true;
    a->gate.error = ORCH_ECLOSED; // those who hear of it now may ask again
    orchi_line_close(&a->line, ORCH_ECLOSED);
    orchi_adaptive_dispose(a);
}

/* Who waited held no place under the limit: nobody can be let in for it. */
static bool orchi_adaptive_leave(void *context, int reason) {
    (void)reason;
    orchi_place *place = (orchi_place *)context;
    orchi_line_leave(&((orch_adaptive *)place->owner)->line, place);
    return true;
}

/* It does not look at the line: while somebody waits there is no room, see orchi_adaptive_serve. */
orch_result orch_adaptive_try(orch_adaptive *a) {
    int error = orchi_gate_error(a, "orch_adaptive_try");
    if (error != 0) return orch_fail(error);
    if (!orchi_adaptive_room(a)) return orch_fail(ORCH_ELIMIT);
    orchi_pass *pass = (orchi_pass *)orchi_extra_new(orchi_loop);
    if (pass == NULL) return orch_fail(ORCH_ENOMEM);
    orchi_adaptive_begin(a, pass, orchi_gate_now(&a->gate));
    return orch_ok(pass, orchi_adaptive_unused);
}

orch_future *orch_adaptive_acquire(orch_adaptive *a) {
    int error = orchi_gate_error(a, "orch_adaptive_acquire");
    if (error != 0) return orch_settled(orch_fail(error));
    if (orchi_adaptive_room(a)) return orch_settled(orch_adaptive_try(a));
    if (!orchi_adaptive_waits(a)) return orch_settled(orch_fail(ORCH_ELIMIT));
    orch_promise promise;
    orch_future *f = orch_future_new(&promise);
    orchi_line_join(&a->line, promise, a, orchi_adaptive_leave, a->label);
    return f;
}

void orch_adaptive_record(orch_result *pass, const orch_result *outcome) {
    orchi_pass p;
    if (!orchi_pass_take(pass, orchi_adaptive_unused, &p, "orch_adaptive_record")) return;
    orch_adaptive *a = (orch_adaptive *)p.guard;
    orch_outcome counts = ORCH_OUTCOME_IGNORED;
    if (outcome != NULL) counts = orchi_adaptive_judge(a, outcome, 0, &p);
    orchi_adaptive_end(a, &p, counts);
}

typedef struct orchi_adaptive_call {
    orchi_call call;
    orch_adaptive *adaptive;
    orchi_pass pass; // its guard NULL: it has to stand in line first
} orchi_adaptive_call;

/* Stands in line, and takes the pass over. */
static orch_result orchi_adaptive_wait(orchi_adaptive_call *c) {
    orch_result r = orch_await(orch_adaptive_acquire(c->adaptive));
    if (r.error != 0) return r;
    orchi_pass_take(&r, orchi_adaptive_unused, &c->pass, "orch_adaptive_run");
    return orch_ok(NULL, NULL);
}

/* The first function of a task under the limit. */
static orch_result orchi_adaptive_task(void *arg) {
    orchi_adaptive_call *c = (orchi_adaptive_call *)arg;
    *c->call.started = true;
    orch_result r = c->pass.guard == NULL ? orchi_adaptive_wait(c) : orch_ok(NULL, NULL);
    if (r.error != 0) {
        orchi_call_release(&c->call);
        return r;
    }
    r = orchi_call_run(&c->call);
    orch_adaptive *a = (orch_adaptive *)c->pass.guard;
    int reason = orch_cancel_reason();
    orchi_adaptive_end(a, &c->pass, orchi_adaptive_judge(a, &r, reason, &c->pass));
    return r;
}

/* Without room the task starts all the same, and stands in line itself: its stack is the price for
 * a call that is cancelled in the same way while it waits and while it runs. */
orch_future *orch_adaptive_run_with(orch_adaptive *a, const orch_task_desc *desc) {
    int error = orchi_gate_error(a, "orch_adaptive_run");
    if (error == 0)
        error = orchi_call_error(desc, sizeof(orchi_adaptive_call), "orch_adaptive_run");
    bool now = error == 0 && orchi_adaptive_room(a);
    if (error == 0 && !now && !orchi_adaptive_waits(a)) error = ORCH_ELIMIT;
    if (error != 0) return orchi_call_refuse(desc, orch_fail(error));
    orchi_adaptive_call c;
    bool started = false;
    memset(&c, 0, sizeof c);
    c.call.started = &started;
    c.adaptive = a;
    if (now) orchi_adaptive_begin(a, &c.pass, orchi_gate_now(&a->gate));
    orch_future *f = orchi_call_go(desc, orchi_adaptive_task, &c.call, sizeof c, NULL, 0);
    if (!started && now) orchi_adaptive_end(a, &c.pass, ORCH_OUTCOME_IGNORED);
    return f;
}

orch_future *orch_adaptive_run(orch_adaptive *a, orch_task_fn fn, void *arg) {
    orch_task_desc desc = orchi_call_desc(fn, arg);
    return orch_adaptive_run_with(a, &desc);
}

size_t orch_adaptive_limit(const orch_adaptive *a) {
    return orchi_gate_usable(a, "orch_adaptive_limit") ? (size_t)a->limit : 0;
}

size_t orch_adaptive_running(const orch_adaptive *a) {
    return orchi_gate_usable(a, "orch_adaptive_running") ? a->running : 0;
}

size_t orch_adaptive_waiting(const orch_adaptive *a) {
    return orchi_gate_usable(a, "orch_adaptive_waiting") ? a->line.count : 0;
}

const orch_adaptive_desc *orch_adaptive_settings(const orch_adaptive *a) {
    return orchi_gate_usable(a, "orch_adaptive_settings") ? &a->desc : NULL;
}

// ------------------------------------------------------------------------------------------------
// >>process
//
// Child processes. Each has a supervisor: a task that starts it, waits for its end, and reaps it.
// Invariants:
//   - Who gives a process up cancels its supervisor, and so does the end of the loop. The
//     supervisor then ends the process behind a shield. So all that cancellation promises holds for
//     processes as well: nobody goes on, and no loop ends, before they have ended.
//   - Only the supervisor reaps, and only its own child, by its number. Until then the number, and
//     that of its group, cannot be another's, and signals may be sent to it.
//   - A process is started by vfork and exec, so that it costs the same however large the program
//     is. Until the exec the child shares our memory: it calls only what a signal handler may, with
//     all signals blocked, and writes nowhere but on its own frames.
//   - What the child cannot do it reports through a pipe that the exec closes: so a program that is
//     not there is an error of the start, and not an exit code.
// Left out: a shell (argv may be sh, -c and a command), passing on more descriptors than three, and
// ending children when this process is killed by SIGKILL, which nobody but the system could do.

// A child from its start to its end:
//
//     orch_process_start   pipes; the supervisor starts: vfork, exec in the child, what it reported
//     the supervisor       waits for the pidfd, or (other systems, old Linux) for SIGCHLD
//     it ends              reaped; the status settles the supervisor, and with it who waits
//     it is given up       SIGTERM to its group, the grace, SIGKILL to what is left of the group,
//                          which keeps its number as long as its leader was not reaped; reaped

// ---- starting

typedef struct orchi_spawn { // all that the child needs, made before
    const orch_process_desc *desc;
    char *paths; // what to try to execute, each with a NUL at its end, and one more
    int from[3]; // what becomes its 0, 1 and 2; -1: stays as it is
    int report;  // the pipe's write end
    int limit;   // descriptors are below
    sigset_t none;
} orchi_spawn;

/* What the program caught would be called in its memory. What is ignored is inherited by the exec:
 * SIGPIPE and SIGCHLD are for this program only. */
static void orchi_child_signals(const orchi_spawn *spawn) {
    struct sigaction standard;
    memset(&standard, 0, sizeof standard);
    standard.sa_handler = SIG_DFL;
    for (int number = 1; number < NSIG; number++) {
        struct sigaction now;
        if (sigaction(number, NULL, &now) != 0 || now.sa_handler == SIG_DFL) continue;
        bool stays = now.sa_handler == SIG_IGN && number != SIGPIPE && number != SIGCHLD;
        if (!stays) sigaction(number, &standard, NULL);
    }
    sigprocmask(SIG_SETMASK, &spawn->none, NULL);
}

/* Those that are in the way of 0, 1 and 2 are moved first. */
static int orchi_child_stdio(const orchi_spawn *spawn) {
    int from[3];
    for (int i = 0; i < 3; i++) {
        bool low = spawn->from[i] >= 0 && spawn->from[i] < 3;
        from[i] = low ? fcntl(spawn->from[i], F_DUPFD_CLOEXEC, 3) : spawn->from[i];
        if (low && from[i] < 0) return -errno;
    }
    for (int i = 0; i < 3; i++) {
        if (from[i] >= 0 && dup2(from[i], i) < 0) return -errno;
    }
    bool joined = spawn->desc->err == ORCH_STDIO_OUT;
    return joined && dup2(1, 2) < 0 ? -errno : 0;
}

/* A system call for each number there could be: only for where there is nothing better. */
static void orchi_child_close_each(int limit) {
    for (int fd = 3; fd < limit; fd++) fcntl(fd, F_SETFD, FD_CLOEXEC);
}

#if ORCHI_OS_LINUX && defined(SYS_close_range)
/* The exec closes them, not we: the report is one of them. */
static void orchi_child_close(int limit) {
    const unsigned by_exec = 4; // CLOSE_RANGE_CLOEXEC, since 5.11
    if (syscall(SYS_close_range, 3u, ~0u, by_exec) != 0) orchi_child_close_each(limit);
}
#else
static void orchi_child_close(int limit) { orchi_child_close_each(limit); }
#endif

#if !ORCHI_GNU
extern char **environ; // POSIX has it in no header
#endif

/* Goes on as execvp does when a file is not there; what may not be executed is an error only when
 * nothing else is found. */
static int orchi_child_exec(const orchi_spawn *spawn) {
    char *const *argv = (char *const *)(uintptr_t)spawn->desc->argv;
    char *const *env = (char *const *)(uintptr_t)spawn->desc->env;
    int error = -ENOENT;
    for (const char *path = spawn->paths; *path != '\0'; path += strlen(path) + 1) {
        execve(path, argv, env != NULL ? env : environ);
        bool next = errno == ENOENT || errno == ENOTDIR || errno == EACCES || errno == ENAMETOOLONG;
        if (!next) return -errno;
        if (errno == EACCES) error = -EACCES;
    }
    return error;
}

/* The group first, as a kill may be meant for all that it starts. The signals last: from then on
 * they arrive, and there is no handler of ours left to run. */
static int orchi_child_run(const orchi_spawn *spawn) {
    const orch_process_desc *desc = spawn->desc;
    if (!desc->same_group && setpgid(0, 0) != 0) return -errno;
    int error = orchi_child_stdio(spawn);
    if (error != 0) return error;
    if (desc->directory != NULL && chdir(desc->directory) != 0) return -errno;
    orchi_child_close(spawn->limit);
    orchi_child_signals(spawn);
    return orchi_child_exec(spawn);
}

/* The child never leaves this function: its frame must be there until the exec. */
ORCHI_NO_INLINE static pid_t orchi_spawn_fork(const orchi_spawn *spawn) {
    pid_t pid = ORCHI_FORK();
    if (pid != 0) return pid;
    int error = orchi_child_run(spawn);
    ssize_t done = write(spawn->report, &error, sizeof error);
    _exit(done == (ssize_t)sizeof error ? 127 : 126);
}

/* No signal arrives in the child while it shares our memory. Returns its number, or an error. */
static int orchi_spawn_start(orchi_spawn *spawn) {
    sigset_t all, before;
    sigfillset(&all);
    sigemptyset(&spawn->none);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pid_t pid = orchi_spawn_fork(spawn);
    int error = pid < 0 ? -errno : 0;
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error != 0 ? error : (int)pid;
}

/* Waits for one child. */
static int orchi_reap(pid_t pid, int *status) {
    pid_t got;
    do got = waitpid(pid, status, 0);
    while (got < 0 && errno == EINTR);
    return got < 0 ? -errno : 0;
}

enum { ORCHI_REPORT_MS = 500 };

/* What the child could not do; 0 when the exec has closed the pipe. After vfork that has happened
 * already; after fork, and where tools make one of the other, soon. It is not waited for without an
 * end, as a fork by another thread may hold the pipe for as long as its child lives. */
static int orchi_spawn_report(int fd) {
    int error = 0;
    ssize_t got;
    struct pollfd report = {fd, POLLIN, 0};
    fcntl(fd, F_SETFL, O_NONBLOCK);
    while (poll(&report, 1, ORCHI_REPORT_MS) < 0 && errno == EINTR) continue;
    do got = read(fd, &error, sizeof error);
    while (got < 0 && errno == EINTR);
    return got == (ssize_t)sizeof error ? error : 0;
}

/* A blocking pipe, away from 0, 1 and 2, which the child fills. */
static int orchi_spawn_pipe(int ends[2]) {
    int error = orch_pipe(ends);
    if (error != 0) return error;
    for (int i = 0; i < 2; i++) {
        int high = fcntl(ends[i], F_DUPFD_CLOEXEC, 3);
        if (high < 0) error = -errno;
        orch_close(ends[i]); // orch_pipe adopted it; `high` nobody has
        ends[i] = high;
        if (high >= 0) fcntl(high, F_SETFL, 0);
    }
    if (error != 0 && ends[0] >= 0) close(ends[0]);
    if (error != 0 && ends[1] >= 0) close(ends[1]);
    return error;
}

/* Starts the child. Returns its number, or why it does not run. */
static int orchi_spawn_run(orchi_spawn *spawn) {
    int report[2], status;
    int pid = orchi_spawn_pipe(report);
    if (pid < 0) return pid;
    spawn->report = report[1];
    pid = orchi_spawn_start(spawn);
    close(report[1]);
    int error = pid > 0 ? orchi_spawn_report(report[0]) : 0;
    close(report[0]);
    if (error == 0) return pid;
    orchi_reap(pid, &status);
    return error;
}

// For "ls" and a PATH of "/bin::/opt" the text is, with its zeros shown as "|":
//
//     /bin/ls|ls|/opt/ls||
//
// It is made before the fork: the child, in our memory, must not allocate.

/* The places where a program may be, in the order of PATH, in which an empty one is here. */
static char *orchi_spawn_paths(const char *file) {
    const char *path = strchr(file, '/') != NULL || *file == '\0' ? "" : getenv("PATH");
    if (path == NULL) path = "/bin:/usr/bin";
    size_t places = 1, length = strlen(file);
    for (const char *at = path; *at != '\0'; at++) places += *at == ':';
    char *paths = (char *)malloc(strlen(path) + places * (length + 3) + 1), *to = paths;
    if (paths == NULL) return NULL;
    for (size_t i = 0; i < places; i++) {
        size_t part = strcspn(path, ":");
        memcpy(to, path, part);
        to += part;
        if (part > 0) *to++ = '/';
        memcpy(to, file, length + 1);
        to += length + 1;
        path += part + 1;
    }
    *to = '\0';
    return paths;
}

// ---- its descriptors

struct orch_process {
    int error; // not 0: it did not start
    orch_loop *loop;
    uint32_t users;    // the handle, the supervisor
    pid_t pid;         // not reaped; 0: none
    int id;            // the same, for ever
    int pidfd;         // -1: none
    orch_signals *end; // SIGCHLD, where there is no pidfd
    int ends[3];       // ours, of its pipes; -1: none
    orch_future *supervisor;
    orch_exit_status *status; // made before the start, so that its end needs no memory
    orch_process_desc desc;   // its numbers
};

// What the three choices come to, for in = PIPE, out = NULL, err = OUT:
//
//             in the child                     here
//     in      0 is the end to read, blocking   ends[0] is the end to write
//     out     1 is /dev/null                   nothing
//     err     2 is a copy of 1                 nothing
//
// Whatever was opened for the child is closed here as soon as it runs: who keeps the writing end of
// a pipe never reads its end.

/* The child's end blocks, as programs expect. Returns it, or an error. */
static int orchi_stdio_pipe(int i, int *ours) {
    int ends[2], theirs = i == 0 ? 0 : 1;
    int error = orch_pipe(ends);
    if (error != 0) return error;
    fcntl(ends[theirs], F_SETFL, 0);
    *ours = ends[1 - theirs];
    return ends[theirs];
}

/* What becomes a descriptor of the child: -1 for none. */
static int orchi_stdio_open(int choice, int i, int *ours, int *opened) {
    *opened = -1;
    if (choice > 0) return choice;
    if (choice != ORCH_STDIO_NULL && choice != ORCH_STDIO_PIPE) return -1;
    int fd = choice == ORCH_STDIO_PIPE ? orchi_stdio_pipe(i, ours)
                                       : open("/dev/null", O_RDWR | O_CLOEXEC);
    if (fd == -1) return -errno - 1; // so that no error is -1
    if (fd < 0) return fd - 1;
    return *opened = fd;
}

static void orchi_process_close(orch_process *p) {
    for (int i = 0; i < 3; i++) {
        if (p->ends[i] >= 0) orch_close(p->ends[i]);
        p->ends[i] = -1;
    }
}

/* Starts it with its descriptors in place. Returns its number, or why it does not run. */
static int orchi_process_spawn(orch_process *p, orchi_spawn *spawn) {
    int choices[3] = {p->desc.in, p->desc.out, p->desc.err}, opened[3] = {-1, -1, -1}, error = 0;
    for (int i = 0; i < 3 && error == 0; i++) {
        spawn->from[i] = orchi_stdio_open(choices[i], i, &p->ends[i], &opened[i]);
        if (spawn->from[i] < -1) error = spawn->from[i] + 1;
    }
    int pid = error == 0 ? orchi_spawn_run(spawn) : error;
    for (int i = 0; i < 3; i++) {
        if (opened[i] >= 0) orch_close(opened[i]); // what is known of it goes too
    }
    return pid;
}

// ---- its end

#if ORCHI_PIDFD
/* Close-on-exec, and readable when the process has ended. */
static int orchi_pidfd_open(pid_t pid) { return (int)syscall(SYS_pidfd_open, pid, 0); }
#else
static int orchi_pidfd_open(pid_t pid) {
    (void)pid;
    return -1;
}
#endif

/* How its end will be known. It may have ended already: that is looked for first. A SIGCHLD that
 * every thread blocks would never come. */
static int orchi_process_watch(orch_process *p) {
    static const int child[] = {SIGCHLD};
    sigset_t set;
    p->pidfd = orchi_pidfd_open(p->pid);
    if (p->pidfd >= 0) return 0;
    p->end = orch_signals_new(child, 1);
    sigemptyset(&set);
    sigaddset(&set, SIGCHLD);
    if (p->end->error == 0) pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    return p->end->error;
}

/* Whether it has ended: 1, 0 or an error. It stays a zombie, whose number and group nobody else can
 * have. */
static int orchi_process_over(const orch_process *p) {
    siginfo_t info;
    memset(&info, 0, sizeof info);
    int done = waitid(P_PID, (id_t)p->pid, &info, WEXITED | WNOHANG | WNOWAIT);
    return done != 0 ? -errno : info.si_pid != 0;
}

// Looked at first and waited for then, in a loop: it may have ended before anybody watched, and a
// SIGCHLD may be another child's. Looking takes nothing, so it can be done as often as needed.

/* Waits until it has ended, or for so long. */
static int orchi_process_until(orch_process *p, uint64_t ms) {
    uint64_t start = orch_now();
    for (;;) {
        int over = orchi_process_over(p);
        if (over != 0) return over < 0 ? over : 0;
        uint64_t passed = orch_now() - start;
        if (passed >= ms) return ORCH_ETIMEDOUT;
        orch_future *news =
            p->pidfd >= 0 ? orch_ready(p->pidfd, ORCH_READABLE) : orch_signals_next(p->end);
        orch_result r = orch_await(ms == UINT64_MAX ? news : orch_timeout(news, ms - passed));
        int error = r.error;
        orch_result_free(&r);
        if (error != 0) return error;
    }
}

/* To the group, of which it is the leader: what it has started is in it. */
static int orchi_process_signal(const orch_process *p, int number) {
    return kill(p->desc.same_group ? p->pid : -p->pid, number) == 0 ? 0 : -errno;
}

/* It has ended, or cannot be waited for any longer: then it is killed, and reaped here and now. */
static int orchi_process_reap(orch_process *p, int error) {
    int status = 0;
    if (error == -ECHILD) return error; // its number may be another's
    if (error != 0) orchi_process_signal(p, SIGKILL);
    int reaped = orchi_reap(p->pid, &status);
    if (error == 0) error = reaped;
    if (reaped != 0) return error;
    p->status->code = WIFEXITED(status) ? WEXITSTATUS(status) : 0;
    p->status->signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0;
    return error;
}

/* Ends it. SIGCONT, as one that is stopped would not see SIGTERM. On a virtual clock the grace
 * passes at once when nothing else can happen, as otherwise it never would. */
static int orchi_process_end(orch_process *p) {
    int over = orchi_process_over(p);
    if (over < 0) return over; // not our child: reaped by somebody else, or our parent's
    if (!p->desc.no_grace) {
        orchi_process_signal(p, SIGTERM);
        orchi_process_signal(p, SIGCONT);
        p->loop->children--;
        int error = orchi_process_until(p, p->desc.grace_ms);
        p->loop->children++;
        if (error == -ECHILD) return error;
    }
    orchi_process_signal(p, SIGKILL);
    return orchi_process_until(p, UINT64_MAX);
}

// ---- the supervisor

/* Whoever is last: the outputs stay open until then, as a program that says farewell would be
 * killed by SIGPIPE otherwise. */
static void orchi_process_leave(orch_process *p) {
    if (--p->users > 0) return;
    orchi_process_close(p);
    orchi_free(p->loop, p, sizeof *p);
}

/* From the start to the end. A refused wait, for whatever reason, ends the process. */
static int orchi_process_live(orch_process *p) {
    p->loop->children++;
    int error = orchi_process_watch(p);
    if (error == 0) error = orchi_process_until(p, UINT64_MAX);
    if (error == ORCH_ECANCELED) {
        orch_shield_begin();
        error = orchi_process_end(p);
        orch_shield_end();
    }
    error = orchi_process_reap(p, error);
    p->pid = 0;
    p->loop->children--;
    if (p->pidfd >= 0) orch_close(p->pidfd);
    orch_signals_free(p->end);
    return error;
}

/* The start: until the first wait desc is the caller's. */
static int orchi_process_begin(orch_process *p, const orch_process_desc *desc) {
    orchi_spawn spawn;
    memset(&spawn, 0, sizeof spawn);
    long limit = sysconf(_SC_OPEN_MAX);
    spawn.desc = desc;
    spawn.limit = limit > 0 && limit < INT_MAX ? (int)limit : 65536;
    spawn.paths = orchi_spawn_paths(desc->argv[0]);
    p->status = (orch_exit_status *)calloc(1, sizeof *p->status);
    bool memory = spawn.paths != NULL && p->status != NULL;
    int pid = memory ? orchi_process_spawn(p, &spawn) : ORCH_ENOMEM;
    free(spawn.paths);
    if (pid < 0) return pid;
    p->id = p->pid = pid;
    return 0;
}

typedef struct orchi_birth { // on the caller's stack: read before the supervisor first waits
    orch_process *process;
    const orch_process_desc *desc;
} orchi_birth;

// Everything of a process that waits or fails does so in this task. Its result is that of the
// process, so waiting for one is waiting for a future; giving it up is cancelling one; and a loop
// that ends cancels it like any other task, which is why no child is left behind.

static orch_result orchi_process_supervise(void *arg) {
    orchi_birth birth = *(orchi_birth *)arg;
    orch_process *p = birth.process;
    orch_result r;
    int error = p->error = orchi_process_begin(p, birth.desc);
    if (error != 0) {
        const char *what = birth.desc->argv[0];
        r = orch_failf(error, "cannot start %s: %s", what, orch_error_text(error));
    } else {
        error = orchi_process_live(p);
        r = error == 0 ? orch_ok(p->status, free) : orch_fail(error);
    }
    if (error != 0) free(p->status);
    orchi_process_leave(p);
    return r;
}

// ---- the object

#define ORCHI_BROKEN(error)                                                                        \
    {                                                                                              \
        error, NULL, 0, 0, error, -1, NULL, {-1, -1, -1}, NULL, NULL, {                            \
            NULL, NULL, NULL, 0, 0, 0, false, 0, false, NULL, 0, 0, false                          \
        }                                                                                          \
    }
static const orch_process orchi_broken_processes[] = {
    ORCHI_BROKEN(ORCH_ENOMEM), ORCHI_BROKEN(ORCH_ENOLOOP), ORCHI_BROKEN(ORCH_EINVAL)};
#undef ORCHI_BROKEN

/* Never written: every operation looks at the error first, and a free at the loop. */
static orch_process *orchi_process_broken(int error) {
    size_t i = error == ORCH_ENOMEM ? 0 : error == ORCH_ENOLOOP ? 1 : 2;
    return (orch_process *)(uintptr_t)&orchi_broken_processes[i];
}

/* The only place where defaults are filled in. */
static orch_process_desc orchi_process_defaults(const orch_process_desc *given) {
    orch_process_desc desc = *given;
    if (desc.in == ORCH_STDIO_DEFAULT) desc.in = ORCH_STDIO_INHERIT;
    if (desc.out == ORCH_STDIO_DEFAULT) desc.out = ORCH_STDIO_INHERIT;
    if (desc.err == ORCH_STDIO_DEFAULT) desc.err = ORCH_STDIO_INHERIT;
    if (desc.grace_ms == 0) desc.grace_ms = 2000;
    if (desc.limit == 0) desc.limit = (size_t)16 << 20;
    return desc;
}

/* What is wrong with it whatever the system says; a program that is not there is no misuse. */
static int orchi_process_desc_error(const orch_process_desc *desc) {
    if (orchi_loop == NULL) return ORCH_ENOLOOP;
    if (desc == NULL || desc->argv == NULL || desc->argv[0] == NULL) return ORCH_EINVAL;
    bool valid = desc->in >= ORCH_STDIO_PIPE && desc->out >= ORCH_STDIO_PIPE &&
                 desc->err >= ORCH_STDIO_OUT && (desc->input != NULL || desc->input_size == 0);
    return valid ? 0 : ORCH_EINVAL;
}

/* Two users: who holds the handle, and the supervisor. Either may be the last. */
static orch_process *orchi_process_new(orch_loop *loop, const orch_process_desc *desc) {
    orch_process *p = (orch_process *)orchi_allocate(loop, sizeof *p);
    if (p == NULL) return NULL;
    memset(p, 0, sizeof *p);
    p->loop = loop;
    p->users = 2;
    p->pidfd = p->ends[0] = p->ends[1] = p->ends[2] = -1;
    p->desc = *desc;
    return p;
}

/* The child runs when this returns, or never will: it is started before the first wait. */
orch_process *orch_process_start(const orch_process_desc *given) {
    int error = orchi_process_desc_error(given);
    if (error != 0) return orchi_process_broken(orchi_misuse("orch_process_start", error));
    orch_process_desc desc = orchi_process_defaults(given);
    orch_process *p = orchi_process_new(orchi_loop, &desc);
    if (p == NULL) return orchi_process_broken(ORCH_ENOMEM);
    orchi_birth birth = {p, &desc};
    orch_task_desc task = {"process", orchi_process_supervise, &birth, 0, NULL, 0};
    p->supervisor = orchi_begin(&task, NULL, false, "orch_process_start");
    if (p->supervisor == orchi_rejected(ORCH_ENOMEM)) {
        orchi_free(p->loop, p, sizeof *p);
        return orchi_process_broken(ORCH_ENOMEM);
    }
    if (p->error != 0) orchi_process_close(p);
    return p;
}

/* What is wrong with a process here and now, or 0. */
static int orchi_process_error(const orch_process *p, const char *function) {
    if (p == NULL) return orchi_misuse(function, ORCH_EINVAL);
    if (p->error != 0 || p->loop == orchi_loop) return p->error;
    return orchi_misuse(function, orchi_loop != NULL ? ORCH_ETHREAD : ORCH_ENOLOOP);
}

int orch_process_id(const orch_process *p) {
    int error = orchi_process_error(p, "orch_process_id");
    return error != 0 ? error : p->id;
}

/* Lent: the process closes it, unless it is its input and was closed early. */
static int orchi_process_fd(const orch_process *p, int i, const char *function) {
    int error = orchi_process_error(p, function);
    return error != 0 ? error : p->ends[i] >= 0 ? p->ends[i] : -EBADF;
}

int orch_process_stdin(const orch_process *p) {
    return orchi_process_fd(p, 0, "orch_process_stdin");
}

int orch_process_stdout(const orch_process *p) {
    return orchi_process_fd(p, 1, "orch_process_stdout");
}

int orch_process_stderr(const orch_process *p) {
    return orchi_process_fd(p, 2, "orch_process_stderr");
}

int orch_process_close_stdin(orch_process *p) {
    int fd = orchi_process_fd(p, 0, "orch_process_close_stdin");
    if (fd < 0) return fd;
    p->ends[0] = -1;
    return orch_close(fd);
}

/* A then of a reference: cancelled, it lets go of the supervisor and asks it nothing. */
orch_future *orch_process_wait(orch_process *p) {
    int error = orchi_process_error(p, "orch_process_wait");
    if (error != 0 && (p == NULL || p->loop != orchi_loop || orchi_loop == NULL)) {
        return orch_settled(orch_fail(error));
    }
    return orch_then(orch_ref(p->supervisor), NULL, NULL, NULL);
}

/* Only what was not reaped has a number that is its own. */
int orch_process_kill(orch_process *p, int signal) {
    int error = orchi_process_error(p, "orch_process_kill");
    if (error != 0) return error;
    return p->pid != 0 ? orchi_process_signal(p, signal) : -ESRCH;
}

void orch_process_free(orch_process *p) {
    if (p == NULL || p->loop == NULL) return;
    if (p->loop != orchi_loop) {
        orchi_misuse("orch_process_free", orchi_loop != NULL ? ORCH_ETHREAD : ORCH_ENOLOOP);
        return;
    }
    orch_future *supervisor = p->supervisor;
    if (p->ends[0] >= 0) orch_process_close_stdin(p);
    orchi_process_leave(p);
    orch_cancel(supervisor, 0);
    if (orch_self() == NULL) {
        orch_drop(supervisor);
        return;
    }
    orch_shield_begin(); // others may hold it too, and a drop would not wait then
    orch_result r = orch_await(supervisor);
    orch_result_free(&r);
    orch_shield_end();
}

// ---- run

typedef struct orchi_capture {
    const char *name;
    int fd;
    size_t limit;
    bool truncate, truncated;
    char *data; // from malloc, as a result may outlive the loop
    size_t size, room;
} orchi_capture;

enum { ORCHI_CAPTURE_MORE = 4096 };

/* Room for one more read and a NUL, doubled until it is above the limit by one read. */
static bool orchi_capture_room(orchi_capture *c) {
    if (c->room - c->size > ORCHI_CAPTURE_MORE / 2) return true;
    size_t most = c->limit + ORCHI_CAPTURE_MORE, next = c->room * 2 + ORCHI_CAPTURE_MORE;
    char *data = (char *)realloc(c->data, next < most ? next : most);
    if (data == NULL) return false;
    c->data = data;
    c->room = next < most ? next : most;
    return true;
}

/* A task: reads one output to its end. What is above the limit is read as well, and dropped. */
static orch_result orchi_capture_run(void *arg) {
    orchi_capture *c = (orchi_capture *)arg;
    for (;;) {
        if (!orchi_capture_room(c)) return orch_fail(ORCH_ENOMEM);
        ptrdiff_t got = orch_read(c->fd, c->data + c->size, c->room - c->size - 1);
        if (got > 0) c->size += (size_t)got;
        if (c->size > c->limit) {
            c->size = c->limit;
            c->truncated = true;
        }
        c->data[c->size] = '\0';
        if (got <= 0) return got < 0 ? orch_fail((int)got) : orch_ok(NULL, NULL);
        if (c->truncated && !c->truncate) {
            return orch_failf(ORCH_ELIMIT, "%s is longer than %zu bytes", c->name, c->limit);
        }
    }
}

/* A task: writes the input. Who does not read all of it may have its reasons. */
static orch_result orchi_feed_run(void *arg) {
    orch_process *p = (orch_process *)arg;
    ptrdiff_t done = orch_write(p->ends[0], p->desc.input, p->desc.input_size);
    if (done == ORCH_ECANCELED) return orch_fail(ORCH_ECANCELED);
    orch_process_close_stdin(p);
    return done < 0 && done != -EPIPE ? orch_fail((int)done) : orch_ok(NULL, NULL);
}

/* From malloc throughout, so that a result may outlive its loop. */
static void orchi_output_free(void *output) {
    orch_process_output *o = (orch_process_output *)output;
    free(o->out);
    free(o->err);
    free(o);
}

/* All at the same time, as a program that waits for us to read would otherwise wait for ever. */
static orch_result orchi_process_exchange(orch_process *p, orchi_capture *out, orchi_capture *err) {
    orch_scope scope;
    orch_scope_open(&scope, NULL);
    if (p->ends[0] >= 0) orch_scope_go(&scope, orchi_feed_run, p);
    if (out->fd >= 0) orch_scope_go(&scope, orchi_capture_run, out);
    if (err->fd >= 0) orch_scope_go(&scope, orchi_capture_run, err);
    return orch_scope_close(&scope);
}

/* The first error of a scope by itself: its list shows futures that end with it. */
static orch_result orchi_first_error(orch_result r) {
    const char *message = orch_message(&r);
    orch_result own = message == orch_error_text(r.error) ? orch_fail(r.error)
                                                          : orch_failf(r.error, "%s", message);
    orch_result_free(&r);
    return own;
}

/* Outputs end when the last program that has them does; only then its own end is waited for. */
static orch_result orchi_process_finish(orch_process *p, orchi_capture *out, orchi_capture *err) {
    orch_result r = orchi_process_exchange(p, out, err);
    if (r.error != 0) return orchi_first_error(r);
    r = orch_await(orch_process_wait(p));
    if (r.error != 0) return r;
    orch_process_output *o = (orch_process_output *)calloc(1, sizeof *o);
    if (o != NULL) {
        o->status = *(const orch_exit_status *)r.value;
        o->out = out->data != NULL ? out->data : (char *)calloc(1, 1);
        o->err = err->data != NULL ? err->data : (char *)calloc(1, 1);
        o->out_size = out->size;
        o->err_size = err->size;
        o->truncated = out->truncated || err->truncated;
        out->data = err->data = NULL;
    }
    orch_result_free(&r);
    if (o != NULL && o->out != NULL && o->err != NULL) return orch_ok(o, orchi_output_free);
    if (o != NULL) orchi_output_free(o);
    return orch_fail(ORCH_ENOMEM);
}

static orchi_capture orchi_capture_of(const char *name, const orch_process *p, int i) {
    orchi_capture c;
    memset(&c, 0, sizeof c);
    c.name = name;
    c.fd = p->ends[i];
    c.limit = p->desc.limit < SIZE_MAX / 4 ? p->desc.limit : SIZE_MAX / 4;
    c.truncate = p->desc.truncate;
    return c;
}

orch_result orch_process_run(const orch_process_desc *given) {
    int error = orchi_process_desc_error(given);
    if (error == 0 && orch_self() == NULL) error = ORCH_ENOTASK;
    if (error != 0) return orch_fail(orchi_misuse("orch_process_run", error));
    if (orchi_must_end(orch_self())) return orch_fail(ORCH_ECANCELED);
    orch_process_desc desc = *given;
    if (desc.in == ORCH_STDIO_DEFAULT) desc.in = ORCH_STDIO_PIPE;
    if (desc.out == ORCH_STDIO_DEFAULT) desc.out = ORCH_STDIO_PIPE;
    if (desc.err == ORCH_STDIO_DEFAULT) desc.err = ORCH_STDIO_PIPE;
    orch_process *p = orch_process_start(&desc);
    if (orch_process_id(p) < 0) {
        orch_result r = orchi_first_error(orch_await(orch_process_wait(p)));
        orch_process_free(p);
        return r;
    }
    orchi_capture out = orchi_capture_of("stdout", p, 1), err = orchi_capture_of("stderr", p, 2);
    orch_result r = orchi_process_finish(p, &out, &err);
    orch_process_free(p);
    free(out.data);
    free(err.data);
    return r;
}

// ---- statuses

const char *orch_exit_status_text(orch_exit_status status, char *buffer, size_t size) {
    if (status.signal == 0) snprintf(buffer, size, "exited with %d", status.code);
    else
        snprintf(buffer, size, "killed by signal %d (%s)", status.signal, strsignal(status.signal));
    return buffer;
}

orch_result orch_exit_status_check(orch_exit_status status) {
    char text[128];
    if (status.signal == 0 && status.code == 0) return orch_ok(NULL, NULL);
    int error = status.signal != 0 ? 128 + status.signal : status.code;
    return orch_failf(error, "%s", orch_exit_status_text(status, text, sizeof text));
}

#ifdef __cplusplus
} // extern "C"
#endif

// ------------------------------------------------------------------------------------------------
// >>end

#undef ORCHI_A64_SAVE
#undef ORCHI_X64_CONTROL
#undef ORCHI_X64_CONTROL_OTHER
#undef ORCHI_X64_LOAD
#undef ORCHI_X64_SAVE
#undef ORCHI_ASAN
#undef ORCHI_ASSEMBLY
#undef ORCHI_BACKTRACE
#undef ORCHI_CANARY
#undef ORCHI_CET
#undef ORCHI_COLD
#undef ORCHI_CONSUMED
#undef ORCHI_DEBUG
#undef ORCHI_DISARMED
#undef ORCHI_ERROR_ROW
#undef ORCHI_FORK
#undef ORCHI_FUNCTION
#undef ORCHI_FUNCTION_END
#undef ORCHI_GUARD_BYTES
#undef ORCHI_HAS_ASSEMBLY
#undef ORCHI_HAS_FEATURE
#undef ORCHI_HAS_INCLUDE
#undef ORCHI_INLINE
#undef ORCHI_LIKELY
#undef ORCHI_EPOLL_PWAIT2
#undef ORCHI_NATIVE
#undef ORCHI_KQUEUE
#undef ORCHI_LOAD_FLOATS
#undef ORCHI_MINCORE
#undef ORCHI_NOSIGNAL
#undef ORCHI_MODIFIED
#undef ORCHI_NO_INLINE
#undef ORCHI_NO_WINNER
#undef ORCHI_OS_LINUX
#undef ORCHI_OS_MACOS
#undef ORCHI_PIDFD
#undef ORCHI_RISCV_SAVE
#undef ORCHI_GNU
#undef ORCHI_MAKES_PRIVATE
#undef ORCHI_SAVE_FLOATS
#undef ORCHI_SEMAPHORES
#undef ORCHI_STATIC_FUTURE
#undef ORCHI_SYMBOL
#undef ORCHI_TSAN
#undef ORCHI_UCONTEXT
#undef ORCHI_UNLIKELY

#endif // ASYNCORCH_IMPLEMENTATION

// This is free and unencumbered software released into the public domain.
//
// Anyone is free to copy, modify, publish, use, compile, sell, or distribute this software, either
// in source code form or as a compiled binary, for any purpose, commercial or non-commercial, and
// by any means.
//
// In jurisdictions that recognize copyright laws, the author or authors of this software dedicate
// any and all copyright interest in the software to the public domain. We make this dedication for
// the benefit of the public at large and to the detriment of our heirs and successors. We intend
// this dedication to be an overt act of relinquishment in perpetuity of all present and future
// rights to this software under copyright law.
//
// THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
// NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
// NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
// LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
// CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
//
// For more information, please refer to <https://unlicense.org>
