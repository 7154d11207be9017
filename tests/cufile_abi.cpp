// Whether csrc/gds declares what NVIDIA's header does. Compiled for its assertions alone (-fsyntax-only), where there is
// such a header: gpu/test_gds.py.
#include <cuda.h>
#include <cufile.h>

#include "gds/cufile.hpp"

namespace ours = hicache::gds;

#define SAME_PLACE(theirs, their_member, mine, my_member) \
    static_assert(offsetof(theirs, their_member) == offsetof(ours::mine, my_member))

static_assert(sizeof(CUfileError_t) == sizeof(ours::Error));
SAME_PLACE(CUfileError_t, cu_err, Error, cuda);

static_assert(sizeof(CUfileDescr_t) == sizeof(ours::Descriptor));
SAME_PLACE(CUfileDescr_t, handle, Descriptor, fd);
SAME_PLACE(CUfileDescr_t, fs_ops, Descriptor, operations);

static_assert(sizeof(CUfileDrvProps_t) <= sizeof(ours::Properties));
SAME_PLACE(CUfileDrvProps_t, fflags, Properties, features);
SAME_PLACE(CUfileDrvProps_t, max_batch_io_size, Properties, max_batch);

static_assert(sizeof(CUfileIOParams_t) == sizeof(ours::BatchIo));
SAME_PLACE(CUfileIOParams_t, u.batch.devPtr_base, BatchIo, base);
SAME_PLACE(CUfileIOParams_t, u.batch.file_offset, BatchIo, file_offset);
SAME_PLACE(CUfileIOParams_t, u.batch.devPtr_offset, BatchIo, base_offset);
SAME_PLACE(CUfileIOParams_t, u.batch.size, BatchIo, size);
SAME_PLACE(CUfileIOParams_t, fh, BatchIo, file);
SAME_PLACE(CUfileIOParams_t, opcode, BatchIo, operation);
SAME_PLACE(CUfileIOParams_t, cookie, BatchIo, cookie);

static_assert(sizeof(CUfileIOEvents_t) == sizeof(ours::BatchEvent));
SAME_PLACE(CUfileIOEvents_t, status, BatchEvent, status);
SAME_PLACE(CUfileIOEvents_t, ret, BatchEvent, moved);

static_assert(CU_FILE_HANDLE_TYPE_OPAQUE_FD == ours::kOpaqueFd);
static_assert(CUFILE_BATCH == ours::kBatchMode);
static_assert(CUFILE_READ == ours::kBatchRead && CUFILE_WRITE == ours::kBatchWrite);
static_assert(CUFILE_WAITING == ours::kWaiting && CUFILE_PENDING == ours::kPending);
static_assert(CUFILE_COMPLETE == ours::kComplete);
static_assert(CUFILEOP_BASE_ERR == ours::kFirstCode);
static_assert(CU_FILE_CUDA_DRIVER_ERROR == ours::kCudaDriverError);
static_assert(CU_FILE_DRIVER_ALREADY_OPEN == ours::kAlreadyOpen);

int main() {
    ours::Api api{};
    const auto same = [](auto theirs, auto mine) { static_assert(sizeof(theirs) == sizeof(mine)); };
    same(&cuFileReadAsync, api.read_async);
    static_assert(CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE == ours::kParameterAllowCompatibility);
}
