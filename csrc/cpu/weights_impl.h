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
    in_parallel(op_.threads, [&] {
      Array<float> taps(W * W * op_.kernel_size);
#pragma omp for schedule(static)
      for (int64_t column = 0; column < shape.ldc; column += W) {
        for (int64_t row = 0; row < depth; row += W) {
          read(column, row, taps.get());
          write(shape, column, row, std::min<int64_t>(W, depth - row), taps.get());
        }
      }
    });
  }

 private:
  // W rows of W columns of every tap, [W][kernel_size][W], zero where the matrices end.
  void read(int64_t column, int64_t row, float* taps) const {
    const int64_t out = transposed_ ? row : column, in = transposed_ ? column : row, pitch = op_.f_in * op_.kernel_size;
    const int64_t outs = op_.f_out - out, count = std::min<int64_t>(W, op_.f_in - in) * op_.kernel_size;
    const float* from = op_.weight + out * pitch + in * op_.kernel_size;
    if (transposed_) {
      std::memset(taps, 0, sizeof(float) * W * W * op_.kernel_size);
      for (int64_t i = 0; i < outs && i < W; ++i) {
        for (int64_t k = 0; k < op_.kernel_size; ++k) {
          float* to = taps + (i * op_.kernel_size + k) * W;
          for (int64_t j = 0; j * op_.kernel_size < count; ++j) to[j] = from[i * pitch + j * op_.kernel_size + k];
        }
      }
      return;
    }
    for (int64_t q = 0; q < W * op_.kernel_size; q += W) {
      V v[W];
      for (int i = 0; i < W; ++i) v[i] = i < outs && q < count ? load_part(from + i * pitch + q, count - q) : V{};
      transpose(v);
      for (int i = 0; i < W; ++i) store(taps + (q + i) * W, v[i]);
    }
  }

  // Puts `rows` of those rows where they belong.
  void write(const Panels<T>& shape, int64_t column, int64_t row, int64_t rows, const float* taps) const {
    constexpr int kDepth = Units<T>::kDepth;
    static_assert(W % kDepth == 0, "whole units are read at once");
    const int64_t first = column / NR * NR, matrix = shape.units * NR;
    for (int64_t r = 0; r < rows; r += kDepth) {
      const int64_t at = (row + r) / kDepth * NR + column % NR;
      V g[kDepth], four[kPlanes][kDepth];
      for (int64_t k = 0; k < op_.kernel_size; ++k) {
        for (int s = 0; s < kDepth; ++s) g[s] = load(taps + ((r + s) * op_.kernel_size + k) * W);
        if (direct_ != nullptr) put(direct_ + first * shape.units * op_.kernel_size + k * matrix + at, g);
      }
      if (filtered_ == nullptr) continue;
      for (int s = 0; s < kDepth; ++s) {
        const float* tap = taps + (r + s) * op_.kernel_size * W;
        const V middle = load(tap + W), outer = load(tap) + load(tap + 2 * W);
        four[kSum][s] = (outer + middle) * 0.5f;
        four[kDifference][s] = (outer - middle) * 0.5f;
        four[kFirst][s] = load(tap);
        four[kSecond][s] = load(tap + 2 * W);
      }
      for (int p = 0; p < kPlanes; ++p) put(filtered_ + first * shape.units * kPlanes + p * matrix + at, four[p]);
    }
  }
  static void put(Word* to, const V* rows) {
    const U words = Units<T>::join(rows);
    std::memcpy(to, &words, sizeof words);
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
