// The encoder on blocks of users. Included inside the namespace of one instruction set.

// Rows of the widest layer in a block. Fewer would stay in a second-level cache of 2 MiB, but measured slower: every block reads
// all weights once.
constexpr int64_t kUserBlockRows = 1536;

// Words of one convolution's panels, f channels in and out.
template <class E>
static int64_t encoder_words(int64_t f, int64_t kernel_size) {
  const Panels<Operand<E>> shape(f, f, kernel_size, nullptr, nullptr);
  return shape.direct_words() + (kernel_size == 3 ? shape.filtered_words() : 0);
}

template <class E>
static void encoder_pack(const Convolution& op, int32_t* words) {
  const Panels<Operand<E>> shape(op.f_in, op.f_out, op.kernel_size, nullptr, nullptr);
  Word* direct = reinterpret_cast<Word*>(words);
  Packer<Operand<E>>(op, false, direct, op.kernel_size == 3 ? direct + shape.direct_words() : nullptr).run();
}

// How one layer's rows pair up, the same for every user: partner[place] of the rank `place` among the layer's offsets, -1 for none.
static void pair_places(const int32_t* offsets, int64_t count, const int32_t* rank, int64_t length, int64_t dilation,
                        int32_t* partner) {
  for (int64_t p = 0; p < count; ++p) partner[p] = -1;
  for (int64_t p = 0; p < count; ++p) {
    const int64_t later = offsets[p] - dilation;
    if (partner[p] >= 0 || later < 0 || later >= length) continue;
    const int64_t q = rank[later];
    if (rank[later + 1] == q || partner[q] >= 0) continue;
    partner[p] = static_cast<int32_t>(q), partner[q] = static_cast<int32_t>(p);
  }
}

// One thread's room and tables for a block of users.
template <class E>
class UserBlock {
 public:
  UserBlock(const Encode<E>& op, const E* pads, const int32_t* partners, int64_t rows, int64_t users)
      : op_(op),
        pads_(pads),
        partners_(partners),
        buffers_(panels(0)),
        layers_{Array<E>(rows * op.f), Array<E>(rows * op.f), Array<E>(rows * op.f)},
        zeros_(op.f, true),
        table_(rows * op.kernel_size),
        residual_(rows),
        pairs_(rows),
        singles_(rows),
        bases_(3 * users) {}

  // Encodes users low..high-1.
  void run(int64_t low, int64_t high) {
    low_ = low, count_ = high - low;
    embed();
    for (int64_t c = 0; c < op_.convolutions; ++c) convolve(c);
    const E* last = layers_[op_.convolutions % 3].get();
    const int64_t* base = bases(op_.convolutions);
    for (int64_t u = 0; u < count_; ++u) {
      const bool real = op_.lengths[low + u] > 0;
      const E* from = real ? last + base[u] * op_.f : pad(op_.convolutions, op_.available - 1);
      for (int64_t i = 0; i < op_.f; i += W) store_part(op_.out + (low + u) * op_.f + i, load_part(from + i, op_.f - i), op_.f - i);
    }
  }

 private:
  Panels<Operand<E>> panels(int64_t convolution) const {
    const int64_t words = encoder_words<E>(op_.f, op_.kernel_size);
    const Word* direct = reinterpret_cast<const Word*>(op_.words) + convolution * words;
    Panels<Operand<E>> found(op_.f, op_.f, op_.kernel_size, direct, nullptr);
    found.filtered = direct + found.direct_words();
    return found;
  }
  const int32_t* rank(int64_t layer) const { return op_.ranks + layer * (op_.length + 1); }
  const E* pad(int64_t layer, int64_t position) const { return pads_ + (layer * op_.length + position) * op_.f; }
  // First row of each user in a layer; layers three apart share the room, as their rows do.
  int64_t* bases(int64_t layer) { return bases_.get() + layer % 3 * count_; }

  // Fills a layer's bases and returns its number of rows.
  int64_t lay_out(int64_t layer) {
    int64_t rows = 0;
    for (int64_t u = 0; u < count_; ++u) {
      bases(layer)[u] = rows;
      rows += rank(layer)[op_.lengths[low_ + u]];
    }
    return rows;
  }

  void embed() {
    rows_ = lay_out(0);
    E* to = layers_[0].get();
    for (int64_t u = 0; u < count_; ++u) {
      const int64_t* items = op_.x + (low_ + u) * op_.length;
      for (int64_t p = 0; p < rank(0)[op_.lengths[low_ + u]]; ++p, to += op_.f) {
        const float* from = op_.embedding + items[op_.available - 1 - op_.offsets[op_.starts[0] + p]] * op_.f;
        for (int64_t i = 0; i < op_.f; i += W) store_part(to + i, load_part(from + i, op_.f - i), op_.f - i);
      }
    }
  }

  // Tables of a convolution; the rows of its inputs are numbered in rows_, then come the pads by position.
  RowPlan plan(int64_t c) {
    const int64_t kernel_size = op_.kernel_size, dilation = op_.dilations[c];
    const int32_t* offsets = op_.offsets + op_.starts[c + 1];
    const int32_t* partner = partners_ + op_.starts[c + 1];
    const int32_t *rank_in = rank(c), *rank_block = c % 2 ? rank(c - 1) : nullptr;
    RowPlan found{table_.get(), kernel_size, {pairs_.get(), singles_.get(), 0, 0}};
    int32_t* at = table_.get();
    for (int64_t u = 0; u < count_; ++u) {
      const int64_t real = op_.lengths[low_ + u], base = bases(c + 1)[u], count = rank(c + 1)[real];
      for (int64_t p = 0; p < count; ++p) {
        for (int64_t k = 0; k < kernel_size; ++k) {
          const int64_t offset = offsets[p] + (kernel_size - 1 - k) * dilation;
          *at++ = static_cast<int32_t>(offset < real             ? bases(c)[u] + rank_in[offset]
                                       : offset < op_.available ? rows_ + op_.available - 1 - offset
                                                                : -1);
        }
        const int32_t row = static_cast<int32_t>(base + p);
        if (rank_block != nullptr) residual_.get()[row] = static_cast<int32_t>(bases(c - 1)[u] + rank_block[offsets[p]]);
        // The earlier position of a pair comes later among places: whoever lacks it stands alone.
        if (op_.filtered && partner[p] >= 0 && partner[p] < count) {
          if (partner[p] > p) continue;
          found.split.pairs[2 * found.split.pair_count] = row;
          found.split.pairs[2 * found.split.pair_count++ + 1] = static_cast<int32_t>(base + partner[p]);
        } else {
          found.split.singles[found.split.single_count++] = row;
        }
      }
    }
    return found;
  }

  void convolve(int64_t c) {
    const int64_t rows = lay_out(c + 1);
    const RowPlan found = plan(c);
    MaskedConv<E> op{};
    op.f_out = op_.f, op.eps = op_.eps;
    op.bias = op_.bias + c * op_.f, op.ln_weight = op_.ln_weight + c * op_.f, op.ln_bias = op_.ln_bias + c * op_.f;
    MaskedConvForward<E> io{};
    io.out = layers_[(c + 1) % 3].get();
    if (c % 2) io.residual = layers_[(c - 1) % 3].get(), io.residual_rows = residual_.get();
    const RowSource<E> source{layers_[c % 3].get(), op_.f, op_.f, zeros_.get(), rows_, pad(c, 0)};
    const Panels<Operand<E>> weights = panels(c);
    for (int64_t block = 0; block < found.blocks(); ++block) {
      run_block(found, block, weights, source, &buffers_, [&](int64_t row, float* z) { finish_row(op, io, row, 0, z); });
    }
    rows_ = rows;
  }

  const Encode<E>& op_;
  const E* pads_;
  const int32_t* partners_;
  BlockBuffers<E> buffers_;
  Array<E> layers_[3], zeros_;
  Array<int32_t> table_, residual_, pairs_, singles_;
  Array<int64_t> bases_;
  int64_t low_ = 0, count_ = 0, rows_ = 0;
};

template <class E>
static void encode(const Encode<E>& op) {
  const int64_t layers = op.convolutions + 1, all_pads = layers * op.length * op.f;
  Array<E> pads(all_pads);
  for (int64_t i = 0; i < all_pads; i += W) store_part(pads.get() + i, load_part(op.pads + i, all_pads - i), all_pads - i);
  Array<int32_t> partners(op.starts[layers]);
  for (int64_t c = 0; c < op.convolutions; ++c) {
    const int64_t start = op.starts[c + 1];
    pair_places(op.offsets + start, op.starts[c + 2] - start, op.ranks + (c + 1) * (op.length + 1), op.length, op.dilations[c],
                partners.get() + start);
  }
  // Users in blocks of about kUserBlockRows rows of the first layer, which is the widest.
  Array<int64_t> begins(op.users + 1);
  int64_t blocks = 0, rows = 0, most_rows = 0, most_users = 0;
  for (int64_t u = 0; u < op.users; ++u) {
    const int64_t own = op.ranks[op.lengths[u]];
    if (blocks == 0 || rows + own > kUserBlockRows) begins.get()[blocks++] = u, rows = 0;
    rows += own;
    most_rows = std::max(most_rows, rows);
    most_users = std::max(most_users, u + 1 - begins.get()[blocks - 1]);
  }
  begins.get()[blocks] = op.users;
  in_parallel(op.threads, [&] {
    UserBlock<E> work(op, pads.get(), partners.get(), most_rows, most_users);
#pragma omp for schedule(dynamic)
    for (int64_t b = 0; b < blocks; ++b) work.run(begins.get()[b], begins.get()[b + 1]);
  });
}
