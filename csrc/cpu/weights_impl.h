// Weights in the order that register tiles read them. Included inside the namespace of one instruction set.

// Planes of minimal filtering, in the order that tiles take them. Of a pair's four inputs x0..x3, one dilation apart, and the
// taps g0..g2: kSum x1+x2 with (g0+g1+g2)/2, kDifference x2-x1 with (g0-g1+g2)/2, kFirst x0-x2 with g0, kSecond x3-x1 with g2.
constexpr int kSum = 0, kDifference = 1, kFirst = 2, kSecond = 3, kPlanes = 4;

// One convolution's matrices of operands T, [column tiles][matrices][units][NR], zero in padded columns and units. `transposed`: those of
// d(input), [f_out, f_in] per tap, else [f_in, f_out].
template <class T>
struct PackedWeights {
  int64_t kernel_size, depth, columns, units, ldc;
  Array<Word> direct, filtered;

  // `threads` share the work. A plane set that is not asked for is left empty.
  PackedWeights(const Convolution& op, bool transposed, bool with_direct, bool with_filtered)
      : kernel_size(op.kernel_size),
        depth(transposed ? op.f_out : op.f_in),
        columns(transposed ? op.f_in : op.f_out),
        units((depth + Units<T>::kDepth - 1) / Units<T>::kDepth),
        ldc(round_up(columns, NR)),
        direct(with_direct ? kernel_size * units * ldc : 0),
        filtered(with_filtered ? kPlanes * units * ldc : 0) {
#pragma omp parallel for num_threads(op.threads) schedule(static)
    for (int64_t first = 0; first < ldc; first += NR) {
      Word* to = direct.get() + first * units * kernel_size;
      Word* planes = filtered.get() + first * units * kPlanes;
      for (int64_t u = 0; u < units; ++u) {
        for (int64_t j = 0; j < NR; ++j) {
          const float* g[Units<T>::kDepth];
          for (int s = 0; s < Units<T>::kDepth; ++s) {
            const int64_t row = u * Units<T>::kDepth + s, column = first + j;
            const int64_t out = transposed ? row : column, in = transposed ? column : row;
            g[s] = row < depth && column < columns ? op.weight + (out * op.f_in + in) * kernel_size : nullptr;
          }
          put(g, u * NR + j, with_direct ? to : nullptr, with_filtered ? planes : nullptr);
        }
      }
    }
  }

 private:
  void put(const float* const* g, int64_t at, Word* to, Word* planes) const {
    constexpr int kDepth = Units<T>::kDepth;
    float values[kDepth];
    for (int64_t k = 0; to != nullptr && k < kernel_size; ++k) {
      for (int s = 0; s < kDepth; ++s) values[s] = g[s] == nullptr ? 0.0f : g[s][k];
      to[k * units * NR + at] = Units<T>::join(values);
    }
    if (planes == nullptr) return;
    float four[kPlanes][kDepth] = {};
    for (int s = 0; s < kDepth; ++s) {
      if (g[s] == nullptr) continue;
      const float outer = g[s][0] + g[s][2];
      four[kSum][s] = (outer + g[s][1]) * 0.5f;
      four[kDifference][s] = (outer - g[s][1]) * 0.5f;
      four[kFirst][s] = g[s][0];
      four[kSecond][s] = g[s][2];
    }
    for (int plane = 0; plane < kPlanes; ++plane) planes[plane * units * NR + at] = Units<T>::join(four[plane]);
  }
};
