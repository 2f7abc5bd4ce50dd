"""What compare.py does: variants, runs, CSV, table and picture, with real and with toy scripts."""

import csv
import importlib
import itertools
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
SOURCE = HERE if (HERE / "compare.py").exists() else HERE.parent
TEMPORARY = tempfile.TemporaryDirectory()  # compare.py takes the scripts that lie beside it
FOLDER = Path(TEMPORARY.name)
TOY = '''
"""Ten updates with known figures. --fail N: the N-th raises, exits or kills its process (--how)."""
import argparse, dataclasses, os, sys, time, types
FIELDS = {"env": "CartPole-v1", "seed": 0, "steps": 1000, "watch": 0, "gain_factor": 60.0,
          "fall": 0.0, "fail": 0, "how": "raise", "wait": 0.0, "updates": 10}
Settings = dataclasses.make_dataclass(
    "Settings", [(k, type(v), dataclasses.field(default=v)) for k, v in FIELDS.items()])
def parse(argv=None):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, default in FIELDS.items():
        parser.add_argument("--" + name.replace("_", "-"), default=default, type=type(default))
    return Settings(**vars(parser.parse_args(argv)))
def make_env(settings, n):
    threshold = None if settings.env == "Free" else 475
    spec = types.SimpleNamespace(id=settings.env + "!", reward_threshold=threshold)
    return types.SimpleNamespace(spec=spec)
def initial_policy(settings): pass
def fail(how):
    if how == "raise":
        raise FloatingPointError("no longer finite")
    {"exit": sys.exit, "kill": os._exit}[how](7)
def train(settings, policy):
    for n in range(1, settings.updates + 1):
        time.sleep(settings.wait)
        if n == settings.fail:
            fail(settings.how)
        value = settings.gain_factor * n + settings.seed**2 - settings.fall * (n > 8)
        yield {"update": n, "steps": 100 * n, "episodes": 50 * n, "kl": 0.001 * n * (n % 5 > 0),
               "episode_return": float("nan") if n == 1 else value, "step_norm": 0.1 * n,
               "seconds": 0.5 * n, "own": 7}
'''
FAILING_LINE = 1 + TOY[: TOY.index("raise FloatingPointError")].count("\n")
for script in ("compare", "vpg", "trpo", "ppo"):
    shutil.copy(SOURCE / f"{script}.py", FOLDER)
(FOLDER / "toy.py").write_text(TOY, encoding="utf-8")
(FOLDER / "broken.py").write_text("raise RuntimeError('at import')\n", encoding="utf-8")
sys.path.insert(0, str(FOLDER))
compare = importlib.import_module("compare")
sys.path.remove(str(FOLDER))


@pytest.fixture
def lab(tmp_path, monkeypatch, capsys):
    """A function that runs compare.main in an empty folder: exit status, table, errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(FOLDER)  # new processes inherit it

    def run(*words):
        try:
            status = compare.main(list(words))
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return status, printed.out.partition("picture:")[0], printed.err

    return run


def data(path="compare.csv"):
    return list(csv.DictReader(Path(path).read_text(encoding="utf-8").splitlines()))


def runs_of(rows):
    return list(dict.fromkeys((row["variant"], row["seed"]) for row in rows))


def figures(table):  # the lines that have figures, as lists of words, without the name
    return [line[18:].split() for line in table.splitlines()[1:] if len(line) == 100]


# --- Runs and CSV ---------------------------------------------------------------------------------
def test_csv_is_the_same_with_one_and_two_jobs(lab):
    words = ["trpo --hidden 4", "ppo --epochs 1 --seed 5", "--steps", "2600", "--seeds", "2"]
    tables = []
    for jobs in "12":
        assert lab(*words, "--jobs", jobs, "--out", f"{jobs}.png")[0] == 0
        rows = data(f"{jobs}.csv")
        tables.append([{k: cell for k, cell in row.items() if k != "seconds"} for row in rows])
    assert tables[0] == tables[1]
    columns = "variant env threshold seed update steps episodes episode_return kl entropy step_norm"
    assert list(rows[0])[:13] == [*columns.split(), "explained_variance", "seconds"]
    assert list(rows[0])[-1] == "error" and rows[0]["backtracks"] and not rows[-1]["backtracks"]
    assert list(rows[0].values())[1:4] == ["CartPole-v1", "475.0", "0"]
    assert [run[-1] for run in runs_of(rows)] == ["0", "1", "5", "6"]
    settings = compare.import_module("ppo").Settings(steps=2600, epochs=1, seed=6)
    *_, last = sys.modules["ppo"].train(settings, sys.modules["ppo"].initial_policy(settings))
    assert all(rows[-1][key] == str(last[key]) for key in last.keys() - {"seconds"})


def test_csv_is_whole_before_each_line_of_progress(lab, monkeypatch):
    """Each write replaces the file at once, and holds all runs so far; a failed one changes nothing."""
    seen = []
    original = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (original(*paths), seen.append(data())))
    _, _, errors = lab("toy", "--seeds", "3", "--jobs", "1")
    assert [len(runs_of(rows)) for rows in seen] == [1, 2, 3]
    assert [line[:6] for line in errors.splitlines()] == ["1 of 3", "2 of 3", "3 of 3"]
    before = Path("compare.csv").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: os.stat("nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        lab("compare.csv", "toy --fall 1")
    assert Path("compare.csv").read_bytes() == before
    monkeypatch.setattr(os, "replace", original)
    _, _, errors = lab("toy", "--seeds", "1")  # the older file is kept, under another name
    (older,) = Path().glob("compare.*.csv")
    assert older.read_bytes() == before and str(older) in errors and len(data()) == 10


def test_several_files(lab):
    """Runs of one variant in two files are one row of the table; in two environments they are not."""
    lab("toy", "toy --fall 300", "--seeds", "2")
    lines = Path("compare.csv").read_text().splitlines(keepends=True)
    for seed, other in ("01", "10"):
        content = "".join(line for line in lines if f",475,{other}," not in line)
        Path(f"{seed}.csv").write_text(content)
    status, table, _ = lab("0.csv", "1.csv")
    assert (status, table) == (0, lab("compare.csv")[1]) and len(figures(table)) == 2
    Path("1.csv").write_text(content.replace("CartPole", "Other"))
    assert lab("0.csv", "1.csv")[0] == 2 and lab("0.csv", "0.csv")[0] == 2
    assert lab("0.csv")[0] == 0 and Path("0.png").exists()


def test_drawing_again_and_adding(lab):
    _, table, _ = lab("toy", "toy --updates 3", "toy --fail 4", "--seeds", "2")
    before = [Path(name).read_bytes() for name in ("compare.png", "compare.csv")]
    _, again, errors = lab("compare.csv")
    assert again == table and "failed: toy --fail 4" in errors
    assert [Path(name).read_bytes() for name in ("compare.png", "compare.csv")] == before
    _, longer, _ = lab("compare.csv", "toy --fall 300", "--seeds", "1")
    assert longer.startswith(table) and len(figures(longer)) == 4
    rows = data()
    assert runs_of(rows)[-2:] == [("toy --fail 4", "1"), ("toy --fall 300", "0")]
    for given in ("toy", "toy.py", "compare.csv"):
        assert lab("compare.csv", given)[0] == 2 and data() == rows


@pytest.mark.parametrize(
    ("text", "left", "message"),  # how many rows are kept, and why it fails
    [
        ("toy --fail 4", 3, f"FloatingPointError: no longer finite, toy.py, line {FAILING_LINE}"),
        ("toy --fail 1", 1, f"FloatingPointError: no longer finite, toy.py, line {FAILING_LINE}"),
        ("toy --fail 4 --how exit", 3, f"SystemExit: 7, toy.py, line {FAILING_LINE + 1}"),
        ("toy --fail 4 --how kill", 1, "its process was killed"),
        ("toy --updates 0", 1, "it made no update"),
    ],
)
def test_failed_runs_count_and_take_nothing_along(text, left, message, lab):
    status, table, errors = lab("toy", text, "--seeds", "2", "--jobs", "2")
    rows = [row for row in data() if row["variant"] == text]
    assert [bool(row["error"]) for row in rows] == ([False] * (left - 1) + [True]) * 2
    assert rows[-1]["error"] == message
    assert status == 1 and f"failed: {text}, seed 1: {message}" in errors and "(runs f" in table
    assert figures(table)[0][0] == "2/2" and figures(table)[1][0] == "0/2"
    assert Path("compare.png").exists() and lab("compare.csv")[1] == table


def test_errors_of_scripts_and_of_drawing(lab, monkeypatch):
    with pytest.raises(RuntimeError, match="at import"):
        lab("toy", "broken")
    monkeypatch.setattr(compare, "label_axes", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        lab("toy", "--seeds", "1")
    assert sorted(os.listdir()) == ["compare.csv"] and len(data()) == 10


@pytest.mark.parametrize(
    ("returns", "collapsed"),
    [
        ([20, 200, 500, 261, 500], False),  # lost 239 of a gain of 480
        ([20, 200, 500, 260, 500], True),
        ([20, 110, 20], False),  # a gain of 90 of 455 is less than a fifth
        ([20, 111, 65.5], True),
        ([200, 20, 20], False),  # nothing had been gained
    ],
)
def test_collapsed(returns, collapsed):
    row = {"update": "1", "threshold": "475.0"}
    rows = [row | {"episodes": "99", "episode_return": str(value)} for value in (500, 9)]
    rows += [row | {"episodes": "100", "episode_return": str(value)} for value in returns]
    assert compare.has_collapsed(rows) == collapsed and not compare.has_collapsed(rows[:3])
    first = next((n for n, value in enumerate(returns, start=3) if value >= 475), None)
    assert compare.solved_after(rows) == first


def test_table(lab):
    """Against figures made by hand from what the toy yields: 60 n + seed^2 in update n."""
    words = ["toy", "toy --gain-factor 50 --fall 300", "toy --updates 1"]
    _, table, _ = lab(*words, "--seeds", "5")
    assert max(map(len, table.splitlines())) <= 100 and words[1] in table.splitlines()
    solved, fallen, single = figures(table)
    (free,) = figures(lab("toy --env Free", "--seeds", "5", "--out", "free.png")[1])
    kl = [0.001 * n * (n % 5 > 0) for n in range(1, 11)]
    until, whole = (f"{statistics.median(part):.2g}" for part in (kl[:8], kl))  # 480 in update 8
    assert solved == ["5/5", "800", "604.7", "600", "to", "616", until, "0.009", "0/5", "0.500"]
    assert fallen == ["0/5", "inf", "204.7", "200", "to", "216", whole, "0.009", "5/5", "0.500"]
    assert free[0] == "-" and free[-2] == "-"
    assert single == ["0/5", "inf", "-", "-", "to", "-", "0.001", "0.001", "0/5", "0.500"]


VARIANTS = ["toy", *(f"toy --gain-factor {n} --updates {n}" for n in range(2, 9))]
PICTURES = [VARIANTS[:1], VARIANTS[:2], VARIANTS[:3], VARIANTS, ["toy --updates 1"]]
PICTURES += [["ppo --steps 3000", "trpo --steps 3000"], ["vpg --learning-rate 0 --steps 1300"]]


@pytest.mark.parametrize("texts", PICTURES)
@pytest.mark.filterwarnings("error")
def test_picture(texts, lab, monkeypatch):
    """Every variant, within the page; no two labels of an axis overlap, by matplotlib's own boxes."""
    figure_class = importlib.import_module("matplotlib.figure").Figure
    saved = []
    original = figure_class.savefig
    keep = lambda self, *a, **k: (saved.append(self), original(self, *a, **k))
    monkeypatch.setattr(figure_class, "savefig", keep)
    assert lab(*texts, "--seeds", "2")[0] == 0 and Path("compare.png").stat().st_size <= 300_000
    legend = saved[0].axes[0].get_legend()
    assert [text.get_text() for text in legend.get_texts()] == texts
    for panel, one in itertools.product(saved[0].axes, ["xaxis", "yaxis"]):
        box = panel.get_tightbbox()
        assert min(box.x0, box.y0) >= 0 and box.x1 <= 1100 and box.y1 <= 880
        labels = getattr(panel, one).get_ticklabels(which="both")
        low, high = getattr(panel, one).get_view_interval()
        places = [low <= label.get_position()[one == "yaxis"] <= high for label in labels]
        boxes = [t.get_window_extent() for t in itertools.compress(labels, places) if t.get_text()]
        assert not any(compare.np.isnan(line.get_ydata()).any() for line in panel.lines)
        assert len(boxes) >= 2 and panel.get_title() and panel.get_xlabel()
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


# --- Options and bad input ------------------------------------------------------------------------
def test_variants_are_read_as_typed(lab, capsys):
    words = ["ppo.py", "ppo --clip 0.2", "ppo  --clip=0.2", "ppo --epochs 2", "--steps", "9"]
    for given, names in [(words, ["ppo", "ppo --epochs 2"]), ([], ["vpg", "trpo", "ppo"])]:
        assert [one["variant"] for one in compare.read_variants(compare.parse(given), [])] == names
        assert capsys.readouterr().err.count("equals 'ppo': left out") == len(given[::4])


BAD = """nothing > no script 'nothing' beside compare.py; there are: broken, ppo, toy
compare > no script 'compare' # toy --klip 1 > arguments: --klip # toy --gain 3 > arguments: --gain
trpo --cg-iterations 0 > --cg-iterations 0': cg_iterations must be from 1
ppo --env Nowhere-v0 > Nowhere # ppo --watch > --watch # --seed=7 > --seed=7 # --seeds=0 > --seeds
--seeds=two > invalid int # --jobs=0 > --jobs # vpg --steps 0 > steps must be
--out=x.gif > .png, .svg or .pdf # --out=nowhere/x.png > nowhere # --out=/proc/x.png > /proc
none.csv > none.csv # other.csv > other.csv # cut.csv > cut.csv # word.csv > word.csv
empty.csv > empty.csv # more.csv > more.csv # binary.csv > binary.csv # --out=folder.png > folder.csv
nine > room for 8 # toy --env Free > same --env # no_env.csv > no_env.csv # seed.csv > seed.csv"""
CASES = [case.split(" > ") for line in BAD.splitlines() for case in line.split(" # ")]


@pytest.mark.parametrize(("bad", "message"), CASES)
def test_bad_input_is_one_line_before_training(bad, message, lab):
    header = "variant,env,threshold,seed,steps,episodes,episode_return,kl,step_norm,seconds,update"
    files = {"other": "a,b\n1,2\n", "empty": f"{header},error\n", "binary": "\0\1\2\n\3"}
    files["word"] = files["empty"] + "toy,E,475,0,100,9,3.5,word,0.1,0.5,1,\n"
    files["more"] = files["word"].replace("word", "0.1").replace("1,\n", "1,,\n")
    files["cut"] = files["word"].replace("word", "0.1") + "toy,E,475,0,100,9,3.5,0.1,0.1,0.5,2"
    files["seed"] = files["empty"] + "toy,E,475,zz,,,,,,,,its process was killed\n"
    files["no_env"] = files["word"].replace("env", "e").replace("word", "0.1")
    for name, content in files.items():
        Path(f"{name}.csv").write_text(content, encoding="utf-8")
    Path("folder.csv").mkdir()
    before = sorted(os.listdir())
    status, table, errors = lab(*(VARIANTS + ["toy --fall 1"] if bad == "nine" else ["toy", bad]))
    assert (status, table, len(errors.splitlines())) == (2, "", 1) and message in errors
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize("name", [] if os.name == "nt" else ["SIGTERM", "SIGINT", "SIGKILL"])
def test_signals(name, tmp_path):
    """The CSV holds each run whose line was printed, and five seconds later no process is left."""
    command = f"{sys.executable}|{FOLDER / 'compare.py'}|toy|toy --wait 3|--seeds|3|--jobs|2"
    how = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True, "cwd": tmp_path}
    process = subprocess.Popen(command.split("|"), **how)
    printed = [process.stderr.readline() for _ in range(2)]  # the others take 30 s
    process.send_signal(getattr(signal, name))
    printed += process.communicate(timeout=5)[1].splitlines()
    ended = [line for line in printed if " of 6 runs" in line]
    assert len(ended) == 2 == len(runs_of(data(tmp_path / "compare.csv")))
    assert process.returncode == (130 if name == "SIGINT" else -getattr(signal, name))
    for _ in range(50):
        lines = subprocess.check_output(["ps", "-eo", "pgid=,stat="], text=True).splitlines()
        left = [line for line in lines if line.split()[0] == str(process.pid) and "Z" not in line]
        time.sleep(0.1 * bool(left))
    assert not left
