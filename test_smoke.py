# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "gymnasium>=1.0", "matplotlib>=3.8", "pytest"]
# ///
"""The proof that the mathematics is right, and the grader of your own versions of it.

Most tests hold a function against its definition, computed in another way. To check your own one:

    python -m pytest -k conjugate_gradient        All tests:  python test_smoke.py

Whichever of vpg.py, trpo.py and ppo.py lie beside this file are tested, and any my_*.py like the
script whose functions it has. Arrays are read-only here: none may be changed in place.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy: small arrays need only one thread
import copy
import faulthandler
import importlib
import re
import sys
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
if __name__ == "__main__":  # here, since pytest imports this file again
    sys.exit(pytest.main([__file__, "--rootdir", str(HERE), *sys.argv[1:]]))
sys.path.insert(0, str(HERE))
pytestmark = pytest.mark.filterwarnings("error")  # a division by zero, say, fails the test
gym.register("Counting-v0", vector_entry_point="test_smoke:Counting")
BEGUN = []  # the first states of all episodes of Counting
fail = partial(pytest.fail, pytrace=False)


# --- The scripts under test -----------------------------------------------------------------------
PATHS = [path for path in sorted(HERE.glob("*.py")) if re.match("(vpg|trpo|ppo|my_.*)$", path.stem)]
TEXTS = {path.stem: path.read_bytes().decode(errors="replace") for path in PATHS}
if not TEXTS:
    pytest.exit(f"put vpg.py, trpo.py or ppo.py beside test_smoke.py in {HERE}", returncode=2)


def only(words):
    """The test runs on those scripts in which these words stand, if there are any."""
    names = [name for name, text in TEXTS.items() if words in text]
    return pytest.mark.parametrize("script", names, indirect=True) if names else lambda test: None


@pytest.fixture(params=TEXTS)  # without @only, a test runs on every script
def script(request):
    try:
        return importlib.import_module(request.param)
    except SyntaxError as error:
        fail(f"Python cannot read {request.param}.py: {error}")


@pytest.fixture(autouse=True)
def deadline(request):
    """An endless loop ends after half a minute, and Python says in which line it was."""
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        terminal = os.dup(2)
    faulthandler.dump_traceback_later(30, exit=True, file=terminal)
    yield
    faulthandler.cancel_dump_traceback_later()
    os.close(terminal)


def expect(what, actual, expected, tolerance=1e-9, size=0, where=None):
    """Fail with the likely mistake unless actual is close to expected. size: of the batch."""
    expected = np.asarray(expected, float)
    if not isinstance(actual, np.ndarray):
        fail(f"{what}: not an array, but {actual!r:.60}")
    if actual.shape != expected.shape:
        fail(f"{what}: the shape is {actual.shape}, expected {expected.shape}")
    if not np.isfinite(actual).all():
        fail(f"{what}: it holds nan or inf")
    limit = tolerance * np.sqrt(np.mean(expected**2))
    wrong = np.abs(actual - expected) > limit
    if not wrong.any():
        return
    if (np.abs(actual + expected) <= limit).all():
        fail(f"{what}: sign reversed, everywhere")
    factor = np.vdot(actual, expected) / max(np.vdot(expected, expected), 1e-300)
    if 1e-3 < abs(factor) < 1e3 and (np.abs(actual / factor - expected) <= limit).all():
        batch = size and np.isclose(size, [abs(factor), 1 / abs(factor)]).any()
        reason = f": the batch has {size} samples" if batch else ""
        fail(f"{what}: {factor:.7g} times the expected, everywhere{reason}")
    if where:
        fail(f"{what}: {where(actual, wrong, expected)}")
    i = tuple(np.argwhere(wrong)[0].tolist())
    fail(f"{what}: {wrong.sum()} wrong, at {i} {actual[i]:.9g}, expected {expected[i]:.9g}")


# --- The definitions ------------------------------------------------------------------------------
def outputs_of(theta, states, n_outputs=4):
    """A network with 3 inputs and 5 hidden units: theta holds W1, b1, W2, b2, one after another."""
    hidden = np.tanh(states @ theta[:15].reshape(3, 5) + theta[15:20])
    return hidden @ theta[20:-n_outputs].reshape(5, n_outputs) + theta[-n_outputs:]


def log_probs_of(theta, states):
    logits = outputs_of(theta, states)
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def clipped(ratio, advantages, clip):
    """min(r A, clip(r) A), also for the complex r of `derivatives`."""
    inside = np.clip(ratio.real, 1 - clip, 1 + clip)
    return np.where(ratio.real * advantages <= inside * advantages, ratio, inside) * advantages


def derivatives(function, theta):
    """Derivatives [..., P] in each parameter. As f(theta + ih) = f + ih f' for a tiny h: exact."""
    columns = [function(theta + 1e-30j * axis).imag / 1e-30 for axis in np.eye(len(theta))]
    return np.stack(columns, axis=-1)


def frozen(array):
    return np.broadcast_to(array, np.shape(array))  # NumPy makes it read-only


class Example:
    """A random policy and a made-up batch for it, in float64 and read-only."""

    def __init__(self, script, size=12, seed=7):
        rng = np.random.default_rng(seed)
        self.script = script
        self.theta, self.direction = frozen(rng.standard_normal((2, 44)))
        self.policy = script.Network((3, 5, 4), 1.0, rng)
        self.policy.theta = self.theta
        self.states = frozen(rng.standard_normal((size, 3)))
        self.actions = frozen(rng.integers(4 if size > 5 else 3, size=size))  # some not taken
        self.advantages = frozen(rng.standard_normal(size) + 0.3)
        self.targets = self.advantages
        self.log_probs_old = frozen(log_probs_of(self.theta, self.states))
        self.probs = frozen(np.exp(self.log_probs_old))
        _, activations = script.forward(self.policy, self.states)
        self.activations = tuple(frozen(layer) for layer in activations)

    def ratio(self, theta):
        ratios = np.exp(log_probs_of(theta, self.states) - self.log_probs_old)
        return ratios[np.arange(len(self.actions)), self.actions]

    def surrogate(self, theta, clip=float("inf")):
        return clipped(self.ratio(theta), self.advantages, clip).mean()

    def value_loss(self, theta):
        return ((outputs_of(theta, self.states, 1)[:, 0] - self.targets) ** 2).mean() / 2

    def kl(self, theta):
        change = log_probs_of(theta, self.states) - self.log_probs_old
        return -(self.probs * change).sum(axis=1).mean()

    def fisher_matrix(self):
        """The mean over states of the expectation over actions of score score^T."""
        scores = derivatives(lambda theta: log_probs_of(theta, self.states), self.theta)
        return np.einsum("sa,sai,saj->ij", self.probs, scores, scores) / len(self.states)

    def update(self, remaining=1.0, **own):
        """Run update_policy: the step that theta took, and the figures."""
        self.policy.theta = self.theta.copy()
        given = self.script.Settings(**own), remaining, np.random.default_rng(0)
        figures = self.script.update_policy(self.policy, self, *given)
        return self.policy.theta - self.theta, figures


class Counting(gym.vector.VectorEnv):
    """States: time, length of the episode, its own random number. Odd lengths end terminated, even
    ones truncated. Rewards: time + action; 1000 in a resetting call, where it must not count."""

    if hasattr(gym.vector, "AutoresetMode"):  # not in Gymnasium 1.0
        metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    single_action_space = gym.spaces.Discrete(4)

    def __init__(self, num_envs):
        self.num_envs = num_envs

    def reset(self, seed=None, options=None):
        self.generators = [np.random.default_rng(seed + n) for n in range(self.num_envs)]
        self.states = np.zeros((self.num_envs, 3))
        self.resetting = np.ones(self.num_envs, bool)
        self.step(0)
        return self.states, {}

    def step(self, actions):
        self.states = self.states + [1, 0, 0]
        rewards = np.where(self.resetting, 1000, self.states[:, 0] + actions)
        for n in np.flatnonzero(self.resetting):
            self.states[n] = [0, self.generators[n].integers(2, 7), self.generators[n].random()]
            BEGUN.append(tuple(self.states[n]))
        self.resetting = self.states[:, 0] == self.states[:, 1]
        odd = self.states[:, 1] % 2 == 1
        return self.states, rewards, self.resetting & odd, self.resetting & ~odd, {}


def record(monkeypatch, script, name):
    """A list that gets the arguments of every call of that function, networks as they are then."""
    calls = []
    function = getattr(script, name)

    def spy(*given):
        calls.append([copy.deepcopy(x) if hasattr(x, "sizes") else x for x in given])
        return function(*given)

    monkeypatch.setattr(script, name, spy)
    return calls


# --- The exercises --------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [12, 5])
def test_policy_gradient(script, size):
    """Of the mean of A log pi(a|s): at theta_old, it is the gradient of the surrogate."""
    example = Example(script, size)
    given = example.activations, example.log_probs_old, example.actions, example.advantages
    actual = script.policy_gradient(example.policy, *given)
    expect("gradient", actual, derivatives(example.surrogate, example.theta), 1e-6, size)


def gae_by_definition(rewards, values, terminated, truncated, gamma, gae_lambda):
    """A_t = sum over the rest of the episode of (gamma lambda)^k delta_{t+k}, term by term."""
    advantages = np.zeros(rewards.shape)
    for start, n in np.ndindex(rewards.shape):
        for t in range(start, len(rewards)):
            following = 0 if terminated[t, n] else values[t + 1, n]
            delta = rewards[t, n] + gamma * following - values[t, n]
            advantages[start, n] += (gamma * gae_lambda) ** (t - start) * delta
            if terminated[t, n] or truncated[t, n]:
                break
    return advantages


@pytest.mark.parametrize("gamma, gae_lambda", [(0.9, 0.7), (0.7, 1.0), (1.0, 0.0)])
def test_gae(script, gamma, gae_lambda):
    """Also in the first and the last row. Rows after an end may hold anything: left out later."""
    rng = np.random.default_rng(0)
    terminated, truncated = np.zeros((2, 10, 4), bool)
    terminated[[0, 3, 9, 6], [0, 3, 1, 2]] = True
    truncated[[0, 5, 9, 8, 6], [1, 0, 0, 3, 2]] = True
    given = [rng.standard_normal((10, 4)), rng.standard_normal((11, 4)), terminated, truncated]
    given = [frozen(array) for array in given] + [gamma, gae_lambda]
    expected = gae_by_definition(*given)
    actual = script.gae(*given)
    if isinstance(actual, np.ndarray) and actual.shape == expected.shape:
        actual = actual.copy()
        actual[1:] = np.where((terminated | truncated)[:-1], expected[1:], actual[1:])

    def where(actual, wrong, expected):
        t, n = np.argwhere(wrong)[-1]  # a mistake spreads to the rows before
        end = "truncated" if truncated[t, n] else "terminated" if terminated[t, n] else "going on"
        values = f"{actual[t, n]:.5g}, expected {expected[t, n]:.5g}"
        return f"t={t}, n={n}, where an episode was {end}: {values}"

    expect(f"gamma {gamma}, lambda {gae_lambda}", actual, expected, 1e-5, where=where)


@only("def clipped_surrogate_gradient(")
@pytest.mark.parametrize("clip", [0.2, 0, 1.5, float("inf")])
def test_clipped_surrogate_gradient(script, clip):
    """The derivative of min(r A, clip(r) A) by r, for both signs of A, on both sides of a clip."""
    ratio = frozen(np.repeat([0.1, 0.7, 0.9, 1.0, 1.1, 1.3, 4.0], 3))  # at 1, the edge of clip 0: A
    advantages = frozen(np.tile([-0.4, 0.0, 5.0], 7))

    def where(actual, wrong, expected):
        i = np.flatnonzero(wrong)[0]
        return f"ratio {ratio[i]}, A = {advantages[i]}: expected {expected[i]:g}, got {actual[i]:g}"

    actual = script.clipped_surrogate_gradient(ratio, advantages, clip)
    expected = clipped(ratio + 1e-30j, advantages, clip).imag / 1e-30
    expect(f"clip {clip}", actual, expected, 1e-6, where=where)


PARTS = {"W1": range(15), "b1": range(15, 20), "W2": range(20, 40), "b2": range(40, 44)}


@only("def conjugate_gradient(")
@pytest.mark.parametrize("part", [*PARTS, "all of theta"])
def test_jacobian_vector_product(script, part):
    """J v for a v that moves this part of theta. It is linear: exact for any length of v."""
    example = Example(script)
    J = derivatives(lambda theta: outputs_of(theta, example.states), example.theta)
    for length in (1, 1e-9, 1e9):
        moved = np.isin(np.arange(44), PARTS.get(part, np.arange(44)))
        v = length * example.direction * moved
        actual = script.jacobian_vector_product(example.policy, example.activations, frozen(v))
        expect(f"J v for a v of about {length:g} in {part}", actual, J @ v, size=12)


@only("def conjugate_gradient(")
@pytest.mark.parametrize("size", [12, 5])
def test_fisher_vector_product(script, size):
    """F v for all unit vectors at once, and for a short and a long v."""
    example = Example(script, size)
    F = example.fisher_matrix()
    vectors = np.vstack([np.eye(44), 1e-9 * example.direction, 1e9 * example.direction])
    given = example.policy, example.activations, example.probs
    for v in vectors:
        expect("F v", script.fisher_vector_product(*given, frozen(v)), F @ v, size=size)


def krylov_solution(M, b, iterations):
    """Of all sums of b, M b, M M b, ... that which conjugate gradient finds: the nearest one."""
    basis = b[:, None]
    for _ in range(iterations - 1):
        basis, _ = np.linalg.qr(np.column_stack([basis, M @ basis[:, -1]]))
    return basis @ np.linalg.solve(basis.T @ M @ basis, basis.T @ b)


@only("def conjugate_gradient(")
@pytest.mark.parametrize("scale", [1, 1e-30, 1e30])
@pytest.mark.parametrize("iterations", [1, 2, 3, 15, 1000])
def test_conjugate_gradient(script, iterations, scale):
    """The 30th iteration reaches a residual of 1e-5 of b, and is the last, for any size of b."""
    rng = np.random.default_rng(0)
    axes, _ = np.linalg.qr(rng.standard_normal((80, 80)))
    M = axes @ np.diag(np.geomspace(1, 30, 80)) @ axes.T
    b = frozen(scale * rng.standard_normal(80))
    expected = krylov_solution(M, b, min(iterations, 30))

    def where(x, _, expected):
        shares = [np.linalg.norm(b - M @ end) / np.linalg.norm(b) for end in (x, expected)]
        return "it ends where |b - M x| is {:.6g} of |b|, expected {:.6g}".format(*shares)

    x = script.conjugate_gradient(M.dot, b, iterations)
    expect(f"at most {iterations} iterations, b of size {scale:g}", x, expected, where=where)
    expect("b = 0", script.conjugate_gradient(M.dot, frozen(0 * b), iterations), 0 * b)
    expect("M = 2 I", script.conjugate_gradient(lambda v: 2 * v, b, iterations), b / 2)


# How much L grows in trials 0 to 5 (trial 5 is one too many), the first trial with KL <= delta, and
# the trial to be taken, -1 for none.
SEARCHES = {
    "all good": ([2, 1, 1, 1, 1, 1], 0, 0, {}),
    "KL decides": ([3, 2, 1, 1, 1, 1], 2, 2, {}),
    "L decides, later trials are better": ([-2, -1, -0.01, 0.01, 1, 1], 0, 3, {}),
    "the last is good": ([1, 1, 1, 1, 1, 1], 4, 4, {}),
    "one more would be good": ([1, 1, 1, 1, 1, 1], 5, -1, {}),
    "L stays the same": ([0, 0, 0, 0, 0, 0], 0, -1, {}),
    "no backtracks": ([1, 1, 1, 1, 1, 1], 1, -1, {"max_backtracks": 0}),
    "off": ([-1, 1, 1, 1, 1, 1], 5, 0, {"line_search": False}),
}


def with_gains(example, gains, thetas, mean):
    """Advantages with this mean, of which L grows by given amounts at given thetas; or all 0."""
    growth = [example.ratio(theta) - 1 for theta in thetas]
    equations = np.array([*growth, np.ones(20)]) / 20
    correction = np.linalg.pinv(equations) @ ([*gains, mean] - equations @ example.advantages)
    return frozen((example.advantages + correction) * np.any(gains))


@only("def conjugate_gradient(")
@pytest.mark.parametrize("mean", [2, -2])
@pytest.mark.parametrize("search", SEARCHES)
def test_line_search(script, search, mean):
    """The first trial with KL <= delta and an L that has grown, or else the policy that was."""
    __tracebackhide__ = True
    gains, within, taken, own = SEARCHES[search]
    example = Example(script, size=20)
    example.policy.theta = example.theta.copy()  # this one may be changed
    step = 0.7 * example.direction
    trials = [example.theta + 0.6**k * step for k in range(6)]
    example.advantages = with_gains(example, gains, trials, mean)
    kls = [example.kl(theta) for theta in trials]
    # delta is just above the KL of the first trial within, or just below that of the one before
    delta = 1.001 * kls[within] if mean > 0 or within == 0 else 0.999 * kls[within - 1]
    settings = {"delta": delta, "backtrack_factor": 0.6, "max_backtracks": 4} | own
    figures = script.line_search(example.policy, step.copy(), example, script.Settings(**settings))
    places = {f"trial {k}": theta for k, theta in enumerate(trials)} | {"theta_old": example.theta}
    place = list(places)[taken]
    logits, _ = script.forward(example.policy, example.states)
    reached = [at for at in places if np.allclose(logits, outputs_of(places[at], example.states))]
    problem = f"\nin trials 0 to 5, L grows by {gains}\nand the KL is {kls}\n{settings}"
    if place not in reached:
        fail(f"the policy is at {reached or 'no trial'}, expected {place}{problem}")
    if taken == -1 and example.policy.theta.tobytes() != example.theta.tobytes():
        fail(f"theta is not to the last bit what it was{problem}")
    backtracks = settings["max_backtracks"] if taken == -1 else taken
    right = {"surrogate_gain": [*gains, 0][taken], "backtracks": backtracks}
    if figures != pytest.approx(right, rel=1e-6, abs=1e-9):
        fail(f"it returned {figures}, expected {right}{problem}")


# --- The rest, in the scripts' order --------------------------------------------------------------
def test_forward_backward_log_softmax_kl_and_sample_actions(script):
    """First weights of the right size; no overflow; KL(old || new); actions as often as likely."""
    network = script.Network((50, 200, 30), 0.5, np.random.default_rng(0))
    W1, b1, W2, b2 = script.unflatten(network.theta, network.sizes)
    spread = [W1.std() * np.sqrt(50), W2.std() * np.sqrt(200)]
    assert spread == pytest.approx([1, 0.5], rel=0.03) and not b1.any() and not b2.any()
    example = Example(script)
    outputs, _ = script.forward(example.policy, example.states)
    expect("forward", outputs, outputs_of(example.theta, example.states))
    c = frozen(np.random.default_rng(1).standard_normal((12, 4)))
    slopes = derivatives(lambda theta: (c * outputs_of(theta, example.states)).sum(), example.theta)
    expect("backward", script.backward(example.policy, example.activations, c), slopes, size=12)
    huge = script.log_softmax(np.array([[1e4, 0.0, 1e4], [-2e4, -1e4, -1e4]]))
    expect("log_softmax", huge, np.array([[0, -1e4, 0], [-1e4, 0, 0]]) - np.log(2))
    new = log_probs_of(example.direction, example.states)
    assert script.kl(example.log_probs_old, new) == pytest.approx(example.kl(example.direction))
    states = example.states.repeat(20_000, axis=0)
    actions = script.sample_actions(example.policy, states, np.random.default_rng(0))
    shares = np.array([np.bincount(row, minlength=4) for row in actions.reshape(12, -1)]) / 20_000
    assert (np.abs(shares - example.probs) < 5 * np.sqrt(example.probs / 20_000)).all()


def test_adam(script):
    """Uphill by the ratio of two means, in which older gradients count less and less."""
    network = Example(script).policy
    theta = network.theta
    g = frozen(np.random.default_rng(0).standard_normal((5, 44)))
    for t in range(1, 6):
        script.adam(network, g[t - 1], 0.01)
        mean = np.average(g[:t], axis=0, weights=0.9 ** np.arange(t)[::-1])
        square = np.average(g[:t] ** 2, axis=0, weights=0.999 ** np.arange(t)[::-1])
        theta = theta + 0.01 * mean / (np.sqrt(square) + 1e-8)
    expect("theta", network.theta, theta, 1e-12)


def test_play_and_collect(script):
    """After an episode's final state a row only resets: in no return, and not in the batch."""
    rng = np.random.default_rng(0)
    settings = script.Settings("Counting-v0", num_envs=8, gamma=0.9, gae_lambda=0.7)
    experience = script.Experience(settings, rng)
    policy = Example(script).policy
    parts = [experience.play(policy, horizon, rng) for horizon in (6, 12)]
    *columns, last_states = [np.concatenate(column) for column in zip(*parts)]
    states, actions, rewards, terminated, truncated, resetting = columns
    states = np.concatenate([states, last_states[None, -8:]]).astype(float)  # of the second part
    time, length, _ = np.moveaxis(states, 2, 0)
    over = time == length
    expect("time", time[1:], np.where(resetting, 0, time[:-1] + 1))
    expect("rewards", rewards, np.where(resetting, 1000, time[1:] + actions))
    assert (resetting == over[:-1]).all() and (experience.resetting == over[-1]).all()
    assert (terminated == over[1:] & (length[1:] % 2 == 1)).all()
    assert (truncated == over[1:] & (length[1:] % 2 == 0)).all()
    ends = np.argwhere(over[1:])
    returns = [rewards[t + 1 - int(length[t, n]) : t + 1, n].sum() for t, n in ends]
    expect("return_queue", np.array(experience.env.return_queue), returns)
    experience.play = lambda *_: [*columns, last_states[-8:]]
    value = script.Network((3, 5, 1), 1.0, rng)
    batch = script.collect(experience, policy, value, settings, rng)
    real = ~resetting
    values = outputs_of(value.theta.astype(float), states, 1)[..., 0]
    advantages = gae_by_definition(rewards, values, terminated, truncated, 0.9, 0.7)[real]
    expect("states", batch.states, states[:-1][real], 1e-6)
    assert batch.states.dtype == np.float32 and (batch.actions == actions[real]).all()
    expect("log_probs_old", batch.log_probs_old, log_probs_of(policy.theta, batch.states), 1e-5)
    expect("values", batch.values, values[:-1][real], 1e-5)
    expect("targets", batch.targets, advantages + batch.values, 1e-5)
    normalized = (advantages - advantages.mean()) / advantages.std()
    expect("advantages", batch.advantages, normalized, 1e-4)


def test_fit_value(script, monkeypatch):
    """Adam steps down the gradient of the mean of (V - target)^2 / 2, until V is the target."""
    example = Example(script)
    value = script.Network((3, 5, 1), 1.0, np.random.default_rng(0))
    value.theta = example.theta[:26]
    steps = record(monkeypatch, script, "adam")
    for epochs, parts in [(1, 1), (500, 4)]:
        settings = script.Settings(value_epochs=epochs, minibatches=parts, value_learning_rate=0.02)
        script.fit_value(value, example, settings, 0.5, np.random.default_rng(0))
    network, gradient, rate = steps[0]
    expect("gradient", gradient, -derivatives(example.value_loss, network.theta), size=12)
    assert rate == 0.01 and len(steps) == 1 + 500 * 4 and example.value_loss(value.theta) < 0.01


@only("    learning_rate: float")
def test_update_policy_is_adam_along_the_gradient(script, monkeypatch):
    """Of the clipped surrogate where theta is then. (VPG's only step is where none is clipped.)"""
    steps = record(monkeypatch, script, "adam")
    example = Example(script)
    own = {"epochs": 4, "minibatches": 1, "clip": 0.2} if hasattr(script, "minibatch_step") else {}
    _, figures = example.update(remaining=0.5, learning_rate=0.3, **own)
    thetas = [network.theta for network, _, _ in steps]
    for theta, (_, gradient, rate) in zip(thetas, steps):
        slopes = derivatives(lambda theta: example.surrogate(theta, 0.2), theta)
        expect("gradient", gradient, slopes)
        assert rate == 0.15
    assert len(steps) == own.get("epochs", 1)
    if own:
        own = {"kl_first_epoch": example.kl(thetas[1]), "epochs": 4}
    assert figures == pytest.approx(own)


@only("def clipped_surrogate_gradient(")
def test_update_policy_uses_epochs_and_minibatches(script, monkeypatch):
    """Each row once in an epoch. The first epoch that ends with KL > target_kl is the last."""
    used = record(monkeypatch, script, "minibatch_step")
    example = Example(script)
    example.update(epochs=2, minibatches=4)
    parts = np.array([rows for _, _, rows, *_ in used])
    assert (np.sort(parts.reshape(2, 12)) == np.arange(12)).all()
    own = {"learning_rate": 0.01, "minibatches": 1}  # so that the KL grows from epoch to epoch
    step, _ = Example(script).update(epochs=2, **own)
    kl = example.kl(example.theta + step)
    for target_kl, epochs in [(kl * (1 - 1e-9), 2), (kl * (1 + 1e-9), 3)]:
        _, figures = Example(script).update(epochs=9, target_kl=target_kl, **own)
        assert figures["epochs"] == epochs


@only("def conjugate_gradient(")
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_update_policy_takes_the_natural_step(script, damping):
    """x = (F + damping I)^-1 g, scaled to step (F + damping I) step / 2 = delta. Any A will do."""
    own = {"damping": damping, "cg_iterations": 99, "line_search": False, "delta": 0.05}
    example = Example(script)
    damped = example.fisher_matrix() + damping * np.eye(44)
    x = np.linalg.solve(damped, derivatives(example.surrogate, example.theta))
    step, _ = example.update(**own)
    expect("step", step, np.sqrt(2 * 0.05 / (x @ damped @ x)) * x, 1e-3)  # where CG ends
    for scale in (1e-3, 1e3, 0):
        example.advantages = scale * Example(script).advantages
        scaled, figures = example.update(**own)
        expect(f"step for A * {scale:g}", scaled, step * (scale > 0), 1e-5)
    assert figures == {"surrogate_gain": 0, "backtracks": 0}  # without any A


def test_train_figures(script, monkeypatch):
    """Every row, computed again from its definition."""
    fits = record(monkeypatch, script, "fit_value")
    reports = record(monkeypatch, script, "report")
    settings = script.Settings("Counting-v0", steps=900, num_envs=8, horizon=16, hidden=5)
    policy = script.initial_policy(settings)
    thetas = [policy.theta.copy()]
    steps = 0
    for number, row in enumerate(script.train(settings, policy), 1):
        thetas.append(policy.theta.copy())
        _, _, batch, experience = reports[-1]
        assert fits[-1][0].sizes == (3, 5, 1) and fits[-1][3] == 1 - steps / 900 > 0
        steps += len(batch.actions)
        returns = experience.env.return_queue  # of the last 100
        old = batch.log_probs_old
        right = {
            "update": number,
            "steps": steps,
            "episodes": experience.env.episode_count,
            "episode_return": np.mean(returns),
            "kl": (np.exp(old) * (old - log_probs_of(thetas[-1], batch.states))).sum(axis=1).mean(),
            "entropy": -(np.exp(old) * old).sum(axis=1).mean(),
            "step_norm": np.linalg.norm(thetas[-1] - thetas[-2]),
            "explained_variance": 1 - (batch.targets - batch.values).var() / batch.targets.var(),
        }
        assert {key: row[key] for key in right} == pytest.approx(right, rel=1e-3, abs=1e-6)
    assert steps >= 900 and row["episodes"] > len(returns) == 100 and 0 < row["seconds"] < 60
    batch.targets = 0 * batch.targets  # they do not vary: nothing is to be explained
    assert script.report(policy, policy.theta, batch, experience)["explained_variance"] == 0


def test_train_learns(script):
    """25,000 steps: returns of about 20 become more than 100, and TRPO keeps its promise."""
    settings = script.Settings(steps=25_000, seed=100)
    policy = script.initial_policy(settings)
    rows = list(script.train(settings, policy))
    returns = script.evaluate(policy, script.make_env(settings, 20), np.random.default_rng(0))
    assert rows[0]["entropy"] > 0.69 and rows[-1]["episode_return"] > 100 and returns.mean() > 200
    if hasattr(script, "line_search"):
        assert max(row["kl"] for row in rows) <= 1.001 * settings.delta
        assert all(row["surrogate_gain"] > 0 or row["step_norm"] == 0 for row in rows)


def test_seeds(script):
    """The same seed, the same numbers. Neighbouring seeds have no episode in common."""
    runs = []
    for seed in (0, 0, 1):
        BEGUN.clear()
        settings = script.Settings("Counting-v0", seed=seed, steps=300, num_envs=8)
        rows = script.train(settings, script.initial_policy(settings))
        runs.append(([row["kl"] for row in rows], set(BEGUN)))
    assert runs[0] == runs[1] and not runs[0][1] & runs[2][1]


def test_evaluate(script):
    """One episode in each environment, or max_steps of it, with the likeliest action, here 2."""
    policy = Example(script).policy
    policy.theta = np.append(np.zeros(40), [0.0, 0.1, 0.3, 0.2])
    env = script.make_env(script.Settings("Counting-v0"), 50)
    for cap in (1000, 4):
        BEGUN.clear()
        returns = script.evaluate(policy, env, np.random.default_rng(0), cap)
        played = np.minimum([length for _, length, _ in BEGUN[:50]], cap)
        expect("returns", returns, played * (played + 1) / 2 + 2 * played)


def test_shared_parts_are_the_same():
    """Apart from docstring, the update's settings and section 6."""
    own = r'\A""".*?"""|(?<=in a window"\)\n).*?\n\n|# --- 6.*?(?=# --- 7)'
    names = [name for name in TEXTS if not name.startswith("my_")]
    parts = [re.sub(own, "", TEXTS[name], flags=re.DOTALL).split("\n\n\n") for name in names]
    for name, pieces in zip(names, parts):
        for piece, first in zip(pieces, parts[0]):
            if piece != first:
                what = re.search(r"(def|class) \w+|$", piece + first)[0] or "the beginning"
                fail(f"{what} differs in {name}.py and {names[0]}.py: so be it in your exercise")
