// The loader on any bytes: they are refused with a reason, or make a model of which every call works.
#include <cstddef>
#include <string>

#include "cellstep/runtime.h"
#include "deploy_file.h"
#include "support.h"

using fuzz::Bytes;
using fuzz::Memory;

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace {

/// What a session of a small file may ask for before it is made for single steps.
constexpr std::size_t most_memory = std::size_t{1} << 26;

bool is_status(cellstep_status status) { return status >= CELLSTEP_OK && status <= CELLSTEP_ERROR_NEWER; }

void check_names(const cellstep_model* model, const char* (*name)(const cellstep_model*, std::size_t),
                 std::size_t count) {
    std::size_t at = 0;
    std::size_t letters = 0;
    while (const char* text = name(model, at)) {
        letters += std::string(text).size();
        ++at;
    }
    FUZZ_CHECK(at == 0 || at == count);
    FUZZ_CHECK(name(model, count) == nullptr && name(model, SIZE_MAX) == nullptr);
    FUZZ_CHECK(letters < SIZE_MAX);
}

void use_session(const cellstep_model* model, cellstep_session* session) {
    cellstep_model_info info;
    FUZZ_CHECK(cellstep_model_get_info(model, &info) == CELLSTEP_OK);
    constexpr std::size_t steps = 3;
    std::vector<float> x(steps * info.input_size, 0.5f);
    std::vector<float> y(steps * info.output_size);
    FUZZ_CHECK(cellstep_session_step(session, x.data(), y.data()) == CELLSTEP_OK);
    const cellstep_status ran = cellstep_session_run(session, x.data(), steps, y.data());
    FUZZ_CHECK(ran == CELLSTEP_OK || ran == CELLSTEP_ERROR_STEPS || ran == CELLSTEP_ERROR_MEMORY);
    FUZZ_CHECK(cellstep_session_forecast(session, x.data(), steps, y.data()) == ran);
    std::vector<float> h(std::size_t{info.num_layers} * info.h_size);
    std::vector<float> c(std::size_t{info.num_layers} * info.hidden_size);
    FUZZ_CHECK(cellstep_session_get_state(session, h.data(), c.data()) == CELLSTEP_OK);
    FUZZ_CHECK(cellstep_session_set_state(session, h.data(), c.data()) == CELLSTEP_OK);
    FUZZ_CHECK(cellstep_session_reset(session) == CELLSTEP_OK);
    const std::size_t window = cellstep_slide_memory_required(model, 2);
    if (window == 0 || window > most_memory) return;
    Memory slots(window);
    if (cellstep_session_slide_init(session, 2, slots.data(), window) != CELLSTEP_OK) return;
    FUZZ_CHECK(cellstep_session_slide(session, x.data(), y.data()) == CELLSTEP_PENDING);
    for (int step = 0; step < 3; ++step) FUZZ_CHECK(cellstep_session_slide(session, x.data(), y.data()) == CELLSTEP_OK);
}

void use_pool(const cellstep_model* model) {
    cellstep_model_info info;
    FUZZ_CHECK(cellstep_model_get_info(model, &info) == CELLSTEP_OK);
    constexpr std::size_t streams = 5;
    const std::size_t bytes = cellstep_pool_memory_required(model, streams);
    if (bytes == 0 || bytes > most_memory) return;
    Memory memory(bytes);
    cellstep_pool* pool = nullptr;
    FUZZ_CHECK(cellstep_pool_init(model, streams, memory.data(), bytes, &pool) == CELLSTEP_OK);
    std::vector<float> x(streams * info.input_size, -0.25f);
    std::vector<float> y(streams * info.output_size);
    for (int step = 0; step < 2; ++step)
        FUZZ_CHECK(cellstep_pool_step(pool, x.data(), nullptr, y.data()) == CELLSTEP_OK);
}

void use(const cellstep_model* model) {
    cellstep_model_info info;
    FUZZ_CHECK(cellstep_model_get_info(model, &info) == CELLSTEP_OK);
    FUZZ_CHECK(info.input_size > 0 && info.output_size > 0 && info.num_layers > 0);
    FUZZ_CHECK(info.hidden_size > 0 && info.h_size > 0 && info.answers <= 2);
    FUZZ_CHECK(cellstep_model_weights(model) != nullptr);
    check_names(model, cellstep_model_feature_name, info.input_size);
    check_names(model, cellstep_model_output_name, info.output_size);
    const std::size_t whole = cellstep_memory_required(model);
    if (whole > 0 && whole <= most_memory) {
        float error = 0.0f;
        const cellstep_status tested = cellstep_model_selftest(model, &error);
        FUZZ_CHECK(tested == CELLSTEP_OK || tested == CELLSTEP_ERROR_SELFTEST);
        cellstep_session* session = nullptr;
        FUZZ_CHECK(cellstep_session_create(model, &session) == CELLSTEP_OK);
        use_session(model, session);
        cellstep_session_destroy(session);
    }
    const std::size_t bytes = cellstep_memory_required_for(model, 1);
    FUZZ_CHECK(bytes > 0);
    if (bytes <= most_memory) {
        Memory memory(bytes, 8);
        cellstep_session* session = nullptr;
        FUZZ_CHECK(cellstep_session_init_for(model, 1, memory.data(), bytes, &session) == CELLSTEP_OK);
        use_session(model, session);
    }
    use_pool(model);
}

void load(const std::uint8_t* data, std::size_t size) {
    cellstep_model* model = nullptr;
    const cellstep_status status = cellstep_model_load_memory(data, size, &model);
    FUZZ_CHECK(is_status(status) && cellstep_status_text(status) != nullptr);
    FUZZ_CHECK((status == CELLSTEP_OK) == (model != nullptr));
    if (model) use(model);
    cellstep_model_destroy(model);

    // In place, with a handle that needs no heap, and with weights of any value.
    Memory file(data, size);
    Memory handle(CELLSTEP_MODEL_BYTES);
    for (const unsigned options : {0u, unsigned{CELLSTEP_ALLOW_NONFINITE}}) {
        cellstep_model* placed = nullptr;
        const cellstep_status again =
            cellstep_model_init(handle.data(), CELLSTEP_MODEL_BYTES, file.data(), size, options, &placed);
        if (options == 0) {
            FUZZ_CHECK(again == status);
            continue;
        }
        FUZZ_CHECK(again == (status == CELLSTEP_ERROR_NONFINITE ? again : status));
        FUZZ_CHECK((again == CELLSTEP_OK) == (placed != nullptr));
        if (placed && status != CELLSTEP_OK) use(placed);
    }
}

/// Values that make trouble in a field.
std::uint32_t troublesome(std::uint32_t random, std::uint32_t old) {
    switch (random % 8) {
        case 0:
            return old + 1;
        case 1:
            return old - 1;
        case 2:
            return random >> 8 & 15;
        case 3:
            return 1u << (random >> 8 & 31);
        case 4:
            return (1u << (random >> 8 & 31)) - 1;
        case 5:
            return old ^ 1u << (random >> 8 & 31);
        case 6:
            return random >> 8 & 63;
        default:
            return random * 2654435761u;
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    load(data, size);
    return 0;
}

/// Changes fields, records or bytes, and mends what no change of bytes would find: the checksum almost always, and
/// often lengths, offsets and sizes that must agree.
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
    std::uint32_t state = seed * 2654435761u + 12345u;
    const auto random = [&state] {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        return state;
    };
    const unsigned way = random() % 8;
    if (way < 3 || size < fuzz::header_size) {
        size = LLVMFuzzerMutate(data, size, max_size);
        if (way == 1 && size >= 24) fuzz::put<std::uint64_t>(data + 16, size);
        if (way != 0) fuzz::fix_checksum(data, size);
        return size;
    }
    if (way == 3) {
        const std::size_t records = fuzz::get<std::uint32_t>(data + 24);
        std::size_t fields = (fuzz::header_size + fuzz::record_size * (records < 16 ? records : 16)) / 4;
        if (fields > size / 4) fields = size / 4;
        for (unsigned count = 1 + random() % 2; count > 0; --count) {
            std::uint8_t* field = data + 4 * (random() % fields);
            fuzz::put<std::uint32_t>(field, troublesome(random(), fuzz::get<std::uint32_t>(field)));
        }
        fuzz::fix_checksum(data, size);
        return size;
    }
    fuzz::DeployFile file(data, size);
    auto& records = file.records;
    for (unsigned count = 1 + random() % 3; count > 0; --count) {
        const std::size_t at = records.empty() ? 0 : random() % records.size();
        const unsigned change = records.empty() ? 6 : random() % 8;
        if (change == 0) {
            records.erase(records.begin() + static_cast<std::ptrdiff_t>(at));
        } else if (change == 1 && records.size() < 12) {
            records.insert(records.begin() + static_cast<std::ptrdiff_t>(at), fuzz::Record(records[at]));
        } else if (change == 2) {
            std::swap(records[at], records[random() % records.size()]);
        } else if (change == 3 && !records[at].data.empty()) {
            Bytes& content = records[at].data;
            const std::size_t limit = content.size() + 64;
            const std::size_t old = content.size();
            content.resize(limit);
            content.resize(LLVMFuzzerMutate(content.data(), old, limit));
        } else if (change < 6 && !records.empty()) {
            std::uint32_t& field = records[at].fields[random() % 8];
            field = troublesome(random(), field);
        } else {
            std::uint8_t* field = file.header + 28 + 4 * (random() % 9);
            fuzz::put<std::uint32_t>(field, troublesome(random(), fuzz::get<std::uint32_t>(field)));
        }
    }
    if (random() % 4 != 0) file.agree();
    for (fuzz::Record& record : records) fuzz::fix_int8(record);
    const Bytes made = file.assembled();
    if (made.size() > max_size) return LLVMFuzzerMutate(data, size, max_size);
    std::memcpy(data, made.data(), made.size());
    return made.size();
}
