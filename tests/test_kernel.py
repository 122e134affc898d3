"""The fused log-softmax: its Metal text compiled as C++, on CUDA, on a Mac, and what stands in for it on a CPU."""

import shutil
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest

import dpo_trainer as dpo

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
CPP_TYPES = {"float32": "float", "float16": "_Float16", "bfloat16": "bfloat16"}
SIZES = [(3, 256), (1003, 256), (4096, 256), (32003, 256), (1003, 32), (4096, 1024)]  # vocabulary, threads

# A threadgroup as coroutines. Each runs, in the order of its index, until all 32 of its simdgroup want the same simd
# function, or all of the threadgroup the barrier: a barrier that is missing, or not reached by all, shows every time.
EMULATOR = r"""
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector>
using std::log, std::max, std::min;
#define device
#define threadgroup static
#define METAL_FUNC inline
namespace fast { float exp(float x) { return std::exp(x); } }
struct uint3 { unsigned x, y, z; };
enum class mem_flags { mem_threadgroup };

struct bfloat16 {
    uint16_t bits;
    bfloat16() = default;
    explicit bfloat16(float x) {
        uint32_t word;
        memcpy(&word, &x, 4);
        bits = x != x ? 0x7fff : (word + 0x7fff + (word >> 16 & 1)) >> 16;
    }
    explicit operator float() const {
        uint32_t word = (uint32_t)bits << 16;
        float x;
        memcpy(&x, &word, 4);
        return x;
    }
};

void fail(const char* why) { fprintf(stderr, "%s\n", why); exit(1); }

enum Wish { RUN, MAXIMUM, SUM, BARRIER, END };
struct Thread { ucontext_t context; std::vector<char> stack; Wish wish; float value; };
std::vector<Thread> threads;
ucontext_t scheduler;
unsigned current;
std::function<void(unsigned)> body;

float wait_for(Wish wish, float value) {
    Thread& self = threads[current];
    self.wish = wish;
    self.value = value;
    swapcontext(&self.context, &scheduler);
    return self.value;
}
float simd_max(float x) { return wait_for(MAXIMUM, x); }
float simd_sum(float x) { return wait_for(SUM, x); }
void threadgroup_barrier(mem_flags) { wait_for(BARRIER, 0); }
void start() { body(current); threads[current].wish = END; }

bool all_wish(Wish wish, size_t from, size_t count) {
    for (size_t i = from; i < from + count; i++) if (threads[i].wish != wish) return false;
    return true;
}

void run_threadgroup() {
    for (Thread& thread : threads) {
        getcontext(&thread.context);
        thread.stack.resize(1 << 16);
        thread.context.uc_stack.ss_sp = thread.stack.data();
        thread.context.uc_stack.ss_size = thread.stack.size();
        thread.context.uc_link = &scheduler;
        makecontext(&thread.context, start, 0);
        thread.wish = RUN;
    }
    while (!all_wish(END, 0, threads.size())) {
        bool ran = false;
        for (current = 0; current < threads.size(); current++) {
            if (threads[current].wish != RUN) continue;
            swapcontext(&scheduler, &threads[current].context);
            ran = true;
        }
        if (!ran) fail("some threads wait for others that never come");
        for (size_t from = 0; from < threads.size(); from += 32) {
            float highest = -INFINITY, sum = 0;
            for (size_t i = from; i < from + 32; i++) highest = max(highest, threads[i].value), sum += threads[i].value;
            for (Wish wish : {MAXIMUM, SUM}) {
                if (!all_wish(wish, from, 32)) continue;
                for (size_t i = from; i < from + 32; i++) threads[i].value = wish == SUM ? sum : highest;
                for (size_t i = from; i < from + 32; i++) threads[i].wish = RUN;
            }
        }
        if (all_wish(BARRIER, 0, threads.size())) for (Thread& thread : threads) thread.wish = RUN;
    }
}

const size_t PAGE = 1 << 16;
template <typename T> struct Buffer {  // of bytes 255, which are NaN in every type, up to a page that none may touch
    char *area, *data;
    size_t bytes, whole;
    Buffer(size_t count, size_t shift) : bytes(count * sizeof(T)), whole((bytes / PAGE + 3) * PAGE) {
        area = (char*)mmap(0, whole + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(area, 255, whole);
        mprotect(area + whole, PAGE, PROT_NONE);
        data = area + whole - 16 - bytes;
        data += shift * sizeof(T) - (size_t)data % 16;
    }
    T* get() { return (T*)data; }
    T* read() { if (fread(data, 1, bytes, stdin) != bytes) fail("short input"); return get(); }
    void forbid(size_t start, size_t count) {
        char* from = area + ((data + start * sizeof(T) - area) + PAGE - 1) / PAGE * PAGE;
        char* to = area + (data + (start + count) * sizeof(T) - area) / PAGE * PAGE;
        if (from < to) mprotect(from, to - from, PROT_NONE);
    }
    void write() {
        for (char* p = area; p < area + whole; p++)
            if ((p < data || p >= data + bytes) && *p != (char)255) fail("written outside of an output");
        fwrite(data, 1, bytes, stdout);
    }
};
"""

# What MLX puts around the texts: template arguments, inputs, outputs, and the attributes that are read.
KERNEL = """
template <typename T, int V, int THREADS> void %s(%s,
    uint3 threadgroup_position_in_grid, unsigned thread_index_in_threadgroup) {
%s
}
"""
MAIN = """
template <typename T, int V, int THREADS>
void run(bool back, size_t rows, size_t shift, size_t out_shift, size_t ahead) {
    Buffer<T> logits(rows * V, shift), gradient(rows * V, out_shift);
    Buffer<int> targets(rows, 0);
    Buffer<float> logps(rows, 0), lse(rows, 0), cotangent(rows, 0);
    T *x = logits.read() - ahead * V, *out = gradient.get() - ahead * V;  // as if so many rows lay before them
    int* t = targets.read() - ahead;
    float *p = logps.get() - ahead, *l = (back ? lse.read() : lse.get()) - ahead;
    float* c = (back ? cotangent.read() : cotangent.get()) - ahead;
    for (size_t row = 0; row < rows; row++)
        if (t[ahead + row] < 0 || (back && c[ahead + row] == 0)) logits.forbid(row * V, V);
    threads.resize(THREADS);
    for (unsigned row = ahead; row < ahead + rows; row++) {
        body = [=](unsigned index) {
            if (back) backward<T, V, THREADS>(x, t, l, c, out, {row, 0, 0}, index);
            else forward<T, V, THREADS>(x, t, p, l, {row, 0, 0}, index);
        };
        run_threadgroup();
    }
    if (back) gradient.write();
    else logps.write(), lse.write();
}

int main(int, char** argv) {
    std::string asked = std::string(argv[1]) + " " + argv[2] + " " + argv[3];
    bool back = std::string(argv[4]) == "backward";
    size_t rows = atoi(argv[5]), shift = atoi(argv[6]), out_shift = atoi(argv[7]), ahead = atoi(argv[8]);
    %s
    else fail("not compiled");
}
"""


def plain(logits, targets, mask):
    """Return log softmax(logits) at the targets: (...), in plain MLX and the logits' dtype, and 0 where mask is 0."""
    logits = mx.where(mask[..., None] > 0, logits, 0)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return mx.where(mask > 0, mx.take_along_axis(logps, targets[..., None], axis=-1)[..., 0], 0)


def hard_rows(size, dtype):
    """Return logits (10, V), targets, mask, cotangents: masked rows of NaN, tokens of -inf, targets at both ends."""
    rng = np.random.default_rng(size)
    logits = 4 * rng.standard_normal((10, size)).astype(np.float32)
    targets, mask = rng.integers(0, size, 10), np.ones(10, np.float32)
    cotangents = rng.standard_normal(10).astype(np.float32)
    targets[0], targets[1] = 0, size - 1
    logits[2] += 120  # its exponentials overflow
    logits[[3, 8]] -= 120
    mask[[4, 9]], logits[[4, 9]] = 0, np.nan
    logits[5, rng.random(size) < 0.7] = -np.inf  # whole packs of tokens that cannot be
    logits[6] = -np.inf  # all that most threads see
    logits[[5, 6], targets[[5, 6]]] = 2
    logits[7, size // 2 :] = -np.inf
    targets[7] = size - 1
    cotangents[8] = 0
    cotangents[1] *= 100
    return mx.array(logits).astype(dtype), mx.array(targets, mx.int32), mx.array(mask), mx.array(cotangents)


def check(logps, gradient, logits, targets, mask, cotangents):
    """Compare log-probabilities and gradients, as float32 arrays, with plain MLX's in float64."""
    with mx.stream(mx.cpu):  # a GPU has no float64
        wide = [logits.astype(mx.float64)], [cotangents.astype(mx.float64)]
        (expected,), (slope,) = (np.array(x) for x in mx.vjp(lambda x: plain(x, targets, mask), *wide))
        chosen = np.array(targets[..., None] == mx.arange(logits.shape[-1]))
    np.testing.assert_allclose(logps, expected, rtol=2e-6, atol=2e-6)
    rounding = {mx.float32: 2**-24, mx.float16: 2**-11, mx.bfloat16: 2**-8}[logits.dtype]
    slack = (rounding + 2e-5) * abs(slope) + 2e-5 * chosen * abs(np.array(cotangents))[..., None] + 1e-7
    wrong = ~(abs(gradient - slope) <= slack)  # so that a NaN is wrong
    assert not wrong.any(), f"{wrong.sum()} of {wrong.size} gradients, first at {np.argwhere(wrong)[0]}"


# ------------------------------------------------------------------------------------------------------ compiled as C++


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """Compile the texts of the kernels, as they stand, for a CPU; return a function that runs them on arrays."""
    if not (shutil.which("g++") and sys.platform == "linux"):
        pytest.skip("the emulator of a threadgroup needs g++ and Linux")
    folder = tmp_path_factory.mktemp("emulator")
    inputs = "const device T* logits, const device int* targets"
    kernels = KERNEL % ("forward", f"{inputs}, device float* logps, device float* lse", dpo.FORWARD)
    inputs += ", const device float* lse, const device float* cotangent"
    kernels += KERNEL % ("backward", f"{inputs}, device T* gradient", dpo.BACKWARD)
    cases = [
        f'if (asked == "{dtype} {size} {count}") run<{cpp}, {size}, {count}>(back, rows, shift, out_shift, ahead);'
        for dtype, cpp in CPP_TYPES.items()
        for size, count in SIZES
    ]
    (folder / "emulator.cpp").write_text(EMULATOR + dpo.HEADER + kernels + MAIN % "\n    else ".join(cases))
    # a pack at an address that is no multiple of 16 kills the process
    options = ["-std=c++17", "-O1", "-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
    command = ["g++", *options, "-o", folder / "emulator", folder / "emulator.cpp"]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr

    def run(kernel, logits, *others, threads, shift, out_shift, ahead):
        rows, size = logits.shape
        name = str(logits.dtype).rpartition(".")[2]
        words = [name, size, threads, kernel, rows, shift, out_shift, ahead]
        data = b"".join(np.array(x).tobytes() for x in (as_bits(logits), *others))
        ran = subprocess.run([folder / "emulator", *map(str, words)], input=data, capture_output=True)
        assert ran.returncode == 0, f"{words}: exit status {ran.returncode} {ran.stderr.decode()}"
        return ran.stdout

    return run


def as_bits(array):
    return array.view(mx.uint32 if array.dtype == mx.float32 else mx.uint16)


def from_bits(data, dtype, shape):
    bits = mx.array(np.frombuffer(data, np.uint32 if dtype == mx.float32 else np.uint16).reshape(shape))
    return np.array(bits.view(dtype).astype(mx.float32))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size, threads", SIZES)
def test_texts_compiled_as_cpp(emulated, size, threads, dtype):
    """Rows start at any address; masked ones cannot be read, every gradient is written, also past 2^32 values."""
    logits, targets, mask, cotangents = hard_rows(size, DTYPES[dtype])
    marked = mx.where(mask > 0, targets, -1)
    for shift, out_shift, ahead in [(0, 0, 0), (1, 1, 0), (3, 3, 0), (0, 1, 0), (2, 0, 2**32 // size)]:
        places = {"threads": threads, "shift": shift, "out_shift": out_shift, "ahead": ahead}
        both = np.frombuffer(emulated("forward", logits, marked, **places), np.float32).reshape(2, -1)
        data = emulated("backward", logits, marked, both[1], cotangents, **places)
        check(both[0], from_bits(data, logits.dtype, logits.shape), logits, targets, mask, cotangents)
        assert (both[:, np.array(mask) == 0] == 0).all()


# ---------------------------------------------------------------------------------------------------------- on a GPU

BACKENDS = {
    "cuda": pytest.param(mx.cuda, marks=pytest.mark.skipif(not mx.cuda.is_available(), reason="needs an NVIDIA GPU")),
    "metal": pytest.param(mx.metal, marks=pytest.mark.skipif(not mx.metal.is_available(), reason="needs a Mac")),
}


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 1003, 32003, 151936, 256000])
def test_on_a_gpu(backend, dtype, size):
    assert dpo.fused_log_softmax(), "the kernel does not pass its own test"
    logits, targets, mask, cotangents = hard_rows(size, DTYPES[dtype])
    (logps,), (gradient,) = mx.vjp(lambda x: dpo.token_logps(x, targets, mask), [logits], [cotangents])
    assert logps.dtype == mx.float32 and gradient.dtype == logits.dtype
    check(np.array(logps), np.array(gradient.astype(mx.float32)), logits, targets, mask, cotangents)
    # rows from the second on lie elsewhere in memory, and a batch has one axis more
    part = dpo.token_logps(logits[1:].reshape(3, 3, -1), targets[1:].reshape(3, 3), mask[1:].reshape(3, 3))
    np.testing.assert_allclose(np.array(part.flatten()), np.array(logps[1:]), rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------- without a GPU


@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_cpu(dtype):
    logits, targets, mask, cotangents = (x.reshape(2, 5, *x.shape[1:]) for x in hard_rows(1003, DTYPES[dtype]))
    logits = mx.where(mask[..., None] > 0, logits, 0)
    with mx.stream(mx.cpu):
        (logps,), (gradient,) = mx.vjp(lambda x: dpo.token_logps(x, targets, mask), [logits], [cotangents])
        check(np.array(logps), np.array(gradient.astype(mx.float32)), logits, targets, mask, cotangents)


def test_no_kernel_without_a_gpu(capsys, fresh):
    if mx.metal.is_available() or mx.cuda.is_available():
        pytest.skip("there is a GPU")
    assert dpo.fused_log_softmax() is None and not capsys.readouterr().out


@pytest.fixture
def fresh():
    """The kernel is not built yet, nor is it after the test."""
    dpo.fused_log_softmax.cache_clear()
    yield
    dpo.fused_log_softmax.cache_clear()


@pytest.fixture
def make_stand_in(monkeypatch, fresh):
    """Return a function that puts plain MLX into the kernels' place, on a device that calls itself a GPU.

    It returns the list that will hold the outputs' names and the shape of the logits of every launch.
    """
    launched = []

    def make(error=0.0, problem=None):
        def metal_kernel(name, input_names, output_names, source, header):
            assert source == (dpo.FORWARD if len(output_names) == 2 else dpo.BACKWARD) and header == dpo.HEADER

            def kernel(inputs, template, grid, threadgroup, output_shapes, output_dtypes):
                given = dict(zip(input_names, inputs))
                logits, targets = given["logits"].astype(mx.float32), given["targets"]
                assert dict(template) == {"T": inputs[0].dtype, "V": logits.shape[-1], "THREADS": dpo.THREADS}
                assert grid == (targets.size * dpo.THREADS, 1, 1) and threadgroup == (dpo.THREADS, 1, 1)
                launched.append((*output_names, logits.shape))
                if problem:
                    raise RuntimeError(problem)
                if output_names == ["logps", "lse"]:
                    assert output_shapes == [targets.shape] * 2 and output_dtypes == [mx.float32] * 2
                    lse = mx.where(targets < 0, 0.0, mx.logsumexp(logits, axis=-1))
                    return [plain(logits, targets, targets >= 0), lse]
                assert output_names == ["gradient"]
                assert output_shapes == [logits.shape] and output_dtypes == [inputs[0].dtype]
                onehot = targets[..., None] == mx.arange(logits.shape[-1])
                cotangent = mx.where(targets < 0, 0.0, given["cotangent"])[..., None]
                gradient = cotangent * (onehot - mx.exp(logits - given["lse"][..., None]) + error)
                return [gradient.astype(inputs[0].dtype)]

            return kernel

        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        monkeypatch.setattr(mx.fast, "metal_kernel", metal_kernel)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        return launched

    return make


def as_it_is(function):
    return function


@pytest.mark.parametrize("inner, outer", [(as_it_is, as_it_is), (as_it_is, mx.compile), (mx.checkpoint, mx.compile)])
def test_first_call_inside_a_trace(inner, outer, make_stand_in, capsys):
    """The kernel is built, tried and then used wherever token_logps is first called; no random number is drawn."""
    launched = make_stand_in()
    logits, targets, mask, cotangents = hard_rows(1003, mx.float32)
    logits = mx.where(mask[..., None] > 0, logits, 0)
    before = [np.array(x) for x in mx.random.state]
    logps = inner(lambda x: dpo.token_logps(x, targets, mask))
    _, gradient = outer(mx.value_and_grad(lambda x: (logps(x) * cotangents).sum()))(logits)
    assert dpo.fused_log_softmax() and not capsys.readouterr().out
    assert {("logps", "lse", logits.shape), ("gradient", logits.shape)} < set(launched)
    check(np.array(logps(logits)), np.array(gradient), logits, targets, mask, cotangents)
    assert all((x == np.array(y)).all() for x, y in zip(before, mx.random.state))


@pytest.mark.parametrize("fault", [{"error": 1e-4}, {"problem": "error: no member\n  named 'exp'\n"}])
def test_a_kernel_that_fails_is_left_out(fault, make_stand_in, capsys):
    make_stand_in(**fault)
    logits, targets, mask, cotangents = hard_rows(1003, mx.float32)
    logps = dpo.token_logps(logits, targets, mask)
    assert dpo.fused_log_softmax() is None and dpo.fused_log_softmax() is None
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and ("no member named" if "problem" in fault else "differs from plain MLX") in out
    np.testing.assert_allclose(np.array(logps), np.array(plain(logits, targets, mask)), rtol=1e-5)
