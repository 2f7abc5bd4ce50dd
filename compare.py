# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "gymnasium>=1.0", "matplotlib>=3.8"]
# ///
"""Which variant of a script learns, how reliably, and how much does an update change its actions'
probabilities? A variant is a script with options. Luck decides much: each gets several seeds.

    python compare.py                                    vpg, trpo and ppo as they are
    python compare.py ppo "ppo --clip inf" --seeds 10    two variants, each with 10 seeds
    python compare.py compare.csv                        draw again what was trained
    python compare.py compare.csv "ppo --clip 0.1"       train one more, with the same --steps
variants (section 1) -> runs, one per seed (2) -> CSV (3) -> table (4), picture (5): see README.md
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: a thread for each run is enough
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # else it warns after Ctrl-C
import argparse
import csv
import signal
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr
from importlib import import_module
from io import StringIO
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np

# update: all that is done with one batch, numbered from 1. steps, episodes, seconds: since the run
# began. episode_return: mean of the last 100 returns. kl: sum_a pi_old log(pi_old / pi_new), a mean
# over the batch's states; 0: no change. step_norm: length of the change of theta, all weights.
NUMBERS = ["update", "steps", "episodes", "episode_return", "kl", "step_norm", "seconds"]


# --- 1. Variants ----------------------------------------------------------------------------------
def refuse(message):
    """This cannot be done: say why in one line, and end with status 2."""
    print("compare.py: error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(2)


def parse(argv=None):
    """The options. Variants that end in .csv are `files`. (No usage text: an error is one line.)"""
    parser = argparse.ArgumentParser("compare.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    parser.add_argument("variants", nargs="*", default=["vpg", "trpo", "ppo"], help="or a .csv")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each variant (default: 5)")
    parser.add_argument("--steps", help="environment steps of each run (default: the script's)")
    parser.add_argument("--env", help="Gymnasium environment (default: the script's)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time")
    parser.add_argument("--out", type=Path, help="picture (default: compare.png, or as one .csv)")
    options = parser.parse_intermixed_args(argv)
    options.files = [Path(text) for text in options.variants if text.endswith(".csv")]
    options.variants = [text for text in options.variants if not text.endswith(".csv")]
    shared = {"--steps": options.steps, "--env": options.env}  # options for every script
    options.shared = [f"{name}={value}" for name, value in shared.items() if value is not None]
    data = options.files[0] if len(options.files) == 1 else Path("compare.csv")
    options.out = options.out or data.with_suffix(".png")
    options.csv = options.out.with_suffix(".csv")  # for what is trained: it lies beside the picture
    return options


def check(options):
    """Refuse now, and not only after hours of training, what cannot be trained or written."""
    if options.seeds < 1 or options.jobs < 1:
        refuse("--seeds and --jobs must be at least 1")
    folders = [path for path in (options.out, options.csv) if path.is_dir()]
    if folders or options.out.suffix.lower() not in (".png", ".svg", ".pdf"):
        refuse(f"{options.out} must be a file (.png, .svg or .pdf), and {options.csv} one, too")
    try:
        tempfile.TemporaryFile(dir=options.out.parent).close()
        import_module("matplotlib.figure")  # not at the top: the runs' processes do without it
    except (OSError, ImportError) as error:
        refuse(f"--out {options.out} cannot be made: {error}")


def read_variant(text, options):
    """Check a variant. Return its labels, with which its rows begin, and a text that variants with
    equal settings share. Scripts must have `parse`, `make_env`, `initial_policy`, `train`."""
    script, *typed = text.split() or [""]  # "ppo --clip 0.1" -> "ppo" and ["--clip", "0.1"]
    script = script.removesuffix(".py")
    scripts = {path.stem for path in Path(__file__).parent.glob("*.py")} - {"compare", "test_smoke"}
    if script not in scripts:
        refuse(f"no script {script!r} beside compare.py; there are: {', '.join(sorted(scripts))}")
    module = import_module(script)
    try:
        with redirect_stderr(StringIO()) as printed:
            settings = module.parse([*options.shared, *typed])  # of two values, the later counts
    except SystemExit:  # the script has refused them: a usage, then "error: ..."
        refuse(f"{' '.join([text, *options.shared])!r}: {printed.getvalue().split('error: ')[-1]}")
    if settings.watch:
        refuse(f"{text!r}: --watch is for a single run, of the script itself")
    spec = module.make_env(settings, 1).spec  # has its id, and the return that counts as solved
    labels = {"variant": " ".join([script, *typed]), "env": spec.id}
    labels["threshold"] = "" if spec.reward_threshold is None else str(spec.reward_threshold)
    return labels | {"seed": str(settings.seed)}, f"{script} {settings}"


def read_variants(options, rows):
    """The labels of each variant to train. Of those that have the same settings, only the first."""
    given = group(rows, "variant")  # from .csv files
    variants = {}  # identity -> labels
    for text in options.variants:
        labels, identity = read_variant(text, options)
        if labels["variant"] in given:
            refuse(f"{text!r} is in the .csv file already")
        if identity in variants:
            print(f"{text!r} equals {variants[identity]['variant']!r}: left out", file=sys.stderr)
        else:
            variants[identity] = labels
    if len(group([*rows, *variants.values()], "env")) > 1:
        refuse("returns in different environments cannot be compared: give all the same --env")
    if len(given) + len(variants) > len(COLORS):
        refuse(f"a picture has room for {len(COLORS)} variants, not {len(given) + len(variants)}")
    return list(variants.values())


# --- 2. Runs --------------------------------------------------------------------------------------
def train_run(labels, shared):
    """A run. Returns its rows, as text. If it fails, `error` in the last row says why."""
    script, *typed = labels["variant"].split()
    np.seterr(all="ignore")  # as the scripts do: they stop if weights or KL are no longer finite
    rows = []
    try:
        module = import_module(script)
        settings = module.parse([*shared, *typed, f"--seed={labels['seed']}"])
        policy = module.initial_policy(settings)
        for numbers in module.train(settings, policy):  # after each update, a dict of its numbers
            cells = {name: str(number) for name, number in numbers.items()}
            rows.append(labels | cells | {"error": ""})
    except BaseException as problem:  # noqa: BLE001 (a script may even call sys.exit)
        frames = traceback.extract_tb(problem.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).stem == script]
        place = f", {script}.py, line {lines[-1]}" if lines else ""
        rows = rows or [labels | {"update": ""}]  # it made no update, but it counts
        rows[-1]["error"] = " ".join(f"{type(problem).__name__}: {problem}{place}".split())
    return rows or [labels | {"update": "", "error": "it made no update"}]


def begin_process():
    """In a run's process: leave Ctrl-C to the main process, and end when that ends, even killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_main_process, daemon=True).start()


def end_with_main_process():
    parent_process().join()  # wait for its end
    os._exit(1)  # sys.exit would only end this thread


def train_run_in_process(labels, shared):
    """A run in a new Python process, alone in its pool: a pool breaks if a process is killed."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=begin_process) as pool:
        try:
            return pool.submit(train_run, labels, shared).result()
        except BrokenProcessPool:
            return [labels | {"update": "", "error": "its process was killed"}]


def train_runs(variants, options):
    """Generator: the rows of each run, when it ends. Each of --jobs threads waits for a process."""
    with ThreadPoolExecutor(options.jobs) as threads:
        futures = []
        for number in range(options.seeds):
            for labels in variants:
                labels = labels | {"seed": str(int(labels["seed"]) + number)}
                futures.append(threads.submit(train_run_in_process, labels, options.shared))
        for future in as_completed(futures):
            yield future.result()


def train_and_save(rows, variants, options):
    """Train. After each run, save all rows, and only then print its line. Returns all rows."""
    names = list(group([*rows, *variants], "variant"))
    total = options.seeds * len(variants)
    solved = 0
    for done, run in enumerate(train_runs(variants, options), start=1):
        rows = [*rows, *run]
        rows.sort(key=lambda row: (names.index(row["variant"]), float(row["seed"])))
        write_csv(options.csv, rows)
        solved += solved_after(run) is not None
        line = f"{done} of {total} runs, {solved} solved; last: {run[0]['variant']:<40}"
        end = "\r" if sys.stderr.isatty() and done < total else "\n"  # \r: the next replaces it
        print(line, end=end, file=sys.stderr, flush=True)
    return rows


# --- 3. CSV ---------------------------------------------------------------------------------------
def write_csv(path, rows):
    """All rows, with empty cells where a script has no such column; `error` is the last column."""
    names = dict.fromkeys(name for row in rows for name in row if name != "error")  # each once
    part = path.with_name(f".{path.name}.part")
    with open(part, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*names, "error"])
        writer.writeheader()
        writer.writerows(rows)
    os.replace(part, path)  # so that the file is whole at any moment: the old one or the new one


def read_csv(paths):
    """The rows of all these files, as `write_csv` has written them. They stay text."""
    rows = []
    for path in paths:
        try:
            with open(path, newline="", encoding="utf-8") as file:
                header, *lines = csv.reader(file)
            new = [dict(zip(header, line, strict=True)) for line in lines]  # strict: equally long
            if not new or not {"variant", "env", "threshold", "error"} <= set(header):
                raise ValueError("rows or columns are missing")
            for name in ["seed", *NUMBERS]:
                column(new, name)  # ValueError if a cell holds no number
        except (OSError, KeyError, ValueError, csv.Error) as error:
            refuse(f"{path} holds no data of compare.py: {type(error).__name__} {error}")
        rows += new
    updates = {(row["variant"], row["seed"], row["update"]) for row in rows}
    if len(updates) < len(rows):
        refuse("the .csv files hold a run twice")
    return rows


def group(rows, name):
    """The rows by what they have in a column: a dict of lists, in the order of first appearance."""
    groups = {}
    for row in rows:
        groups.setdefault(row[name], []).append(row)
    return groups


def column(rows, name):
    """The numbers in a column. (A run without an update has a row with no number but its seed.)"""
    return np.array([float(row[name]) for row in rows if row["update"] or name == "seed"])


# --- 4. Table -------------------------------------------------------------------------------------
def solved_after(run):
    """After how many updates the mean of 100 episodes first is at the threshold. None if never."""
    threshold = float(run[0]["threshold"] or "inf")  # some environments have none
    solved = (column(run, "episodes") >= 100) & (column(run, "episode_return") >= threshold)
    return int(np.argmax(solved)) + 1 if solved.any() else None  # argmax: where the first True is


def has_collapsed(run):
    """Whether, after a gain of at least 1/5 of the way to the threshold, half of it was lost."""
    threshold = float(run[0]["threshold"] or "inf")
    returns = column(run, "episode_return")[column(run, "episodes") >= 100]
    first = returns[0] if len(returns) else 0  # 0: no 100 episodes have ended
    gain = returns - first
    best = np.maximum.accumulate(gain)  # the best gain until then
    is_enough = (best > 0) & (best >= abs(threshold - first) / 5)  # abs: first may be above
    return bool((is_enough & (gain <= best / 2)).any())


def interquartile_mean(values):
    """The mean without the lowest and the highest quarter, rounded down: of 5, 1 at each end."""
    quarter = len(values) // 4
    return np.mean(np.sort(values)[quarter : len(values) - quarter])


def as_text(statistic, values, layout):
    """A statistic of the values, or a dash if there are none."""
    return format(statistic(values), layout) if len(values) else "-"


def summarize(rows):
    """A variant's line of the table. A run that failed counts with the rows it has, if any."""
    runs = list(group(rows, "seed").values())
    solved = [run[solved_after(run) - 1] for run in runs if solved_after(run)]
    never = [np.inf] * (len(runs) - len(solved))  # unsolved counts as solved infinitely late
    ends = [run[-1] for run in runs]
    returns = column(ends, "episode_return")
    returns = returns[np.isfinite(returns)]  # nan, if no episode has ended, is left out
    learning = [row for run in runs for row in run[: solved_after(run)]]  # [:None] is all of it
    summary = {
        "solved": f"{len(solved)}/{len(runs)}",
        "after steps": as_text(np.median, [*column(solved, "steps"), *never], ",.0f"),
        "final": as_text(interquartile_mean, returns, ".4g"),
        "(range)": f"{as_text(min, returns, '.4g')} to {as_text(max, returns, '.4g')}",
        "learning KL": as_text(np.median, column(learning, "kl"), ".2g"),  # until solved
        "max KL": as_text(max, column(rows, "kl"), ".2g"),
        "collapsed": f"{sum(map(has_collapsed, runs))}/{len(runs)}",
        "s/update": as_text(np.median, column(ends, "seconds") / column(ends, "update"), ".3f"),
    }
    if not rows[0]["threshold"]:
        summary |= {"solved": "-", "after steps": "-", "collapsed": "-"}
    return summary


def table(rows):
    """A line per variant, 100 columns wide. A name that is too long has lines to itself."""
    layout = "{:<18}{:>7}{:>12}{:>7}{:>17}{:>12}{:>8}{:>10}{:>9}"
    lines = []
    for name, variant_rows in group(rows, "variant").items():
        summary = summarize(variant_rows)
        if any(row["error"] for row in variant_rows):
            name += " (runs failed)"
        if len(name) > 17:
            lines += [name[i : i + 100] for i in range(0, len(name), 100)]
            name = ""
        lines.append(layout.format(name, *summary.values()))
    return "\n".join([layout.format("variant", *summary.keys()), *lines])


# --- 5. Picture -----------------------------------------------------------------------------------
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255"]
LINES = ["-", "--", "-.", ":"]
SMALL = 1e-7  # where the axis of KL begins: what is less is lost in rounding (to float32)


def draw(rows):
    """A figure: returns and KL over the steps, and KL over the change of theta."""
    figure = import_module("matplotlib.figure").Figure(figsize=(10, 8), layout="constrained")
    panels = figure.subplot_mosaic([["return", "return"], ["kl", "step_norm"]])
    for number, (name, own) in enumerate(group(rows, "variant").items()):
        style = {"color": COLORS[number], "linestyle": LINES[number % 4], "label": name}
        draw_curve(panels["return"], own, "episode_return", style)
        draw_curve(panels["kl"], own, "kl", style)
        points = column(own, "step_norm"), column(own, "kl")
        panels["step_norm"].scatter(*points, s=12, color=COLORS[number], linewidth=0, alpha=0.4)
    label_axes(panels, rows)
    mark_slice(panels["step_norm"], column(rows, "step_norm"), column(rows, "kl"))
    return figure


def draw_curve(axis, rows, name, style):
    """The median of the runs and, as a band, their middle half, in 40 windows of the longest run. A
    run counts with its mean in a window. (After one has failed, only the others do.)"""
    numbers = column(rows, name)
    steps = column(rows, "steps") / 1000
    updates = column(rows, "update")
    seeds = column(rows, "seed")
    windows = (updates - 1) * 40 // max(updates)  # 0, 1, ... up to 39
    finite = np.isfinite(numbers)  # a return is nan if no episode has ended
    points = []
    for window in np.unique(windows[finite]):
        inside = finite & (windows == window)
        means = [numbers[inside & (seeds == seed)].mean() for seed in np.unique(seeds[inside])]
        points.append([steps[inside].mean(), *np.percentile(means, (25, 50, 75))])
    centers, low, middle, high = np.array(points).reshape(-1, 4).T  # four columns, if 0 points, too
    axis.fill_between(centers, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axis.plot(centers, middle, linewidth=2, marker="o", markersize=3, **style)


def label_axes(panels, rows):
    """Titles, axes and units of the panels, and a line at the threshold."""
    steps = {"xlabel": f"thousand steps in {rows[0]['env']}", "xlim": (0, None)}
    panels["return"].set(title="Mean return: median, middle half of runs (line: solved)", **steps)
    panels["kl"].set(title="KL per update: median, middle half of runs", **steps)
    panels["return"].legend(loc="lower center", bbox_to_anchor=(0.5, 1.1), ncols=2, handlelength=4)
    panels["return"].axhline(float(rows[0]["threshold"] or "nan"), color="0.3")  # nan: no line
    highest = max(0.1, 2 * max(column(rows, "kl")))
    for axis in panels["kl"], panels["step_norm"]:
        axis.set(ylim=(SMALL, highest), yscale="log", ylabel="KL in nats")


def mark_slice(axis, step_norms, kl):
    """Mark updates (of all variants) that change theta nearly equally, and how their KL differs."""
    axis.set_title("Do equal changes of θ change behavior equally?")
    axis.set(xlim=(1e-4, max(10, max(step_norms))), xscale="log", xlabel="step_norm: ‖Δθ‖")
    visible = kl > SMALL  # the panel shows no others
    if visible.any():  # else there is nothing to mark
        middle = np.percentile(step_norms[visible], 50, method="nearest")  # a real update's
        kls = kl[visible & (0.9 * middle < step_norms) & (step_norms < 1.1 * middle)]
        axis.axvspan(0.9 * middle, 1.1 * middle, color="0.85", zorder=0)
        low, high = np.percentile(kls, (5, 95))
        axis.vlines(middle, low, high, color="black", linewidth=2)
        text = f"‖Δθ‖ {middle:.2g} ± 10 %: {len(kls)} updates\n9 of 10: KL {low:.1g} to {high:.1g}"
        axis.text(0.03, 0.97, text, va="top", transform=axis.transAxes)


# --- 6. Everything together -----------------------------------------------------------------------
def main(argv=None):
    options = parse(argv)
    check(options)
    rows = read_csv(options.files)
    variants = read_variants(options, rows)
    if variants and options.csv.exists() and options.csv not in options.files:
        older = options.csv.rename(options.csv.with_suffix(time.strftime(".%Y-%m-%d-%H%M%S.csv")))
        print(f"{options.csv} is not overwritten: it is now {older}", file=sys.stderr)
    rows = train_and_save(rows, variants, options)
    print(table(rows))
    failures = [row for row in rows if row["error"]]
    for row in failures:
        print("failed: {variant}, seed {seed}: {error}".format(**row), file=sys.stderr)
    drawable = [row for row in rows if row["update"]]
    if drawable:
        draw(drawable).savefig(options.out, dpi=110)
        print(f"picture: {options.out}, data: {options.csv if variants else 'as given'}")
    return min(1, len(failures))  # the exit status


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # Ctrl-C: do not wait for the runs
    sys.exit(main())
