// warp_fast._C: the compiled kernels, over addresses, sizes and dtype codes of tensors that torch
// owns. The launchers in warp_fast/native/ are its only callers and check what they pass.
#ifdef WARP_FAST_HAS_AVX2
#include <cpuid.h>
#endif
#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>

#include "bindings.h"
#include "cpu.h"

namespace warp_fast {
namespace {

using Sizes = std::vector<int64_t>;
using Codes = std::vector<int>;

constexpr int64_t kPerThread = 1 << 16;  // elements; waking a thread costs as much as fewer take
constexpr int64_t kStreamed = 4 << 20;  // elements; fewer may still be in cache for who reads them

bool has_avx2() {
#ifdef WARP_FAST_HAS_AVX2
    // asked once: a virtual machine takes microseconds to answer
    static const bool has = [] {
        unsigned int a, b, c, d;  // not every compiler can be asked for F16C
        const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
        return f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    }();
    return has;
#else
    return false;
#endif
}

#ifdef WARP_FAST_HAS_AVX2
#define WARP_FAST_DISPATCH(kernel, call) has_avx2() ? avx2::kernel(call) : baseline::kernel(call)
#else
#define WARP_FAST_DISPATCH(kernel, call) baseline::kernel(call)
#endif

int used_threads(int64_t elements, int threads) {
    return static_cast<int>(std::clamp<int64_t>(elements / kPerThread, 1, threads));
}

void ema_update(const Addresses& ema, const Addresses& params, const Addresses& residual,
                const Sizes& size, const Codes& ema_code, const Codes& param_code,
                const Sizes& first_index, int storage, double rate, uint32_t key_in,
                uint32_t key_out, int threads) {
    std::vector<EmaEntry> entries;
    int64_t chunks = 0, elements = 0;
    for (size_t t = 0; t < ema.size(); ++t) {
        void* low = storage == kSplit ? pointer(residual[t]) : nullptr;
        entries.push_back({pointer(ema[t]), pointer(params[t]), low, size[t], first_index[t],
                           chunks, ema_code[t], param_code[t]});
        chunks += (size[t] + kEmaChunk - 1) / kEmaChunk;
        elements += size[t];
    }
    const int used = used_threads(elements, threads);
    const EmaCall call{entries.data(), static_cast<int64_t>(entries.size()), chunks,
                       static_cast<Storage>(storage), rate, key_in, key_out, used};
    WARP_FAST_DISPATCH(ema, call);
}

// the tensors of a merge as entries; address and code hold all columns of one tensor after another
struct Merge {
    std::vector<void*> address;
    std::vector<MergeEntry> entries;
    MergeCall call;

    Merge(const Addresses& addresses, const Codes& codes, const Sizes& size, const Sizes& segment,
          int policies, int64_t rows, int threads) {
        const size_t columns = 1 + policies + rows;
        int64_t chunks = 0, elements = 0;
        for (uintptr_t each : addresses) address.push_back(pointer(each));
        for (size_t t = 0; t < size.size(); ++t) {
            const uintptr_t* first = addresses.data() + t * columns;
            const uintptr_t* outs = first + 1 + policies;
            // what is written in place is in cache already
            const bool stream = std::all_of(outs, first + columns, [&](uintptr_t out) {
                return out % 16 == 0 && out != first[0];
            });
            entries.push_back({address.data() + t * columns, codes.data() + t * columns, size[t],
                               segment[t], chunks, stream});
            chunks += (size[t] + kMergeChunk - 1) / kMergeChunk;
            elements += size[t];
        }
        for (MergeEntry& entry : entries) entry.stream &= elements >= kStreamed;
        const int used = used_threads(elements, threads);
        call = {entries.data(), static_cast<int64_t>(entries.size()), chunks, policies, rows,
                0, nullptr, nullptr, used};
    }
};

void gram(const Addresses& addresses, const Codes& codes, const Sizes& size, const Sizes& segment,
          int policies, uintptr_t gram_address, int threads) {
    Merge merge(addresses, codes, size, segment, policies, 0, threads);
    const int width = policies * (policies + 1) / 2;
    std::vector<double> partial(merge.call.chunks * width);
    merge.call.partial = partial.data();
    WARP_FAST_DISPATCH(gram, merge.call);
    double* grams = static_cast<double*>(pointer(gram_address));
    for (size_t t = 0; t < size.size(); ++t) {
        double* found = grams + segment[t] * policies * policies;
        const int64_t first = merge.entries[t].first_chunk;
        for (int64_t chunk = first; chunk * kMergeChunk < first * kMergeChunk + size[t]; ++chunk) {
            const double* row = partial.data() + chunk * width;
            for (int i = 0; i < policies; ++i) {
                for (int j = i; j < policies; ++j, ++row) found[i * policies + j] += *row;
            }
        }
    }
    const int64_t cells = *std::max_element(segment.begin(), segment.end()) + 1;
    for (int64_t s = 0; s < cells; ++s) {
        double* found = grams + s * policies * policies;
        for (int i = 0; i < policies; ++i) {
            for (int j = 0; j < i; ++j) found[i * policies + j] = found[j * policies + i];
        }
    }
}

void slerp_apply(const Addresses& addresses, const Codes& codes, const Sizes& size,
                 const Sizes& segment, int policies, int64_t rows, int64_t segments,
                 uintptr_t coefficients, int threads) {
    Merge merge(addresses, codes, size, segment, policies, rows, threads);
    merge.call.segments = segments;
    merge.call.coefficients = static_cast<const double*>(pointer(coefficients));
    WARP_FAST_DISPATCH(apply, merge.call);
}

void slerp_coefficients(uintptr_t gram, int64_t segments, int policies, uintptr_t coefficients,
                        uintptr_t linear) {
    solve(static_cast<double*>(pointer(gram)), segments, policies,
          static_cast<double*>(pointer(coefficients)), static_cast<bool*>(pointer(linear)));
}

// logits, anchor, index, token_ids, rows, width, first, softcap, temperature, threads of LossCall
using LossGiven = std::tuple<Matrix, Matrix, uintptr_t, uintptr_t, int64_t, int64_t, int64_t,
                             double, double, int>;

LossCall loss_call(const LossGiven& given) {
    const auto& [logits, anchor, index, token_ids, rows, width, first, softcap, temperature,
                 threads] = given;
    const int64_t worth = 1 + rows * width / kPerThread;
    const int used = static_cast<int>(std::clamp<int64_t>(std::min(rows, worth), 1, threads));
    return {loss_matrix(logits), loss_matrix(anchor), {}, static_cast<int64_t*>(pointer(index)),
            static_cast<int64_t*>(pointer(token_ids)), nullptr, nullptr, rows, width, first,
            softcap, temperature, false, kNoKl, used};
}

void loss_stats(const LossGiven& given, uintptr_t state, bool entropy, int exact_kl) {
    LossCall call = loss_call(given);
    call.state = static_cast<double*>(pointer(state));
    call.entropy = entropy;
    call.exact_kl = static_cast<ExactKl>(exact_kl);
    WARP_FAST_DISPATCH(loss_stats, call);
}

void loss_gradient(const LossGiven& given, const Matrix& gradient, uintptr_t coefficients) {
    LossCall call = loss_call(given);
    call.gradient = loss_matrix(gradient);
    call.coefficients = static_cast<const float*>(pointer(coefficients));
    WARP_FAST_DISPATCH(loss_gradient, call);
}

// Asks for huge pages where new memory is about to be written: the faults of small ones cost more
// than the kernels.
void advise_huge_pages(uintptr_t address, int64_t bytes) {
#ifdef __linux__
    constexpr uintptr_t kHuge = 2 << 20;
    const uintptr_t first = (address + kHuge - 1) / kHuge * kHuge;
    const uintptr_t last = (address + bytes) / kHuge * kHuge;
    if (last > first) madvise(pointer(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace warp_fast

PYBIND11_MODULE(_C, m) {
    using namespace warp_fast;
    m.doc() = "Compiled kernels of warp_fast; called through warp_fast.native";
    const py::call_guard<py::gil_scoped_release> unlocked;
    m.def("ema_update", &ema_update, unlocked);
    m.def("gram", &gram, unlocked);
    m.def("slerp_coefficients", &slerp_coefficients, unlocked);
    m.def("slerp_apply", &slerp_apply, unlocked);
    m.def("loss_stats", &loss_stats, unlocked);
    m.def("loss_gradient", &loss_gradient, unlocked);
    m.def("advise_huge_pages", &advise_huge_pages);
    m.attr("instructions") = has_avx2() ? "avx2" : "baseline";
#ifdef WARP_FAST_HAS_CUDA
    m.attr("has_cuda") = true;
    bind_cuda(m);
#else
    m.attr("has_cuda") = false;
#endif
}
