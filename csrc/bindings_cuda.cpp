// The CUDA part of warp_fast._C: the functions of cuda.h, with their parameters in the same order.
#include "bindings.h"
#include "cuda.h"

namespace warp_fast {
namespace {

// what Python gives for a parameter, and the parameter of it
template <class T>
struct Given {
    using Type = T;
    static T get(T value) { return value; }
};

template <class T>
struct Given<T*> {
    using Type = uintptr_t;
    static T* get(uintptr_t address) { return static_cast<T*>(pointer(address)); }
};

template <>
struct Given<const LossMatrix&> {
    using Type = Matrix;
    static LossMatrix get(const Matrix& of) { return loss_matrix(of); }
};

template <>
struct Given<const LossRows&> {
    using Type = std::tuple<Matrix, Matrix, uintptr_t, int64_t, int64_t, double, double, int>;
    static LossRows get(const Type& of) {
        const auto& [logits, anchor, token_ids, rows, width, softcap, temperature, exact_kl] = of;
        return {loss_matrix(logits), loss_matrix(anchor),
                static_cast<int64_t*>(pointer(token_ids)), rows, width, softcap, temperature,
                static_cast<ExactKl>(exact_kl)};
    }
};

template <>
struct Given<const LossStats&> {
    using Type = Addresses;
    static LossStats get(const Addresses& found) {
        const auto of = [&](int i) { return static_cast<float*>(pointer(found.at(i))); };
        return {of(0), of(1), of(2), of(3), static_cast<double*>(pointer(found.at(4)))};
    }
};

template <class... Parameters>
auto from_python(void (*launch)(Parameters...)) {
    return [launch](typename Given<Parameters>::Type... given) {
        launch(Given<Parameters>::get(given)...);
    };
}

}  // namespace

void bind_cuda(py::module_& m) {
    m.attr("EMA_BLOCK") = kEmaBlock;
    m.attr("GRAM_CHUNK") = kGramChunk;
    m.attr("APPLY_BLOCK") = kApplyBlock;
    m.def("ema_update_cuda", from_python(ema_update_cuda));
    m.def("gram_cuda", from_python(gram_cuda));
    m.def("gram_sum_cuda", from_python(gram_sum_cuda));
    m.def("slerp_apply_cuda", from_python(slerp_apply_cuda));
    m.def("loss_stats_cuda", from_python(loss_stats_cuda));
    m.def("loss_gradient_cuda", from_python(loss_gradient_cuda));
    m.def("loss_fused_cuda", from_python(loss_fused_cuda));
    m.def("loss_scale_cuda", from_python(loss_scale_cuda));
}

}  // namespace warp_fast
