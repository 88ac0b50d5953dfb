// client.h - the HTTP client of 07_fetch and 08_profile: libcurl through orch_curl.h when its
// headers are there (HAVE_CURL), else the minimal GET of http_get.h. Both end in a future of the
// same response.

#ifndef CLIENT_H
#define CLIENT_H

#ifdef HAVE_CURL

#define ORCH_CURL_IMPLEMENTATION
#include "orch_curl.h"

typedef orch_curl client;
typedef orch_curl_response client_response;

static const char *client_name(void) {
    static char name[64];
    snprintf(name, sizeof name, "libcurl %s", curl_version_info(CURLVERSION_NOW)->version);
    return name;
}
static client *client_new(bool discard_bodies) {
    return orch_curl_new(&(orch_curl_desc){.discard_body = discard_bodies});
}
static void client_free(client *c) { orch_curl_free(c); }
static orch_future *client_get(client *c, const char *url) { return orch_curl_get(c, url); }

#else

#include "http_get.h"

typedef int client;
typedef http_response client_response;

static client client_only;

static const char *client_name(void) { return "the built-in minimal GET (without libcurl)"; }
static client *client_new(bool discard_bodies) {
    (void)discard_bodies; // keeps them, up to HTTP_GET_MAX
    return &client_only;
}
static void client_free(client *c) { (void)c; }
static orch_future *client_get(client *c, const char *url) {
    (void)c;
    return http_get(url);
}

#endif

#endif
