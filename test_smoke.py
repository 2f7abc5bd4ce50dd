# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "gymnasium>=1.0", "matplotlib>=3.8", "pytest"]
# ///
"""The proof that the mathematics is right, and the grader of your own versions of it.

Most tests hold a function against its definition, computed in another way: a plain loop, central
finite differences, an explicit matrix. They are named after it, and run on every one of vpg.py,
trpo.py and ppo.py that lies beside this file. Wrote your own conjugate_gradient? Check it:

    pytest -k conjugate_gradient        All tests:  python test_smoke.py  (or pytest)
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in the scripts
import copy
import importlib
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":  # here, since pytest imports this file again
    sys.exit(pytest.main([__file__, "--rootdir", str(HERE), *sys.argv[1:]]))
sys.path.insert(0, str(HERE))
NAMES = [name for name in ("vpg", "trpo", "ppo") if (HERE / f"{name}.py").exists()]
if not NAMES:
    pytest.exit(f"put vpg.py, trpo.py or ppo.py beside test_smoke.py in {HERE}", returncode=2)
SCRIPTS = {name: importlib.import_module(name) for name in NAMES}
pytestmark = pytest.mark.filterwarnings("error")  # a division by zero, say, fails the test


# --- Helpers --------------------------------------------------------------------------------------
def only(*names):
    """@only("ppo"): the test runs on that script, as its argument `script`, if it is there."""
    there = {name: SCRIPTS[name] for name in names if name in SCRIPTS}
    mark = pytest.mark.parametrize("script", there.values(), ids=there)
    return mark if there else lambda test: None


@pytest.fixture(params=NAMES)
def script(request):  # without @only: runs on every script that is there
    return SCRIPTS[request.param]


def assert_close(actual, expected, tolerance=1e-6):
    assert np.shape(actual) == np.shape(expected)
    assert np.linalg.norm(actual - expected) <= tolerance * np.linalg.norm(expected)


def finite_difference(function, point, width=1e-5):
    """Derivatives of a function in each coordinate of a point: central differences."""
    steps = width * np.eye(len(point))
    return np.array([function(point + s) - function(point - s) for s in steps]) / (2 * width)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)


class Batch:
    """A random policy for 3 inputs and 4 actions, and 12 made-up transitions, in float64."""

    def __init__(self, script, seed=7):
        rng, self.script = np.random.default_rng(seed), script
        self.policy = script.Network((3, 5, 4), rng.standard_normal(74))
        self.theta, self.direction = self.policy.theta.copy(), rng.standard_normal(74)
        self.observations, self.actions = rng.standard_normal((12, 3)), rng.integers(4, size=12)
        self.advantages, self.taken = rng.standard_normal(12), (np.arange(12), self.actions)
        self.logits, self.activations = self.forward(self.theta)
        self.probs = softmax(self.logits)

    def forward(self, theta):
        return self.script.forward(self.script.Network((3, 5, 4), theta), self.observations)

    def ratio(self, theta):  # pi(a|s; theta) / pi(a|s; theta_old) of every action
        return softmax(self.forward(theta)[0]) / self.probs

    def surrogate(self, theta):  # mean of A * pi / pi_old over the transitions
        return (self.advantages * self.ratio(theta)[self.taken]).mean()

    def kl(self, theta):
        return -(self.probs * np.log(self.ratio(theta))).sum(axis=1).mean()

    def update(self, decay=1.0, **own):
        """Run update_policy: the step that theta took, and the figures."""
        given = self.observations, self.actions, self.advantages, self.script.Settings(**own)
        figures = self.script.update_policy(self.policy, *given, decay, np.random.default_rng(0))
        return self.policy.theta - self.theta, figures


def record(monkeypatch, script, name):
    """A list to which every call of that function adds a copy of its arguments from now on."""
    calls, function = [], getattr(script, name)

    def spy(*given):
        as_they_are = {id(x): x for x in given if isinstance(x, gym.vector.VectorEnv)}
        calls.append(copy.deepcopy(given, as_they_are))  # not every environment can be copied
        return function(*given)

    monkeypatch.setattr(script, name, spy)
    return calls


BEGUN = []  # the first observation of each episode of Count
STATES, ACTIONS = gym.spaces.Box(-np.inf, np.inf, (3,)), gym.spaces.Discrete(4)


class Count(gym.Env):
    """Observes (time, length of the episode, its own random number); rewards time + action."""

    def __init__(self, length=None, states=STATES, actions=ACTIONS):
        self.length, self.observation_space, self.action_space = length, states, actions

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        number, length = self.np_random.random(), self.length or self.np_random.integers(2, 7)
        self.observation = np.array([0, length, number], np.float32)
        BEGUN.append(tuple(self.observation))
        return self.observation, {}

    def step(self, action):
        self.observation = self.observation + np.array([1, 0, 0], np.float32)
        time, length, _ = self.observation
        return self.observation, float(time + action), bool(time == length), False, {}


gym.register("Varied-v0", Count, max_episode_steps=5)
gym.register("Terminated-v0", Count, kwargs={"length": 3})
gym.register("Truncated-v0", Count, kwargs={"length": 9}, max_episode_steps=3)


# --- The files, their settings and command line ---------------------------------------------------
def test_shared_parts_are_identical():
    """Without docstring, own settings and section 6, the scripts are the same to the byte."""
    texts = [(HERE / f"{name}.py").read_bytes().decode() for name in NAMES]
    for own in '""".*?"""\n', "(?<=The algorithm's own:\n).*?\n\n", "# --- 6.*?(?=# --- 7)":
        assert all(re.search(own, text, re.DOTALL) for text in texts)
        texts = [re.sub(own, "", text, count=1, flags=re.DOTALL) for text in texts]
    assert texts == texts[:1] * len(texts)


def test_script_runs_alone(script, tmp_path):
    """In an empty folder, from start to end; even a warning would be an error."""
    (tmp_path / "alone.py").write_bytes(Path(script.__file__).read_bytes())
    command = [sys.executable, "-W", "error", "-X", "utf8", "alone.py", "--steps", "2500"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert re.search(r"\ngreedy policy, 100 fresh episodes: \d+\.\d ± \d+\.\d\n$", run.stdout)


def test_settings(script):
    """An impossible value is a ValueError that names it and says what is allowed."""
    for name, wrong in ("gamma", 1.5), ("steps", 0), ("gae_lambda", float("nan")):
        with pytest.raises(ValueError, match=f"{name} must be from .* to .*, not {wrong}"):
            script.Settings(**{name: wrong})


# --- Network and policy ---------------------------------------------------------------------------
def test_forward(script):
    """Unit by unit: tanh of the bias plus the weighted inputs; the last layer without the tanh."""
    net, inputs = Batch(script).policy, np.random.default_rng(0).standard_normal((2, 6, 3))
    for index in np.ndindex(2, 6):
        y = inputs[index]
        for W, b in (net.W1, net.b1), (net.W2, net.b2), (net.W3, net.b3):
            sums = [b[j] + sum(y[i] * W[i, j] for i in range(len(y))) for j in range(len(b))]
            y = np.tanh(sums)
        assert_close(script.forward(net, inputs)[0][index], sums, 1e-12)


def test_backward(script):
    """The gradient in theta of sum(c * outputs), since c is its gradient in the outputs."""
    batch, c = Batch(script), np.random.default_rng(1).standard_normal((12, 4))
    expected = finite_difference(lambda theta: (c * batch.forward(theta)[0]).sum(), batch.theta)
    assert_close(script.backward(batch.policy, batch.activations, c), expected)


def test_adam(script):
    """As in Kingma & Ba 2015 (in the order of the last lines of section 2), but uphill."""
    network, m, v = Batch(script).policy, 0, 0
    theta = network.theta.copy()
    for t in range(1, 6):
        g = np.random.default_rng(t).standard_normal(len(theta))
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        theta += 0.01 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 1e-8)
        script.adam(network, g, 0.01)
    assert_close(network.theta, theta, 1e-12)


def test_log_softmax_and_kl(script):
    """log(exp(logit) / sum of exp), without overflow; mean over s of sum_a old log(old / new)."""
    old, new, logits = Batch(script, 1).probs, Batch(script, 2).probs, Batch(script, 2).logits
    assert_close(script.log_softmax(logits), np.log(new), 1e-12)
    huge = script.log_softmax(np.array([[1e4, 0.0, 1e4], [-2e4, -1e4, -1e4]]))
    assert_close(huge, np.array([[0, -1e4, 0], [-1e4, 0, 0]]) - np.log(2), 1e-12)
    for p, q in (old, new), (new, old), (old, old):  # not symmetric, and 0 for equals
        direct = sum(p[i] * np.log(p[i] / q[i]) for i in np.ndindex(12, 4)) / 12
        assert script.kl(np.log(p), np.log(q)) == pytest.approx(direct, rel=1e-12, abs=0)


def test_policy_gradient(script):
    """Of the mean of A log pi(a|s); at theta_old it is the surrogate's gradient."""
    batch = Batch(script)
    given = batch.activations, np.log(batch.probs), batch.actions, batch.advantages
    expected = finite_difference(batch.surrogate, batch.theta)
    assert_close(script.policy_gradient(batch.policy, *given), expected)


# --- Experience, advantages and values ------------------------------------------------------------
@pytest.mark.parametrize("end", ["terminated", "truncated"])
def test_experience(script, end):
    """Episodes of 3 steps in batches of 3 calls, times 0 1 2 | 3 0 1 | 2 3 0 | 1 2 3. At 3 the true
    final state is observed, and the next call is a mere reset. Actions come as often as expected."""
    finished, env = [], script.make_env(script.Settings(f"{end.title()}-v0"), 400)
    policy, probs = script.Network((3, 5, 4)), np.array([0.5, 0.3, 0.15, 0.05])
    policy.b3[:] = np.log(probs)
    source = script.experience(env, policy, 3, finished, np.random.default_rng(0))
    states, *columns = (np.array(parts) for parts in zip(*(next(source) for _ in range(4))))
    actions, rewards, *flags = (column.reshape(12, 400) for column in columns)
    time = np.array([0, 1, 2, 3] * 3)[:, None]
    assert (states[:, :-1, :, 0].reshape(12, 400) == time).all() and states.dtype == np.float32
    assert (states[:-1, -1] == states[1:, 0]).all()
    assert (rewards == (time + 1 + actions) * (time < 3)).all()
    for flag, right in zip(flags[:2], (end == "terminated", end == "truncated")):
        assert (flag == (time == 2) * right).all()
    assert (flags[2] == (time == 3)).all()
    assert finished == [x for t in (0, 4, 8) for x in rewards[t : t + 3].sum(axis=0)]
    error = np.sqrt(probs * (1 - probs) / actions.size)
    assert (np.abs(np.bincount(actions.flat) / actions.size - probs) < 5 * error).all()


def test_gae(script):
    """A_t = sum over the rest of the episode of (gamma lambda)^k delta_{t+k}, term by term."""
    rng, terminated, truncated = np.random.default_rng(0), *np.zeros((2, 10, 4), bool)
    rewards, values, advantages = *rng.standard_normal((2, 11, 4)), np.zeros((10, 4))
    terminated[[0, 3, 9], [0, 3, 1]] = True  # also in the first row and in the last
    truncated[[0, 5, 9, 8], [1, 0, 0, 3]] = True
    resetting = np.roll(terminated | truncated, 1, axis=0)  # the calls after an end
    resetting[0] = [False, False, True, False]
    for start, n in zip(*np.nonzero(~resetting)):
        for t in range(start, 10):
            following = 0 if terminated[t, n] else values[t + 1, n]
            delta = rewards[t, n] + 0.9 * following - values[t, n]
            advantages[start, n] += (0.9 * 0.7) ** (t - start) * delta
            if terminated[t, n] or truncated[t, n]:
                break
    given = rewards[:10], values, terminated, truncated, resetting
    assert_close(script.gae(*given, 0.9, 0.7), advantages, 1e-12)


def test_fit_value(script, monkeypatch):
    """Adam steps down the gradient of the mean of (V - target)^2 / 2: V becomes the targets' mean."""
    calls, rng = record(monkeypatch, script, "adam"), np.random.default_rng(0)
    value, states = script.Network((3, 5, 1), rng.standard_normal(56)), np.eye(3).repeat(4, axis=0)
    theta, targets = value.theta.copy(), rng.standard_normal(12)
    V = lambda theta: script.forward(script.Network((3, 5, 1), theta), states)[0][:, 0]
    gradient = finite_difference(lambda theta: ((V(theta) - targets) ** 2).mean() / 2, theta)
    settings = script.Settings(value_epochs=1, minibatches=1)
    script.fit_value(value, states, targets, settings, 0.03, rng)
    assert_close(calls[0][1], -gradient)
    for rate in 1e-2, 1e-3, 1e-4:
        script.fit_value(value, states, targets, script.Settings(value_epochs=300), rate, rng)
    assert_close(V(value.theta), targets.reshape(3, 4).mean(axis=1).repeat(4), 0.05)
    steps = 300 * script.Settings.minibatches
    assert [rate for *_, rate in calls] == [0.03] + [1e-2] * steps + [1e-3] * steps + [1e-4] * steps


# --- The update: VPG and PPO ----------------------------------------------------------------------
def test_update_policy_goes_uphill(script):
    """A small update raises the surrogate; without advantages, nothing moves."""
    batch, still = Batch(script), Batch(script)
    batch.update(**{"delta": 1e-6} if script.__name__ == "trpo" else {"learning_rate": 1e-5})
    assert batch.surrogate(batch.policy.theta) > batch.surrogate(batch.theta)
    still.advantages = np.zeros(12)
    step, figures = still.update()
    assert not step.any() and np.isfinite(list(figures.values())).all()


def clipped_surrogate(ratio, advantages, clip):
    return np.minimum(ratio * advantages, np.clip(ratio, 1 - clip, 1 + clip) * advantages)


@only("vpg", "ppo")
def test_update_policy_is_adam_along_the_gradient(script, monkeypatch):
    """Of mean of min(r A, clip(r) A), r relative to the policy before (VPG: r = 1, nothing clipped)."""
    calls, batch = record(monkeypatch, script, "adam"), Batch(script)
    epochs = {"epochs": 4, "minibatches": 1, "clip": 0.2} if script.__name__ == "ppo" else {}
    _, figures = batch.update(decay=0.5, learning_rate=0.3, **epochs)
    ratio, beyond = lambda theta: batch.ratio(theta)[batch.taken], []
    objective = lambda theta: clipped_surrogate(ratio(theta), batch.advantages, 0.2).mean()
    for network, gradient, learning_rate in calls:
        assert_close(gradient, finite_difference(objective, network.theta))
        assert learning_rate == 0.5 * 0.3
        beyond.append(np.abs(ratio(network.theta) - 1) > 0.2)
    assert figures == ({"clip_fraction": np.mean(beyond), "epochs": 4} if epochs else {})
    assert len(calls) == epochs.get("epochs", 1) and np.any(beyond) == bool(epochs)


@only("ppo")
@pytest.mark.parametrize("clip", [0, 0.2, 1.5, float("inf")])
def test_clipped_surrogate_gradient(script, clip):
    """The derivative of min(r A, clip(r) A) on both sides of the clip, for both signs of A."""
    ratio, advantages = np.repeat([0.1, 0.7, 0.9, 1.1, 1.3, 4.0], 3), np.tile([-3.0, 0.0, 5.0], 6)
    up, down = (clipped_surrogate(ratio + h, advantages, clip) for h in (1e-6, -1e-6))
    gradient = script.clipped_surrogate_gradient(ratio, advantages, clip)
    np.testing.assert_allclose(gradient, (up - down) / 2e-6, rtol=1e-6)
    # The lesson: pi_old 0.2, pi_new 0.8, A = 5. Ratio 4, contribution 20; clipped at 0.2: 6.
    for bound, contribution, slope in (float("inf"), 20, 5), (0.2, 6, 0):
        lesson = np.array([0.8 / 0.2]), np.array([5.0]), bound
        assert clipped_surrogate(*lesson) == contribution
        assert script.clipped_surrogate_gradient(*lesson) == slope


@only("ppo")
def test_update_policy_epochs_and_minibatches(script, monkeypatch):
    """Every epoch uses each transition once, in other company; the first with KL > target_kl ends."""
    calls, batch = record(monkeypatch, script, "policy_gradient"), Batch(script)
    batch.update(epochs=3, minibatches=4)
    used = np.array([inputs[:, 0] for _, (inputs, *_), *_ in calls])
    assert used.shape == (12, 3) and len({frozenset(part) for part in used.tolist()}) == 12
    assert (np.sort(used.reshape(3, 12)) == np.sort(batch.observations[:, 0])).all()
    own = {"learning_rate": 0.01, "minibatches": 1}  # so that the KL grows from epoch to epoch
    for epochs in (1, 2, 3):
        batch = Batch(script)
        kl = batch.kl(batch.theta + batch.update(epochs=epochs, **own)[0])
        for target_kl, enough in (kl * (1 - 1e-9), epochs), (kl * (1 + 1e-9), epochs + 1):
            assert Batch(script).update(epochs=9, target_kl=target_kl, **own)[1]["epochs"] == enough


# --- The update: TRPO -----------------------------------------------------------------------------
def fisher_matrix(script, batch, damping):
    """By its definition: the mean over states of the expectation over actions of score score^T."""
    fisher = damping * np.eye(74)
    for s, a in np.ndindex(12, 4):
        state, log_probs = [layer[[s]] for layer in batch.activations], np.log(batch.probs[[s]])
        score = script.policy_gradient(batch.policy, state, log_probs, np.array([a]), np.ones(1))
        fisher += batch.probs[s, a] * np.outer(score, score) / 12
    return fisher


@only("trpo")
def test_jacobian_vector_product_and_fisher_vector_product(script):
    """J v and F v are the derivatives along v of the logits and of the KL's gradient."""
    batch = Batch(script)

    def logits_and_gradient(h):
        network = script.Network((3, 5, 4), batch.theta + h * batch.direction)
        logits, activations = batch.forward(network.theta)
        gradient = script.backward(network, activations, (softmax(logits) - batch.probs) / 12)
        return np.concatenate([logits.ravel(), gradient])

    expected = finite_difference(logits_and_gradient, [0.0])[0]
    given = batch.policy, batch.activations
    Jv = script.jacobian_vector_product(*given, batch.direction)
    assert_close(Jv, expected[:48].reshape(12, 4))
    assert_close(script.fisher_vector_product(*given, batch.probs, batch.direction), expected[48:])


@only("trpo")
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_fisher_vector_product_is_symmetric(script, damping):
    """F + damping I, column by column: by definition, symmetric, without negative eigenvalues."""
    batch = Batch(script)
    given = batch.policy, batch.activations, batch.probs
    matrix = np.array([script.fisher_vector_product(*given, v, damping) for v in np.eye(74)])
    assert_close(matrix, fisher_matrix(script, batch, damping), 1e-10)
    assert_close(matrix, matrix.T, 1e-12)
    assert np.linalg.eigvalsh(matrix).min() > damping - 1e-12


@only("trpo")
def test_conjugate_gradient(script):
    """Solves A x = b, with a product for each different eigenvalue of A, and no more than given."""
    rng, vectors = np.random.default_rng(0), []
    b, basis = rng.standard_normal(8), np.linalg.qr(rng.standard_normal((8, 8)))[0]
    A = basis @ np.diag([1, 1, 1, 2, 2, 2, 9, 9]) @ basis.T
    x = script.conjugate_gradient(lambda v: vectors.append(v) or A @ v, b, 20)
    assert len(vectors) == 3
    assert_close(x, np.linalg.solve(A, b), 1e-12)
    assert_close(script.conjugate_gradient(A.dot, b, 1), (b @ b) / (b @ A @ b) * b, 1e-12)
    for scale in 0, 1e-9, 1e9:  # no tolerance is absolute; for 0, no division by zero
        assert_close(script.conjugate_gradient(A.dot, scale * b, 5), scale * x, 1e-12)


def search(script, batch, step, **own):
    batch.policy.theta[:] = batch.theta
    given = batch.observations, batch.actions, batch.advantages, np.log(batch.probs)
    return script.line_search(batch.policy, step, *given, script.Settings(**own))


@only("trpo")
def test_line_search_takes_the_first_good_step(script):
    """With KL <= delta and a larger surrogate. (The full step, if the KL were quadratic.)"""
    batch = Batch(script)
    step, _ = batch.update(delta=1.0, line_search=False)
    figures = search(script, batch, step, delta=1.0, backtrack_factor=0.9)
    tried = [batch.theta + 0.9**n * step for n in range(figures["backtracks"] + 1)]
    gains = [batch.surrogate(theta) - batch.surrogate(batch.theta) for theta in tried]
    good = [batch.kl(theta) <= 1.0 and gain > 0 for theta, gain in zip(tried, gains)]
    assert len(good) > 1 and good == [False] * (len(good) - 1) + [True]
    assert_close(batch.policy.theta, tried[-1], 1e-12)
    assert figures["surrogate_gain"] == pytest.approx(gains[-1], rel=1e-9)


@only("trpo")
@pytest.mark.parametrize("reason", ["kl", "gain"])
def test_line_search_restores(script, reason):
    """If no step is good, theta is what it was, to the bit. KL or gain alone can be the reason."""
    batch = Batch(script)
    ratio, kl = (f(batch.theta + batch.direction / 5) for f in (batch.ratio, batch.kl))
    reverse_kl = (batch.probs * ratio * np.log(ratio)).sum(axis=1).mean()  # KL(new || old)
    assert reverse_kl < kl
    delta, backtracks = ((reverse_kl + kl) / 2, 0) if reason == "kl" else (2 * kl, 9)
    batch.advantages = (ratio[batch.taken] - 1) * (1 if reason == "kl" else -1)  # the gain's sign
    own = {"delta": delta, "backtracks": backtracks}
    assert search(script, batch, batch.direction / 5, **own)["surrogate_gain"] == 0
    assert batch.policy.theta.tobytes() == batch.theta.tobytes()


@only("trpo")
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_update_policy_takes_the_natural_step(script, damping):
    """x = (F + damping I)^-1 g, scaled to step (F + damping I) step / 2 = delta, for any scale of A."""
    batch, own = Batch(script), {"damping": damping, "cg_iterations": 99, "line_search": False}
    damped = fisher_matrix(script, batch, damping)
    x = np.linalg.solve(damped, finite_difference(batch.surrogate, batch.theta))
    step, _ = batch.update(delta=0.05, **own)
    assert step @ damped @ step / 2 == pytest.approx(0.05, rel=1e-6)
    assert_close(step, np.sqrt(2 * 0.05 / (x @ damped @ x)) * x, 1e-4)  # where CG may stop
    for scale in 1e-3, 1e3:
        scaled = Batch(script)
        scaled.advantages *= scale
        assert_close(scaled.update(delta=0.05, **own)[0], step)


# --- Training and evaluation ----------------------------------------------------------------------
def test_train_learns(script):
    """25,000 steps: returns of about 20 become more than 200 (12 seeds: 282 to 500)."""
    settings = script.Settings(steps=25_000, seed=100)
    policy = script.initial_policy(settings)
    rows = list(script.train(settings, policy))
    assert rows[0]["episode_return"] < 50 and rows[-1]["episode_return"] > 200
    assert script.evaluate(policy, script.make_env(settings, 20), seed=0)[0].mean() > 200
    keys = "update steps episode_return kl entropy step_norm explained_variance solved seconds"
    for update, row in enumerate(rows, 1):
        assert row["update"] == update and set(keys.split()) <= set(row)
        assert np.isfinite(list(row.values())).all() and row["seconds"] > 0
        if script.__name__ == "trpo":  # what TRPO promises
            assert row["kl"] <= 1.001 * settings.delta
            assert row["surrogate_gain"] > 0 or row["step_norm"] == 0


def test_train_figures(script, monkeypatch):
    """Arguments and figures of every update, computed again from their definitions."""
    calls = [record(monkeypatch, script, name) for name in ("gae", "update_policy", "fit_value")]
    settings = script.Settings("Varied-v0", steps=150, num_envs=4, horizon=16, gamma=0.9)
    policy, steps = script.initial_policy(settings), 0
    rows = list(script.train(settings, policy))
    monkeypatch.undo()
    policies = [update[0] for update in calls[1][1:]] + [policy]  # what each update left behind
    for row, gae, update, fit, after in zip(rows, *calls, policies, strict=True):
        (_, values, *_, resetting, gamma, gae_lambda), (value, _, targets, *_) = gae, fit
        before, states, actions, advantages, _, decay, _ = update
        raw, values = script.gae(*gae)[~resetting], values[:-1][~resetting]
        assert (gamma, gae_lambda, decay) == (0.9, settings.gae_lambda, 1 - steps / 150)
        assert len(states) == len(actions) == (~resetting).sum() < resetting.size == 64
        assert np.array_equal(states, fit[1]) and fit[4] == decay * settings.value_learning_rate
        assert_close(script.forward(value, states)[0][:, 0], values, 1e-5)
        assert_close(targets, raw + values, 1e-5)
        assert_close(advantages, (raw - raw.mean()) / raw.std(), 1e-5)
        old, new = (softmax(script.forward(p, states)[0].astype(float)) for p in (before, after))
        steps += len(states)
        expected = {"steps": steps, "step_norm": np.linalg.norm(after.theta - before.theta)}
        expected["kl"] = (old * np.log(old / new)).sum(axis=1).mean()
        expected["entropy"] = -(old * np.log(old)).sum(axis=1).mean()
        expected["explained_variance"] = 1 - (targets - values).var() / targets.var()
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_evaluate(script):
    """One episode of each copy, its own length, with the most probable action, here 2."""
    policy, env = script.Network((3, 5, 4)), script.make_env(script.Settings("Varied-v0"), 50)
    policy.b3[:], begun = [0.0, 0.1, 0.3, 0.2], []
    for seed, cap in (0, 1000), (0, 4), (1, 1000):
        BEGUN.clear()
        returns, cut = script.evaluate(policy, env, seed, cap)
        begun.append(set(BEGUN[:50]))
        lengths = np.array([length for _, length, _ in BEGUN[:50]])
        played = np.minimum(lengths, min(cap, 5))
        assert np.array_equal(returns, played * (played + 1) / 2 + 2 * played)
        assert cut == (lengths > cap).sum()
    assert begun[0] == begun[1] and not begun[0] & begun[2]
