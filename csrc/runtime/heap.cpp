// What wants a heap or files: each handle here is one of those in the caller's memory, with memory from the heap.
#if !defined(CELLSTEP_NO_HEAP)
#include <cstdio>
#include <cstring>
#include <new>

#include "runtime/handles.h"

#if defined(__unix__) || defined(__APPLE__)
#define CELLSTEP_MMAP 1
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

using cellstep::core::Parallel;
using cellstep::runtime::most_steps;
using cellstep::runtime::Parts;
using cellstep::runtime::Work;

namespace {

constexpr std::align_val_t alignment{cellstep::runtime::line};

void* allocate(std::size_t bytes) { return ::operator new(bytes ? bytes : 1, alignment, std::nothrow); }

void release(void* memory) { ::operator delete(memory, alignment); }

/// What a model's handle takes in its block; a copy of the file begins behind it, at a cache line.
constexpr std::size_t handle_size = CELLSTEP_MODEL_BYTES;
static_assert(handle_size % cellstep::runtime::line == 0, "a copy of the file behind it begins at a cache line");

/// Makes a model in `block`, of which the handle is the first part. The block is freed if the data are refused.
cellstep_status adopt(void* block, const void* data, std::size_t size, unsigned options, cellstep_model** model) {
    const cellstep_status status = cellstep_model_init(block, handle_size, data, size, options, model);
    if (status == CELLSTEP_OK)
        (*model)->on_heap = true;
    else
        release(block);
    return status;
}

cellstep_status load_file(const char* path, unsigned options, cellstep_model** model) {
    std::FILE* file = std::fopen(path, "rb");
    if (!file) return CELLSTEP_ERROR_FILE;
    std::size_t size = handle_size;
    std::size_t capacity = 0;
    unsigned char* block = nullptr;
    cellstep_status status = CELLSTEP_OK;
    // Read to the end instead of asking for the length, so that a pipe works and a directory is an error.
    for (;;) {
        if (size >= capacity) {
            const std::size_t more = capacity ? 2 * capacity : 1 << 16;
            unsigned char* larger = static_cast<unsigned char*>(allocate(more));
            if (!larger) {
                status = CELLSTEP_ERROR_MEMORY;
                break;
            }
            if (block) std::memcpy(larger, block, size);
            release(block);
            block = larger;
            capacity = more;
        }
        const std::size_t got = std::fread(block + size, 1, capacity - size, file);
        size += got;
        if (got == 0) {
            if (std::ferror(file)) status = CELLSTEP_ERROR_FILE;
            break;
        }
    }
    std::fclose(file);
    if (status != CELLSTEP_OK) {
        release(block);
        return status;
    }
    return adopt(block, block + handle_size, size - handle_size, options, model);
}

#if defined(CELLSTEP_MMAP)
/// A regular file that is not empty, mapped; null for anything else.
const void* map_file(const char* path, std::size_t* size) {
    struct stat facts;
    if (stat(path, &facts) != 0 || !S_ISREG(facts.st_mode)) return nullptr;
    const int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0) return nullptr;
    void* mapping = MAP_FAILED;
    if (fstat(file, &facts) == 0 && S_ISREG(facts.st_mode) && facts.st_size > 0) {
        *size = static_cast<std::size_t>(facts.st_size);
        mapping = mmap(nullptr, *size, PROT_READ, MAP_PRIVATE, file, 0);
    }
    close(file);
    return mapping == MAP_FAILED ? nullptr : mapping;
}
#endif

}  // namespace

namespace cellstep {
namespace runtime {

cellstep_status remake(const core::Image& image, Work& work, std::size_t steps, const Parallel& parallel) {
    Work made = work;
    made.steps = steps;
    made.parallel = parallel;
    Parts counted(nullptr);
    place(counted, image, made);
    const std::size_t bytes = counted.required();
    made.block = bytes ? allocate(bytes) : nullptr;
    if (!made.block) return CELLSTEP_ERROR_MEMORY;
    Parts parts(made.block);
    place(parts, image, made);
    make_plan(image, made);
    release(work.block);
    work = made;
    return CELLSTEP_OK;
}

}  // namespace runtime
}  // namespace cellstep

cellstep_status cellstep_model_load_file(const char* path, cellstep_model** model) {
    if (model) *model = nullptr;
    if (!path || !model) return CELLSTEP_ERROR_ARGUMENT;
    return load_file(path, 0, model);
}

cellstep_status cellstep_model_map_file(const char* path, unsigned options, cellstep_model** model) {
    if (model) *model = nullptr;
    if (!path || !model) return CELLSTEP_ERROR_ARGUMENT;
#if defined(CELLSTEP_MMAP)
    std::size_t size = 0;
    if (const void* mapping = map_file(path, &size)) {
        void* block = allocate(handle_size);
        const cellstep_status status =
            block ? adopt(block, mapping, size, options, model) : cellstep_status{CELLSTEP_ERROR_MEMORY};
        if (status == CELLSTEP_OK)
            (*model)->mapping = mapping;
        else
            munmap(const_cast<void*>(mapping), size);
        return status;
    }
#endif
    return load_file(path, options, model);
}

cellstep_status cellstep_model_load_memory(const void* data, size_t size, cellstep_model** model) {
    if (model) *model = nullptr;
    if (!data || !model) return CELLSTEP_ERROR_ARGUMENT;
    unsigned char* block =
        size <= SIZE_MAX - handle_size ? static_cast<unsigned char*>(allocate(handle_size + size)) : nullptr;
    if (!block) return CELLSTEP_ERROR_MEMORY;
    std::memcpy(block + handle_size, data, size);
    return adopt(block, block + handle_size, size, 0, model);
}

cellstep_status cellstep_model_load_in_place(const void* data, size_t size, cellstep_model** model) {
    if (model) *model = nullptr;
    if (!data || !model) return CELLSTEP_ERROR_ARGUMENT;
    void* block = allocate(handle_size);
    return block ? adopt(block, data, size, 0, model) : CELLSTEP_ERROR_MEMORY;
}

void cellstep_model_destroy(cellstep_model* model) {
    if (!model || !model->on_heap) return;
#if defined(CELLSTEP_MMAP)
    if (model->mapping)
        munmap(const_cast<void*>(model->mapping), static_cast<std::size_t>(model->image.header().length));
#endif
    release(model);
}

cellstep_status cellstep_model_selftest(const cellstep_model* model, float* error) {
    if (!model) return CELLSTEP_ERROR_ARGUMENT;
    cellstep_session* session = nullptr;
    cellstep_status status = cellstep_session_create(model, &session);
    if (status == CELLSTEP_OK) status = cellstep_session_selftest(session, error);
    cellstep_session_destroy(session);
    return status;
}

cellstep_status cellstep_session_create(const cellstep_model* model, cellstep_session** session) {
    if (session) *session = nullptr;
    if (!model || !session) return CELLSTEP_ERROR_ARGUMENT;
    const std::size_t bytes = cellstep_memory_required(model);
    void* block = bytes ? allocate(bytes) : nullptr;
    if (!block) return CELLSTEP_ERROR_MEMORY;
    const cellstep_status status = cellstep_session_init(model, block, bytes, session);
    if (status == CELLSTEP_OK)
        (*session)->on_heap = true;
    else
        release(block);
    return status;
}

void cellstep_session_destroy(cellstep_session* session) {
    if (!session) return;
    release(session->work.block);
    release(session->slide.block);
    if (session->on_heap) release(session);
}

cellstep_status cellstep_session_set_parallel(cellstep_session* session, size_t threads, void* context,
                                              cellstep_run_tasks run) {
    if (!session || (run && threads == 0)) return CELLSTEP_ERROR_ARGUMENT;
    return cellstep::runtime::remake(session->model->image, session->work, session->work.steps,
                                     {run ? threads : 1, context, run});
}

cellstep_status cellstep_session_slide_begin(cellstep_session* session, size_t window) {
    if (!session) return CELLSTEP_ERROR_ARGUMENT;
    const std::size_t steps = cellstep::runtime::window_steps(session->model->image, window);
    if (steps == 0) return CELLSTEP_ERROR_ARGUMENT;
    void* const before = session->slide.block;
    const std::size_t bytes = cellstep_slide_memory_required(session->model, steps);
    void* block = before && session->slide.block_size == bytes ? before : bytes ? allocate(bytes) : nullptr;
    if (!block) return CELLSTEP_ERROR_MEMORY;
    const cellstep_status status = cellstep_session_slide_init(session, steps, block, bytes);
    void* const unused = status == CELLSTEP_OK ? before : block;
    if (status == CELLSTEP_OK) {
        session->slide.block = block;
        session->slide.block_size = bytes;
    }
    if (unused != session->slide.block) release(unused);
    return status;
}

cellstep_status cellstep_pool_create(const cellstep_model* model, size_t streams, cellstep_pool** pool) {
    if (pool) *pool = nullptr;
    if (!model || !pool || streams == 0 || streams > most_steps) return CELLSTEP_ERROR_ARGUMENT;
    if (is_bidirectional(model->image)) return CELLSTEP_ERROR_BIDIRECTIONAL;
    const std::size_t bytes = cellstep_pool_memory_required(model, streams);
    void* block = bytes ? allocate(bytes) : nullptr;
    if (!block) return CELLSTEP_ERROR_MEMORY;
    const cellstep_status status = cellstep_pool_init(model, streams, block, bytes, pool);
    if (status == CELLSTEP_OK)
        (*pool)->on_heap = true;
    else
        release(block);
    return status;
}

void cellstep_pool_destroy(cellstep_pool* pool) {
    if (!pool) return;
    release(pool->work.block);
    if (pool->on_heap) release(pool);
}

cellstep_status cellstep_pool_set_parallel(cellstep_pool* pool, size_t threads, void* context, cellstep_run_tasks run) {
    if (!pool || (run && threads == 0)) return CELLSTEP_ERROR_ARGUMENT;
    return cellstep::runtime::remake(pool->model->image, pool->work, 1, {run ? threads : 1, context, run});
}
#endif
