/* Stands in for libnccl.so.2 over memory of the host: a sum is worked out when the last rank has asked for it. Every call of interest is a line of
 * the log. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MAX_RANKS 8

#define MAX_AHEAD 4096

struct sum { float *at; size_t count; };
struct group {
    int ranks, left;
    /* Sums that each rank has asked for, those that all have asked for, and those between them, in a ring. */
    long asked[MAX_RANKS], done;
    struct sum sums[MAX_RANKS][MAX_AHEAD];
};
struct communicator { struct group *group; int rank; };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char log_text[1 << 14];
static int failing_rank = -1;
static long failing_call;

const char *stand_in_log(void) { return log_text; }
void stand_in_reset(void) { log_text[0] = 0, failing_rank = -1; }
/* Lets the `call`-th sum of `rank` fail, counted from 0. */
void stand_in_fail(int rank, long call) { failing_rank = rank, failing_call = call; }

static int say(const char *line, int number) {
    size_t used = strlen(log_text);
    return snprintf(log_text + used, sizeof log_text - used, "%s %d\n", line, number), 0;
}

int ncclGetVersion(int *version) { return *version = 22705, 0; }
const char *ncclGetErrorString(int code) { return code == 3 ? "internal error" : "unhandled cuda error"; }
const char *ncclGetLastError(void *communicator) { return communicator ? 0 : "the stand-in was told to fail"; }
int ncclCommInitAll(struct communicator **all, int ranks, const int *devices) {
#ifdef FAIL_INIT
    return 3;
#endif
    struct group *group = calloc(1, sizeof *group);
    group->ranks = group->left = ranks;
    for (int rank = 0; rank < ranks; rank++) {
        if (devices[rank] != rank) return 4;
        all[rank] = malloc(sizeof **all);
        *all[rank] = (struct communicator){group, rank};
    }
    return say("init", ranks);
}
static int all_reduce(struct communicator *c, float *at, size_t count) {
    struct group *group = c->group;
    long *asked = group->asked;
    if (c->rank == failing_rank && asked[c->rank] == failing_call) return 3;
    if (asked[c->rank] - group->done == MAX_AHEAD) return say("far ahead of the others: rank", c->rank), 5;
    group->sums[c->rank][asked[c->rank]++ % MAX_AHEAD] = (struct sum){at, count};
    for (int rank = 0; rank < group->ranks; rank++)
        if (asked[rank] == group->done) return 0;
    long place = group->done++ % MAX_AHEAD;
    for (int rank = 0; rank < group->ranks; rank++)
        if (group->sums[rank][place].count != count) return say("of another length: rank", rank), 5;
    for (size_t i = 0; i < count; i++) {
        float sum = 0;
        for (int rank = 0; rank < group->ranks; rank++) sum += group->sums[rank][place].at[i];
        for (int rank = 0; rank < group->ranks; rank++) group->sums[rank][place].at[i] = sum;
    }
    return say("sum", (int)count);
}
int ncclAllReduce(const void *from, void *to, size_t count, int element, int operation, struct communicator *c, void *stream) {
    if (from != to || element != 7 || operation != 0 || !stream) return 4;
    pthread_mutex_lock(&lock);
    int code = all_reduce(c, to, count);
    pthread_mutex_unlock(&lock);
    return code;
}
static int give_back(struct communicator *c, const char *how) {
    pthread_mutex_lock(&lock);
    say(how, c->rank);
    if (--c->group->left == 0) free(c->group);
    free(c);
    pthread_mutex_unlock(&lock);
    return 0;
}
int ncclCommDestroy(struct communicator *c) { return give_back(c, "destroy"); }
int ncclCommAbort(struct communicator *c) { return give_back(c, "abort"); }
