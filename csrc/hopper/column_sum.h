// Column sums of the tiles of a ping-pong kernel's epilogue, in which 128 threads own a whole tile. There are no
// atomics, barriers or shared memory: each of the four warps writes one row of partial sums, and a second kernel adds
// the rows in a fixed order. The tests also run this file on a CPU.
#pragma once

namespace ajepa::hopper {

// The place of element e of a thread's fragment in a subtile of 64 rows. A warp has 16 of them, and a lane has two
// neighbouring columns of every 8, in two rows. tests/cuda_on_host/fragment_place.cu proves that CUTLASS deals them so.
struct FragmentPlace {
  __host__ __device__ static constexpr int row(int thread, int e) {
    return thread / 32 * 16 + thread % 32 / 4 + e / 2 % 2 * 8;
  }
  __host__ __device__ static constexpr int column(int thread, int e) { return e / 4 * 8 + thread % 4 * 2 + e % 2; }
};

template <int kColumns>  // of a subtile
struct ColumnSums {
  static_assert(kColumns % 32 == 0, "each of the eight lanes that share columns keeps the sums of some");
  static constexpr int kSums = kColumns / 4;  // a lane's columns
  float sums[kSums];

  // Adds a fragment: two rows of each column. `first` starts anew.
  template <class Fragment>
  __device__ __forceinline__ void add(const Fragment& in, bool first) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      const int e = element(i);
      const float two = in[e] + in[e + 2];
      sums[i] = first ? two : sums[i] + two;
    }
  }

  // Adds the eight lanes that share columns, and writes the sums of those columns that are below `columns`. In each of
  // three steps a lane gives away half of its sums, so that in the end every lane has kSums / 8 of them.
  __device__ __forceinline__ void write(float* row, int columns, int lane) {
    int first = 0;
#pragma unroll
    for (int half = kSums / 2, bit = 16; bit >= 4; half /= 2, bit /= 2) {
      const bool upper = lane & bit;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float give = upper ? sums[i] : sums[i + half], keep = upper ? sums[i + half] : sums[i];
        sums[i] = keep + __shfl_xor_sync(0xffffffffu, give, bit);
      }
      first += upper ? half : 0;
    }
#pragma unroll
    for (int i = 0; i < kSums / 8; ++i) {
      const int column = FragmentPlace::column(lane, element(first + i));
      if (column < columns) row[column] = sums[i];
    }
  }

 private:
  // The upper of the two elements of column i. The other one is two elements further on.
  __device__ __forceinline__ static constexpr int element(int i) { return i / 2 * 4 + i % 2; }
};

}  // namespace ajepa::hopper
