/* Runs a model through the C API in every way there is and writes the answers as raw float32, one section after the
 * other; models.py does the same in Python. All memory of models and sessions is the program's own. */
#include <cellstep/runtime.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK = 7, RESET_EVERY = 5, WINDOW = 4, STREAMS = 3 };

static FILE* answers;

static void fail(const char* what, const char* why) {
    fprintf(stderr, "error: %s: %s\n", what, why);
    exit(1);
}

static void check(cellstep_status status, const char* what) {
    if (status != CELLSTEP_OK) fail(what, cellstep_status_text(status));
}

/* Memory at a cache line, which the model's bytes are best aligned to; it is never given back. */
static void* reserve(size_t size) {
    char* memory = malloc(size + 64);
    if (!memory) fail("memory", "too little for this model");
    return memory + (64 - (size_t)memory % 64) % 64;
}

static void* read_file(const char* path, size_t* size) {
    FILE* file = fopen(path, "rb");
    if (!file || fseek(file, 0, SEEK_END)) fail(path, "cannot be opened");
    *size = (size_t)ftell(file);
    void* data = reserve(*size + 1);
    rewind(file);
    if (fread(data, 1, *size, file) != *size) fail(path, "cannot be read");
    fclose(file);
    return data;
}

static void answer(const float* values, size_t count) {
    if (fwrite(values, sizeof(float), count, answers) != count) fail("answers", "cannot be written");
}

static cellstep_model* load(const void* data, size_t size) {
    cellstep_model* model = NULL;
    check(cellstep_model_init(reserve(CELLSTEP_MODEL_BYTES), CELLSTEP_MODEL_BYTES, data, size, 0, &model), "model");
    return model;
}

static cellstep_session* start(const cellstep_model* model, size_t steps) {
    cellstep_session* session = NULL;
    const size_t size = cellstep_memory_required_for(model, steps);
    check(cellstep_session_init_for(model, steps, reserve(size), size, &session), "session");
    return session;
}

/* STREAMS streams of which each is behind the one before it by a step, each begun anew at places of its own. */
static void run_pool(const cellstep_model* model, const float* x, size_t steps, float* y, size_t inputs,
                     size_t outputs) {
    cellstep_pool* pool = NULL;
    const size_t size = cellstep_pool_memory_required(model, STREAMS);
    float* rows = reserve(STREAMS * inputs * sizeof(float));
    unsigned char reset[STREAMS];
    if (!size) return; /* a bidirectional model, which has no answer step by step */
    check(cellstep_pool_init(model, STREAMS, reserve(size), size, &pool), "pool");
    for (size_t step = 0; step < steps; ++step) {
        for (size_t stream = 0; stream < STREAMS; ++stream) {
            memcpy(rows + stream * inputs, x + (step + stream) % steps * inputs, inputs * sizeof(float));
            reset[stream] = (step + stream) % RESET_EVERY == 3;
        }
        check(cellstep_pool_step(pool, rows, reset, y), "pool");
        answer(y, STREAMS * outputs);
    }
}

static void run(const char* model_path, const char* input_path) {
    size_t size;
    const void* data = read_file(model_path, &size);
    cellstep_model* model = load(data, size);
    cellstep_model_info info;
    check(cellstep_model_get_info(model, &info), "info");
    const size_t inputs = info.input_size;
    const size_t outputs = info.output_size;
    float* x = read_file(input_path, &size);
    const size_t steps = size / sizeof(float) / inputs;
    float* y = reserve((steps + STREAMS) * outputs * sizeof(float));
    cellstep_session* session = start(model, steps);
    check(cellstep_session_selftest(session, NULL), "self-test");

    for (size_t step = 0; step < steps; ++step)
        check(cellstep_session_step(session, x + step * inputs, y + step * outputs), "step");
    answer(y, steps * outputs);
    float* state = reserve(info.num_layers * (info.h_size + info.hidden_size) * sizeof(float));
    check(cellstep_session_get_state(session, state, state + info.num_layers * info.h_size), "state");
    answer(state, info.num_layers * (info.h_size + info.hidden_size));

    cellstep_session_reset(session);
    for (size_t step = 0; step < steps; step += CHUNK)
        check(cellstep_session_run(session, x + step * inputs, steps - step < CHUNK ? steps - step : CHUNK,
                                   y + step * outputs),
              "run");
    answer(y, steps * outputs);

    unsigned char* reset = reserve(steps);
    for (size_t step = 0; step < steps; ++step) reset[step] = step % RESET_EVERY == 3;
    cellstep_session_reset(session);
    check(cellstep_session_run_reset(session, x, reset, steps, y), "run with resets");
    answer(y, steps * outputs);

    cellstep_session_reset(session);
    check(cellstep_session_forecast(session, x, steps, y), "forecast");
    answer(y, outputs);

    const size_t slide_size = cellstep_slide_memory_required(model, WINDOW);
    check(cellstep_session_slide_init(session, WINDOW, reserve(slide_size), slide_size), "sliding window");
    for (size_t step = 0; step < steps; ++step) {
        const cellstep_status status = cellstep_session_slide(session, x + step * inputs, y);
        if (status == CELLSTEP_PENDING) continue;
        check(status, "sliding window");
        answer(y, outputs);
    }
    run_pool(model, x, steps, y, inputs, outputs);
}

int main(int argc, char** argv) {
    if (argc < 4 || argc % 3 != 1) {
        fprintf(stderr, "usage: %s [MODEL.cellstep INPUT ANSWERS]...\n", argv[0]);
        return 2;
    }
    for (int job = 1; job < argc; job += 3) {
        answers = fopen(argv[job + 2], "wb");
        if (!answers) fail(argv[job + 2], "cannot be opened");
        run(argv[job], argv[job + 1]);
        if (fclose(answers)) fail(argv[job + 2], "cannot be written");
    }
    printf("%s\n", cellstep_instruction_set());
    return 0;
}
