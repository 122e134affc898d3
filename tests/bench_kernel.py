"""
Measure token_logps's kernel on a GPU beside mx.fast.cross_entropy and plain MLX, all with bfloat16 logits.

    python tests/bench_kernel.py                             five vocabularies and batches
    python tests/bench_kernel.py --threads 256,512,1024      threads a row

Prints a line a function: milliseconds of the forward, and of the forward and backward; how many times faster than
mx.fast.cross_entropy; the bandwidth they reach, of that of x + 1 on the logits, where each live row is read once a pass
and every gradient written once; peak GB with the logits; the largest errors against plain MLX.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo_trainer as dpo

SHAPES = [  # vocabulary, rows, tokens a row, the share of them that is not masked
    (128256, 8, 256, 1.0),
    (128256, 8, 256, 0.6),
    (151936, 8, 512, 0.7),
    (32003, 8, 512, 0.7),
    (256000, 4, 512, 0.6),
]


def fast(logits, targets, mask):
    return mx.where(mask > 0, -mx.fast.cross_entropy(logits, targets), 0.0)


def plain(logits, targets, mask):
    logits = logits.astype(mx.float32)
    logps = mx.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] - mx.logsumexp(logits, axis=-1)
    return mx.where(mask > 0, logps, 0.0)


def kernel(threads):
    def run(*inputs):
        dpo.THREADS = threads
        return dpo.token_logps(*inputs)

    return run


def seconds(function, repeat):
    """Return the seconds of one of repeat calls that the GPU gets at once."""
    mx.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        mx.async_eval(function())
    mx.synchronize()
    return (time.perf_counter() - start) / repeat


def measure(shape, functions, rounds, repeat):
    """Yield a row of the table for each of the functions, by name; they take turns in every round."""
    size, rows, tokens, share = shape
    mx.random.seed(0)
    logits = (3 * mx.random.normal((rows, tokens, size), dtype=mx.bfloat16)).astype(mx.bfloat16)
    targets = mx.random.randint(0, size, (rows, tokens))
    mask = mx.broadcast_to(mx.arange(tokens) < round(share * tokens), (rows, tokens)).astype(mx.float32)
    weights = mx.random.normal((rows, 1))
    mx.eval(logits, targets, mask, weights)

    def forward(f):
        return lambda: f(logits, targets, mask)

    def both(f):
        return lambda: mx.grad(lambda x: (f(x, targets, mask) * weights).sum())(logits)

    runs = {"copy": lambda: logits + 1}
    for name, f in functions.items():
        runs |= {(name, "forward"): forward(f), (name, "both"): both(f)}
    peaks = {}
    for name, run in runs.items():
        mx.eval(run())  # compiles
        mx.clear_cache()
        mx.reset_peak_memory()
        mx.eval(run())
        peaks[name] = mx.get_peak_memory() / 1e9
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run, repeat))
    times = {name: statistics.median(found) for name, found in times.items()}

    known = [forward(plain)(), both(plain)().astype(mx.float32)]
    live, copy = round(share * tokens) / tokens, 2 / times["copy"]  # in units of the logits' bytes
    for name, f in functions.items():
        first, second = times[name, "forward"], times[name, "both"]
        found = [forward(f)(), both(f)().astype(mx.float32)]
        errors = [abs(a - b).max().item() for a, b in zip(found, known)]
        ratios = [times["mx.fast", part] / times[name, part] for part in ("forward", "both")]
        shares = [live / first / copy, (2 * live + 1) / second / copy]
        yield [
            f"{size} x {rows * tokens} x {share}", name, f"{1e3 * first:.3f}", f"{1e3 * second:.3f}",
            *(f"{ratio:.2f}" for ratio in ratios), *(f"{share:.0%}" for share in shares),
            f"{peaks[name, 'both']:.2f}", *(f"{error:.0e}" for error in errors),
        ]  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--threads", default=str(dpo.THREADS), help="threads a row, with commas between them")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--repeat", type=int, default=5, help="calls a round of each function")
    args = parser.parse_args()
    if mx.default_device() == mx.Device(mx.cpu):
        return print("There is no GPU here, and without one no kernel to measure.")
    if not dpo.fused_log_softmax():
        sys.exit("The kernel does not work here.")
    device = mx.device_info()["device_name"]
    functions = {f"kernel, {n} threads": kernel(int(n)) for n in args.threads.split(",")}
    functions |= {"mx.fast": fast, "plain": plain}
    heads = ["vocabulary x tokens x live", "function", "fwd ms", "both ms", "fwd faster", "both faster"]
    heads += ["fwd of copy", "both of copy", "both GB", "error", "gradient error"]
    widths = [28, 22, 9, 9, 12, 13, 13, 14, 9, 8, 0]
    print(f"{device}, mlx {mx.__version__}, median of {args.rounds} rounds")
    print("".join(f"{head:<{width}}" for head, width in zip(heads, widths)))
    for shape in SHAPES:
        try:
            for row in measure(shape, functions, args.rounds, args.repeat):
                print("".join(f"{value:<{width}}" for value, width in zip(row, widths)), flush=True)
        except RuntimeError as error:  # out of memory in one shape must not hide the others
            print(f"{shape}: {str(error)[:200]}")
        mx.clear_cache()


if __name__ == "__main__":
    main()
