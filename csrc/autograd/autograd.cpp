/// Gradients of the operators for programs without Python, equal to those that python/cellstep/ops.py registers. Those
/// of lstm_layer and lstm_cell are kernels; gradients of gradients and those of lstm_variant differentiate the formula
/// on torch's own operators.
#include "cellstep/autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/zeros_like.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "cellstep/ops.h"
#include "formula.h"

namespace {

using at::Tensor;
using cellstep::autograd::layer_tensor_count;
using cellstep::autograd::LayerOptions;
using cellstep::autograd::LayerTensors;
using cellstep::autograd::lstm_steps_gradients;
using torch::autograd::AutogradContext;
using torch::autograd::compute_requires_grad;
using torch::autograd::Function;
using torch::autograd::variable_list;

using Optional = std::optional<Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

/// The signature of lstm_layer and lstm_cell: x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, save.
template <class Result>
using Forward = Result(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&,
                       const Optional&, bool);

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Five lstm_layer_values(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih,
                       const Tensor& weight_hh, const Optional& bias_ih, const Optional& bias_hh, bool save) {
    static const auto values = op<Forward<Five>>("cellstep::lstm_layer");
    const at::AutoDispatchBelowADInplaceOrView guard;
    return values.call(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, save);
}

Three lstm_cell_values(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih,
                       const Tensor& weight_hh, const Optional& bias_ih, const Optional& bias_hh, bool save) {
    static const auto values = op<Forward<Three>>("cellstep::lstm_cell");
    const at::AutoDispatchBelowADInplaceOrView guard;
    return values.call(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, save);
}

Tensor dense_values(const Tensor& x, const Tensor& weight, const Optional& bias) {
    static const auto values = op<Tensor(const Tensor&, const Tensor&, const Optional&)>("cellstep::dense");
    const at::AutoDispatchBelowADInplaceOrView guard;
    return values.call(x, weight, bias);
}

Tensor activate_values(const Tensor& x, std::int64_t activation) {
    static const auto values = op<Tensor(const Tensor&, std::int64_t)>("cellstep::activate");
    const at::AutoDispatchBelowADInplaceOrView guard;
    return values.call(x, activation);
}

/// An absent bias is saved as an undefined tensor.
Optional as_optional(const Tensor& tensor) { return tensor.defined() ? Optional(tensor) : std::nullopt; }

Tensor or_zeros(const Tensor& gradient, const Tensor& like) {
    return gradient.defined() ? gradient : at::zeros_like(like);
}

/// For every argument of a forward operator the gradient, or an undefined tensor; either bias has the same one.
variable_list gradients(const Six& found, const Tensor& bias_ih, const Tensor& bias_hh) {
    const auto& [x, h, c, weight_ih, weight_hh, bias] = found;
    const Tensor none;
    return {x, h, c, weight_ih, weight_hh, bias_ih.defined() ? bias : none, bias_hh.defined() ? bias : none, none};
}

/// The same by the formula, differentiable themselves.
variable_list plain_gradients(const LayerTensors& tensors, const cellstep::autograd::LayerResults& grads) {
    const LayerTensors found = lstm_steps_gradients(tensors, {}, grads);
    return {found[0], found[1], found[2], found[3], found[4], found[5], found[6], Tensor()};
}

struct LstmLayer : Function<LstmLayer> {
    static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& h, const Tensor& c,
                                 const Tensor& weight_ih, const Tensor& weight_hh, const Optional& bias_ih,
                                 const Optional& bias_hh, bool save) {
        const auto [y, h_n, c_n, gates, cells] =
            lstm_layer_values(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, save);
        ctx->save_for_backward(
            {x, h, c, weight_ih, weight_hh, bias_ih.value_or(Tensor()), bias_hh.value_or(Tensor()), y, gates, cells});
        ctx->saved_data["save"] = save;
        ctx->mark_non_differentiable({gates});
        ctx->set_materialize_grads(false);
        return {y, h_n, c_n, gates, cells};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        static const auto differentiate =
            op<Six(const Optional&, const Optional&, const Optional&, const Optional&, const Tensor&, const Tensor&,
                   const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, bool,
                   bool)>("cellstep::lstm_layer_backward");
        const variable_list saved = ctx->get_saved_variables();
        const Tensor &x = saved[0], &h = saved[1], &c = saved[2], &weight_ih = saved[3], &weight_hh = saved[4];
        const Tensor &bias_ih = saved[5], &bias_hh = saved[6], &y = saved[7];
        Tensor gates = saved[8], cells = saved[9];
        const bool save = ctx->saved_data["save"].toBool();
        // Without `save` it is that of the empty tensor which was given out as cells.
        const Tensor grad_cells = save ? grads[4] : Tensor();
        if (at::GradMode::is_enabled())
            return plain_gradients({x, h, c, weight_ih, weight_hh, bias_ih, bias_hh},
                                   {grads[0], grads[1], grads[2], grad_cells});
        if (!save)
            std::tie(std::ignore, std::ignore, std::ignore, gates, cells) = lstm_layer_values(
                x, h, c, weight_ih, weight_hh, as_optional(bias_ih), as_optional(bias_hh), /*save=*/true);
        variable_list found = gradients(
            differentiate.call(as_optional(grads[0]), as_optional(grads[1]), as_optional(grads[2]),
                               as_optional(grad_cells), x, h, c, weight_ih, weight_hh, y, gates, cells,
                               ctx->needs_input_grad(0), ctx->needs_input_grad(3) || ctx->needs_input_grad(4)),
            bias_ih, bias_hh);
        for (std::size_t at : {0, 3, 4})
            if (!ctx->needs_input_grad(at)) found[at] = Tensor();
        return found;
    }
};

struct LstmCell : Function<LstmCell> {
    static variable_list forward(AutogradContext* ctx, const Tensor& x, const Tensor& h, const Tensor& c,
                                 const Tensor& weight_ih, const Tensor& weight_hh, const Optional& bias_ih,
                                 const Optional& bias_hh, bool save) {
        const auto [h_next, c_next, gates] = lstm_cell_values(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, save);
        ctx->save_for_backward(
            {x, h, c, weight_ih, weight_hh, bias_ih.value_or(Tensor()), bias_hh.value_or(Tensor()), c_next, gates});
        ctx->saved_data["save"] = save;
        ctx->mark_non_differentiable({gates});
        ctx->set_materialize_grads(false);
        return {h_next, c_next, gates};
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        static const auto differentiate =
            op<Six(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                   const Tensor&, const Tensor&, const Tensor&)>("cellstep::lstm_cell_backward");
        const variable_list saved = ctx->get_saved_variables();
        const Tensor &x = saved[0], &h = saved[1], &c = saved[2], &weight_ih = saved[3], &weight_hh = saved[4];
        const Tensor &bias_ih = saved[5], &bias_hh = saved[6], &c_next = saved[7];
        Tensor gates = saved[8];
        if (at::GradMode::is_enabled()) {
            variable_list found = plain_gradients({x.unsqueeze(0), h, c, weight_ih, weight_hh, bias_ih, bias_hh},
                                                  {Tensor(), grads[0], grads[1], Tensor()});
            if (found[0].defined()) found[0] = found[0].squeeze(0);
            return found;
        }
        if (!ctx->saved_data["save"].toBool())
            std::tie(std::ignore, std::ignore, gates) = lstm_cell_values(
                x, h, c, weight_ih, weight_hh, as_optional(bias_ih), as_optional(bias_hh), /*save=*/true);
        return gradients(differentiate.call(or_zeros(grads[0], h), or_zeros(grads[1], c), x, h, c, weight_ih, weight_hh,
                                            c_next, gates),
                         bias_ih, bias_hh);
    }
};

struct Dense : Function<Dense> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& weight, const Optional& bias) {
        ctx->save_for_backward({x, weight});
        ctx->saved_data["bias"] = bias.has_value();
        return dense_values(x, weight, bias);
    }

    // On torch's own operators, hence differentiable as often as one likes.
    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const variable_list saved = ctx->get_saved_variables();
        const Tensor &x = saved[0], &weight = saved[1], &grad = grads[0];
        const Tensor rows = grad.reshape({-1, weight.size(0)});
        const Tensor to_weight = rows.t().matmul(x.reshape({-1, weight.size(1)}));
        return {grad.matmul(weight), to_weight, ctx->saved_data["bias"].toBool() ? rows.sum(0) : Tensor()};
    }
};

struct Activate : Function<Activate> {
    static Tensor forward(AutogradContext* ctx, const Tensor& x, std::int64_t activation) {
        const Tensor y = activate_values(x, activation);
        ctx->save_for_backward({y});
        ctx->saved_data["activation"] = activation;
        return y;
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        const std::int64_t activation = ctx->saved_data["activation"].toInt();
        return {cellstep::autograd::activate_backward(grads[0], ctx->get_saved_variables()[0], activation), Tensor()};
    }
};

/// Runs an operator on the arguments that lie on the stack, which it takes from there.
variable_list run_boxed(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    operation.callBoxed(stack);
    variable_list results;
    for (c10::IValue& value : torch::jit::pop(*stack, operation.schema().returns().size()))
        results.push_back(std::move(value).toTensor());
    return results;
}

struct LstmVariant : Function<LstmVariant> {
    /// The first argument tells torch which tensors there are; the stack has all arguments.
    static variable_list forward(AutogradContext* ctx, at::TensorList, const c10::OperatorHandle& operation,
                                 torch::jit::Stack* stack) {
        const auto arguments = torch::jit::last(*stack, operation.schema().arguments().size());
        variable_list tensors;
        for (const c10::IValue& value : arguments.slice(0, layer_tensor_count))
            tensors.push_back(value.isTensor() ? value.toTensor() : Tensor());
        ctx->save_for_backward(std::move(tensors));
        ctx->saved_data["options"] = c10::ivalue::Tuple::create(arguments.slice(layer_tensor_count).vec());
        ctx->set_materialize_grads(false);
        return run_boxed(operation, stack);
    }

    static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
        LayerTensors tensors;
        variable_list saved = ctx->get_saved_variables();
        std::move(saved.begin(), saved.end(), tensors.begin());
        const auto given = ctx->saved_data["options"].toTupleRef().elements().vec();
        const LayerOptions options{given[0].toBool(), given[1].toDouble(), given[2].toDouble(), given[3].toDouble(),
                                   given[4].toInt(),  given[5].toInt(),    given[6].toInt()};
        const bool save_cells = given[7].toBool();
        const LayerTensors found =
            lstm_steps_gradients(tensors, options, {grads[0], grads[1], grads[2], save_cells ? grads[3] : Tensor()});
        variable_list gradients;
        for (std::size_t place = 0; place < layer_tensor_count; ++place)
            if (tensors[place].defined()) gradients.push_back(found[place]);
        gradients.resize(gradients.size() + 2);  // none for the operator and for the stack
        return gradients;
    }
};

Five lstm_layer(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih, const Tensor& weight_hh,
                const Optional& bias_ih, const Optional& bias_hh, bool save) {
    if (!compute_requires_grad(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh))
        return lstm_layer_values(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, save);
    const auto results = LstmLayer::apply(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, save);
    return {results[0], results[1], results[2], results[3], results[4]};
}

Three lstm_cell(const Tensor& x, const Tensor& h, const Tensor& c, const Tensor& weight_ih, const Tensor& weight_hh,
                const Optional& bias_ih, const Optional& bias_hh, bool save) {
    if (!compute_requires_grad(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh))
        return lstm_cell_values(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, save);
    const auto results = LstmCell::apply(x, h, c, weight_ih, weight_hh, bias_ih, bias_hh, save);
    return {results[0], results[1], results[2]};
}

Tensor dense(const Tensor& x, const Tensor& weight, const Optional& bias) {
    return compute_requires_grad(x, weight, bias) ? Dense::apply(x, weight, bias) : dense_values(x, weight, bias);
}

Tensor activate(const Tensor& x, std::int64_t activation) {
    return compute_requires_grad(x) ? Activate::apply(x, activation) : activate_values(x, activation);
}

/// Any operator by its arguments on the stack, with its gradients as F has them.
template <class F>
void boxed(const c10::OperatorHandle& operation, torch::jit::Stack* stack) {
    variable_list arguments;
    for (const c10::IValue& value : torch::jit::last(*stack, operation.schema().arguments().size())) {
        if (value.isTensor() && value.toTensor().defined()) arguments.push_back(value.toTensor());
        if (value.isTensorList())
            for (const Tensor& tensor : value.toTensorVector()) arguments.push_back(tensor);
    }
    const at::TensorList tensors(arguments);
    for (Tensor& result :
         compute_requires_grad(tensors) ? F::apply(tensors, operation, stack) : run_boxed(operation, stack))
        stack->push_back(std::move(result));
}

/// Results whose gradient is an error, so that it never is silently missing.
template <const char* error>
struct WithoutGradient : Function<WithoutGradient<error>> {
    static variable_list forward(AutogradContext*, at::TensorList, const c10::OperatorHandle& operation,
                                 torch::jit::Stack* stack) {
        return run_boxed(operation, stack);
    }

    static variable_list backward(AutogradContext*, const variable_list&) { throw std::runtime_error(error); }
};

constexpr char run_model_error[] =
    "cellstep::run_model: expected no backward pass through an exported model; got one; train the module that was "
    "exported";
constexpr char backward_operator_error[] =
    "cellstep::autograd: expected no backward pass through a call of lstm_layer_backward, lstm_cell_backward or "
    "lstm_packed_backward; got one; call lstm_layer or lstm_cell and let autograd differentiate it twice";
constexpr char packed_error[] =
    "cellstep::autograd: expected no backward pass through lstm_packed, which has gradients in Python alone; got one; "
    "call lstm_layer or lstm_variant on a padded batch";
constexpr char layers_error[] =
    "cellstep::autograd: expected no backward pass through lstm_layers, which runs on CUDA and has gradients in Python "
    "alone; got one; train on the CPU, or in Python";

std::optional<torch::Library> library;

bool has_gradients(const char* name) {
    const auto operation = c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
    return operation.hasKernelForDispatchKey(c10::DispatchKey::Autograd) ||
           operation.hasKernelForDispatchKey(c10::DispatchKey::AutogradCPU);
}

/// Returns the error, empty if there is none: an exception at load would end the process.
std::string register_gradients() noexcept {
    try {
        const std::string version = cellstep_ops_version();
        if (version != CELLSTEP_VERSION_STRING)
            return "cellstep::autograd: expected the operators of version " CELLSTEP_VERSION_STRING "; got " + version +
                   "; load libcellstep_autograd and libcellstep_ops of one build";
        for (const char* name : {"cellstep::lstm_layer", "cellstep::lstm_cell", "cellstep::dense"})
            if (has_gradients(name))
                return std::string("cellstep::autograd: expected ") + name +
                       " without gradients; got those of Python's cellstep.ops or of another copy of this library; "
                       "load libcellstep_autograd once, and only where cellstep.ops is not imported";
        library.emplace(torch::Library::IMPL, "cellstep", c10::DispatchKey::Autograd, __FILE__, __LINE__);
        library->impl("lstm_layer", TORCH_FN(lstm_layer));
        library->impl("lstm_cell", TORCH_FN(lstm_cell));
        library->impl("dense", TORCH_FN(dense));
        library->impl("activate", TORCH_FN(activate));
        library->impl("lstm_variant", torch::CppFunction::makeFromBoxedFunction<boxed<LstmVariant>>());
        for (const char* name : {"run_model", "run_records"})
            library->impl(name, torch::CppFunction::makeFromBoxedFunction<boxed<WithoutGradient<run_model_error>>>());
        library->impl("lstm_packed", torch::CppFunction::makeFromBoxedFunction<boxed<WithoutGradient<packed_error>>>());
        library->impl("lstm_layers", torch::CppFunction::makeFromBoxedFunction<boxed<WithoutGradient<layers_error>>>());
        for (const char* name : {"lstm_layer_backward", "lstm_cell_backward", "lstm_packed_backward"})
            library->impl(name,
                          torch::CppFunction::makeFromBoxedFunction<boxed<WithoutGradient<backward_operator_error>>>());
        return {};
    } catch (const c10::Error& error) {
        library.reset();
        return std::string(
                   "cellstep::autograd: expected the operators that it was built with; got an error; load "
                   "libcellstep_autograd and libcellstep_ops of one build: ") +
               error.what_without_backtrace();
    }
}

const std::string registration_error = register_gradients();

int raise_in_python(void*) {
    const auto set = reinterpret_cast<void (*)(void*, const char*)>(dlsym(RTLD_DEFAULT, "PyErr_SetString"));
    set(*static_cast<void**>(dlsym(RTLD_DEFAULT, "PyExc_RuntimeError")), registration_error.c_str());
    return -1;
}

/// In Python the interpreter raises the error as soon as the load returns; elsewhere it is a warning.
const bool reported = [] {
    if (registration_error.empty()) return false;
    const auto add_call = reinterpret_cast<int (*)(int (*)(void*), void*)>(dlsym(RTLD_DEFAULT, "Py_AddPendingCall"));
    if (!add_call || add_call(raise_in_python, nullptr) != 0) TORCH_WARN(registration_error);
    return true;
}();

}  // namespace

int cellstep_register_autograd(void) { return registration_error.empty(); }

const char* cellstep_autograd_error(void) { return registration_error.empty() ? nullptr : registration_error.c_str(); }
