# SPDX-License-Identifier: Apache-2.0
"""Suites: what is refused, what is drawn, how runs resume, and the statistics by hand."""

import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from small_suite import SUITE, TINY, TUNING, fake, records_of, write

from ipg_hf import run as runs
from ipg_hf.bench import figures as comparison_figures
from ipg_hf.bench import suite
from ipg_hf.bench.run import _start, execute
from ipg_hf.bench.suite import Tuning, draw_runs, draws, load_suite, seed_runs, suite_records
from ipg_hf.bench.tables import best_other, markdown, paired_difference, suite_rows, t_interval
from ipg_hf.cli import main
from ipg_hf.recipe import RecipeError, parse_settings
from ipg_hf.record import NOT_RECORDED, append_record, commit, read_records

# ---- What a suite may say


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metods": {}}, ["'metods'", "'methods'"]),
        ({"recipe": "nowhere.yaml"}, ["nowhere.yaml", "no such file"]),
        ({"seeds": [0, 0]}, ["seeds=[0, 0]", "different"]),
        ({"seeds": [-1]}, ["seeds=[-1]"]),
        ({"seeds": 3}, ["seeds=3", "list"]),
        ({"reference": "erms"}, ["reference", "'erms'", "'erm'"]),
        ({"reference": ["erm", "c"]}, ["reference", "'c'"]),
        ({"reference": 3}, ["reference=3", "list"]),
        ({"methods": {}}, ["methods is empty"]),
        ({"methods": {"erm": {"alhpa": 1}}}, ["methods: erm", "'alhpa'", "'alpha'"]),
        ({"methods": {"erm": {"alpha": "big"}}}, ["methods: erm", "alpha", "big"]),
        ({"methods": {"erm": {"alpha": -1}}}, ["methods: erm", "alpha=-1.0"]),
        ({"methods": {"erm": 3}}, ["methods: erm=3", "mapping"]),
        ({"methods": {"erm": {"seed": 1}}}, ["methods: erm", "'seed'", "leave it out"]),
        ({"methods": {"erm": {}, "a-b": {}}}, ["'a-b'", "letters"]),
        ({"methods": {"erm": {}, "all": {}}}, ["'all'"]),
        ({"settings": {"output_dir": "x"}}, ["settings", "'output_dir'"]),
        ({"settings": {"max_stepz": 3}}, ["'max_stepz'", "'max_steps'"]),
        ({"tuning": {"ranges": {}}}, ["draws is missing"]),
        ({"tuning": {**TUNING, "draws": 0}}, ["draws=0"]),
        ({"tuning": {**TUNING, "range": {}}}, ["'range'", "'ranges'"]),
        ({"tuning": {"draws": 2, "ranges": {"c": {"alpha": [1, 2]}}}}, ["ranges", "'c'"]),
        ({"tuning": {"draws": 2, "ranges": {"a": {"alpha": [1, 2]}}}}, ["methods: erm", "nothing to draw"]),
        ({"tuning": {"draws": 2, "ranges": {"all": {"alhpa": [1, 2]}}}}, ["'alhpa'", "'alpha'"]),
        ({"tuning": {"draws": 2, "ranges": {"all": {"alpha": [2, 1, "log"]}}}}, ["[2, 1, 'log']", "lower"]),
        ({"tuning": {"draws": 2, "ranges": {"all": {"alpha": [0, 1, "log"]}}}}, ["[0, 1, 'log']", "above 0"]),
        ({"tuning": {"draws": 2, "ranges": {"all": {"alpha": [1, 2, "lgo"]}}}}, ["[1, 2, 'lgo']", "log or linear"]),
        ({"tuning": {"draws": 1, "ranges": {"all": {"alpha": [1.0, -1.0]}}}}, ["alpha=-1.0"]),
        ({"tuning": {"draws": 2, "ranges": {"all": {"alpha": 3}}}}, ["alpha=3", "choices"]),
        ({"tuning": {"draws": 2, "ranges": {"all": {"seed": [1, 2]}}}}, ["'seed'", "leave it out"]),
    ],
)
def test_mistakes_are_named_before_any_run(tmp_path, capsys, changes, expected):
    path = write(tmp_path, changes=changes)
    assert main(["bench", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["tiny.yaml", "tiny_suite.yaml"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--methods", "am"], ["--methods", "'am'"]),
        (["--seeds", "7"], ["--seeds: 7", "[0, 1, 2]"]),
        (["--jobs", "0"], ["--jobs 0"]),
        (["--only", "run"], ["--only tune first"]),
    ],
)
def test_flags_that_do_not_fit_the_suite(tmp_path, capsys, flags, expected):
    path = write(tmp_path, tuning=TUNING)
    assert main(["bench", str(path), "--output_dir", str(tmp_path / "out"), *flags]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message


def test_settings_go_from_the_recipe_over_the_suite_to_the_method(tmp_path):
    path = write(tmp_path, settings={"alpha": 2.0, "max_steps": 5})
    read = load_suite(path)
    alphas = {name: seed_runs(read, name, {})[1].settings["alpha"] for name in read.methods}
    assert alphas == {"erm": 2.0, "a": 0.5, "b": 2.0}
    run = seed_runs(read, "a", {"alpha": 0.25})[2]
    assert (run.name, run.settings["seed"], run.settings["alpha"]) == ("a-seed2", 2, 0.25)
    assert run.settings["max_steps"] == 5 and run.settings["model_type"] == "vit"
    assert run.records == tmp_path / "records/tiny_suite.jsonl"
    assert "output_dir" not in run.settings and read.base.get("seed") is None
    plain = load_suite(write(tmp_path, settings={"model_config": None, "max_steps": 5}))
    assert plain.base == {key: value for key, value in read.base.items() if key not in ("model_config", "alpha")}


# ---- Draws


def test_draws_do_not_depend_on_other_methods_keys_or_the_budget(tmp_path):
    alpha = {"alpha": [0.3, 3.0, "log"]}
    ranges = {**TUNING["ranges"], "a": alpha}
    first = draws(load_suite(write(tmp_path, tuning={**TUNING, "ranges": ranges})), "a")
    more = {"methods": {"z": {}, **SUITE["methods"]}, "tuning": {**TUNING, "draws": 6, "ranges": ranges}}
    more["tuning"]["ranges"] = {"z": {"weight_decay": [0.0, 1.0, "linear"]}, **ranges}
    assert draws(load_suite(write(tmp_path, **more)), "a")[:4] == first
    # the shared range alone: the same values in every method
    shared = draws(load_suite(write(tmp_path, tuning=TUNING)), "erm")
    assert [draw["learning_rate"] for draw in first] == [draw["learning_rate"] for draw in shared]
    other = draws(load_suite(write(tmp_path, tuning={**TUNING, "seed": 4})), "erm")
    assert all(ours != theirs for ours, theirs in zip(shared, other, strict=True))


def test_draws_follow_their_ranges(tmp_path):
    ranges = {
        "learning_rate": [1e-4, 1e-2, "log"],
        "weight_decay": [0.0, 1.0, "linear"],
        "max_steps": [3, 6, "linear"],
        "rationale_reduction": ["mean", "pair"],
    }
    drawn = draws(replace(load_suite(write(tmp_path)), tuning=Tuning(400, {"all": ranges})), "b")
    rates, decays = ([draw[key] for draw in drawn] for key in ("learning_rate", "weight_decay"))
    assert min(rates) >= 1e-4 and max(rates) <= 1e-2 and len(set(rates)) > 200
    # a share of a half lies below the middle, 1e-3 of the logarithms and .5; 400 draws have a standard error of .025
    assert sum(rate < 1e-3 for rate in rates) / 400 == pytest.approx(0.5, abs=0.1)
    assert sum(decay < 0.5 for decay in decays) / 400 == pytest.approx(0.5, abs=0.1)
    assert {draw["max_steps"] for draw in drawn} == {3, 4, 5, 6}
    assert {draw["rationale_reduction"] for draw in drawn} == {"mean", "pair"}
    # keys are drawn independently: high rates do not go with high decay
    both = sum((rate < 1e-3) == (decay < 0.5) for rate, decay in zip(rates, decays, strict=True))
    assert both / 400 == pytest.approx(0.5, abs=0.1)


def test_the_choice_is_the_best_worst_group_on_validation_and_of_equals_the_earliest(tmp_path):
    read = load_suite(write(tmp_path, tuning=TUNING))
    tried = draw_runs(read, "a")
    assert [(run.settings["seed"], run.settings["measure_test"]) for run in tried] == [(3, False)] * 4
    for run, worst in zip(tried[:3], (0.5, 0.7, float("nan")), strict=True):
        fake(run, worst, split="validation", accuracy=1 - worst)
    assert suite.chosen(read, "a", suite_records(read)) is None
    fake(tried[3], 0.7, split="validation")
    assert suite.chosen(read, "a", suite_records(read)) == (1, draws(read, "a")[1])
    for run, error in zip(draw_runs(read, "b"), (0.5, 0.3, 0.4, 0.6), strict=True):
        fake(run, 0.0, split="validation", metrics={"mae": 0.1, "worst_group_mae": error})
    assert suite.chosen(read, "b", suite_records(read))[0] == 1


# ---- Records of other settings


def test_a_record_of_other_settings_is_neither_used_nor_overwritten(tmp_path, capsys):
    for run in seed_runs(load_suite(write(tmp_path)), "a", {}):
        fake(run, 0.5)
    assert main(["bench", str(write(tmp_path)), "--only", "render"]) == 0
    kept = run.records.read_bytes()
    changed = write(tmp_path, methods={**SUITE["methods"], "a": {"alpha": 0.75}})
    for stage in ([], ["--only", "render"], ["--only", "run", "--methods", "b"]):
        capsys.readouterr()
        assert main(["bench", str(changed), "--output_dir", str(tmp_path / "out"), *stage]) == 2
        message = capsys.readouterr().err
        assert "has a-seed0," in message and "alpha=0.5 (now 0.75)" in message and "remove its line" in message
    assert run.records.read_bytes() == kept and not (tmp_path / "out").exists()
    # the recipe counts too; the title does not
    changed = write(tmp_path, recipe={**TINY, "num_pairs": 20})
    assert main(["bench", str(changed), "--only", "render"]) == 2
    assert main(["bench", str(write(tmp_path, title="Other")), "--only", "render"]) == 0


def test_a_record_that_the_suite_does_not_know(tmp_path, capsys):
    read = load_suite(write(tmp_path))
    for name in ("a", "erm"):
        fake(seed_runs(read, name, {})[2], 0.5)
    for changes in ({"seeds": [0, 1]}, {"methods": {"erm": {"method": "erm"}, "b": {}}}):
        with pytest.raises(RecipeError, match="has a-seed2, which is no run of"):
            suite_rows(load_suite(write(tmp_path, **changes)))
    # settings that are not chosen yet
    with pytest.raises(RecipeError, match="has a-seed2, but of the 4 draws"):
        suite_rows(load_suite(write(tmp_path, tuning=TUNING)))
    # the method of the row is retired: its records stay, and are shown last
    retired = load_suite(write(tmp_path, methods={"erm": {"method": "erm"}, "b": {}}, retired={"a": "it was slow"}))
    *_, last = suite_rows(retired)
    assert (last.name, list(last.records), last.values("worst_group_accuracy")) == ("a", [2], {2: 0.5})
    assert "- `a` can no longer be run: it was slow." in markdown(retired, suite_rows(retired))


def test_a_run_has_one_record(tmp_path):
    (first, *_) = seed_runs(load_suite(write(tmp_path)), "a", {})
    fake(first, 0.5)
    fake(first, 0.6)
    with pytest.raises(RecipeError, match="two records of a-seed0"):
        suite_rows(load_suite(write(tmp_path)))


def test_what_is_not_recorded_is_no_other_setting(tmp_path):
    (first, *_) = seed_runs(load_suite(write(tmp_path)), "a", {})
    fake(first, 0.5)
    (record,) = read_records(first.records)
    unknown = {"alpha": NOT_RECORDED, "max_steps": NOT_RECORDED}
    for changes, accepted in ((unknown, True), ({"alpha": 0.6}, False), ({"max_steps": 5}, False)):
        first.records.unlink()
        append_record(first.records, {**record, "settings": record["settings"] | changes})
        if accepted:
            assert suite_rows(load_suite(write(tmp_path)))[1].records[0]["settings"]["alpha"] == NOT_RECORDED
        else:
            with pytest.raises(RecipeError, match=next(iter(changes))):
                suite_rows(load_suite(write(tmp_path)))
    # a default of TrainingArguments that the suite does not give is not compared; one of the method is
    for changes, accepted in (({"adam_beta2": 0.5}, True), ({"correction_interval": 2}, False)):
        first.records.unlink()
        append_record(first.records, {**record, "settings": record["settings"] | changes})
        if accepted:
            suite_rows(load_suite(write(tmp_path)))
        else:
            with pytest.raises(RecipeError, match="correction_interval=2"):
                suite_rows(load_suite(write(tmp_path)))


# ---- Statistics, by hand


def test_t_interval_by_hand():
    # mean .4, sd sqrt((0 + .01 + .01) / 2) = .1, t(.975, 2) = 4.302653, half = 4.302653 · .1 / √3 = .248414
    interval = t_interval([0.4, 0.5, 0.3])
    assert (interval.mean, interval.n) == (pytest.approx(0.4), 3)
    assert interval.low == pytest.approx(0.4 - 0.248414, abs=1e-6)
    assert interval.high == pytest.approx(0.4 + 0.248414, abs=1e-6)
    one = t_interval([0.4])
    assert one.mean == 0.4 and one.low != one.low and one.n == 1


def test_differences_are_of_the_same_seeds():
    ours, theirs = {0: 0.5, 1: 0.7, 2: 0.6}, {2: 0.1, 1: 0.4, 5: 0.9}
    difference = paired_difference(ours, theirs)
    # .7 - .4 and .6 - .1: mean .4, sd .141421, t(.975, 1) = 12.706205, half 1.270620
    assert difference.n == 2 and difference.mean == pytest.approx(0.4)
    assert difference.high == pytest.approx(1.670620, abs=1e-6)
    # taken by place, not by seed, they would be another
    assert difference.mean != pytest.approx(((0.5 - 0.1) + (0.7 - 0.4) + (0.6 - 0.9)) / 3)
    assert paired_difference(ours, {7: 0.1}) is None


def test_the_best_other_is_measured_on_the_same_seeds():
    scores = {
        "x": {0: 0.5, 1: 0.5},
        "lucky": {0: 0.9},
        "good": {0: 0.6, 1: 0.8},
        "late": {0: 0.5, 1: 0.7, 2: 1.0, 3: 1.0},
    }
    # on seeds 0 and 1: good .7, late .6; over all its seeds late has .8
    assert best_other("x", scores) == "good" and best_other("lucky", scores) == "good"
    assert best_other("late", scores) == "good" and best_other("good", scores) == "late"
    assert best_other("x", {"x": {0: 0.5}, "y": {1: 0.5}}) is None


@pytest.fixture
def compared(tmp_path):
    path = write(tmp_path, methods={**SUITE["methods"], "c": {}})
    read = load_suite(path)
    numbers = {"erm": (0.1, 0.2, 0.3), "a": (0.5, 0.7, 0.6), "b": (0.9,)}
    for name, worsts in numbers.items():
        for number, (run, worst) in enumerate(zip(seed_runs(read, name, {}), worsts, strict=False)):
            fake(run, worst, adjusted_accuracy=0.75, seconds=10.0 + number)
    return path


def test_the_table_by_hand(compared):
    read = load_suite(compared)
    lines = markdown(read, suite_rows(read)).splitlines()
    titles = ["method", "seeds", "accuracy", "worst-group accuracy, mean ± sd", "median", "lowest", "adjusted accuracy"]
    assert lines[0].startswith(f"| {' | '.join(titles)} | flip rate |")
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:6]}
    common = ["0.750 ± 0.000", "0.250 ± 0.000", "11"]
    assert rows["`erm`"] == [
        "3", "0.500 ± 0.000", "0.200 ± 0.100", "0.200", "0.100", *common, "-", "`a`: -0.400 [-0.648, -0.152]"
    ]  # fmt: skip
    assert rows["`a`"] == [
        "3", "0.500 ± 0.000", "0.600 ± 0.100", "0.600", "0.500", *common,
        "+0.400 [+0.152, +0.648]", "`erm`: +0.400 [+0.152, +0.648]",
    ]  # fmt: skip
    assert rows["`b`"] == [
        "1 of 3", "0.500", "0.900", "0.900", "0.900", "0.750", "0.250", "10",
        "+0.800 (1 seed)", "`a`: +0.400 (1 seed)",
    ]  # fmt: skip
    assert rows["`c`"] == ["not run", *["-"] * 9]
    text = "\n".join(lines)
    assert "Code: 0123456789. Machine: x86_64, 1 of 2 processors." in text
    assert "- `a`: `alpha=0.5`." in text and "- `b`: the shared settings." in text


def test_the_machine_is_its_processor_where_a_record_names_it(tmp_path):
    suite = load_suite(write(tmp_path))
    for run, cpu in zip(seed_runs(suite, "erm", {}), ("Zen, AVX2", "Xeon, AVX512", None), strict=True):
        fake(run, 0.5, cpu=cpu)
    expected = "Machine: Xeon, AVX512, 1 of 2 processors; Zen, AVX2, 1 of 2 processors; x86_64, 1 of 2 processors."
    assert expected in markdown(suite, suite_rows(suite))


def test_errors_are_better_when_low(tmp_path):
    read = load_suite(write(tmp_path))
    for name, errors in {"erm": (0.5, 0.6, 0.7), "a": (0.2, 0.3, 0.1), "b": (0.25, 0.25, 0.25)}.items():
        for run, error in zip(seed_runs(read, name, {}), errors, strict=True):
            fake(run, 0.0, metrics={"mae": 0.1, "worst_group_mae": error})
    lines = markdown(read, suite_rows(read)).splitlines()
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:5]}
    assert "highest" in lines[0] and "flip rate" not in lines[0] and "pairs' difference" not in lines[0]
    assert rows["`a`"][1:5] == ["0.100 ± 0.000", "0.200 ± 0.100", "0.200", "0.300"]
    assert rows["`erm`"][-1].startswith("`a`: +0.400") and rows["`a`"][-1].startswith("`b`: -0.050")
    assert any("a negative difference is the better one" in line for line in lines)


def test_csv_and_figure(compared):
    assert main(["bench", str(compared), "--only", "render"]) == 0
    folder = compared.parent / "results/tiny_suite"
    assert (folder / "figure.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "table.md").read_text().startswith("# Tiny\n\n| method |")
    with open(folder / "table.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert [*rows] == ["erm", "a", "b", "c"]
    a, c = rows["a"], rows["c"]
    assert float(a["worst_group_accuracy_mean"]) == pytest.approx(0.6) and a["seeds"] == "3"
    assert float(a["reference_difference_high"]) == pytest.approx(0.648414, abs=1e-6) and a["reference"] == "erm"
    assert a["best_other"] == "erm" and a["best_other_difference_n"] == "3"
    b = rows["b"]
    assert b["best_other"] == "a" and b["best_other_difference_n"] == "1" and b["best_other_difference_low"] == ""
    assert json.loads(a["settings"]) == {"alpha": 0.5}
    assert c["seeds"] == "0" and c["worst_group_accuracy_mean"] == "" and c["seconds_median"] == ""


def test_differences_to_several_references(compared):
    compared.write_text(compared.read_text().replace("reference: erm", "reference: [erm, b]"))
    assert main(["bench", str(compared), "--only", "render"]) == 0
    folder = compared.parent / "results/tiny_suite"
    lines = (folder / "table.md").read_text().splitlines()
    assert lines[2].endswith("| against `erm` | against `b` | against the best other |")
    with open(folder / "table.csv", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    for name, others in {"a": ["erm", "b"], "erm": ["", "b"], "b": ["erm", ""]}.items():
        assert [rows[name]["reference"], rows[name]["reference_2"]] == others
    own, other = (float(rows["a"][f"{key}_difference_mean"]) for key in ("reference", "reference_2"))
    assert own == pytest.approx(0.4) and other == pytest.approx(-0.4)  # of the one seed that b has


def test_two_suites_of_one_folder_do_not_mix(compared):
    other = compared.with_name("other.yaml")
    other.write_text(compared.read_text())
    read = load_suite(other)
    assert all(not row.records for row in suite_rows(read))
    assert comparison_figures.write_comparison(read)[0].parent == compared.parent / "results/other"


# ---- What a run reads


def test_a_run_without_the_test_set_has_none(tmp_path):
    read = {}
    for measured in (True, False):
        recipe, args, _ = parse_settings({**TINY, "measure_test": measured}, title="")
        data = recipe.load_data(args.data_order_seed)
        read[measured] = set(runs._inputs(data, recipe, recipe.build_processor(), ("label", "attribute")))
    assert read[True] - read[False] == {"test", "test_pairs"}


# ---- Really run


def bench(path, *flags):
    return main(["bench", str(path), "--output_dir", str(path.parent / "out"), "--jobs", "2", *flags])


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A suite that was interrupted after its first record, with what it said and the records that it had then."""
    folder = tmp_path_factory.mktemp("bench")
    tuning = {"draws": 2, "ranges": {"all": {"learning_rate": [1e-4, 1e-2, "log"]}}}
    path = write(folder, methods={"ipg": {"alpha": 0.5}}, reference="ipg", seeds=[0], tuning=tuning)
    command = [sys.executable, "-m", "ipg_hf.cli", "bench", str(path), "--output_dir", str(folder / "out")]
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    records, deadline = folder / "records/tiny_suite.jsonl", time.monotonic() + 120
    # the first run has left its record, the second is under way
    while not records.exists() or not (folder / "out/ipg-draw1/log.txt").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    return path, process.returncode, errors, records.read_bytes(), [*(folder / "out").iterdir()]


def test_an_interrupt_keeps_what_has_finished(interrupted):
    _, status, errors, kept, left = interrupted
    assert status == 130 and "the same command goes on" in errors
    assert [json.loads(line)["run"] for line in kept.splitlines()] == ["ipg-draw0"]
    assert sorted(folder.name for folder in left) == ["images-seed0", "ipg-draw1"]  # of the runs that go on


@pytest.fixture(scope="module")
def finished(interrupted):
    path, *_ = interrupted
    assert bench(path) == 0
    return path, records_of(path.parent)


def test_the_same_command_goes_on(interrupted, finished):
    path, records = finished
    assert (path.parent / "records/tiny_suite.jsonl").read_bytes().startswith(interrupted[3])
    assert sorted(records) == ["ipg-draw0", "ipg-draw1", "ipg-seed0"]
    assert not [*(path.parent / "out").iterdir()]


def test_tuning_does_not_read_the_test_set_and_the_compared_runs_do(finished):
    for name, record in finished[1].items():
        assert set(record["metrics"]) == ({"validation"} if "draw" in name else {"validation", "test"}), name
        assert record["method"] == "ipg" and record["steps"] == 4 and record["settings"]["alpha"] == 0.5
        assert {"versions", "commit", "hardware", "data"} <= set(record)
        assert record["commit"] == commit() and "output_dir" not in record["settings"]
        assert record["course"]["guidance"]["step"] == [2, 4]


def test_the_compared_runs_have_the_settings_of_the_best_draw(finished):
    path, records = finished
    tried = [records[f"ipg-draw{number}"] for number in (0, 1)]
    worst = [record["metrics"]["validation"]["worst_group_accuracy"] for record in tried]
    best = worst.index(max(worst))
    rates = [record["settings"]["learning_rate"] for record in tried]
    assert rates[0] != rates[1] and records["ipg-seed0"]["settings"]["learning_rate"] == rates[best]
    # the seed of the tuning is the run's seed here: the same training again
    again = records["ipg-seed0"]["metrics"]["validation"]
    assert tried[best]["metrics"]["validation"] == pytest.approx(again, rel=1e-3)  # by another number of threads
    assert f"of 2 draws number {best} is the best" in (path.parent / "results/tiny_suite/table.md").read_text()


def test_what_has_a_record_is_not_run_again(finished, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a run was started")

    monkeypatch.setattr("ipg_hf.bench.run._start", refuse)
    assert bench(finished[0]) == 0


def ends_at_once(*_):
    os.abort()


def shows_its_surroundings(config, log, *rest):
    with open(log, "w") as file:
        json.dump({"config": config, "rest": rest, "threads": os.environ["OMP_NUM_THREADS"]}, file)


def test_a_process_that_dies_before_it_says_anything(tmp_path, monkeypatch):
    monkeypatch.setattr("ipg_hf.bench.run._train", ends_at_once)
    (tmp_path / "a-seed0").mkdir()
    (tmp_path / "a-seed0" / "log.txt").write_text("of an earlier attempt")
    runs = seed_runs(load_suite(write(tmp_path)), "a", {})
    with pytest.raises(RecipeError, match="a-seed0 failed") as error:
        execute(runs, 1, tmp_path)
    assert "earlier attempt" not in str(error.value)


def test_several_runs_at_a_time_have_one_thread_each(tmp_path, monkeypatch):
    """In an interpreter of its own: what the environment is, the server of the processes reads once."""
    monkeypatch.setattr("ipg_hf.bench.run._processes", lambda: multiprocessing.get_context("spawn"))
    monkeypatch.setattr("ipg_hf.bench.run._train", shows_its_surroundings)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    before, run = dict(os.environ), seed_runs(load_suite(write(tmp_path)), "a", {})[0]
    for jobs, threads in ((1, "2"), (2, "1")):
        process = _start(run, tmp_path / f"{jobs}", jobs)
        process.join(120)
        seen = json.loads((tmp_path / f"{jobs}/log.txt").read_text())
        assert seen["threads"] == threads and os.environ == before
        assert seen["config"] == str(tmp_path / f"{jobs}/recipe.yaml") and seen["rest"] == [jobs > 1, commit()]


def test_a_draw_that_diverges_is_the_worst_and_the_suite_goes_on(tmp_path, capsys):
    tuning = {"draws": 3, "ranges": {"all": {"learning_rate": [1e-3, 1e38]}}}
    path = write(tmp_path, methods={"ipg": None}, reference="ipg", seeds=[0], tuning=tuning)
    assert bench(path) == 0
    records = records_of(tmp_path)
    assert sorted(records) == ["ipg-draw0", "ipg-draw1", "ipg-draw2", "ipg-seed0"]
    rates = {name: record["settings"]["learning_rate"] for name, record in records.items()}
    lost = [name for name, record in records.items() if "diverged" in record]
    assert 0 < len(lost) < 3 and lost == [name for name, rate in rates.items() if rate > 1], rates
    assert "NaN" in records[lost[0]]["diverged"] and records[lost[0]]["metrics"] == {}
    assert {"settings", "given", "seed", "method", "seconds", "versions", "commit", "hardware"} <= set(records[lost[0]])
    assert f"{lost[0]}: diverged" in capsys.readouterr().out
    table = (tmp_path / "results/tiny_suite/table.md").read_text()
    assert f"of 3 draws, of which {len(lost)} diverged, number" in table and rates["ipg-seed0"] == 1e-3
    # of a compared run there is no result
    path = write(tmp_path, methods={"ipg": {"learning_rate": 1e38}}, reference="ipg", seeds=[1], tuning=None)
    (tmp_path / "records/tiny_suite.jsonl").unlink()
    assert bench(path) == 2
    assert "the model has diverged" in capsys.readouterr().err


def test_a_run_that_fails_stops_the_suite_after_the_one_beside_it(tmp_path, capsys):
    methods = {"bad": {"num_pairs": 10**6}, "erm": {"method": "erm"}, "later": {}}
    path = write(tmp_path, methods=methods, seeds=[0])
    assert bench(path, "--keep_models") == 2
    message = capsys.readouterr().err
    assert "bad-seed0 failed" in message and "1000000" in message and "Traceback" not in message
    assert [*records_of(tmp_path)] == ["erm-seed0"]
    assert (tmp_path / "out/erm-seed0/model.safetensors").exists() and not (tmp_path / "out/later-seed0").exists()
    # the images of a seed are transformed once for its runs, and wait for those that are still to come
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/images-seed0").iterdir()}
    path = write(tmp_path, methods={"erm": {"method": "erm"}, "later": {}, "last": {}}, seeds=[0])
    assert kept and bench(path, "--methods", "later") == 0
    assert not (tmp_path / "out/images-seed0").exists()
    assert bench(path, "--methods", "last") == 0
    records = [records_of(tmp_path)[f"{name}-seed0"] for name in ("later", "last")]
    assert records[0]["metrics"] == records[1]["metrics"] and "preload_dir" not in records[0]["settings"]
