// 20_http_files: a folder as a web site, for browsers, curl and wrk.
//
// shows   orch_listen and orch_serve (a bounded accept loop, a task per connection), orch_offload
//         and orch_file_read (files without blocking the loop), time-outs by scopes, and an end in
//         good order on Ctrl-C (handle_signals): answers that have begun are finished; see
//         http_serve.h and http_files.h for how
// run     cc -O2 -o http_files examples/20_http_files.c && ./http_files . 8080
//         curl -i http://127.0.0.1:8080/README.md
// prints
//         . on http://127.0.0.1:8080

#define ASYNCORCH_IMPLEMENTATION
#include "../asyncorch.h"

#include <stdio.h>
#include <stdlib.h>

#include "http_files.h"

static struct site {
    const char *folder;
    int root;
    uint16_t port;
    http_service service;
} site;

static orch_result start(void *arg) {
    (void)arg;
    int listener = orch_listen(&(orch_listen_desc){.host = "127.0.0.1", .port = site.port});
    if (listener < 0) {
        return orch_failf(listener, "cannot listen on port %u: %s", (unsigned)site.port,
                          orch_error_text(listener));
    }
    orch_address address;
    char text[ORCH_ADDRESS_TEXT];
    orch_socket_address(listener, &address);
    printf("%s on http://%s\n", site.folder, orch_address_text(&address, text, sizeof text));
    fflush(stdout);
    return orch_fail(orch_serve(listener, http_connected,
                                &(orch_serve_desc){.context = &site.service,
                                                   .max_connections = HTTP_CONNECTIONS_MAX,
                                                   .no_drain = true}));
}

int main(int argc, char **argv) {
    long port = argc > 2 ? strtol(argv[2], NULL, 10) : 8080;
    if (argc < 2 || argc > 3 || port < 0 || port > 65535) {
        fprintf(stderr, "usage: %s FOLDER [PORT]   (port 0: a free one)\n", argv[0]);
        return 2;
    }
    site.folder = argv[1];
    site.port = (uint16_t)port;
    site.root = open(site.folder, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (site.root < 0) return orch_exit(orch_failf(-errno, "%s: %s", argv[1], strerror(errno)));
    site.service = (http_service){http_serve_file, &site.root, 0};
    http_raise_descriptor_limit();
    int code = orch_exit(orch_run_with(&(orch_loop_desc){.handle_signals = true}, start, NULL));
    printf("%zu requests\n", site.service.requests);
    return code;
}
