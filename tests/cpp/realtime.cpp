// Every call of a session and a pool where each allocation ends the program with code 3, and each system call but read
// and write has the kernel kill it. Writes all answers to standard output, as floats.
//
//     realtime MODEL OTHER heap|memory|allocates|enters
//
// "heap": models, session, window and pool come from the heap, before. "memory": they are made in memory of the
// program's own, which is under the same rules. The last two do what is forbidden.
#include <linux/seccomp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <initializer_list>

#include "cellstep/runtime.h"

namespace {

bool forbidden = false;

/// exit_group, which _exit calls, is one system call too many.
[[noreturn]] void leave(int code) {
    for (;;) syscall(SYS_exit, code);
}

void say(const char* text) {
    if (write(2, text, strlen(text)) < 0) leave(4);
}

void allowed() {
    if (!forbidden) return;
    forbidden = false;
    say("an allocation\n");
    leave(3);
}

}  // namespace

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

// operator new and delete of libstdc++ come here, too.
void* malloc(size_t size) { return allowed(), __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return allowed(), __libc_calloc(count, size); }
void* realloc(void* memory, size_t size) { return allowed(), __libc_realloc(memory, size); }
void* memalign(size_t alignment, size_t size) { return allowed(), __libc_memalign(alignment, size); }
void* aligned_alloc(size_t alignment, size_t size) { return allowed(), __libc_memalign(alignment, size); }
int posix_memalign(void** memory, size_t alignment, size_t size) {
    allowed();
    *memory = __libc_memalign(alignment, size);
    return *memory ? 0 : 12;
}
void free(void* memory) { allowed(), __libc_free(memory); }
}

namespace {

void check(cellstep_status status, int line) {
    if (status == CELLSTEP_OK) return;
    char text[16];
    int at = sizeof(text);
    text[--at] = '\n';
    for (; line > 0; line /= 10) text[--at] = static_cast<char>('0' + line % 10);
    if (write(2, text + at, sizeof(text) - static_cast<size_t>(at)) < 0) leave(4);
    say(cellstep_status_text(status));
    leave(5);
}
#define CHECK(call) check(call, __LINE__)

struct Bytes {
    unsigned char* data;
    size_t size;
};

/// Off a cache line on purpose, at the least alignment that is allowed.
unsigned char* reserve(size_t size) { return static_cast<unsigned char*>(aligned_alloc(64, size + 64)) + 8; }

Bytes read_file(const char* path) {
    FILE* file = fopen(path, "rb");
    if (!file) exit(6);
    fseek(file, 0, SEEK_END);
    Bytes bytes{nullptr, static_cast<size_t>(ftell(file))};
    rewind(file);
    bytes.data = reserve(bytes.size);
    if (fread(bytes.data, 1, bytes.size, file) != bytes.size) exit(6);
    fclose(file);
    return bytes;
}

constexpr size_t steps = 16;
constexpr size_t window = 8;
constexpr size_t streams = 7;

float* out = nullptr;  // where the next answers go

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4) return 2;
    const bool in_memory = strcmp(argv[3], "memory") == 0;
    const Bytes files[2] = {read_file(argv[1]), read_file(argv[2])};
    unsigned char* const handles[2] = {reserve(CELLSTEP_MODEL_BYTES), reserve(CELLSTEP_MODEL_BYTES)};
    cellstep_model* models[2];
    cellstep_model_info info;
    // What is needed is asked beforehand, as a firmware's author would.
    for (int at = 0; at < 2; ++at)
        CHECK(cellstep_model_init(handles[at], CELLSTEP_MODEL_BYTES, files[at].data, files[at].size, 0, &models[at]));
    CHECK(cellstep_model_get_info(models[0], &info));
    const Bytes session_memory{reserve(cellstep_memory_required(models[0])), cellstep_memory_required(models[0])};
    const Bytes slide_memory{reserve(cellstep_slide_memory_required(models[0], window)),
                             cellstep_slide_memory_required(models[0], window)};
    const size_t pool_size = cellstep_pool_memory_required(models[0], streams);  // 0 for a bidirectional model
    const Bytes pool_memory{reserve(pool_size), pool_size};
    memset(session_memory.data, 0xff, session_memory.size);  // NaN, if it were read before it is written
    memset(slide_memory.data, 0xff, slide_memory.size);
    memset(pool_memory.data, 0xff, pool_memory.size);

    cellstep_session* session = nullptr;
    cellstep_pool* pool = nullptr;
#if !defined(CELLSTEP_NO_HEAP)
    if (!in_memory) {
        CHECK(cellstep_model_load_file(argv[1], &models[0]));
        CHECK(cellstep_model_map_file(argv[2], 0, &models[1]));
        CHECK(cellstep_session_create(models[0], &session));
        CHECK(cellstep_session_slide_begin(session, window));
        if (pool_size) CHECK(cellstep_pool_create(models[0], streams, &pool));
    }
#endif
    const size_t inputs = info.input_size, outputs = info.output_size;
    float* x = static_cast<float*>(malloc(steps * streams * inputs * sizeof(float)));
    for (size_t at = 0; at < steps * streams * inputs; ++at) x[at] = static_cast<float>(at * 7 % 23) * 0.125f - 1.25f;
    unsigned char reset[steps];
    for (size_t at = 0; at < steps; ++at) reset[at] = at % 5 == 3;
    float* h = static_cast<float*>(malloc(info.num_layers * info.h_size * sizeof(float)));
    float* c = static_cast<float*>(malloc(info.num_layers * info.hidden_size * sizeof(float)));
    float* answers = static_cast<float*>(calloc(64 * steps * streams * outputs, sizeof(float)));
    out = answers;

    forbidden = true;
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT) != 0) {
        say("no seccomp here\n");
        leave(7);
    }
    if (strcmp(argv[3], "allocates") == 0) free(malloc(1));
    if (strcmp(argv[3], "enters") == 0) getppid();

    if (in_memory) {
        for (int at = 0; at < 2; ++at)
            CHECK(
                cellstep_model_init(handles[at], CELLSTEP_MODEL_BYTES, files[at].data, files[at].size, 0, &models[at]));
        CHECK(cellstep_session_init(models[0], session_memory.data, session_memory.size, &session));
        CHECK(cellstep_session_slide_init(session, window, slide_memory.data, slide_memory.size));
        if (pool_size) CHECK(cellstep_pool_init(models[0], streams, pool_memory.data, pool_memory.size, &pool));
    }
    CHECK(cellstep_session_selftest(session, nullptr));
    for (const cellstep_model* model : {models[0], models[1], models[0]}) {
        CHECK(cellstep_session_swap_model(session, model));
        CHECK(cellstep_session_reset(session));
        if (pool) {
            for (size_t step = 0; step < steps; ++step, out += outputs)
                CHECK(cellstep_session_step(session, x + step * inputs, out));
        }
        CHECK(cellstep_session_run(session, x, steps, out));
        out += steps * outputs;
        CHECK(cellstep_session_run_reset(session, x, reset, steps, out));
        out += steps * outputs;
        CHECK(cellstep_session_get_state(session, h, c));
        CHECK(cellstep_session_forecast(session, x, steps, out));
        out += outputs;
        CHECK(cellstep_session_set_state(session, h, c));
        CHECK(cellstep_session_forecast(session, x, steps, out));
        out += outputs;
        for (size_t step = 0; step < steps; ++step) {
            const cellstep_status status = cellstep_session_slide(session, x + step * inputs, out);
            if (status == CELLSTEP_PENDING && step + 1 < window) continue;
            CHECK(status);
            out += outputs;
        }
    }
    for (size_t step = 0; pool && step < steps; ++step, out += streams * outputs) {
        if (step == 9) CHECK(cellstep_pool_reset(pool));
        if (step == 12) {
            CHECK(cellstep_pool_get_state(pool, 2, h, c));
            CHECK(cellstep_pool_set_state(pool, 4, h, c));
        }
        CHECK(cellstep_pool_step(pool, x + step * streams * inputs, step % 2 ? reset + step % 3 : nullptr, out));
    }
    const char* bytes = reinterpret_cast<const char*>(answers);
    for (const char* end = reinterpret_cast<const char*>(out); bytes < end;) {
        const ssize_t wrote = write(1, bytes, static_cast<size_t>(end - bytes));
        if (wrote < 0) leave(4);
        bytes += wrote;
    }
    leave(0);
}
