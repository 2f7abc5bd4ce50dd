# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "gymnasium>=1.0", "matplotlib>=3.8"]
# ///
"""Run scripts of this folder with any settings, over several seeds, and compare them.

    python compare.py                                            (vpg, trpo and ppo as they are)
    python compare.py ppo "ppo --clip inf" "ppo --clip inf --epochs 40"
    python compare.py vpg "vpg --learning-rate 0.1" --seeds 10 --out cliff.pdf

A variant is the name of a script and its options, in quotes; one that is given twice runs once.
Results: a table, a picture (compare.png), the rows of all finished runs (compare.csv). The picture:

    return over environment steps     does it learn, and does it forget again?
    KL over environment steps         how far does each update move the policy?
    KL over the change of theta       steps that are equal in weights are not equal in behaviour
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: each run is to use one core
import argparse
import csv
import importlib.util
import multiprocessing
import shlex
import signal
import sys
import tempfile
import textwrap
import time
import webbrowser
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path

import gymnasium as gym
import numpy as np

NOISE = 1e-7  # a float32 KL up to this is rounding: the behavior stayed the same
NEEDED = {"update", "steps", "episode_return", "kl", "step_norm", "solved", "seconds"}
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442"]
LINES = ["-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (3, 1)), (0, (9, 2)), (0, (5, 1))]
MARKERS = "os^DvPX*"


# --- 1. Command line ------------------------------------------------------------------------------
def load(name):
    """The script NAME.py beside this file, as a module. ValueError if it is not one of ours."""
    folder = Path(__file__).resolve().parent
    scripts = sorted({path.stem for path in folder.glob("*.py")} - {"compare", "test_smoke"})
    if name not in scripts:
        raise ValueError(f"no script {name!r} beside compare.py; there are: {', '.join(scripts)}")
    spec = importlib.util.spec_from_file_location(f"compare_{name}", folder / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.parse and module.train and module  # AttributeError if it lacks one
    except Exception as error:  # noqa: BLE001 (a learner's copy may contain any mistake)
        raise ValueError(f"{name}.py: {type(error).__name__}: {error}")


def parse(argv=None):
    """Options and {variant: (script, options, Settings)}. A mistake: one line, exit status 2."""
    usage, meaning = '%(prog)s [options] ["SCRIPT ITS OPTIONS" ...]', __doc__.split("\n")[0]
    parser = argparse.ArgumentParser("compare.py", usage, meaning)
    add = parser.add_argument
    add("variants", nargs="*", metavar="VARIANT", help='script, options: "ppo --clip inf"')
    add("--seeds", type=int, default=5, help="runs of each variant (default: %(default)s)")
    add("--steps", help="environment steps of each run (default: the script's)")
    add("--env", help="Gymnasium environment (default: the script's)")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time (default: all cores)")
    add("--out", type=Path, default="compare.png", help=".png, .svg or .pdf (default: %(default)s)")
    add("--show", action="store_true", help="open the picture at the end")
    options = parser.parse_intermixed_args(argv)
    given, out = {"steps": options.steps, "env": options.env}, options.out
    shared = [f"--{name}={value}" for name, value in given.items() if value is not None]
    try:
        if not 1 <= options.seeds <= 1000 or options.jobs < 1:
            raise ValueError("--seeds must be from 1 to 1000, --jobs at least 1")
        unknown = out.suffix.lower() not in (".png", ".svg", ".pdf")
        if unknown or out.is_dir() or out.with_suffix(".csv").is_dir():
            raise ValueError(f"--out must end in .png, .svg, .pdf; no folder, nor its .csv: {out}")
        tempfile.TemporaryFile(dir=out.parent).close()  # OSError unless this folder takes files
        variants = {}
        for text in options.variants or ("vpg", "trpo", "ppo"):
            script, *own = shlex.split(text) or [""]
            settings = load(script).parse(shared + own)  # a mistake in a variant ends here
            variants[" ".join(text.split())] = script, shared + own, settings
        return options, variants
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    except OSError as error:
        parser.error(f"--out: no file can be written in {out.parent}: {error.strerror}")


# --- 2. Runs --------------------------------------------------------------------------------------
def work(sending, script, options, seed):
    """One run in a process of its own: sends every row (a dict), then "" or why it failed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    try:
        module = load(script)
        with np.errstate(all="ignore"):  # `train` checks that all is finite
            for row in module.train(replace(module.parse(options), seed=seed)):
                if not row.keys() >= NEEDED:
                    raise ValueError(f"the rows lack {', '.join(NEEDED - row.keys())}")
                sending.send(row)
        sending.send("")
    except BrokenPipeError:
        pass  # the parent is gone
    except Exception as error:  # noqa: BLE001 (the other runs go on)
        sending.send(" ".join(str(error).split()) or type(error).__name__)


def start(script, options, seed):
    """Start a run in a fresh process. Returns the pipe's end where it is heard, the process."""
    context = multiprocessing.get_context("spawn")  # the same on every platform
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(sending, script, options, seed), daemon=True)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # inherited, so true from its birth on
    process.start()
    signal.signal(signal.SIGINT, before)
    sending.close()  # now only the run holds this end: if it dies, `recv` raises EOFError
    return receiving, process


def run_all(variants, runs, jobs):
    """Run each (variant, seed), `jobs` at a time: {run: rows} and {run: "" or why it failed}."""
    rows, ended, running, began = {}, {}, {}, time.perf_counter()
    try:
        while len(ended) < len(runs):
            for run in runs[len(rows) : len(rows) + jobs - len(running)]:
                receiving, process = start(*variants[run[0]][:2], run[1])
                running[receiving], rows[run] = (run, process), []
            for receiving in wait(list(running), timeout=1):
                run, _ = running[receiving]
                try:
                    message = receiving.recv()
                except EOFError:
                    message = "its process died"
                if isinstance(message, dict):
                    rows[run].append({"variant": run[0], "seed": run[1], **message})
                else:
                    ended[run] = message or ("" if rows[run] else "no rows")
                    del running[receiving]
                progress(variants, runs, rows, run, ended, began)
    except KeyboardInterrupt:  # `ended` lacks the runs that are missing
        print(file=sys.stderr)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a moment: results are worth the wait
        for _, process in running.values():
            process.terminate()
            process.join()
    return rows, ended


def progress(variants, runs, rows, run, ended, began):
    """On a terminal one line that is rewritten; elsewhere one line per finished run."""
    terminal, (text, seed) = sys.stderr.isatty(), run
    if not rows[run] or (not terminal and ended.get(run) != ""):
        return
    done = sum(part[-1]["steps"] / variants[key[0]][2].steps for key, part in rows.items() if part)
    left, row = (time.perf_counter() - began) * max(0, len(runs) / done - 1), rows[run][-1]
    line = f"{len(ended)}/{len(runs)} runs, {left:.0f} s left | {text}, seed {seed}: "
    line += f"{row['steps']} steps, return {row['episode_return']:.1f}, kl {row['kl']:.2g}"
    if terminal:
        width = (os.get_terminal_size(sys.stderr.fileno()).columns or 80) - 1
        line = f"\r{line[:width]:<{width}}"
    print(line, end="" if terminal and len(ended) < len(runs) else "\n", file=sys.stderr)


# --- 3. Table -------------------------------------------------------------------------------------
def column(rows, key):
    """One figure of every row, as an array."""
    return np.array([row[key] for row in rows], float)


def curve(rows):
    """Steps and returns of a run, without its beginning: nan until the first episode has ended."""
    known = [row for row in rows if np.isfinite(row["episode_return"])]
    return column(known, "steps"), column(known, "episode_return")


def interquartile_mean(values):
    """The mean without the lowest and the highest quarter: one lucky seed counts little."""
    return np.mean(np.sort(values)[len(values) // 4 : len(values) - len(values) // 4])


def collapses(returns, threshold=None):
    """How often the return falls within 10 updates by half or more of its gain (best - first).
    The next fall counts only after a recovery to half of the gain. A gain under a fifth of the way
    from the first return to the threshold is noise: too little to lose."""
    count, recovered = 0, 0  # recovered: since which update; None while fallen
    smallest = 0.2 * max(0, threshold - returns[0]) if threshold is not None else 0
    for now, value in enumerate(returns):
        half = (max(returns[: now + 1]) - returns[0]) / 2  # of the gain
        if recovered is None:
            recovered = now if value >= returns[0] + half else None
        elif 2 * half > smallest and max(returns[max(recovered, now - 10) : now]) - value >= half:
            count, recovered = count + 1, None
    return count


def cells(runs, env):
    """A variant's line in the table, from the rows of its finished runs."""
    solved = [run[column(run, "solved").argmax()]["steps"] for run in runs if run[-1]["solved"]]
    returns = [values for _, values in map(curve, runs) if len(values)]
    last = [values[-1] for values in returns]
    kl = np.concatenate([column(run, "kl") for run in runs])
    yield from (f"{len(solved)}/{len(runs)}", f"{np.median(solved):.0f}" if solved else "-")
    yield f"{interquartile_mean(last):.1f} ({min(last):.1f} to {max(last):.1f})" if last else "-"
    yield from (f"{np.median(kl):.2g}", f"{kl.max():.2g}")
    yield sum(collapses(values, gym.spec(env).reward_threshold) for values in returns)
    yield f"{np.median([run[-1]['seconds'] / len(run) for run in runs]):.3f}"


def table(results, variants):
    """A header, then a line per variant, 120 characters wide; of a long variant both its ends."""
    layout = "{:<36}{:>7}{:>10}{:>28}{:>10}{:>10}{:>10}{:>9}"
    names = "variant", "solved", "at step", "final return (range)", "median KL", "max KL"
    lines = [layout.format(*names, "collapses", "s/update")]
    for text, runs in results.items():
        name = text if len(text) <= 35 else f"{text[:15]} ... {text[-15:]}"
        lines.append(layout.format(name, *cells(runs, variants[text][2].env)))
    return "\n".join(lines)


# --- 4. Picture -----------------------------------------------------------------------------------
def draw(figure, results, variants):
    """Three panels and a legend. Each has one artist per variant, in its color, with its label."""
    panels, entries = figure.subplot_mosaic([["return", "legend"], ["kl", "distance"]]), []
    for text, runs in results.items():
        number, rows = list(variants).index(text) % 8, [row for run in runs for row in run]
        moved = [row for row in rows if row["kl"] > NOISE]  # a log axis can't show the others
        style = {"label": text, "color": COLORS[number], "linestyle": LINES[number]}
        line = draw_returns(panels["return"], runs, style, thin=len(results) < 5)
        draw_kl(panels["kl"], moved, style)
        shown = moved[:: len(moved) // 1000 + 1]  # of very many every second, third, ...
        style |= {"marker": MARKERS[number], "linestyle": "-", "lw": 0, "s": 14, "alpha": 0.4}
        cloud = panels["distance"].scatter(column(shown, "step_norm"), column(shown, "kl"), **style)
        text = textwrap.fill(text, 44, max_lines=2).replace("$", r"\$")
        text += f"\nKL 0 in {len(rows) - len(moved)} of {len(rows)} updates"
        entries.append(((line, cloud), text))
    envs = sorted({variants[text][2].env for text in results})
    figure.suptitle(f"{', '.join(envs)}, seeds: {max(map(len, results.values()))}", weight="bold")
    explain(panels, entries, {gym.spec(env).reward_threshold for env in envs} - {None})


def draw_curve(axis, steps, samples, center, style):
    """Bold: the center of the samples at every number of steps. Band: their middle half."""
    quarters = np.array([np.percentile(values, (25, 75)) for values in samples]).T
    axis.locator_params(axis="x", nbins=4)  # few enough for numbers of six digits
    axis.fill_between(steps, *quarters, color=style["color"], alpha=0.2, linewidth=0)
    return axis.plot(steps, [center(values) for values in samples], lw=2, zorder=3, **style)[0]


def draw_returns(axis, runs, style, thin):
    """Interquartile mean over the seeds, each brought to the same steps; thin: single seeds."""
    curves = [(steps, values) for steps, values in map(curve, runs) if len(steps)]
    for points in curves[:10] if thin else ():
        axis.plot(*points, color=style["color"], linewidth=0.6, alpha=0.4)
    ends = np.array([(steps[0], steps[-1]) for steps, _ in curves] or [(0, 0)])
    grid = np.linspace(ends[:, 0].max(), ends[:, 1].min(), 150)
    samples = np.array([np.interp(grid, *points) for points in curves] or [grid * np.nan]).T
    return draw_curve(axis, grid, samples, interquartile_mean, style)


def draw_kl(axis, moved, style):
    """Median over the updates of all seeds in each 30th of the training (each update if fewer)."""
    updates, steps = (max([row[key] for row in moved], default=1) for key in ("update", "steps"))
    windows = np.arange(min(30, updates))
    window = (column(moved, "update") - 1) * len(windows) // updates
    samples = [column(moved, "kl")[window == number] for number in windows]
    samples = [values if len(values) else [np.nan] for values in samples]  # nan: a gap
    draw_curve(axis, (windows + 0.5) * steps / len(windows), samples, np.median, style)


def explain(panels, entries, thresholds):
    """Titles, units, the marks against which to read the curves, and the legend."""
    steps, kl = "environment steps", r"KL$(\pi_{old}\,\|\,\pi_{new})$ in nats"
    panels["return"].set(title="Return", xlabel=steps, ylabel="mean of the last 20 episodes")
    panels["kl"].set(title="Policy distance per update", xlabel=steps, ylabel=kl, yscale="log")
    panels["distance"].set(title="Policy distance against weight distance", ylabel=kl)
    panels["distance"].set(xlabel=r"$\|\Delta\theta\|_2$ per update", xscale="log", yscale="log")
    marks = [(panels["return"], height, f"solved:\n{height:g}") for height in thresholds]
    for axis in panels["kl"], panels["distance"]:
        marks += (axis, 0.01, "0.01 usual\ntrust region"), (axis, 0.1, "0.1 collapse\nrisk")
    for axis, height, meaning in marks:
        side = "top" if height == 0.01 else "bottom"  # away from the other mark
        axis.axhline(height, color="0.3", linewidth=1)  # its text: to the right of the panel
        axis.text(1.01, height, meaning, fontsize=9, va=side, transform=axis.get_yaxis_transform())
    for axis in panels.values():
        axis.spines[["top", "right"]].set_visible(False)
    panels["legend"].axis("off")
    note = "Bold: interquartile mean (KL: median).\nBand: the middle half. KL 0 is not shown."
    look = {"loc": "center left", "frameon": False, "alignment": "left", "fontsize": "small"}
    panels["legend"].legend(*zip(*entries), title=note, markerscale=2, handlelength=4, **look)


# --- 5. Everything together -----------------------------------------------------------------------
def save(out, results, variants):
    """The picture and, beside it, all rows as CSV: both complete, or as they were before."""
    from matplotlib.figure import Figure  # here, so that the runs need not load it

    figure = Figure(figsize=(10, 7), layout="constrained", facecolor="white")
    draw(figure, results, variants)
    rows = [row for runs in results.values() for run in runs for row in run]
    targets = out, out.with_suffix(".csv")
    parts = [path.with_name(f".{path.name}.{os.getpid()}") for path in targets]
    try:
        figure.savefig(parts[0], format=out.suffix[1:].lower(), dpi=110)
        with open(parts[1], "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
            writer.writeheader()
            writer.writerows(rows)
        for part, target in zip(parts, targets):
            os.replace(part, target)
    finally:
        for part in parts:
            part.unlink(missing_ok=True)


def main(argv=None):
    """Run everything, write the files, print the table. Returns the exit status."""
    options, variants = parse(argv)
    runs = [(text, variants[text][2].seed + n) for n in range(options.seeds) for text in variants]
    rows, ended = run_all(variants, runs, options.jobs)
    problems = [f"failed: {run[0]}, seed {run[1]}: {ended[run]}" for run in runs if ended.get(run)]
    if missing := [f"{text}, seed {seed}" for text, seed in runs if (text, seed) not in ended]:
        problems.append(f"interrupted, {len(missing)} of {len(runs)} missing: {'; '.join(missing)}")
    finished = [run for run in runs if ended.get(run) == ""]
    results = {text: [rows[run] for run in finished if run[0] == text] for text in variants}
    results = {text: kept for text, kept in results.items() if kept}
    if results:
        try:
            save(options.out, results, variants)
            if options.show and not webbrowser.open(options.out.resolve().as_uri()):
                print(f"--show: no display; the picture is in {options.out}", file=sys.stderr)
        except OSError as error:
            problems.append(f"{options.out} cannot be written: {error.strerror or error}")
        print(table(results, variants), flush=True)
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 130 if missing else 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
