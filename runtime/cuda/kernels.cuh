// All kernels. Results are to be equal on every GPU and on the CPU, to the bit: compile without contraction to fused
// multiply-add (-fmad=false).
#pragma once
#include "letterbox.cuh"
#include "nms.cuh"
