// The echo server on libuv: one handle for each connection; the answer goes out by uv_try_write,
// which needs no request object.
#include "server.h"

#include <uv.h>

static char buffer[ECHO_BUFFER];

static void on_room(uv_handle_t *handle, size_t size, uv_buf_t *room) {
    (void)handle;
    (void)size;
    *room = uv_buf_init(buffer, sizeof buffer);
}

static void on_close(uv_handle_t *handle) { free(handle); }

static void on_read(uv_stream_t *stream, ssize_t got, const uv_buf_t *room) {
    uv_buf_t answer = uv_buf_init(room->base, got > 0 ? (unsigned)got : 0);
    if (got == 0 || (got > 0 && uv_try_write(stream, &answer, 1) == got)) return;
    uv_close((uv_handle_t *)stream, on_close);
}

static void on_connection(uv_stream_t *listener, int status) {
    uv_tcp_t *connection = malloc(sizeof *connection);
    if (status < 0 || connection == NULL || uv_tcp_init(listener->loop, connection) != 0) return;
    if (uv_accept(listener, (uv_stream_t *)connection) == 0) {
        uv_read_start((uv_stream_t *)connection, on_room, on_read);
    } else {
        uv_close((uv_handle_t *)connection, on_close);
    }
}

int main(int argc, char **argv) {
    uv_tcp_t listener;
    struct sockaddr_in a = echo_address(argc > 1 ? atoi(argv[1]) : 7000);
    echo_raise_limit();
    uv_tcp_init(uv_default_loop(), &listener);
    uv_tcp_bind(&listener, (const struct sockaddr *)&a, 0);
    int error = uv_listen((uv_stream_t *)&listener, ECHO_BACKLOG, on_connection);
    echo_require(error == 0, "uv_listen");
    return uv_run(uv_default_loop(), UV_RUN_DEFAULT);
}
