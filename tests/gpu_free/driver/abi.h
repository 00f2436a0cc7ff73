// The part of the CUDA driver's binary interface that the simulated driver speaks, so that it builds without CUDA's
// headers. The numbers and layouts are those of cuda.h 13; a test compares them where that header is installed.
#pragma once
#include <cstddef>
#include <cstdint>

enum Result : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    LAUNCH_FAILED = 719,
    NOT_SUPPORTED = 801,
    STREAM_CAPTURE_UNSUPPORTED = 900,
    STREAM_CAPTURE_INVALIDATED = 901,
    STREAM_CAPTURE_UNJOINED = 904,
    STREAM_CAPTURE_ISOLATION = 905,
    STREAM_CAPTURE_IMPLICIT = 906,
};

using Device = int;
using DevicePointer = unsigned long long;
using HostFunction = void (*)(void*);
struct Uuid { char bytes[16]; };

enum DeviceAttribute : int {
    MAX_THREADS_PER_BLOCK = 1,
    MAX_SHARED_MEMORY_PER_BLOCK = 8,
    WARP_SIZE = 10,
    CLOCK_RATE = 13,
    MULTIPROCESSOR_COUNT = 16,
    MEMORY_CLOCK_RATE = 36,
    GLOBAL_MEMORY_BUS_WIDTH = 37,
    UNIFIED_ADDRESSING = 41,
    COMPUTE_CAPABILITY_MAJOR = 75,
    COMPUTE_CAPABILITY_MINOR = 76,
    MAX_SHARED_MEMORY_PER_BLOCK_OPTIN = 97,
};

enum FunctionAttribute : int { FUNCTION_MAX_THREADS_PER_BLOCK = 0, FUNCTION_LOCAL_SIZE_BYTES = 3,
                               FUNCTION_NUM_REGS = 4, FUNCTION_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 };
enum StreamFlag : unsigned { STREAM_NON_BLOCKING = 1 };
enum PointerAttribute : int { POINTER_MEMORY_TYPE = 2 };
enum MemoryType : unsigned { MEMORY_HOST = 1, MEMORY_DEVICE = 2 };
enum CaptureStatus : int { CAPTURE_NONE = 0, CAPTURE_ACTIVE = 1, CAPTURE_INVALIDATED = 2 };

struct LaunchConfig {
    unsigned grid[3], block[3], shared_bytes;
    void* stream;
    void* attributes;
    unsigned attribute_count;
};

// Entries of the `extra` argument of a launch, by which pycuda passes all parameters as one block.
inline void* const LAUNCH_PARAM_END = nullptr;
inline void* const LAUNCH_PARAM_BUFFER_POINTER = reinterpret_cast<void*>(1);
inline void* const LAUNCH_PARAM_BUFFER_SIZE = reinterpret_cast<void*>(2);
