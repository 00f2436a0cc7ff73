// From an image to its canvas: what runtime/geometry.py's Letterbox.apply gives with OpenCV.
#pragma once
#include "parameters.h"

namespace parkdet {

// The source pixels that one pixel of the result averages along one axis, and their weights.
struct Span {
    int first;  // whole pixels from here
    int last;   // to here, exclusive
    float before, whole, after;  // weights of the pixel before the first, of each, of the one after the last
};

__device__ inline Span span_of(int at, int resized, int source) {
    // In units of 1 / resized of a source pixel, so that everything is an integer.
    const int begin = at * source;
    const int end = begin + source;
    Span span;
    span.first = (begin + resized - 1) / resized;
    span.last = end / resized;
    const int before = span.first * resized - begin;
    const int after = end - span.last * resized;
    // OpenCV leaves out slivers of a thousandth of a pixel; one of exactly that, its rounding takes in before only.
    span.before = before * 1000LL >= resized ? static_cast<float>(before) / source : 0.f;
    span.whole = static_cast<float>(resized) / source;
    span.after = after * 1000LL > resized ? static_cast<float>(after) / source : 0.f;
    return span;
}

// As OpenCV's INTER_AREA: weighted mean of what the pixel covers, float32, columns first, half to even.
__device__ inline void area_pixel(const LetterboxParameters& p, int row, int column, unsigned char* pixel) {
    const Span rows = span_of(row, p.resized_height, p.image_height);
    const Span columns = span_of(column, p.resized_width, p.image_width);
    float sum[3] = {0, 0, 0};
    for (int y = rows.first - 1; y <= rows.last; ++y) {
        const float row_weight = y < rows.first ? rows.before : y < rows.last ? rows.whole : rows.after;
        if (row_weight == 0) continue;
        const unsigned char* line = p.image + y * p.image_pitch;
        float line_sum[3] = {0, 0, 0};
        for (int x = columns.first - 1; x <= columns.last; ++x) {
            const float weight = x < columns.first ? columns.before : x < columns.last ? columns.whole : columns.after;
            if (weight == 0) continue;
            for (int channel = 0; channel < 3; ++channel) line_sum[channel] += line[x * 3 + channel] * weight;
        }
        for (int channel = 0; channel < 3; ++channel) sum[channel] += line_sum[channel] * row_weight;
    }
    // Quarters are exact in float32. OpenCV has code of its own for the mean of 2 x 2, which rounds a half up.
    const bool of_four = p.image_height == 2 * p.resized_height && p.image_width == 2 * p.resized_width;
    for (int channel = 0; channel < 3; ++channel)
        pixel[channel] = static_cast<unsigned char>(of_four ? floorf(sum[channel] + 0.5f) : rintf(sum[channel]));
}

constexpr int kLinearBits = 11;  // of OpenCV's fixed-point weights

// The source pixel at or before the middle of pixel `at`, from -1 on, and the weight of the next one in 2^-11.
__device__ inline int linear_place(int at, int resized, int source, int* next) {
    const int middle = (2 * at + 1) * source - resized;  // in units of 1 / (2 * resized)
    const int before = middle < 0 ? -1 : middle / (2 * resized);
    // OpenCV has the place in float32, so far out the fraction is coarse.
    const float place = before + static_cast<float>(middle - before * 2 * resized) / (2 * resized);
    *next = static_cast<int>(rintf((place - before) * (1 << kLinearBits)));
    return before;
}

// As OpenCV's INTER_LINEAR, in its fixed point. Beyond the edge lies the edge's pixel again: across, OpenCV gives that
// pixel all the weight, down it adds it in two parts, each rounded.
__device__ inline void linear_pixel(const LetterboxParameters& p, int row, int column, unsigned char* pixel) {
    int low, right;
    const int y = linear_place(row, p.resized_height, p.image_height, &low);
    int x = linear_place(column, p.resized_width, p.image_width, &right);
    if (x < 0 || x >= p.image_width - 1) {
        x = x < 0 ? 0 : p.image_width - 1;
        right = 0;
    }
    const unsigned char* upper = p.image + (y < 0 ? 0 : y) * p.image_pitch + x * 3;
    const unsigned char* lower = p.image + (y < p.image_height - 1 ? y + 1 : y) * p.image_pitch + x * 3;
    const int step = right ? 3 : 0;  // no pixel outside the image is read
    const int one = 1 << kLinearBits;
    for (int channel = 0; channel < 3; ++channel) {
        const int above = upper[channel] * (one - right) + upper[channel + step] * right;
        const int below = lower[channel] * (one - right) + lower[channel + step] * right;
        const int sum = ((above >> 4) * (one - low) >> 16) + ((below >> 4) * low >> 16);
        pixel[channel] = static_cast<unsigned char>((sum + 2) >> 2);
    }
}

__device__ inline int longer(int a, int b) { return a > b ? a : b; }

}  // namespace parkdet

extern "C" {

// One thread a canvas pixel: grey 114 around the resized image.
__global__ void __launch_bounds__(parkdet::kLetterboxWidth * parkdet::kLetterboxHeight)
    parkdet_letterbox(parkdet::LetterboxParameters p) {
    using namespace parkdet;
    const int x = blockIdx.x * kLetterboxWidth + threadIdx.x % kLetterboxWidth;
    const int y = blockIdx.y * kLetterboxHeight + threadIdx.x / kLetterboxWidth;
    if (x >= p.canvas_width || y >= p.canvas_height) return;
    const int column = x - p.left;
    const int row = y - p.top;
    unsigned char* pixel = p.canvas + (static_cast<size_t>(y) * p.canvas_width + x) * 3;
    if (column < 0 || column >= p.resized_width || row < 0 || row >= p.resized_height) {
        for (int channel = 0; channel < 3; ++channel) pixel[channel] = 114;
    } else if (longer(p.resized_height, p.resized_width) < longer(p.image_height, p.image_width)) {
        area_pixel(p, row, column, pixel);
    } else {
        linear_pixel(p, row, column, pixel);
    }
}

}  // extern "C"
