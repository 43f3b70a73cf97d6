// Whether this processor can run what the rest of the library was compiled for; itself compiled for any.

#include "nmfx_kernel.h"

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

extern "C" int32_t nmfx_supported(void) {
#if defined(__x86_64__) || defined(_M_X64)
  int has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#if NMFX_AVX512
  has = has && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl");
#endif
#if NMFX_VNNI && NMFX_AVX512
  has = has && __builtin_cpu_supports("avx512vnni");
#elif NMFX_VNNI
  has = has && __builtin_cpu_supports("avxvnni");
#endif
  return has != 0;
#elif defined(__aarch64__) && defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#else
  return 1;
#endif
}
