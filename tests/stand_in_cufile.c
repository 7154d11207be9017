/* A cuFile without a GPU, over a driver that stands in (stand_in_driver.c): device memory is host memory there, so that
   transfers are those of the C library. It shows that calls fit together, what is decided and what is said; nothing of
   what cuFile does with a GPU. The declarations are this file's own: that ours in csrc/gds are cuFile's, the real header
   has to show (tests/gpu).

   What goes wrong, by the environment, STAND_IN_CUFILE, words of: "hangs" (when its driver opens), "refuses" (to open
   it), "nobatch", "nostream" (fail), "alone" (nothing in stream order works while something else does), "inner" (nor from
   the middle of memory that is known), "tires" (nor after 200 pieces), "slow" (what is read or written one by one takes
   0.02 s), "peer" (a device that storage can reach), "direct" (without compatibility mode it works too), "noregister"
   (device memory).

   Build: cc -shared -fPIC -Wl,-soname,libcufile.so.0 -o libcufile.so.0 stand_in_cufile.c */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    int code, cuda;
} status;
static const status OK = {0, 0};

/* Set from outside, in this process: reads end with this instead of bytes. */
ssize_t stand_in_read_result;
long stand_in_reads, stand_in_writes, stand_in_batches, stand_in_streams, stand_in_files, stand_in_registered;

static bool strict;
static bool said(const char* word) {
    const char* words = getenv("STAND_IN_CUFILE");
    return words != NULL && strstr(words, word) != NULL;
}

status cuFileGetVersion(int* version) { return *version = 1990, OK; }
status cuFileSetParameterBool(int parameter, bool value) {
    if (parameter == 1) strict = !value;
    return OK;
}
status cuFileDriverOpen(void) {
    while (said("hangs")) sleep(1);
    if (said("refuses") || (strict && !said("direct"))) return (status){5001, 0};
    return OK;
}
struct properties {
    unsigned major, minor;
    size_t poll, direct;
    unsigned systems, control, features, cache, buffer_cache, pinned, batch, timeout;
};
status cuFileDriverGetProperties(struct properties* p) {
    memset(p, 0, sizeof *p);
    p->features = said("peer") || said("direct") ? 16 : 0;
    p->batch = 8; /* few, so that there are several */
    return OK;
}

struct description {
    int type;
    union {
        int fd;
        void* handle;
    } handle;
    const void* operations;
};
status cuFileHandleRegister(void** handle, struct description* d) {
    if (said("noplace")) return (status){5027, 0};
    if (d->type != 1) return (status){5022, 0};
    /* Through a descriptor without O_DIRECT: the memory of a stand-in need not be aligned. */
    char name[64];
    snprintf(name, sizeof name, "/proc/self/fd/%d", d->handle.fd);
    int flags = fcntl(d->handle.fd, F_GETFL);
    int fd = open(name, (flags & O_ACCMODE) | O_CLOEXEC);
    if (fd < 0) return (status){5021, 0};
    ++stand_in_files;
    return *handle = (void*)(intptr_t)(fd + 1), OK;
}
void cuFileHandleDeregister(void* handle) {
    --stand_in_files;
    close((int)(intptr_t)handle - 1);
}
static struct buffer {
    const char* base;
    size_t length;
} known[64];
status cuFileBufRegister(const void* base, size_t length, int flags) {
    if (said("noregister")) return (status){5036, 0};
    for (int i = 0; i < 64; ++i)
        if (known[i].base == NULL) return known[i] = (struct buffer){base, length}, ++stand_in_registered, OK;
    return (status){5036, 0};
}
status cuFileBufDeregister(const void* base) {
    for (int i = 0; i < 64; ++i)
        if (known[i].base == base) return known[i].base = NULL, --stand_in_registered, OK;
    return (status){5022, 0};
}
/* Whether a stream may have this: memory begins with the piece and ends with it, which is what the real one makes of known
   memory too at times. */
static bool takes(const char* base, off_t at) {
    if (said("tires") && stand_in_streams > 200) return false;
    for (int i = 0; i < 64 && said("inner"); ++i)
        if (known[i].base != NULL && base > known[i].base && base < known[i].base + known[i].length) return false;
    return at == 0;
}
ssize_t cuFileRead(void* handle, void* base, size_t size, off_t offset, off_t at) {
    ++stand_in_reads;
    if (said("slow")) usleep(20000);
    if (stand_in_read_result) return stand_in_read_result;
    return pread((int)(intptr_t)handle - 1, (char*)base + at, size, offset);
}
ssize_t cuFileWrite(void* handle, const void* base, size_t size, off_t offset, off_t at) {
    ++stand_in_writes;
    if (said("slow")) usleep(20000);
    return pwrite((int)(intptr_t)handle - 1, (const char*)base + at, size, offset);
}

struct request {
    int mode;
    void* base;
    off_t file_offset, base_offset;
    size_t size;
    void* file;
    int operation;
    void* cookie;
};
struct event {
    void* cookie;
    int status;
    size_t moved;
};
struct batch {
    unsigned ended, taken;
    struct event events[8];
};
status cuFileBatchIOSetUp(struct batch** batch, unsigned most) {
    if (said("nobatch") || most > 8) return (status){5039, 0};
    return *batch = calloc(1, sizeof **batch), OK;
}
status cuFileBatchIOSubmit(struct batch* b, unsigned count, struct request* r, unsigned flags) {
    if (count > 8) return (status){5037, 0};
    ++stand_in_batches;
    b->ended = b->taken = 0;
    for (unsigned i = count; i-- > 0;) { /* they end in any order */
        /* No more of each than a buffer of the library's holds, as the real one in compatibility mode. */
        size_t size = r[i].size < 256 << 10 ? r[i].size : 256 << 10;
        ssize_t moved = r[i].operation ? cuFileWrite(r[i].file, r[i].base, size, r[i].file_offset, r[i].base_offset)
                                       : cuFileRead(r[i].file, r[i].base, size, r[i].file_offset, r[i].base_offset);
        b->events[b->ended++] = (struct event){r[i].cookie, moved < 0 ? 64 : 16, (size_t)moved};
    }
    return OK;
}
status cuFileBatchIOGetStatus(struct batch* b, unsigned least, unsigned* count, struct event* events,
                              struct timespec* patience) {
    unsigned got = 0;
    while (got < *count && got < 3 && b->taken < b->ended) events[got++] = b->events[b->taken++];
    return *count = got, OK;
}
status cuFileBatchIOCancel(struct batch* b) { return OK; }
void cuFileBatchIODestroy(struct batch* b) { free(b); }

static int streaming;
static bool alone(void) {
    if (!said("alone")) return true;
    bool first = __sync_add_and_fetch(&streaming, 1) == 1;
    usleep(20000);
    return __sync_sub_and_fetch(&streaming, 1) == 0 && first;
}
status cuFileReadAsync(void* file, void* base, size_t* size, off_t* offset, off_t* at, ssize_t* moved, void* stream) {
    if (said("nostream")) return (status){5038, 0};
    ++stand_in_streams;
    if (!takes(base, *at) || !alone()) return *moved = -EIO, OK;
    return *moved = cuFileRead(file, base, *size, *offset, *at), OK;
}
status cuFileWriteAsync(void* file, void* base, size_t* size, off_t* offset, off_t* at, ssize_t* moved, void* stream) {
    if (said("nostream")) return (status){5038, 0};
    ++stand_in_streams;
    if (!takes(base, *at) || !alone()) return *moved = -EIO, OK;
    return *moved = cuFileWrite(file, base, *size, *offset, *at), OK;
}
