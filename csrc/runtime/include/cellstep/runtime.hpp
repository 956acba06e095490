/// cellstep/runtime.hpp: cellstep/runtime.h for C++17, with owners instead of handles and views instead of pointers.
///
///     using namespace cellstep::runtime;
///     Model model;
///     Session session;
///     check(model.load("m.cellstep"));
///     check(session.create(model));
///     check(session.step(x, y));  // x and y: std::vector<float>, std::array, std::span, an array, or {data, size}
///
/// Every call gives a status, as in C, and is documented there. `check` throws it, where exceptions are enabled; who
/// wants none looks at the status. On top of what C refuses, a view of another size than the call wants is
/// CELLSTEP_ERROR_ARGUMENT. A call of a Model, Session or Pool that is empty is CELLSTEP_ERROR_ARGUMENT too.
#ifndef CELLSTEP_RUNTIME_HPP
#define CELLSTEP_RUNTIME_HPP

#include <cstddef>
#include <type_traits>
#include <utility>

#include "cellstep/runtime.h"

#if defined(__cpp_exceptions) || defined(_CPPUNWIND)
#define CELLSTEP_EXCEPTIONS 1
#include <exception>
#endif

namespace cellstep {
namespace runtime {

/// Values one behind the other that another owns, as std::span. Made of whatever has data() and size(), or of an array.
template <class T>
class View {
public:
    constexpr View() = default;
    constexpr View(T* data, std::size_t size) : data_(data), size_(size) {}
    template <std::size_t Size>
    constexpr View(T (&array)[Size]) : data_(array), size_(Size) {}
    template <class Range,
              class = std::enable_if_t<std::is_convertible_v<decltype(std::declval<Range&>().data()), T*> &&
                                       std::is_convertible_v<decltype(std::declval<Range&>().size()), std::size_t>>>
    constexpr View(Range&& range) : data_(range.data()), size_(range.size()) {}

    constexpr T* data() const { return data_; }
    constexpr std::size_t size() const { return size_; }

private:
    T* data_ = nullptr;
    std::size_t size_ = 0;
};

#if defined(CELLSTEP_EXCEPTIONS)
/// A status other than CELLSTEP_OK; what() is its text.
class Error : public std::exception {
public:
    explicit Error(cellstep_status status) : status_(status) {}
    const char* what() const noexcept override { return cellstep_status_text(status_); }
    cellstep_status status() const noexcept { return status_; }

private:
    cellstep_status status_;
};

/// Throws Error unless the status is CELLSTEP_OK.
inline void check(cellstep_status status) {
    if (status != CELLSTEP_OK) throw Error(status);
}
#endif

namespace detail {

/// A handle that is destroyed with its owner, and moves with it.
template <class Handle>
class Owner {
public:
    Owner() = default;
    Owner(Owner&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
    Owner& operator=(Owner&& other) noexcept {
        if (this != &other) destroy(std::exchange(handle_, std::exchange(other.handle_, nullptr)));
        return *this;
    }
    ~Owner() { destroy(handle_); }

    Handle* get() const noexcept { return handle_; }
    explicit operator bool() const noexcept { return handle_ != nullptr; }

protected:
    /// Takes over what make(Handle**) makes, in place of what was there. Nothing changes if it fails.
    template <class Make>
    cellstep_status take(Make make) noexcept {
        Handle* made = nullptr;
        const cellstep_status status = make(&made);
        if (status == CELLSTEP_OK) destroy(std::exchange(handle_, made));
        return status;
    }

private:
#if defined(CELLSTEP_NO_HEAP)
    static void destroy(Handle*) noexcept {}
#else
    static void destroy(cellstep_model* model) noexcept { cellstep_model_destroy(model); }
    static void destroy(cellstep_session* session) noexcept { cellstep_session_destroy(session); }
    static void destroy(cellstep_pool* pool) noexcept { cellstep_pool_destroy(pool); }
#endif

    Handle* handle_ = nullptr;
};

inline cellstep_model_info info_of(const cellstep_model* model) noexcept {
    cellstep_model_info info{};
    cellstep_model_get_info(model, &info);
    return info;
}

/// How many values of h and c a stream has.
inline bool is_state(const cellstep_model_info& info, std::size_t h, std::size_t c) noexcept {
    return h == std::size_t{info.num_layers} * info.h_size && c == std::size_t{info.num_layers} * info.hidden_size;
}

}  // namespace detail

using Bytes = View<const unsigned char>;
using Memory = View<unsigned char>;

/// A checked deploy file. It must outlive its sessions and pools; moving it does no harm to them.
class Model : public detail::Owner<cellstep_model> {
public:
    /// In the caller's memory: see cellstep_model_init.
    [[nodiscard]] cellstep_status init(Memory memory, Bytes file, unsigned options = 0) noexcept {
        return take([&](cellstep_model** made) {
            return cellstep_model_init(memory.data(), memory.size(), file.data(), file.size(), options, made);
        });
    }

#if !defined(CELLSTEP_NO_HEAP)
    /// A copy of a file: see cellstep_model_load_file.
    [[nodiscard]] cellstep_status load(const char* path) noexcept {
        return take([&](cellstep_model** made) { return cellstep_model_load_file(path, made); });
    }
    /// A file mapped into memory: see cellstep_model_map_file.
    [[nodiscard]] cellstep_status map(const char* path, unsigned options = 0) noexcept {
        return take([&](cellstep_model** made) { return cellstep_model_map_file(path, options, made); });
    }
    /// A copy of a file's bytes: see cellstep_model_load_memory.
    [[nodiscard]] cellstep_status load(Bytes file) noexcept {
        return take([&](cellstep_model** made) { return cellstep_model_load_memory(file.data(), file.size(), made); });
    }
    /// A file's bytes where they lie: see cellstep_model_load_in_place.
    [[nodiscard]] cellstep_status load_in_place(Bytes file) noexcept {
        return take(
            [&](cellstep_model** made) { return cellstep_model_load_in_place(file.data(), file.size(), made); });
    }
    [[nodiscard]] cellstep_status selftest(float* error = nullptr) const noexcept {
        return cellstep_model_selftest(get(), error);
    }
#endif

    /// All zero for an empty model.
    cellstep_model_info info() const noexcept { return detail::info_of(get()); }
    const char* weights() const noexcept { return cellstep_model_weights(get()); }
    const char* feature_name(std::size_t index) const noexcept { return cellstep_model_feature_name(get(), index); }
    const char* output_name(std::size_t index) const noexcept { return cellstep_model_output_name(get(), index); }

    /// Bytes for Session::init, for Session::slide_init and for Pool::init.
    std::size_t session_memory(std::size_t steps = 0) const noexcept {
        return cellstep_memory_required_for(get(), steps);
    }
    std::size_t slide_memory(std::size_t window = 0) const noexcept {
        return cellstep_slide_memory_required(get(), window);
    }
    std::size_t pool_memory(std::size_t streams) const noexcept {
        return cellstep_pool_memory_required(get(), streams);
    }
};

/// One stream through a model, with its state.
class Session : public detail::Owner<cellstep_session> {
public:
    /// In the caller's memory: see cellstep_session_init_for.
    [[nodiscard]] cellstep_status init(const Model& model, Memory memory, std::size_t steps = 0) noexcept {
        return begin(model, [&](cellstep_session** made) {
            return cellstep_session_init_for(model.get(), steps, memory.data(), memory.size(), made);
        });
    }

#if !defined(CELLSTEP_NO_HEAP)
    [[nodiscard]] cellstep_status create(const Model& model) noexcept {
        return begin(model, [&](cellstep_session** made) { return cellstep_session_create(model.get(), made); });
    }
    [[nodiscard]] cellstep_status slide_begin(std::size_t window = 0) noexcept {
        return cellstep_session_slide_begin(get(), window);
    }
    [[nodiscard]] cellstep_status set_parallel(std::size_t threads, void* context, cellstep_run_tasks run) noexcept {
        return cellstep_session_set_parallel(get(), threads, context, run);
    }
#endif

    /// x (input_size), y (output_size).
    [[nodiscard]] cellstep_status step(View<const float> x, View<float> y) noexcept CELLSTEP_NONBLOCKING {
        if (x.size() != info_.input_size || y.size() != info_.output_size) return CELLSTEP_ERROR_ARGUMENT;
        return cellstep_session_step(get(), x.data(), y.data());
    }
    /// x (steps, input_size), y (steps, output_size); `reset` (steps) or nothing.
    [[nodiscard]] cellstep_status run(View<const float> x, View<float> y,
                                      Bytes reset = {}) noexcept CELLSTEP_NONBLOCKING {
        const std::size_t steps = get() ? x.size() / info_.input_size : 0;
        if (!is_sequence(x, steps) || y.size() != steps * info_.output_size || (reset.data() && reset.size() != steps))
            return CELLSTEP_ERROR_ARGUMENT;
        return cellstep_session_run_reset(get(), x.data(), reset.data(), steps, y.data());
    }
    /// x (steps, input_size), y (output_size).
    [[nodiscard]] cellstep_status forecast(View<const float> x, View<float> y) noexcept CELLSTEP_NONBLOCKING {
        const std::size_t steps = get() ? x.size() / info_.input_size : 0;
        if (!is_sequence(x, steps) || y.size() != info_.output_size) return CELLSTEP_ERROR_ARGUMENT;
        return cellstep_session_forecast(get(), x.data(), steps, y.data());
    }
    [[nodiscard]] cellstep_status slide_init(Memory memory, std::size_t window = 0) noexcept {
        return cellstep_session_slide_init(get(), window, memory.data(), memory.size());
    }
    /// x (input_size), y (output_size); CELLSTEP_PENDING until the window is full.
    [[nodiscard]] cellstep_status slide(View<const float> x, View<float> y) noexcept CELLSTEP_NONBLOCKING {
        if (x.size() != info_.input_size || y.size() != info_.output_size) return CELLSTEP_ERROR_ARGUMENT;
        return cellstep_session_slide(get(), x.data(), y.data());
    }
    cellstep_status reset() noexcept CELLSTEP_NONBLOCKING { return cellstep_session_reset(get()); }
    /// h (num_layers, h_size), c (num_layers, hidden_size).
    [[nodiscard]] cellstep_status get_state(View<float> h, View<float> c) const noexcept CELLSTEP_NONBLOCKING {
        if (!detail::is_state(info_, h.size(), c.size())) return CELLSTEP_ERROR_ARGUMENT;
        return cellstep_session_get_state(get(), h.data(), c.data());
    }
    [[nodiscard]] cellstep_status set_state(View<const float> h, View<const float> c) noexcept CELLSTEP_NONBLOCKING {
        if (!detail::is_state(info_, h.size(), c.size())) return CELLSTEP_ERROR_ARGUMENT;
        return cellstep_session_set_state(get(), h.data(), c.data());
    }
    [[nodiscard]] cellstep_status swap_model(const Model& model) noexcept CELLSTEP_NONBLOCKING {
        return cellstep_session_swap_model(get(), model.get());
    }
    [[nodiscard]] cellstep_status selftest(float* error = nullptr) noexcept CELLSTEP_NONBLOCKING {
        return cellstep_session_selftest(get(), error);
    }

private:
    template <class Make>
    cellstep_status begin(const Model& model, Make make) noexcept {
        const cellstep_status status = take(make);
        if (status == CELLSTEP_OK) info_ = model.info();
        return status;
    }
    bool is_sequence(View<const float> x, std::size_t steps) const noexcept CELLSTEP_NONBLOCKING {
        return x.size() == steps * info_.input_size;
    }

    cellstep_model_info info_{};
};

/// Many streams through a model that move together.
class Pool : public detail::Owner<cellstep_pool> {
public:
    /// In the caller's memory: see cellstep_pool_init.
    [[nodiscard]] cellstep_status init(const Model& model, std::size_t streams, Memory memory) noexcept {
        return begin(model, streams, [&](cellstep_pool** made) {
            return cellstep_pool_init(model.get(), streams, memory.data(), memory.size(), made);
        });
    }

#if !defined(CELLSTEP_NO_HEAP)
    [[nodiscard]] cellstep_status create(const Model& model, std::size_t streams) noexcept {
        return begin(model, streams,
                     [&](cellstep_pool** made) { return cellstep_pool_create(model.get(), streams, made); });
    }
    [[nodiscard]] cellstep_status set_parallel(std::size_t threads, void* context, cellstep_run_tasks run) noexcept {
        return cellstep_pool_set_parallel(get(), threads, context, run);
    }
#endif

    /// x (streams, input_size), y (streams, output_size); `reset` (streams) or nothing.
    [[nodiscard]] cellstep_status step(View<const float> x, View<float> y,
                                       Bytes reset = {}) noexcept CELLSTEP_NONBLOCKING {
        if (x.size() != streams_ * info_.input_size || y.size() != streams_ * info_.output_size ||
            (reset.data() && reset.size() != streams_))
            return CELLSTEP_ERROR_ARGUMENT;
        return cellstep_pool_step(get(), x.data(), reset.data(), y.data());
    }
    cellstep_status reset() noexcept CELLSTEP_NONBLOCKING { return cellstep_pool_reset(get()); }
    /// Of one stream: h (num_layers, h_size), c (num_layers, hidden_size).
    [[nodiscard]] cellstep_status get_state(std::size_t stream, View<float> h,
                                            View<float> c) const noexcept CELLSTEP_NONBLOCKING {
        if (!detail::is_state(info_, h.size(), c.size())) return CELLSTEP_ERROR_ARGUMENT;
        return cellstep_pool_get_state(get(), stream, h.data(), c.data());
    }
    [[nodiscard]] cellstep_status set_state(std::size_t stream, View<const float> h,
                                            View<const float> c) noexcept CELLSTEP_NONBLOCKING {
        if (!detail::is_state(info_, h.size(), c.size())) return CELLSTEP_ERROR_ARGUMENT;
        return cellstep_pool_set_state(get(), stream, h.data(), c.data());
    }
    std::size_t streams() const noexcept { return streams_; }

private:
    template <class Make>
    cellstep_status begin(const Model& model, std::size_t streams, Make make) noexcept {
        const cellstep_status status = take(make);
        if (status == CELLSTEP_OK) {
            info_ = model.info();
            streams_ = streams;
        }
        return status;
    }

    cellstep_model_info info_{};
    std::size_t streams_ = 0;
};

}  // namespace runtime
}  // namespace cellstep

#endif
