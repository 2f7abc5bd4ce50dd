"""What guards rather than teaches: bad input, extremes, seeds, interrupts, TRPO's promise.

PROMISE_SEEDS=20 pytest .ci/test_border.py -k promise    checks the promise in 20 whole runs
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy
import ast
import copy
import importlib.util
import pickle
import re
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path
from subprocess import PIPE, Popen
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
NAMES = ["vpg", "trpo", "ppo"]
SCRIPTS = [importlib.import_module(name) for name in NAMES]
SMALL = ["--steps=1500", "--horizon=30", "--num-envs=4", "--hidden=16"]
each_script = pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
pytestmark = pytest.mark.filterwarnings("error")


# --- Environments: scripts find them as test_border:Plain-v0 --------------------------------------
class Plain(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gym.spaces.Discrete(2)
    length = 20
    scale = 1.0
    rewards = 1.0, 2.0

    def observe(self):
        return (self.scale * self.np_random.standard_normal(3)).astype(self.observation_space.dtype)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.observe(), {}

    def step(self, action):
        self.steps += 1
        return self.observe(), self.rewards[action], self.steps >= self.length, False, {}


class OwnReset(gym.vector.SyncVectorEnv):
    def __init__(self, num_envs, mode):
        super().__init__([Plain] * num_envs)
        modes = getattr(gym.vector, "AutoresetMode", {mode: SimpleNamespace(name=mode)})
        self.metadata = {"autoreset_mode": modes[mode]}  # Gymnasium 1.0 has no such modes


KINDS = {
    "Plain": {},
    "Endless": {"length": np.inf},
    "Instant": {"length": 1},
    "Huge": {"scale": 1e6, "rewards": (1e6, 2e6)},
    "Same": {"length": 1, "scale": 0.0, "rewards": (0.1, 0.1)},  # all advantages are equal
    "Nothing": {"length": 1, "scale": 0.0, "rewards": (0.0, 0.0)},
    "SameMillions": {"length": 1, "scale": 0.0, "rewards": (1e7, 1e7)},
    "Bandit": {"length": 1, "scale": 0.0, "rewards": (0.0, 1e-5)},
    "NotFinite": {"scale": np.nan},
    "Mistaken": {"rewards": ()},
    "Doubles": {"observation_space": gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)},
    "Image": {"observation_space": gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)},
    "FromOne": {"action_space": gym.spaces.Discrete(2, start=1)},
}
for name, changes in KINDS.items():
    gym.register(f"{name}-v0", type(name, (Plain,), changes), disable_env_checker=True)
for name, mode in ("ResetsAtOnce", "SAME_STEP"), ("ResetsNever", "DISABLED"):
    gym.register(f"{name}-v0", Plain, vector_entry_point=OwnReset, kwargs={"mode": mode})


# --- Helpers --------------------------------------------------------------------------------------
def start(path, *words, **variables):
    """Start a script; every warning is an error, but for those of other packages."""
    strict = ["-Werror", "-Wignore::DeprecationWarning", "-Werror:::__main__"]
    command = [sys.executable, "-u", *strict, path, *words]
    env = os.environ | {"PYTHONPATH": str(HERE), "PYTHONIOENCODING": "utf-8"} | variables
    return Popen(command, env=env, stdout=PIPE, stderr=PIPE, encoding=env["PYTHONIOENCODING"])


def run(path, *words, **variables):
    """Exit status, standard output and standard error."""
    with start(path, *words, **variables) as process:
        output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors


def train(script, settings, policy):
    """The rows of a whole run. All figures are finite, but for the return before an episode ends."""
    with np.errstate(all="ignore"):
        rows = list(script.train(settings, policy))
    for row in rows:
        unknown = {"episode_return"} if row["episodes"] == 0 else set()
        assert all(np.isfinite(row[key]) for key in row.keys() - unknown), row
    assert [row["steps"] >= settings.steps for row in rows] == [False] * (len(rows) - 1) + [True]
    return rows


def cases(column, *more):
    """(script, words): values of OPTIONS and more words, for the scripts that have these options."""
    singles = [f"--{name}={value}" for name in OPTIONS for value in OPTIONS[name][column].split()]
    for words in [*singles, *more]:
        names = {name.replace("-", "_") for name in re.findall(r"--(?:no-)?([\w-]+)", words)}
        for script in SCRIPTS:
            if all(hasattr(script.Settings, name) for name in names):
                yield pytest.param(script, words, id=f"{script.__name__} {words}")


OPTIONS = {  # what is refused, and what is extreme
    "steps": ("0 -1 x 1.5", "1"),
    "num-envs": ("0 -1", "1"),
    "horizon": ("0 1 -3", "2"),
    "seed": ("-1 x", "0"),
    "gamma": ("-0.1 1.1 nan", "0 1"),
    "gae-lambda": ("-0.1 2 nan", "0 1"),
    "hidden": ("0 -2", "1"),
    "minibatches": ("0", "1 500"),
    "value-epochs": ("-1", "0"),
    "value-learning-rate": ("-1 nan inf", "0 1e-12 1000"),
    "learning-rate": ("-1 nan inf", "0 1e-12 1 1000"),
    "clip": ("-0.1 nan", "0 1e-9 inf"),
    "epochs": ("0", "40"),
    "target-kl": ("-1 nan", "0"),
    "delta": ("0 -1 nan inf", "1e-12 1e-6 1 100 1e6"),
    "damping": ("-1 nan inf", "0 1000"),
    "cg-iterations": ("0", "100"),
    "max-backtracks": ("-1", "0"),
    "backtrack-factor": ("-1 1.5 nan", "0 1"),
    "env": (
        "Missing-v0 missing:Env-v0 FrozenLake-v1 Blackjack-v1 Pendulum-v1 Image-v0 FromOne-v0",
        "Acrobot-v1 Endless-v0 Instant-v0 Huge-v0 Same-v0 Nothing-v0 SameMillions-v0",
    ),
}
TOGETHER = [
    "--num-envs=1 --horizon=2 --steps=50",
    "--num-envs=1 --horizon=2 --steps=50 --env=Instant-v0",
    "--gamma=1 --gae-lambda=1 --env=Endless-v0",
    "--clip=inf --epochs=20 --learning-rate=1",
    "--delta=100 --no-line-search",
    "--damping=0 --cg-iterations=100",
]


# --- Command line and bad input -------------------------------------------------------------------
@each_script
def test_every_setting_is_an_option_with_help(script):
    status, text, errors = run(script.__file__, "--help", PYTHONIOENCODING="cp1252")
    assert (status, errors, script.parse([])) == (0, "", script.Settings())
    for field in fields(script.Settings):
        option = "--" + field.name.replace("_", "-")
        assert option in text
        assert f"(default: {field.default})" in " ".join(text.split())
        value = {str: "Acrobot-v1", int: 7, float: 0.125, bool: not field.default}[field.type]
        words = {True: [option], False: [option.replace("--", "--no-")]}.get(
            value, [option, str(value)]
        )
        assert script.parse(words) == script.Settings(**{field.name: value})


@pytest.mark.parametrize(
    ("script", "option"), [*cases(0, "--env=ResetsAtOnce-v0", "--env=ResetsNever-v0")]
)
def test_bad_option_is_refused(script, option, capsys):
    """Status 2; usage, then one line with the option and what is allowed. Settings refuse it, too."""
    with pytest.raises(SystemExit) as stopped:
        script.parse([option])
    printed = capsys.readouterr()
    usage, error = printed.err.split("error: ")
    name, value = option.strip("-").split("=")
    assert (stopped.value.code, printed.out, error.count("\n")) == (2, "", 1)
    assert usage.startswith("usage: ") and name in error.lower().replace("_", "-")
    if name != "env" and "invalid" not in error:
        with pytest.raises(ValueError, match=" must be from .* to .*, not "):
            script.Settings(**{name.replace("-", "_"): float(value)})


@each_script
@pytest.mark.parametrize("words", ["--steps 0", "--env Pendulum-v1", "--unknown 1", "--see 1", "x"])
def test_bad_input_as_a_program(script, words):
    status, output, errors = run(script.__file__, *words.split())
    assert (status, output) == (2, "")
    assert errors.splitlines()[-1].startswith(f"{script.__name__}.py: error: ")
    assert words.split()[0].strip("-") in errors.splitlines()[-1]


# --- Extremes -------------------------------------------------------------------------------------
@pytest.mark.parametrize(("script", "words"), [*cases(1, *TOGETHER)])
def test_extremes_give_finite_figures(script, words):
    settings = script.parse([*SMALL, *words.split()])
    policy = script.initial_policy(settings)
    train(script, settings, policy)
    env = script.make_env(settings, 3)
    returns = script.evaluate(policy, env, np.random.default_rng(0), max_steps=50)
    assert np.isfinite([*returns, *policy.theta]).all()


ENDINGS = ["--steps=1 --num-envs=1 --horizon=2", "--env=test_border:Endless-v0"]
if importlib.util.find_spec("pygame"):  # .ci/run installs it with the newest packages
    ENDINGS.append("--watch")


@each_script
@pytest.mark.parametrize("words", ENDINGS)
def test_programs_come_to_their_end(script, words):
    """Before any episode; with episodes that never end; after a window has shown the policy."""
    variables = {"SDL_VIDEODRIVER": "dummy", "PYGAME_HIDE_SUPPORT_PROMPT": "1"}
    status, output, errors = run(script.__file__, *SMALL, *words.split(), **variables)
    assert (status, errors) == (0, "")
    assert re.search(r"\ngreedy policy, 100 fresh episodes: [\d.]+ ± [\d.]+\n$", output)


@each_script
@pytest.mark.parametrize("logit", [30, 1000, 1e30])
def test_a_policy_that_is_deterministic_already(script, logit):
    settings = script.parse(SMALL)
    policy = script.initial_policy(settings)
    policy.theta = np.concatenate([policy.theta[:-2], np.float32([logit, -logit])])
    train(script, settings, policy)


@each_script
def test_observations_that_are_not_finite(script):
    status, output, errors = run(script.__file__, "--env=test_border:NotFinite-v0")
    assert (status, output.count("\n")) == (1, 1)  # the header alone
    assert re.fullmatch(r"update 1 is no longer finite: .+\n", errors)


@each_script
@pytest.mark.parametrize("function", ["update_policy", "fit_value"])
def test_training_stops_at_a_network_that_is_not_finite(script, function, monkeypatch):
    def spoil(network, *_):
        network.theta = network.theta * np.float32(np.nan)
        return {}

    monkeypatch.setattr(script, function, spoil)
    settings = script.parse(SMALL)
    with pytest.raises(FloatingPointError, match="update 1 is no longer finite: "):
        train(script, settings, script.initial_policy(settings))


@each_script
def test_parameters_stay_float32_whatever_the_observations(script):
    settings = script.parse([*SMALL, "--env=Doubles-v0"])
    policy = script.initial_policy(settings)
    train(script, settings, policy)
    assert policy.theta.dtype == policy.adam_m.dtype == np.float32


# --- Programs: seeds, interrupts, mistakes, imports -----------------------------------------------
@each_script
def test_same_seed_same_figures_in_another_process(script, tmp_path):
    """And in a copy that lies alone; on a console that cannot show every character, too."""
    copy = tmp_path / "mine.py"
    copy.write_bytes(Path(script.__file__).read_bytes())
    printed = []
    for path, seed in (script.__file__, 3), (copy, 3), (copy, 4):
        variables = {"PYTHONIOENCODING": "cp1252", "PYTHONPATH": ""}
        status, output, errors = run(path, *SMALL, f"--seed={seed}", **variables)
        assert (status, errors) == (0, "")
        printed.append([line.split()[:5] for line in output.splitlines()])  # without the seconds
    assert printed[0] == printed[1] != printed[2]


if sys.platform != "win32":  # where no signal reaches one process alone

    @each_script
    @pytest.mark.parametrize("delay", [0, 0.02, 0.1, 0.5])
    def test_ctrl_c_ends_silently(script, delay):
        signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
        with start(script.__file__, "--steps=100000000") as process:
            process.stdout.readline()
            process.stdout.readline()  # the first row: training has begun
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, "")


MISTAKES = {"AttributeError": "batch.advantage", "ValueError": "int('three')", "IndexError": ""}


@each_script
@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_shows_its_place(script, kind, tmp_path):
    """In a learner's own line, or in an environment's step."""
    text = Path(script.__file__).read_text(encoding="utf-8")
    text = re.sub(r"(def update_policy\(.*\n)", rf"\1    {MISTAKES[kind]}  # mine\n", text)
    (tmp_path / "mine.py").write_text(text, encoding="utf-8")
    env, place = "Plain", r"mine.py.*, in update_policy\n.*# mine\n"
    if kind == "IndexError":
        env, place = "Mistaken", r"test_border.py.*, in step\n.+\n"
    status, _, errors = run(tmp_path / "mine.py", *SMALL, f"--env=test_border:{env}-v0")
    assert (status, errors.split()[0]) == (1, "Traceback")
    assert re.search(rf"{place}(.*\^\n)?{kind}: .+\n$", errors)


@pytest.mark.parametrize("path", sorted(HERE.parent.glob("*.py")), ids=lambda path: path.name)
def test_imports(path):
    """The standard library, NumPy, Gymnasium; Matplotlib to draw, pytest to test. No sibling."""
    allowed = sys.stdlib_module_names | {"numpy", "gymnasium"}
    if path.stem in ("compare", "test_smoke"):
        allowed |= {"matplotlib", "pytest"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            imported = [node.module]
        assert {name.split(".")[0] for name in imported} <= allowed


# --- TRPO's promise -------------------------------------------------------------------------------
SEEDS = int(os.environ.get("PROMISE_SEEDS", "0"))


@pytest.mark.parametrize("seed", range(SEEDS or 2))
@pytest.mark.parametrize("delta", [0.001, 0.01, 0.1, 1])
def test_trpo_keeps_its_promise_in_every_update(delta, seed, monkeypatch):
    """In float64: KL at most delta, and the surrogate has grown; or theta is what it was."""
    trpo = importlib.import_module("trpo")
    update_policy = trpo.update_policy
    moved = []

    def log_probs(policy, batch):
        logits, _ = trpo.forward(policy, batch.states)
        return trpo.log_softmax(logits.astype(np.float64))

    def watched(policy, batch, *rest):
        theta_old = policy.theta.copy()
        before = log_probs(policy, batch)
        figures = update_policy(policy, batch, *rest)
        change = log_probs(policy, batch) - before
        ratios = np.exp(change[np.arange(len(batch.actions)), batch.actions])
        moved.append(not np.array_equal(policy.theta, theta_old))
        assert -(np.exp(before) * change).sum(axis=1).mean() <= 1.001 * delta
        assert (batch.advantages * (ratios - 1)).mean() > -1e-7 or not moved[-1]
        return figures

    monkeypatch.setattr(trpo, "update_policy", watched)
    settings = trpo.Settings(seed=seed, delta=delta, steps=150_000 if SEEDS else 12_000)
    rows = train(trpo, settings, trpo.initial_policy(settings))
    assert len(moved) == len(rows) and any(moved)


# --- Copies, and rewards near 0 -------------------------------------------------------------------
@each_script
@pytest.mark.parametrize("trained", [False, True])
def test_copies_learn_on(script, tmp_path, trained):
    """As the original would, and without it. A saved theta lacks what Adam remembers.
    (248 is what two batches hold: a third one would be a step too many.)"""
    small = {"env": "Plain-v0", "num_envs": 8, "horizon": 16, "hidden": 5, "steps": 248}
    policy = script.initial_policy(script.Settings(**small))
    if trained:
        train(script, script.Settings(**small), policy)
    theta = policy.theta.copy()
    np.save(tmp_path / "theta.npy", theta)
    saved = script.initial_policy(script.Settings(**small))
    saved.theta = np.load(tmp_path / "theta.npy")
    thetas = []
    for one in [copy.deepcopy(policy), pickle.loads(pickle.dumps(policy)), saved]:
        train(script, script.Settings(**small, seed=1), one)
        thetas.append(one.theta)
    assert np.array_equal(policy.theta, theta) and not np.array_equal(saved.theta, theta)
    train(script, script.Settings(**small, seed=1), policy)
    assert np.array_equal(thetas[0], policy.theta) and np.array_equal(thetas[1], policy.theta)
    assert np.array_equal(thetas[2], policy.theta) == (not trained or script.__name__ == "trpo")


@each_script
def test_bandit_with_tiny_rewards_learns(script):
    settings = script.Settings("Bandit-v0", num_envs=8, horizon=16, hidden=5, steps=4000)
    policy = script.initial_policy(settings)
    train(script, settings, policy)
    logits, _ = script.forward(policy, np.zeros((1, 3)))
    assert np.exp(script.log_softmax(logits))[0, 1] > 0.9
