// cuFile's part of the Python module hicache_ext._cuda.
#pragma once

#include <nanobind/nanobind.h>

namespace hicache::gds {

void bind(nanobind::module_& m);

}  // namespace hicache::gds
