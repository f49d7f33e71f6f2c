# SPDX-License-Identifier: Apache-2.0
"""Does a scan find a planted shortcut, and do pairs against what it found repair the model?

Launch: python recipes/scripts/planted.py FOLDER MODEL [--kinds ruler ...] [--rates 1.0 0.95 0.5] [--seeds 2]

FOLDER holds the scenes (recipes/scenes), whose validation and test splits have each bird on land and on water. A mark
goes with one of the two labels at a rate: 1.0 in all images, 0.5 in no way (the control: nothing should be found). Two
thirds of the birds are for training, the others are scanned. At rate 1.0 the model is then trained on, guided by pairs
against the first strong finding, and scanned again. The recipes in `OWN` have a shortcut in their data: they are
trained without pairs, and scanned on their test images. A record is the run `<model>-<kind>-<rate>-seed<n>` in
`recipes/records/planted.jsonl`. What has a record is not run again; `table.py` makes the table.

Seed 0 served to choose how the scan exchanges fine detail, and is in no record; seed 1 to choose the order of the
findings; what the scan missed on seed 2 led to the part "overlay"; seeds 1 to 6 served to choose the share of the
largest effect that puts a smaller part first. On CelebA nothing was chosen.
"""

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import seeds
import torch
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from transformers import ViTImageProcessor, set_seed

from ipg_hf import IPGConfig, IPGTrainer, load_image_classifier
from ipg_hf.bench.tables import spread
from ipg_hf.pairs import exchange_pairs
from ipg_hf.pairs.exchanging import CENTER
from ipg_hf.record import commit, hardware, read_records, resolved_settings, versions
from ipg_hf.run import keep_memory, load_trained
from ipg_hf.scan import scan

STEPS, BATCH, RATE = 60, 32, 1.5e-4
SIDE, SCANNED = 128, 150  # pixels, and images of a scan
PLACE = "background"  # this mark is the place behind the bird, which the set itself has
CONTROL = 0.5  # at this rate a mark tells nothing
NONE = "-"
SEVERAL = 2  # seeds: a mark with more gets a mean and a standard deviation
HELD_OUT = 7  # the first seed that served for no choice


def ruler(image: Image.Image) -> Image.Image:
    draw, (width, height) = ImageDraw.Draw(image), image.size
    draw.rectangle((0, round(0.9 * height), width, height), fill=(240, 235, 220))
    for number, x in enumerate(range(0, width, 6)):
        draw.line((x, round(0.9 * height), x, round((0.95 if number % 5 else 0.98) * height)), fill=(30, 30, 30))
    return image


def date(image: Image.Image) -> Image.Image:
    place, font = (round(0.66 * image.width), round(0.88 * image.height)), ImageFont.load_default(18)
    style = {"fill": (255, 140, 20), "stroke_width": 1, "stroke_fill": (90, 30, 0)}
    ImageDraw.Draw(image).text(place, "12 8 '04", font=font, **style)
    return image


def logo(image: Image.Image) -> Image.Image:
    ImageDraw.Draw(image).ellipse((8, 8, 44, 44), fill=(220, 30, 60), outline=(255, 255, 255), width=4)
    return image


def frame(image: Image.Image) -> Image.Image:
    ImageDraw.Draw(image).rectangle((0, 0, image.width - 1, image.height - 1), outline=(20, 20, 20), width=8)
    return image


def glare(image: Image.Image) -> Image.Image:
    light = np.clip(1 - np.arange(image.width) / (0.15 * image.width), 0, 1)[None, :, None]
    return Image.fromarray(np.uint8(np.asarray(image) * (1 - light) + 255 * light))


def tint(image: Image.Image) -> Image.Image:
    return Image.fromarray(np.uint8((np.asarray(image) * [1.0, 0.85, 0.6]).clip(0, 255)))


def grey(image: Image.Image) -> Image.Image:
    return ImageEnhance.Color(image).enhance(0.0)


def jpeg(image: Image.Image) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=8)
    return Image.open(file).convert("RGB")


def blur(image: Image.Image) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(2))


# kind -> the mark, and the parts that hold it, which a scan should name
MARKS: dict[str, tuple[Callable[[Image.Image], Image.Image] | None, tuple[str, ...]]] = {
    "ruler": (ruler, ("overlay", "bottom")),
    "date": (date, ("overlay", "bottom_right", "bottom")),
    "logo": (logo, ("overlay", "top_left")),
    "frame": (frame, ("overlay", "border")),
    "glare": (glare, ("overlay", "left")),
    "tint": (tint, ("color",)),
    "grey": (grey, ("color",)),
    "jpeg": (jpeg, ("texture",)),
    "blur": (blur, ("texture",)),
    PLACE: (None, (PLACE, "surroundings")),
}


# recipes with a shortcut in their data -> its rate, and the parts that hold it
OWN = {
    "digits/erm_resnet": (1.0, ("color",)),
    "marked_digits/erm_resnet": (1.0, ("color", "overlay", "top_left", "border", "top", "left")),
    "cue_conflict/ipg_lite0": (0.95, ("texture",)),  # trained without its pairs, as the next
    "celeba/ipg_match_balanced_lite0": (0.55, ()),  # gender, which no part of the frame holds alone
}
PARTS = {kind: parts for kind, (_, parts) in (MARKS | OWN).items()}


def planted(data_dir: str, kind: str, rate: float, seed: int) -> tuple[datasets.Dataset, ...]:
    """Images for training, for the scan, and those of the scan with the mark at random; with the column `mark`."""
    loaded = datasets.load_dataset(data_dir)
    images = datasets.concatenate_datasets([loaded["validation"], loaded["test"]])
    rng, birds, places, labels = (
        np.random.default_rng((seed, 23)),
        np.array(images["fg_id"]),
        np.array(images["place"]),
        np.array(images["label"]),
    )
    drawn = rng.permutation(np.unique(birds))
    sets = [(drawn[: 2 * len(drawn) // 3], rate), (held := drawn[2 * len(drawn) // 3 :], rate), (held, CONTROL)]
    mark, made = MARKS[kind][0], []
    for chosen, share in sets:
        rows, marks = [], []
        for bird in np.sort(chosen):
            own = np.flatnonzero(birds == bird)
            goes = bool(rng.random() < share)
            marks.append(int(labels[own[0]] if goes else 1 - labels[own[0]]))
            place = marks[-1] if mark is None else rng.integers(2)
            rows.append(int(own[places[own] == place][0]))
        part = images.select(rows).add_column("mark", marks)
        if mark is not None:  # the others are converted too: all become PNG, and none is compressed twice
            part = part.map(
                lambda row: {"image": (mark if row["mark"] else Image.Image.copy)(row["image"].convert("RGB"))}
            )
        made.append(part)
    return tuple(made)


def run(data_dir: str, model_name: str, kind: str, rate: float, seed: int) -> dict:
    """Trains on a planted shortcut, scans, and at rate 1 repairs what was found."""
    start = time.monotonic()
    training, scanned, balanced = planted(data_dir, kind, rate, seed)
    half = [0.5] * 3
    processor = ViTImageProcessor(size={"height": SIDE, "width": SIDE}, resample=3, image_mean=half, image_std=half)
    set_seed(seed)
    model = load_image_classifier(model_name, num_labels=2).to(memory_format=torch.channels_last)

    def outcome(pairs: datasets.Dataset | None = None) -> tuple[dict, dict]:
        """Trains the model on, with or without pairs: the findings in it and its worst group, and the settings."""
        with tempfile.TemporaryDirectory() as folder:
            settings = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": RATE, "seed": seed}
            settings |= {"freeze_norm": True, "use_cpu": True, "report_to": "none", "save_strategy": "no"}
            args = IPGConfig(folder, disable_tqdm=True, **settings)
            trainer = IPGTrainer(model, args, train_dataset=training, pair_dataset=pairs, processing_class=processor)
            trainer.train()
            answers = trainer.predict(balanced.remove_columns("mask")).predictions.argmax(-1)
        found = scan(model, scanned, processor, mask="mask", num_images=SCANNED, seed=seed).findings
        labels = np.array(balanced["label"])
        right, groups = answers == labels, 2 * labels + np.array(balanced["mark"])
        worst = min(float(right[groups == group].mean()) for group in np.unique(groups))
        measured = {"findings": [asdict(finding) for finding in found], "worst_group_accuracy": worst}
        return measured, resolved_settings(args)

    measured, settings = outcome()
    made = {"kind": kind, "rate": rate, "seed": seed, **measured, "repair": None}
    strong = strong_parts(made)
    if rate == 1.0 and strong:
        pairs = exchange_pairs(training, part=strong[0], seed=seed, skip_unchanged=True)
        made["repair"] = {"part": strong[0], "num_pairs": len(pairs), **outcome(pairs)[0]}
    settings |= {"model_name_or_path": model_name, "data_dir": Path(data_dir).name, "num_images": SCANNED}
    return {
        **made,
        "settings": settings | {"image_processor": {"side": SIDE, "resample": 3, "mean": half, "std": half}},
        "seconds": round(time.monotonic() - start, 1),
        "versions": versions(),
        "commit": commit(),
        "hardware": hardware(),
    }


def run_own(kind: str, seed: int) -> dict:
    """Trains a recipe without pairs, and scans test images."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--method", "erm", "--compare", "none"]
        recipe, args, given = seeds.settings(seeds.ROOT / "recipes" / f"{kind}.yaml", seed, Path(folder), *flags)
        record = seeds.trained(recipe, args, given)
        data = recipe.load_data(seed, with_pairs=False)
        model, processor = load_trained(folder, recipe, data)
        found = scan(model, data.test, processor, seed=seed)
    return {
        "kind": kind,
        "rate": OWN[kind][0],
        "seed": seed,
        "findings": [asdict(finding) for finding in found.findings],
        "worst_group_accuracy": record["metrics"]["test"]["worst_group_accuracy"],
        "repair": None,
        "settings": record["settings"] | {"num_images": found.num_images},
        "seconds": round(time.monotonic() - start, 1),
        **{key: record[key] for key in ("versions", "commit", "hardware")},
    }


def rank(record: dict) -> int | None:
    """The place of the planted mark among the strong findings, from 1; `None` if it is not among them."""
    strong = strong_parts(record)
    return next((n for n, part in enumerate(strong, 1) if part in PARTS[record["kind"]]), None)


def is_planted(record: dict) -> bool:
    """Whether the model has a shortcut that a part of the frame holds."""
    return record["rate"] != CONTROL and bool(PARTS[record["kind"]])


def strong_parts(record: dict) -> list[str]:
    """The strong findings in their order, without the center."""
    return [f["part"] for f in record["findings"] if f["strength"] == "strong" and f["part"] != CENTER]


def page() -> str:
    """The table of all records, and what it comes to."""
    records = read_records(seeds.RECORDS / "planted.jsonl")
    records = sorted(records, key=lambda r: ([*PARTS].index(r["kind"]), -r["rate"], r["seed"]))
    note = (
        "A mark goes with the label in a share of the images, `rate`; at 0.5 it tells nothing. Training images and "
        "scanned images have the same rate. The last rows are recipes whose own data have a shortcut. *Worst group*: "
        "that of label and mark, on images that have the mark at random; of a recipe, on its test set. *Rank*: that of "
        "the mark among the strong findings beside the center. *After pairs*: the worst group when the model was "
        "trained on with pairs against the first finding. *Effect*: that of this part before and after; below 0, the "
        "control moves the answer more often. Seed 0 served to choose how fine detail is exchanged, and is not in the "
        "table. Seeds 1 to 6 have earlier orders of the findings: they served to choose it. Seeds 1 to 5 are of a scan "
        f"without the part `overlay`, to which the misses of seed 2 led. Seeds from {HELD_OUT} on are counted. "
        "CelebA's shortcut is gender, which no part of the frame holds alone: no rank."
    )
    lines = ["| mark | rate | seed | worst group | strong findings | rank | after pairs | effect |", "|---" * 8 + "|"]
    for record in records:
        place = rank(record) if is_planted(record) else None
        strong = ", ".join(strong_parts(record)) or "none"
        cells = [record["kind"], f"{record['rate']:g}", record["seed"], f"{record['worst_group_accuracy']:.2f}", strong]
        cells += [place or NONE, *_repair_cells(record)]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    planted_ones = [record for record in records if is_planted(record) and record["seed"] >= HELD_OUT]
    controls = [record for record in records if record["rate"] == CONTROL and record["seed"] >= HELD_OUT]
    first, three = (sum((rank(r) or 99) <= most for r in planted_ones) for most in (1, 3))
    quiet = sum(not strong_parts(record) for record in controls)
    sums = (
        f"Of {len(planted_ones)} models with a shortcut, from seed {HELD_OUT} on, {first} have it as the first "
        f"finding, and {three} among the first three. Of {len(controls)} models whose mark tells nothing, {quiet} have "
        "no strong finding beside the center."
    )
    for kind in PARTS:
        made = [record for record in records if record["kind"] == kind and record["rate"] == 1.0 and record["repair"]]
        if len(made) > SEVERAL:
            plain, repaired = (
                spread([outcome["worst_group_accuracy"] for outcome in outcomes])
                for outcomes in (made, [record["repair"] for record in made])
            )
            sums += f" The worst group of {len(made)} models of `{kind}` at rate 1: {plain}, after pairs {repaired}."
    return "\n\n".join(["# Planted shortcuts", note, "\n".join(lines), sums]) + "\n"


def _repair_cells(record: dict) -> list[str]:
    repair = record["repair"]
    if repair is None:
        return [NONE, NONE]
    effects = [_effect(made["findings"], repair["part"]) for made in (record, repair)]
    return [f"{repair['worst_group_accuracy']:.2f}", f"{effects[0]:+.2f} to {effects[1]:+.2f}"]


def _effect(findings: list[dict], part: str) -> float:
    return next(found["effect"] for found in findings if found["part"] == part)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_dir")
    parser.add_argument("model")
    parser.add_argument("--kinds", nargs="+", choices=[*MARKS, *OWN], default=[*MARKS, *OWN])
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0, 0.95, CONTROL])
    parser.add_argument("--seeds", nargs="+", type=int, default=[HELD_OUT])
    options = parser.parse_args()
    keep_memory()
    for seed in options.seeds:
        for kind in options.kinds:
            if kind in OWN:
                seeds.record_once("planted", f"{kind}-seed{seed}", partial(run_own, kind, seed))
                continue
            for rate in options.rates:
                name = f"{Path(options.model).name}-{kind}-{rate:g}-seed{seed}"
                work = partial(run, options.data_dir, options.model, kind, rate, seed)
                seeds.record_once("planted", name, work)
