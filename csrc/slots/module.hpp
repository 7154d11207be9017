// Adds the calls for runs of slots to hicache_ext._native.
#pragma once

#include <nanobind/nanobind.h>

namespace hicache::slots {

void bind(nanobind::module_& m);

}  // namespace hicache::slots
