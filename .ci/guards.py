"""Checks that teach nobody: bad input, extremes, determinism, interrupts, files, TRPO's promise.

python .ci/guards.py               all of them
python .ci/guards.py -k WORD       those whose name holds WORD
python .ci/guards.py --seeds 20    TRPO's promise over whole runs of as many seeds
"""

import contextlib
import csv
import importlib
import importlib.util
import io
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "vpg", "trpo", "ppo"
WINDOWS = sys.platform == "win32"
TEMP = Path(tempfile.mkdtemp())
# Every warning is an error, but for deprecations and encodings inside other packages.
STRICT = ["-W", "error"]
for category in ("DeprecationWarning", "PendingDeprecationWarning", "EncodingWarning"):
    STRICT += ["-W", f"ignore::{category}"]
STRICT += ["-W", "error:::__main__"]
SMALL = ["--steps", "1500", "--horizon", "30", "--num-envs", "4", "--hidden", "16"]
CHECKS = []  # (name, function, arguments)


class Skip(Exception):
    """A check that cannot be made here, and why."""


def check(*cases):
    """Register a check, once for each tuple of arguments."""

    def register(function):
        for case in cases or [()]:
            name = " ".join([function.__name__, *map(str, case)])
            CHECKS.append((name, function, case))
        return function

    return register


def each(*cases):
    """The cases for each of the three scripts."""
    return [(script, *case) for script in SCRIPTS for case in cases or [()]]


ENVIRONMENTS = '''
import gymnasium as gym
import numpy as np


class Plain(gym.Env):
    """Endless episodes of random numbers, unless a subclass says otherwise."""
    metadata = {"render_modes": []}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)
    length, scale, prize = 10**9, 1.0, 1.0
    def observe(self):
        return (self.scale * self.np_random.standard_normal(3)).astype(np.float32)
    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.calls = 0
        return self.observe(), {}
    def step(self, action):
        self.calls += 1
        return self.observe(), self.prize * (1 + action), self.calls >= self.length, False, {}

class Endless(Plain):
    pass

class Huge(Plain):
    length, scale, prize = 20, 1e6, 1e6

class Ones(Plain):
    """One step, and always the same observation and reward: nothing to learn."""
    length = 1
    def observe(self):
        return np.full(3, 0.3, np.float32)
    def step(self, action):
        return self.observe(), 0.1 * self.prize, True, False, {}

class Millions(Ones):
    prize = 1e7

class Instant(Plain):
    length = 1

class Broken(Plain):
    length = 20
    def observe(self):
        return np.full(3, np.nan, np.float32)

class Image(Plain):
    observation_space = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)

class Named(Plain):
    observation_space = gym.spaces.Dict({"x": Plain.observation_space})

class FromOne(Plain):
    action_space = gym.spaces.Discrete(2, start=1)

for kind in Endless, Huge, Ones, Millions, Instant, Broken, Image, Named, FromOne:
    gym.register(f"{kind.__name__}-v0", kind, disable_env_checker=True)
'''


# --- Helpers --------------------------------------------------------------------------------------
def environment(**more):
    """Environment variables of a run."""
    paths = {"PYTHONPATH": str(TEMP), "PYTHONDONTWRITEBYTECODE": "1", "MPLBACKEND": "Agg"}
    return os.environ | paths | {"PYTHONIOENCODING": "utf-8"} | more


def run(*words, env=None, cwd=None, timeout=240):
    """Run Python on these words, every warning an error: exit status, output, errors."""
    done = subprocess.run(
        [sys.executable, *STRICT, *map(str, words)],
        cwd=cwd or TEMP,
        env=env or environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout,
        check=False,
    )
    encoding = (env or environment())["PYTHONIOENCODING"]
    output, errors = (text.decode(encoding) for text in (done.stdout, done.stderr))
    return done.returncode, output.replace("\r\n", "\n"), errors.replace("\r\n", "\n")


def train(script, *words, **more):
    """Run a script on a small budget, later words first."""
    return run(ROOT / f"{script}.py", *SMALL, *words, **more)


def sound(result):
    """A result without nan (only the return may be, before an episode ended), or one clear line."""
    status, output, errors = result
    assert "Traceback" not in errors, errors
    if status == 1:
        lines = errors.strip().splitlines()
        assert len(lines) == 1 and re.match(r"update \d+ is no longer finite: ", lines[0]), errors
        assert "greedy" not in output, output
        return []
    assert status == 0 and not errors, (status, errors)
    rows = [line.split() for line in output.splitlines() if re.match(r" +\d+ +\d+ ", line)]
    assert rows and all(np.isfinite([float(x) for x in row[:2] + row[3:]]).all() for row in rows)
    score = re.search(r"^greedy policy, 100 fresh episodes: (\S+) ± (\S+)", output, re.MULTILINE)
    assert score and np.isfinite([float(x) for x in score.groups()]).all(), output
    return rows


def module(name):
    """One of the project's files, imported."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module(name)


def untimed(rows):
    """Rows without the seconds, as text (nan equals nan)."""
    return [str({key: value for key, value in row.items() if key != "seconds"}) for row in rows]


def needs_signals():
    """Skip a check where there are no process groups."""
    if WINDOWS:
        raise Skip("no signals on Windows")


def files(folder):
    """Names of the files of a folder."""
    return sorted(path.name for path in folder.iterdir())


def new_folder():
    """A folder of its own for the output of one check."""
    return Path(tempfile.mkdtemp(dir=TEMP))


# --- Bad input ------------------------------------------------------------------------------------
BAD = {
    "steps": "0 -1 x 1.5",
    "num-envs": "0 -1",
    "horizon": "0 1 -3",
    "seed": "-1",
    "gamma": "-0.1 1.1 nan",
    "gae-lambda": "-0.1 1.1 nan",
    "hidden": "0 -2",
    "minibatches": "0",
    "value-epochs": "-1",
    "value-learning-rate": "-1 nan inf",
    "learning-rate": "-1 nan inf",
    "clip": "-0.1 nan",
    "epochs": "0",
    "target-kl": "-1 nan",
    "delta": "0 -1 nan",
    "damping": "-1 nan",
    "cg-iterations": "0",
    "backtracks": "-1",
    "backtrack-factor": "-1 1.5 nan",
    "env": "Nonsense-v0 nothing:Env-v0 CartPole-v99 FrozenLake-v1 Blackjack-v1 Pendulum-v1"
    " guarded:Image-v0 guarded:Named-v0 guarded:FromOne-v0",
    "unknown": "1",
}


@check(*each())
def bad_input(script):
    parse, help_text = module(script).parse, run(ROOT / f"{script}.py", "--help")[1]
    for name, values in BAD.items():
        if f"--{name}" not in help_text and name != "unknown":
            continue
        for value in values.split():
            output, errors, status = io.StringIO(), io.StringIO(), None
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
                try:
                    parse([f"--{name}={value}"])
                except SystemExit as stopped:
                    status = stopped.code
            last = errors.getvalue().strip().splitlines()[-1:]
            assert status == 2 and not output.getvalue(), (name, value, status)
            assert "error: " in last[0] and name.replace("-", "_") in last[0].replace("-", "_"), (
                last
            )


@check(*each(["--steps", "0"], ["--env", "Pendulum-v1"]))
def bad_input_as_a_program(script, *words):
    status, output, errors = run(ROOT / f"{script}.py", *words)
    assert status == 2 and not output and "Traceback" not in errors, errors
    assert "error: " in errors.strip().splitlines()[-1]


# --- Extremes -------------------------------------------------------------------------------------
EXTREMES = each(
    ["--value-learning-rate", "0"],
    ["--value-learning-rate", "1e-12"],
    ["--value-learning-rate", "1e30"],
    ["--num-envs", "1"],
    ["--num-envs", "1", "--horizon", "2", "--steps", "200"],
    ["--num-envs", "1", "--horizon", "2", "--minibatches", "50", "--steps", "50"],
    ["--steps", "1"],
    ["--env", "guarded:Endless-v0"],
    ["--env", "guarded:Huge-v0"],
    ["--env", "guarded:Instant-v0", "--num-envs", "1", "--horizon", "2", "--steps", "100"],
    ["--hidden", "1"],
    ["--gamma", "1", "--gae-lambda", "1"],
    ["--gamma", "0", "--gae-lambda", "0"],
)
EXTREMES += [
    (script, "--learning-rate", rate)
    for script in ("vpg", "ppo")
    for rate in ("0", "1e-12", "1", "1e4", "1e30")
]
EXTREMES += [("ppo", "--clip", clip, "--epochs", "20") for clip in ("0", "1e-9", "inf")]
EXTREMES += [("ppo", "--clip", "inf", "--learning-rate", "1", "--target-kl", "0")]
EXTREMES += [("trpo", "--delta", delta) for delta in ("1e-12", "1e-6", "1", "100")]
EXTREMES += [
    ("trpo", "--delta", "100", "--no-line-search"),
    ("trpo", "--damping", "0", "--cg-iterations", "100"),
    ("trpo", "--damping", "1e30"),
    ("trpo", "--backtrack-factor", "0"),
    ("trpo", "--backtracks", "0"),
]


@check(*EXTREMES)
def extreme(script, *words):
    sound(train(script, *words))


@check(*each(["Ones"], ["Millions"]))
def nothing_to_learn(script, env):
    words = ["--env", f"guarded:{env}-v0", "--horizon", "40"]
    for row in sound(train(script, *words)):
        assert row[3] == row[5] == "0", f"kl {row[3]}, step {row[5]}"


@check(*each())
def endless_episodes_are_cut_and_said_so(script):
    assert "episodes were cut off at 1000" in train(script, "--env", "guarded:Endless-v0")[1]


@check(*each())
def observations_that_are_not_finite(script):
    status, output, errors = train(script, "--env", "guarded:Broken-v0")
    assert status == 1 and errors.startswith("update 1 is no longer finite"), (status, errors)
    assert len(errors.splitlines()) == 1 and "greedy" not in output


@check(*each([30], [1000], [1e30]))
def policy_already_deterministic(script, logit):
    code = f"""
import numpy as np, {script} as m
np.seterr(all="ignore")
s = m.Settings(steps=1000, horizon=50, num_envs=4, hidden=16)
policy = m.initial_policy(s)
policy.b3[:] = {logit}, -{logit}
for row in m.train(s, policy):
    assert np.isfinite([x for k, x in row.items() if k != "episode_return"]).all(), row
assert np.isfinite(policy.theta).all()
"""
    path = f"{TEMP}{os.pathsep}{ROOT}"
    status, _, errors = run("-c", code, env=environment(PYTHONPATH=path))
    assert status == 0 and not errors, errors


# --- Determinism ----------------------------------------------------------------------------------
def without_times(output):
    """What a script printed, without the column of seconds and the time to solved."""
    lines = [line.split() for line in output.splitlines()]
    timed = [len(line) > 7 and line[0].isdigit() for line in lines]  # the rows of the table
    return [line[:7] + line[8:] if row else line for line, row in zip(lines, timed)]


@check(*each())
def two_processes_print_the_same(script):
    first, same, other = (train(script, "--seed", seed)[1] for seed in (3, 3, 4))
    assert without_times(first) == without_times(same) != without_times(other)


@check(*each())
def alone_and_under_compare_the_same(script):
    folder, m = new_folder(), module(script)
    words = ["--seeds", "2", "--steps", "2500", "--jobs", "2", "--out", "compare.png"]
    status, _, errors = run(ROOT / "compare.py", script, *words, cwd=folder)
    assert status == 0, errors
    with open(folder / "compare.csv", newline="", encoding="utf-8") as file:
        compared = [row for row in csv.DictReader(file) if row["seed"] == "1"]
    rows = list(m.train(m.Settings(seed=1, steps=2500)))
    again = list(m.train(m.Settings(seed=1, steps=2500)))
    assert untimed(rows) == untimed(again) and len(rows) == len(compared)
    for row, cells in zip(rows, compared):
        for key in row.keys() - {"seconds"}:
            assert cells[key] == str(row[key]), (key, cells[key], row[key])


@check()
def results_do_not_depend_on_jobs():
    results = []
    for jobs in (1, 2):
        folder = new_folder()
        words = f"vpg ppo --seeds 2 --steps 2500 --jobs {jobs} --out x.svg".split()
        status, _, errors = run(ROOT / "compare.py", *words, cwd=folder)
        assert status == 0, errors
        with open(folder / "x.csv", newline="", encoding="utf-8") as file:
            results.append(untimed(csv.DictReader(file)))
    assert results[0] == results[1]


@check(*each())
def random_streams_are_separate(script):
    code = f"""
import copy, numpy as np, {script} as m
draws, starts = [], []
def watched(name, place):
    original = getattr(m, name)
    def wrapper(*given):
        draws.append((name, copy.deepcopy(given[place]).random()))
        return original(*given)
    setattr(m, name, wrapper)
watched("initial_network", 0), watched("experience", 4)
watched("fit_value", 5)
original = m.make_env
def make_env(*given):
    env = original(*given)
    reset = env.reset
    def wrapper(**how):
        observations, info = reset(**how)
        starts.append(observations.copy())
        return observations, info
    env.reset = wrapper
    return env
m.make_env = make_env
for seed in range(4):
    next(m.train(m.Settings(seed=seed, steps=300, horizon=30, num_envs=8)))
assert len(draws) == 16, draws
assert len({{draw for _, draw in draws}}) == 16, draws
rows = np.concatenate(starts)
assert rows.shape == (32, 4) and len(np.unique(rows, axis=0)) == 32
"""
    path = f"{TEMP}{os.pathsep}{ROOT}"
    status, _, errors = run("-c", code, env=environment(PYTHONPATH=path))
    assert status == 0, errors


# --- TRPO's promise -------------------------------------------------------------------------------
@check(["0.001"], ["0.01"], ["0.1"], ["1"])
def trpo_keeps_its_promise(delta):
    m, delta, counts = load_apart("trpo"), float(delta), [0, 0]
    update_policy = m.update_policy

    def exact(policy, observations):
        logits = m.forward(policy, observations)[0].astype(np.float64)
        return m.log_softmax(logits)

    def watched(policy, observations, actions, advantages, *rest):
        theta, before = policy.theta.tobytes(), exact(policy, observations)
        figures = update_policy(policy, observations, actions, advantages, *rest)
        after, taken = exact(policy, observations), (np.arange(len(actions)), actions)
        gain = (advantages.astype(np.float64) * np.expm1(after[taken] - before[taken])).mean()
        divergence = (np.exp(before) * (before - after)).sum(axis=1).mean()
        moved = policy.theta.tobytes() != theta
        counts[moved] += 1
        assert divergence <= 1.001 * delta, f"KL {divergence / delta} delta"
        assert gain > 0 or not moved, f"surrogate grew by {gain}"
        return figures

    m.update_policy = watched
    steps = 12_000 if OPTIONS.seeds is None else 150_000
    for seed in range(2 if OPTIONS.seeds is None else OPTIONS.seeds):
        for _ in m.train(m.Settings(seed=seed, delta=delta, steps=steps)):
            pass
    assert counts[1] > 0
    return f"{sum(counts)} updates, {counts[0]} of them without a step"


def load_apart(name):
    """A copy of a script's module that no other check uses."""
    spec = importlib.util.spec_from_file_location(
        f"{name}_apart_{time.time_ns()}", ROOT / f"{name}.py"
    )
    made = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


# --- Interrupts -----------------------------------------------------------------------------------
def start(*words, cwd=None):
    """Start Python in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-u", *STRICT, *map(str, words)],
        cwd=cwd or TEMP,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )


def group_is_gone(group):
    """Whether no process of the group is left after a few seconds."""
    for _ in range(50):
        try:
            os.killpg(group, 0)
        except (ProcessLookupError, PermissionError):  # macOS denies a group of zombies
            return True
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    return False


@check(*each([0], [0.02], [0.1], [0.5]))
def interrupted_script(script, delay):
    needs_signals()
    process = start(ROOT / f"{script}.py", "--steps", "100000000")
    assert "steps" in process.stdout.readline() + process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, ""), (process.returncode, errors)


def interrupt_compare(delay, to_all, ended=0, steps=20_000):
    """Interrupt compare.py `delay` seconds after `ended` runs ended: folder, status, errors."""
    needs_signals()
    folder = new_folder()
    words = ["vpg", "--seeds", "4", "--steps", steps, "--jobs", "2", "--out", "compare.png"]
    process = start(ROOT / "compare.py", *words, cwd=folder)
    first = "".join(process.stderr.readline() for _ in range(ended))
    time.sleep(delay)
    (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert group_is_gone(process.pid), "processes are left"
    assert set(files(folder)) in (set(), {"compare.png", "compare.csv"}), files(folder)
    assert "Traceback" not in errors, errors
    return folder, process.returncode, first + errors


def complete_runs(folder):
    """How many runs the data hold, all complete."""
    last = {}
    with open(folder / "compare.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            last[row["seed"]] = int(row["steps"])
    assert all(steps >= 20_000 for steps in last.values()), last
    return len(last)


@check(*itertools.product([1.5, 2.0, 2.5], ["all", "parent"]))
def interrupted_compare_early(delay, who):
    folder, status, errors = interrupt_compare(delay, who == "all", steps=10**8)
    assert status == 130 and "nterrupted" in errors, (status, errors)
    assert not files(folder), files(folder)


@check(*itertools.product([1, 2, 3], [0, 0.3], ["all", "parent"]))
def interrupted_compare_between(ended, delay, who):
    folder, status, errors = interrupt_compare(delay, who == "all", ended)
    assert status == 130 or (status == 0 and complete_runs(folder) == 4), (status, errors)
    assert complete_runs(folder) >= ended
    if complete_runs(folder) < 4:
        assert "interrupted" in errors and "missing" in errors, errors


@check([0.05], [0.2], [0.5])
def interrupted_compare_while_saving(delay):
    folder, status, errors = interrupt_compare(delay, True, 4)
    assert status in (0, 130), (status, errors)
    assert status == 130 or complete_runs(folder) == 4


# --- Files and consoles ---------------------------------------------------------------------------
@check(*each())
def windows_console(script):
    env = environment(PYTHONIOENCODING="cp1252")
    status, output, errors = train(script, env=env)
    assert status == 0 and "±" in output, errors
    status, output, errors = run(ROOT / f"{script}.py", "--help", env=env)
    assert status == 0 and "--steps" in output, errors


@check()
def windows_console_of_compare():
    env, folder = environment(PYTHONIOENCODING="cp1252"), new_folder()
    words = ["ppo", "--seeds", "1", "--steps", "2000", "--out", "compare.png"]
    status, output, errors = run(
        *["-X", "warn_default_encoding"], ROOT / "compare.py", *words, env=env, cwd=folder
    )
    assert status == 0 and "ppo" in output, errors
    assert files(folder) == ["compare.csv", "compare.png"]
    (folder / "compare.csv").read_text(encoding="utf-8")
    assert run(ROOT / "compare.py", "--help", env=env)[0] == 0


@check(["nowhere/x.png"], ["x.jpg"], ["x"], [""], ["folder.png"], ["/proc/x.png"], ["locked/x.png"])
def output_that_cannot_be_written(out):
    folder = new_folder()
    (folder / "folder.png").mkdir()
    (folder / "locked").mkdir(mode=0o555)
    if out.startswith("/proc") and sys.platform != "linux":
        raise Skip("no /proc")
    if out.startswith("locked") and (WINDOWS or os.geteuid() == 0):
        raise Skip("a read-only folder is none here, or for root")
    words = ["ppo", "--seeds", "1", "--steps", "100000000"]
    status, output, errors = run(ROOT / "compare.py", *words, "--out", out, cwd=folder, timeout=30)
    assert status == 2 and not output and "Traceback" not in errors, (status, errors)
    assert "--out" in errors.strip().splitlines()[-1], errors


@check(["limit"], ["replace"])
def full_disk(how):
    folder, limit = new_folder(), 10_000  # bytes: less than a picture
    if how == "limit" and WINDOWS:
        raise Skip("no limits on Windows")
    before = {"compare.png": b"an older picture", "compare.csv": b"older data"}
    for name, content in before.items():
        (folder / name).write_bytes(content)
    make_full = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    if how == "replace":
        make_full = """
import errno
def replace(*_): raise OSError(errno.ENOSPC, "No space left on device")
os.replace = replace
"""
    code = f"import os, sys, compare\n{make_full}\n"
    code += "sys.exit(compare.main('ppo --seeds 1 --steps 2000 --out compare.png'.split()))"
    path = f"{TEMP}{os.pathsep}{ROOT}"
    status, output, errors = run("-c", code, env=environment(PYTHONPATH=path), cwd=folder)
    assert status == 1 and "Traceback" not in errors, (status, errors)
    assert "compare.png" in errors.splitlines()[-1] and "ppo" in output, (output, errors)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before, files(folder)


# --- Watching -------------------------------------------------------------------------------------
@check(*each())
def watch_without_pygame(script):
    folder = new_folder()
    (folder / "pygame.py").write_text("raise ModuleNotFoundError('No module named pygame')\n")
    env = environment(PYTHONPATH=f"{folder}{os.pathsep}{TEMP}")
    status, output, errors = train(script, "--watch", env=env)
    assert status == 1 and "greedy policy" in output, (status, errors)
    assert len(errors.splitlines()) == 1 and "pip install" in errors, errors
    assert "classic" in errors, errors


@check(*each(["dummy"], ["none"]))
def watch_without_display(script, driver):
    if not importlib.util.find_spec("pygame"):
        raise Skip("pygame is not installed")
    if driver == "none" and sys.platform != "linux":
        raise Skip("there is always a display")
    hidden = "DISPLAY", "WAYLAND_DISPLAY", "SDL_VIDEODRIVER"
    env = {key: value for key, value in environment().items() if key not in hidden}
    env |= {"XDG_RUNTIME_DIR": str(TEMP)}  # or the window library complains of its absence
    env |= {"SDL_VIDEODRIVER": "dummy"} if driver == "dummy" else {}
    # pygame itself warns of its dependencies: only our own warnings count here
    status, output, errors = train(script, "--watch", env=env | {"PYGAME_HIDE_SUPPORT_PROMPT": "1"})
    assert status == 1 and "greedy policy" in output, (status, errors)
    assert len(errors.splitlines()) == 1 and "DISPLAY" in errors, errors


# --- All of them ----------------------------------------------------------------------------------
def attempt(case):
    """Make one check: (name, passed, what to say, seconds)."""
    name, function, given = case
    began, state = time.perf_counter(), "passed"
    try:
        note = function(*given) or ""
    except Skip as reason:
        state, note = "skipped", str(reason)
    except Exception as error:  # noqa: BLE001 - a failure of any kind
        state, note = "FAILED", f"{type(error).__name__}: {error}"
    return name, state, note, time.perf_counter() - began


def main():
    """Two at a time, but for those that count on timing; the exit status."""
    (TEMP / "guarded.py").write_text(ENVIRONMENTS, encoding="utf-8")
    sys.path.insert(0, str(TEMP))
    os.environ.pop("PYTHONWARNINGS", None)
    if not WINDOWS:  # a job in the background may ignore Ctrl-C: its children must not
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for script in SCRIPTS:  # before there are threads
        module(script)
    chosen = [case for case in CHECKS if OPTIONS.k in case[0]]
    alone = [case for case in chosen if case[1].__name__ in ("bad_input", "trpo_keeps_its_promise")]
    alone += [case for case in chosen if case[0].startswith("alone")]
    together = [case for case in chosen if case not in alone]
    count = dict.fromkeys(("passed", "FAILED", "skipped"), 0)
    with ThreadPoolExecutor(2) as pool:
        for name, state, note, seconds in itertools.chain(
            map(attempt, alone), pool.map(attempt, together)
        ):
            count[state] += 1
            print(f"{state:8}{name} ({seconds:.1f} s){': ' if note else ''}{note}", flush=True)
    print(f"{count['passed']} passed, {count['FAILED']} failed, {count['skipped']} skipped")
    return 1 if count["FAILED"] or not count["passed"] else 0


if __name__ == "__main__":
    arguments = ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("-k", default="", metavar="WORD", help="only checks that hold WORD")
    arguments.add_argument("--seeds", type=int, help="seeds of TRPO's promise, in whole runs")
    OPTIONS = arguments.parse_args()
    try:
        sys.exit(main())
    finally:
        shutil.rmtree(TEMP, ignore_errors=True)
