# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "gymnasium>=1.0"]
# ///
"""Trust region policy optimization (TRPO): the best step that leaves the policy close to the old.

Old experience can judge a new policy only if it is close to the old one. So TRPO solves:

    maximize    L(theta) = mean of  A * pi(a|s; theta) / pi(a|s; theta_old)
    subject to  mean of KL(pi(.|s; theta_old) || pi(.|s; theta))  <=  delta
As L ~ g . step and KL ~ step F step / 2 (F: Fisher matrix), the step is a multiple of F^-1 g.

    repeat:  run the policy for a batch of steps                              (section 4)
             estimate A, how much better a was than V(s), the mean return     (section 5)
             x <- F^-1 g by conjugate gradient, from products F v alone       (section 6)
             step <- x scaled to KL = delta, then shorter until KL <= delta and L grew
             fit V to the estimated returns                                   (section 5)
Run:  python trpo.py    Options:  python trpo.py --help    Schulman et al. 2015, arXiv:1502.05477.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # layers this small run faster on one thread
import sys
import time
from argparse import ArgumentParser, BooleanOptionalAction
from dataclasses import dataclass, field, fields

import gymnasium as gym
import numpy as np


# --- 1. Settings ----------------------------------------------------------------------------------
def option(default, meaning, low=None, high=float("inf")):
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high})


@dataclass
class Settings:
    """Everything that can be chosen. Raises ValueError for a value that is out of range."""

    env: str = option("CartPole-v1", "Gymnasium environment: 1-D observations, Discrete actions")
    seed: int = option(0, "seed of all random numbers", 0)
    steps: int = option(150_000, "environment steps; the last batch is completed", 1)
    num_envs: int = option(8, "environments that run side by side", 1)
    horizon: int = option(160, "calls of each environment per batch", 2)
    gamma: float = option(0.98, "discount factor", 0, 1)
    gae_lambda: float = option(0.99, "GAE: 0 trusts the value function, 1 the returns", 0, 1)
    hidden: int = option(64, "units in each of the two hidden layers", 1)
    value_learning_rate: float = option(1e-2, "initial Adam step for V; falls to 0", 0, 1e30)
    value_epochs: int = option(8, "passes over each batch to fit the value function", 0)
    minibatches: int = option(5, "parts into which any pass splits the shuffled batch", 1)
    watch: bool = option(False, "show the trained policy in a window")
    # The algorithm's own:
    delta: float = option(0.01, "trust region: largest mean KL per update, in nats", 1e-12, 1e6)
    damping: float = option(0.03, "multiple of the identity added to the Fisher matrix", 0, 1e30)
    cg_iterations: int = option(5, "conjugate gradient iterations", 1)
    line_search: bool = option(True, "shorten a step until KL <= delta and L grew")
    backtracks: int = option(10, "how often a step is shortened before it is given up", 0)
    backtrack_factor: float = option(0.8, "each shortening multiplies the step by this", 0, 1)

    def __post_init__(self):
        for setting in fields(self):
            value, (_, low, high) = getattr(self, setting.name), setting.metadata.values()
            if low is not None and not low <= value <= high:  # refuses nan, too
                raise ValueError(f"{setting.name} must be from {low} to {high}, not {value}")


# --- 2. Network -----------------------------------------------------------------------------------
class Network:
    """Two tanh layers and a linear one; W1 to b3 are views into theta, a vector of P numbers."""

    def __init__(self, sizes, theta=None):
        inputs, hidden, outputs = self.sizes = sizes
        shapes = (inputs, hidden), hidden, (hidden, hidden), hidden, (hidden, outputs), outputs
        ends = np.cumsum([np.prod(shape) for shape in shapes])
        self.theta = np.zeros(ends[-1], np.float32) if theta is None else theta
        views = [p.reshape(s) for p, s in zip(np.split(self.theta, ends[:-1]), shapes)]
        self.W1, self.b1, self.W2, self.b2, self.W3, self.b3 = views
        self.mean, self.square, self.updates = 0.0, 0.0, 0  # what `adam` remembers


def initial_network(rng, sizes, last_gain):
    """Normal weights of variance gain^2 / inputs, gain sqrt(2) or last_gain; biases 0."""
    network = Network(sizes)
    for weights, gain in (network.W1, 2**0.5), (network.W2, 2**0.5), (network.W3, last_gain):
        weights[:] = gain * rng.standard_normal(weights.shape) / len(weights) ** 0.5
    return network


def forward(network, inputs):
    """Outputs [..., outputs] for inputs [..., inputs], and the activations, for `backward`."""
    hidden1 = np.tanh(inputs @ network.W1 + network.b1)
    hidden2 = np.tanh(hidden1 @ network.W2 + network.b2)
    return hidden2 @ network.W3 + network.b3, (inputs, hidden1, hidden2)


def backward(network, activations, grad_outputs):
    """Backpropagation: from an objective's gradient in the outputs [B, outputs] to theta's [P]."""
    inputs, hidden1, hidden2 = activations
    grad_hidden2 = (grad_outputs @ network.W3.T) * (1 - hidden2**2)  # tanh' = 1 - tanh^2
    grad_hidden1 = (grad_hidden2 @ network.W2.T) * (1 - hidden1**2)
    layers = (inputs, grad_hidden1), (hidden1, grad_hidden2), (hidden2, grad_outputs)
    parts = [((below.T @ grad).ravel(), grad.sum(axis=0)) for below, grad in layers]
    return np.concatenate([part for weights_and_bias in parts for part in weights_and_bias])


def adam(network, gradient, learning_rate):
    """Uphill by learning_rate * mean / sqrt(mean square), both moving (Kingma & Ba 2015, end of 2)."""
    network.updates += 1
    network.mean += (1 - 0.9) * (gradient - network.mean)
    network.square += (1 - 0.999) * (gradient**2 - network.square)
    unbias = (1 - 0.999**network.updates) ** 0.5 / (1 - 0.9**network.updates)  # both began at 0
    network.theta += learning_rate * unbias * network.mean / (np.sqrt(network.square) + 1e-8)


# --- 3. Policy ------------------------------------------------------------------------------------
def log_softmax(logits):
    """log pi(a|s) [B states, K actions]. Subtracting the maximum keeps exp from overflowing."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def kl(log_probs_old, log_probs_new):
    """KL(pi_old || pi_new) in nats: the mean over states of sum_a pi_old log(pi_old / pi_new)."""
    return float((np.exp(log_probs_old) * (log_probs_old - log_probs_new)).sum(axis=1).mean())


def policy_gradient(policy, activations, log_probs, actions, weights):
    """Gradient in theta [P] of the mean of weights [B], such as A, times log pi(a|s)."""
    onehot = np.eye(log_probs.shape[1], dtype=log_probs.dtype)[actions]
    grad_log_prob = onehot - np.exp(log_probs)  # of the chosen actions, in the logits [B, K]
    return backward(policy, activations, weights[:, None] * grad_log_prob / len(actions))


# --- 4. Experience --------------------------------------------------------------------------------
def make_env(settings, num_envs, **how):
    """num_envs copies of the environment, stepped together. ValueError if it does not fit."""
    try:
        env = gym.make_vec(settings.env, num_envs, **how)
    except (gym.error.Error, ImportError, TypeError) as error:
        raise ValueError(f"env must be an installed environment, not {settings.env!r}: {error}")
    states, actions = env.single_observation_space, env.single_action_space
    if len(states.shape or ()) != 1 or type(actions) is not gym.spaces.Discrete or actions.start:
        kind = "one-dimensional observations and Discrete actions from 0"
        raise ValueError(f"env must have {kind}; {settings.env} has {states} and {actions}")
    return env


def initial_policy(settings):
    """A policy for settings.env, close to uniform since its last weights are small."""
    env = make_env(settings, 1)
    sizes = env.single_observation_space.shape[0], settings.hidden, int(env.single_action_space.n)
    return initial_network(np.random.default_rng(settings.seed).spawn(1)[0], sizes, 0.01)


def experience(env, policy, horizon, finished, rng):
    """Endless batches: observations [T + 1, N, D], an episode's last one included; actions, rewards,
    terminated, truncated, resetting (a mere reset, after an end) [T, N]. `finished` gets returns."""
    observations, _ = env.reset(seed=int(rng.integers(2**31)))
    ended, returns = np.zeros(env.num_envs, bool), np.zeros(env.num_envs)
    while True:
        calls = []
        for noise in rng.gumbel(size=(horizon, env.num_envs, policy.sizes[2])):
            logits, _ = forward(policy, observations)
            actions = (logits + noise).argmax(axis=1)  # Gumbel-max: distributed as softmax(logits)
            following, rewards, terminated, truncated, _ = env.step(actions)
            calls.append((observations, actions, rewards, terminated, truncated, ended))
            observations, ended, returns = following, terminated | truncated, returns + rewards
            finished.extend(returns[ended])
            returns[ended] = 0
        states, actions, rewards, *flags = (np.array(column) for column in zip(*calls))
        states = np.concatenate([states, observations[None]], dtype=np.float32)
        yield states, actions, rewards.astype(np.float32), *flags


# --- 5. Advantages (generalized advantage estimation, GAE) and values -----------------------------
def gae(rewards, values, terminated, truncated, resetting, gamma, gae_lambda):
    """A_t = d_t + gamma lambda A_{t+1}, d_t = r_t + gamma V(s_{t+1}) - V(s_t), V(terminal) = 0;
    A is 0 past an end and in mere resets. values [T + 1, N]. (Schulman et al. 2016, section 3.)"""
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    goes_on = ~(terminated | truncated)
    advantages, following = np.zeros_like(deltas), np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        following = advantages[t] = deltas[t] + gamma * gae_lambda * following * goes_on[t]
    return advantages * ~resetting


def fit_value(value, observations, targets, settings, learning_rate, rng):
    """Reduce the mean of (V(s) - target)^2 / 2 by Adam steps on minibatches."""
    for _ in range(settings.value_epochs):
        for chosen in np.array_split(rng.permutation(len(targets)), settings.minibatches):
            values, activations = forward(value, observations[chosen])
            grad_values = (targets[chosen, None] - values) / len(chosen)  # of minus that mean
            adam(value, backward(value, activations, grad_values), learning_rate)


# --- 6. The update --------------------------------------------------------------------------------
def jacobian_vector_product(policy, activations, vector):
    """J v [B, K]: the logits' derivative along v [P], by the product rule through `forward`."""
    (inputs, hidden1, hidden2), v = activations, Network(policy.sizes, vector)
    d_hidden1 = (1 - hidden1**2) * (inputs @ v.W1 + v.b1)
    d_hidden2 = (1 - hidden2**2) * (d_hidden1 @ policy.W2 + hidden1 @ v.W2 + v.b2)
    return d_hidden2 @ policy.W3 + hidden2 @ v.W3 + v.b3


def fisher_vector_product(policy, activations, probs, vector, damping=0.0):
    """(F + damping I) v [P], where F is the second derivative of the KL at theta (appendix C):
    F = mean over the states of J^T (diag(p) - p p^T) J, applied to v from right to left."""
    d_logits = jacobian_vector_product(policy, activations, vector)
    d_probs = probs * (d_logits - (probs * d_logits).sum(axis=1, keepdims=True))
    return backward(policy, activations, d_probs / len(probs)) + damping * vector


def conjugate_gradient(product, target, iterations):
    """Approximate x with M x = target: product(v) = M v, M positive definite (appendix C)."""
    x, residual, direction = np.zeros_like(target), target, target  # residual = target - M x
    squared = target @ target
    for _ in range(iterations):
        if squared <= 1e-10 * (target @ target):  # precise enough, or target 0
            break
        image = product(direction)
        length = squared / (direction @ image)
        x, residual = x + length * direction, residual - length * image
        squared, before = residual @ residual, squared
        direction = residual + squared / before * direction
    return x


def line_search(policy, step, observations, actions, advantages, log_probs_old, settings):
    """Shorten the step until KL <= delta and L has grown; restore theta if that never happens."""
    theta_old, taken = policy.theta.copy(), (np.arange(len(actions)), actions)
    for backtracks in range(settings.backtracks + 1 if step.any() else 1):  # step 0: no search
        policy.theta[:] = theta_old + settings.backtrack_factor**backtracks * step
        log_probs = log_softmax(forward(policy, observations)[0])
        ratio = np.exp(log_probs[taken] - log_probs_old[taken])
        gain = float((advantages * (ratio - 1)).mean())  # of L
        good = gain > 0 and kl(log_probs_old, log_probs) <= settings.delta
        if good or not settings.line_search:
            return {"surrogate_gain": gain, "backtracks": backtracks}
    policy.theta[:] = theta_old
    return {"surrogate_gain": 0.0, "backtracks": backtracks}


def update_policy(policy, observations, actions, advantages, settings, decay, rng):
    """The damped natural gradient x ~ F^-1 g, scaled to quadratic KL delta; then line search."""
    logits, activations = forward(policy, observations)
    log_probs = log_softmax(logits)

    def product(v):  # damped, as F may be singular: so the KL mostly ends below delta
        return fisher_vector_product(policy, activations, np.exp(log_probs), v, settings.damping)

    gradient = policy_gradient(policy, activations, log_probs, actions, advantages)
    x = conjugate_gradient(product, gradient, settings.cg_iterations)
    curvature = x @ gradient  # = x @ product(x): CG keeps g - product(x) orthogonal to x
    step = np.sqrt(2 * settings.delta / curvature) * x if curvature > 0 else np.zeros_like(x)
    return line_search(policy, step, observations, actions, advantages, log_probs, settings)


# --- 7. Training ----------------------------------------------------------------------------------
def train(settings, policy=None):
    """Improve a policy; yield figures per update. FloatingPointError if weights are not finite."""
    start, update, steps, solved, finished = time.perf_counter(), 0, 0, False, []
    np.empty(2**21)  # freed at once: Linux then recycles memory (8 % faster, TRPO 19 %)
    policy = policy or initial_policy(settings)
    _, value_rng, env_rng, rng = np.random.default_rng(settings.seed).spawn(4)  # _: first policy
    value = initial_network(value_rng, (policy.sizes[0], settings.hidden, 1), 1.0)
    env = make_env(settings, settings.num_envs)
    threshold = env.spec.reward_threshold
    batches = experience(env, policy, settings.horizon, finished, env_rng)
    while steps < settings.steps:
        observations, actions, rewards, *flags = next(batches)
        values = forward(value, observations)[0][..., 0]  # [T + 1, N]
        advantages = gae(rewards, values, *flags, settings.gamma, settings.gae_lambda)
        real = ~flags[-1]  # leave out the calls that only reset: [T, N] becomes [B]
        observations, actions = observations[:-1][real], actions[real]
        advantages, values = advantages[real], values[:-1][real]
        targets, advantages = advantages + values, advantages - advantages.mean()
        rounding = 1e-5 * max(1.0, np.abs(targets).max())  # a smaller spread is no signal
        advantages *= 1 / advantages.std() if advantages.std() > rounding else 0  # 0: no gradient
        theta_old, decay = policy.theta.copy(), 1 - steps / settings.steps  # of the learning rates
        log_probs_old = log_softmax(forward(policy, observations)[0])
        own = update_policy(policy, observations, actions, advantages, settings, decay, rng)
        log_probs_new = log_softmax(forward(policy, observations)[0])
        fit_value(value, observations, targets, settings, decay * settings.value_learning_rate, rng)
        update, steps, recent = update + 1, steps + len(actions), finished[-100:]
        solved |= threshold is not None and len(recent) == 100 and np.mean(recent) >= threshold
        row = {"update": update, "steps": steps}
        row["episode_return"] = float(np.mean(recent[-20:])) if recent else float("nan")
        row["kl"] = kl(log_probs_old, log_probs_new)
        row["entropy"] = -float((np.exp(log_probs_old) * log_probs_old).sum(axis=1).mean())
        row["step_norm"] = float(np.linalg.norm(policy.theta - theta_old.astype(float)))
        unexplained, variance = (float(np.var(x, dtype=float)) for x in (targets - values, targets))
        row["explained_variance"] = 1 - unexplained / variance if variance > rounding**2 else 0.0
        row |= {"solved": bool(solved), "seconds": time.perf_counter() - start, **own}
        if not np.isfinite([row["kl"], *own.values(), policy.theta.sum(), value.theta.sum()]).all():
            raise FloatingPointError(f"update {update} is no longer finite: take smaller steps")
        yield row


# --- 8. Evaluation and command line ---------------------------------------------------------------
def evaluate(policy, env, seed, cap=1000):
    """Returns [N] of one episode in each copy, always the likeliest action; how many hit the cap."""
    observations, _ = env.reset(seed=int(np.random.default_rng(seed).integers(2**31)))
    returns, running = np.zeros(env.num_envs), np.ones(env.num_envs, bool)
    while running.any() and cap > 0:
        actions, cap = forward(policy, observations)[0].argmax(axis=1), cap - 1
        observations, rewards, terminated, truncated, _ = env.step(actions)
        returns, running = returns + rewards * running, running & ~(terminated | truncated)
    return returns, int(running.sum())


def parse(argv=None):
    """The command line as Settings. For a mistake: usage and error on stderr, exit status 2."""
    parser = ArgumentParser(os.path.basename(__file__), "%(prog)s [option]", __doc__.split("\n")[0])
    for setting in fields(Settings):
        kind = {"action": BooleanOptionalAction} if setting.type is bool else {"type": setting.type}
        text = setting.metadata["meaning"] + " (default: %(default)s)"
        name = "--" + setting.name.replace("_", "-")
        parser.add_argument(name, default=setting.default, help=text, **kind)
    try:
        settings = Settings(**vars(parser.parse_args(argv)))
        make_env(settings, 1).close()
        return settings
    except ValueError as error:
        parser.error(" ".join(str(error).split()))


if __name__ == "__main__":
    try:
        settings, solved = parse(), "not yet"
        np.seterr(all="ignore")  # `train` checks that everything is finite
        policy = initial_policy(settings)
        for row in train(settings, policy):
            if row.pop("solved") and solved == "not yet":
                solved = f"after {row['steps']} steps, {row['seconds']:.1f} s"
            for part in (0, 2) if row["update"] == 1 else ():  # names: first word above last word
                print(*(f"{key.rpartition('_')[part]:>9}" for key in row))
            if row["update"] % 5 == 1 or row["steps"] >= settings.steps:
                cells = (f"{x:.3g}" if isinstance(x, float) else x for x in row.values())
                print(*(f"{cell:>9}" for cell in cells), flush=True)
        env = make_env(settings, 100)
        if env.spec.reward_threshold is not None:
            print(f"mean of 100 training episodes at {env.spec.reward_threshold:g}: {solved}")
        returns, cut = evaluate(policy, env, settings.seed)
        result = f"greedy policy, 100 fresh episodes: {returns.mean():.1f} ± {returns.std():.1f}"
        print(result + (f" ({cut} episodes were cut off at 1000 steps)" if cut else ""), flush=True)
        if settings.watch:
            env = make_env(settings, 1, vectorization_mode="sync", render_mode="human")
            env.reset()  # opens the window, or pretends to
            pygame = sys.modules.get("pygame")
            hidden = pygame and pygame.display.get_driver() in ("dummy", "offscreen")
            evaluate(policy, env, settings.seed, cap=0 if hidden else 1000)
            env.close()
            if hidden:
                raise RuntimeError("--watch needs a display (on Linux, set DISPLAY)")
    except KeyboardInterrupt:
        sys.exit(130)  # 128 + signal 2, as shells count
    except (ValueError, ArithmeticError, RuntimeError, MemoryError, OSError, gym.error.Error) as e:
        sys.exit(" ".join(str(e).split()) or type(e).__name__)
