// Stand-ins for NVRTC and for the CUDA driver, with the functions that jadam calls. -DARCHITECTURES=75,80 -DMAJOR=12
// -DMINOR=9 builds NVRTC; without them it is the driver, and -DLOAD gives it cuFuncLoad.

#include <atomic>
#include <chrono>
#include <cstring>
#include <mutex>
#include <string>
#include <thread>

#define EXPORT extern "C" __attribute__((visibility("default")))

#ifdef ARCHITECTURES

struct Program {
  std::string source, headers, log, code;
};
static const int architectures[] = {ARCHITECTURES};
static std::atomic<int> compilations{0}, programs{0};

EXPORT int fake_compilations() { return compilations; }
EXPORT int fake_programs() { return programs; }  // that are not destroyed

EXPORT const char* nvrtcGetErrorString(int error) { return error == 6 ? "NVRTC_ERROR_COMPILATION" : "NVRTC_ERROR"; }
EXPORT int nvrtcVersion(int* major, int* minor) { return *major = MAJOR, *minor = MINOR, 0; }
EXPORT int nvrtcGetNumSupportedArchs(int* count) { return *count = sizeof(architectures) / sizeof(int), 0; }
EXPORT int nvrtcGetSupportedArchs(int* out) { return std::memcpy(out, architectures, sizeof(architectures)), 0; }
EXPORT int nvrtcCreateProgram(Program** program, const char* source, const char* name, int count, const char** headers,
                              const char** names) {
  ++programs;
  *program = new Program{source, name, "", ""};
  for (int i = 0; i < count; ++i) (*program)->headers += std::string(" ") + names[i] + ":" + headers[i];
  return 0;
}
EXPORT int nvrtcDestroyProgram(Program** program) { return --programs, delete *program, *program = nullptr, 0; }
EXPORT int nvrtcCompileProgram(Program* program, int count, const char** options) {
  ++compilations;
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  if (program->source.find("#error") != std::string::npos) {
    program->log = "kernel.cu(1): error: #error directive\n\n  #error\n   ^\n1 error detected\n";
    return 6;
  }
  program->code = "cubin";
  for (int i = 0; i < count; ++i) program->code += std::string(" ") + options[i];
  program->code += " | " + program->headers + " | " + program->source;
  return 0;
}
EXPORT int nvrtcGetProgramLogSize(Program* program, size_t* size) { return *size = program->log.size() + 1, 0; }
EXPORT int nvrtcGetProgramLog(Program* program, char* out) { return std::strcpy(out, program->log.c_str()), 0; }
EXPORT int nvrtcGetCUBINSize(Program* program, size_t* size) { return *size = program->code.size(), 0; }
EXPORT int nvrtcGetCUBIN(Program* program, char* out) {
  return std::memcpy(out, program->code.data(), program->code.size()), 0;
}

#else

static std::mutex mutex;
static std::string calls, failing;
static int error, version = 12080;
static int capabilities[] = {90, 90, 80};    // of three devices
static thread_local size_t stack[16] = {100};  // contexts: 100 + device; that of device 0 is current at first
static thread_local int depth = 1;

static int called(const char* name, const std::string& more = "") {
  std::lock_guard<std::mutex> lock(mutex);
  calls += (calls.empty() ? "" : "\n") + std::string(name) + more;
  return failing == name ? error : 0;
}
template <class T>
static int give(int result, T* out, size_t value) {
  if (!result) *out = (T)value;
  return result;
}
static int current() { return (int)stack[depth - 1] - 100; }

EXPORT const char* fake_calls() { return calls.c_str(); }
EXPORT void fake_reset(const char* name, int code, int version_) {
  calls.clear(), failing = name, error = code, version = version_;
}
EXPORT int fake_depth() { return depth; }

EXPORT int cuGetErrorString(int code, const char** text) {
  return *text = code == 209 ? "no kernel image is available" : nullptr, code == 209 ? 0 : 1;
}
EXPORT int cuDriverGetVersion(int* out) { return give(called("cuDriverGetVersion"), out, version); }
EXPORT int cuStreamGetCtx(void* stream, void** context) {  // a stream of device i is 1000 + i
  return give(called("cuStreamGetCtx"), context, stream ? (size_t)stream - 1000 + 100 : stack[depth - 1]);
}
EXPORT int cuCtxPushCurrent_v2(void* context) {
  int result = called("cuCtxPushCurrent_v2");
  if (!result) stack[depth++] = (size_t)context;
  return result;
}
EXPORT int cuCtxPopCurrent_v2(void** context) {
  int result = called("cuCtxPopCurrent_v2");
  return give(result, context, stack[--depth]);
}
EXPORT int cuCtxGetDevice(int* device) { return give(called("cuCtxGetDevice"), device, current()); }
EXPORT int cuDeviceGetAttribute(int* value, int attribute, int device) {
  int capability = capabilities[device];
  return give(called("cuDeviceGetAttribute"), value, attribute == 75 ? capability / 10 : capability % 10);
}
EXPORT int cuLibraryLoadData(void** library, const char* code, void* a, void* b, unsigned c, void* d, void* e,
                             unsigned f) {
  const char* arch = std::strstr(code, "-arch=");
  bool good = arch && !a && !b && !c && !d && !e && !f;
  return give(good ? called("cuLibraryLoadData", " " + std::string(arch, 11)) : 1, library, 0x700000000001);
}
EXPORT int cuLibraryGetKernel(void** kernel, void* library, const char* name) {
  bool good = (size_t)library == 0x700000000001;
  return give(good ? called("cuLibraryGetKernel", " " + std::string(name)) : 1, kernel, 0x700000000002);
}
EXPORT int cuKernelGetFunction(void** function, void* kernel) {
  bool good = (size_t)kernel == 0x700000000002;
  int result = good ? called("cuKernelGetFunction", " on " + std::to_string(current())) : 1;
  return give(result, function, 0x700000000003);
}
#ifdef LOAD
EXPORT int cuFuncLoad(void* function) { return (size_t)function == 0x700000000003 ? called("cuFuncLoad") : 1; }
#endif
EXPORT int cuFuncGetAttribute(int* value, int attribute, void* function) {
  bool good = (size_t)function == 0x700000000003 && attribute == 4;
  return give(good ? called("cuFuncGetAttribute") : 1, value, 32);
}
EXPORT int cuLaunchKernel() { return called("cuLaunchKernel"); }
EXPORT int cuMemcpyDtoDAsync_v2() { return called("cuMemcpyDtoDAsync_v2"); }

#endif
