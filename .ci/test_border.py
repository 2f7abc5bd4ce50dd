"""What guards rather than teaches: settings, command line, seeds, figures that are not finite."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy, as in the scripts
import sys
from dataclasses import fields
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # beside the scripts, or in a folder below them
from test_smoke import BEGUN, STATES, Count, record, script

pytestmark = pytest.mark.filterwarnings("error")
__all__ = ["script"]  # a fixture
gym.register("Image-v0", Count, kwargs={"states": gym.spaces.Box(0, 1, (8, 8, 3))})
gym.register("Dict-v0", Count, kwargs={"states": gym.spaces.Dict({"x": STATES})})
gym.register("From1-v0", Count, kwargs={"actions": gym.spaces.Discrete(2, start=1)})


def test_parse(script):
    """Each field is an option (a switch, if bool), and an impossible number is a ValueError."""
    assert script.parse([]) == script.Settings()
    for field in fields(script.Settings):
        name, value = field.name, {str: "Acrobot-v1", int: 7, float: 0.125}.get(field.type)
        option = "--" + name.replace("_", "-"), str(value)
        if field.type is bool:
            value, option = (
                not field.default,
                [option[0].replace("--", "--no-" * field.default or "--")],
            )
        assert script.parse(option) == script.Settings(**{name: value})
        for wrong in (-1, float("nan")) if field.type in (int, float) else ():
            with pytest.raises(ValueError, match=f"{name} must be from .* to .*, not {wrong}"):
                script.Settings(**{name: wrong})


ENVS = ["Missing-v0", "missing:Missing-v0", "Image-v0", "Dict-v0", "From1-v0", "Pendulum-v1"]
COUNTS = [f"--{name} 0" for name in ("steps", "num-envs", "minibatches", "hidden")]
WRONG = ["--gamma 1.5", "--gae-lambda 2", "--horizon 1", "--seed x", "--unknown 3", *COUNTS]


@pytest.mark.parametrize("wrong", [*WRONG, *(f"--env {env}" for env in ENVS)])
def test_parse_and_make_env_refuse(script, capsys, wrong):
    """Exit status 2; the last line on standard error says what is wrong."""
    with pytest.raises(SystemExit) as stopped:
        script.parse(wrong.split())
    last = capsys.readouterr().err.splitlines()[-1].replace("_", "-")
    assert stopped.value.code == 2 and last.startswith(f"{script.__name__}.py: error: ")
    assert all(word.strip("-") in last for word in wrong.split())


def test_initial_network_and_initial_policy(script):
    """Normal weights of standard deviation gain / sqrt(inputs), biases 0. A policy: small gain."""
    net = script.initial_network(np.random.default_rng(1), (400, 300, 200), 0.1)
    policies = [script.initial_policy(script.Settings("Varied-v0", seed)) for seed in (0, 0, 1)]
    assert policies[0].sizes == (3, script.Settings.hidden, 4)
    assert np.array_equal(policies[0].theta, policies[1].theta)  # the same seed
    assert not np.isin(policies[0].W1, policies[2].W1).any()  # another seed
    for each, last in (net, 0.1), (policies[0], 0.01):
        layers = (each.W1, each.b1, 2**0.5), (each.W2, each.b2, 2**0.5), (each.W3, each.b3, last)
        for weights, bias, gain in layers:
            scaled, error = weights / gain * len(weights) ** 0.5, weights.size**-0.5
            assert abs(scaled.mean()) < 5 * error and abs(scaled.std() - 1) < 5 * error
            assert not bias.any() and np.isin(weights, each.theta).all()


def test_train_and_experience_follow_the_seed(script, monkeypatch):
    """The same seed gives the same rows. Weights, experience and minibatches have separate streams,
    and seeds share no episode (vector environments count seeds upwards: 0 1 2 ..., 1 2 3 ...)."""
    names = "initial_network", "experience", "fit_value"
    calls, rows, begun = [record(monkeypatch, script, name) for name in names], [], []
    for seed in (0, 1, 0):
        BEGUN.clear()
        rows += [next(script.train(script.Settings("Varied-v0", seed))) | {"seconds": 0}]
        begun += BEGUN[:8]
    given = [x for name in calls for call in name for x in call]
    draws = [x.random() for x in given if isinstance(x, np.random.Generator)]
    assert rows[0] == rows[2] != rows[1]
    assert len(draws) == 12 and len(set(draws)) == 8 and len(begun) == 24 and len(set(begun)) == 16


@pytest.mark.parametrize("broken", [{"value_learning_rate": 1e30}, {}])
def test_train_stops_when_not_finite(script, monkeypatch, broken):
    """Value function or policy: FloatingPointError names the update."""
    if not broken:
        monkeypatch.setattr(
            script, "update_policy", lambda policy, *_: policy.b1.fill(np.nan) or {}
        )
    with np.errstate(all="ignore"), pytest.raises(FloatingPointError, match=r"update \d+ "):
        list(script.train(script.Settings(steps=9000, **broken)))


def test_train_counts_returns_and_ignores_rounding(script, monkeypatch):
    """Mean of the last 20; solved once the last 100 averaged 475. Rewards that are equal but for
    rounding teach nothing, whatever their size. Where targets do not vary, none of it is explained."""

    def constant(env, policy, horizon, finished, rng):
        played = [], [0.0] * 30 + [500.0] * 50, [450.0] * 49, [450.0], [0.0] * 50 + [20.0] * 10
        for returns, size in zip(played, (0, 1, 0, 1e6, 1e-3)):
            finished.extend(returns)
            rewards = (size * (1 + 1e-7 * rng.random((50, 1)))).astype(np.float32)
            no = np.zeros((50, 1), bool)
            yield np.zeros((51, 1, 4), np.float32), no.astype(int), rewards, ~no, no, no

    monkeypatch.setattr(script, "experience", constant)
    rows = list(script.train(script.Settings(steps=250)))
    assert np.isnan(rows[0]["episode_return"])
    assert [row["episode_return"] for row in rows[1:]] == [500, 450, 450, 10]
    assert [row["solved"] for row in rows] == [False, False, False, True, True]
    assert not any(row["explained_variance"] for row in rows)
    assert not any(row["kl"] or row["step_norm"] for row in rows)


def test_train_explains_nothing_where_targets_do_not_vary(script, monkeypatch):
    """One-step episodes with reward 1 in random states: V varies, the targets only by rounding."""

    def one_step(env, policy, horizon, finished, rng):
        no = np.zeros((50, 1), bool)
        while True:
            states = rng.standard_normal((51, 1, 4)).astype(np.float32)
            yield states, no.astype(int), np.ones((50, 1), np.float32), ~no, no, no

    monkeypatch.setattr(script, "experience", one_step)
    rows = list(script.train(script.Settings(steps=150)))
    assert [row["explained_variance"] for row in rows] == [0, 0, 0]


def test_train_uses_its_settings(script, monkeypatch):
    """Sizes of both networks, minibatches and epochs of the value function, copies and horizon."""
    names = "initial_network", "fit_value", "experience"
    made, _, played = (record(monkeypatch, script, name) for name in names)
    steps = record(monkeypatch, script, "adam")
    settings = script.Settings("Varied-v0", steps=1, hidden=9, num_envs=3, horizon=21)
    settings.value_epochs, settings.minibatches = 2, 4
    next(script.train(settings))
    sizes = [[x for x in call if isinstance(x, tuple)] for call in made]
    assert sizes == [[(3, 9, 4)], [(3, 9, 1)]] and [call[2] for call in made] == [0.01, 1.0]
    assert played[0][0].num_envs == 3 and played[0][2] == 21
    assert sum(network.sizes[2] == 1 for network, *_ in steps) == 2 * 4
