// Whether llama.cpp's own parser takes a command line of llama-cli or llama-server, which the toolchain does not build.
// By hand, with llama.cpp's sources beside the toolchain's libraries (a --help that fits is not enough):
//   g++ -std=c++17 -I$SRC/common -I$SRC/include -I$SRC/ggml/include -I$SRC/vendor llama_arguments.cpp -L$BIN
//       -l:libllama-common.so -l:libllama.so -l:libggml.so -l:libggml-base.so -Wl,-rpath,$BIN -o llama_arguments
//   ./llama_arguments llama-server -m x.gguf -c 8192 ...
#include "arg.h"
#include "common.h"
#include <cstdio>
#include <cstring>
int main(int argc, char ** argv) {
    common_params params;
    auto ex = !strcmp(argv[1], "llama-server") ? LLAMA_EXAMPLE_SERVER : LLAMA_EXAMPLE_CLI;
    bool ok = common_params_parse(argc - 1, argv + 1, params, ex);
    printf("%s ok=%d ngl=%d ctx=%d k=%d v=%d fa=%d temp=%g minp=%g seed=%u ot=%zu\n", argv[1], ok, params.n_gpu_layers, params.n_ctx, params.cache_type_k, params.cache_type_v, params.flash_attn_type, params.sampling.temp, params.sampling.min_p, params.sampling.seed, params.tensor_buft_overrides.size());
    return !ok;
}
