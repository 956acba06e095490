/* Runs a deploy file with the amalgamated pair: amalgamated MODEL < inputs > outputs, both raw float32. */
#include <stdio.h>

#include "cellstep.h"

static uint64_t file[1 << 17];
static uint64_t handle[CELLSTEP_MODEL_BYTES / 8];
static uint64_t memory[1 << 15];

int main(int count, char** arguments) {
    cellstep_model* model = NULL;
    cellstep_session* session = NULL;
    cellstep_model_info info;
    float x[64];
    float y[64];
    FILE* source = count == 2 ? fopen(arguments[1], "rb") : NULL;
    if (!source) return 2;
    const size_t size = fread(file, 1, sizeof(file), source);
    fclose(source);
    cellstep_status status = cellstep_model_init(handle, sizeof(handle), file, size, 0, &model);
    if (status == CELLSTEP_OK) status = cellstep_session_init(model, memory, sizeof(memory), &session);
    float error = 0.0f;
    if (status == CELLSTEP_OK) status = cellstep_session_selftest(session, &error);
    if (status == CELLSTEP_OK) status = cellstep_model_get_info(model, &info);
    if (status != CELLSTEP_OK) {
        fprintf(stderr, "%d %s\n", (int)status, cellstep_status_text(status));
        return 1;
    }
    while (fread(x, sizeof(float), info.input_size, stdin) == info.input_size) {
        status = cellstep_session_step(session, x, y);
        if (status != CELLSTEP_OK) return 1;
        fwrite(y, sizeof(float), info.output_size, stdout);
    }
    return 0;
}
