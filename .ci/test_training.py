"""Trainings that test_smoke.py has no room for: copied and saved policies, rewards near 0."""

import copy
import pickle
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_smoke

script = test_smoke.script  # the fixture
SMALL = {"env": "Counting-v0", "num_envs": 8, "horizon": 16, "hidden": 5, "steps": 300}


def run(script, policy, **own):
    """The rows of a short training, all but their seconds."""
    rows = script.train(script.Settings(**(SMALL | own)), policy)
    return [row | {"seconds": 0} for row in rows]


@pytest.mark.parametrize("trained", [False, True])
def test_copies_learn_on(script, tmp_path, trained):
    """As the original would, and without it. A saved theta lacks what Adam remembers."""
    policy = script.initial_policy(script.Settings(**SMALL))
    if trained:
        run(script, policy)
    theta = policy.theta.copy()
    np.save(tmp_path / "theta.npy", theta)
    saved = script.initial_policy(script.Settings(**SMALL))
    saved.theta = np.load(tmp_path / "theta.npy")
    copies = [copy.deepcopy(policy), pickle.loads(pickle.dumps(policy)), saved]
    rows = [run(script, one, seed=1) for one in copies]
    assert (policy.theta == theta).all() and (saved.theta != theta).any()
    assert rows[0] == rows[1] == run(script, policy, seed=1)
    assert (rows[0] == rows[2]) == (not trained or hasattr(script, "line_search"))


class Bandit(test_smoke.Counting):
    """Episodes of one step, always in the same state; each action earns 1e-5 more than the next."""

    def step(self, actions):
        self.states = np.zeros((self.num_envs, 3))
        rewards = np.where(self.resetting, 1000, 1e-5 * np.asarray(actions))
        self.resetting = ~self.resetting
        return self.states, rewards, self.resetting, np.zeros(self.num_envs, bool), {}


gym.register("Bandit-v0", vector_entry_point=Bandit)


def test_bandit_with_tiny_rewards(script):
    gym.register(
        "Bandit-v0", vector_entry_point=Bandit
    ) if "Bandit-v0" not in gym.registry else None
    policy = script.initial_policy(script.Settings(**SMALL))
    run(script, policy, env="Bandit-v0", steps=4000)
    logits, _ = script.forward(policy, np.zeros((1, 3)))
    assert np.exp(script.log_softmax(logits))[0, 3] > 0.9
