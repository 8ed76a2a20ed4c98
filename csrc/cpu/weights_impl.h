// Weights in the order that register tiles read them. Included inside the namespace of one instruction set.

// Planes of minimal filtering, in the order that tiles take them. Of a pair's four inputs x0..x3, one dilation apart, and the
// taps g0..g2: kSum x1+x2 with (g0+g1+g2)/2, kDifference x2-x1 with (g0-g1+g2)/2, kFirst x0-x2 with g0, kSecond x3-x1 with g2.
constexpr int kSum = 0, kDifference = 1, kFirst = 2, kSecond = 3, kPlanes = 4;

// One convolution's matrices of operands T, [column tiles][matrices][units][NR], zero in padded columns and units: a matrix per
// tap in `direct`, one per plane in `filtered`.
template <class T>
struct Panels {
  int64_t kernel_size, units, ldc;
  const Word *direct, *filtered;

  Panels(int64_t depth, int64_t columns, int64_t taps, const Word* by_tap, const Word* by_plane)
      : kernel_size(taps),
        units((depth + Units<T>::kDepth - 1) / Units<T>::kDepth),
        ldc(round_up(columns, NR)),
        direct(by_tap),
        filtered(by_plane) {}
  int64_t direct_words() const { return kernel_size * units * ldc; }
  int64_t filtered_words() const { return kPlanes * units * ldc; }
};

// Fills panels; null where a set is not wanted. `transposed`: the matrices of d(input), [f_out, f_in] per tap, else [f_in, f_out].
template <class T>
class Packer {
 public:
  Packer(const Convolution& op, bool transposed, Word* direct, Word* filtered)
      : op_(op), transposed_(transposed), direct_(direct), filtered_(filtered) {}

  void run() const {
    const int64_t depth = transposed_ ? op_.f_out : op_.f_in, columns = transposed_ ? op_.f_in : op_.f_out;
    const Panels<T> shape(depth, columns, op_.kernel_size, direct_, filtered_);
#pragma omp parallel for num_threads(op_.threads) schedule(static)
    for (int64_t first = 0; first < shape.ldc; first += NR) {
      for (int64_t u = 0; u < shape.units; ++u) {
        for (int64_t j = 0; j < NR; ++j) {
          const float* g[Units<T>::kDepth];
          for (int s = 0; s < Units<T>::kDepth; ++s) {
            const int64_t row = u * Units<T>::kDepth + s, column = first + j;
            const int64_t out = transposed_ ? row : column, in = transposed_ ? column : row;
            g[s] = row < depth && column < columns ? op_.weight + (out * op_.f_in + in) * op_.kernel_size : nullptr;
          }
          put(g, shape.units, first, u * NR + j);
        }
      }
    }
  }

 private:
  void put(const float* const* g, int64_t units, int64_t first, int64_t at) const {
    constexpr int kDepth = Units<T>::kDepth;
    float values[kDepth];
    for (int64_t k = 0; direct_ != nullptr && k < op_.kernel_size; ++k) {
      for (int s = 0; s < kDepth; ++s) values[s] = g[s] == nullptr ? 0.0f : g[s][k];
      direct_[first * units * op_.kernel_size + k * units * NR + at] = Units<T>::join(values);
    }
    if (filtered_ == nullptr) return;
    float four[kPlanes][kDepth] = {};
    for (int s = 0; s < kDepth; ++s) {
      if (g[s] == nullptr) continue;
      const float outer = g[s][0] + g[s][2];
      four[kSum][s] = (outer + g[s][1]) * 0.5f;
      four[kDifference][s] = (outer - g[s][1]) * 0.5f;
      four[kFirst][s] = g[s][0];
      four[kSecond][s] = g[s][2];
    }
    for (int plane = 0; plane < kPlanes; ++plane) {
      filtered_[first * units * kPlanes + plane * units * NR + at] = Units<T>::join(four[plane]);
    }
  }

  Convolution op_;
  bool transposed_;
  Word *direct_, *filtered_;
};

// Panels in memory of their own.
template <class T>
class PackedWeights {
 public:
  PackedWeights(const Convolution& op, bool transposed, bool with_direct, bool with_filtered)
      : shape_(transposed ? op.f_out : op.f_in, transposed ? op.f_in : op.f_out, op.kernel_size, nullptr, nullptr),
        direct_(with_direct ? shape_.direct_words() : 0),
        filtered_(with_filtered ? shape_.filtered_words() : 0) {
    shape_.direct = direct_.get(), shape_.filtered = filtered_.get();
    Packer<T>(op, transposed, with_direct ? direct_.get() : nullptr, with_filtered ? filtered_.get() : nullptr).run();
  }
  const Panels<T>& operator*() const { return shape_; }

 private:
  Panels<T> shape_;
  Array<Word> direct_, filtered_;
};
