// What the adapter to TensorRT and the library's entry points know of one another.
#pragma once
#include <NvInferRuntime.h>

#include <string>

namespace parkdet {

constexpr char const *kName = "ParkdetNMS", *kVersion = "1", *kNamespace = "parkdet";

nvinfer1::IPluginCreatorV3One& nms_creator();

// Tells TensorRT's logger, or stderr where there is none, and returns what a refusing call returns: 1.
int32_t refuse(std::string const& why);

}  // namespace parkdet
