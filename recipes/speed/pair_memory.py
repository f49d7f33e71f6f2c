# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the corrective gradient for 32, 128 and 512 pairs, all at once and in chunks; and of whole steps of
`IPGTrainer`, against those of `Trainer` on the same images.

    python recipes/speed/pair_memory.py [--chunk 16] [--write]

Each figure is a process of its own: on a GPU `torch.cuda.max_memory_allocated`, else the growth of the largest resident
set, which counts whole pages. `--write` keeps the record beside this file.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

PAIRS = (32, 128, 512)
# case of step.py -> images a step; pairs a step and pairs at a time: none, as many images as are trained on, and many
STEP_IMAGES, STEP_PAIRS = 32, ((0, 0), (16, 0), (16, 4), (64, 0), (64, 4))
STEP_MODELS = ("vit_tiny_hf", "resnet18_hf", "dinov2_small", "dinov2_small_bf16", "dinov2_small_lora")


def measure(pairs, chunk):
    import torch
    from step import Images
    from transformers import ViTConfig, ViTForImageClassification

    from ipg_hf import IPGConfig, IPGTrainer
    from ipg_hf.step import GuidedStep

    torch.set_num_threads(1)
    torch.manual_seed(0)
    settings = {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 768}
    model = ViTForImageClassification(ViTConfig(**settings, image_size=96, num_labels=2))
    with tempfile.TemporaryDirectory() as folder:
        settings = {"invariance_distance": "rationale", "pair_loss_weight": 0.0, "report_to": "none"}
        args = IPGConfig(folder, pair_chunk_size=chunk or None, **settings)
        data = {"train_dataset": Images(96), "pair_dataset": Images(96, ("_a", "_b"))}
        step = GuidedStep(IPGTrainer(model, args, **data), {}, "single_label_classification")
    images = torch.randn(2 * pairs, 3, 96, 96, device=args.device)
    for parameter in model.parameters():  # gradients are there before and after
        parameter.grad = torch.zeros_like(parameter)
    step.pair_backward(model, {"pixel_values": images[:4]}, 1.0)
    before = peak(torch)
    step.pair_backward(model, {"pixel_values": images}, 1.0)
    print((peak(torch) - before) / 2**20)


def measure_step(case, pairs, chunk):
    import torch
    from step import data_of, trainer_of
    from transformers import TrainerCallback

    class Start(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            self.before = peak(torch)

    torch.set_num_threads(1)
    start = Start()
    sizes = {"per_device_train_batch_size": STEP_IMAGES, "per_device_pair_batch_size": pairs or 1}
    with tempfile.TemporaryDirectory() as folder:
        settings = {**sizes, "pair_chunk_size": chunk or None, "max_steps": 2}
        trainer_of(case, "ipg" if pairs else "erm", folder, *data_of(case), start, **settings).train()
    print((peak(torch) - start.before) / 2**20)


def peak(torch):
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(*job):
    # freed memory goes back to the system, or the largest resident set would count it
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--one", *map(str, job)]
    return float(subprocess.check_output(command, env=environment, text=True).split()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunk", type=int, default=16, help="pairs at a time")
    parser.add_argument("--write", action="store_true", help="keep the record")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        *case, pairs, chunk = options.one
        (measure_step if case else measure)(*case, int(pairs), int(chunk))
        return
    from ipg_hf.record import commit, hardware, versions, write_json

    rows, steps = {}, {}
    print(f"{'pairs':>6} {'all at once':>14} {f'{options.chunk} at a time':>16}   (MiB above the start)")
    for pairs in PAIRS:
        found = [in_a_process(pairs, chunk) for chunk in (0, options.chunk)]
        rows[str(pairs)] = {"whole": round(found[0], 1), "chunked": round(found[1], 1)}
        print(f"{pairs:>6} {found[0]:>14.0f} {found[1]:>16.0f}")
    print(f"whole steps on {STEP_IMAGES} images (MiB above the start of training, and to plain training)")
    for case in STEP_MODELS:
        steps[case] = []
        for pairs, chunk in STEP_PAIRS:
            mebibytes = in_a_process(case, pairs, chunk)
            plain = steps[case][0]["mebibytes"] if steps[case] else mebibytes
            row = {"pairs": pairs, "chunk": chunk or None, "mebibytes": round(mebibytes, 1)}
            steps[case].append(row | {"to_plain": round(mebibytes / plain, 3)})
            print(case, steps[case][-1], flush=True)
    if options.write:
        record = {
            "chunk_size": options.chunk,
            "mebibytes": rows,
            "step_images": STEP_IMAGES,
            "steps": steps,
            "versions": versions(),
            "commit": commit(),
            "hardware": hardware(),
        }
        write_json(Path(__file__).with_suffix(".json"), record)
        print(json.dumps(record["hardware"]))


if __name__ == "__main__":
    main()
