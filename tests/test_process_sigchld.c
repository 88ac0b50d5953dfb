// test_process_sigchld.c: the tests of test_process.c where a child's end is known by SIGCHLD.
#define ORCH_USE_SIGCHLD 1
#include "test_process.c" // has ASYNCORCH_IMPLEMENTATION
