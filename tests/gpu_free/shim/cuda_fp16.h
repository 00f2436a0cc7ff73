// Half precision as storage, which is all that the kernels make of it.
#pragma once
#include <stdint.h>

#include "cuda_runtime.h"

struct __half {
    uint16_t bits;
};

static inline float __half2float(__half half) {
    const uint32_t sign = static_cast<uint32_t>(half.bits >> 15) << 31;
    const uint32_t exponent = half.bits >> 10 & 31;
    const uint32_t fraction = half.bits & 1023;
    if (exponent == 31) return __int_as_float(static_cast<int>(sign | 0x7f800000u | fraction << 13));
    if (exponent == 0) {  // zero and subnormals: fraction * 2^-24, exact
        const float value = static_cast<float>(fraction) * 5.9604644775390625e-8f;
        return sign ? -value : value;
    }
    return __int_as_float(static_cast<int>(sign | (exponent + 112) << 23 | fraction << 13));
}
