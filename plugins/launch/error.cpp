// The message of the last error, one per thread.
#include "error.h"

#include <cstring>

namespace {

thread_local char lastError[2048] = "";

} // namespace

void lightforcing::rememberError(const char* message) noexcept {
    std::strncpy(lastError, message, sizeof lastError - 1);
}

const char* lf_last_error(void) {
    return lastError;
}
