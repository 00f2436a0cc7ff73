// What the fatbin is compiled from. The hash of the sources and of the options travels inside: `build.py` gives it.
#include "kernels.cuh"

extern "C" __device__ const char parkdet_sources[] = "parkdet-sources:" PARKDET_SOURCES;
