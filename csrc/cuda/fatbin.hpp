// The compiled kernels, for cuModuleLoadData; null in a build without nvcc.
#pragma once

namespace hicache::cuda {

const void* fatbin();

}  // namespace hicache::cuda
