# SPDX-License-Identifier: Apache-2.0
"""Renders the measured tables of README.md beside this file from the records.

python recipes/speed/page.py [--write]
"""

import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def lines_of(titles, rows):
    return "\n".join([f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *(f"| {' | '.join(r)} |" for r in rows)])


def of_ratio(found):
    """Median ratio, and the quartiles of the rounds' ratios."""
    low, _, high = found["quartiles"]
    return f"{found['ratio']:.2f} ({low:.2f} to {high:.2f})"


def step(record):
    """One row a case; the processor's time where there is one, else the time that passed."""
    titles = ("case", "B", "P", "seconds a step (ERM, IPG)", "IPG / bound", "IPG / bound by ERM's speed")
    titles += ("IPG / ERM", "IPG / outputs", "wall: IPG / bound", "load", "rounds")
    rows = []
    for case, row in record.items():
        if row == "not run":
            rows.append([f"`{case}`", *["not run"] * (len(titles) - 1)])
            continue
        kind = row.get("cpu", row["wall"])
        seconds = ", ".join(f"{kind['seconds'][arm][1]:.3g}" for arm in ("erm", "ipg"))
        ratios = [of_ratio(kind[name]) for name in ("to_bound", "to_scaled_erm", "to_erm")]
        ratios.append(of_ratio(kind["to_outputs"]) if "to_outputs" in kind else "-")
        sizes = [str(row[name]) for name in ("images", "pairs")]
        rest = [of_ratio(row["wall"]["to_bound"]), f"{row['load'][1]:.1f}", str(row["rounds"])]
        rows.append([f"`{case}`", *sizes, seconds, *ratios, *rest])
    return lines_of(titles, rows)


def pair_memory(record):
    """Peaks of whole steps."""
    titles = ("model", "images", "pairs", "pairs at a time", "peak, MiB above the start", "to ERM on the same images")
    rows = []
    for case, found in record["steps"].items():
        for row in found:
            chunk = row["chunk"] or ("all" if row["pairs"] else "-")
            figures = [f"{row['mebibytes']:.0f}", f"{row['to_plain']:.2f}"]
            rows.append([f"`{case}`", str(record["step_images"]), str(row["pairs"] or "ERM"), str(chunk), *figures])
    return lines_of(titles, rows)


def processes(record):
    """Steps on two processes to one; the messages of the gradients."""
    arms = [f"{arm}, two processes to one" for arm in ("erm", "ipg")]
    titles = ("case", "ERM, wall", "IPG, wall", "ERM, processor", "IPG, processor")
    rows = [
        [f"`{case}`", *(of_ratio(found[kind][arm]) for kind in ("wall", "cpu") for arm in arms)]
        for case, found in record["steps"].items()
    ]
    first = lines_of(titles, rows)
    titles = ("gradients of", "tensors", "MB", "a message a tensor, ms", "in buckets, ms", "buckets / tensors")
    rows = []
    for case, found in record["messages"].items():
        times = [f"{1e3 * found['seconds'][way][1]:.1f}" for way in ("one_a_parameter", "buckets")]
        compared = of_ratio(found["buckets to one_a_parameter"])
        rows.append([f"`{case}`", str(found["tensors"]), f"{found['bytes'] / 1e6:.1f}", *times, compared])
    note = f"{record['rounds']} rounds of the steps; load {record['load'][1]:.1f} (median)."
    return f"{first}\n\n{lines_of(titles, rows)}\n\n{note}"


def pair_check(record):
    """Seconds of the linter, by the format of the images."""
    rows = [
        [kind, f"{record['pairs']:,}", str(record["pixels"]), f"{found['seconds']:.0f}", f"{found['cpu_seconds']:.0f}"]
        for kind, found in record["kinds"].items()
    ]
    return lines_of(("images", "pairs", "pixels", "seconds", "processor's seconds"), rows)


def scan_time(record):
    """Seconds of a scan, by network."""
    rows = [
        [f"`{name}`", f"{found['images']:,}", str(found["pixels"]), str(found["parts"]), f"{found['seconds']:.0f}",
         f"{found['cpu_seconds']:.0f}", f"{found['load']:.1f}"]
        for name, found in record.items()
    ]  # fmt: skip
    return lines_of(("network", "images", "pixels", "parts", "seconds", "processor's seconds", "load"), rows)


def pair_wait(record):
    """Shares of the steps' time, in percent."""
    arms = list(next(iter(record.values()))["share"])
    rows = []
    for case, found in record.items():
        if found == "not run":
            rows.append([f"`{case}`", *["not run"] * (len(arms) + 1)])
            continue
        shares = [f"{100 * found['share'][arm]:.1f} %" if arm in found["share"] else "-" for arm in arms]
        rows.append([f"`{case}`", *shares, f"{found['load_average_of_5_minutes']:.1f}"])
    return lines_of(["case", *arms, "load"], rows)


def scale(record):
    """What many pairs cost at the start and later."""
    titles = ("pairs", "to the end of step 1, s", "step 2, s", "first batch at a later step, s", "peak memory, MiB")
    rows = [
        [count, *(f"{row[name]:.1f}" for name in ("first_step", "second_step", "resumed")), f"+ {row['mebibytes']}"]
        for count, row in record["rows"].items()
    ]
    return lines_of(titles, rows)


def kept_memory(record):
    """The processor's seconds of a step, and their ratio."""
    rows = [
        [f"`{case}`", *(f"{found[arm][1]:.3g}" for arm in ("kept", "given back")), of_ratio(found)]
        for case, found in record["cases"].items()
    ]
    return lines_of(("case", "kept, seconds a step", "given back", "kept / given back"), rows)


def whole(record):
    """Whole trainings and commands, `ipg` and plain."""
    titles = (
        "case",
        "seconds to the first step (plain, ipg)",
        "to the exit",
        "exit: ipg / plain",
        "processor: ipg / plain",
    )
    rows = []
    for case, row in record.items():
        plain, ours = (row["seconds"][arm] for arm in ("plain", "ipg"))
        first = f"{plain['first_step']:.3g}, {ours['first_step']:.3g}" if "first_step" in plain else "-"
        ratios = []
        for name in ("wall", "cpu"):
            rounds = row["ratio"][name]
            ratios.append(f"{ours[name] / plain[name]:.2f} ({rounds[0]:.2f} to {rounds[-1]:.2f})")
        rows.append([f"`{case}`", first, f"{plain['wall']:.3g}, {ours['wall']:.3g}", *ratios])
    return lines_of(titles, rows)


def threads(record):
    """Seconds of a training by the spinning of waiting threads."""
    arms = {"ipg": "`GOMP_SPINCOUNT=10000`", "default": "default", "one thread": "one thread"}
    rows = []
    for case, found in record.items():
        if not case.startswith("beside"):
            continue
        name = "idle" if case == "beside 0 busy" else f"{case} processes"
        seconds = [" and ".join(f"{value:.0f}" for value in sorted(found["seconds"][arm])) for arm in arms]
        rows.append([name, *seconds, *(f"{found['to_default'][arm]:.2f}" for arm in ("ipg", "one thread"))])
    titles = ["machine", *(f"{title}, s" for title in arms.values()), "first / default", "one thread / default"]
    return lines_of(titles, rows)


def rendered(page):
    """The page with each table put anew between its marker `<!-- NAME of the record -->` and `<!-- end -->`."""
    for make in (step, pair_memory, processes, pair_wait, pair_check, scan_time, scale, kept_memory, whole, threads):
        name = make.__name__
        before, rest = page.split(f"<!-- {name}.json -->", 1)
        record = json.loads((FOLDER / f"{name}.json").read_text())
        page = f"{before}<!-- {name}.json -->\n{make(record)}\n<!-- end -->{rest.split('<!-- end -->', 1)[1]}"
    return page


if __name__ == "__main__":
    target = FOLDER / "README.md"
    page = rendered(target.read_text())
    if "--write" in sys.argv:
        target.write_text(page)
    else:
        print(page)
