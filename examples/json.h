// json.h - the little JSON that 08_profile reads: "is there a number or a text called so in this
// object, and in each object of this list". Values it is not asked for are skipped, at most
// JSON_DEPTH deep; texts are copied up to the size of the caller's array, escapes as they stand.

#ifndef JSON_H
#define JSON_H

#include <ctype.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

enum { JSON_DEPTH = 8 };

typedef struct json {
    const char *at; // ends with a 0
    bool bad;       // not JSON, or too deep
} json;

static bool json_take(json *j, char c) {
    j->at += strspn(j->at, " \t\r\n");
    if (*j->at != c || c == '\0') return false;
    j->at++;
    return true;
}

static void json_text(json *j, char *to, size_t size) {
    size_t n = 0;
    if (!json_take(j, '"')) j->bad = true;
    while (!j->bad && *j->at != '"') {
        if ((unsigned char)*j->at < ' ' || (*j->at == '\\' && j->at[1] == '\0')) {
            j->bad = true;
            break;
        }
        int bytes = *j->at == '\\' ? 2 : 1; // an escaped quote does not end it
        for (; bytes > 0; bytes--, j->at++)
            if (n + 1 < size) to[n++] = *j->at;
    }
    if (!j->bad) j->at++;
    if (size > 0) to[n] = '\0';
}

static void json_word(json *j) { // true, false, null, and the rest of a number
    size_t n = strspn(j->at, "+-.0123456789abcdefghijklmnopqrstuvwxyzE");
    if (n == 0) j->bad = true;
    j->at += n;
}

static bool json_object(json *j, int depth, const char *name, long *number, char *text,
                        size_t size);

static void json_skip(json *j, int depth) {
    j->at += strspn(j->at, " \t\r\n");
    if (depth >= JSON_DEPTH) j->bad = true;
    else if (*j->at == '"') json_text(j, NULL, 0);
    else if (*j->at == '{') json_object(j, depth + 1, "", NULL, NULL, 0);
    else if (!json_take(j, '[')) json_word(j);
    else if (!json_take(j, ']')) {
        do json_skip(j, depth + 1);
        while (!j->bad && json_take(j, ','));
        if (!json_take(j, ']')) j->bad = true;
    }
}

// Reads the object at j; its member `name` goes to *number if it is a whole number, to text if it
// is one. Returns whether it was there, of that type, and all was well-formed.
static bool json_object(json *j, int depth, const char *name, long *number, char *text,
                        size_t size) {
    bool found = false;
    char key[32];
    if (!json_take(j, '{')) j->bad = true;
    if (j->bad || json_take(j, '}')) return false;
    do {
        j->at += strspn(j->at, " \t\r\n");
        json_text(j, key, sizeof key);
        if (j->bad || !json_take(j, ':')) {
            j->bad = true;
            break;
        }
        j->at += strspn(j->at, " \t\r\n");
        bool wanted = strcmp(key, name) == 0;
        if (wanted && number != NULL && (*j->at == '-' || isdigit((unsigned char)*j->at))) {
            *number = strtol(j->at, NULL, 10);
            found = true;
        }
        if (wanted && text != NULL && *j->at == '"') {
            json_text(j, text, size);
            found = true;
        } else {
            json_skip(j, depth);
        }
    } while (!j->bad && json_take(j, ','));
    if (!json_take(j, '}')) j->bad = true;
    return found && !j->bad;
}

// "[{"id":1,...},...]": the ids, at most max. Returns how many there are in the list, or -1.
static long json_ids(const char *body, long *ids, size_t max) {
    json j = {body, false};
    long count = 0, id = 0;
    if (!json_take(&j, '[')) return -1;
    if (json_take(&j, ']')) return 0;
    do {
        if (!json_object(&j, 0, "id", &id, NULL, 0)) return -1;
        if ((size_t)count < max) ids[count] = id;
        count++;
    } while (json_take(&j, ','));
    return json_take(&j, ']') ? count : -1;
}

#endif
