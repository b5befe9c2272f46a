/* A libcudart without a GPU, for the tests: the functions of vzip.runtime.cuda with their real
   signatures, on the host's memory.

   Work is queued and runs when its stream is waited for, never earlier, so that a result that is
   read too soon is a wrong one. Captured work runs at each launch of the graph, with the addresses
   that it was captured with. Copies are refused unless both ends lie within memory of their kind.
   As with the real one, any thread may call anything: who waits for a stream whose work another
   thread is running (cudaFree runs all there is) waits until that has ended. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HOST = 1, DEVICE = 2, MAX_BLOCKS = 4096, MAX_NODES = 64 };
typedef void (*work_t)(int);
typedef struct { char *start; size_t size; int kind; } block_t;
typedef struct stream stream_t;
typedef struct { void *target; const void *source; size_t size; work_t work; int key;
                 stream_t *awaited; } node_t;
typedef struct { node_t nodes[MAX_NODES]; int count; } graph_t;
struct stream { graph_t queue; graph_t *captured; int broken; };
typedef struct { double at; stream_t *stream; } event_t;

static block_t blocks[MAX_BLOCKS];
static stream_t *streams[64];
static int handles;                 /* streams, graphs, executables and events that are alive */
static int devices = 1, current, major = 8, minor = 7, runtime = 12060, driver = 12080;
static int sticky, last;
static char fail_name[64];
static int fail_after = -1, fail_code;
static char calls[1 << 16];
static int recording;
static stream_t legacy;              /* the default stream of all threads */
static int neighbour, spoilt;        /* another thread captures in the global mode; how often that was broken */
static __thread int mode;            /* of captures, of this thread: global at first */

/* Recursive: an engine's work asks for memory's bounds. */
static pthread_mutex_t everything = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static void unlock(int *unused) { (void)unused; pthread_mutex_unlock(&everything); }
#define LOCKED \
  int locked __attribute__((cleanup(unlock), unused)) = pthread_mutex_lock(&everything)

static int begin(const char *name) {
  LOCKED;
  if (recording && strlen(calls) + strlen(name) + 2 < sizeof calls) {
    strcat(calls, name);
    strcat(calls, " ");
  }
  if (sticky) return last = sticky;
  if (fail_after >= 0 && !strcmp(fail_name, name) && fail_after-- == 0) {
    if (fail_code >= 700 && fail_code < 720) sticky = fail_code;
    return last = fail_code;
  }
  return 0;
}
#define BEGIN int code = begin(__func__); if (code) return code

/* What tests set and ask. */
void fake_reset(void) {
  memset(blocks, 0, sizeof blocks); /* what an earlier test lost stays lost, but is not counted */
  memset(streams, 0, sizeof streams);
  handles = 0;
  devices = 1, current = 0, major = 8, minor = 7, sticky = last = 0;
  fail_after = -1, recording = 0, calls[0] = 0;
  runtime = 12060, driver = 12080, neighbour = spoilt = 0, legacy.queue.count = 0;
}
void fake_versions(int library, int served) { runtime = library, driver = served; }
void fake_device(int count, int ma, int mi) { devices = count, major = ma, minor = mi; }
void fake_fail(const char *name, int after, int code) {
  snprintf(fail_name, sizeof fail_name, "%s", name);
  fail_after = after, fail_code = code;
}
void fake_record(int on) { recording = on, calls[0] = 0; }
const char *fake_calls(void) { return calls; }
int fake_handles(void) { return handles; }
int fake_blocks(int kind) {
  int count = 0;
  for (int i = 0; i < MAX_BLOCKS; i++) count += blocks[i].start && (blocks[i].kind & kind);
  return count;
}
int fake_within(const void *address, size_t size, int kind) {
  LOCKED;
  const char *start = address;
  for (int i = 0; i < MAX_BLOCKS; i++)
    if (blocks[i].start && blocks[i].kind == kind && start >= blocks[i].start &&
        start + size <= blocks[i].start + blocks[i].size)
      return 1;
  return 0;
}

/* What CUDA refuses to a thread whose mode isn't relaxed while another one captures. */
static int unsafe(void) {
  if (!neighbour || mode == 2) return 0;
  spoilt++;
  return last = 900;
}
void fake_neighbour(int on) { neighbour = on, spoilt = 0; }
int fake_spoilt(void) { return spoilt; }
stream_t *fake_legacy(void) { return &legacy; }

static void drain(stream_t *stream);
static void run(graph_t *graph) {
  for (int i = 0; i < graph->count; i++) {
    node_t *node = &graph->nodes[i];
    if (node->awaited) drain(node->awaited);
    else if (node->work) node->work(node->key);
    else memcpy(node->target, node->source, node->size);
  }
}
static void drain(stream_t *stream) {
  LOCKED;
  graph_t now = stream->queue;
  stream->queue.count = 0;
  run(&now);
}
static int put(stream_t *stream, node_t node) {
  LOCKED;
  graph_t *graph = stream->captured ? stream->captured : &stream->queue;
  if (graph->count == MAX_NODES) return last = 999;
  graph->nodes[graph->count++] = node;
  return 0;
}
int fake_enqueue(stream_t *stream, work_t work, int key) {
  if (sticky) return last = sticky;
  return put(stream, (node_t){0, 0, 0, work, key, 0});
}
int fake_capturing(stream_t *stream) { return stream->captured != 0; }
void fake_break_capture(stream_t *stream) { stream->broken = 1; }

static int allocate(void **out, size_t size, int kind) {
  LOCKED;
  for (int i = 0; i < MAX_BLOCKS; i++)
    if (!blocks[i].start) {
      char *start = aligned_alloc(256, (size + 255) / 256 * 256);
      memset(start, 0xA5, size);
      blocks[i] = (block_t){start, size, kind};
      *out = start;
      return 0;
    }
  return last = 2;
}
static int release(void *address, int kind) {
  LOCKED;
  for (int i = 0; i < MAX_BLOCKS; i++)
    if (blocks[i].start == address && blocks[i].kind == kind) {
      for (int s = 0; s < 64; s++) if (streams[s]) drain(streams[s]); /* as cudaFree waits */
      memset(address, 0x5A, blocks[i].size);
      free(address);
      blocks[i].start = 0;
      return 0;
    }
  return last = 1;
}

int cudaGetDeviceCount(int *count) { BEGIN; *count = devices; return devices ? 0 : (last = 100); }
int cudaGetDevice(int *device) { BEGIN; *device = current; return 0; }
int cudaSetDevice(int device) { BEGIN; if (device >= devices) return last = 101; current = device; return 0; }
int cudaGetDeviceProperties(void *properties, int device) {
  BEGIN; (void)device; memset(properties, 0, 1032); strcpy(properties, "Fake Orin"); return 0;
}
int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  BEGIN; (void)device;
  if (attribute != 75 && attribute != 76) return last = 1;
  *value = attribute == 75 ? major : minor;
  return 0;
}
int cudaRuntimeGetVersion(int *version) { BEGIN; *version = runtime; return 0; }
int cudaDriverGetVersion(int *version) { BEGIN; *version = driver; return 0; }
int cudaMemGetInfo(size_t *free_, size_t *total) { BEGIN; *free_ = 5, *total = 7; return 0; }
int cudaGetLastError(void) { int code = last; last = sticky; return code; }
int cudaMalloc(void **out, size_t size) { BEGIN; if (unsafe()) return last; return allocate(out, size, DEVICE); }
int cudaFree(void *address) { BEGIN; if (unsafe()) return last; return release(address, DEVICE); }
int cudaHostAlloc(void **out, size_t size, unsigned flags) {
  BEGIN; (void)flags; if (unsafe()) return last; return allocate(out, size, HOST);
}
int cudaFreeHost(void *address) { BEGIN; if (unsafe()) return last; return release(address, HOST); }
int cudaMemcpyAsync(void *target, const void *source, size_t size, int kind, stream_t *stream) {
  BEGIN;
  if (kind < 1 || kind > 3 || !fake_within(target, size, kind == 2 ? HOST : DEVICE) ||
      !fake_within(source, size, kind == 1 ? HOST : DEVICE))
    return last = 1;
  return put(stream, (node_t){target, source, size, 0, 0, 0});
}
int cudaStreamCreateWithFlags(stream_t **out, unsigned flags) {
  BEGIN;
  if (flags != 1) return last = 1;
  for (int s = 0; s < 64; s++)
    if (!streams[s]) {
      *out = streams[s] = calloc(1, sizeof(stream_t));
      handles++;
      return 0;
    }
  return last = 2;
}
int cudaStreamSynchronize(stream_t *stream) {
  BEGIN;
  if (stream->captured) return last = 900;
  drain(stream);
  return 0;
}
int cudaStreamDestroy(stream_t *stream) {
  BEGIN;
  for (int s = 0; s < 64; s++) if (streams[s] == stream) streams[s] = 0;
  free(stream);
  handles--;
  return 0;
}
int cudaStreamBeginCapture(stream_t *stream, int mode) {
  BEGIN;
  if (mode != 1 || stream->captured) return last = 1;
  stream->captured = calloc(1, sizeof(graph_t));
  stream->broken = 0;
  handles++;
  return 0;
}
int cudaStreamEndCapture(stream_t *stream, graph_t **out) {
  BEGIN;
  graph_t *graph = stream->captured;
  stream->captured = 0;
  if (stream->broken) {
    free(graph);
    handles--;
    *out = 0;
    return last = 901;
  }
  *out = graph;
  return 0;
}
int cudaGraphInstantiateWithFlags(graph_t **out, graph_t *graph, unsigned long long flags) {
  BEGIN;
  if (flags) return last = 1;
  *out = malloc(sizeof(graph_t));
  **out = *graph;
  handles++;
  return 0;
}
int cudaGraphLaunch(graph_t *executable, stream_t *stream) {
  BEGIN;
  for (int i = 0; i < executable->count; i++)
    if ((code = put(stream, executable->nodes[i]))) return code;
  return 0;
}
int cudaGraphDestroy(graph_t *graph) { BEGIN; free(graph); handles--; return 0; }
int cudaGraphExecDestroy(graph_t *graph) { BEGIN; free(graph); handles--; return 0; }
int cudaEventCreateWithFlags(void **out, unsigned flags) {
  BEGIN; (void)flags; *out = calloc(1, sizeof(event_t)); handles++; return 0;
}
int cudaEventRecord(event_t *event, stream_t *stream) {
  BEGIN;
  event->at = 1, event->stream = stream == (stream_t *)1 ? &legacy : stream;
  return 0;
}
int cudaEventSynchronize(event_t *event) { BEGIN; return event->at ? 0 : (last = 1); }
int cudaEventElapsedTime(float *ms, event_t *first, event_t *second) {
  BEGIN; *ms = first->at && second->at ? 0.5f : -1; return 0;
}
int cudaStreamWaitEvent(stream_t *stream, event_t *event, unsigned flags) {
  BEGIN;
  if (flags || !event->at) return last = 1;
  return put(stream, (node_t){0, 0, 0, 0, 0, event->stream});
}
int cudaThreadExchangeStreamCaptureMode(int *wanted) {
  BEGIN; int before = mode; mode = *wanted; *wanted = before; return 0;
}
int cudaEventDestroy(void *event) { BEGIN; free(event); handles--; return 0; }
const char *cudaGetErrorName(int code) { return code == 2 ? "cudaErrorMemoryAllocation" : "cudaErrorFake"; }
const char *cudaGetErrorString(int code) { return code == 2 ? "out of memory" : "a fake error"; }
