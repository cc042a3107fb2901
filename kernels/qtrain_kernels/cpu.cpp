// The operations of reference.py for one plan, compiled for the processor at hand: one read of the input, one write.
//
// cpu.py writes the constants that this file uses (the plan, the dtypes, the order of the rotation) before it. LANES
// lines are worked on at once, one a lane of a vector: along dim -1 LANES runs of memory, transposed on the way in and
// out; along dim -2 LANES columns. A tile is `height` elements of each, in the cache of one core. Every value goes
// through the same float32 operations as in reference.py, in the same order; no multiply-add is fused.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif
#include <limits>
#include <type_traits>
#include <utility>

namespace {

// As many float32 as a register holds. Vectors of two registers run ten times slower: the compiler keeps them in memory
// and takes them apart lane by lane.
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif
typedef float vf __attribute__((vector_size(4 * LANES)));
typedef int32_t vi __attribute__((vector_size(4 * LANES)));
typedef uint32_t vu __attribute__((vector_size(4 * LANES)));
typedef uint16_t vh __attribute__((vector_size(2 * LANES)));
typedef uint8_t vb __attribute__((vector_size(LANES)));
typedef uint8_t vq __attribute__((vector_size(4 * LANES)));  // four bytes a lane

constexpr float INF = std::numeric_limits<float>::infinity();
constexpr float NOT_A_NUMBER = std::numeric_limits<float>::quiet_NaN();

inline vf all(float x) { return vf{} + x; }
inline vi bits_of(vf x) { return (vi)x; }
inline vf absolute(vf x) { return (vf)(bits_of(x) & 0x7fffffff); }
inline vf clamped(vf x, float limit) { return x < -limit ? all(-limit) : (x > limit ? all(limit) : x); }
inline vf finite_or_nan(vf x) { return x < INF ? x : all(NOT_A_NUMBER); }
inline vf nonzero(vf x) { return x == 0.0f ? all(1.0f) : x; }

inline vf root(vf x) {
  for (int l = 0; l < LANES; l++) x[l] = __builtin_sqrtf(x[l]);
  return x;
}
inline vf rounded(vf x) {
  for (int l = 0; l < LANES; l++) x[l] = __builtin_rintf(x[l]);
  return x;
}
inline vf floored(vf x) {
  for (int l = 0; l < LANES; l++) x[l] = __builtin_floorf(x[l]);
  return x;
}
inline vf raised(vf x) {
  for (int l = 0; l < LANES; l++) x[l] = __builtin_ceilf(x[l]);
  return x;
}

// ----------------------------------------------------------------------------------------------------------- reductions

// Halves are added until one is left, an odd last one waiting: reference.tree_sum. Destroys v.
inline vf tree_sum(vf* v, int64_t n) {
  while (n > 1) {
    int64_t half = n / 2;
    for (int64_t i = 0; i < half; i++) v[i] += v[i + half];
    if (n % 2) v[half] = v[n - 1];
    n = half + n % 2;
  }
  return v[0];
}

template <class F>
inline vf mean_of(int64_t n, vf* space, F value) {
  for (int64_t i = 0; i < n; i++) space[i] = value(i);
  return tree_sum(space, n) / all((float)n);
}
inline vf rms(const vf* x, int64_t n, vf* space) {
  return root(mean_of(n, space, [&](int64_t i) { return x[i] * x[i]; }));
}
inline vf deviation(const vf* x, int64_t n, vf* space) {
  vf mean = mean_of(n, space, [&](int64_t i) { return x[i]; });
  return root(mean_of(n, space, [&](int64_t i) { vf centred = x[i] - mean; return centred * centred; }));
}
inline vf largest(const vf* x, int64_t n) {  // as integers: magnitudes keep their order, and NaN is above all
  vu found = (vu)absolute(x[0]);
  for (int64_t i = 1; i < n; i++) {
    vu other = (vu)absolute(x[i]);
    found = other > found ? other : found;
  }
  return (vf)found;
}

// -------------------------------------------------------------------------------------------------------------- grids

struct Grid {
  float max, min;
  bool minifloat;
  int mantissa_bits, min_exponent;
  float step, offset;
};

inline vi biased_exponent(vi bits) { return (bits >> 23) & 0xff; }
inline vf power_of_two(vi biased) {
  vf normal = (vf)(biased << 23);
  return biased == 0 ? all(0x1p-127f) : (biased == 255 ? all(NOT_A_NUMBER) : normal);
}
inline vi clamp_exponent(vi x) { return x < 0 ? vi{} : (x > 254 ? vi{} + 254 : x); }

inline vf power(int exponent) { return (vf)(vi{} + ((exponent + 127) << 23)); }

struct Place { vf v, step; };  // codes are (an integer next to v, + offset) * step
inline Place on_grid(vf u, const Grid& g) {
  u = clamped(u, g.max);
  if (!g.minifloat) return {u * all(1.0f / g.step) - g.offset, all(g.step)};
  vi biased = biased_exponent(bits_of(u));
  biased = (biased < g.min_exponent + 127 ? vi{} + (g.min_exponent + 127) : biased) - g.mantissa_bits;
  return {u * (vf)((254 - biased) << 23), (vf)(biased << 23)};
}
// Inlined whatever its size: called, it reads the grid anew for every vector.
__attribute__((always_inline)) inline vf round_nearest(vf u, const Grid& g) {
  if (g.offset != 0.0f) return rounded(clamped(u, g.max) + 0.5f) - 0.5f;
  if (!g.minifloat) {
    Place place = on_grid(u, g);
    return rounded(place.v) * place.step;
  }
  // Beside 1.5 * 2^23 steps, float32 holds whole steps: the sum is rounded to one, ties to even. Zeros keep their sign.
  u = clamped(u, g.max);
  vi exponent = bits_of(u) & 0x7f800000, least = vi{} + ((g.min_exponent + 127) << 23);
  exponent = exponent < least ? least : exponent;
  vf steps = (vf)(exponent + (((23 - g.mantissa_bits) << 23) + 0x400000));
  vf found = (u + steps) - steps;
  return (vf)((bits_of(found) & 0x7fffffff) | (bits_of(u) & ~0x7fffffff));
}
inline vf round_stochastic(vf u, const Grid& g, vf uniform) {
  Place place = on_grid(u, g);
  vf lower = floored(place.v);
  vf code = lower + raised((place.v - lower) - uniform);
  return (g.offset != 0.0f ? code + g.offset : code) * place.step;
}

// --------------------------------------------------------------------------------------------------------- randomness

// reference.element_index of all lanes: `apart` from one to the next, which are rows' runs or columns.
inline vu positions(bool of_rows, int64_t first, int64_t column, int64_t apart) {
  vu lane;
  for (int l = 0; l < LANES; l++) lane[l] = l;
  return (uint32_t)first + ((of_rows ? 0 : (uint32_t)column) + lane) * (uint32_t)apart;
}
inline vu mix(vu index, uint32_t key0, uint32_t key1) {
  vu h = index ^ key0;
  h = (h ^ (h >> 16)) * 0x7FEB352Du;
  h = h ^ key1;
  h = (h ^ (h >> 15)) * 0x846CA68Bu;
  return h ^ (h >> 16);
}
inline vf uniform(vu index, uint32_t key0, uint32_t key1) {
  return __builtin_convertvector((vi)(mix(index, key0, key1) >> 8), vf) * 0x1p-24f;
}

// ------------------------------------------------------------------------------------------------------------ rotation

// v (n lines of lanes) -> v D H, H the orthonormal Sylvester-Hadamard matrix; signs NULL: H alone.
inline void two_stages(vf* v, int n, int half, float norm) {  // elements half apart, then a quarter
  const int quarter = half / 2;
  for (int at = 0; at < n; at += 2 * half)
    for (int i = at; i < at + quarter; i++) {
      vf *a = v + i, *b = a + quarter, *c = a + half, *d = c + quarter;
      vf sum = *a + *c, difference = *a - *c, sum_2 = *b + *d, difference_2 = *b - *d;
      *a = (sum + sum_2) * norm;
      *b = (sum - sum_2) * norm;
      *c = (difference + difference_2) * norm;
      *d = (difference - difference_2) * norm;
    }
}
inline void hadamard(vf* v, int n, float norm) {
  int half = n / 2;
  for (; half > 2; half /= 4) two_stages(v, n, half, 1.0f);
  if (half == 2) two_stages(v, n, 2, norm);
  if (half == 1)
    for (int i = 0; i < n; i += 2) {
      vf a = v[i], b = v[i + 1];
      v[i] = (a + b) * norm;
      v[i + 1] = (a - b) * norm;
    }
}
inline void times_signs(vf* v, int n, const float* signs) {
  if (signs)
    for (int i = 0; i < n; i++) v[i] *= signs[i];
}
inline void turn(vf* v, int64_t height, const float* signs) {
  for (int64_t at = 0; ROTATION && at < height; at += ROTATION) {
    times_signs(v + at, ROTATION, signs);
    hadamard(v + at, ROTATION, NORM);
  }
}
inline void turn_back(vf* v, int64_t height, const float* signs) {
  for (int64_t at = 0; ROTATION && at < height; at += ROTATION) {
    hadamard(v + at, ROTATION, NORM);
    times_signs(v + at, ROTATION, signs);
  }
}

// ------------------------------------------------------------------------------------------------- in and out of a tile

// Bytes are moved by whole registers: GCC 12 converts a vector of bytes one lane at a time.
inline vi load_bytes(const void* from) {
#ifdef __AVX2__
  __m128i bytes = {};
  memcpy(&bytes, from, LANES);
#endif
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepu8_epi32(bytes);
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepu8_epi32(bytes);
#else
  vi fours, shift;
  for (int l = 0; l < LANES; l += 4) {
    int32_t four;
    memcpy(&four, (const uint8_t*)from + l, sizeof four);
    for (int i = 0; i < 4; i++) {
      fours[l + i] = four;
      shift[l + i] = 8 * i;
    }
  }
  return fours >> shift & 0xff;
#endif
}
template <int... AT>
inline void store_bytes(void* to, vi x, std::integer_sequence<int, AT...>) {
#if defined(__clang__) || defined(__AVX512F__)
  const vb bytes = __builtin_convertvector(x, vb);
#else
  const vq bytes = __builtin_shuffle((vq)x, vq{(uint8_t)(AT * 4 % (4 * LANES))...});
#endif
  memcpy(to, &bytes, LANES);
}
inline void store_bytes(void* to, vi x) { store_bytes(to, x, std::make_integer_sequence<int, 4 * LANES>()); }

template <class T>
inline vf load(const T* from) {
  if constexpr (sizeof(T) == 4) {
    vf x;
    memcpy(&x, from, sizeof x);
    return x;
  } else if constexpr (sizeof(T) == 2) {
    vh x;
    memcpy(&x, from, sizeof x);
    return (vf)(__builtin_convertvector(x, vu) << 16);
  } else {
    return __builtin_convertvector(load_bytes(from), vf);
  }
}

inline vh to_bfloat16(vf x) {  // to nearest, ties to even
  vu bits = (vu)x;
  vu even = (bits + (0x7fff + ((bits >> 16) & 1))) >> 16;
  return __builtin_convertvector(x != x ? vu{} + 0x7fc0 : even, vh);
}
template <class T>
inline void store(T* to, vf x) {
  if constexpr (sizeof(T) == 4) {
    memcpy(to, &x, sizeof x);
  } else if constexpr (sizeof(T) == 2) {
    vh short_ = to_bfloat16(x);
    memcpy(to, &short_, sizeof short_);
  } else {
    store_bytes(to, __builtin_convertvector(x, vi));
  }
}

#ifdef __clang__
#define PAIRS(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PAIRS(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif
// The second HALF lanes of every 2 * HALF of a change places with the first ones of b.
template <int HALF, int... LANE>
inline void exchange(vf& a, vf& b, std::integer_sequence<int, LANE...>) {
  const vf first = PAIRS(a, b, (LANE & HALF ? LANES + LANE - HALF : LANE)...);
  b = PAIRS(a, b, (LANE & HALF ? LANES + LANE : LANE + HALF)...);
  a = first;
}
template <int HALF>
inline void exchange_all(vf* r) {
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++)
    if (!(i & HALF)) exchange<HALF>(r[i], r[i + HALF], std::make_integer_sequence<int, LANES>());
  if constexpr (HALF > 1) exchange_all<HALF / 2>(r);
}
inline void transpose(vf* v) {  // LANES x LANES
  vf r[LANES];                  // in registers
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) r[i] = v[i];
  exchange_all<LANES / 2>(r);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) v[i] = r[i];
}

// Where a tile lies: element e of lane l is at first + e * along + l * across; the first `lanes` lanes are in use.
struct Tile {
  int64_t first, along, across;
  int lanes;
};

// 1 or 0 by element: a byte each, or a bit each, the first in the low bits. A read of LANES elements begins at a multiple
// of 8, or of LANES where these are four, whose bits then lie in one byte.
struct Passes {
  const uint8_t* mask;
  bool bits;
  vf at(int64_t place) const {
    if (!bits) return load(mask + place);
    int32_t word = 0;
    memcpy(&word, mask + place / 8, (LANES + 7) / 8);
    vi lane;
    for (int l = 0; l < LANES; l++) lane[l] = l;
    return __builtin_convertvector((vi{} + (word >> place % 8)) >> lane & 1, vf);
  }
  uint8_t one(int64_t place) const {
    return !mask ? 1 : bits ? mask[place / 8] >> place % 8 & 1 : mask[place];
  }
};

// x, times both gains, then times the mask if there is one.
template <class T>
inline void read(vf* v, const T* x, Tile t, int64_t height, Passes passes = {}, vf gain = all(1.0f),
                 vf second = all(1.0f)) {
  auto at = [=](int64_t place) {
    const vf value = load(x + place) * gain * second;
    return passes.mask ? value * passes.at(place) : value;
  };
  if (t.across == 1 && t.lanes == LANES) {
    for (int64_t e = 0; e < height; e++) v[e] = at(t.first + e * t.along);
  } else if (t.along == 1 && t.lanes == LANES && height % LANES == 0) {
    for (int l = 0; l < LANES; l++)  // line by line, as memory lies
      for (int64_t e = 0; e < height; e += LANES) v[e + l] = at(t.first + e + l * t.across);
    for (int64_t e = 0; e < height; e += LANES) transpose(v + e);
  } else {
    for (int64_t e = 0; e < height; e++) {
      T line[LANES] = {};
      uint8_t pass[LANES] = {};
      for (int l = 0; l < t.lanes; l++) {
        int64_t place = t.first + e * t.along + l * t.across;
        line[l] = x[place];
        pass[l] = passes.one(place);
      }
      v[e] = load(line) * gain * second * load(pass);
    }
  }
}

// Leaves v transposed where it writes runs of memory.
template <class T>
inline void write(T* to, vf* v, Tile t, int64_t height) {
  if (t.across == 1 && t.lanes == LANES) {
    for (int64_t e = 0; e < height; e++) store(to + t.first + e * t.along, v[e]);
  } else if (t.along == 1 && t.lanes == LANES && height % LANES == 0) {
    for (int64_t e = 0; e < height; e += LANES) transpose(v + e);
    for (int l = 0; l < LANES; l++)
      for (int64_t e = 0; e < height; e += LANES) store(to + t.first + e + l * t.across, v[e + l]);
  } else {
    for (int64_t e = 0; e < height; e++) {
      T line[LANES];
      store(line, v[e]);
      for (int l = 0; l < t.lanes; l++) to[t.first + e * t.along + l * t.across] = line[l];
    }
  }
}

// Runs work(tile, number of the tile's run, its first column, space) over x (outer, span, inner), in runs of `height`
// along the contraction; space: room for `scratch` vectors.
template <class F>
inline void over_tiles(int64_t rows, int64_t inner, int64_t height, int64_t scratch, int threads, F work) {
  int64_t runs = rows / height, wide = (inner + LANES - 1) / LANES;
  int64_t tiles = inner == 1 ? (runs + LANES - 1) / LANES : runs * wide;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    vf* space = (vf*)aligned_alloc(sizeof(vf), sizeof(vf) * scratch);
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile++) {
      if (inner == 1) {
        int64_t run = tile * LANES, left = runs - run;
        work(Tile{run * height, 1, height, (int)(left < LANES ? left : LANES)}, run, (int64_t)0, space);
      } else {
        int64_t run = tile / wide, column = tile % wide * LANES, left = inner - column;
        work(Tile{run * height * inner + column, inner, 1, (int)(left < LANES ? left : LANES)}, run, column, space);
      }
    }
    free(space);
  }
}

}  // namespace

#if defined(QUANTIZE) || defined(LINE_SCALES) || defined(PACK)
// ------------------------------------------------------------------------------------------------------------ the plan

namespace {

enum class Kind { E8M0, MINIFLOAT, FLOAT32, FLOAT16, BFLOAT16 };
enum class Statistic { AMAX, RMS, STD, ABSMEAN, RMS_ABSMEAN };
enum class Rounding { NEAREST, STOCHASTIC };
enum class Mask { NONE, INSIDE, WITHIN, ERROR };

constexpr Grid ELEMENT = PLAN_ELEMENT, SCALE = PLAN_SCALE;
constexpr Kind KIND = Kind::PLAN_KIND;
constexpr bool FLOATS = KIND != Kind::E8M0 && KIND != Kind::MINIFLOAT;  // no scale stands above them
constexpr Statistic STATISTIC = Statistic::PLAN_STATISTIC;
constexpr Rounding ROUNDING = Rounding::PLAN_ROUNDING;
constexpr Mask MASK = Mask::PLAN_MASK;
constexpr float DIVISORS[] = PLAN_DIVISORS;  // of the scale, and of each candidate
constexpr int STEPS[] = PLAN_STEPS;          // to the exponents of the same
constexpr int TRIED = sizeof DIVISORS / sizeof *DIVISORS;

}  // namespace
#endif

#if defined(QUANTIZE) || defined(LINE_SCALES)
namespace {

// -------------------------------------------------------------------------------------------------------------- scales

// What a rule sees of x[0 .. n): of a block, or of a whole line.
inline vf magnitude_of(const vf* x, int64_t n, vf* space) {
  const auto absmean = [&] { return mean_of(n, space, [&](int64_t i) { return absolute(x[i]); }); };
  vf found;
  if (STATISTIC == Statistic::AMAX) found = largest(x, n);
  if (STATISTIC == Statistic::RMS) found = rms(x, n, space);
  if (STATISTIC == Statistic::STD) found = deviation(x, n, space);
  if (STATISTIC == Statistic::ABSMEAN) found = absmean();
  if (STATISTIC == Statistic::RMS_ABSMEAN) {
    found = all(GAIN) * rms(x, n, space) - all(LESS) * absmean();
    return found <= 0.0f ? largest(x, n) : found;
  }
  if (GAIN != 1.0f) found *= GAIN;
  if (BIAS != 0.0f) found += BIAS;
  return found;
}

inline vi scale_exponent(vf magnitude, int step) {
  vi tiny = magnitude < 0x1p-60f;
  vf lifted = tiny ? magnitude * 0x1p64f : magnitude;
  vi bits = bits_of(DIVISORS[0] == 1.0f ? lifted : lifted / all(DIVISORS[0]));
  vi moved = clamp_exponent(biased_exponent(bits + INCREMENT) - SHIFT - (tiny & 64));
  if (step) moved = clamp_exponent(moved + step);
  return biased_exponent(bits) == 255 ? vi{} + 255 : moved;
}

inline vf in_scale_format(vf x) {
  // SCALE is the grid of float16, which saturates; what would be rounded beyond its largest is infinite.
  if (KIND == Kind::FLOAT16) return x < 65520.0f ? round_nearest(x, SCALE) : all(INF);
  if (KIND == Kind::BFLOAT16) {
    const vi bits = bits_of(x), up = x == x ? 0x7fff + (bits >> 16 & 1) : vi{};
    return (vf)((bits + up) & (int32_t)0xffff0000);
  }
  return x;
}

// Of a block or a line by its rule (0), or the candidate of that number. scale: what stands above it.
inline vf candidate(vf magnitude, vf scale, int which) {
  if (KIND == Kind::E8M0) return power_of_two(scale_exponent(magnitude, STEPS[which]));
  vf divided = DIVISORS[which] == 1.0f ? magnitude : magnitude / all(DIVISORS[which]);
  if (FLOATS) return finite_or_nan(in_scale_format(divided));
  vf found = round_nearest(divided / nonzero(scale), SCALE);
  return found == 0.0f ? all(1.0f) : found;
}

// What x is divided by, or with E8M0 scales multiplied with, to be in code units.
inline vf unit_of(vf blocks, vf scale) {
  if (KIND == Kind::E8M0) return 1.0f / blocks;
  return FLOATS && BLOCK ? nonzero(blocks) : nonzero(scale) * blocks;
}
inline vf in_code_units(vf x, vf unit) {
  if (KIND != Kind::E8M0) return x / unit;
  return (HEADROOM == 1.0f ? x : x * HEADROOM) * unit;
}

// Of rounding to nearest, in units of the first candidate; under minifloat scales, in units of the tensor scale.
inline vf squared_error(const vf* x, vf scale, vf blocks, vf first, vf* space) {
  const vf unit = unit_of(blocks, scale), weight = KIND == Kind::MINIFLOAT ? blocks : blocks / first;
  for (int64_t i = 0; i < BLOCK; i++) {
    vf u = in_code_units(x[i], unit);
    vf difference = (round_nearest(u, ELEMENT) - u) * weight;
    space[i] = difference * difference;
  }
  return tree_sum(space, BLOCK);
}

inline vf block_scale(const vf* x, vf scale, vf* space) {
  const vf magnitude = magnitude_of(x, BLOCK, space), first = candidate(magnitude, scale, 0);
  if (TRIED == 1) return first;
  vf best = first, least = squared_error(x, scale, first, first, space);
#pragma GCC unroll 4
  for (int which = 1; which < TRIED; which++) {
    vf blocks = candidate(magnitude, scale, which), error = squared_error(x, scale, blocks, first, space);
    best = error < least ? blocks : best;
    least = error < least ? error : least;
  }
  return best;
}

// 1.0 at what stays of every four, or of every four pairs, of the largest magnitude; of equal ones the earlier.
inline void keep_largest(const vf* x, vf* keep, int64_t n) {
  for (int64_t at = 0; at < n; at += 4 * PAIR) {
    vf size[4];
    for (int i = 0; i < 4; i++) {
      const vf* group = x + at + i * PAIR;
      size[i] = PAIR == 1 ? absolute(group[0]) : group[0] * group[0] + group[1] * group[1];
    }
    for (int i = 0; i < 4; i++) {
      vi rank = {};
      for (int other = 0; other < 4; other++)
        rank -= (size[other] > size[i]) | (i > other ? size[other] == size[i] : vi{});
      for (int j = 0; j < PAIR; j++) keep[at + i * PAIR + j] = rank < 2 ? all(1.0f) : all(0.0f);
    }
  }
}

}  // namespace
#endif

#if defined(QUANTIZE) || defined(PACK) || defined(FIELDS)
// ------------------------------------------------------------------------------------------------------------- packing

namespace {

constexpr uint64_t in_each(int bits, int of) {  // the low bits of each run
  uint64_t found = 0;
  for (int at = 0; at < 64; at += of)
    for (int bit = 0; bit < bits && at + bit < 64; bit++) found |= 1ull << (at + bit);
  return found;
}

// Eight fields, a byte each, to the low 8 * W bits, and back (little-endian).
template <int W>
inline uint64_t joined(uint64_t x) {
  x = (x | x >> (8 - W)) & in_each(2 * W, 16);
  x = (x | x >> (16 - 2 * W)) & in_each(4 * W, 32);
  return (x | x >> (32 - 4 * W)) & in_each(8 * W, 64);
}
inline uint64_t apart(uint64_t x) {
  x = (x | x << (32 - 4 * WIDTH)) & in_each(4 * WIDTH, 32);
  x = (x | x << (16 - 2 * WIDTH)) & in_each(2 * WIDTH, 16);
  return (x | x << (8 - WIDTH)) & in_each(WIDTH, 8);
}

template <int W>
inline void join_fields(const uint8_t* fields, int64_t n, uint8_t* bytes) {  // n a multiple of 8
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t x;
    memcpy(&x, fields + i, 8);
    x = joined<W>(x);
    memcpy(bytes + i * W / 8, &x, W);
  }
}
inline void split_fields(const uint8_t* bytes, int64_t n, uint8_t* fields) {
  const int64_t whole = n / 8 * 8, left = n - whole;
  uint64_t x = 0;
  if (WIDTH == 4)  // two fields of a byte to two bytes, in vectors
    for (int64_t i = 0; i < whole / 2; i++) {
      const uint16_t two = (bytes[i] | bytes[i] << 4) & 0x0f0f;
      memcpy(fields + 2 * i, &two, 2);
    }
  for (int64_t i = WIDTH == 4 ? whole : 0; i < whole; i += 8) {
    x = 0;  // not by memcpy into a part of x: reading the whole would wait until both stores are done
#pragma GCC unroll 8
    for (int byte = 0; byte < WIDTH; byte++) x |= (uint64_t)bytes[i * WIDTH / 8 + byte] << 8 * byte;
    x = apart(x);
    memcpy(fields + i, &x, 8);
  }
  x = 0;
  memcpy(&x, bytes + whole * WIDTH / 8, (left * WIDTH + 7) / 8);
  x = apart(x);
  memcpy(fields + whole, &x, left);
}

constexpr int64_t PIECE = 4096;  // fields that one thread takes at a time

}  // namespace
#endif


#if defined(QUANTIZE) || defined(PACK)
namespace {

inline vi place_of(vf magnitude, const Grid& g) {  // among a minifloat's magnitudes
  vi normal = (bits_of(magnitude) >> (23 - g.mantissa_bits)) - ((g.min_exponent + 126) << g.mantissa_bits);
  vf steps = magnitude * power(g.mantissa_bits - g.min_exponent);
  return normal < (1 << g.mantissa_bits) ? __builtin_convertvector(steps, vi) : normal;
}
inline vf at_place(vi place, const Grid& g) {
  vf normal = (vf)((place << (23 - g.mantissa_bits)) + ((g.min_exponent + 126) << 23));
  vf steps = __builtin_convertvector(place, vf) * power(g.min_exponent - g.mantissa_bits);
  return place < (1 << g.mantissa_bits) ? steps : normal;
}

inline vi field_of(vf code) {
  code = clamped(code != code ? all(ELEMENT.max) : code, ELEMENT.max);
  if (!ELEMENT.minifloat) return __builtin_convertvector((code + ELEMENT.max) * (1.0f / ELEMENT.step), vi);
  return place_of(absolute(code), ELEMENT) | ((bits_of(code) >> 31 & 1) << (BITS - 1));
}
inline vf code_of(vi field) {  // of the low BITS
  constexpr int places = 1 << (BITS - 1);
  if (!ELEMENT.minifloat)
    return __builtin_convertvector(field & ((1 << WIDTH) - 1), vf) * ELEMENT.step + ELEMENT.min;
  vi place = field & (places - 1);
#ifndef __clang__
  if constexpr (places <= LANES) {  // looked up in a register
    vi lane;
    for (int l = 0; l < LANES; l++) lane[l] = l;
    place = __builtin_shuffle(bits_of(at_place(lane & (places - 1), ELEMENT)), field & (LANES - 1) & (places - 1));
  } else
#endif
    place = bits_of(at_place(place, ELEMENT));
  return (vf)(place | (vi)((vu)field << (32 - BITS) & 0x80000000u));
}

typedef std::conditional_t<KIND == Kind::FLOAT16 || KIND == Kind::BFLOAT16, uint16_t,
                           std::conditional_t<BLOCK && KIND == Kind::FLOAT32, int32_t, uint8_t>> ScaleBits;

inline vi scale_bits(vf scale) {  // of a block
  if (KIND == Kind::E8M0) return biased_exponent(bits_of(scale));
  if (KIND == Kind::BFLOAT16) return bits_of(scale) >> 16;
  return scale != scale ? vi{} + SCALE_NAN : place_of(scale, SCALE);
}

}  // namespace
#endif

#ifdef QUANTIZE
namespace {

// LANES runs of `height` fields, which follow each other, as the bits of one; space: room for their bytes.
template <int W>
inline void write_fields(uint8_t* to, vf* fields, int64_t run, int lanes, int64_t height, uint8_t* space) {
  write(space, fields, Tile{0, 1, height, lanes}, height);
  join_fields<W>(space, lanes * height, to + run * height * W / 8);
}

}  // namespace

// x (outer, span, inner) -> values (codes, codes * block scale, or stored integers), block scales and mask as
// reference.encode gives them, and the bits of the mask, of the codes and of their scales; each only where it is asked
// for. rows = outer * span. scale: NULL, one number, or one per (span, inner); span: the length of a line where one per
// line. bare: values are codes; back: values are multiplied by scale and rotated back. Bits are written of rows alone
// (inner 1), of heights that fill whole bytes.
extern "C" void quantize(const void* x_, int64_t rows, int64_t span, int64_t inner, int64_t height, const float* signs,
                         const float* scale_, int scale_per_span, uint32_t key0, uint32_t key1, void* values_,
                         float* blocks_out, uint8_t* mask_out, uint8_t* mask_bits, uint8_t* packed,
                         void* packed_scales_, int bare, int back, int threads) {
  const Input* x = (const Input*)x_;
  Output* values = (Output*)values_;
  ScaleBits* packed_scales = (ScaleBits*)packed_scales_;
  const int64_t block = BLOCK ? BLOCK : height, per_tile = height / block, all_blocks = rows / block;
  over_tiles(rows, inner, height, 7 * height + per_tile, threads,
             [=](Tile t, int64_t run, int64_t column, vf* v) {
    vf *u = v + height, *passes = v + 2 * height, *space = v + 3 * height, *fields = v + 5 * height;
    vf* scales = v + 7 * height;
    uint8_t* bytes = (uint8_t*)(v + 6 * height);
    read(v, x, t, height);
    turn(v, height, signs);
    vf scale = all(1.0f);
    if (scale_ && !scale_per_span) scale = all(scale_[0]);
    if (scale_ && scale_per_span)
      for (int l = 0; l < t.lanes; l++)
        scale[l] = inner == 1 ? scale_[(run + l) * height / span] : scale_[run * height / span * inner + column + l];
    const vf outside = scale;
    if (DIVIDES_FIRST) {
      for (int64_t e = 0; e < height; e++) v[e] /= nonzero(scale);
      scale = all(1.0f);
    }
    for (int64_t b = 0; b < per_tile; b++) {
      vf* x = v + b * block;
      vf blocks = all(1.0f);
      if (BLOCK) scales[b] = blocks = block_scale(x, scale, space);
      const vf unit = unit_of(blocks, scale), factor = BLOCK && !CORRECTION && !bare ? blocks : all(1.0f);
      if (SPARSE) keep_largest(x, space, block);
      for (int64_t i = 0; i < block; i++) {
        int64_t e = b * block + i;
        vf in_codes = in_code_units(x[i], unit);
        vf code;
        if (ROUNDING == Rounding::NEAREST) code = round_nearest(in_codes, ELEMENT);
        if (ROUNDING == Rounding::STOCHASTIC) {
          vu index = positions(inner == 1, run * height + e, column, inner == 1 ? height : rows);
          code = round_stochastic(in_codes, ELEMENT, uniform(index, key0, key1));
        }
        if (SPARSE) code *= space[i];
        if (MASK == Mask::INSIDE) passes[e] = absolute(in_codes) < MASK_LIMIT ? all(1.0f) : all(0.0f);
        if (MASK == Mask::WITHIN) passes[e] = absolute(in_codes) <= MASK_LIMIT ? all(1.0f) : all(0.0f);
        if (MASK == Mask::ERROR) passes[e] = absolute(code - in_codes) <= MASK_LIMIT ? all(1.0f) : all(0.0f);
        if (CORRECTION) u[e] = in_codes;
        if (packed) fields[e] = __builtin_convertvector(field_of(code), vf);
        x[i] = back && !CORRECTION ? code * factor * outside : code * factor;
      }
    }
    if (CORRECTION)
      for (int64_t first = 0; first < per_tile; first += CORRECTION) {
        vf sums[2][CORRECTION ? CORRECTION : 1];
        for (int64_t g = 0; g < CORRECTION; g++)
          for (int which = 0; which < 2; which++) {
            for (int64_t i = 0; i < block; i++) {
              int64_t e = (first + g) * block + i;
              space[i] = u[e] * (which ? v[e] : u[e]);
            }
            sums[which][g] = tree_sum(space, block);
          }
        vf square = tree_sum(sums[0], CORRECTION), product = tree_sum(sums[1], CORRECTION);
        vf correction = product == 0.0f ? all(1.0f) : square / nonzero(product);
        for (int64_t g = first; g < first + CORRECTION; g++) {
          vu index = positions(inner == 1, run * per_tile + g, column, inner == 1 ? per_tile : all_blocks);
          scales[g] = round_stochastic(scales[g] * correction, SCALE, uniform(index, key0, key1));
        }
      }
    if (BLOCK && blocks_out)
      for (int64_t b = 0; b < per_tile; b++)
        for (int l = 0; l < t.lanes; l++)
          blocks_out[inner == 1 ? (run + l) * per_tile + b : (run * per_tile + b) * inner + column + l] = scales[b][l];
    if (packed_scales)
      for (int64_t b = 0; b < per_tile; b++) {
        const vi bits = scale_bits(scales[b]);
        for (int l = 0; l < t.lanes; l++) packed_scales[(run + l) * per_tile + b] = bits[l];
      }
    if (CORRECTION && !bare)
      for (int64_t e = 0; e < height; e++) v[e] *= scales[e / block];
    if (CORRECTION && back)
      for (int64_t e = 0; e < height; e++) v[e] *= outside;
    if (back) turn_back(v, height, signs);
    if (sizeof(Output) == 1)
      for (int64_t e = 0; e < height; e++) v[e] = v[e] * (1.0f / UNIT) - OFFSET;
    if (values) write(values, v, t, height);
    if (MASK != Mask::NONE && mask_bits) write_fields<1>(mask_bits, passes, run, t.lanes, height, bytes);
    if (MASK != Mask::NONE && mask_out) write(mask_out, passes, t, height);
    if (packed) write_fields<WIDTH>(packed, fields, run, t.lanes, height, bytes);
  });
}

#endif

#ifdef LINE_SCALES
// One float32 scale per line of x (outer, height, inner), rotated.
extern "C" void line_scales(const void* x_, int64_t rows, int64_t inner, int64_t height, const float* signs,
                            float* scales, int threads) {
  const Input* x = (const Input*)x_;
  over_tiles(rows, inner, height, 2 * height, threads, [=](Tile t, int64_t run, int64_t column, vf* v) {
    read(v, x, t, height);
    turn(v, height, signs);
    vf found = finite_or_nan(magnitude_of(v, height, v + height) / all(DIVISORS[0]));
    for (int l = 0; l < t.lanes; l++) scales[inner == 1 ? run + l : run * inner + column + l] = found[l];
  });
}

#endif

#ifdef RANDOM_SIGNS
extern "C" void random_signs(int64_t n, uint32_t key0, uint32_t key1, float* out) {
  for (int64_t first = 0; first < n; first += LANES) {
    vu bits = mix(positions(true, first, 0, 1), key0, key1) & 1u;
    for (int l = 0; l < LANES && first + l < n; l++) out[first + l] = bits[l] ? 1.0f : -1.0f;
  }
}
#endif

#ifdef EXTENT
// The largest magnitude of x, rotated; NaN where it holds one.
extern "C" void extent(const void* x_, int64_t rows, int64_t inner, const float* signs, float* found, int threads) {
  const Input* x = (const Input*)x_;
  float result = 0.0f;
  bool nan = false;
  over_tiles(rows, inner, ROTATION, ROTATION, threads, [=, &result, &nan](Tile t, int64_t, int64_t, vf* v) {
    read(v, x, t, ROTATION);
    turn(v, ROTATION, signs);
    vf here = largest(v, ROTATION);
    float most = 0.0f;
    bool bad = false;
    for (int l = 0; l < t.lanes; l++) {
      bad |= here[l] != here[l];
      most = here[l] > most ? here[l] : most;
    }
#pragma omp critical
    {
      nan |= bad;
      result = most > result ? most : result;
    }
  });
  *found = nan ? NOT_A_NUMBER : result;
}
#endif

#ifdef ROTATE
// x (rows, inner), its runs of ROTATION rows turned: forward x D H, backward (x * gain * second * mask) H D.
// bits: whether the mask has a bit an element; inner is then 1 or a multiple of 8.
extern "C" void rotate(const void* x_, int64_t rows, int64_t inner, float gain, float second, const uint8_t* mask,
                       int bits, const float* signs, int backward, void* out_, int threads) {
  const Input* x = (const Input*)x_;
  Output* out = (Output*)out_;
  const Passes passes{mask, bits != 0};
  over_tiles(rows, inner, ROTATION, ROTATION, threads, [=](Tile t, int64_t, int64_t, vf* v) {
    read(v, x, t, ROTATION, passes, all(gain), all(second));
    if (backward) turn_back(v, ROTATION, signs);
    else turn(v, ROTATION, signs);
    write(out, v, t, ROTATION);
  });
}
#endif

#ifdef FIELDS
// n fields of WIDTH bits, as many in a byte as fit, to a byte each.
extern "C" void split(const uint8_t* bytes, int64_t n, uint8_t* fields, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t at = 0; at < n; at += PIECE)
    split_fields(bytes + at * WIDTH / 8, n - at < PIECE ? n - at : PIECE, fields + at);
}
#endif

#ifdef PACK
namespace {

inline float scale_of(ScaleBits bits) {
  if (KIND == Kind::E8M0) return power_of_two(vi{} + bits)[0];
  if (KIND == Kind::BFLOAT16) return ((vf)(vi{} + (bits << 16)))[0];
  if (KIND == Kind::FLOAT32) return ((vf)(vi{} + bits))[0];
  return bits == SCALE_NAN ? NOT_A_NUMBER : at_place(vi{} + bits, SCALE)[0];
}

template <class T>
inline void store_some(T* to, vf x, int64_t n) {
  if (n >= LANES) return store(to, x);
  T line[LANES];
  store(line, x);
  memcpy(to, line, sizeof(T) * n);
}

constexpr int64_t RUN = BLOCK ? BLOCK : PIECE;  // of fields under one scale, which fill whole bytes
constexpr int64_t GROUP = LANES < 8 ? 8 : LANES;  // of fields in whole vectors and whole bytes

// LANES fields of WIDTH bits from the one at i, a multiple of LANES, on: in the low bits of a lane each, with other bits
// above.
inline vi fields_at(const uint8_t* from, int64_t i) {
  if (WIDTH == 8) return load_bytes(from + i);
  constexpr int a_word = 32 / WIDTH < LANES ? 32 / WIDTH : LANES, bytes = a_word * WIDTH < 8 ? 1 : a_word * WIDTH / 8;
  vi words, shift;
  for (int l = 0; l < LANES; l += a_word) {
    int32_t word = 0;
    memcpy(&word, from + (i + l) * WIDTH / 8, bytes);
    for (int j = 0; j < a_word; j++) {
      words[l + j] = word;
      shift[l + j] = j * WIDTH;
    }
  }
  return words >> (a_word * WIDTH < 8 ? shift + (int)(i * WIDTH % 8) : shift);
}

constexpr int LOWEST_OF_SCALE = KIND == Kind::E8M0 ? -127 : SCALE.min_exponent - SCALE.mantissa_bits;
constexpr bool SHORT =  // whether bfloat16 holds every code times every scale
    !BLOCK || (ELEMENT.minifloat && !FLOATS &&
               ELEMENT.mantissa_bits + (KIND == Kind::E8M0 ? 0 : SCALE.mantissa_bits + 1) < 8 &&
               ELEMENT.min_exponent - ELEMENT.mantissa_bits + LOWEST_OF_SCALE >= -133);

// As `store`; a NaN is NOT_A_NUMBER, whose upper half is bfloat16's.
template <class T>
inline void store_value(T* to, vf x) {
  if constexpr (sizeof(T) != 2) return store(to, x);
  vu bits = (vu)x;
  if (!SHORT) bits += 0x7fff + ((bits >> 16) & 1);
  vh halves = __builtin_convertvector(bits >> 16, vh);
  memcpy(to, &halves, sizeof halves);
}

// Where a field has 4 bits and its value 16, all values under one scale fit into two registers, which are looked up.
#if !defined(__clang__) && (defined(__SSSE3__) || defined(__ARM_NEON))
#define LOOKED_UP (WIDTH == 4 && sizeof(Output) == 2 && sizeof(ScaleBits) == 1 && SHORT && RUN % 16 == 0)
#else
#define LOOKED_UP false
#endif
typedef uint8_t v16 __attribute__((vector_size(16)));
struct Values { v16 low, high; };  // the bytes of the value of each field

inline Values values_under(float scale) {
  uint8_t fields[8 + 4] = {0x10, 0x32, 0x54, 0x76, 0x98, 0xba, 0xdc, 0xfe};
  uint16_t values[16];
  for (int i = 0; i < 16; i += LANES) store_value(values + i, code_of(fields_at(fields, i)) * all(scale));
  Values found;
  for (int i = 0; i < 16; i++) {
    found.low[i] = values[i] & 0xff;
    found.high[i] = values[i] >> 8;
  }
  return found;
}
#ifndef __clang__
inline void look_up(const Values& values, const uint8_t* from, void* to) {  // 16 fields
  const v16 first = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23}, rest = first + 8;
  typedef uint64_t v2 __attribute__((vector_size(16)));
  uint64_t eight;
  memcpy(&eight, from, 8);
  const v16 bytes = (v16)v2{eight, 0};
  const v16 fields = __builtin_shuffle(bytes & 15, bytes >> 4, first);
  const v16 low = __builtin_shuffle(values.low, fields), high = __builtin_shuffle(values.high, fields);
  const v16 here = __builtin_shuffle(low, high, first), there = __builtin_shuffle(low, high, rest);
  memcpy(to, &here, 16);
  memcpy((uint8_t*)to + 16, &there, 16);
}
#endif

}  // namespace

// Codes of WIDTH bits, scales of one, two or four bytes -> n values in runs of RUN, and the scale of each, where BLOCK.
// zeros: with ZERO_POINT the level of zero in each run, a byte; else null.
extern "C" void unpack(const uint8_t* codes, const void* scales_, const uint8_t* zeros, int64_t n, void* values_,
                       int threads) {
  const ScaleBits* scales = (const ScaleBits*)scales_;
  Output* values = (Output*)values_;
  constexpr bool LISTED = BLOCK && sizeof(ScaleBits) == 1;
  float known[256];  // scales by their bytes
  for (int byte = 0; LISTED && byte < 256; byte++) known[byte] = scale_of(byte);
#ifndef __clang__
  if constexpr (LOOKED_UP) {
    Values under[256];
    for (int byte = 0; byte < (BLOCK ? 256 : 1); byte++) under[byte] = values_under(BLOCK ? known[byte] : 1.0f);
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t at = 0; at < n / 16; at++)
      look_up(under[BLOCK ? scales[at * 16 / RUN] : 0], codes + at * 8, values + at * 16);
    if (n % 16 == 0) return;
  }
#endif
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
  for (int64_t first = LOOKED_UP ? n / 16 * 16 : 0; first < n; first += RUN) {
    const ScaleBits bits = BLOCK ? scales[first / RUN] : 0;
    const vf scale = all(LISTED ? known[bits] : BLOCK ? scale_of(bits) : 1.0f);
    const vf zero = all(ZERO_POINT ? zeros[first / RUN] : 0.0f);
    const auto value_of = [&](vi field) {
      const vf code = ZERO_POINT ? code_of(field) - zero : code_of(field);
      return BLOCK ? code * scale : code;
    };
    const uint8_t* from = codes + first * WIDTH / 8;
    Output* to = values + first;
    const int64_t count = BLOCK || n - first >= RUN ? RUN : n - first;
    if (sizeof(Output) == 1) {
      uint8_t fields[RUN];
      split_fields(from, count, fields);
      constexpr int step = ELEMENT.step / UNIT, lowest = ELEMENT.max / UNIT + OFFSET;  // all of them integers
      for (int64_t i = 0; i < count; i++) to[i] = fields[i] * step - lowest;
      continue;
    }
    int64_t at = 0;
    if (count == RUN)  // a length that the compiler knows
      for (; at < RUN / GROUP * GROUP; at += LANES) store_value(to + at, value_of(fields_at(from, at)));
    for (; at < count; at += GROUP) {  // what fills no vectors and no bytes
      const int64_t left = count - at < GROUP ? count - at : GROUP;
      uint8_t last[GROUP * WIDTH / 8 + 3] = {};
      memcpy(last, from + at * WIDTH / 8, (left * WIDTH + 7) / 8);
      for (int64_t i = 0; i < left; i += LANES) store_some(to + at + i, value_of(fields_at(last, i)), left - i);
    }
  }
}
#endif
