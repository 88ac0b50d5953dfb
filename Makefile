# asyncorch.h is one file with nothing to build; this builds and runs what is around it. GNU make.
#
# CC, CXX, PREFIX, DESTDIR, SEEDS and N can be set, JOBS (programs side by side; one more than there
# are processors, as some of them sleep) and DEBUG (-g for a debugger; building takes half as long
# again).

B := .build
JOBS ?= $(call once,JOBS,$(shell expr 1 + "$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)"))
DEBUG ?= -g1
SEEDS ?= 200
N ?= 2000
PREFIX ?= /usr/local
WARNINGS := -Wall -Wextra -Wpedantic -Wconversion -Wshadow
VERSION := $(shell sed -n 's/^.define ORCH_VERSION "\(.*\)"/\1/p' asyncorch.h)

# What the machine has, found out only when a target needs it; libcurl always (see client).
once = $(eval $(1) := $(2))$($(1))
links = $(shell echo 'int main(void) { return 0; }' | \
	$(CC) $($(1)) -x c - -o /dev/null >/dev/null 2>&1 && echo '$($(1))')
sanitize := -fsanitize=address,undefined -fno-sanitize-recover=all
wrap := -DTEST_WRAP -Wl,--wrap=malloc,--wrap=calloc,--wrap=realloc,--wrap=mmap
SANITIZE = $(call once,SANITIZE,$(call links,sanitize))
WRAP = $(call once,WRAP,$(call links,wrap))
CURL = $(call once,CURL,$(shell \
	if pkg-config --exists libcurl; then echo -DHAVE_CURL $$(pkg-config --cflags --libs libcurl); \
	elif curl-config --version; then echo -DHAVE_CURL $$(curl-config --cflags --libs); \
	fi 2>/dev/null | grep -e -DHAVE_CURL))
package = $(shell pkg-config --exists $(1) 2>/dev/null && \
	echo -DHAVE_$(2) $$(pkg-config --cflags --libs $(1)))
GLIB = $(call once,GLIB,$(call package,glib-2.0,GLIB))
UV = $(call once,UV,$(call package,libuv,UV))
libraries_for = $(if $(shell grep -lE 'HAVE_CURL|curl\.h|client\.h' $(1)),$(CURL)) \
	$(if $(shell grep -l HAVE_GLIB $(1)),$(GLIB)) $(if $(shell grep -l HAVE_UV $(1)),$(UV))

# Those with an implementation of their own first, as they take longest to build.
TESTS := $(patsubst tests/%.c,%,$(shell grep -l '^.define ASYNCORCH_IMPL' tests/test_*.c))
TESTS += $(filter-out test_harness $(TESTS),$(patsubst tests/%.c,%,$(wildcard tests/test_*.c)))
SWITCHED := test_context test_task test_misuse # sanitizers have an orch_yield of their own
POLLED := $(patsubst tests/%.c,%,$(shell grep -lE 'TEST_POLLER|pollers\.h' tests/test_*.c))
POLLERS := poll $(if $(filter Linux,$(shell uname -s)),epoll,kqueue)
# Whose refused allocations `make test` tries: of the layers up to tasks.
CORE := $(filter $(addprefix test_,aplus base combinator context future loop misuse platform \
	poller stress task timer),$(TESTS))
SEEDED := $(patsubst tests/%.c,%,$(shell grep -l TEST_SEEDS tests/test_*.c))
EXAMPLES := $(patsubst examples/%.c,%,$(wildcard examples/*.c))
SCRIPTS := $(patsubst tests/%.sh,%,$(wildcard tests/test_*.sh))
BENCHES := $(patsubst bench/%.c,%,$(wildcard bench/bench_*.c))
TEST_BUILD = -std=gnu99 -D_GNU_SOURCE -pthread $(DEBUG) -fno-omit-frame-pointer $(WARNINGS) $(WRAP)
FORMATTED := asyncorch.h $(wildcard tests/*.[ch] tests/*.cc examples/*.[ch] bench/*.[ch] \
	bench/*/*.[ch] bench/*/*.cc)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-sweep test-cross test-seeds torture soak bench bench-echo bench-peers \
	check deps install uninstall clean format coverage examples $(TESTS)

help: # this list
	@echo "asyncorch.h $(VERSION): copy asyncorch.h into your project; nothing else is needed"
	@echo
	@sed -n 's/^\([a-z-]*\):[^#]*# \(.*\)/\1|\2/p' Makefile | \
		awk -F'|' '{ printf "    make %-11s %s\n", $$1, $$2 }'

# ---- programs, one folder per way to build them: $(B)/<way>/<program>

# Made anew when libcurl has come or gone since: then what can use it is built again.
client = $(B)/client-$(if $(CURL),libcurl,minimal)
$(B)/client-libcurl $(B)/client-minimal:
	@mkdir -p $(@D) && rm -f $(B)/client-* && touch $@

# Not optimised: all they do is wait, and they build twice as fast.
$(B)/examples/%: examples/%.c asyncorch.h $(wildcard examples/*.h) Makefile $(client)
	@mkdir -p $(@D)
	@$(CC) -std=gnu99 -pthread -O0 -g $(WARNINGS) $< -o $@ $(call libraries_for,$<)

$(B)/bench/%: bench/%.c asyncorch.h $(wildcard bench/*.h examples/*.h) Makefile $(client)
	@mkdir -p $(@D)
	@$(CC) -std=gnu99 -pthread -O2 -DNDEBUG $(WARNINGS) $< -o $@ $(call libraries_for,$<)

# way: compiler, its flags. Each of these folders has every test program, and the implementation
# once for all that do not ask for their own, which saves most of the time it takes to build them.
own = $(shell grep -q ASYNCORCH_IMPLEMENTATION $(1) || echo $(2))
define way
$(B)/$(strip $(1))/asyncorch.o: asyncorch.h Makefile
	@mkdir -p $$(@D)
	@$(2) $$(TEST_BUILD) $(3) -DASYNCORCH_IMPLEMENTATION -x c -c $$< -o $$@

$(B)/$(strip $(1))/%: tests/%.c $(B)/$(strip $(1))/asyncorch.o asyncorch.h \
		$(wildcard tests/*.h examples/*.h) Makefile $(client)
	@rm -f $$@ # what does not build any more must not run either
	@$(2) $$(TEST_BUILD) $(3) $$< $$(call own,$$<,$$(@D)/asyncorch.o) -o $$@ $$(call libraries_for,$$<)

$(B)/$(strip $(1))/test_process_sigchld: tests/test_process.c # which it includes
endef
$(eval $(call way,tests,     $$(CC),-O1 $$(SANITIZE)))
$(eval $(call way,coverage,  $$(CC),-O0 --coverage))
$(eval $(call way,plain,     $$(CC),-O1))
$(eval $(call way,release,   $$(CC),-O2 -DNDEBUG))
$(eval $(call way,lto,       $$(CC),-O3 -flto=auto))
$(eval $(call way,ucontext,  $$(CC),-O1 $$(SANITIZE) -DORCH_USE_UCONTEXT=1))
$(eval $(call way,clang,     clang,-O1 $$(SANITIZE) -fstack-clash-protection))
$(eval $(call way,thread,    $$(CC),-O1 -fsanitize=thread))

# Other processors: size_t of 32 bits (i686, which x86-64 runs itself), big-endian (s390x), ucontext
# (both). The rest is emulated.
CROSS := aarch64 riscv64 i686 s390x
root = /usr/$(1)-linux-gnu
native = -Wl,--dynamic-linker=$(root)/lib/ld-linux.so.2 -Wl,-rpath,$(root)/lib
$(foreach c,$(CROSS),$(eval $(call way,$(c),$(c)-linux-gnu-gcc,-O1 -fasynchronous-unwind-tables \
	$(if $(filter i686,$(c)),$(call native,$(c)),-DTEST_EMULATED))))
CROSS_TESTS := $(filter-out test_curl test_http test_connections,$(TESTS))
emulator = $(if $(filter i686,$(1)),,qemu-$(1)-static -L $(root))
crossed = $(shell { command -v $(1)-linux-gnu-gcc && command -v $(firstword $(emulator) sh); } \
	>/dev/null && echo $(1))
cross_lines = $(if $(crossed),$(foreach t,$(CROSS_TESTS),echo \
	'$(t)/$(1) TEST_TIME=10 TEST_SEEDS=4 $(emulator) $(B)/$(1)/$(t)';),echo \
	'$(1) echo "skipped $(1) (no compiler or no qemu)"; echo "0 passed, 0 failed, 1 skipped"';)

# Builds the test programs of some ways, and more; one that does not build counts as failed when it
# is to run.
build = $(MAKE) -k --no-print-directory -j$(JOBS) \
	$(foreach w,$(1),$(TESTS:%=$(B)/$(w)/%)) $(B)/tests/test_harness $(2) || true

# Lines for tests/run.sh: way, label, arguments, what goes before.
lines = $(foreach t,$(TESTS),echo '$(t)$(if $(2),/$(2)) $(4) $(B)/$(strip $(1))/$(t) $(3)';)
sweeps = $(if $(WRAP),$(foreach t,$(1),echo \
	'$(t)/sweep TEST_TIME=3 TEST_SEEDS=1 $(B)/tests/$(t) --sweep';),echo \
	'sweep echo "skipped the sweep (no ld --wrap)"; echo "0 passed, 0 failed, 1 skipped"';)
matrix = $(foreach g,options-gcc options-clang threads c cxx cross units,echo \
	'matrix/$(g) $(1) sh tests/run_matrix.sh $(g)';)
VALGRIND = TEST_TIME=20 valgrind -q --error-exitcode=9 --leak-check=full \
	--errors-for-leak-kinds=definite
HELGRIND = TEST_TIME=20 valgrind -q --tool=helgrind --error-exitcode=9
harness_without = $(if $(SANITIZE),, no-sanitizers)$(if $(WRAP),, no-sweep)
RUN = sh tests/run.sh $(B)/log

# ---- targets

demo: $(B)/examples/08_profile $(B)/examples/server
demo: # the user profile over real sockets: timeline, parallel against sequential
	@sh examples/demo.sh $(B)/examples

examples: $(EXAMPLES:%=$(B)/examples/%) # build the examples into .build/examples

test: # the core complete, the rest but for its sweeps: sanitizers, allocation failures, compilers
	@$(call build,tests,examples $(SWITCHED:%=$(B)/plain/%))
	@{ echo 'harness sh tests/run_harness.sh $(B)/tests/test_harness$(harness_without)'; \
	$(call lines,tests,,,TEST_TIME=3 TEST_SEEDS=$(SEEDS)) \
	$(foreach t,$(SWITCHED),echo '$(t)/plain TEST_TIME=3 $(B)/plain/$(t)';) \
	$(foreach p,$(POLLERS),$(foreach t,$(POLLED), \
		echo '$(t)/$(p) TEST_POLLER=$(p) TEST_TIME=3 TEST_SEEDS=1 $(B)/tests/$(t)';)) \
	$(foreach s,$(SCRIPTS),echo '$(s) sh tests/$(s).sh $(B)/examples';) \
	$(matrix) $(call sweeps,$(CORE)) } | JOBS=$(JOBS) $(RUN)

test-sweep: # the rest of what test does for the core: refused allocations in the upper layers
	@$(call build,tests)
	@{ $(call sweeps,$(filter-out $(CORE),$(TESTS))) } | JOBS=$(JOBS) $(RUN)

$(TESTS): %: $(B)/tests/%
	@$<

torture: # the tests in every build there is
	@$(call build,tests release ucontext clang lto thread)
	@$(MAKE) test-cross
	@{ $(call lines,release,release) $(call lines,ucontext,ucontext) \
	$(call lines,clang,clang) $(call lines,lto,lto) \
	$(call lines,thread,thread,,TEST_TIME=4) $(call matrix,FULL=1) \
	$(call lines,tests,stack-use,,ASAN_OPTIONS=detect_stack_use_after_return=1) } | JOBS=$(JOBS) $(RUN)

test-cross: # the tests on other processors: i686; aarch64, riscv64, s390x emulated
	@$(MAKE) -k --no-print-directory -j$(JOBS) \
		$(foreach c,$(CROSS),$(if $(call crossed,$(c)),$(CROSS_TESTS:%=$(B)/$(c)/%))) || true
	@{ $(foreach c,$(CROSS),$(call cross_lines,$(c))) } | JOBS=$(JOBS) $(RUN)

test-seeds: # what runs tasks in an order drawn from a seed, over N=2000 seeds
	@$(call build,release)
	@{ $(foreach t,$(SEEDED),echo '$(t) TEST_TIME=100 TEST_SEEDS=$(N) $(B)/release/$(t)';) } | \
	JOBS=$(JOBS) $(RUN)

soak: torture # torture, then valgrind and helgrind, then 200 repeats on a busy machine; hours
	@$(call build,plain lto)
	@{ $(call lines,plain,valgrind,,$(VALGRIND)) \
	for t in test_thread test_file; do echo "$$t/helgrind $(HELGRIND) $(B)/plain/$$t"; done; \
	for i in $$(seq 200); do \
		$(foreach t,$(TESTS),echo "$(t)/$$i TEST_TIME=4 $(B)/lto/$(t)";) \
	done; } | JOBS=$$((2 * $(JOBS))) $(RUN)

bench: $(BENCHES:%=$(B)/bench/%) # the figures, and sequential against parallel as table and chart
	@sh bench/run.sh $(B)/bench

bench-echo: # an echo server against bare poll(2) and epoll: requests, memory, system calls
	@sh bench/echo/run.sh $(B)/bench/echo

bench-peers: # both with Go, tokio, Node, libuv, libev, State Threads and the like, where found
	@sh bench/peers/run.sh $(B)/peers
	@sh bench/echo/run.sh $(B)/bench/echo libuv libev libevent tokio go

check: # the source: names, layers, sizes, contracts, samples, format, four analysers
	@sh tests/check/run.sh

deps: # install what the examples, tests and checks can use; the header itself needs nothing
	@sh tests/deps.sh

install: # the header and asyncorch.pc, under PREFIX (/usr/local) and DESTDIR
	@install -d $(DESTDIR)$(PREFIX)/include $(DESTDIR)$(PREFIX)/lib/pkgconfig
	install -m 644 asyncorch.h $(DESTDIR)$(PREFIX)/include/asyncorch.h
	@printf '%s\n' 'prefix=$(PREFIX)' 'includedir=$${prefix}/include' '' 'Name: asyncorch' \
		'Description: futures, tasks and orchestration for plain C, in one header' \
		'Version: $(VERSION)' 'Cflags: -I$${includedir} -pthread' 'Libs: -pthread' \
		>$(DESTDIR)$(PREFIX)/lib/pkgconfig/asyncorch.pc
	@echo 'asyncorch.pc -> $(DESTDIR)$(PREFIX)/lib/pkgconfig/asyncorch.pc'

uninstall: # the same two files
	rm -f $(DESTDIR)$(PREFIX)/include/asyncorch.h $(DESTDIR)$(PREFIX)/lib/pkgconfig/asyncorch.pc

clean: # remove .build
	rm -rf $(B)

format: # clang-format, in place
	clang-format -i $(FORMATTED)

coverage: # which lines and branches of the header the tests reach (gcovr)
	@rm -rf $(B)/coverage
	@$(call build,coverage)
	@{ $(call lines,coverage) } | JOBS=$(JOBS) $(RUN) || true
	gcovr --root . --filter asyncorch.h \
		--html-details $(B)/coverage/index.html --print-summary $(B)/coverage
