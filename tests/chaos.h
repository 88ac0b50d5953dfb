// chaos.h - a proxy between client and server that does what networks do; for tests.
//     chaos c = {.to = address, .seed = 7, .modes = CHAOS_PIECES | CHAOS_DELAY};
//     c.listener = orch_listen(...);
//     orch_future *proxy = orch_go(chaos_run, &c);     cancel it to end it
// What it does is drawn from the seed, so that the same seed does the same to the same bytes.
// Include it after asyncorch.h.

enum chaos_mode {
    CHAOS_PIECES = 1, // reads and writes in pieces of any size
    CHAOS_BYTES = 2,  // in single bytes
    CHAOS_DELAY = 4,  // waits 0 to 2 ms now and then
    CHAOS_CUT = 8,    // resets both connections after some bytes
    CHAOS_HALF = 16   // ends one direction after some bytes
};

typedef struct chaos {
    int listener;    // consumed by chaos_run
    orch_address to; // the server
    uint64_t seed;
    unsigned modes;
    size_t until;                       // cuts after at most so many bytes; 0: 4096
    unsigned connections, cuts, halves; // so far
} chaos;

typedef struct chaos_link {
    chaos *chaos;
    int client, server;
    uint64_t random;
    size_t left; // bytes until it cuts
} chaos_link;

typedef struct chaos_way {
    chaos_link *link;
    int from, to;
} chaos_way;

// xorshift64*: independent of the loop's numbers.
static uint64_t chaos_draw(uint64_t *state, uint64_t below) {
    *state ^= *state >> 12, *state ^= *state << 25, *state ^= *state >> 27;
    return (*state * 2685821657736338717u >> 33) % below;
}

// Both ways of both connections end, and close sends a reset.
static void chaos_reset(const chaos_link *link) {
    struct linger now = {1, 0};
    setsockopt(link->client, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    setsockopt(link->server, SOL_SOCKET, SO_LINGER, &now, sizeof now);
    shutdown(link->client, SHUT_RDWR);
    shutdown(link->server, SHUT_RDWR);
}

// Whether the way ends here, after n more bytes.
static bool chaos_strikes(const chaos_way *way, size_t n) {
    chaos_link *link = way->link;
    unsigned modes = link->chaos->modes;
    if (!(modes & (CHAOS_CUT | CHAOS_HALF))) return false;
    link->left = link->left > n ? link->left - n : 0;
    if (link->left > 0) return false;
    bool half = !(modes & CHAOS_CUT) || ((modes & CHAOS_HALF) && chaos_draw(&link->random, 2) == 0);
    if (half) link->chaos->halves++, shutdown(way->to, SHUT_WR), shutdown(way->from, SHUT_RD);
    else link->chaos->cuts++, chaos_reset(link);
    return true;
}

// Passes on what was read, in pieces.
static int chaos_pass(const chaos_way *way, const char *data, size_t size) {
    chaos_link *link = way->link;
    unsigned modes = link->chaos->modes;
    for (size_t at = 0; at < size;) {
        size_t piece = size - at;
        if (modes & CHAOS_PIECES) piece = 1 + (size_t)chaos_draw(&link->random, piece);
        if (modes & CHAOS_BYTES) piece = 1;
        bool waits = (modes & CHAOS_DELAY) && chaos_draw(&link->random, 4) == 0;
        int error = waits ? orch_sleep(chaos_draw(&link->random, 3)) : 0;
        ptrdiff_t n = error != 0 ? error : orch_write(way->to, data + at, piece);
        if (n < 0) return (int)n;
        if (chaos_strikes(way, piece)) return ORCH_EEND;
        at += piece;
    }
    return 0;
}

static orch_result chaos_pump(void *arg) {
    const chaos_way *way = arg;
    char data[2048];
    ptrdiff_t n = 0;
    int error = 0;
    while (error == 0) {
        size_t most = sizeof data;
        if (way->link->chaos->modes & CHAOS_PIECES) {
            most = 1 + (size_t)chaos_draw(&way->link->random, sizeof data);
        }
        n = orch_read(way->from, data, way->link->chaos->modes & CHAOS_BYTES ? 1 : most);
        if (n <= 0) break;
        error = chaos_pass(way, data, (size_t)n);
    }
    shutdown(way->to, SHUT_WR);
    if (n < 0 || (error != 0 && error != ORCH_EEND)) chaos_reset(way->link);
    return orch_ok(NULL, NULL);
}

static orch_result chaos_connection(int fd, void *context) {
    chaos *c = context;
    orch_connect_desc desc = {.addresses = &c->to, .count = 1};
    chaos_link link = {c, fd, -1, c->seed * 2862933555777941757u + ++c->connections, 1};
    for (int i = 0; i < 4; i++) chaos_draw(&link.random, 1); // seeds that are alike part
    link.left = 1 + (size_t)chaos_draw(&link.random, c->until > 0 ? c->until : 4096);
    link.server = orch_connect_with(&desc);
    if (link.server < 0) return orch_fail(link.server);
    chaos_way there = {&link, fd, link.server}, back = {&link, link.server, fd};
    orch_scope s;
    int error = orch_scope_open(&s, NULL);
    orch_result r = orch_fail(error);
    if (error == 0) {
        error = orch_scope_go(&s, chaos_pump, &there);
        if (error == 0) error = orch_scope_go(&s, chaos_pump, &back);
        if (error != 0) orch_scope_cancel(&s, error);
        r = orch_scope_close(&s);
    }
    orch_close(link.server);
    return r;
}

static orch_result chaos_run(void *arg) {
    chaos *c = arg;
    orch_serve_desc desc = {.context = c, .no_drain = true};
    return orch_fail(orch_serve(c->listener, chaos_connection, &desc));
}
