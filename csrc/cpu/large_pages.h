#pragma once

#include <cstdint>

namespace teracon {

// Asks for large pages behind memory that is about to be written for the first time: clearing 4 KiB pages one fault at a time
// costs more than the writes. A request only; does nothing where the system has none or the memory is small.
void prefer_large_pages(void* data, int64_t bytes);

}  // namespace teracon
