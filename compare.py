# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "gymnasium>=1.0", "matplotlib>=3.8"]
# ///
"""Train variants of the scripts beside this file with several seeds, and compare them.

    python compare.py                                    vpg, trpo and ppo as they are
    python compare.py ppo "ppo --clip inf" --seeds 10    two variants: a script and its options
    python compare.py compare.csv                        draw again what was trained
    python compare.py compare.csv "ppo --clip 0.1"       train one more and draw all
The way of the data:    variants  ->  runs  ->  CSV  ->  table and picture
"""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: each run is to use one core
os.environ["MPLBACKEND"] = "agg"  # before matplotlib: it is to write files, in notebooks, too
if __name__ == "__mp_main__":  # the process of a run: Ctrl-C is for the main process to handle
    signal.signal(signal.SIGINT, signal.SIG_IGN)
import argparse
import csv
import multiprocessing
import sys
import tempfile
import textwrap
import threading
import traceback
from collections import namedtuple
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from contextlib import redirect_stderr
from importlib import import_module
from io import BytesIO, StringIO
from itertools import chain, groupby, product
from pathlib import Path

import numpy as np

# kl: mean KL(old policy || new policy) of an update, in nats; step_norm: how far it moved theta
FIGURES = ["update", "steps", "episodes", "episode_return", "kl", "step_norm", "seconds"]
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#882255"]
LINES = ["-", "--", "-.", ":"] * 2  # a variant has its own pair of color and line
SMALL = 1e-7  # a KL up to this is rounding in float32: the policy has not moved
Variant = namedtuple("Variant", "script words settings labels")


# --- 1. Variants ----------------------------------------------------------------------------------
def refuse(message):
    """Something was typed wrong: one line, exit status 2."""
    print("compare.py: error:", *message.split(), file=sys.stderr)
    sys.exit(2)


def parse(argv=None):
    """The command line: its options, the rows of .csv files, the Variants to train."""
    parser = argparse.ArgumentParser("compare.py", usage=argparse.SUPPRESS, allow_abbrev=False)
    add = parser.add_argument
    add("variants", nargs="*", default=["vpg", "trpo", "ppo"], help="'ppo --clip inf', or a .csv")
    add("--seeds", type=int, default=5, help="runs of each variant (default: %(default)s)")
    add("--steps", help="environment steps of each run (default: the script's)")
    add("--env", help="Gymnasium environment (default: the script's)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: all cores)")
    add("--out", type=Path, help=".png, .svg or .pdf (default: compare.png, or as the .csv)")
    options = parser.parse_intermixed_args(argv)
    files = [text for text in options.variants if text.endswith(".csv")] + ["compare.csv"]
    if len(files) > 2 and options.out is None:
        refuse("of several .csv files none is to be overwritten: say --out")
    options.out = options.out or Path(files[0]).with_suffix(".png")
    if options.out.suffix.lower() not in (".png", ".svg", ".pdf") or options.out.is_dir():
        refuse(f"--out must be a file that ends in .png, .svg or .pdf, unlike {options.out}")
    if min(options.seeds, options.jobs) < 1:
        refuse("--seeds and --jobs must be at least 1")
    try:  # now, and not only after hours of training
        tempfile.TemporaryFile(dir=options.out.parent).close()
        import_module("matplotlib.figure")
    except (OSError, ImportError) as error:
        refuse(f"--out {options.out} cannot be made: {error}")
    return options, *read_variants(options)


def read_variants(options):
    """The rows of .csv files, and the Variants to train. Those that are equal are trained once."""
    rows = []
    variants = []
    for text in options.variants:
        if text.endswith(".csv"):
            rows.extend(read_csv(Path(text)))
        else:
            variant = read_variant(text, options)
            if all(variant.settings != other.settings for other in variants):
                variants.append(variant)
    names = list(dict.fromkeys(row["variant"] for row in rows))
    rows.sort(key=lambda row: (names.index(row["variant"]), float(row["seed"])))  # for groupby
    for variant in variants:
        if variant.labels["variant"] in names:
            refuse(f"{variant.labels['variant']!r} is in the .csv file already")
    if len({(row["variant"], row["seed"], row["update"]) for row in rows}) < len(rows):
        refuse("the .csv files hold the same run twice")
    if len(names) + len(variants) > len(COLORS):
        refuse(f"a picture has room for {len(COLORS)} variants, not {len(names) + len(variants)}")
    return rows, variants


def read_variant(text, options):
    """A Variant from its text. (A script has parse, Settings, make_env, initial_policy and train.)"""
    script, *own = text.split() or [""]
    script = script.removesuffix(".py")
    beside = {path.stem for path in Path(__file__).parent.glob("*.py")} - {"compare", "test_smoke"}
    if script not in beside:
        refuse(f"no script {script!r} beside compare.py; there are: {', '.join(sorted(beside))}")
    shared = {"--steps": options.steps, "--env": options.env}
    words = [f"{name}={value}" for name, value in shared.items() if value is not None] + own
    module = import_module(script)
    settings = read_settings(module, words, text)
    if settings.watch:
        refuse(f"{text!r}: --watch is for a single run, of the script itself")
    spec = module.make_env(settings, 1).spec
    threshold = "" if spec.reward_threshold is None else str(spec.reward_threshold)
    labels = {"variant": " ".join([script, *own]), "env": spec.id, "threshold": threshold}
    return Variant(script, words, settings, labels)


def read_settings(module, words, text):
    """Let a script read its options. What it refuses is said in one line, as it was typed."""
    complaint = StringIO()
    try:
        with redirect_stderr(complaint):
            return module.parse(words)
    except SystemExit:
        message = complaint.getvalue().split("error: ")[-1]
    first, _, others = message.partition(" ")
    if hasattr(module.Settings, first):  # cg_iterations was typed as --cg-iterations
        message = f"--{first.replace('_', '-')} {others}"
    refuse(f"{text!r}: {message}")


# --- 2. Runs --------------------------------------------------------------------------------------
def train_all(variants, options, rows):
    """Train each Variant with each seed. The line of a run is printed when its rows are safe."""
    names = [row["variant"] for row in rows] + [variant.labels["variant"] for variant in variants]
    end = "\r" if sys.stderr.isatty() else "\n"  # on a terminal the next line replaces this one
    solved = 0
    pool = ThreadPoolExecutor(options.jobs)
    runs = [pool.submit(run_alone, *run) for run in product(range(options.seeds), variants)]
    try:
        for done, future in enumerate(as_completed(runs), start=1):
            run = future.result()
            rows.extend(run)
            rows.sort(key=lambda row: (names.index(row["variant"]), float(row["seed"])))
            write_csv(options.out.with_suffix(".csv"), rows)
            solved += any(map(is_solved, run))
            last = "{variant}, seed {seed} {error}".format(**run[-1])
            line = f"{done} of {len(runs)} runs, {solved} solved; last: {last:<40}"
            print(line, end=end, file=sys.stderr, flush=True)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        while not all(future.done() for future in runs):  # a process may be about to start
            for process in multiprocessing.active_children():
                process.kill()


def run_alone(number, variant):
    """The rows of a run that has a process pool of its own: one that is killed kills no other."""
    labels = variant.labels | {"seed": str(variant.settings.seed + number)}
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), watch_parent) as pool:
            return pool.submit(train, variant.script, variant.words, labels).result()
    except BrokenExecutor:
        return [labels | dict.fromkeys(FIGURES, "") | {"error": "its process was killed"}]


def watch_parent():
    """Make this process end when its parent has ended, in whatever way."""

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def train(script, words, labels):
    """A run, in its own process: its rows, as text. If it fails, they end there and say why."""
    np.seterr(all="ignore")  # the scripts themselves check that all is finite
    rows = [labels | dict.fromkeys(FIGURES, "") | {"error": "no update was made"}]
    try:
        module = import_module(script)
        settings = module.parse([*words, f"--seed={labels['seed']}"])
        for figures in module.train(settings, module.initial_policy(settings)):
            needed = [figures[key] for key in FIGURES]
            np.array(needed, float)  # if an edited script lacks one, the run fails here
            text = {key: str(figure) for key, figure in figures.items()}
            rows.append(labels | text | {"error": ""})
    except BaseException as problem:  # noqa: BLE001 (an edited script may even call sys.exit)
        frames = traceback.extract_tb(problem.__traceback__)
        places = [frame.lineno for frame in frames if Path(frame.filename).stem == script]
        place = f", {script}.py, line {places[-1]}" if places else ""
        rows[-1]["error"] = " ".join(f"{type(problem).__name__}: {problem}{place}".split())
    return rows[1:] or rows


# --- 3. CSV ---------------------------------------------------------------------------------------
def write_csv(path, rows):
    """All rows, with empty cells where a script has no such column."""
    names = dict.fromkeys(chain.from_iterable(rows))
    text = StringIO(newline="")
    writer = csv.DictWriter(text, sorted(names, key=lambda name: name == "error"))  # it is last
    writer.writeheader()
    writer.writerows(rows)
    replace_file(path, text.getvalue().encode())


def replace_file(path, content):
    """Write beside it, then rename: at any moment the file is whole, the old one or the new one."""
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_bytes(content)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def read_csv(path):
    """The rows that `write_csv` has written. They stay text."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            # DictReader puts None for missing or surplus cells; np.array refuses what is no number.
            if None in row or None in [row["variant"], row["env"], *row.values()]:
                raise ValueError("a row has too many cells, or too few")
            needed = FIGURES if row["update"] or not row["error"] else []
            np.array([row["seed"], row["threshold"] or 0, *[row[key] for key in needed]], float)
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        refuse(f"{path} holds no data of compare.py: {type(error).__name__} {error}")
    return rows or refuse(f"{path} holds no rows")


# --- 4. Table -------------------------------------------------------------------------------------
def column(rows, key):
    """One figure of every row. (A run whose process was killed has a row without figures.)"""
    return np.array([float(row[key]) for row in rows if row["update"]])


def is_solved(row):
    """Whether the mean of the last 100 episodes is at the threshold."""
    if "" in (row["threshold"], row["episodes"]) or float(row["episodes"]) < 100:
        return False
    return float(row["episode_return"]) >= float(row["threshold"])


def has_collapsed(run):
    """Whether half of a gain was lost again. The gain is the best return so far minus the first one
    over 100 episodes; less than a fifth of the way to the threshold is none."""
    returns = column(run, "episode_return")[column(run, "episodes") >= 100]
    best = np.maximum.accumulate(returns)
    gain = best - returns[:1]
    enough = (gain > 0) & (gain >= (float(run[0]["threshold"]) - returns[:1]) / 5)
    return bool((enough & (best - returns >= gain / 2)).any())


def interquartile_mean(values):
    """The mean without the lowest and the highest quarter: one lucky seed counts little."""
    quarter = len(values) // 4
    return np.mean(np.sort(values)[quarter : len(values) - quarter])


def shown(values, statistic, digits):
    """A statistic of the values as text, a dash if there are none."""
    return format(statistic(values), digits) if len(values) else "-"


def cells(rows):
    """What the table says about a variant. Runs that failed count, with the rows they have."""
    runs = [list(run) for _, run in groupby(rows, lambda row: row["seed"])]
    learning = []  # each run's rows until it is solved
    solved = []
    for run in runs:
        for row in run:
            learning.append(row)
            if is_solved(row):
                solved.append(row)
                break
    ends = [run[-1] for run in runs]
    last = [value for value in column(ends, "episode_return") if np.isfinite(value)]
    return [
        f"{len(solved)}/{len(runs)}" if rows[0]["threshold"] else "-",
        shown(column(solved, "steps"), np.median, ",.0f"),
        shown(last, interquartile_mean, ".4g"),
        shown(last, min, ".4g") + " to " + shown(last, max, ".4g"),
        shown(column(learning, "kl"), np.median, ".2g"),
        shown(column(rows, "kl"), max, ".2g"),
        f"{sum(map(has_collapsed, runs))}/{len(runs)}" if rows[0]["threshold"] else "-",
        shown(column(ends, "seconds") / column(ends, "update"), np.median, ".3f"),
    ]


def table(rows):
    """A line per variant, at most 100 columns wide. Long names go on below."""
    layout = "{:<18}{:>7}{:>9}{:>8}{:>19}{:>12}{:>8}{:>10}{:>9}"
    header = "variant,solved,at step,final,(range),learning KL,max KL,collapsed,s/update"
    lines = [layout.format(*header.split(","))]
    for variant, own in groupby(rows, lambda row: row["variant"]):
        name, *others = textwrap.wrap(variant, 17, subsequent_indent="  ")
        lines += [layout.format(name, *cells(list(own))), *others]
    return "\n".join(lines)


# --- 5. Picture -----------------------------------------------------------------------------------
def write_picture(path, rows):
    """Returns and KL over the steps, and KL over the change of theta: a variant has one color."""
    figure = import_module("matplotlib.figure").Figure(figsize=(10, 8), layout="constrained")
    panels = figure.subplot_mosaic([["return", "return"], ["kl", "distance"]])
    rows = [row for row in rows if row["update"]]
    for number, (name, own) in enumerate(groupby(rows, lambda row: row["variant"])):
        own = list(own)
        style = {"color": COLORS[number], "linestyle": LINES[number], "label": name}
        draw_curve(panels["return"], own, "episode_return", interquartile_mean, style)
        draw_curve(panels["kl"], own, "kl", np.median, style)
        norms = column(own, "step_norm")
        panels["distance"].scatter(norms, column(own, "kl"), 12, COLORS[number], lw=0, alpha=0.4)
    explain(panels, rows)
    mark_slice(panels["distance"], column(rows, "step_norm"), column(rows, "kl"))
    content = BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=110)
    replace_file(path, content.getvalue())


def draw_curve(axis, rows, key, center, style):
    """In each 40th of the updates of all seeds: their center, and as a band their middle half."""
    figures = column(rows, key)
    steps = column(rows, "steps")
    updates = column(rows, "update")
    windows = (updates - 1) * min(40, updates.max()) // updates.max()
    points = []
    for window in np.unique(windows[np.isfinite(figures)]):
        inside = (windows == window) & np.isfinite(figures)
        low, high = np.percentile(figures[inside], (25, 75))
        points.append([steps[inside].mean(), low, center(figures[inside]), high])
    steps, low, middle, high = np.reshape(points, (-1, 4)).T
    axis.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axis.plot(steps, middle, linewidth=2, marker="o", markersize=3, **style)


def explain(panels, rows):
    """Axes, units, and what to read the curves against."""
    panels["return"].set_title("Mean return of the last 100 episodes")
    panels["return"].legend(loc="lower center", bbox_to_anchor=(0.5, 1.1), ncols=2, handlelength=4)
    for env, threshold in {(row["env"], row["threshold"]) for row in rows if row["threshold"]}:
        panels["return"].axhline(float(threshold), color="0.3", linewidth=1)
        panels["return"].text(0, float(threshold), f" {env} is solved", va="top")
    for axis in panels["return"], panels["kl"]:
        axis.set(xlabel="environment steps", xlim=(0, 1.02 * max(column(rows, "steps"))))
        axis.locator_params(axis="x", nbins=5)
        axis.xaxis.set_major_formatter("{x:,.0f}")
    panels["kl"].set_title("How far does an update move the policy?")
    highest = max(0.1, 2 * max(column(rows, "kl")))
    for axis in panels["kl"], panels["distance"]:
        axis.axhline(0.01, color="0.3", linewidth=1)
        axis.set(ylim=(SMALL, highest), yscale="log", ylabel="KL in nats; line: TRPO's delta")


def mark_slice(axis, norms, kl):
    """Shade a narrow slice of steps, around the median, and mark its range of KL."""
    axis.set_title("Are equal steps in weights equal in behavior?")
    axis.set(xlim=(1e-4, max(10, max(norms))), xscale="log", xlabel=r"$\|\Delta\theta\|_2$")
    moved = kl > SMALL
    if moved.any():
        middle = np.sort(norms[moved])[moved.sum() // 2]
        inside = kl[moved & (np.abs(norms / middle - 1) < 0.1)]
        axis.axvspan(0.9 * middle, 1.1 * middle, color="0.85", zorder=0)
        axis.vlines(middle, min(inside), max(inside), color="black", linewidth=2)
        text = f"steps of {middle:.2g} ± 10 %:\nKL {min(inside):.1g} to {max(inside):.1g}"
        axis.text(0.03, 0.97, text, va="top", transform=axis.transAxes)


# --- 6. Everything together -----------------------------------------------------------------------
def main(argv=None):
    """Returns the exit status: 1 if anything failed. After Ctrl-C, the CSV can be drawn."""
    options, rows, variants = parse(argv)
    data = options.out.with_suffix(".csv")
    problems = []
    try:
        train_all(variants, options, rows)
    except OSError as error:
        problems.append(f"{data} cannot be written: {error.strerror}")
    problems += ["failed: {variant}, {seed}: {error}".format(**row) for row in rows if row["error"]]
    print(table(rows))
    try:
        write_picture(options.out, rows)
    except Exception as error:  # noqa: BLE001 (the data are safe)
        problems.append(f"no picture: {type(error).__name__}: {error}")
    print(f"picture: {options.out}, data: {data if variants else 'as given'}")
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return min(1, len(problems))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))  # 128 + 2, the number of the signal
    sys.exit(main())
