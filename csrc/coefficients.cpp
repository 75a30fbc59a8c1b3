// The solve of SLERP: coefficients of slerp_M = slerp(slerp_{M-1}, delta_M, 1/M) from Gram matrices
// alone, in fp64, by the formulas of the reference.
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu.h"

namespace warp_fast {
namespace {

constexpr double kSinFloor = 1e-6;  // SIN_FLOOR of the reference

// <v, v> of v = sum_m c_m delta_m over the first m; 0 where so much cancels that rounding is all
// there is
double square(const double* gram, int policies, const double* c, int m) {
    double sum = 0, size = 0;
    for (int i = 0; i < m; ++i) {
        for (int j = 0; j < m; ++j) {
            const double term = c[i] * gram[i * policies + j] * c[j];
            sum += term;
            size += std::abs(term);
        }
    }
    return sum > kSinFloor * kSinFloor * size ? sum : 0;
}

// of two lengths and an inner product; 1 beside a vector of length 0
double cosine_of(double dot, double lengths) {
    const double cosine = dot / lengths;
    if (std::abs(cosine) <= 1) return cosine;
    return cosine < -1 ? -1 : 1;
}

// slerp_m from slerp_{m-1} in c; returns whether its step was linear
bool step(const double* gram, int policies, double* c, int m) {
    double dot = 0;
    for (int i = 0; i < m; ++i) dot += c[i] * gram[i * policies + m];
    const double lengths =
        std::sqrt(square(gram, policies, c, m)) * std::sqrt(gram[m * policies + m]);
    const double cosine = cosine_of(dot, lengths);
    const double sine = std::sqrt((1 - cosine) * (1 + cosine));
    const double angle = std::atan2(sine, cosine), rate = 1.0 / (m + 1);
    const bool flat = sine < kSinFloor;
    const double kept = flat ? 1 - rate : std::sin((1 - rate) * angle) / sine;
    for (int i = 0; i < m; ++i) c[i] *= kept;
    c[m] = flat ? rate : std::sin(rate * angle) / sine;
    return flat;
}

}  // namespace

void solve(const double* gram, int64_t segments, int policies, double* coefficients, bool* linear) {
    std::fill_n(linear, segments, false);
    const int64_t cells = segments * policies * policies;
    if (!std::all_of(gram, gram + cells, [](double x) { return std::isfinite(x); })) {
        std::fill_n(coefficients, segments * policies, std::numeric_limits<double>::quiet_NaN());
        return;
    }
    for (int64_t s = 0; s < segments; ++s) {
        double* c = coefficients + s * policies;
        c[0] = 1;
        for (int m = 1; m < policies; ++m) {
            linear[s] |= step(gram + s * policies * policies, policies, c, m);
        }
    }
}

}  // namespace warp_fast
