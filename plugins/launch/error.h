// The error type inside of the library, and the boundary where it becomes a status and a message.
#pragma once

#include <stdexcept>
#include <string>

#include "lightforcing_launch.h"

namespace lightforcing {

class Error : public std::runtime_error {
  public:
    Error(lf_status status, const std::string& message) : std::runtime_error(message), status_(status) {}

    lf_status status() const noexcept { return status_; }

  private:
    lf_status status_;
};

/// Keeps `message` for lf_last_error() of this thread. Cuts it rather than fail.
void rememberError(const char* message) noexcept;

/// Runs `body` and turns whatever it throws into a status; every function of the C interface goes through
/// here.
template <typename Body>
lf_status guarded(Body&& body) noexcept {
    try {
        body();
        return LF_OK;
    } catch (const Error& error) {
        rememberError(error.what());
        return error.status();
    } catch (const std::exception& error) {
        rememberError(error.what());
        return LF_INTERNAL;
    } catch (...) {
        rememberError("unknown error");
        return LF_INTERNAL;
    }
}

} // namespace lightforcing
