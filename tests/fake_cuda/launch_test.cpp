// csrc/common/launch.cuh on GPUs that nobody here has. Says what it found, one line each; tests/csrc/test_launch.py reads them.
#include <iostream>
#include <string>
#include <thread>

#define FASTKD_CUDA_ARCHITECTURES "8.0 9.0a 10.0+PTX"
#include "common/launch.cuh"

namespace fastkd {
namespace {

struct Params {
  int number;
};
void kernel(Params) {}
void other_kernel(Params) {}

// launch_test limits MAJOR MULTIPROCESSORS BLOCK_KIB PTX LARGEST_CLUSTER
void print_limits(char** number) {
  fake::gpus = {{std::stoi(number[0]), std::stoi(number[1]), std::stoi(number[2]) << 10, std::stoi(number[3]),
                 static_cast<unsigned>(std::stoi(number[4]))}};
  const DeviceLimits limits = DeviceContext(Tensor{0}).limits();
  std::cout << limits.max_cluster << ' ' << limits.multiprocessors << ' ' << limits.shared_bytes / 1024 << ' '
            << cudaGetLastError() << '\n';
}

std::string attempt(int device, void (*function)(Params), const Geometry& geometry) {
  fake::asked.clear();
  std::string text;
  try {
    const DeviceContext context(Tensor{device});
    context.limits();
    fake::asked.clear();
    context.launch("name", function, geometry, Params{1});
    text = "launched";
  } catch (const std::exception& error) {
    text = error.what();
  }
  text += ", asked";
  for (const auto& [of_device, of_kernel, attribute] : fake::asked) {
    text += ' ' + std::to_string(of_device) + (of_kernel == fake::address(function) ? "" : "?") + ':' + std::to_string(attribute);
  }
  return text + (cudaGetLastError() == cudaSuccess ? "" : ", an error is left") +
         (fake::current == 0 ? "" : ", another GPU is left");
}

// Of three of many GPUs, all different, each asked twice.
void print_many() {
  for (int i = 0; i < 100; ++i) fake::gpus.push_back({8, 10 + i, 99 << 10, 80, 1});
  for (int i : {65, 1, 65, 1, 64, 0}) std::cout << DeviceContext(Tensor{i}).limits().multiprocessors << '\n';
}

// The same kernels again and again, on two GPUs of which the second has less.
void print_launches() {
  fake::gpus = {{}, {12, 84, 99 << 10, 100, 8}};
  const Geometry small{4, 128}, large{32, 256, 16, 100 << 10}, medium{8, 256, 8, 64 << 10};
  const auto say = [](const std::string& text) { std::cout << text << '\n'; };
  say(attempt(0, kernel, small));
  say(attempt(0, kernel, large));
  say(attempt(0, kernel, large));
  say(attempt(0, kernel, medium));
  say(attempt(0, other_kernel, medium));
  say(attempt(1, kernel, medium));
  say(attempt(1, kernel, medium));
  say(attempt(1, kernel, large));  // is not planned on such a GPU
  say(attempt(1, kernel, small));
  say(attempt(0, kernel, {0, 128}));
  say(attempt(0, kernel, large));
}

// The first launch of a kernel, of several threads at once.
void print_threads() {
  fake::gpus = {{}};
  std::vector<std::thread> threads;
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([] { DeviceContext(Tensor{0}).launch("name", kernel, {32, 256, 16, 100 << 10}, Params{1}); });
  }
  for (std::thread& thread : threads) thread.join();
  int of_kernel = 0;
  for (const auto& key : fake::asked) of_kernel += std::get<1>(key) == fake::address(kernel);
  std::cout << fake::launches << ' ' << of_kernel << '\n';
}

// launch_test code MAJOR MINOR HAS_CODE NUMBER: two calls of an operator on that GPU.
void print_code(char** number) {
  const int device = std::stoi(number[3]);
  fake::gpus.resize(static_cast<size_t>(device) + 1);
  fake::gpus.back().major = std::stoi(number[0]);
  fake::gpus.back().minor = std::stoi(number[1]);
  fake::gpus.back().has_code = std::stoi(number[2]) != 0;
  for (int i = 0; i < 2; ++i) {
    try {
      DeviceContext(Tensor{device}).launch("name", kernel, {1, 32}, Params{1});
      std::cout << "launched, questions " << fake::questions << '\n';
    } catch (const std::exception& error) {
      std::cout << error.what() << ", launches " << fake::launches << '\n';
    }
  }
}

}  // namespace
}  // namespace fastkd

int main(int, char** arguments) {
  const std::string what = arguments[1];
  if (what == "limits") {
    fastkd::print_limits(arguments + 2);
  } else if (what == "many") {
    fastkd::print_many();
  } else if (what == "launches") {
    fastkd::print_launches();
  } else if (what == "code") {
    fastkd::print_code(arguments + 2);
  } else {
    fastkd::print_threads();
  }
}
