// How much the caches of this machine's cores hold: how work is cut follows from it, and no value's bits.
#pragma once

#include <unistd.h>

#include <cstdint>

namespace loraplex {

// What the system says, or where it doesn't know, what most processors have.
inline int64_t cache_bytes([[maybe_unused]] int name, int64_t usual) {
#ifdef _SC_LEVEL2_CACHE_SIZE
  const int64_t found = sysconf(name);
  if (found > 0) return found;
#endif
  return usual;
}

#ifdef _SC_LEVEL2_CACHE_SIZE
constexpr int kFirstCache = _SC_LEVEL1_DCACHE_SIZE, kSecondCache = _SC_LEVEL2_CACHE_SIZE;
#else
constexpr int kFirstCache = 0, kSecondCache = 0;
#endif

inline int64_t first_cache() {
  static const int64_t bytes = cache_bytes(kFirstCache, 32 << 10);
  return bytes;
}

inline int64_t second_cache() {
  static const int64_t bytes = cache_bytes(kSecondCache, 1 << 20);
  return bytes;
}

}  // namespace loraplex
