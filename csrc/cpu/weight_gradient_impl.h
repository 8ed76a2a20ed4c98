// Sums of outer products: one thread's share of d(weight). Included inside the namespace of one instruction set.

// Rows or pairs whose panels are summed at once: enough that reading and writing the sums costs little beside the products.
constexpr int64_t kDepthBlock = 48;

template <class E>
class WeightGradient {
  typedef Operand<E> T;

 public:
  // Of `f_in` input channels: all of them, or none where no gradient is needed.
  WeightGradient(const Convolution& op, int64_t f_in, int64_t ldz)
      : f_in_(f_in),
        kernel_size_(op.kernel_size),
        in_(round_up(f_in, W)),
        ldz_(ldz),
        // A cache line more than the channels: rows a power of two apart would meet in few sets of the first-level cache.
        depth_{0, in_ + 16, ldz + 16},
        left_plane_(depth_.left_stride * kUnits),
        right_plane_(depth_.right_stride * kUnits),
        sums_(kernel_size_ * in_ * ldz, true),
        left_((kernel_size_ > kPlanes ? kernel_size_ : kPlanes) * left_plane_),
        right_(kPlanes * right_plane_) {}

  // Row `in` of the sum of tap k, [ldz].
  const float* at(int64_t k, int64_t in) { return sums_.get() + (k * in_ + in) * ldz_; }

  // Adds what the plan's single rows low..high-1 contribute: x of every tap by dz of the row.
  void add_rows(const RowPlan& plan, int64_t low, int64_t high, const RowSource<E>& x, const RowSource<E>& dz) {
    for (int64_t begin = low; begin < high; begin += kDepthBlock) {
      const int64_t n = std::min(kDepthBlock, high - begin);
      const int32_t* rows = plan.split.singles + begin;
      for (int64_t k = 0; k < kernel_size_; ++k) {
        fill<1>(left_.get() + k * left_plane_, 0, depth_.left_stride, n, f_in_, [&](int64_t r, int64_t c, V* v) {
          v[0] = load_part(x(plan.table[rows[r] * kernel_size_ + k]) + c, f_in_ - c);
        });
      }
      fill<1>(right_.get(), 0, depth_.right_stride, n, ldz_, [&](int64_t r, int64_t c, V* v) { v[0] = load(dz(rows[r]) + c); });
      depth_.units = units_of(n);
      for (int64_t out = 0; out < ldz_; out += NR) {
        for (int64_t in = 0; in < in_; in += OR) {
          for (int64_t k = 0; k < kernel_size_; ++k) {
            outer_tile<T>(left_.get() + k * left_plane_ + in, right_.get() + out, depth_, sum_tile(k, in, out), ldz_);
          }
        }
      }
    }
  }

  // The same for the pairs low..high-1.
  void add_pairs(const RowPlan& plan, int64_t low, int64_t high, const RowSource<E>& x, const RowSource<E>& dz) {
    float scratch[OR * NR] __attribute__((aligned(64)));
    for (int64_t begin = low; begin < high; begin += kDepthBlock) {
      const int64_t n = std::min(kDepthBlock, high - begin);
      fill<kPlanes>(left_.get(), left_plane_, depth_.left_stride, n, f_in_, [&](int64_t r, int64_t c, V* v) {
        V in[4];
        for (int q = 0; q < 4; ++q) in[q] = load_part(x(plan.input(begin + r, q)) + c, f_in_ - c);
        v[kSum] = in[1] + in[2], v[kDifference] = in[2] - in[1];
        v[kFirst] = in[0] - in[2], v[kSecond] = in[3] - in[1];
      });
      const int32_t* pairs = plan.split.pairs + 2 * begin;
      fill<kPlanes>(right_.get(), right_plane_, depth_.right_stride, n, ldz_, [&](int64_t r, int64_t c, V* v) {
        const V first = load(dz(pairs[2 * r]) + c), second = load(dz(pairs[2 * r + 1]) + c);
        v[kSum] = first + second, v[kDifference] = first - second;
        v[kFirst] = first, v[kSecond] = second;
      });
      depth_.units = units_of(n);
      for (int64_t out = 0; out < ldz_; out += NR) {
        for (int64_t in = 0; in < in_; in += OR) {
          filtered_outer_tile<T>(left_.get() + in, left_plane_, right_.get() + out, right_plane_, depth_, sum_tile(0, in, out), ldz_,
                                 in_ * ldz_, scratch);
        }
      }
    }
  }

 private:
  static constexpr int64_t kUnits = kDepthBlock / Units<T>::kDepth;

  static int64_t units_of(int64_t n) { return (n + Units<T>::kDepth - 1) / Units<T>::kDepth; }
  float* sum_tile(int64_t k, int64_t in, int64_t out) { return sums_.get() + (k * in_ + in) * ldz_ + out; }

  // Units of n rows, `stride` apart, one set per plane; fn(r, c, v) gives channels c.. of row r in every plane.
  template <int Planes, class Fn>
  static void fill(Word* units, int64_t plane_size, int64_t stride, int64_t n, int64_t width, const Fn& fn) {
    constexpr int kDepth = Units<T>::kDepth;
    for (int64_t u = 0; u < units_of(n); ++u) {
      for (int64_t c = 0; c < width; c += W) {
        V v[kDepth][Planes] = {};
        for (int s = 0; s < kDepth; ++s) {
          if (u * kDepth + s < n) fn(u * kDepth + s, c, v[s]);
        }
        for (int plane = 0; plane < Planes; ++plane) {
          V rows[kDepth];
          for (int s = 0; s < kDepth; ++s) rows[s] = v[s][plane];
          const U words = Units<T>::join(rows);
          std::memcpy(units + plane * plane_size + u * stride + c, &words, sizeof words);
        }
      }
    }
  }

  int64_t f_in_, kernel_size_, in_, ldz_;
  Depth depth_;
  int64_t left_plane_, right_plane_;
  Array<float> sums_;
  Array<Word> left_, right_;
};
