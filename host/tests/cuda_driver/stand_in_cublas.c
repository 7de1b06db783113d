/* Stands in for libcublasLt: products are worked out on the host, where the stand-in for the driver has its memory, and every call
 * of interest is a line of the log. The macros leave a function out or let one fail. */
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct descriptor { int compute, scale, transposed[2]; };
struct layout { int type; uint64_t rows, columns; int64_t leading; };
struct preference { uint64_t workspace; uint32_t alignments[4]; };
struct algorithm { uint64_t data[8]; };
struct heuristic { struct algorithm algorithm; size_t workspace; int state; float waves; int reserved[4]; };

static char log_text[1 << 16];

const char *stand_in_log(void) { return log_text; }
void stand_in_reset(void) { log_text[0] = 0; }

static int say(const char *format, ...) {
    size_t used = strlen(log_text);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(log_text + used, sizeof log_text - used, format, arguments);
    va_end(arguments);
    return 0;
}

#ifdef CREATE_STATUS
int cublasLtCreate(void **handle) { return CREATE_STATUS; }
#else
int cublasLtCreate(void **handle) { return *handle = log_text, say("create\n"); }
#endif
int cublasLtDestroy(void *handle) { return handle == log_text ? say("destroy\n") : 7; }
size_t cublasLtGetVersion(void) { return 130100; }
const char *cublasLtGetStatusName(int status) {
    return status == 1 ? "CUBLAS_STATUS_NOT_INITIALIZED" : status == 13 ? "CUBLAS_STATUS_EXECUTION_FAILED" : 0;
}

int cublasLtMatmulDescCreate(struct descriptor **descriptor, int compute, int scale) {
    *descriptor = calloc(1, sizeof **descriptor);
    (*descriptor)->compute = compute, (*descriptor)->scale = scale;
    return say("descriptor, compute %d scale %d\n", compute, scale);
}
int cublasLtMatmulDescDestroy(struct descriptor *descriptor) { return free(descriptor), say("destroy descriptor\n"); }
int cublasLtMatmulDescSetAttribute(struct descriptor *descriptor, int attribute, const int *value, size_t bytes) {
    if (attribute < 3 || attribute > 4 || bytes != 4) return 7;
    descriptor->transposed[attribute - 3] = *value;
    return say("descriptor attribute %d is %d\n", attribute, *value);
}

int cublasLtMatrixLayoutCreate(struct layout **layout, int type, uint64_t rows, uint64_t columns, int64_t leading) {
    *layout = malloc(sizeof **layout);
    **layout = (struct layout){type, rows, columns, leading};
    return say("layout %d: %ju x %ju, %jd\n", type, (uintmax_t)rows, (uintmax_t)columns, (intmax_t)leading);
}
int cublasLtMatrixLayoutDestroy(struct layout *layout) { return free(layout), say("destroy layout\n"); }

int cublasLtMatmulPreferenceCreate(struct preference **preference) {
    return *preference = calloc(1, sizeof **preference), say("preference\n");
}
int cublasLtMatmulPreferenceDestroy(struct preference *preference) { return free(preference), say("destroy preference\n"); }
int cublasLtMatmulPreferenceSetAttribute(struct preference *preference, int attribute, const void *value, size_t bytes) {
    if (attribute == 1 && bytes == 8) {
        memcpy(&preference->workspace, value, bytes);
        return say("workspace %ju\n", (uintmax_t)preference->workspace);
    }
    if (attribute == 3 && bytes == 4) return say("reductions %u\n", *(const uint32_t *)value);
    if (attribute < 5 || attribute > 8 || bytes != 4) return 7;
    memcpy(&preference->alignments[attribute - 5], value, bytes);
    return say("alignment %d is %u\n", attribute, preference->alignments[attribute - 5]);
}

/* Of 100 tokens on there is no algorithm; with 99 the only ones are too large or of another device. */
int cublasLtMatmulAlgoGetHeuristic(void *handle, struct descriptor *descriptor, struct layout *a, struct layout *b,
                                   struct layout *c, struct layout *d, struct preference *preference, int wanted,
                                   struct heuristic *results, int *found) {
    memset(results, 0, wanted * sizeof *results);
    results[0].state = 15, results[0].algorithm.data[0] = 1;
    results[1].workspace = preference->workspace + 1, results[1].algorithm.data[0] = 2;
    results[2].workspace = preference->workspace, results[2].algorithm.data[0] = 3, results[2].algorithm.data[7] = 30;
    *found = b->columns >= 100 ? 0 : b->columns == 99 ? 2 : 3;
    return say("heuristic for %ju tokens, %d wanted\n", (uintmax_t)b->columns, wanted);
}

static float element(const struct layout *layout, const void *at, uint64_t row, uint64_t column) {
    uint64_t index = column * layout->leading + row;
    if (layout->type == 0) return ((const float *)at)[index];
    uint32_t bits = (uint32_t)((const uint16_t *)at)[index] << 16;
    float value;
    return memcpy(&value, &bits, 4), value;
}

#ifndef WITHOUT_MATMUL
int cublasLtMatmul(void *handle, struct descriptor *descriptor, const float *alpha, const void *a, struct layout *a_layout,
                   const void *b, struct layout *b_layout, const float *beta, const void *c, struct layout *c_layout, void *d,
                   struct layout *d_layout, struct algorithm *algorithm, void *workspace, size_t bytes, void *stream) {
    say("matmul by %ju and %ju, alpha %g beta %g, workspace %zu at %#jx, stream %s\n", (uintmax_t)algorithm->data[0],
        (uintmax_t)algorithm->data[7], *alpha, *beta, bytes, (uintmax_t)(uintptr_t)workspace, stream ? "given" : "default");
    if (b_layout->columns == 13) return 13;
    int a_t = descriptor->transposed[0], b_t = descriptor->transposed[1];
    uint64_t inner = a_t ? a_layout->rows : a_layout->columns;
    if (handle != log_text || descriptor->compute != 68 || descriptor->scale != 0 || c != d || c_layout != d_layout ||
        (a_t ? a_layout->columns : a_layout->rows) != d_layout->rows ||
        (b_t ? b_layout->rows : b_layout->columns) != d_layout->columns ||
        (b_t ? b_layout->columns : b_layout->rows) != inner)
        return 7;
    for (uint64_t column = 0; column < d_layout->columns; column++)
        for (uint64_t row = 0; row < d_layout->rows; row++) {
            float sum = 0;
            for (uint64_t i = 0; i < inner; i++)
                sum += (a_t ? element(a_layout, a, i, row) : element(a_layout, a, row, i)) *
                       (b_t ? element(b_layout, b, column, i) : element(b_layout, b, i, column));
            sum *= *alpha;
            if (*beta != 0) sum += *beta * element(c_layout, c, row, column);
            uint64_t index = column * d_layout->leading + row;
            uint32_t bits;
            memcpy(&bits, &sum, 4);
            if (d_layout->type == 0) ((float *)d)[index] = sum;
            else ((uint16_t *)d)[index] = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
        }
    return 0;
}
#endif
