/* Bytes of memory that a model wants for 2^24 steps, for a pool of 2^24 streams and for one step, one a line; 0 is more
 * than a size_t can say. */
#include <stdio.h>
#include <stdlib.h>

#include "cellstep/runtime.h"

int main(int argc, char** argv) {
    cellstep_model* model;
    cellstep_session* session;
    const size_t most = (size_t)1 << 24;
    if (argc != 2 || cellstep_model_load_file(argv[1], &model) != CELLSTEP_OK) return 1;
    printf("%llu\n", (unsigned long long)cellstep_memory_required_for(model, most));
    printf("%llu\n", (unsigned long long)cellstep_pool_memory_required(model, most));
    printf("%llu\n", (unsigned long long)cellstep_memory_required_for(model, 1));
    if (cellstep_memory_required_for(model, most) == 0) {
        void* memory = malloc(1 << 20);
        if (cellstep_session_init_for(model, most, memory, 1 << 20, &session) != CELLSTEP_ERROR_MEMORY) return 1;
        free(memory);
    }
    cellstep_model_destroy(model);
    return 0;
}
