// What csrc/module.cpp needs to know of the index.
#pragma once

#include <nanobind/nanobind.h>

namespace hicache::index {

void bind(nanobind::module_& m);

}  // namespace hicache::index
