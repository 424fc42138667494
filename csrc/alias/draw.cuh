// One draw from an alias table on the GPU: for the kernel that makes draws, and for those that go on with them.
#pragma once

#include "alias/kernel.h"
#include "alias/math.h"
#include "common/device.cuh"

namespace fastkd::alias {
namespace {

// The item of a table of positive total weight: integers only (math.h), so the bits of the CPU. A broken table may give an
// item beyond the last one; nothing outside the table is read.
FASTKD_DEVICE int64_t draw(const TableView& table, uint64_t total, const alias_math::DrawWords& words) {
  using namespace alias_math;
  const uint64_t blocks = static_cast<uint64_t>(table.blocks);
  const Bin bin = uniform_bin(words.top, blocks);
  const device::Pack<uint64_t> entry = device::load_pack(table.top + 2 * bin.index);
  const uint64_t other = entry.value[1] < blocks ? entry.value[1] : 0;
  const uint64_t block = multiply_high(bin.fraction, total) < entry.value[0] ? bin.index : other;
  const Bin inner = uniform_bin(words.block, static_cast<uint64_t>(block_items(table.items, static_cast<int64_t>(block))));
  const uint64_t word = table.table[block * kBlockSize + inner.index];
  const bool own = multiply_high(inner.fraction, table.block_weight[block]) < threshold_of(word);
  return static_cast<int64_t>(block * kBlockSize + (own ? inner.index : alias_of(word)));
}

}  // namespace
}  // namespace fastkd::alias
