// Moving many pieces of files to and from device memory: one caller, one stream, one batch at a time.
//
// Does not belong here: what the bytes mean, or who waits for them.
#pragma once

#include <cstdint>
#include <vector>

#include "gds/cufile.hpp"

namespace hicache::gds {

enum class Way : int { calls = 0, batch = 1, stream = 2 };

/// One contiguous piece. base: where registered memory begins, or the address itself.
struct Piece {
    Handle file;
    cuda::Address base;
    off_t base_offset;
    std::size_t length;
    off_t file_offset;
};

/// Not for two threads at a time.
class Lane {
  public:
    /// cuda::Failed, cuda::Unavailable: no stream to be had.
    explicit Lane(std::shared_ptr<Library> library);
    ~Lane();
    Lane(const Lane&) = delete;
    Lane& operator=(const Lane&) = delete;

    /// Begins to move these pieces: by one call after the other, as batches (both wait until all are there), or in the
    /// order of the lane's stream, at once. What was issued before must have been waited for.
    /// cuda::Unavailable: the library has no such way; nothing was begun.
    void issue(Way way, bool write, std::vector<Piece> pieces);

    /// Waits until nothing of what was issued is under way; for each piece the bytes moved, or -errno, or -(cuFile's
    /// code) from 5000 on. cuda::Failed: the stream is in error.
    const std::vector<std::int64_t>& results();

    /// CRC32C of chunks of device memory, after what was issued; see Device::crc32c.
    void crc32c(const std::uint64_t* addresses, const std::uint32_t* lengths, std::size_t count, std::uint32_t* out,
                unsigned blocks);

    const std::shared_ptr<Library> library;

  private:
    void by_calls(bool write);
    std::int64_t call(bool write, const Piece& piece);
    void by_batches(bool write);
    void batch(bool write, std::size_t first, std::size_t count);
    void by_stream(bool write);
    void drop_batch();

    cuda::Stream stream_ = nullptr;
    BatchHandle batch_ = nullptr;
    std::size_t batch_size_ = 0;
    bool streaming_ = false;
    // The library keeps pointers to these while a stream's work is under way.
    std::vector<Piece> pieces_;
    std::vector<ssize_t> streamed_;
    std::vector<std::int64_t> results_;
};

}  // namespace hicache::gds
