// What the tests without Python (test_*.cpp) say when something is not so.
#pragma once

#include <cstdio>
#include <cstdlib>

#define CHECK(condition)                                                                 \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);         \
            std::abort();                                                                \
        }                                                                                \
    } while (0)
