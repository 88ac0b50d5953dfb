// asyncorch.h - v0.1.0 - futures, tasks and orchestration for plain C, in one file. Public domain.
//
//     #define ASYNCORCH_IMPLEMENTATION   // in exactly one .c or .cc file of the program
//     #include "asyncorch.h"             // and without the define wherever else it is used
//     cc -O2 program.c                   // nothing to link, nothing to generate
//
// Search for >>name to reach a section. Each layer calls only what stands above it in the file.
//
//     >>manual          model, first program, futures, tasks, cancellation, time, ownership, errors,
//                       misuse, threads, limits, caveats
//     >>config          what can be set before the include
//     >>api             results, futures, combinators, tasks, loop: one contract block per function
//     >>implementation  bottom first:
//
//       8 >>task        coroutines, await, cancellation, shield ........ orch_go, orch_await, orch_run
//       7 >>combinator  all, any, race, quorum, gather, timeout ........ orch_all, orch_timeout
//       6 >>future      slots, tickets, settle, then, follow, cancel ... orch_then, orch_settle
//       5 >>loop        turns, rounds, readiness, deadlock ............. orch_loop_step, orch_ready
//       4 >>timer       a heap of deadlines
//       3 >>poller      one contract; poll(2)
//       2 >>context     stacks with guards, the switch
//       1 >>base        errors, misuse, allocator, slots, ready ring
//       0 >>platform    operating system, processor, compiler, tools
//
//     >>end             macros undefined, licence

#ifndef ASYNCORCH_H
#define ASYNCORCH_H

// ------------------------------------------------------------------------------------------------
// >>manual

// ------------------------------------------------------------------------------------------------
// >>config
//
// Nothing has to be set. Where to define: before the include that has ASYNCORCH_IMPLEMENTATION.
//
//     NDEBUG                  not defined   a misuse prints a message and aborts; consumed futures are
//                                           kept in quarantine, so that a later use is named
//                             defined       a misuse returns the documented error
//     ORCH_USE_UCONTEXT       not defined   define to 1 to switch with ucontext instead of assembly
//
// Neither changes a public struct. Run-time settings are fields of orch_loop_desc.

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
// (ORCH_ENOMEM, ORCH_ENOLOOP outside a loop's thread, ORCH_EINVAL for NULL, ORCH_ECONSUMED for a future
// that was given away before).

typedef struct orch_future orch_future;         // the read end of work in progress
typedef struct orch_loop orch_loop;             // one per thread
typedef struct orch_task orch_task;             // a running coroutine
typedef struct orch_completion orch_completion; // an iteration in order of completion

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
    X(ORCH_ENESTED, -10009, "a loop is running on this thread already")

#define ORCHI_ERROR_ENUM(name, value, text) name = (value),
typedef enum orch_error { ORCH_OK = 0, ORCH_ERRORS(ORCHI_ERROR_ENUM) ORCH_ERROR_LAST = -10010 } orch_error;
#undef ORCHI_ERROR_ENUM

/* The text of an error code: the library's own, or the system's for an -errno.
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
    int error;                    // 0: fulfilled; negative: -errno or ORCH_E...; positive: your own
    unsigned index;               // which input decided it (all: the failed one; any, race: the winner)
    void *value;                  // fulfilled: the value; rejected: optional detail (a message, a list)
    void *owner;                  // what release gives back
    void (*release)(void *owner); // NULL: nothing to give back
} orch_result;

/* A fulfilled result with a value.
 * Returns the result.
 * Context: any thread.
 * Owns: the value, when release is not NULL; release(value) is called once, at the end of the last share. */
orch_result orch_ok(void *value, void (*release)(void *value));

/* A fulfilled result with a number, to be read by orch_int.
 * Returns the result.
 * Context: any thread.
 * Owns nothing. */
orch_result orch_ok_int(intptr_t value);

/* A rejected result. An error of 0 is a mistake and becomes ORCH_EINVAL.
 * Returns the result.
 * Context: any thread.
 * Owns nothing. */
orch_result orch_fail(int error);

/* A rejected result with a message, formatted as by printf. Out of memory loses the message, not the error.
 * Returns the result.
 * Context: any thread.
 * Owns: the result owns its message. */
orch_result orch_failf(int error, const char *format, ...) ORCH_PRINTF(2, 3);

/* What a person should read about a result: its own message, else the text of its error, "ok" for none.
 * Returns a string, never NULL.
 * Context: any thread.
 * Owns nothing; the string lives as long as the result. */
const char *orch_message(const orch_result *r);

/* The number that orch_ok_int put in.
 * Returns it; 0 for a rejected result.
 * Context: any thread.
 * Owns nothing. */
intptr_t orch_int(const orch_result *r);

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
 * Returns the value; NULL when it is shared or lent (it stays where it is).
 * Context: any thread.
 * Owns: hands the value over to the caller; the result no longer owns it. */
void *orch_take(orch_result *r);

/* Gives back what a result owns and clears it. Freeing twice is harmless; so is freeing a lent result.
 * Returns nothing.
 * Context: the thread of the loop that made it; does not suspend.
 * Owns: consumes what r owns. */
void orch_result_free(orch_result *r);

// ---- futures
//
// Every function that takes a future consumes it, whatever happens, out of memory included. orch_ref
// gives one more reference. Giving up the last reference to pending work cancels it.

/* The write end: a ticket, passed by value. It owns nothing, and a late or second use is harmless. */
typedef struct orch_promise {
    orch_future *future;
    uint64_t generation;
} orch_promise;

typedef orch_result (*orch_then_fn)(orch_result *in, void *context); // in is lent: orch_take to keep it
typedef void (*orch_on_fn)(orch_result *in, void *context);          // in is lent: orch_take to keep it
typedef bool (*orch_cancel_fn)(void *context, int reason);           // true: the work has ended

typedef struct orch_then_desc {
    orch_then_fn on_ok;             // NULL: value and state pass through
    orch_then_fn on_error;          // NULL: error and detail pass through
    void *context;                  // passed to both
    void (*release)(void *context); // called exactly once, also when nothing ever ran; NULL: nothing
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
 * Returns whether this call decided it; if not (settled before, locked in, future gone, wrong thread)
 * r is freed.
 * Context: the loop's own thread; never suspends, allocates or calls back.
 * Owns: consumes r. */
bool orch_settle(orch_promise promise, orch_result r);

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

/* Registers what to do when the future is cancelled: fn returns true when the work has ended, false
 * when the producer will still settle. It is called from the loop, at most once.
 * Returns false, and registers nothing, when the ticket can no longer settle.
 * Context: loop thread; fn is called on it and must not suspend.
 * Owns: borrows context until the future is settled. */
bool orch_promise_on_cancel(orch_promise promise, orch_cancel_fn fn, void *context);

/* A ticket as one pointer, for C callbacks with a void *user. It needs no memory and cannot fail.
 * Returns the box, never NULL.
 * Context: loop thread.
 * Owns: hands over a box, which orch_promise_unbox takes back exactly once. */
void *orch_promise_box(orch_promise promise);

/* The ticket out of its box.
 * Returns the ticket, dead when the future is gone.
 * Context: loop thread.
 * Owns: consumes the box. */
orch_promise orch_promise_unbox(void *box);

/* One more reference.
 * Returns f.
 * Context: loop thread.
 * Owns: hands over a reference. */
ORCH_NODISCARD orch_future *orch_ref(orch_future *f);

/* Gives up a reference. The last one to pending work cancels it; inside a task the call then returns
 * as soon as that work has ended, outside one the work ends later.
 * Returns nothing.
 * Context: loop thread; in a task it may suspend.
 * Owns: consumes f. NULL does nothing. */
void orch_drop(orch_future *f);

/* Gives up a reference and lets the work run on. Its rejection, if nobody else looks at it, is reported
 * to on_unhandled.
 * Returns nothing.
 * Context: loop thread; does not suspend.
 * Owns: consumes f. NULL does nothing. */
void orch_detach(orch_future *f);

/* Asks pending work to end, without giving up the reference. Work that others hold too is asked as well:
 * the caller decides. Settled work stays as it is.
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

/* A future of what a callback makes of f: on_ok for a value, on_error for an error, NULL passes on. The
 * callback may return a value, an error, orch_chain of another future, or *in. Cancelling the new future
 * cancels f, and the callback sees ORCH_ECANCELED.
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
 * Returns nothing. When it cannot be registered for want of memory, fn gets ORCH_ENOMEM from this call.
 * Context: loop thread; fn is called from the loop and must not suspend.
 * Owns: consumes f; borrows context until fn was called. */
void orch_on(orch_future *f, orch_on_fn fn, void *context);

/* Runs fn when f has settled either way, and passes its outcome on.
 * Returns the new future.
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
// They consume their inputs, nest without limit and keep the inputs' order. When the outcome is decided,
// the losers are cancelled, and the outcome is delivered as soon as they have ended. A loser that others
// hold too is left alone and not waited for. Each has an array form ending in _n and a variadic form.

/* Fulfilled with the list of all values when every input is; rejected with the first error (index: whose)
 * otherwise. No input: fulfilled with an empty list.
 * Returns the future.
 * Context: loop thread; does not suspend. futures is read during the call.
 * Owns: consumes every future, also when it fails. Source: ECMAScript Promise.all. */
ORCH_NODISCARD orch_future *orch_all_n(size_t count, orch_future *const *futures);

/* Fulfilled with the list of all outcomes when every input has settled.
 * Returns the future.
 * Context: as orch_all_n.
 * Owns: as orch_all_n. Source: ECMAScript Promise.allSettled. */
ORCH_NODISCARD orch_future *orch_all_settled_n(size_t count, orch_future *const *futures);

/* Fulfilled with the first value (index: whose); rejected with ORCH_EALLFAILED and the list of errors when
 * every input is, which an empty list is at once.
 * Returns the future.
 * Context: as orch_all_n.
 * Owns: as orch_all_n. Source: ECMAScript Promise.any. */
ORCH_NODISCARD orch_future *orch_any_n(size_t count, orch_future *const *futures);

/* Settles as the first input does (index: which one). No input: ORCH_EINVAL, as it could never settle.
 * Returns the future.
 * Context: as orch_all_n.
 * Owns: as orch_all_n. Source: ECMAScript Promise.race. */
ORCH_NODISCARD orch_future *orch_race_n(size_t count, orch_future *const *futures);

/* Fulfilled with the list of outcomes as soon as `needed` inputs are fulfilled (what was cancelled then
 * shows ORCH_ECANCELED); rejected with ORCH_EQUORUM and the list when that has become impossible.
 * Returns the future; needed > count: ORCH_EINVAL.
 * Context: as orch_all_n.
 * Owns: as orch_all_n. */
ORCH_NODISCARD orch_future *orch_quorum_n(size_t needed, size_t count, orch_future *const *futures);

/* all_settled with a deadline: fulfilled with the list after ms at the latest; what was not done by then
 * is cancelled and shows ORCH_ETIMEDOUT.
 * Returns the future.
 * Context: as orch_all_n.
 * Owns: as orch_all_n. Units: milliseconds. */
ORCH_NODISCARD orch_future *orch_gather_n(size_t count, orch_future *const *futures, uint64_t ms);

/* A race of f and a timer: settles as f does, or with ORCH_ETIMEDOUT ("Timeout after 2000 ms") and index 1.
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
 * Returns the future; ORCH_EEND after the last element.
 * Context: loop thread.
 * Owns: borrows c; hands over the future. */
ORCH_NODISCARD orch_future *orch_completion_next(orch_completion *c);

/* Ends an iteration; what has not settled is cancelled, and in a task has ended when this returns.
 * Returns nothing.
 * Context: loop thread; in a task it may suspend.
 * Owns: consumes c. NULL does nothing. */
void orch_completion_free(orch_completion *c);

extern orch_future orch_end_mark;   // the end of a variadic list: typed, and not NULL, so that a NULL
#define ORCH_END (&orch_end_mark)   // among the futures is seen as the mistake that it is

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
    const char *name;           // for reports; borrowed until the task has ended; default: a number
    orch_task_fn fn;            // required
    void *arg;                  // passed to fn
    size_t arg_size;            // bytes; not 0: that many bytes of arg are copied, fn gets the copy
    void (*release)(void *arg); // called exactly once with what fn got (arg, if it never ran)
    size_t stack_size;          // bytes, 16 KiB to 1 GiB, rounded up to a power of two; default: loop's
} orch_task_desc;

/* Starts a task.
 * Returns its future. The task may return a value, an error, or orch_chain of another future.
 * Context: loop thread; runs the task until it first waits.
 * Owns: borrows arg until the task has ended. */
ORCH_NODISCARD orch_future *orch_go(orch_task_fn fn, void *arg);

/* Starts a task with a name, a copied argument, a release or a stack size.
 * Returns its future; ORCH_EINVAL for no fn, a stack size out of range, or an arg_size above half the stack.
 * Context: as orch_go.
 * Owns: consumes arg when there is a release, on every path. */
ORCH_NODISCARD orch_future *orch_go_with(const orch_task_desc *desc);

/* Starts a task and detaches it.
 * Returns 0; ORCH_ENOMEM, ORCH_EINVAL, ORCH_ENOLOOP when it did not start.
 * Context: as orch_go.
 * Owns: borrows arg until the task has ended. */
int orch_spawn(orch_task_fn fn, void *arg);

/* Waits for a future and takes its outcome.
 * Returns the result, which is the caller's to free. Cancelled: ORCH_ECANCELED, after the work of f has ended
 * (if nobody else holds it). ORCH_ENOTASK outside a task, where f is dropped.
 * Context: task only; suspends unless f is settled, and then too when it is the 128th call in a row.
 * Owns: consumes f; hands over the result. */
orch_result orch_await(orch_future *f);

/* Waits for a future without taking it.
 * Returns the result, lent by f: freeing it does nothing. Errors as orch_await; f goes on.
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

/* From here to orch_shield_end a cancelled task may wait, for its clean-up. Shields nest. They hold until the
 * loop is deadlocked.
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

/* Calls fn on the thread's main stack, for calls that need a big one.
 * Returns what fn returns. Outside a task it is a plain call.
 * Context: loop thread; fn must not suspend.
 * Owns: borrows arg during the call. */
void *orch_on_main_stack(void *(*fn)(void *arg), void *arg);

// ---- loop

typedef struct orch_allocator {
    // realloc with sizes: old NULL: allocate; size 0: free and return NULL; NULL otherwise: out of memory
    void *(*resize)(void *user, void *old, size_t old_size, size_t size);
    void *user;
} orch_allocator;

typedef enum orch_poller { ORCH_POLLER_DEFAULT, ORCH_POLLER_POLL } orch_poller;

// What keeps a stack overflow from silent corruption.
typedef enum orch_guard {
    ORCH_GUARD_UNKNOWN,  // no stack was made yet
    ORCH_GUARD_CANARY,   // a word at the stack's end, checked when the task waits
    ORCH_GUARD_MPROTECT, // 16 KiB no-access pages, two mappings a stack
    ORCH_GUARD_MADVISE   // 16 KiB no-access pages, no mapping (Linux 6.13)
} orch_guard;

typedef struct orch_loop_desc {
    orch_allocator allocator; // default: malloc
    orch_poller poller;       // default: poll(2)
    size_t stack_size;        // bytes of a task's stack; default: 64 KiB
    bool no_overflow_report;  // leave SIGSEGV alone: a stack overflow then dies without naming its task
    void *context;            // for the hooks below
    void (*on_unhandled)(const orch_result *r, void *context); // default: one line on stderr
    void (*on_report)(const char *text, void *context); // deadlocks, ignored cancels; default: stderr
} orch_loop_desc;

typedef struct orch_loop_stats {
    size_t futures;   // slots in use (futures, tasks, registrations)
    size_t tasks;     // tasks that have not ended
    size_t stacks;    // stacks made
    size_t timers;    // timers armed
    size_t watched;   // descriptors waited for
    uint64_t turns;   // turns run
    uint64_t polls;   // system calls that looked for descriptors or slept
    uint64_t resumes; // tasks resumed and callbacks run
    orch_guard guard; // the weakest guard in force
} orch_loop_stats;

/* Makes this thread's loop.
 * Returns the loop; NULL when out of memory, when the thread has one, or when desc is invalid.
 * Context: any thread; becomes the loop thread.
 * Owns: hands over the loop, for orch_loop_free. desc NULL: all defaults. */
ORCH_NODISCARD orch_loop *orch_loop_new(const orch_loop_desc *desc);

/* Cancels everything, runs what is ready until it has ended, and frees the loop and every slot.
 * Returns 0; ORCH_EBUSY, and the loop lives on, while tasks shield, producers still have to settle, or
 * futures are held outside. ORCH_EINVAL for NULL, ORCH_ENESTED inside a task or callback.
 * Context: loop thread.
 * Owns: consumes loop when it returns 0. */
int orch_loop_free(orch_loop *loop);

/* Runs turns until nothing is left to do, or orch_loop_stop.
 * Returns 0; ORCH_EDEADLK when tasks or callbacks are left that nothing can wake (reported); ORCH_ENESTED
 * inside a task or callback; ORCH_EINVAL for NULL; an -errno of the poller.
 * Context: loop thread.
 * Owns: borrows loop. */
int orch_loop_run(orch_loop *loop);

/* Runs one turn, sleeping in the poller for at most ms when nothing is ready.
 * Returns 1 when there is more to do, 0 when nothing is left to wait for; errors as orch_loop_run.
 * Context: loop thread.
 * Owns: borrows loop. Units: milliseconds. */
int orch_loop_step(orch_loop *loop, uint64_t ms);

/* Lets orch_loop_run return after this turn.
 * Returns nothing.
 * Context: loop thread.
 * Owns: borrows loop. */
void orch_loop_stop(orch_loop *loop);

/* This thread's loop.
 * Returns the loop, or NULL.
 * Context: any thread.
 * Owns nothing. */
orch_loop *orch_loop_current(void);

/* The settings in force, every default filled in.
 * Returns the desc.
 * Context: loop thread.
 * Owns nothing; lives as long as the loop. */
const orch_loop_desc *orch_loop_settings(const orch_loop *loop);

/* Counters.
 * Returns them.
 * Context: loop thread.
 * Owns nothing. */
orch_loop_stats orch_loop_statistics(const orch_loop *loop);

/* Reports who awaits what, one line per task and per waiting future, to on_report.
 * Returns nothing.
 * Context: loop thread.
 * Owns: borrows loop. */
void orch_loop_dump(orch_loop *loop);

/* The monotonic clock.
 * Returns milliseconds since an arbitrary start.
 * Context: any thread.
 * Owns nothing. Units: milliseconds. */
uint64_t orch_now(void);

#define ORCH_READABLE 1 // also the end of the stream, and errors
#define ORCH_WRITABLE 2 // also errors

/* A future of a descriptor's readiness: orch_int of the result has the events that came, of those asked for.
 * Returns the future; rejected: -EBADF for a bad descriptor, ORCH_EINVAL for no or unknown events, ORCH_EBUSY
 * for a second waiter in one direction, ORCH_ENOMEM.
 * Context: loop thread. Drop it before the descriptor is closed.
 * Owns: borrows fd until settled. */
ORCH_NODISCARD orch_future *orch_ready(int fd, int events);

/* Makes a loop, runs one main task on it, and when that ends cancels and awaits the rest and frees the loop.
 * Returns the main task's result; ORCH_EDEADLK when it can never end (reported); ORCH_ENESTED when this thread
 * has a loop already; ORCH_ENOMEM.
 * Context: any thread without a loop; blocks until all has ended.
 * Owns: borrows arg; the result is the caller's to free. */
orch_result orch_run(orch_task_fn main, void *arg);

/* orch_run with settings.
 * Returns as orch_run; ORCH_EINVAL for an invalid desc.
 * Context: as orch_run.
 * Owns: as orch_run. */
orch_result orch_run_with(const orch_loop_desc *desc, orch_task_fn main, void *arg);

/* What main() returns: prints a rejected result's message on stderr and frees it.
 * Returns 0 or 1.
 * Context: any thread.
 * Owns: consumes r. */
int orch_exit(orch_result r);

#ifdef __cplusplus
} // extern "C"

#include <initializer_list>

// C++ has neither compound literals nor the address of a temporary: initialiser lists and references.
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
static inline orch_loop *orch_loop_new(const orch_loop_desc &desc) { return orch_loop_new(&desc); }
static inline orch_result orch_run_with(const orch_loop_desc &desc, orch_task_fn main, void *arg) {
    return orch_run_with(&desc, main, arg);
}
#endif

#endif // ASYNCORCH_H
