// Binds the shared memory region to Python.
#pragma once

#include <nanobind/nanobind.h>

namespace hicache::memory {

void bind(nanobind::module_& m);

}  // namespace hicache::memory
