#include "memory/region.hpp"

#include <cstring>
#include <new>

namespace hicache::memory {
namespace {

constexpr std::uint32_t kPageFormat = 1;

}  // namespace

void Region::format(std::uint8_t* base, const Geometry& g) noexcept {
    auto* super = new (base) Superblock{};
    std::memcpy(super->magic, kMagic, sizeof kMagic);
    super->version = kVersion;
    super->page_format = kPageFormat;
    super->file_bytes = g.file_bytes;
    super->extent_bytes = g.extent_bytes;
    super->extents = g.extents;
    super->buckets = g.buckets;
    super->extents_at = g.extents_at;
    super->table_at = g.table_at;
    super->marks_at = g.marks_at;
    super->data_at = g.data_at;
    auto* extents = reinterpret_cast<Extent*>(base + g.extents_at);
    for (std::uint64_t i = 0; i < g.extents; ++i) extents[i].control = Control::of(State::kFree, 0, 1).word;
}

std::string Region::problem(const std::uint8_t* base, std::uint64_t length) {
    if (length < kUnit) return "too short";
    const auto* super = reinterpret_cast<const Superblock*>(base);
    if (std::memcmp(super->magic, kMagic, sizeof kMagic) != 0) return "not a region";
    if (super->version != kVersion) return "format " + std::to_string(super->version);
    if (super->page_format != kPageFormat) return "page format " + std::to_string(super->page_format);
    const Geometry g = Geometry::of(super->extent_bytes * super->extents);
    const bool same = super->extents != 0 && super->extents <= kMostExtents && super->extent_bytes <= kMaxExtent &&
                      g.extents == super->extents && g.extent_bytes == super->extent_bytes &&
                      g.buckets == super->buckets && g.extents_at == super->extents_at &&
                      g.table_at == super->table_at && g.marks_at == super->marks_at && g.data_at == super->data_at &&
                      g.file_bytes == super->file_bytes;
    if (!same) return "another geometry";
    return g.file_bytes == length ? "" : "another length";
}

Region::Region(std::uint8_t* base, int memory_fd, int lock_fd, unsigned owner)
    : base_(base),
      super_(reinterpret_cast<Superblock*>(base)),
      extent_bytes_(super_->extent_bytes),
      extents_count_(super_->extents),
      units_(extent_bytes_ / kUnit),
      buckets_(super_->buckets),
      extents_(reinterpret_cast<Extent*>(base + super_->extents_at)),
      table_(reinterpret_cast<std::atomic<Word>*>(base + super_->table_at)),
      marks_(reinterpret_cast<std::atomic<std::uint8_t>*>(base + super_->marks_at)),
      data_(base + super_->data_at),
      lock_fd_(lock_fd),
      owner_(owner),
      supply_(data_, super_->data_at, extent_bytes_, extents_count_, memory_fd) {
    // Whoever had this number before is dead, or this process would not have it.
    for (std::uint32_t i = 0; i < extents_count_; ++i) {
        Word word = control(i).load();
        const Control now{word};
        if ((now.state() == State::kOpen || now.state() == State::kClaimed) && now.owner() == owner_)
            control(i).compare_exchange_strong(word, Control::of(State::kSealed, 0, now.generation()).word);
    }
}

}  // namespace hicache::memory
