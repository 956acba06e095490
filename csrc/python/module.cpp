// The Python face of the torch-free runtime: NumPy arrays in and out, no tensors.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cellstep/runtime.h"
#include "core/kernels.h"
#include "core/layer.h"
#include "core/pack.h"
#include "threads.h"

namespace py = pybind11;
using cellstep::python::Threads;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

/// A deploy file that is refused.
struct ModelError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

std::string shape_text(const std::vector<py::ssize_t>& shape) {
    return py::str(py::tuple(py::cast(shape))).cast<std::string>();
}

/// A buffer of float32 values one behind the other, or no buffer.
class Buffer {
public:
    Buffer() = default;
    Buffer(const py::handle& value, int flags) {
        if (PyObject_GetBuffer(value.ptr(), &view_, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | flags) != 0) {
            PyErr_Clear();
            view_.obj = nullptr;
        } else if (!is_float(view_.format)) {
            PyBuffer_Release(&view_);
        }
    }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() {
        if (*this) PyBuffer_Release(&view_);
    }

    explicit operator bool() const { return view_.obj != nullptr; }
    float* data() const { return static_cast<float*>(view_.buf); }
    std::vector<py::ssize_t> shape() const { return {view_.shape, view_.shape + view_.ndim}; }

private:
    static bool is_float(const char* format) {
        if (!format) return false;
        const bool little = *format == '<' || *format == '=' || *format == '@';  // as all machines are that run this
        return std::strcmp(format + little, "f") == 0;
    }

    Py_buffer view_{};
};

Array<float> floats(const py::handle& value, const char* name) {
    Array<float> array = Array<float>::ensure(value);
    if (!array) {
        PyErr_Clear();
        throw py::type_error(std::string("expected numbers as ") + name + ", got " +
                             py::str(py::type::of(value)).cast<std::string>() + ": pass a NumPy array or a list");
    }
    return array;
}

void expect_shape(const std::vector<py::ssize_t>& got, const std::vector<py::ssize_t>& shape, const char* name) {
    if (got != shape)
        throw py::value_error(std::string("expected ") + name + " of shape " + shape_text(shape) + ", got " +
                              shape_text(got));
}

void expect_shape(const Array<float>& array, const std::vector<py::ssize_t>& shape, const char* name) {
    expect_shape(std::vector<py::ssize_t>(array.shape(), array.shape() + array.ndim()), shape, name);
}

/// What a call is fed: an array or buffer as it lies, or a copy. NumPy is imported for what is no buffer alone; of its
/// own arrays it makes views in less time than the buffer protocol takes.
class Input {
public:
    Input(const py::object& value, const char* name) : name_(name) {
        if (std::strcmp(Py_TYPE(value.ptr())->tp_name, "numpy.ndarray") != 0 && PyObject_CheckBuffer(value.ptr()))
            buffer_.emplace(value, PyBUF_SIMPLE);
        if (!buffer_ || !*buffer_) array_ = floats(value, name);
        shape_ =
            array_ ? std::vector<py::ssize_t>(array_->shape(), array_->shape() + array_->ndim()) : buffer_->shape();
    }

    const float* data() const { return array_ ? array_->data() : buffer_->data(); }
    const std::vector<py::ssize_t>& shape() const { return shape_; }
    void expect(const std::vector<py::ssize_t>& shape) const { expect_shape(shape_, shape, name_); }

private:
    const char* name_;
    std::optional<Buffer> buffer_;
    std::optional<Array<float>> array_;
    std::vector<py::ssize_t> shape_;
};

/// Where a call answers: a new array, or the caller's buffer.
class Output {
public:
    Output(const py::object& out, const std::vector<py::ssize_t>& shape) {
        if (out.is_none()) {
            Array<float> made(shape);
            data_ = made.mutable_data();
            object_ = std::move(made);
            return;
        }
        buffer_.emplace(out, PyBUF_WRITABLE);
        if (!*buffer_)
            throw py::type_error("expected out as a writable, C-contiguous buffer of float32, got " +
                                 py::str(py::type::of(out)).cast<std::string>() +
                                 ": pass a NumPy array of that kind, or leave it out");
        expect_shape(buffer_->shape(), shape, "out");
        data_ = buffer_->data();
        object_ = out;
    }

    float* data() const { return data_; }
    py::object object() const { return object_; }

private:
    std::optional<Buffer> buffer_;
    float* data_ = nullptr;
    py::object object_;
};

class Model {
public:
    static std::shared_ptr<Model> from_file(const std::string& path, bool allow_nonfinite) {
        cellstep_model* model = nullptr;
        cellstep_status status = CELLSTEP_OK;
        int error = 0;
        {
            py::gil_scoped_release release;  // a pipe may be written by another thread of this process
            errno = 0;
            status = cellstep_model_map_file(path.c_str(), options(allow_nonfinite), &model);
            error = errno;
        }
        if (status == CELLSTEP_ERROR_FILE) {
            errno = error;
            PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
            throw py::error_already_set();
        }
        return adopt(status, model, nullptr, "'" + path + "'");
    }

    static std::shared_ptr<Model> from_bytes(const py::bytes& data, bool allow_nonfinite) {
        char* bytes = nullptr;
        py::ssize_t size = 0;
        if (PyBytes_AsStringAndSize(data.ptr(), &bytes, &size) != 0) throw py::error_already_set();
        const std::size_t count = static_cast<std::size_t>(size);
        Block block(static_cast<unsigned char*>(::operator new(CELLSTEP_MODEL_BYTES + count, alignment)));
        std::memcpy(block.get() + CELLSTEP_MODEL_BYTES, bytes, count);
        cellstep_model* model = nullptr;
        const cellstep_status status =
            cellstep_model_init(block.get(), CELLSTEP_MODEL_BYTES, block.get() + CELLSTEP_MODEL_BYTES, count,
                                options(allow_nonfinite), &model);
        return adopt(status, model, std::move(block), "the bytes given");
    }

    Model(const Model&) = delete;
    Model& operator=(const Model&) = delete;
    ~Model() { cellstep_model_destroy(handle); }

    std::vector<std::string> names(const char* (*name)(const cellstep_model*, std::size_t)) const {
        std::vector<std::string> all;
        for (std::size_t at = 0; const char* text = name(handle, at); ++at) all.emplace_back(text);
        return all;
    }

    cellstep_model* handle;
    cellstep_model_info info{};

private:
    /// Where the weights begin at a cache line.
    static constexpr std::align_val_t alignment{64};
    struct Release {
        void operator()(unsigned char* memory) const { ::operator delete(memory, alignment); }
    };
    using Block = std::unique_ptr<unsigned char[], Release>;

    Model(cellstep_model* model, Block block) : handle(model), block_(std::move(block)) {
        cellstep_model_get_info(handle, &info);
    }

    static unsigned options(bool allow_nonfinite) { return allow_nonfinite ? CELLSTEP_ALLOW_NONFINITE : 0; }

    static std::shared_ptr<Model> adopt(cellstep_status status, cellstep_model* model, Block block,
                                        const std::string& what) {
        if (status == CELLSTEP_ERROR_MEMORY) throw std::bad_alloc();
        if (status != CELLSTEP_OK) throw ModelError("cannot load " + what + ": " + cellstep_status_text(status));
        return std::shared_ptr<Model>(new Model(model, std::move(block)));
    }

    Block block_;  // the handle and a copy of the bytes, unless the library has them
};

/// Taken by each call, so that two threads in one session are told so.
class Turn {
public:
    Turn(std::atomic<bool>& taken, const char* what) : taken_(taken) {
        if (taken_.exchange(true))
            throw std::runtime_error(std::string("this ") + what +
                                     " is in a call on another thread: expected one for each thread, which may share "
                                     "the model");
    }
    Turn(const Turn&) = delete;
    Turn& operator=(const Turn&) = delete;
    ~Turn() { taken_.store(false); }

private:
    std::atomic<bool>& taken_;
};

/// Threads of a session's or pool's own, or null for one thread.
std::unique_ptr<Threads, Threads::Release> make_threads(py::ssize_t threads) {
    constexpr py::ssize_t most = 1024;
    if (threads < 1 || threads > most)
        throw py::value_error("expected threads from 1 to " + std::to_string(most) + ", got " +
                              std::to_string(threads));
    return std::unique_ptr<Threads, Threads::Release>(threads > 1 ? new Threads(static_cast<std::size_t>(threads))
                                                                  : nullptr);
}

/// Flags that a state is to be reset, one for each of `count` steps or streams.
Array<bool> flags(const py::object& value, py::ssize_t count, const char* of_what) {
    Array<bool> mask = Array<bool>::ensure(value);
    if (!mask || mask.ndim() != 1 || mask.shape(0) != count) {
        PyErr_Clear();
        throw py::value_error("expected reset with one flag for each of the " + std::to_string(count) + " " + of_what);
    }
    return mask;
}

const unsigned char* bytes_of(const Array<bool>& mask) { return reinterpret_cast<const unsigned char*>(mask.data()); }

/// Shapes of a stream's state.
std::vector<py::ssize_t> h_shape(const Model& model) { return {model.info.num_layers, model.info.h_size}; }
std::vector<py::ssize_t> c_shape(const Model& model) { return {model.info.num_layers, model.info.hidden_size}; }

/// h and c as arrays of the right shapes.
std::pair<Array<float>, Array<float>> checked_state(const Model& model,
                                                    const std::pair<py::object, py::object>& state) {
    Array<float> h = floats(state.first, "h");
    Array<float> c = floats(state.second, "c");
    expect_shape(h, h_shape(model), "h");
    expect_shape(c, c_shape(model), "c");
    return {h, c};
}

class Session {
public:
    Session(std::shared_ptr<Model> shared, py::ssize_t threads)
        : model(std::move(shared)), threads_(make_threads(threads)) {
        if (cellstep_session_create(model->handle, &handle_) != CELLSTEP_OK) throw std::bad_alloc();
        const cellstep_status status =
            threads_ ? cellstep_session_set_parallel(handle_, threads_->threads(), threads_.get(), &Threads::run)
                     : CELLSTEP_OK;
        if (status == CELLSTEP_OK) return;
        cellstep_session_destroy(handle_);
        throw std::bad_alloc();
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
    ~Session() { cellstep_session_destroy(handle_); }

    py::object step(const py::object& value, const py::object& out) {
        const Input x(value, "x");
        x.expect({inputs()});
        return call(x, 1, {out, {outputs()}}, cellstep_session_run);
    }

    py::object run(const py::object& value, const std::optional<py::object>& reset, const py::object& out) {
        const Input x(value, "x");
        expect_sequence(x);
        const py::ssize_t count = x.shape()[0];
        if (!reset) return call(x, count, {out, {count, outputs()}}, cellstep_session_run);
        const Array<bool> mask = flags(*reset, count, "steps");
        const unsigned char* bytes = bytes_of(mask);
        return call(x, count, {out, {count, outputs()}},
                    [bytes](cellstep_session* session, const float* source, std::size_t steps, float* target) {
                        return cellstep_session_run_reset(session, source, bytes, steps, target);
                    });
    }

    py::object forecast(const py::object& value, const py::object& out) {
        const Input x(value, "x");
        expect_sequence(x);
        if (x.shape()[0] == 0) throw py::value_error("expected x with at least one step, got none");
        return call(x, x.shape()[0], {out, {outputs()}}, cellstep_session_forecast);
    }

    void start_slide(py::ssize_t window) {
        if (window < 0 || window > most_window)
            throw py::value_error("expected a window of 1 to " + std::to_string(most_window) + " steps, got " +
                                  std::to_string(window));
        if (window == 0) window = model->info.window;
        if (window == 0)
            throw py::value_error(
                "expected the steps of the window, as the model names none: call start_slide(T) first");
        const Turn turn(taken_, "session");
        if (cellstep_session_slide_begin(handle_, static_cast<std::size_t>(window)) != CELLSTEP_OK)
            throw std::bad_alloc();
        sliding_ = true;
    }

    py::object slide(const py::object& value, const py::object& out) {
        const Input x(value, "x");
        x.expect({inputs()});
        if (!sliding_) start_slide(0);
        bool pending = false;
        py::object y = call(x, 1, {out, {outputs()}},
                            [&pending](cellstep_session* session, const float* source, std::size_t, float* target) {
                                const cellstep_status status = cellstep_session_slide(session, source, target);
                                pending = status == CELLSTEP_PENDING;
                                return status;
                            });
        return pending ? py::none() : y;
    }

    void reset() {
        const Turn turn(taken_, "session");
        cellstep_session_reset(handle_);
    }

    void swap(const std::shared_ptr<Model>& other) {
        const Turn turn(taken_, "session");
        const cellstep_status status = cellstep_session_swap_model(handle_, other->handle);
        if (status != CELLSTEP_OK) throw py::value_error(cellstep_status_text(status));
        model = other;
    }

    std::pair<py::array, py::array> state() {
        const Turn turn(taken_, "session");
        Array<float> h(h_shape(*model));
        Array<float> c(c_shape(*model));
        cellstep_session_get_state(handle_, h.mutable_data(), c.mutable_data());
        return {h, c};
    }

    void set_state(const std::pair<py::object, py::object>& state) {
        const auto [h, c] = checked_state(*model, state);
        const Turn turn(taken_, "session");
        cellstep_session_set_state(handle_, h.data(), c.data());
    }

    std::shared_ptr<Model> model;

private:
    static constexpr py::ssize_t most_window = 1 << 24;

    py::ssize_t inputs() const { return model->info.input_size; }
    py::ssize_t outputs() const { return model->info.output_size; }

    void expect_sequence(const Input& x) const { x.expect({x.shape().empty() ? 1 : x.shape()[0], inputs()}); }

    template <class Function>
    py::object call(const Input& x, py::ssize_t steps, const Output& y, Function function) {
        const float* source = x.data();
        float* target = y.data();
        cellstep_status status = CELLSTEP_OK;
        {
            const Turn turn(taken_, "session");
            py::gil_scoped_release release;
            status = function(handle_, source, static_cast<std::size_t>(steps), target);
        }
        if (status == CELLSTEP_ERROR_MEMORY) throw std::bad_alloc();
        return y.object();
    }

    std::unique_ptr<Threads, Threads::Release> threads_;  // outlive the session, which is destroyed before them
    cellstep_session* handle_ = nullptr;
    std::atomic<bool> taken_{false};
    bool sliding_ = false;
};

class Pool {
public:
    Pool(std::shared_ptr<Model> shared, py::ssize_t streams, py::ssize_t threads)
        : model(std::move(shared)), streams(streams), threads_(make_threads(threads)) {
        if (streams < 1 || streams > most_streams)
            throw py::value_error("expected streams from 1 to " + std::to_string(most_streams) + ", got " +
                                  std::to_string(streams));
        const cellstep_status status = cellstep_pool_create(model->handle, static_cast<std::size_t>(streams), &handle_);
        if (status == CELLSTEP_ERROR_BIDIRECTIONAL) throw py::value_error(cellstep_status_text(status));
        if (status != CELLSTEP_OK) throw std::bad_alloc();
        if (!threads_) return;
        if (cellstep_pool_set_parallel(handle_, threads_->threads(), threads_.get(), &Threads::run) == CELLSTEP_OK)
            return;
        cellstep_pool_destroy(handle_);
        throw std::bad_alloc();
    }
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;
    ~Pool() { cellstep_pool_destroy(handle_); }

    py::object step(const py::object& value, const std::optional<py::object>& reset, const py::object& out) {
        const Input x(value, "x");
        x.expect({streams, model->info.input_size});
        const Array<bool> mask = reset ? flags(*reset, streams, "streams") : Array<bool>();
        const unsigned char* bytes = reset ? bytes_of(mask) : nullptr;
        const Output y(out, {streams, model->info.output_size});
        const float* source = x.data();
        float* target = y.data();
        {
            const Turn turn(taken_, "pool");
            py::gil_scoped_release release;
            cellstep_pool_step(handle_, source, bytes, target);
        }
        return y.object();
    }

    void reset() {
        const Turn turn(taken_, "pool");
        cellstep_pool_reset(handle_);
    }

    std::pair<py::array, py::array> state(py::ssize_t stream) {
        const Turn turn(taken_, "pool");
        Array<float> h(h_shape(*model));
        Array<float> c(c_shape(*model));
        cellstep_pool_get_state(handle_, place(stream), h.mutable_data(), c.mutable_data());
        return {h, c};
    }

    void set_state(py::ssize_t stream, const std::pair<py::object, py::object>& state) {
        const auto [h, c] = checked_state(*model, state);
        const Turn turn(taken_, "pool");
        cellstep_pool_set_state(handle_, place(stream), h.data(), c.data());
    }

    const std::shared_ptr<Model> model;
    const py::ssize_t streams;

private:
    static constexpr py::ssize_t most_streams = 1 << 24;

    std::size_t place(py::ssize_t stream) const {
        if (stream < 0 || stream >= streams)
            throw py::index_error("expected a stream from 0 to " + std::to_string(streams - 1) + ", got " +
                                  std::to_string(stream));
        return static_cast<std::size_t>(stream);
    }

    std::unique_ptr<Threads, Threads::Release> threads_;  // outlive the pool, which is destroyed before them
    cellstep_pool* handle_ = nullptr;
    std::atomic<bool> taken_{false};
};

template <class T>
cellstep::core::MatrixView<T> view(const Array<T>& matrix) {
    return {matrix.data(), matrix.shape(1), 1};
}

template <class T>
Array<T> pack_layer(const Array<T>& weight_ih, const Array<T>& weight_hh, const std::optional<Array<T>>& bias_ih,
                    const std::optional<Array<T>>& bias_hh, bool coupled) {
    const py::ssize_t gates = coupled ? 3 : 4;
    if (weight_ih.ndim() != 2 || weight_hh.ndim() != 2 || weight_hh.shape(0) % gates != 0 ||
        weight_hh.shape(1) > weight_hh.shape(0) / gates || weight_ih.shape(0) != weight_hh.shape(0))
        throw py::value_error("expected weight_ih and weight_hh with a row for each unit of each gate");
    for (const auto* bias : {&bias_ih, &bias_hh})
        if (*bias && ((*bias)->ndim() != 1 || (*bias)->shape(0) != weight_hh.shape(0)))
            throw py::value_error("expected biases with a value for each row of the weights");
    const std::size_t inputs = static_cast<std::size_t>(weight_ih.shape(1));
    const std::size_t units = static_cast<std::size_t>(weight_hh.shape(0) / gates);
    const std::size_t recurrent = static_cast<std::size_t>(weight_hh.shape(1));
    Array<T> packed(static_cast<py::ssize_t>(cellstep::core::packed_size(inputs, units, recurrent)));
    cellstep::core::pack_layer<T>({inputs, units, recurrent, coupled, view(weight_ih), view(weight_hh),
                                   bias_ih ? bias_ih->data() : nullptr, bias_hh ? bias_hh->data() : nullptr},
                                  packed.mutable_data());
    return packed;
}

template <class T>
Array<T> pack_dense(const Array<T>& weight, const std::optional<Array<T>>& bias) {
    if (weight.ndim() != 2 || (bias && (bias->ndim() != 1 || bias->shape(0) != weight.shape(0))))
        throw py::value_error("expected weight (out_size, in_size) and bias (out_size)");
    Array<T> packed((1 + weight.shape(1)) * weight.shape(0));
    cellstep::core::pack_dense<T>(static_cast<std::size_t>(weight.shape(1)), static_cast<std::size_t>(weight.shape(0)),
                                  view(weight), bias ? bias->data() : nullptr, packed.mutable_data());
    return packed;
}

template <class T>
void bind_packing(py::module_& module) {
    module.def("pack_layer", &pack_layer<T>, py::arg("weight_ih").noconvert(), py::arg("weight_hh").noconvert(),
               py::arg("bias_ih").none(true), py::arg("bias_hh").none(true), py::arg("coupled") = false);
    module.def("pack_dense", &pack_dense<T>, py::arg("weight").noconvert(), py::arg("bias").none(true));
}

}  // namespace

/// One digest of many places: address and bytes of each, one after the other.
std::uint64_t digest(const std::vector<std::uintptr_t>& places) {
    std::uint64_t result = places.size();
    for (std::size_t at = 0; at + 1 < places.size(); at += 2)
        result =
            cellstep::core::kernels<float>().digest(reinterpret_cast<const void*>(places[at]), places[at + 1], result);
    return result;
}

PYBIND11_MODULE(_runtime, module) {
    module.doc() = "The torch-free runtime; see cellstep.runtime.";
    py::register_exception<ModelError>(module, "ModelError", PyExc_ValueError);
    module.def("digest", &digest);
    module.def("instruction_set", &cellstep_instruction_set);

    py::class_<Model, std::shared_ptr<Model>>(module, "Model")
        .def_static("from_file", &Model::from_file, py::arg("path"), py::arg("allow_nonfinite") = false)
        .def_static("from_bytes", &Model::from_bytes, py::arg("data"), py::arg("allow_nonfinite") = false)
        .def_property_readonly("input_size", [](const Model& model) { return model.info.input_size; })
        .def_property_readonly("output_size", [](const Model& model) { return model.info.output_size; })
        .def_property_readonly("num_layers", [](const Model& model) { return model.info.num_layers; })
        .def_property_readonly("hidden_size", [](const Model& model) { return model.info.hidden_size; })
        .def_property_readonly("h_size", [](const Model& model) { return model.info.h_size; })
        .def_property_readonly("answers", [](const Model& model) { return model.info.answers; })
        .def_property_readonly("window", [](const Model& model) { return model.info.window; })
        .def_property_readonly("horizon", [](const Model& model) { return model.info.horizon; })
        .def_property_readonly("weights", [](const Model& model) { return cellstep_model_weights(model.handle); })
        .def_property_readonly("feature_names",
                               [](const Model& model) { return model.names(cellstep_model_feature_name); })
        .def_property_readonly("output_names",
                               [](const Model& model) { return model.names(cellstep_model_output_name); })
        .def("selftest", [](const Model& model) {
            float error = 0.0f;
            const cellstep_status status = cellstep_model_selftest(model.handle, &error);
            if (status != CELLSTEP_OK) throw ModelError(cellstep_status_text(status));
            return error;
        });

    py::class_<Session>(module, "Session")
        .def(py::init<std::shared_ptr<Model>, py::ssize_t>(), py::arg("model"), py::arg("threads") = 1)
        .def_readonly("model", &Session::model)
        .def("step", &Session::step, py::arg("x"), py::arg("out") = py::none())
        .def("run", &Session::run, py::arg("x"), py::arg("reset") = py::none(), py::arg("out") = py::none())
        .def("forecast", &Session::forecast, py::arg("x"), py::arg("out") = py::none())
        .def("start_slide", &Session::start_slide)
        .def("slide", &Session::slide, py::arg("x"), py::arg("out") = py::none())
        .def("reset", &Session::reset)
        .def("swap", &Session::swap)
        .def_property("state", &Session::state, &Session::set_state);

    py::class_<Pool>(module, "Pool")
        .def(py::init<std::shared_ptr<Model>, py::ssize_t, py::ssize_t>(), py::arg("model"), py::arg("streams"),
             py::arg("threads") = 1)
        .def_readonly("model", &Pool::model)
        .def_readonly("streams", &Pool::streams)
        .def("step", &Pool::step, py::arg("x"), py::arg("reset") = py::none(), py::arg("out") = py::none())
        .def("reset", &Pool::reset)
        .def("state", &Pool::state)
        .def("set_state", &Pool::set_state);

    bind_packing<float>(module);
    bind_packing<double>(module);
}
