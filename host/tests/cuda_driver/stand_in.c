/* Stands in for libcuda.so.1: a GPU whose memory is the host's and whose kernels do nothing. It shows what the driver layer
 * asks for and in which order: every call of interest is a line of the log. */
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <pthread.h>

typedef unsigned long long address;

/* What the GPU has, and what of it is said to be free. */
#ifndef MEMORY_BYTES
#define MEMORY_BYTES (9 << 20)
#define FREE_BYTES 1000
#endif
#ifndef DEVICES
#define DEVICES 2
#endif

static char log_text[1 << 16];
static int sticky; /* the code of a kernel that failed: every later call in the context returns it */

const char *stand_in_log(void) { return log_text; }
void stand_in_reset(void) { log_text[0] = 0, sticky = 0; }

static char contexts[DEVICES]; /* of which each has an address */
static pthread_mutex_t saying = PTHREAD_MUTEX_INITIALIZER;

static int say(const char *format, ...) {
    if (sticky) return sticky;
    pthread_mutex_lock(&saying);
    size_t used = strlen(log_text);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(log_text + used, sizeof log_text - used, format, arguments);
    va_end(arguments);
    pthread_mutex_unlock(&saying);
    return 0;
}

int cuInit(unsigned flags) { return flags != 0; }
int cuDriverGetVersion(int *version) { return *version = 13000, 0; }
int cuGetErrorName(unsigned code, const char **name) {
    *name = code == 1 ? "CUDA_ERROR_INVALID_VALUE" : code == 2 ? "CUDA_ERROR_OUT_OF_MEMORY" : code == 218 ? "CUDA_ERROR_INVALID_PTX" : 0;
    return *name ? 0 : 1;
}
int cuDeviceGetCount(int *count) { return *count = DEVICES, 0; }
int cuDeviceGet(int *device, int ordinal) { return *device = ordinal, 0; }
int cuDeviceGetName(char *name, int bytes, int device) { return snprintf(name, bytes, "Stand-in"), 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { return *bytes = MEMORY_BYTES, 0; }
int cuDeviceGetAttribute(int *value, unsigned attribute, int device) {
    switch (attribute) {
    case 1: case 2: case 3: *value = 1024; break;
    case 4: *value = 64; break;
    case 5: *value = 0x7fffffff; break;
    case 6: case 7: *value = 65535; break;
    case 8: *value = 48 << 10; break;
    case 16: *value = 132; break;
    case 75: *value = 9; break;
    case 76: *value = 0; break;
    case 91: *value = 1; break;
    case 97: *value = 227 << 10; break;
    default: return 1;
    }
    return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = contexts + device, say("retain\n"); }
int cuDevicePrimaryCtxRelease_v2(int device) { return say("release\n"); }
int cuCtxSetCurrent(void *context) { return (char *)context < contexts || (char *)context >= contexts + DEVICES; }
int cuCtxSynchronize(void) { return say("synchronize\n"); }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, 0; }

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) { return *free_bytes = FREE_BYTES, *total = MEMORY_BYTES, 0; }
int cuMemAlloc_v2(address *at, size_t bytes) {
    if (bytes > MEMORY_BYTES) return 2;
    void *memory = aligned_alloc(256, (bytes + 255) / 256 * 256);
    *at = (address)memset(memory, 0xa5, bytes);
    return say("allocate %zu\n", bytes);
}
int cuMemFree_v2(address at) { return free((void *)at), say("free\n"); }
int cuMemsetD8Async(address at, unsigned char value, size_t bytes, void *stream) {
    return memset((void *)at, value, bytes), say("fill %zu\n", bytes);
}
static int copy(void *to, const void *from, size_t bytes) { return memcpy(to, from, bytes), say("copy %zu\n", bytes); }
int cuMemcpyHtoDAsync_v2(address to, const void *from, size_t bytes, void *stream) { return copy((void *)to, from, bytes); }
int cuMemcpyDtoHAsync_v2(void *to, address from, size_t bytes, void *stream) { return copy(to, (void *)from, bytes); }
int cuMemcpyDtoDAsync_v2(address to, address from, size_t bytes, void *stream) {
    return copy((void *)to, (void *)from, bytes);
}
struct rows {
    size_t from_x, from_y; unsigned from_type; const void *from_host; address from; void *from_array; size_t from_pitch;
    size_t to_x, to_y; unsigned to_type; void *to_host; address to; void *to_array; size_t to_pitch;
    size_t width, height;
};
int cuMemcpy2DAsync_v2(const struct rows *r, void *stream) {
    if (r->from_type != 2 || r->to_type != 2 || r->from_x + r->from_y + r->to_x + r->to_y) return 1;
    for (size_t row = 0; row < r->height; row++)
        memcpy((char *)r->to + row * r->to_pitch, (char *)r->from + row * r->from_pitch, r->width);
    return say("copy %zu rows of %zu\n", r->height, r->width);
}

int cuMemHostAlloc(void **at, size_t bytes, unsigned flags) {
    *at = aligned_alloc(4096, (bytes + 4095) / 4096 * 4096);
    return say("pinned %zu flags %u\n", bytes, flags);
}
int cuMemFreeHost(void *at) { return free(at), say("free pinned\n"); }
int cuMemHostRegister_v2(void *at, size_t bytes, unsigned flags) {
    return bytes % 4096 == 13 ? 2 : say("register %zu flags %u\n", bytes, flags);
}
int cuMemHostUnregister(void *at) { return say("unregister\n"); }
int cuMemHostGetDevicePointer_v2(address *at, void *host, unsigned flags) { return *at = (address)host, 0; }

int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
    *stream = log_text + 1;
    return say("stream flags %u priority %d\n", flags, priority);
}
int cuStreamQuery(void *stream) { return sticky ? sticky : 600; }
int cuStreamSynchronize(void *stream) { return say("wait\n"); }
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) { return say("stream waits\n"); }
int cuStreamDestroy_v2(void *stream) { return 0; }
int cuStreamBeginCapture_v2(void *stream, unsigned mode) { return say("capture, mode %u\n", mode); }
int cuStreamEndCapture(void *stream, void **graph) { return *graph = log_text + 5, say("captured\n"); }
int cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    return *executable = log_text + 6, say("instantiate, flags %llu\n", flags);
}
int cuGraphUpload(void *executable, void *stream) { return say("upload\n"); }
int cuGraphLaunch(void *executable, void *stream) { return say("replay\n"); }
int cuGraphExecDestroy(void *executable) { return say("destroy executable\n"); }
int cuGraphDestroy(void *graph) { return say("destroy graph\n"); }
int cuEventCreate(void **event, unsigned flags) { return *event = log_text + 2, say("event flags %u\n", flags); }
int cuEventRecord(void *event, void *stream) { return say("record\n"); }
int cuEventRecordWithFlags(void *event, void *stream, unsigned flags) { return say("record with flags %u\n", flags); }
int cuEventQuery(void *event) { return sticky; }
int cuEventSynchronize(void *event) { return say("wait for event\n"); }
int cuEventElapsedTime(float *ms, void *start, void *end) { return *ms = 1.5f, 0; }
int cuEventDestroy_v2(void *event) { return 0; }

/* The kernels, and the types of their parameters: an address, an unsigned, a float. */
static const struct kernel { const char *name, *parameters; } kernels[] = {
    {"scale", "auf"}, {"fault", "auf"}, {"gather", "aauuaauuau"}, {"gather_bulk", "aauuaauuau"}, {"gather_coded", "aauuaauuauu"},
    {"resolve", "auuuaauuuaaaaaaaauuuauaaauaaa"},
    {"score", "aaaauuuuuuufuuauauaa"}, {"select", "aaauuuuuffaauuuauufuauaaaa"}, {"top_k", "aaauuauaa"},
    {"attend_64", "auuuaauaauauafaauuaaaa"}, {"attend_128", "auuuaauaauauafaauuaaaa"},
    {"prefill_64", "aaaaaauuufaa"}, {"prefill_128", "aaaaaauuufaa"},
    {"prefill_wgmma_64", "aaaaaauuufaa"}, {"prefill_wgmma_128", "aaaaaauuufaa"},
    {"linear_8", "aauuuuaaaa"}, {"linear_16", "aauuuuaaaa"}, {"linear_32", "aauuuuaaaa"}, {"linear_64", "aauuuuaaaa"},
    {"gemm", "aauuuuaa"}, {"gemm_wgmma", "aauuuuaa"},
    {"chunk_mean", "aaaaauuuuuuua"}, {"chunk_mean_step", "aaaauuuuuuua"},
    {"chunk_bounds", "aaaaauuuuuuua"}, {"chunk_bounds_step", "aaaauuuuuuua"},
    {"gate_key", "aaaaauuuuuuuafauaufafa"}, {"gate_key_step", "aaaauuuuuuuafauaufafa"}, {"gate_query", "aauuuuafauaufafa"},
    {"chunk_spread", "aaaauuuuua"}, {"mark", "aaauuuua"},
    {"cluster_sums", "auuua"}, {"cluster_start", "auuuuuuaaaa"}, {"cluster_assign_64", "auuuuuaaaua"},
    {"cluster_assign_128", "auuuuuaaaua"}, {"cluster_update", "auuuuuuaaaa"}, {"cluster_pages", "auuuaa"},
    {"cluster_list", "auuuuaau"}, {"cluster_means", "aauuuuuaauauuuuaaa"}, {"gather_run", "auuuuuuuauuaa"}, {"cluster_store", "aauuuuuaauauuuaa"},
    {"page_biases", "auaauauuuaua"}, {"estimate", "auuuaauauauuuaaaa"},
    {"fill_random", "auuuf"}, {"drift", "auuuuaa"},
    {"append", "aaaaaaaauuuuuuuu"}, {"store_prompt", "aaaaaaaaaauuuuuuuu"}, {"write_back", "aauaauuaa"},
    {"embed", "aauua"}, {"rms_norm", "aauufa"}, {"rotate", "auuuuauuafaaufuauaa"}, {"swiglu", "aua"},
    {"argmax", "auuaaa"}, {"sample", "auuaa"},
    {"unrotate", "auuuuafa"}, {"gram", "auuua"}, {"gram_sum", "auua"},
    {"row_dots", "aauuua"}, {"row_sums", "aauuua"}, {"inverse_factor", "auua"}, {"complete_basis", "auu"},
    {"store_basis", "auuaua"}, {"project_keys", "aaauuuuuafauaaaaau"},
    {"rebuild_keys_64", "aaauuauuuaauaafua"}, {"rebuild_keys_128", "aaauuauuuaauaafua"},
};

int cuModuleLoadDataEx(void **module, const char *text, unsigned count, unsigned *options, void **values) {
    if (strstr(text, "nonsense")) {
        for (unsigned i = 0; i < count; i++)
            if (options[i] == 5) strcpy(values[i], "line 1: a nonsense opcode\n");
        return 218;
    }
    for (unsigned i = 0; i < count; i++)
        if (options[i] == 13) say("load, line info %zu\n", (size_t)values[i]);
    return *module = log_text + 3, 0;
}
int cuModuleUnload(void *module) { return say("unload\n"); }
int cuModuleGetFunction(const struct kernel **function, void *module, const char *name) {
    for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
        if (strcmp(name, kernels[i].name) == 0) return *function = &kernels[i], say("look up %s\n", name);
    return 500;
}
int cuFuncGetAttribute(int *value, unsigned attribute, void *function) {
    static const int values[] = {1024, 1024, 0, 0, 32, 90, 90, 0, 47 << 10};
    return attribute < 9 ? (*value = values[attribute], 0) : 1;
}
int cuFuncSetAttribute(void *function, unsigned attribute, int value) { return say("set %u to %d\n", attribute, value); }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, void *function, int threads, size_t shared) {
    return *blocks = 2048 / threads, 0;
}
int cuLaunchKernel(const struct kernel *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void *stream, void **parameters, void **extra) {
    say("launch %s %u %u %u, %u %u %u, %u:", function->name, gx, gy, gz, bx, by, bz, shared);
    for (int i = 0; function->parameters[i]; i++)
        switch (function->parameters[i]) {
        case 'a': say(" %#llx", *(address *)parameters[i]); break;
        case 'u': say(" %u", *(unsigned *)parameters[i]); break;
        case 'f': say(" %.2f", *(float *)parameters[i]); break;
        }
    int code = say("\n");
    if (strcmp(function->name, "fault") == 0) sticky = 226;
    return code;
}

struct attribute { unsigned name, padding; unsigned value[16]; };
struct configuration {
    unsigned gx, gy, gz, bx, by, bz, shared;
    void *stream;
    struct attribute *attributes;
    unsigned attribute_count;
};
int cuLaunchKernelEx(const struct configuration *c, const struct kernel *function, void **parameters, void **extra) {
    int overlaps = c->attribute_count == 1 && c->attributes->name == 6 && c->attributes->value[0] == 1;
    say(overlaps ? "overlapping " : "with unknown attributes ");
    return cuLaunchKernel(function, c->gx, c->gy, c->gz, c->bx, c->by, c->bz, c->shared, c->stream, parameters, extra);
}
