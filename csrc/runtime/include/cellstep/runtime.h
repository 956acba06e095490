/**
 * cellstep/runtime.h: run a `.cellstep` deploy file without torch.
 *
 * A model is read-only and can be shared by any number of sessions and pools on any threads. A session is one stream:
 * it carries the state (h, c) of every layer, and belongs to one thread at a time. A pool is many streams that move
 * together. Values are float32 in the units of the data the model was trained on: scaling lies in the file.
 *
 * With memory from the heap:
 *
 *     cellstep_model* model;
 *     cellstep_session* session;
 *     if (cellstep_model_load_file("m.cellstep", &model) != CELLSTEP_OK) ...
 *     if (cellstep_session_create(model, &session) != CELLSTEP_OK) ...
 *     cellstep_session_step(session, x, y);
 *
 * With memory of the caller's own, aligned to 8 bytes, and the file used where it lies, such as in flash:
 *
 *     static uint64_t handle[CELLSTEP_MODEL_BYTES / 8], memory[...];
 *     cellstep_model_init(handle, sizeof(handle), file, file_size, 0, &model);
 *     assert(cellstep_memory_required(model) <= sizeof(memory));
 *     cellstep_session_init(model, memory, sizeof(memory), &session);
 *     cellstep_session_step(session, x, y);
 *
 * Once a session or pool is there, calls that carry CELLSTEP_NONBLOCKING neither allocate nor lock nor throw nor enter
 * the operating system, unless the caller's threads do so or their comment names an exception. Where
 * CELLSTEP_NO_HEAP is defined, all that wants a heap or files is absent, here and in the library.
 *
 * Every call that gives a cellstep_status gives CELLSTEP_ERROR_ARGUMENT where a pointer is null that may not be, and
 * then changes nothing; further errors stand with each.
 */
#ifndef CELLSTEP_RUNTIME_H
#define CELLSTEP_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#if defined(CELLSTEP_RUNTIME_BUILD)
#define CELLSTEP_API __declspec(dllexport)
#elif defined(CELLSTEP_RUNTIME_SHARED)
#define CELLSTEP_API __declspec(dllimport)
#else
#define CELLSTEP_API
#endif
#else
#define CELLSTEP_API __attribute__((visibility("default")))
#endif

/** Marks calls that a real-time thread may make; clang checks it where it knows how (-Wfunction-effects). */
#if !defined(CELLSTEP_NONBLOCKING) && defined(__has_attribute)
#if __has_attribute(nonblocking)
#define CELLSTEP_NONBLOCKING __attribute__((nonblocking))
#endif
#endif
#if !defined(CELLSTEP_NONBLOCKING)
#define CELLSTEP_NONBLOCKING
#endif

/** Version of what this header declares. It grows with what is added; nothing that is there changes or goes. */
#define CELLSTEP_API_VERSION 1

#ifdef __cplusplus
extern "C" {
#endif

/** A loaded and checked deploy file. */
typedef struct cellstep_model cellstep_model;
/** One stream through a model, with its state. */
typedef struct cellstep_session cellstep_session;
/** Many streams through a model that move together, each with its state. */
typedef struct cellstep_pool cellstep_pool;

/** What a call came to. Every value has a text: see cellstep_status_text. */
typedef enum cellstep_status {
    CELLSTEP_OK = 0,
    CELLSTEP_ERROR_ARGUMENT = 1,       /**< a pointer is null or a count is out of range */
    CELLSTEP_ERROR_MEMORY = 2,         /**< not enough memory */
    CELLSTEP_ERROR_FILE = 3,           /**< the file cannot be opened or read */
    CELLSTEP_ERROR_MAGIC = 4,          /**< not a deploy file */
    CELLSTEP_ERROR_VERSION = 5,        /**< a deploy file older than those that this build reads */
    CELLSTEP_ERROR_LENGTH = 6,         /**< shorter or longer than its header says */
    CELLSTEP_ERROR_CHECKSUM = 7,       /**< the checksum does not fit the bytes */
    CELLSTEP_ERROR_FORMAT = 8,         /**< the records contradict each other or the header */
    CELLSTEP_ERROR_DTYPE = 9,          /**< the weights are not float32 */
    CELLSTEP_ERROR_NONFINITE = 10,     /**< a weight is NaN or infinite */
    CELLSTEP_ERROR_ALIGNMENT = 11,     /**< memory that is used in place is not aligned to 8 bytes */
    CELLSTEP_ERROR_SELFTEST = 12,      /**< the test vector in the file gives other numbers on this machine */
    CELLSTEP_PENDING = 13,             /**< no error, but no answer yet either: a sliding window is not full */
    CELLSTEP_ERROR_STEPS = 14,         /**< more steps at once than a bidirectional session's memory was made for */
    CELLSTEP_ERROR_BIDIRECTIONAL = 15, /**< a pool of a bidirectional model, which has no answer step by step */
    CELLSTEP_ERROR_SHAPE = 16,         /**< a model to swap in is of another shape */
    CELLSTEP_ERROR_NEWER = 17,         /**< a deploy file newer than those that this build reads */
    CELLSTEP_ERROR_UNSUPPORTED = 32,   /**< this and the values up to the next one: the model has an option that this
                                            build leaves out to be small (CELLSTEP_PLAIN_ONLY, CELLSTEP_FLOAT32_ONLY);
                                            each option has a value, and its text names it */
    CELLSTEP_ERROR_UNSUPPORTED_LAST = 47
} cellstep_status;

/** One line on what a status means and what to do; never null, also for an unknown value. */
CELLSTEP_API const char* cellstep_status_text(cellstep_status status);

/** Version of this library, as "0.1.0". */
CELLSTEP_API const char* cellstep_version(void);

/** The CELLSTEP_API_VERSION that this library was made with: a program needs at least the one of its header. */
CELLSTEP_API int cellstep_api_version(void);

/** Instruction set in use: "baseline", "avx2", "avx512" or "native"; "compact" where the library is built small. */
CELLSTEP_API const char* cellstep_instruction_set(void);

/* Models */

/** Options of cellstep_model_init, to be added. */
enum {
    CELLSTEP_ALLOW_NONFINITE = 1 /**< take a model whose weights are NaN or infinite, as its outputs may be then */
};

/** Bytes of memory that the handle of a model lies in. */
#define CELLSTEP_MODEL_BYTES 64

/**
 * Checks a deploy file that lies in memory (flash, a mapped file) and makes a handle for it. Nothing is copied.
 *
 * `memory` (memory_size bytes, at least CELLSTEP_MODEL_BYTES, aligned to 8) holds the handle, and `data` (size bytes,
 * aligned to 8) the file; both must outlive the model, and the file must not change. Align the file to 64 bytes:
 * elsewhere a processor with vectors of a cache line takes up to 1.6 times as long. `options`: see above. On failure
 * *model is null. Errors: those of the file (CELLSTEP_ERROR_MAGIC to CELLSTEP_ERROR_ALIGNMENT); CELLSTEP_ERROR_MEMORY
 * for too small a memory; CELLSTEP_ERROR_ARGUMENT for an unknown option.
 */
CELLSTEP_API cellstep_status cellstep_model_init(void* memory, size_t memory_size, const void* data, size_t size,
                                                 unsigned options, cellstep_model** model);

#if !defined(CELLSTEP_NO_HEAP)
/**
 * Loads a copy of a deploy file. On success *model is to be destroyed by the caller; on failure it is null. Errors:
 * CELLSTEP_ERROR_FILE, and those of cellstep_model_init.
 */
CELLSTEP_API cellstep_status cellstep_model_load_file(const char* path, cellstep_model** model);

/**
 * The same, but a regular file is mapped into memory instead of copied, where the system can do so: it must not change
 * while the model lives. Replace it by renaming a new one, as cellstep.export does. `options` as for
 * cellstep_model_init.
 */
CELLSTEP_API cellstep_status cellstep_model_map_file(const char* path, unsigned options, cellstep_model** model);

/** Loads a deploy file from memory. The bytes are copied, so they need no alignment and may go away. */
CELLSTEP_API cellstep_status cellstep_model_load_memory(const void* data, size_t size, cellstep_model** model);

/** Loads a deploy file in place, as cellstep_model_init does, with a handle from the heap. */
CELLSTEP_API cellstep_status cellstep_model_load_in_place(const void* data, size_t size, cellstep_model** model);

/**
 * Destroys a model; null is allowed, and nothing happens to a model in the caller's memory. Its sessions and pools must
 * be gone.
 */
CELLSTEP_API void cellstep_model_destroy(cellstep_model* model);
#endif

/** What a model is. Sizes are counts of values. */
typedef struct cellstep_model_info {
    uint32_t input_size;  /**< values in x, one time step */
    uint32_t output_size; /**< values in y */
    uint32_t num_layers;  /**< rows of the state: LSTM layers times directions; 1 if their sizes differ */
    uint32_t hidden_size; /**< values in a row of c; the units of each layer, or of all side by side */
    uint32_t window;      /**< steps that the model was trained to see before a forecast; 0: not said */
    uint32_t horizon;     /**< steps from the last input to the moment forecast; 0: not said */
    uint32_t h_size;      /**< values in a row of h; fewer than hidden_size behind a projection */
    uint32_t answers;     /**< what the model was made to answer: 0 every step, 1 the last, 2 the last hidden state */
} cellstep_model_info;

CELLSTEP_API cellstep_status cellstep_model_get_info(const cellstep_model* model, cellstep_model_info* info);

/** How the weights of the LSTM layers are stored: "float32", "bfloat16", "float16" or "int8"; null for a null model. */
CELLSTEP_API const char* cellstep_model_weights(const cellstep_model* model);

/** Name of input column `index`, or null where the file has no names or the index is out of range. */
CELLSTEP_API const char* cellstep_model_feature_name(const cellstep_model* model, size_t index);

/** Name of output column `index`, or null likewise. */
CELLSTEP_API const char* cellstep_model_output_name(const cellstep_model* model, size_t index);

#if !defined(CELLSTEP_NO_HEAP)
/**
 * Replays the test vector that lies in the file, in a session of its own. *error, if not null, receives the largest
 * difference, in the output's units. CELLSTEP_OK also for a file without a test vector, with *error set to -1. Errors:
 * CELLSTEP_ERROR_SELFTEST; CELLSTEP_ERROR_MEMORY.
 */
CELLSTEP_API cellstep_status cellstep_model_selftest(const cellstep_model* model, float* error);
#endif

/* Sessions */

/**
 * Bytes of memory for a session, without a sliding window; 0 for a null model, or where the sum would not fit a size_t.
 * A bidirectional model needs the whole sequence at once: this is enough for its own window, or for 64 steps if it
 * names none, and for its test vector.
 */
CELLSTEP_API size_t cellstep_memory_required(const cellstep_model* model);

/**
 * The same for calls of so many steps, at most 2^24; 0 takes the number above. A bidirectional session then runs no
 * more steps at once. Any other runs as many as it is given, in the same numbers, but passes through its layers with
 * so many of them at a time: 1 takes the least memory, and more than some 64 gain nothing.
 */
CELLSTEP_API size_t cellstep_memory_required_for(const cellstep_model* model, size_t steps);

/**
 * Makes a session in the initial state, zero or learned, in the caller's memory: `memory_size` bytes, aligned to 8, at
 * least cellstep_memory_required. The memory and the model must outlive the session. Errors: CELLSTEP_ERROR_MEMORY for
 * too little of it; CELLSTEP_ERROR_ALIGNMENT.
 */
CELLSTEP_API cellstep_status cellstep_session_init(const cellstep_model* model, void* memory, size_t memory_size,
                                                   cellstep_session** session);

/** The same with memory for `steps` steps, see cellstep_memory_required_for. */
CELLSTEP_API cellstep_status cellstep_session_init_for(const cellstep_model* model, size_t steps, void* memory,
                                                       size_t memory_size, cellstep_session** session);

#if !defined(CELLSTEP_NO_HEAP)
/**
 * Creates a session in the initial state, zero or learned, with memory from the heap. The model must outlive it. Of the
 * later calls cellstep_session_set_parallel and cellstep_session_slide_begin allocate, and longer and longer runs of a
 * bidirectional model, which needs the whole sequence at once; no other does. Errors: CELLSTEP_ERROR_MEMORY.
 */
CELLSTEP_API cellstep_status cellstep_session_create(const cellstep_model* model, cellstep_session** session);

/**
 * Destroys a session; null is allowed. One in the caller's memory needs it only after cellstep_session_set_parallel or
 * cellstep_session_slide_begin, whose memory it frees.
 */
CELLSTEP_API void cellstep_session_destroy(cellstep_session* session);
#endif

/** Moves one time step: x (input_size) in, y (output_size) out. */
CELLSTEP_API cellstep_status cellstep_session_step(cellstep_session* session, const float* x,
                                                   float* y) CELLSTEP_NONBLOCKING;

/**
 * Moves `steps` time steps: x (steps, input_size) in, y (steps, output_size) out. To the bit as many single steps,
 * unless the model is bidirectional: then the steps are the whole sequence. Errors: CELLSTEP_ERROR_STEPS from a
 * bidirectional session in the caller's memory, CELLSTEP_ERROR_MEMORY from one on the heap that finds none.
 */
CELLSTEP_API cellstep_status cellstep_session_run(cellstep_session* session, const float* x, size_t steps,
                                                  float* y) CELLSTEP_NONBLOCKING;

/** The same; where reset[step] is not 0 the state is put to the initial one before the step. `reset` may be null. */
CELLSTEP_API cellstep_status cellstep_session_run_reset(cellstep_session* session, const float* x,
                                                        const unsigned char* reset, size_t steps,
                                                        float* y) CELLSTEP_NONBLOCKING;

/**
 * Answers a window: x (steps, input_size) in, y (output_size) out, which is the output of the last step, or comes from
 * the last hidden state if the model was made so. `steps` must be at least 1. Errors as for cellstep_session_run.
 */
CELLSTEP_API cellstep_status cellstep_session_forecast(cellstep_session* session, const float* x, size_t steps,
                                                       float* y) CELLSTEP_NONBLOCKING;

/** Bytes of memory for a sliding window of so many steps, 0 for the model's own; 0 if there is no such window. */
CELLSTEP_API size_t cellstep_slide_memory_required(const cellstep_model* model, size_t window);

/**
 * Begins a window of the last `window` steps that moves by one step a call, in the caller's memory: `memory_size`
 * bytes, aligned to 8, at least cellstep_slide_memory_required, which must outlive its use. `window` 0 takes the
 * model's own. Begins anew where there was one. Errors: CELLSTEP_ERROR_ARGUMENT if the model names no window or for
 * more than 2^24 steps; CELLSTEP_ERROR_MEMORY for too little of it; CELLSTEP_ERROR_ALIGNMENT; CELLSTEP_ERROR_STEPS from
 * a bidirectional session with memory for fewer steps.
 */
CELLSTEP_API cellstep_status cellstep_session_slide_init(cellstep_session* session, size_t window, void* memory,
                                                         size_t memory_size);

#if !defined(CELLSTEP_NO_HEAP)
/** The same with memory from the heap, of which a window of the same length before it is used again. */
CELLSTEP_API cellstep_status cellstep_session_slide_begin(cellstep_session* session, size_t window);
#endif

/**
 * Moves the window: x (input_size) is its newest step. CELLSTEP_PENDING, and y is left as it was, until as many steps
 * have come as the window has; then y (output_size) is to the bit what cellstep_session_forecast gives for these steps
 * from the initial state. What hangs on one step alone, which is what lies before the recurrence of the first LSTM
 * layer, is kept for as long as the step is in the window. The session's state is neither read nor changed.
 * CELLSTEP_ERROR_ARGUMENT before a window began.
 */
CELLSTEP_API cellstep_status cellstep_session_slide(cellstep_session* session, const float* x,
                                                    float* y) CELLSTEP_NONBLOCKING;

/** Puts the state to the initial one, zero or learned. */
CELLSTEP_API cellstep_status cellstep_session_reset(cellstep_session* session) CELLSTEP_NONBLOCKING;

/** Copies the state out: h (num_layers, h_size) and c (num_layers, hidden_size). */
CELLSTEP_API cellstep_status cellstep_session_get_state(const cellstep_session* session, float* h,
                                                        float* c) CELLSTEP_NONBLOCKING;

/** Copies a state in: h (num_layers, h_size) and c (num_layers, hidden_size). */
CELLSTEP_API cellstep_status cellstep_session_set_state(cellstep_session* session, const float* h,
                                                        const float* c) CELLSTEP_NONBLOCKING;

/**
 * Goes on with another model, which must outlive the session then; the one before may go. The state stays, the initial
 * one becomes the new model's, and a sliding window begins anew. CELLSTEP_ERROR_SHAPE, and nothing changes, unless both
 * have the same sizes of input, output and state, and the same dense and LSTM layers in the same order: in sizes, in
 * how weights are stored, and in options other than activations and whether an initial state is learned.
 */
CELLSTEP_API cellstep_status cellstep_session_swap_model(cellstep_session* session,
                                                         const cellstep_model* model) CELLSTEP_NONBLOCKING;

/**
 * Replays the test vector that lies in the file, in this session, which it resets. *error, if not null, receives the
 * largest difference, in the output's units. CELLSTEP_OK also for a file without a test vector, with *error set to -1.
 * Errors: CELLSTEP_ERROR_SELFTEST; those of cellstep_session_run.
 */
CELLSTEP_API cellstep_status cellstep_session_selftest(cellstep_session* session, float* error) CELLSTEP_NONBLOCKING;

/* Pools */

/**
 * Bytes of memory for a pool of so many streams, 1 to 2^24. 0 for a null model, a bidirectional one, another number of
 * streams, or where the sum would not fit a size_t.
 */
CELLSTEP_API size_t cellstep_pool_memory_required(const cellstep_model* model, size_t streams);

/**
 * Makes a pool of streams in the initial state, zero or learned, in the caller's memory: `memory_size` bytes, aligned
 * to 8, at least cellstep_pool_memory_required. The memory and the model must outlive the pool, which belongs to one
 * thread at a time. Errors: CELLSTEP_ERROR_BIDIRECTIONAL; CELLSTEP_ERROR_ARGUMENT for another number of streams;
 * CELLSTEP_ERROR_MEMORY for too little of it; CELLSTEP_ERROR_ALIGNMENT.
 */
CELLSTEP_API cellstep_status cellstep_pool_init(const cellstep_model* model, size_t streams, void* memory,
                                                size_t memory_size, cellstep_pool** pool);

#if !defined(CELLSTEP_NO_HEAP)
/** The same with memory from the heap. Of the later calls only cellstep_pool_set_parallel allocates. */
CELLSTEP_API cellstep_status cellstep_pool_create(const cellstep_model* model, size_t streams, cellstep_pool** pool);

/**
 * Destroys a pool; null is allowed. One in the caller's memory needs it only after cellstep_pool_set_parallel, whose
 * memory it frees.
 */
CELLSTEP_API void cellstep_pool_destroy(cellstep_pool* pool);
#endif

/**
 * Moves every stream one time step: x (streams, input_size) in, y (streams, output_size) out. Where reset[stream] is
 * not 0 its state is put to the initial one first; `reset` (streams) may be null. To the bit what cellstep_session_step
 * gives in as many sessions.
 */
CELLSTEP_API cellstep_status cellstep_pool_step(cellstep_pool* pool, const float* x, const unsigned char* reset,
                                                float* y) CELLSTEP_NONBLOCKING;

/** Puts every stream to the initial state. For some of them alone cellstep_pool_step takes a mask. */
CELLSTEP_API cellstep_status cellstep_pool_reset(cellstep_pool* pool) CELLSTEP_NONBLOCKING;

/**
 * Copies the state of one stream out: h (num_layers, h_size) and c (num_layers, hidden_size). CELLSTEP_ERROR_ARGUMENT
 * for a stream that is not there.
 */
CELLSTEP_API cellstep_status cellstep_pool_get_state(const cellstep_pool* pool, size_t stream, float* h,
                                                     float* c) CELLSTEP_NONBLOCKING;

/** Copies a state in, likewise: that of a session, or of a stream of another pool of this model. */
CELLSTEP_API cellstep_status cellstep_pool_set_state(cellstep_pool* pool, size_t stream, const float* h,
                                                     const float* c) CELLSTEP_NONBLOCKING;

#if !defined(CELLSTEP_NO_HEAP)
/* Threads */

/** Part of a call's work: one of `count` tasks, which never wait for each other. */
typedef void (*cellstep_task)(void* argument, size_t index);

/**
 * The caller's threads: calls task(argument, index) once for each index below count, at once or one after the other, in
 * any order and on any threads, and returns when all are done. Must not throw or return early.
 */
typedef void (*cellstep_run_tasks)(void* context, size_t count, cellstep_task task, void* argument);

/**
 * Lets the calls of a session share their work between `threads` threads, where there is enough of it: layers as a
 * wavefront in long runs, directions side by side, units of large layers. The numbers stay the same to the bit. `run`
 * is called with `context` from within calls of this session, on the thread that makes them; null ends the sharing.
 * Memory for all threads is allocated here. CELLSTEP_ERROR_ARGUMENT for 0 threads; CELLSTEP_ERROR_MEMORY.
 */
CELLSTEP_API cellstep_status cellstep_session_set_parallel(cellstep_session* session, size_t threads, void* context,
                                                           cellstep_run_tasks run);

/** The same for a pool: each thread takes a share of the streams, or of the units of large layers. */
CELLSTEP_API cellstep_status cellstep_pool_set_parallel(cellstep_pool* pool, size_t threads, void* context,
                                                        cellstep_run_tasks run);
#endif

#ifdef __cplusplus
}
#endif

#endif
