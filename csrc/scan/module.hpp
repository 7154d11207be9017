// Binds the header scan to Python.
#pragma once

#include <nanobind/nanobind.h>

namespace hicache::scan {

void bind(nanobind::module_& m);

}  // namespace hicache::scan
