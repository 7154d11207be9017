// The interpreter's lock, given up for as long as this lives: in place of nanobind's guard of the same use.
//
// A daemon thread that takes the lock again while the interpreter is taken down is ended by unwinding its stack (until
// Python 3.14), and a destructor that is unwound through ends the whole process (std::terminate). Here that thread stops
// for good, as it does from 3.14 on, and the process ends as it would have.
#pragma once

#include <Python.h>
#include <cxxabi.h>
#include <unistd.h>

namespace hicache {

class Released {
public:
    Released() : state_(PyEval_SaveThread()) {}
    ~Released() {
        try {
            PyEval_RestoreThread(state_);
        } catch (abi::__forced_unwind&) {
            for (;;) pause();
        }
    }
    Released(const Released&) = delete;
    Released& operator=(const Released&) = delete;

private:
    PyThreadState* state_;
};

}  // namespace hicache
