"""
Measure the trainers' kernel, LOG_SOFTMAX, beside mx.fast.cross_entropy on a GPU, with bfloat16 logits.

    python tests/bench_kernel.py

On NVIDIA the text runs as it stands, after a header that gives it Metal's names. Prints a line a shape: milliseconds
of both, forward, and forward and backward; the kernel's largest errors against plain MLX, of values and of gradients.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo_trainer as dpo

SHAPES = [(128256, 2048), (151936, 4096), (32003, 4096), (256000, 2048)]  # vocabulary, tokens
HEADER = """
#define device
#define thread_position_in_grid Place{blockIdx.x * blockDim.x + threadIdx.x}
using uint = unsigned int;
struct Place { uint x; };
namespace metal {
    __device__ float max(float a, float b) { return fmaxf(a, b); }
    __device__ float exp(float x) { return __expf(x); }
    __device__ float log(float x) { return logf(x); }
}
__device__ float simd_max(float x) { for (int i = 16; i; i /= 2) x = fmaxf(x, __shfl_xor_sync(~0u, x, i)); return x; }
__device__ float simd_sum(float x) { for (int i = 16; i; i /= 2) x += __shfl_xor_sync(~0u, x, i); return x; }
"""


def fused(logits, targets):
    return dpo.fused_log_softmax(logits, targets)[0]


def fast(logits, targets):
    return -mx.fast.cross_entropy(logits, targets)


def plain(logits, targets):
    logits = logits.astype(mx.float32)
    return mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)


def milliseconds(function, repeat):
    """Return the milliseconds of one of repeat calls that the GPU gets at once."""
    mx.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        mx.async_eval(function())
    mx.synchronize()
    return 1e3 * (time.perf_counter() - start) / repeat


def measure(size, tokens, rounds, repeat):
    """Return {(function's name, "forward" or "both"): median milliseconds} and the kernel's two largest errors."""
    mx.random.seed(0)
    logits = (3 * mx.random.normal((tokens, size))).astype(mx.bfloat16)
    targets, weights = mx.random.randint(0, size, (tokens,)), mx.random.normal((tokens,))
    mx.eval(logits, targets, weights)
    runs = {}
    for function in (fused, fast, plain):
        gradient = mx.grad(lambda x, function=function: (function(x, targets) * weights).sum())
        runs[function.__name__, "forward"] = partial(function, logits, targets)
        runs[function.__name__, "both"] = partial(gradient, logits)
    found = {name: run().astype(mx.float32) for name, run in runs.items()}  # compiles, too
    errors = [mx.abs(found["fused", part] - found["plain", part]).max().item() for part in ("forward", "both")]
    timed = {name: [] for name in runs if name[0] != "plain"}
    for _ in range(rounds):
        for name, times in timed.items():
            times.append(milliseconds(runs[name], repeat))
    return {name: statistics.median(times) for name, times in timed.items()}, errors


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--repeat", type=int, default=5, help="calls a round of each function")
    args = parser.parse_args()
    if not (dpo.CUDA or dpo.METAL):
        sys.exit("There is no GPU here, and without one no kernel to measure.")
    if dpo.CUDA:
        mx.fast.metal_kernel = partial(mx.fast.cuda_kernel, header=HEADER)
    print(f"{mx.device_info()['device_name']}, mlx {mx.__version__}, median of {args.rounds} rounds: kernel / mx.fast")
    for size, tokens in SHAPES:
        times, errors = measure(size, tokens, args.rounds, args.repeat)
        shown = [f"{size} x {tokens}"]
        for part in ("forward", "both"):
            shown.append(f"{part} {times['fused', part]:.3f} / {times['fast', part]:.3f} ms")
        print("; ".join([*shown, f"errors {errors[0]:.0e}, {errors[1]:.0e}"]), flush=True)


if __name__ == "__main__":
    main()
