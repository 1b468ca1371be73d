// A stand-in for NCCL within one process: ranks are threads, device memory is memory, a stream is a queue of work.
// It holds its callers to NCCL's rules for non-blocking communicators, and counts breaches. Faults are chosen when it is
// compiled (-D) or through the stand_in_* functions.
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#ifndef VERSION
#define VERSION 22703
#endif
#ifndef INIT_RESULT  // what making a communicator comes to, once all ranks are there
#define INIT_RESULT 0
#endif
#ifndef LAUNCH_MS  // how long a call stays in progress
#define LAUNCH_MS 1
#endif
#ifndef ABORT_MS  // how long an abort takes
#define ABORT_MS 0
#endif

enum { SUCCESS = 0, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, IN_PROGRESS = 7 };
enum { RANKS = 8, OPS = 64, BATCHES = 256, FLOAT32 = 7, UINT8 = 1 };
enum Kind { ALL_REDUCE, ALL_GATHER, BROADCAST, SEND, RECV };

typedef struct { char bytes[128]; } Id;
typedef struct { size_t size; unsigned magic, version; int blocking; } Config;

typedef struct {
  enum Kind kind;
  const char *send;
  char *recv;
  size_t count;
  int type, op, peer;
} Op;

typedef struct Letter { struct Letter *next; size_t bytes; char data[]; } Letter;

// What the ranks of one id share.
typedef struct Meeting {
  struct Meeting *next;
  Id id;
  int ranks, joined, finalized;
  int broken;                    // a rank left a collective: its memory is gone, and the others are stuck
  unsigned at[RANKS];            // collectives that a rank has come to
  unsigned read[RANKS];          // collectives whose numbers a rank has read
  const char *sends[2][RANKS];   // by the collective's parity
  Letter *mail[RANKS][RANKS];    // from, to
} Meeting;

typedef struct {
  Meeting *meeting;
  int rank, state, aborted, dead, finalized, running, entered;
} Comm;

typedef struct { unsigned issued, done; } Stream;

typedef struct { Comm *comm; Stream *stream; unsigned ticket; int count; Op ops[OPS]; } Batch;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static Meeting *meetings;
static int breaches, async_error, hold_aborts, aborts, destroys;
static char last_error[256];
static __thread int depth;
static __thread Batch *group;

static void pause_ms(int ms) {
  struct timespec time = {ms / 1000, ms % 1000 * 1000000L};
  nanosleep(&time, 0);
}

// Called with the lock. Any use of a communicator passes here.
static int enter(Comm *comm) {
  if (comm->dead || comm->entered) breaches++;
  comm->entered = 1;
  return !comm->dead;
}

static void leave(Comm *comm) { comm->entered = 0; }

int stand_in_breaches(void) { return breaches; }
int stand_in_aborts(void) { return aborts; }
int stand_in_destroys(void) { return destroys; }
void stand_in_async_error(int code) { async_error = code; }
void stand_in_hold_aborts(int hold) { hold_aborts = hold; }
void *stand_in_stream(void) { return calloc(1, sizeof(Stream)); }

// Whether all work of a stream is done within some time.
int stand_in_synchronize(Stream *stream, int ms) {
  for (; ms >= 0; ms--) {
    pthread_mutex_lock(&lock);
    int idle = stream->issued == stream->done;
    pthread_mutex_unlock(&lock);
    if (idle) return 1;
    pause_ms(1);
  }
  return 0;
}

int ncclGetVersion(int *version) { return *version = VERSION, SUCCESS; }

const char *ncclGetErrorString(int code) {
  return code == INVALID_USAGE ? "invalid usage" : code == INVALID_ARGUMENT ? "invalid argument" : "an error";
}

const char *ncclGetLastError(Comm *comm) { return (void)comm, last_error; }

int ncclGetUniqueId(Id *id) {
  static int ids;
  memset(id, 0, sizeof *id);
  pthread_mutex_lock(&lock);
  id->bytes[127] = (char)++ids;
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

static void *join(void *argument) {
  Comm *comm = argument;
  pthread_mutex_lock(&lock);
  comm->meeting->joined++;
  pthread_cond_broadcast(&changed);
  while (comm->meeting->joined < comm->meeting->ranks && !comm->aborted) pthread_cond_wait(&changed, &lock);
  if (INIT_RESULT == INVALID_USAGE) strcpy(last_error, "Duplicate GPU detected");
  comm->state = INIT_RESULT;
  comm->running--;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
  return 0;
}

static void detach(void *(*body)(void *), void *argument) {
  pthread_t thread;
  pthread_create(&thread, 0, body, argument);
  pthread_detach(thread);
}

#ifndef TOO_OLD
int ncclCommInitRankConfig(Comm **out, int ranks, Id id, int rank, Config *config) {
  if (config->magic != 0xcafebeef || config->blocking != 0) return INVALID_ARGUMENT;
  pthread_mutex_lock(&lock);
  Meeting *meeting = meetings;
  while (meeting && memcmp(&meeting->id, &id, sizeof id)) meeting = meeting->next;
  if (!meeting) {
    meeting = calloc(1, sizeof *meeting);
    *meeting = (Meeting){.next = meetings, .id = id, .ranks = ranks};
    meetings = meeting;
  }
  Comm *comm = calloc(1, sizeof *comm);
  *comm = (Comm){.meeting = meeting, .rank = rank, .state = IN_PROGRESS, .running = 1};
  *out = comm;
  pthread_mutex_unlock(&lock);
  detach(join, comm);
  return IN_PROGRESS;
}
#endif

int ncclCommGetAsyncError(Comm *comm, int *error) {
  pthread_mutex_lock(&lock);
  enter(comm);
  *error = comm->state ? comm->state : async_error;
  leave(comm);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

static size_t bytes_of(const Op *op) { return op->count * (op->type == FLOAT32 ? 4 : 1); }

// Called with the lock; waits without it. False: aborted.
static int wait_for(Comm *comm, const unsigned *counters, unsigned at) {
  for (int rank = 0; rank < comm->meeting->ranks; rank++)
    while (counters[rank] < at || comm->meeting->broken) {
      if (comm->aborted) return comm->meeting->broken = 1, 0;
      pthread_cond_wait(&changed, &lock);
    }
  return 1;
}

static void collective(Comm *comm, const Op *op) {
  Meeting *meeting = comm->meeting;
  unsigned at = ++meeting->at[comm->rank];
  meeting->sends[at % 2][comm->rank] = op->send;
  pthread_cond_broadcast(&changed);
  if (!wait_for(comm, meeting->at, at)) return;
  size_t bytes = bytes_of(op), whole = op->kind == ALL_GATHER ? bytes * meeting->ranks : bytes;
  char *result = calloc(1, whole + 1);
  for (int rank = 0; rank < meeting->ranks; rank++) {
    const char *send = meeting->sends[at % 2][rank];
    if (op->kind == ALL_GATHER) memcpy(result + rank * bytes, send, bytes);
    if (op->kind == BROADCAST && rank == op->peer) memcpy(result, send, bytes);
    if (op->kind == ALL_REDUCE && op->type == FLOAT32)
      for (size_t i = 0; i < op->count; i++) {
        float *sum = (float *)result + i, x = ((const float *)send)[i];
        *sum = rank == 0 ? x : op->op == 2 ? (*sum > x ? *sum : x) : *sum + x;
      }
  }
  meeting->read[comm->rank] = at;
  pthread_cond_broadcast(&changed);
  if (wait_for(comm, meeting->read, at)) memcpy(op->recv, result, whole);
  free(result);
}

static void letter(Comm *comm, const Op *op) {
  size_t bytes = bytes_of(op);
  if (op->kind == SEND) {
    Letter *sent = malloc(sizeof *sent + bytes), **end = &comm->meeting->mail[comm->rank][op->peer];
    *sent = (Letter){0, bytes};
    memcpy(sent->data, op->send, bytes);
    while (*end) end = &(*end)->next;
    *end = sent;
    pthread_cond_broadcast(&changed);
    return;
  }
  Letter **first = &comm->meeting->mail[op->peer][comm->rank];
  while (!*first) {
    if (comm->aborted) return;
    pthread_cond_wait(&changed, &lock);
  }
  Letter *got = *first;
  *first = got->next;
  memcpy(op->recv, got->data, bytes < got->bytes ? bytes : got->bytes);
  free(got);
}

// The device's side of a batch: waits for its turn on the stream, then runs.
static void *run(void *argument) {
  Batch *batch = argument;
  Comm *comm = batch->comm;
  for (int ms = 0; ms < LAUNCH_MS && !comm->aborted; ms++) pause_ms(1);
  pthread_mutex_lock(&lock);
  comm->state = SUCCESS;
  while (batch->stream->done != batch->ticket) pthread_cond_wait(&changed, &lock);
  for (int pass = 0; pass < 2; pass++)  // sends first: the operations of a group do not wait for each other
    for (int i = 0; i < batch->count; i++)
      if ((batch->ops[i].kind == SEND) == (pass == 0))
        (batch->ops[i].kind >= SEND ? letter : collective)(comm, &batch->ops[i]);
  batch->stream->done++;
  comm->running--;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
  free(batch);
  return 0;
}

int ncclGroupStart(void) { return depth++, SUCCESS; }

int ncclGroupEnd(void) {
  if (depth == 0) return strcpy(last_error, "ncclGroupEnd: not in a group call."), INVALID_USAGE;
  if (--depth > 0 || !group) return SUCCESS;
  Batch *batch = group;
  group = 0;
  pthread_mutex_lock(&lock);
  enter(batch->comm);
  batch->comm->state = IN_PROGRESS;
  batch->comm->running++;
  batch->ticket = batch->stream->issued++;
  leave(batch->comm);
  pthread_mutex_unlock(&lock);
  detach(run, batch);
  return IN_PROGRESS;
}

static int add(Op op, Comm *comm, Stream *stream) {
  pthread_mutex_lock(&lock);
  int busy = enter(comm) && comm->state == IN_PROGRESS, beyond = op.peer < 0 || op.peer >= comm->meeting->ranks;
  leave(comm);
  pthread_mutex_unlock(&lock);
  if (busy) return strcpy(last_error, "Attempt to use communicator before ncclSuccess"), INVALID_ARGUMENT;
  if (beyond) return strcpy(last_error, "no such peer"), INVALID_ARGUMENT;
  ncclGroupStart();
  if (!group) {
    group = calloc(1, sizeof *group);
    *group = (Batch){.comm = comm, .stream = stream};
  }
  if (group->comm == comm && group->stream == stream && group->count < OPS) group->ops[group->count++] = op;
  else breaches++;
  return ncclGroupEnd();
}

int ncclAllReduce(const void *send, void *recv, size_t count, int type, int op, Comm *comm, Stream *stream) {
  return add((Op){ALL_REDUCE, send, recv, count, type, op, 0}, comm, stream);
}

int ncclAllGather(const void *send, void *recv, size_t count, int type, Comm *comm, Stream *stream) {
  return add((Op){ALL_GATHER, send, recv, count, type, 0, 0}, comm, stream);
}

int ncclBroadcast(const void *send, void *recv, size_t count, int type, int root, Comm *comm, Stream *stream) {
  return add((Op){BROADCAST, send, recv, count, type, 0, root}, comm, stream);
}

int ncclSend(const void *send, size_t count, int type, int peer, Comm *comm, Stream *stream) {
  return add((Op){SEND, send, 0, count, type, 0, peer}, comm, stream);
}

int ncclRecv(void *recv, size_t count, int type, int peer, Comm *comm, Stream *stream) {
  return add((Op){RECV, 0, recv, count, type, 0, peer}, comm, stream);
}

static void *finalize(void *argument) {
  Comm *comm = argument;
  pthread_mutex_lock(&lock);
  while (comm->running > 1 && !comm->aborted) pthread_cond_wait(&changed, &lock);
  comm->meeting->finalized++;
  pthread_cond_broadcast(&changed);
  while (comm->meeting->finalized < comm->meeting->ranks && !comm->aborted) pthread_cond_wait(&changed, &lock);
  if (comm->aborted) comm->meeting->finalized--;
  comm->state = SUCCESS;
  comm->running--;
  pthread_cond_broadcast(&changed);
  pthread_mutex_unlock(&lock);
  return 0;
}

int ncclCommFinalize(Comm *comm) {
  pthread_mutex_lock(&lock);
  enter(comm);
  if (comm->finalized++) breaches++;
  comm->state = IN_PROGRESS;
  comm->running++;
  leave(comm);
  pthread_mutex_unlock(&lock);
  detach(finalize, comm);
  return IN_PROGRESS;
}

int ncclCommDestroy(Comm *comm) {
  pthread_mutex_lock(&lock);
  enter(comm);
  if (!comm->finalized || comm->state != SUCCESS) breaches++;
  comm->dead = 1;
  destroys++;
  leave(comm);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

int ncclCommAbort(Comm *comm) {
  pthread_mutex_lock(&lock);
  enter(comm);
  comm->aborted = 1;
  pthread_cond_broadcast(&changed);
  while (comm->running > 0) pthread_cond_wait(&changed, &lock);
  comm->dead = 1;
  aborts++;
  leave(comm);
  pthread_mutex_unlock(&lock);
  pause_ms(ABORT_MS);
  while (hold_aborts) pause_ms(1);
  return SUCCESS;
}
