// Tile registers: a processor's (AMX), and the same in plain C++ so that any machine can test what is done with them.
//
// Registers 0 to 3 are float32 sums [token tile][column tile], each [16 tokens, 16 columns]; 4 and 5 are tokens [16, 32]
// and 6 and 7 weights [16 pairs, 16 columns, 2], both bfloat16. A line has 64 bytes.
//
// With bytes, registers 0 to 3 are int32 sums, 6 weights [depth / 4, 16 columns, 4], and 4 high digits of tokens
// [16, depth]. Of up to 16 tokens, 5 are the low digits and 7 the other column tile's weights; of more, 7 are the low
// digits of the first 16, and 5 either digit of the others.
#pragma once

#include <type_traits>

#include "tile_layout.h"

#if defined(__AMX_BF16__) && defined(__AMX_INT8__) && defined(__linux__)
#define LORAPLEX_AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace loraplex {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

// For up to 32 tokens: the second token tile has those beyond 16.
inline TileConfig tile_config(int num_tokens) {
  TileConfig config;
  const int first = std::min<int>(num_tokens, kTileTokens), second = std::max<int>(1, num_tokens - kTileTokens);
  for (int tile = 0; tile < 8; ++tile) {
    config.bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  config.rows[0] = config.rows[1] = config.rows[4] = first;
  config.rows[2] = config.rows[3] = config.rows[5] = second;
  return config;
}

// For bytes, of up to 32 tokens, and weights of `depth` values of x.
inline TileConfig byte_tile_config(int num_tokens, int depth) {
  TileConfig config;
  const int first = std::min<int>(num_tokens, kTileTokens);
  const int second = num_tokens > kTileTokens ? num_tokens - kTileTokens : first;
  for (int tile = 0; tile < 8; ++tile) {
    const bool are_weights = tile == 6 || (tile == 7 && num_tokens <= kTileTokens);
    config.bytes[tile] = tile < 4 || are_weights ? 64 : depth;
    config.rows[tile] = are_weights ? depth / 4 : tile == 2 || tile == 3 || tile == 5 ? second : first;
  }
  return config;
}

class EmulatedTiles {
 public:
  static void configure(const TileConfig& config) { registers().config = config; }
  static void release() {}
  static void written() {}

  template <int tile>
  static void zero() {
    std::memset(registers().lines[tile], 0, sizeof(registers().lines[tile]));
  }
  template <int tile>
  static void load(const void* from) {
    Registers& own = registers();
    for (int row = 0; row < own.config.rows[tile]; ++row) {
      std::memcpy(own.lines[tile][row], static_cast<const char*>(from) + row * kLine, own.config.bytes[tile]);
    }
  }
  template <int tile>
  static void store(void* to) {
    std::memcpy(to, registers().lines[tile], registers().config.rows[tile] * kLine);
  }
  template <int sums, int tokens, int weights>
  static void multiply() {
    Registers& own = registers();
    for (int row = 0; row < own.config.rows[sums]; ++row) {
      for (int pair = 0; pair < kTileDepth / 2; ++pair) {
        for (int column = 0; column < kTileColumns; ++column) {
          float sum;
          Half x[2], w[2];
          char* place = own.lines[sums][row] + column * sizeof(sum);
          std::memcpy(&sum, place, sizeof(sum));
          std::memcpy(x, own.lines[tokens][row] + pair * sizeof(x), sizeof(x));
          std::memcpy(w, own.lines[weights][pair] + column * sizeof(w), sizeof(w));
          sum += float(x[0]) * float(w[0]);
          sum += float(x[1]) * float(w[1]);
          std::memcpy(place, &sum, sizeof(sum));
        }
      }
    }
  }
  // `Digit` is the tokens' type of byte, int8_t or uint8_t.
  template <int sums, int tokens, int weights, typename Digit>
  static void multiply_bytes() {
    Registers& own = registers();
    for (int row = 0; row < own.config.rows[sums]; ++row) {
      for (int k = 0; k < own.config.bytes[tokens]; ++k) {
        for (int column = 0; column < kTileColumns; ++column) {
          int32_t sum;
          char* place = own.lines[sums][row] + column * sizeof(sum);
          std::memcpy(&sum, place, sizeof(sum));
          sum += static_cast<Digit>(own.lines[tokens][row][k]) *
                 static_cast<int8_t>(own.lines[weights][k / 4][column * 4 + k % 4]);
          std::memcpy(place, &sum, sizeof(sum));
        }
      }
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Registers {
    TileConfig config;
    char lines[8][16][kLine];
  };
  static Registers& registers() {
    thread_local Registers own;
    return own;
  }
};

#ifdef LORAPLEX_AMX

// Linux gives a process the tile registers when it asks for them.
inline bool may_use_tiles() {
  static const bool allowed = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */) == 0;
  return allowed;
}

// Not with the compiler's intrinsics: those of GCC take no template arguments, and don't say that they read memory.
struct ProcessorTiles {
  static void configure(const TileConfig& config) {
    asm volatile("ldtilecfg %0" : : "m"(config) : "memory");
  }
  static void release() { asm volatile("tilerelease"); }
  static void written() { asm volatile("" ::: "memory"); }  // to memory that `load` is to read

  template <int tile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(tile));
  }
  template <int tile>
  static void load(const void* from) {
    asm volatile("tileloadd (%0, %1), %%tmm%c2" : : "r"(from), "r"(int64_t{64}), "i"(tile));
  }
  template <int tile>
  static void store(void* to) {
    asm volatile("tilestored %%tmm%c2, (%0, %1)" : : "r"(to), "r"(int64_t{64}), "i"(tile) : "memory");
  }
  template <int sums, int tokens, int weights>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(tokens), "i"(weights));
  }
  template <int sums, int tokens, int weights, typename Digit>
  static void multiply_bytes() {
    if constexpr (std::is_signed_v<Digit>) {
      asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(tokens), "i"(weights));
    } else {
      asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(tokens), "i"(weights));
    }
  }
};

#endif

}  // namespace loraplex
