"""The fused log-softmax: its Metal text compiled as C++, its gradient against autodiff, on a Mac, and on a CPU."""

import os
import shutil
import subprocess

import mlx.core as mx
import numpy as np
import pytest
from test_logps import log_softmax

import dpo_trainer as dpo

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
CPP_TYPES = {"float32": "float", "float16": "_Float16", "bfloat16": "bfloat16"}
SIZES = [3, 32, 1003, 4096, 32003]  # vocabularies: fewer than a simdgroup, one each, no multiple of 32

# A simdgroup is 32 threads, whose simd functions wait for one another. Arrays end where a sanitizer watches.
EMULATOR = r"""
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <vector>
#define device
using uint = unsigned;
struct uint3 { uint x, y, z; };
namespace metal { using std::exp, std::log, std::max; }
struct bfloat16 {
    uint16_t bits;
    operator float() const { uint32_t word = (uint32_t)bits << 16; float x; memcpy(&x, &word, 4); return x; }
};
std::barrier<> gate(32);
float shared[32];
thread_local uint self;
template <typename F> float across(float x, F combine) {
    shared[self] = x;
    gate.arrive_and_wait();
    for (uint i = 0; i < 32; i++) if (i != self) x = combine(x, shared[i]);
    gate.arrive_and_wait();
    return x;
}
float simd_max(float x) { return across(x, [](float a, float b) { return std::max(a, b); }); }
float simd_sum(float x) { return across(x, [](float a, float b) { return a + b; }); }
template <typename T, int V>
void kernel(const T* logits, const int* targets, float* logps, float* lse, uint3 thread_position_in_grid) {
%s
}
template <typename T> std::vector<T> read(size_t count) {
    std::vector<T> data(count);
    if (fread(data.data(), sizeof(T), count, stdin) != count) exit(1);
    return data;
}
template <typename T, int V> void run(int rows) {
    auto logits = read<T>((size_t)rows * V);
    auto targets = read<int>(rows);
    std::vector<float> logps(rows, NAN), lse(rows, NAN);
    for (uint row = 0; row < (uint)rows; row++) {
        std::vector<std::thread> threads;
        for (uint i = 0; i < 32; i++) threads.emplace_back([&, i] {
            self = i;
            kernel<T, V>(logits.data(), targets.data(), logps.data(), lse.data(), {32 * row + i, 0, 0});
        });
        for (auto& thread : threads) thread.join();
    }
    for (auto* out : {&logps, &lse}) fwrite(out->data(), 4, rows, stdout);
}
int main(int, char** argv) {
    std::string asked = std::string(argv[1]) + " " + argv[2];
    int rows = atoi(argv[3]);
    %s
    else return 2;
}
"""


def hard_rows(size, dtype):
    """Return logits (8, V) and targets: large and small ones, tokens of -inf, targets at both ends, a certain one."""
    rng = np.random.default_rng(size)
    logits, targets = 4 * rng.standard_normal((8, size)).astype(np.float32), rng.integers(0, size, 8)
    targets[:2] = 0, size - 1
    logits[2:4] += [[120], [-120]]  # the first one's exponentials overflow
    logits[4, rng.random(size) < 0.7] = -np.inf
    logits[5] = -np.inf  # all that most threads see
    logits[6, targets[6]] = 40
    logits[range(4, 6), targets[4:6]] = 2
    return mx.array(logits).astype(dtype), mx.array(targets, mx.int32)


def expected(logits, targets):
    """Return the targets' log-probabilities and the log-sum-exps in float64."""
    logps = np.take_along_axis(log_softmax(logits), np.array(targets)[..., None], -1)[..., 0]
    wide = np.array(logits.astype(mx.float32)).astype(np.float64)
    return logps, np.take_along_axis(wide, np.array(targets)[..., None], -1)[..., 0] - logps


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Compile the kernel's text, as it stands, for a CPU; return a function that runs it on arrays."""
    if not shutil.which("g++"):
        pytest.skip("the emulator of a simdgroup needs g++")
    folder = tmp_path_factory.mktemp("emulator")
    cases = [
        f'if (asked == "{dtype} {size}") run<{cpp}, {size}>(rows);'
        for dtype, cpp in CPP_TYPES.items()
        for size in SIZES
    ]
    (folder / "emulator.cpp").write_text(EMULATOR % (dpo.LOG_SOFTMAX, "\n    else ".join(cases)))
    command = ["g++", "-std=c++20", "-O1", "-fsanitize=address", "-o", folder / "emulator", folder / "emulator.cpp"]
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # the sanitizer must be first
    built = subprocess.run(command, capture_output=True, text=True, env=plain)
    assert built.returncode == 0, built.stderr

    def run(logits, targets, name):
        bits = np.array(logits.view(mx.uint32 if logits.dtype == mx.float32 else mx.uint16))
        words = [folder / "emulator", name, str(logits.shape[1]), str(len(targets))]
        data = bits.tobytes() + np.array(targets).tobytes()
        ran = subprocess.run(words, input=data, capture_output=True, timeout=60, env=plain)
        assert ran.returncode == 0, ran.stderr.decode()
        return np.frombuffer(ran.stdout, np.float32).reshape(2, -1)

    return run


@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_the_text_compiled_as_cpp(emulated, size, name):
    logits, targets = hard_rows(size, DTYPES[name])
    np.testing.assert_allclose(emulated(logits, targets, name), expected(logits, targets), rtol=2e-6, atol=2e-6)


# ------------------------------------------------------------------------------------------------- within a trainer


@pytest.fixture
def stand_in(monkeypatch):
    """Put plain MLX into the kernel's place; return the list of what it is launched with."""
    launched = []

    def metal_kernel(name, input_names, output_names, source):
        assert (input_names, output_names) == (["logits", "targets"], ["logps", "lse"]) and source == dpo.LOG_SOFTMAX

        def kernel(inputs, **given):
            launched.append(given)
            wide, targets = inputs[0].astype(mx.float32), inputs[1][..., None]
            lse = mx.logsumexp(wide, axis=-1)
            return [mx.take_along_axis(wide, targets, axis=-1)[..., 0] - lse, lse]

        return kernel

    monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
    return launched


def logps_of(logits, targets, mask):
    """Return answer_logps of a model that gives these logits, (2, 4, V)."""
    rows = mx.concatenate([mx.zeros_like(targets[:, :1]), targets], axis=1)
    return dpo.answer_logps(lambda *_, cache: logits, {"rows": rows, "mask": mask, "prompts": mx.zeros((1, 0))})[0]


@pytest.mark.parametrize("where", ["metal", "stand-in", "cpu"])
@pytest.mark.parametrize("name", DTYPES)
def test_values_and_gradients(name, where, request, monkeypatch):
    """Against autodiff of plain MLX in float32: summed, masked, by any cotangent, in the logits' dtype."""
    if where == "metal" and not mx.metal.is_available():
        pytest.skip("needs a Mac")
    launched = request.getfixturevalue("stand_in") if where == "stand-in" else []
    monkeypatch.setattr(dpo, "METAL", where != "cpu")
    logits, targets = (x.reshape(2, 4, *x.shape[1:]) for x in hard_rows(1003, DTYPES[name]))
    mask, cotangent = mx.array([[1.0, 1, 1, 0], [0, 1, 1, 1]]), mx.array([0.7, -1.3])

    def plain(logits):
        logps = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)
        return mx.where(mask > 0, logps, 0).sum(-1)

    (found,), (gradient,) = mx.vjp(lambda x: logps_of(x, targets, mask), [logits], [cotangent])
    (known,), (slope,) = mx.vjp(plain, [logits.astype(mx.float32)], [cotangent])
    assert found.dtype == mx.float32 and gradient.dtype == logits.dtype
    np.testing.assert_allclose(np.array(found), np.array(known), rtol=1e-5)
    rounding = {mx.float32: 2e-5, mx.float16: 2**-10, mx.bfloat16: 2**-7}[logits.dtype]
    np.testing.assert_allclose(np.array(gradient.astype(mx.float32)), np.array(slope), rtol=rounding, atol=1e-5)
    for given in launched:
        assert given["template"] == [("T", logits.dtype), ("V", 1003)]
        assert given["grid"] == (32 * 8, 1, 1) and given["threadgroup"] == (32, 1, 1)
        assert given["output_shapes"] == [(2, 4)] * 2 and given["output_dtypes"] == [mx.float32] * 2
    assert len(launched) == (where == "stand-in")
