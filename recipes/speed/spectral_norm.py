# SPDX-License-Identifier: Apache-2.0
"""Times `ipg_hf.guidance.rationale_distance` against `torch.linalg.matrix_norm`, which takes the whole SVD.

Launch: python recipes/speed/spectral_norm.py
Expected: for 1000 classes and 2048 features in float32, forward and backward, a ratio of at least 5; the exit status is
1 below it. The pair reduction is printed beside it, at that size and at that of a small two-class network.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout runs without being installed
from ipg_hf.guidance import Reduction, rationale_distance

MINIMUM_RATIO = 5.0


def problem(classes: int, features: int, pairs: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((classes, features), (pairs, features), (pairs, features))
    weight, z_a, z_b = (torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes)
    return weight, z_a, z_b


def ours(tensors: tuple[torch.Tensor, ...], reduction: Reduction) -> Callable[[], None]:
    return lambda: torch.autograd.grad(rationale_distance(*tensors, reduction=reduction), tensors)


def whole_svd(tensors: tuple[torch.Tensor, ...]) -> Callable[[], None]:
    weight, z_a, z_b = tensors
    return lambda: torch.autograd.grad(torch.linalg.matrix_norm(weight * (z_a - z_b).mean(0), ord=2), tensors)


def medians(calls: list[Callable[[], None]], repeats: int, device: str) -> list[float]:
    """Median seconds of each call. They take turns, so that a busy moment of the machine falls on all of them."""
    seconds: list[list[float]] = [[] for _ in calls]
    for repeat in range(repeats + 1):
        for call, of_call in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            call()
            if device != "cpu":
                torch.accelerator.synchronize()
            if repeat:  # the first round warms up
                of_call.append(time.perf_counter() - start)
    return [statistics.median(of_call) for of_call in seconds]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="timed rounds, of which the median counts")
    parser.add_argument("--device", default="cpu", help="torch device")
    args = parser.parse_args()

    large = problem(1000, 2048, 16, args.device)
    svd_seconds, our_seconds = medians([whole_svd(large), ours(large, "mean")], args.repeats, args.device)
    ratio = svd_seconds / our_seconds
    print(f"torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads, median of {args.repeats}")
    print(f"mean C=1000 D=2048 P=16: matrix_norm {svd_seconds:.4f} s, ours {our_seconds:.4f} s, ratio {ratio:.1f}")
    for classes, features, pairs in ((1000, 2048, 16), (2, 390, 300)):
        tensors = problem(classes, features, pairs, args.device)
        (seconds,) = medians([ours(tensors, "pair")], args.repeats, args.device)
        print(f"pair C={classes} D={features} P={pairs}: ours {seconds:.4f} s")
    if ratio < MINIMUM_RATIO:
        print(f"the ratio is below {MINIMUM_RATIO:g}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
