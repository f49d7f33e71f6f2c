# SPDX-License-Identifier: Apache-2.0
"""What both gradients of a step cost with pairs in the batch, against drawn pairs and against plain training.

    python recipes/bench/in_batch.py [--rounds 15] [--write]

B images and P = B pairs. Arms: `plain`, a step on B images; `drawn`, the pairs beside them (`pair_source="pairs"`);
`batch`, side a being the batch, with a forward of its own for side b (`pair_source="batch"`); `one forward` of both
sides, which the library does not do: the task's backward goes through side b too. Of each the least CPU time of the
rounds, on one thread, in units of the plain step. `--write` keeps the record beside this file.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

from ipg_hf import find_head, report
from ipg_hf.guidance import rationale_distance

SIZE, BATCH = 64, 16
VIT = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 3, "intermediate_size": 768, "patch_size": 8}
RESNET = {"embedding_size": 16, "hidden_sizes": [32, 64, 128, 256], "depths": [1, 1, 1, 1], "layer_type": "basic"}
MODELS = {
    "vit": lambda: ViTForImageClassification(ViTConfig(**VIT, image_size=SIZE, num_labels=2)),
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(**RESNET, num_labels=2)),
}


def arms_of(model):
    head, parameters = find_head(model), list(model.parameters())
    a, b = torch.randn(2, BATCH, 3, SIZE, SIZE)
    labels = torch.arange(BATCH) % 2

    def forward(*images):
        return head.run(model, {"pixel_values": torch.cat(images)})

    def corrective(z_a, z_b, keep):
        distance = rationale_distance(head.weight, z_a, z_b, reduction="pair")
        return torch.autograd.grad(distance, parameters, retain_graph=keep, allow_unused=True)

    def task(logits):
        F.cross_entropy(logits, labels).backward()

    def plain():
        task(forward(a)[0])

    def drawn():
        corrective(*forward(a, b)[1].chunk(2), keep=False)
        task(forward(a)[0])

    def batch():
        logits, z = forward(a)
        corrective(z, forward(b)[1], keep=True)
        task(logits)

    def one_forward():
        logits, z = forward(a, b)
        corrective(*z.chunk(2), keep=True)
        task(logits[:BATCH])

    return {"plain": plain, "drawn": drawn, "batch": batch, "one forward": one_forward}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of all arms in turn")
    parser.add_argument("--write", action="store_true", help="keep the record")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name, build in MODELS.items():
        torch.manual_seed(0)
        model = build().eval()  # running statistics: what freeze_norm gives
        arms, best = arms_of(model), {}
        for _ in range(options.rounds):
            for arm, step in arms.items():
                model.zero_grad()
                started = time.process_time()
                step()
                best[arm] = min(best.get(arm, float("inf")), time.process_time() - started)
        found[name] = {arm: round(seconds / best["plain"], 2) for arm, seconds in best.items()}
        print(name, found[name])
    if options.write:
        facts = {"versions": report.versions(), "commit": report.commit(), "hardware": report.hardware()}
        report.write_json(Path(__file__).with_suffix(".json"), {"plain_steps": found, **facts})


if __name__ == "__main__":
    main()
