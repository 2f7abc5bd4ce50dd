"""What compare.py does: variants, runs, data, table and picture, with real and with toy scripts."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy, as in the scripts
import csv
import importlib
import multiprocessing
import shutil
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
SOURCE = HERE if (HERE / "compare.py").exists() else HERE.parent  # beside the scripts, or below
FOLDER = Path(tempfile.mkdtemp())  # compare.py takes the scripts that lie beside it
pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # matplotlib's own, as it grows old
]
TOY = '''
"""Ten updates whose figures are known; --fail N: the N-th raises; --quiet 1: no row at all;
--wait N: sleeps so many seconds first."""
import argparse
import dataclasses
import time


@dataclasses.dataclass
class Settings:
    env: str = "CartPole-v1"
    seed: int = 0
    steps: int = 1000
    gain: float = 40.0
    fail: int = 0
    quiet: int = 0
    wait: int = 0


def parse(argv=None):
    parser = argparse.ArgumentParser("toy.py")
    for field in dataclasses.fields(Settings):
        parser.add_argument(f"--{field.name}", default=field.default, type=field.type)
    return Settings(**vars(parser.parse_args(argv)))


def train(settings):
    time.sleep(settings.wait)
    for n in range(1, 0 if settings.quiet else 11):
        if n == settings.fail:
            raise FloatingPointError(f"update {n} is no longer finite: take smaller steps")
        value = float("nan") if n == 1 else settings.gain * n + settings.seed
        row = {"update": n, "steps": settings.steps * n // 10, "episode_return": value}
        row |= {"kl": 0.0 if n % 5 == 0 else 0.001 * n, "step_norm": 0.1 * n}
        yield row | {"solved": value >= 475, "seconds": 0.5 * n, "own": 7}
'''


@pytest.fixture(scope="module", autouse=True)
def folder():
    sys.path.insert(0, str(FOLDER))  # before what other tests have put there: runs inherit it
    yield
    sys.path.remove(str(FOLDER))
    shutil.rmtree(FOLDER, ignore_errors=True)


for name in ("compare", "vpg", "trpo", "ppo"):
    shutil.copy(SOURCE / f"{name}.py", FOLDER)
(FOLDER / "toy.py").write_text(TOY, encoding="utf-8")
(FOLDER / "broken.py").write_text("def train(settings:\n", encoding="utf-8")
(FOLDER / "lacking.py").write_text("train = 1\n", encoding="utf-8")
(FOLDER / "poor.py").write_text(
    TOY.replace('"kl"', '"distance"').replace("toy.py", "poor.py"), encoding="utf-8"
)
sys.path.insert(0, str(FOLDER))
compare = importlib.import_module("compare")


# --- Helpers --------------------------------------------------------------------------------------
def settings(text):
    return compare.parse([text])[1][text][2]


def toy(gain=40.0, seed=0):
    """The rows of one toy run."""
    return list(compare.load("toy").train(compare.load("toy").Settings(gain=gain, seed=seed)))


def data(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def untimed(rows):
    return [{key: cell for key, cell in row.items() if key != "seconds"} for row in rows]


def lab(where, *words):
    """Run compare.main in a folder: status, rows of the CSV, files."""
    status = compare.main([*words, "--out", str(where / "x.png")])
    there = sorted(path.name for path in where.iterdir())
    return status, data(where / "x.csv") if "x.csv" in there else [], there


# --- Command line ---------------------------------------------------------------------------------
def test_parse_takes_variants_as_typed():
    """Without any, the three scripts as they are. Options of all; a variant's own come last."""
    variants = compare.parse([])[1]
    assert list(variants) == ["vpg", "trpo", "ppo"]
    for name, (script, _, given) in variants.items():
        assert script == name and vars(given) == vars(importlib.import_module(name).Settings())
    words = [
        "ppo --clip inf",
        "--steps",
        "500",
        "ppo --steps 7",
        "--env=Acrobot-v1",
        "ppo  --clip inf",
    ]
    options, variants = compare.parse(words)
    assert list(variants) == ["ppo --clip inf", "ppo --steps 7"]  # twice the same: once
    chosen = [(given.clip, given.steps, given.env) for _, _, given in variants.values()]
    assert chosen == [(float("inf"), 500, "Acrobot-v1"), (0.2, 7, "Acrobot-v1")]
    assert (options.seeds, str(options.out), options.show) == (5, "compare.png", False)


WRONG = {
    "nothing": "no script 'nothing'",
    "compare": "no script 'compare'",
    "": "no script ''",
    "ppo --clip -1": "clip must be from 0 to inf",
    "ppo --klip 1": "unrecognized arguments: --klip",
    "ppo 'a": "No closing quotation",
    "trpo --env Pendulum-v1": "env must have",
    "broken": "broken.py: SyntaxError",
    "lacking": "lacking.py: AttributeError",
    "--seeds=0": "--seeds must be from 1 to 1000",
    "--seeds=1000000000": "--seeds must be from 1 to 1000",
    "--jobs=-1": "at least 1",
    "--steps=0": "steps must be from 1",
    "--out=x.gif": "must end in .png, .svg, .pdf",
    "--out=picture.png": "no folder, nor its .csv: picture.png",
    "--out=data.png": "no folder, nor its .csv: data.png",
    "--out=nowhere/x.png": "no file can be written in nowhere",
}


@pytest.mark.parametrize("wrong", WRONG)
def test_parse_refuses_before_anything_runs(wrong, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = Path("picture.png"), Path("data.csv")
    for folder in there:
        folder.mkdir()
    with pytest.raises(SystemExit) as stopped:
        compare.main(["vpg", wrong])
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and not printed.out and {*Path().iterdir()} == {*there}
    assert WRONG[wrong] in printed.err.splitlines()[-1]


# --- Runs and data --------------------------------------------------------------------------------
def test_data_have_every_row_in_order_whatever_the_jobs(tmp_path):
    """Variant as given, then seed, then update; one column per key; empty where there is none."""
    words = ["trpo --hidden 4", "ppo --epochs 1 --seed 5", "--steps", "3000", "--seeds", "2"]
    tables = []
    for jobs in "12":
        (tmp_path / jobs).mkdir()
        status, rows, files = lab(tmp_path / jobs, *words, "--jobs", jobs)
        assert status == 0 and files == ["x.csv", "x.png"]
        tables.append(untimed(rows))
    assert tables[0] == tables[1]
    order = [(row["variant"], int(row["seed"]), int(row["update"])) for row in rows]
    runs = [("trpo --hidden 4", 0), ("trpo --hidden 4", 1)]
    runs += [("ppo --epochs 1 --seed 5", 5), ("ppo --epochs 1 --seed 5", 6)]
    assert order == [(*run, update) for run in runs for update in (1, 2, 3)]
    columns = "variant seed update steps episode_return kl entropy step_norm explained_variance"
    columns = [*columns.split(), "solved", "seconds"]
    own = ["surrogate_gain", "backtracks", "clip_fraction", "epochs"]
    assert list(rows[0]) == columns + own
    assert [[row[key] != "" for key in own] for row in rows] == 6 * [[1, 1, 0, 0]] + 6 * [
        [0, 0, 1, 1]
    ]
    module = importlib.import_module("ppo")
    alone = list(module.train(module.Settings(steps=3000, epochs=1, seed=6)))
    for row, cells in zip(alone, rows[-3:], strict=True):
        assert all(cells[key] == str(row[key]) for key in row.keys() - {"seconds"})


FAILURES = {
    "toy --fail 4": "update 4 is no longer finite: take smaller steps",
    "toy --quiet 1": "no rows",
    "poor": "the rows lack kl",
}


@pytest.mark.parametrize("text", FAILURES)
def test_a_failing_variant_leaves_the_others(text, tmp_path, capsys):
    status, rows, files = lab(tmp_path, text, "toy", "--seeds", "2", "--jobs", "2")
    assert status == 1 and files == ["x.csv", "x.png"]
    assert [row["variant"] for row in rows] == 20 * ["toy"]
    printed = capsys.readouterr()
    failed = [f"failed: {text}, seed {seed}: {FAILURES[text]}" for seed in (0, 1)]
    assert printed.err.splitlines()[-2:] == failed
    assert [line.split()[:2] for line in printed.out.splitlines()[1:]] == [["toy", "0/2"]]


def test_all_variants_fail(tmp_path, capsys):
    status, _, files = lab(tmp_path, "toy --fail 1", "--seeds", "1")
    printed = capsys.readouterr()
    assert status == 1 and not files and not printed.out and len(printed.err.splitlines()) == 1


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupt_keeps_what_has_finished(after, tmp_path, capsys, monkeypatch):
    """Exit status 130, picture and data of the finished runs, the others named, no process left."""
    original = compare.progress

    def progress(variants, runs, rows, run, ended, began):
        original(variants, runs, rows, run, ended, began)
        if len(ended) == after:
            raise KeyboardInterrupt

    monkeypatch.setattr(compare, "progress", progress)
    status, rows, files = lab(tmp_path, "toy", "toy --gain 3", "--seeds", "2", "--jobs", "1")
    assert status == 130 and files == ["x.csv", "x.png"] and not multiprocessing.active_children()
    runs = [("toy", "0"), ("toy --gain 3", "0"), ("toy", "1"), ("toy --gain 3", "1")]
    kept = sorted(runs[:after])
    assert [(row["variant"], row["seed"]) for row in rows] == [
        run for run in kept for _ in range(10)
    ]
    last = capsys.readouterr().err.splitlines()[-1]
    missing = "; ".join(f"{text}, seed {seed}" for text, seed in runs[after:])
    assert last == f"interrupted, {4 - after} of 4 missing: {missing}"


def test_an_interrupt_ends_the_runs_that_go_on(tmp_path, monkeypatch):
    """They are not waited for."""
    processes, original = [], compare.start

    def start(*given):
        receiving, process = original(*given)
        processes.append(process)
        return receiving, process

    def progress(variants, runs, rows, run, ended, began):
        if ended:
            raise KeyboardInterrupt

    monkeypatch.setattr(compare, "start", start)
    monkeypatch.setattr(compare, "progress", progress)
    words = ["toy", "toy --wait 20", "--seeds", "1", "--jobs", "2"]
    status, rows, _ = lab(tmp_path, *words)
    assert status == 130 and {row["variant"] for row in rows} == {"toy"}
    assert processes[1].exitcode  # 0: it came to its end


def test_an_interrupt_before_any_run_has_finished(tmp_path, capsys, monkeypatch):
    def progress(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "progress", progress)
    status, _, files = lab(tmp_path, "toy", "--seeds", "2")
    assert status == 130 and not files and "2 of 2 missing" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(terminal, capsys, monkeypatch):
    """One line per finished run; on a terminal one that is rewritten and fits its width."""
    variants = compare.parse(["toy"])[1]
    runs, ended = [("toy", 0), ("toy", 1)], {("toy", 0): ""}
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setattr(
        compare.os, "get_terminal_size", lambda _: compare.os.terminal_size((50, 9))
    )
    monkeypatch.setattr(sys.stderr, "fileno", lambda: 2)
    monkeypatch.setattr(compare.time, "perf_counter", lambda: 103.0)
    rows = {("toy", 0): toy(), ("toy", 1): toy(seed=1)[:5]}  # 1.5 of 2 runs, in 3 s
    for run in runs:
        compare.progress(variants, runs, rows, run, ended, 100.0)
    printed = capsys.readouterr().err
    line = "1/2 runs, 1 s left | toy, seed {}: {} steps, return {:.1f}, kl {}"
    lines = [line.format(0, 1000, 400, 0), line.format(1, 500, 201, 0)]
    if terminal:
        assert printed == "".join(f"\r{line[:49]:<49}" for line in lines)
    else:
        assert printed == lines[0] + "\n"


# --- Table ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", range(1, 13))
def test_interquartile_mean(count):
    values = np.random.default_rng(count).permutation(np.arange(count) ** 2.0)
    kept = sorted(values)[count // 4 :]
    while len(kept) > count - 2 * (count // 4):
        kept.pop()
    assert np.isclose(compare.interquartile_mean(values), sum(kept) / len(kept))


COLLAPSES = [  # returns, threshold, how often it collapsed
    ([20, 200, 500, 500, 490], 475, 0),
    ([20, 200, 500, 261, 500], 475, 0),  # has lost 239 of a gain of 480: less than half
    ([20, 200, 500, 260, 500], 475, 1),
    ([20, 500, 30, 500, 30, 500], 475, 2),  # recovered in between
    ([20, 500, 30, 100, 30, 100, 20], 475, 1),  # fell once and stayed low
    ([20, *range(500, 100, -25)], 475, 1),  # slowly, but by 250 within ten updates
    ([20, *range(500, 100, -10)], 475, 0),  # slower than that
    ([-500, -300, -100, -110, -320, -100], -100, 1),  # negative: lost 220 of a gain of 400
    ([-500, -100, -290, -100], -100, 0),
    ([20, 60, 20, 60, 20], 475, 0),  # a gain of 40 is noise
    ([20, 60, 20, 60, 20], None, 2),  # which cannot be said without a threshold
    ([20], 475, 0),
    ([500, 400, 300, 9], 475, 0),  # nothing had been gained
]


@pytest.mark.parametrize(("returns", "threshold", "count"), COLLAPSES)
def test_collapses(returns, threshold, count):
    assert compare.collapses(np.array(returns, float), threshold) == count


def test_table():
    """Solved runs and their median step, interquartile mean, KL, seconds; 120 characters wide."""
    long = "toy --gain 50 --fail 0 --quiet 0 --seed 1234567 --env CartPole-v1"
    variants = compare.parse(["toy", "toy --gain 100", long])[1]
    results = {"toy": [toy(), toy(seed=1)], "toy --gain 100": [toy(100, seed) for seed in range(5)]}
    results[long] = results["toy"]
    header, *lines = compare.table(results, variants).splitlines()
    assert [len(line) for line in (header, *lines)] == 4 * [120]
    assert lines[0].split("  ")[0] == "toy" and lines[2].startswith("toy --gain 50 -")
    assert lines[2].split("  ")[0].endswith("--env CartPole-v1"[-15:])
    first, second = (line[36:].split() for line in lines[:2])
    assert first == ["0/2", "-", "400.5", "(400.0", "to", "401.0)", "0.0035", "0.009", "0", "0.500"]
    assert second == [
        "5/5",
        "500",
        "1002.0",
        "(1000.0",
        "to",
        "1004.0)",
        "0.0035",
        "0.009",
        "0",
        "0.500",
    ]


# --- Picture --------------------------------------------------------------------------------------
def drawn(texts, results=None):
    """The figure of these variants, drawn, and its four parts by title ("": the legend's)."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    results = results or {
        text: [toy(20.0 + n, seed) for seed in (0, 1)] for n, text in enumerate(texts)
    }
    compare.draw(figure, results, compare.parse(texts)[1])
    figure.draw_without_rendering()
    return figure, {axis.get_title(): axis for axis in figure.axes}


TITLES = "Return", "Policy distance per update", "Policy distance against weight distance"
NAMES = ["toy", *(f"toy --gain {gain}" for gain in range(7))]


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_picture_has_one_artist_per_variant_and_panel(count):
    """With the variant's label and color, the same in each panel; log axes; marks; all visible."""
    figure, panels = drawn(NAMES[:count])
    assert set(panels) == {*TITLES, ""}
    for title in TITLES:
        artists = panels[title].collections if title == TITLES[2] else panels[title].lines
        named = {a.get_label(): a for a in artists if not a.get_label().startswith("_")}
        assert list(named) == NAMES[:count]
        colors = [
            a.get_facecolor()[0] if title == TITLES[2] else a.get_color() for a in named.values()
        ]
        assert [to_hex(color) for color in colors] == [c.lower() for c in compare.COLORS[:count]]
    thin = [line for line in panels["Return"].lines if line.get_linewidth() == 0.6]
    assert len(thin) == (2 * count if count < 5 else 0)  # one a seed, while there is room
    scales = [(panels[title].get_xscale(), panels[title].get_yscale()) for title in TITLES]
    assert scales == [("linear", "linear"), ("linear", "log"), ("log", "log")]
    for title, marks in zip(TITLES, ([475], [0.01, 0.1], [0.01, 0.1])):
        heights = [
            y
            for line in panels[title].lines
            for y in set(line.get_ydata())
            if len(line.get_ydata()) == 2
        ]
        assert [y for y in heights if y in marks] == marks
        low, high = panels[title].get_ylim()
        assert all(low <= mark <= high for mark in marks)
        assert panels[title].get_xlabel() and panels[title].get_ylabel()
    legend = panels[""].get_legend()
    entries = [text.get_text().replace("\n", " ") for text in legend.get_texts()]
    assert entries == [f"{name} KL 0 in 4 of 20 updates" for name in NAMES[:count]]
    boxes = [panels[title].get_tightbbox() for title in TITLES] + [legend.get_window_extent()]
    for number, box in enumerate(boxes):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, "clipped"
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, "clipped"
        assert not any(box.overlaps(other) for other in boxes[:number]), "overlap"


def test_picture_shows_the_rows():
    """Curve: interquartile mean over seeds. KL: median of the moved updates. Points: each of them."""
    runs = [toy(20, seed) for seed in range(4)]
    _, panels = drawn(["toy"], {"toy": runs})
    line = next(line for line in panels["Return"].lines if line.get_label() == "toy")
    steps, values = line.get_data()
    assert len(steps) == 150 and steps[0] == 200 and steps[-1] == 1000
    assert np.allclose(values, steps / 5 + 1.5)  # 20 n + seed at 100 n steps; seeds 1 and 2 remain
    line = next(line for line in panels[TITLES[1]].lines if line.get_label() == "toy")
    steps, values = line.get_data()
    assert np.allclose(steps, np.arange(50, 900, 100))  # nine windows: the tenth update moved 0
    assert np.allclose(
        values, [0.001 * n if n != 5 else np.nan for n in range(1, 10)], equal_nan=True
    )
    points = panels[TITLES[2]].collections[-1].get_offsets()
    assert np.allclose(points, [(0.1 * n, 0.001 * n) for n in range(1, 10) if n != 5] * 4)


def test_picture_of_runs_without_episodes_or_movement():
    """No finished episode, no KL above 0: empty panels, no error."""
    still = [row | {"episode_return": float("nan"), "kl": 0.0} for row in toy()]
    drawn(["toy"], {"toy": [still]})
    drawn(["toy", "toy --gain 50"], {"toy --gain 50": [toy()]})  # the other one failed
    drawn(["toy"], {"toy": [toy()[:1]]})  # one update


@pytest.mark.parametrize("kind", ["png", "svg", "pdf", "PNG"])
def test_picture_file(kind, tmp_path):
    """1100 x 770 pixels as .png; the others are what their names say."""
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind.lower()]
    compare.save(tmp_path / f"x.{kind}", {"toy": [toy()]}, compare.parse(["toy"])[1])
    content = (tmp_path / f"x.{kind}").read_bytes()
    assert content.startswith(begins) and len(content) < 300_000
    if kind == "png":
        assert struct.unpack(">II", content[16:24]) == (1100, 770)
    assert {path.name for path in tmp_path.iterdir()} == {"x." + kind, "x.csv"}
