#pragma once

// Standard headers come before the target of a file is raised, so that their inline functions, which the linker may share
// with the rest of the library, are built for every machine.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

#include "masked_conv.h"
