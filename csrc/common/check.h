// Errors of the operators. Every message names the argument, what was given and what is allowed.
#pragma once

#include <sstream>
#include <stdexcept>

namespace fastkd {

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  message << "fastkd: ";
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

}  // namespace fastkd

#define FASTKD_CHECK(condition, ...) \
  do {                               \
    if (!(condition)) [[unlikely]] { \
      ::fastkd::fail(__VA_ARGS__);   \
    }                                \
  } while (false)
