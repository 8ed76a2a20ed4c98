#pragma once

// Standard headers come before the target of a file is raised, so that their inline functions, which the linker may share
// with the rest of the library, are built for every machine.
#include <omp.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>

#include "adam.h"
#include "encode.h"
#include "head_kernels.h"
#include "masked_conv.h"
#include "pairs.h"
#include "targets.h"
