# SPDX-License-Identifier: Apache-2.0
"""Suites over a grid: what is refused, which runs there are, and what tables and figures show, by hand."""

import csv
import json
import math

import pytest
import yaml
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from small_suite import TUNING, fake, records_of, write

from ipg_hf.bench import run as bench
from ipg_hf.bench.figures import guided_records, write_comparison
from ipg_hf.bench.suite import chosen, draw_runs, draws, load_suite, points, seed_runs
from ipg_hf.bench.tables import markdown, suite_rows
from ipg_hf.cli import main
from ipg_hf.recipe import RecipeError

METHODS = {"erm": {"method": "erm"}, "ipg": {}, "kl": {"method": "kl"}}
PAIRS = {"methods": METHODS, "grid": {"num_pairs": [8, 40, 300]}, "ungridded": ["erm"]}
BOTH = {"methods": {"ipg": {}}, "reference": "ipg", "grid": {"alpha": [0.1, 1], "invariance_threshold": [1e-5, 1e-2]}}


def all_runs(suite):
    return [run for name in suite.methods for point in points(suite, name) for run in seed_runs(suite, name, {}, point)]


def fill(suite, worst):
    """Records of all runs; `worst(name, point, seed)` is the worst group, or `None` for a run that is not made."""
    for name in suite.methods:
        for point in points(suite, name):
            for run in seed_runs(suite, name, {}, point):
                value = worst(name, point, run.settings["seed"])
                if value is not None:
                    fake(run, value)


@pytest.fixture
def drawn(monkeypatch):
    """File name -> the figure that was written to it."""
    figures = {}
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: figures.__setitem__(path.name, figure))
    return figures


# ---- What a grid may say


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"grid": [1, 2]}, ["grid=[1, 2]", "mapping"]),
        ({"grid": {}}, ["grid={}", "one key or two"]),
        ({"grid": {"alpha": [1], "num_pairs": [8], "max_steps": [4]}}, ["one key or two"]),
        ({"grid": {"alpha": 1}}, ["grid: alpha=1", "list"]),
        ({"grid": {"alpha": []}}, ["grid: alpha=[]", "list"]),
        ({"grid": {"alpha": [1, 1.0]}}, ["grid: alpha=[1, 1.0]", "once"]),
        ({"grid": {"alpha": ["1e-4"]}}, ["'1e-4'", "1.0e-4, not 1e-4"]),
        ({"grid": {"alpha": [math.nan]}}, ["nan", "number"]),
        ({"grid": {"rationale_reduction": ["../mean"]}}, ["'../mean'", "word"]),
        ({"grid": {"pairs": [{"maker": "match"}]}}, ["maker", "word"]),
        ({"grid": {"seed": [0, 1]}}, ["grid", "'seed'", "leave it out"]),
        ({"grid": {"num_pair": [8]}}, ["grid: ipg at", "'num_pair'", "'num_pairs'"]),
        ({"grid": {"alpha": [1, -1]}}, ["grid: ipg at {'alpha': -1}", "alpha=-1.0"]),
        ({"grid": {"method": ["kl", "ipg"]}}, ["methods: kl", "'method'", "grid too"]),
        (
            {"tuning": {"draws": 1, "ranges": {"all": {"num_pairs": [8, 40]}}}},
            ["methods: ipg", "'num_pairs'", "grid too"],
        ),
        ({"ungridded": "erm"}, ["ungridded='erm'", "list"]),
        ({"ungridded": ["em"]}, ["ungridded", "'em'", "'erm'"]),
        ({"ungridded": [*METHODS]}, ["ungridded", "every method"]),
        ({"grid": None}, ["ungridded=['erm']", "beside a grid"]),
    ],
)
def test_mistakes_are_named_before_any_run(tmp_path, capsys, changes, expected):
    path = write(tmp_path, changes=PAIRS | changes)
    assert main(["bench", str(path), "--output_dir", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in expected), message
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["tiny.yaml", "tiny_suite.yaml"]


def test_a_method_outside_the_grid_may_set_its_key(tmp_path):
    methods = METHODS | {"erm": {"method": "erm", "num_pairs": 5}}
    suite = load_suite(write(tmp_path, changes=PAIRS, methods=methods))
    assert seed_runs(suite, "erm", {})[0].settings["num_pairs"] == 5


# ---- Runs


def test_the_runs_of_a_grid(tmp_path):
    suite = load_suite(write(tmp_path, changes=PAIRS, seeds=[0, 4]))
    runs = {run.name: run for run in all_runs(suite)}
    assert [*runs] == [
        "erm-seed0", "erm-seed4",
        "ipg-num_pairs-8-seed0", "ipg-num_pairs-8-seed4", "ipg-num_pairs-40-seed0", "ipg-num_pairs-40-seed4",
        "ipg-num_pairs-300-seed0", "ipg-num_pairs-300-seed4",
        "kl-num_pairs-8-seed0", "kl-num_pairs-8-seed4", "kl-num_pairs-40-seed0", "kl-num_pairs-40-seed4",
        "kl-num_pairs-300-seed0", "kl-num_pairs-300-seed4",
    ]  # fmt: skip
    run = runs["kl-num_pairs-300-seed4"]
    assert (run.settings["num_pairs"], run.settings["method"], run.settings["seed"]) == (300, "kl", 4)
    assert run.records == tmp_path / "records/tiny_suite.jsonl"
    assert runs["erm-seed0"].settings["num_pairs"] == 40  # the recipe's


def test_every_point_of_two_keys_has_a_file_of_its_own(tmp_path):
    grid = {"alpha": [0.1, 1, 1e16, 0.1000000001], "rationale_reduction": ["mean", "pair"]}
    suite = load_suite(write(tmp_path, changes=BOTH, grid=grid, seeds=[0]))
    assert [run.name for run in all_runs(suite)] == [
        f"ipg-alpha-{alpha}-rationale_reduction-{reduction}-seed0"
        for alpha in ("0.1", "1", "1e16", "0.1000000001")
        for reduction in ("mean", "pair")
    ]


def test_runs_go_seed_by_seed_and_only_what_is_asked_for(tmp_path, monkeypatch):
    path = str(write(tmp_path, changes=PAIRS, grid={"num_pairs": [8, 40]}))
    started = []
    monkeypatch.setattr(bench, "execute", lambda runs, *_: started.extend(run.name for run in runs))
    bench.bench(path, only="run", seeds=[2, 0], methods=["kl", "erm"])
    one = ["erm-seed{}", "kl-num_pairs-8-seed{}", "kl-num_pairs-40-seed{}"]
    assert started == [name.format(seed) for seed in (0, 2) for name in one]


def test_tuning_is_done_once_and_holds_over_the_grid(tmp_path):
    suite = load_suite(write(tmp_path, changes=PAIRS, tuning=TUNING))
    tried = draw_runs(suite, "ipg")
    assert [run.name for run in tried] == [f"ipg-draw{number}" for number in range(4)]
    assert {run.settings["num_pairs"] for run in tried} == {40}
    for number, run in enumerate(tried):
        fake(run, [0.1, 0.2, 0.9, 0.3][number], split="validation")
    _, best = chosen(suite, "ipg", records_of(tmp_path))
    rates = {run.settings["learning_rate"] for at in points(suite, "ipg") for run in seed_runs(suite, "ipg", best, at)}
    assert rates == {draws(suite, "ipg")[2]["learning_rate"]}
    # a record at a point of a method that is not tuned yet
    fake(seed_runs(suite, "kl", {}, {"num_pairs": 8})[0], 0.5)
    with pytest.raises(RecipeError, match="has kl-num_pairs-8-seed0, but of the 4 draws"):
        suite_rows(suite)


def test_a_record_of_another_grid_or_of_other_settings_is_refused(tmp_path, capsys):
    fill(load_suite(write(tmp_path, changes=PAIRS)), lambda *_: 0.5)
    refused = {
        "has ipg-num_pairs-8-seed0, which is no run of": {"grid": {"num_pairs": [40, 300]}},
        "has erm-seed0, which is no run of": {"ungridded": []},
        "has ipg-num_pairs-8-seed0, made with other settings": {"methods": METHODS | {"ipg": {"alpha": 0.25}}},
    }
    for message, changes in refused.items():
        path = write(tmp_path, changes=PAIRS | changes)
        for only in ("run", "render"):
            assert main(["bench", str(path), "--only", only]) == 2
            assert message in capsys.readouterr().err
    # a value more leaves the records as they are
    path = write(tmp_path, changes=PAIRS, grid={"num_pairs": [8, 40, 300, 400]})
    assert main(["bench", str(path), "--only", "render"]) == 0


def test_a_point_is_really_run(tmp_path):
    path = write(tmp_path, changes=PAIRS, grid={"num_pairs": [8, 40]}, seeds=[0])
    fill(load_suite(path), lambda name, point, _: None if (name, point) == ("ipg", {"num_pairs": 8}) else 0.5)
    before = (tmp_path / "records/tiny_suite.jsonl").read_bytes()
    assert len(records_of(tmp_path)) == 4
    assert main(["bench", str(path), "--output_dir", str(tmp_path / "out")]) == 0
    after = (tmp_path / "records/tiny_suite.jsonl").read_bytes()
    assert after.startswith(before) and after.count(b"\n") == 5
    record = json.loads(after.removeprefix(before))
    assert record["run"] == "ipg-num_pairs-8-seed0" and record["settings"]["num_pairs"] == 8
    assert record["data"]["pair_sets"]["pairs"]["pairs"] == 8
    assert (tmp_path / "results/tiny_suite/figure.png").read_bytes()[:4] == b"\x89PNG"


# ---- Tables


def numbers(name, point, seed):
    """erm .1, .2, .3 over seeds; ipg .4 and .1 more a point; kl on one seed alone, and not at the last point."""
    number = [8, 40, 300].index(point.get("num_pairs", 8))
    if name == "kl":
        return 0.9 if seed == 0 and number < 2 else None
    return {"erm": 0.1, "ipg": 0.4}[name] + 0.1 * (number + seed)


def test_the_table_by_hand(tmp_path):
    suite = load_suite(write(tmp_path, changes=PAIRS))
    fill(suite, numbers)
    lines = markdown(suite, suite_rows(suite)).splitlines()
    assert lines[0].startswith("| method | `num_pairs` | seeds | accuracy | worst-group accuracy, mean ± sd |")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:9]]
    assert [row[:3] for row in rows] == [
        ["`erm`", "-", "3"],
        ["`ipg`", "8", "3"], ["`ipg`", "40", "3"], ["`ipg`", "300", "3"],
        ["`kl`", "8", "1 of 3"], ["`kl`", "40", "1 of 3"], ["`kl`", "300", "not run"],
    ]  # fmt: skip
    assert [row[4] for row in rows] == [
        "0.200 ± 0.100", "0.500 ± 0.100", "0.600 ± 0.100", "0.700 ± 0.100", "0.900", "0.900", "-",
    ]  # fmt: skip
    # to erm .3 at the first point and .5 at the last; the best other is of the same point: kl has but one seed
    assert rows[1][-2:] == ["+0.300 [+0.300, +0.300]", "`erm`: +0.300 [+0.300, +0.300]"]
    assert rows[3][-2:] == ["+0.500 [+0.500, +0.500]", "`erm`: +0.500 [+0.500, +0.500]"]
    assert rows[4][-2:] == ["+0.800 (1 seed)", "`ipg`: +0.500 (1 seed)"]
    assert rows[5][-2:] == ["+0.800 (1 seed)", "`ipg`: +0.400 (1 seed)"]
    assert rows[0][-2:] == rows[6][-2:] == ["-", "-"]
    text = "\n".join(lines)
    assert text.count("- `kl`: `method=kl`.") == 1
    assert "no setting is chosen by it" in text and "run once and compared at every point" in text


def test_the_rows_of_the_csv(tmp_path):
    suite = load_suite(write(tmp_path, changes=PAIRS))
    fill(suite, numbers)
    write_comparison(suite)
    with open(suite.results / "table.csv", newline="") as file:
        rows = {(row["method"], row["grid_num_pairs"]): row for row in csv.DictReader(file)}
    assert [*rows] == [("erm", ""), *((name, number) for name in ("ipg", "kl") for number in ("8", "40", "300"))]
    row = rows["ipg", "300"]
    assert float(row["worst_group_accuracy_mean"]) == pytest.approx(0.7)
    assert float(row["reference_difference_mean"]) == pytest.approx(0.5)
    assert json.loads(row["settings"]) == {"num_pairs": 300} and rows["erm", ""]["reference"] == ""


def test_one_method_alone_is_compared_with_nothing(tmp_path):
    suite = load_suite(write(tmp_path, changes=BOTH))
    fill(suite, lambda *_: 0.5)
    lines = markdown(suite, suite_rows(suite)).splitlines()
    assert lines[0].startswith("| method | `alpha` | `invariance_threshold` | seeds |") and "against" not in lines[0]
    assert [line.split("|")[2:4] for line in lines[2:6]] == [
        [" 0.1 ", " 1e-05 "], [" 0.1 ", " 0.01 "], [" 1 ", " 1e-05 "], [" 1 ", " 0.01 "]
    ]  # fmt: skip
    assert "Differences" not in "\n".join(lines)


# ---- Figures


def test_a_line_over_one_key(tmp_path, drawn):
    suite = load_suite(write(tmp_path, changes=PAIRS))
    fill(suite, numbers)
    write_comparison(suite)
    assert [*drawn] == ["figure.png"]
    (axes,) = drawn["figure.png"].axes
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "40", "300"]
    lines = {line.get_label(): [*map(list, line.get_data())] for line in axes.lines}
    assert [*lines] == ["erm", "ipg", "kl (2 of 9 runs)"]
    assert lines["ipg"] == [[8, 40, 300], pytest.approx([0.5, 0.6, 0.7])]
    assert lines["erm"] == [[8, 40, 300], pytest.approx([0.2] * 3)]
    assert lines["kl (2 of 9 runs)"] == [[8, 40], [0.9, 0.9]]
    erm, ipg, kl = (band.get_paths()[0].get_extents() if band.get_paths() else None for band in axes.collections)
    assert (ipg.x0, ipg.x1) == (8, 300) and (ipg.y0, ipg.y1) == pytest.approx((0.4, 0.8))
    assert (erm.y0, erm.y1) == pytest.approx((0.1, 0.3)) and (kl.y0, kl.y1) == (0.9, 0.9)


@pytest.mark.parametrize(
    ("values", "scale", "places"),
    [
        ([1, 2, 10], "linear", [1, 2, 10]),
        ([1, 2, 11], "log", [1, 2, 11]),
        ([0.0, 1.0, 100.0], "linear", [0, 1, 100]),
        ([1.0, math.inf], "linear", [0, 1]),
    ],
)
def test_the_axis_of_a_key(tmp_path, drawn, values, scale, places):
    suite = load_suite(write(tmp_path, changes=BOTH, grid={"invariance_threshold": values}))
    fill(suite, lambda *_: 0.5)
    write_comparison(suite)
    (axes,) = drawn["figure.png"].axes
    assert (axes.get_xscale(), [*axes.lines[0].get_xdata()]) == (scale, places)


def test_words_stand_side_by_side(tmp_path, drawn):
    suite = load_suite(write(tmp_path, changes=BOTH, grid={"rationale_reduction": ["pair", "mean"]}))
    fill(suite, lambda _, point, seed: 0.25 if point["rationale_reduction"] == "pair" else 0.75)
    write_comparison(suite)
    (axes,) = drawn["figure.png"].axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["pair", "mean"]
    assert [*map(list, axes.lines[0].get_data())] == [[0, 1], [0.25, 0.75]]


def test_a_dozen_lines_all_look_different(tmp_path, drawn):
    methods = {"erm": {"method": "erm"}} | {f"kl{n}": {"method": "kl", "alpha": float(n)} for n in range(1, 12)}
    suite = load_suite(write(tmp_path, changes=PAIRS | {"methods": methods}))
    fill(suite, lambda *_: 0.5)
    write_comparison(suite)
    (axes,) = drawn["figure.png"].axes
    assert len({(to_rgb(line.get_color()), line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 12


def test_a_map_over_two_keys(tmp_path, drawn):
    changes = {"methods": METHODS, "reference": "erm", "ungridded": ["erm"]}
    suite = load_suite(write(tmp_path, changes=BOTH | changes))

    def worst(name, point, seed):
        if name == "erm":
            return 0.1
        if name == "kl" and point == {"alpha": 1, "invariance_threshold": 1e-5}:
            return None
        return (
            0.1 * seed + (0.5 if point["alpha"] == 1 else 0.0) + (0.25 if point["invariance_threshold"] == 1e-2 else 0)
        )

    fill(suite, worst)
    write_comparison(suite)
    figure = drawn["figure.png"]
    ipg, kl = figure.axes[:2]
    assert (ipg.get_title(), kl.get_title()) == ("ipg", "kl (9 of 12 runs)")
    # alpha downwards, the threshold to the right
    assert (ipg.get_ylabel(), ipg.get_xlabel()) == ("alpha", "invariance_threshold")
    assert [label.get_text() for label in ipg.get_xticklabels()] == ["1e-05", "0.01"]
    cells = ipg.images[0].get_array()
    assert cells.tolist() == [pytest.approx([0.1, 0.35]), pytest.approx([0.6, 0.85])]
    assert kl.images[0].get_array().mask.tolist() == [[False, False], [True, False]]
    texts = [text.get_text() for text in kl.texts]
    assert texts == ["0.100\n± 0.100", "0.350\n± 0.100", "not run", "0.850\n± 0.100"]
    caption = figure.get_supxlabel()
    assert "Test set" in caption and "No setting is chosen by it." in caption and "erm: 0.100 ± 0.000" in caption


def test_the_divergence_over_the_training_of_the_methods_that_correct(tmp_path, drawn):
    suite = load_suite(
        write(tmp_path, methods=METHODS | {"late": {"alpha": 2.0}}, settings={"invariance_threshold": 0.01})
    )
    write_comparison(suite)
    assert not drawn
    for name in METHODS:
        for run in seed_runs(suite, name, {})[:2]:
            seed = run.settings["seed"]
            fake(run, 0.5, guidance={"step": [2, 4], "divergence": [0.5, 0.1 + seed], "violated": [1.0, 0.5]})
    fake(seed_runs(suite, "ipg", {})[2], 0.5)  # made before records had it
    assert [(name, len(records)) for name, records in guided_records(suite_rows(suite))] == [("ipg", 2)]
    paths = write_comparison(suite)
    assert [path.name for path in paths] == ["table.md", "table.csv", "figure.png", "cost.png", "guidance.png"]
    above, below = drawn["guidance.png"].axes
    assert above.get_title() == "ipg (2 seeds)" and above.get_yscale() == "log"
    assert [[*line.get_ydata()] for line in above.lines] == [[0.5, 0.1], [0.5, 1.1], [0.01, 0.01]]
    assert [[*map(list, line.get_data())] for line in below.lines] == [[[2, 4], [1.0, 0.5]]] * 2


def test_the_worst_group_against_the_seconds(tmp_path, drawn):
    suite = load_suite(write(tmp_path, methods={"erm": {"method": "erm"}, "ipg": {}, "later": {"alpha": 2.0}}))
    for name, found in {"erm": [(0.2, 10.0)], "ipg": [(0.5, 20.0), (0.7, 90.0), (0.6, 30.0)]}.items():
        for run, (worst, seconds) in zip(seed_runs(suite, name, {}), found, strict=False):
            fake(run, worst, seconds=seconds)
    write_comparison(suite)
    (axes,) = drawn["cost.png"].axes
    marks = {bar.get_label(): [*map(list, bar.lines[0].get_data())] for bar in axes.containers}
    assert marks == {
        "erm (1 of 3 seeds)": [[10.0], [0.2]],
        "ipg": [[30.0], [pytest.approx(0.6)]],
    }
    spreads = [bar.lines[2][0].get_segments()[0][:, 1].tolist() for bar in axes.containers]
    assert spreads == [pytest.approx([0.2, 0.2]), pytest.approx([0.5, 0.7])]
    assert axes.get_xlabel() == "seconds of a training with its evaluations, median"


def test_seconds_of_different_machines_are_marked(tmp_path, drawn):
    suite = load_suite(write(tmp_path, methods=METHODS))
    for run, cpu in zip(seed_runs(suite, "ipg", {}), ("Zen, AVX2", "Xeon, AVX512"), strict=False):
        fake(run, 0.5, cpu=cpu)
    write_comparison(suite)
    (axes,) = drawn["cost.png"].axes
    assert axes.get_xlabel().endswith("\non different machines: these seconds do not compare")


def test_a_figure_that_has_no_records_left_is_removed(tmp_path):
    suite = load_suite(write(tmp_path, methods=METHODS))
    run = seed_runs(suite, "ipg", {})[0]
    fake(run, 0.5, guidance={"step": [2, 4], "divergence": [0.0, 0.0], "violated": [0.0, 0.0]})
    write_comparison(suite)
    assert all(
        (suite.results / name).read_bytes()[:4] == b"\x89PNG" for name in ("figure.png", "cost.png", "guidance.png")
    )
    run.records.unlink()
    assert [path.name for path in write_comparison(suite)] == ["table.md", "table.csv"]
    assert not [*suite.results.glob("*.png")]


def test_the_map_of_errors(tmp_path, drawn):
    suite = load_suite(write(tmp_path, changes=BOTH))
    for run in all_runs(suite):
        fake(run, 0.0, metrics={"mae": 0.5, "worst_group_mae": 2 * run.settings["alpha"]})
    write_comparison(suite)
    image = drawn["figure.png"].axes[0].images[0]
    assert image.get_clim() == (0, 2) and image.get_cmap().name == "viridis_r"


def test_numbers_of_a_grid_are_those_of_the_file(tmp_path):
    path = write(tmp_path, changes=PAIRS)
    path.write_text(path.read_text().replace("- 300", "- 3.0e+2"))
    assert yaml.safe_load(path.read_text())["grid"] == {"num_pairs": [8, 40, 300.0]}
    with pytest.raises(RecipeError, match="num_pairs"):
        load_suite(path)
