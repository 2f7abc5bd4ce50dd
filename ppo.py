# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "gymnasium>=1.0"]
# ///
"""Proximal policy optimization (PPO-Clip): several steps on each batch, none worth going too far.

The surrogate objective estimates from old experience how good a new policy is. With the ratio
r = pi(a|s; theta) / pi(a|s; theta_old), PPO maximizes a clipped version of it:

    L(theta)  =  mean of  min( r * A,  clip(r, 1 - clip, 1 + clip) * A )

Once r has moved by more than `clip` in the direction that A asks for, the gradient is 0: there is
nothing to gain from moving that action's probability any further.

    repeat until the steps are used up:
        run the policy for a batch of steps                              (section 4)
        estimate the advantages from the rewards and V                   (section 5)
        for some epochs, for each minibatch of the batch:
            theta <- theta + Adam step along the gradient of L           (section 7)
        fit V to the estimated returns                                   (section 6)

TRPO bounds KL(pi_old || pi_new); the clip only takes away the reason to leave. The column kl shows
how well that works.

Run:    python ppo.py        Options:    python ppo.py --help
Paper:  Schulman, Wolski, Dhariwal, Radford & Klimov 2017, arXiv:1707.06347.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # layers this small run faster on one thread
os.environ.setdefault("VECLIB_MAXIMUM_THREADS", "1")  # the same for NumPy on macOS
import argparse
import sys
import time
from collections import deque
from dataclasses import dataclass, field, fields

import gymnasium as gym
import numpy as np


# --- 1. Settings ----------------------------------------------------------------------------------
def option(default, meaning, low=None, high=None):
    """A setting: its default, what it means, the lowest and the highest value allowed."""
    return field(default=default, metadata={"meaning": meaning, "low": low, "high": high})


@dataclass
class Settings:
    """Everything that can be chosen. Raises ValueError for a value that is out of range."""

    env: str = option("CartPole-v1", "Gymnasium environment: vectors observed, discrete actions")
    seed: int = option(0, "seed of all random numbers", 0, 2**63)
    steps: int = option(150_000, "environment steps in all", 1, 10**12)
    num_envs: int = option(16, "environments that run side by side", 1, 10**6)
    horizon: int = option(64, "calls of each environment per batch", 2, 10**9)
    gamma: float = option(0.98, "discount factor", 0, 1)
    gae_lambda: float = option(
        0.99, "GAE: 0 trusts the value function, 1 the sampled returns", 0, 1
    )
    hidden: int = option(64, "units in each of the two hidden layers", 1, 10**5)
    value_learning_rate: float = option(1e-2, "Adam's step for the value function", 0, 1e30)
    value_epochs: int = option(8, "passes over each batch to fit the value function", 0, 10**6)
    minibatch_size: int = option(256, "states per gradient step in such a pass", 1, 10**9)
    watch: bool = option(False, "show the trained policy in a window")
    # The algorithm's own:
    learning_rate: float = option(2.5e-3, "Adam's step for the policy", 0, 1e30)
    epochs: int = option(8, "passes over each batch to improve the policy", 1, 10**6)
    clip: float = option(0.2, "ratios beyond 1 +- clip earn nothing; inf: no clip", 0, float("inf"))
    target_kl: float = option(
        float("inf"), "no further epoch once kl exceeds this", 0, float("inf")
    )

    def __post_init__(self):
        for setting in fields(self):
            value, low, high = getattr(self, setting.name), *list(setting.metadata.values())[1:]
            if low is not None and not low <= value <= high:  # true for nan, too
                raise ValueError(f"{setting.name} must be from {low} to {high}, not {value}")


# --- 2. Network -----------------------------------------------------------------------------------
class Network:
    """Two tanh layers and a linear one. W1, b1, ..., b3 are views into one flat vector theta [P]."""

    def __init__(self, sizes, theta=None):
        inputs, hidden, outputs = self.sizes = sizes
        shapes = (inputs, hidden), hidden, (hidden, hidden), hidden, (hidden, outputs), outputs
        ends = np.cumsum([np.prod(shape) for shape in shapes])
        self.theta = np.zeros(ends[-1], np.float32) if theta is None else theta
        parts = zip(np.split(self.theta, ends[:-1]), shapes)
        views = [part.reshape(shape) for part, shape in parts]
        self.W1, self.b1, self.W2, self.b2, self.W3, self.b3 = views
        self.mean, self.square, self.updates = 0.0, 0.0, 0  # what `adam` remembers


def initial_network(rng, sizes, last_gain):
    """Orthogonal weights times sqrt(2), in the last layer times last_gain; biases 0."""
    network = Network(sizes)
    for weights, gain in (network.W1, 2**0.5), (network.W2, 2**0.5), (network.W3, last_gain):
        columns, _ = np.linalg.qr(rng.standard_normal((max(weights.shape), min(weights.shape))))
        weights[:] = gain * (columns if columns.shape == weights.shape else columns.T)
    return network


def forward(network, inputs):
    """Outputs [..., outputs] for inputs [..., inputs], and the activations, for `backward`."""
    hidden1 = np.tanh(inputs @ network.W1 + network.b1)
    hidden2 = np.tanh(hidden1 @ network.W2 + network.b2)
    return hidden2 @ network.W3 + network.b3, (inputs, hidden1, hidden2)


def backward(network, activations, grad_outputs):
    """Backpropagation: J^T u [P] for u = grad_outputs [B, outputs], J = d outputs / d theta.

    With the gradient of a loss in the outputs as u, this is its gradient in theta.
    """
    inputs, hidden1, hidden2 = activations
    grad_hidden2 = (grad_outputs @ network.W3.T) * (1 - hidden2**2)  # tanh' = 1 - tanh^2
    grad_hidden1 = (grad_hidden2 @ network.W2.T) * (1 - hidden1**2)
    layers = (inputs, grad_hidden1), (hidden1, grad_hidden2), (hidden2, grad_outputs)
    grads = [((below.T @ grad).ravel(), grad.sum(axis=0)) for below, grad in layers]
    return np.concatenate([part for weights_and_bias in grads for part in weights_and_bias])


def adam(network, gradient, learning_rate):
    """Move each parameter uphill by about learning_rate: mean / sqrt(square) hardly depends on how
    long the gradients are (Kingma & Ba 2015, algorithm 1)."""
    network.updates += 1
    network.mean += (1 - 0.9) * (gradient - network.mean)
    network.square += (1 - 0.999) * (gradient**2 - network.square)
    mean = network.mean / (1 - 0.9**network.updates)  # undoes the bias of starting at 0
    square = network.square / (1 - 0.999**network.updates)
    network.theta += learning_rate * mean / (np.sqrt(square) + 1e-8)


# --- 3. Policy ------------------------------------------------------------------------------------
def log_softmax(logits):
    """log pi(a|s) of every action [B, A]. Subtracting the maximum keeps exp from overflowing."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def kl(log_probs_old, log_probs_new):
    """KL(pi_old || pi_new) = sum_a pi_old (log pi_old - log pi_new), mean over states, in nats:
    how far the behaviour moved, whatever the weights did. (Below 1e-7: float32 noise.)"""
    return float((np.exp(log_probs_old) * (log_probs_old - log_probs_new)).sum(axis=1).mean())


def policy_gradient(policy, activations, log_probs, actions, weights):
    """Gradient in theta [P] of the mean of weights * log pi(a|s); in the logits, the gradient of
    log pi(a|s) is onehot(a) - pi(.|s)."""
    onehot = np.eye(log_probs.shape[1], dtype=log_probs.dtype)[actions]  # [B, A]
    grad_logits = weights[:, None] * (onehot - np.exp(log_probs)) / len(actions)
    return backward(policy, activations, grad_logits)


# --- 4. Experience --------------------------------------------------------------------------------
def make_env(settings, num_envs, **how):
    """num_envs copies of the environment, stepped together. ValueError if it is not of our kind."""
    try:
        env = gym.make_vec(settings.env, num_envs=num_envs, **how)
    except (gym.error.Error, ImportError) as error:
        raise ValueError(f"env must name an installed environment, not {settings.env!r}: {error}")
    states, actions = env.single_observation_space, env.single_action_space
    if not (
        type(actions) is gym.spaces.Discrete and actions.start == 0 and len(states.shape or ()) == 1
    ):
        raise ValueError(
            f"env must have one-dimensional Box observations and Discrete actions from 0; {settings.env} has {states}, {actions}"
        )
    return env


def initial_policy(settings):
    """A policy for settings.env, close to uniform since its last layer's weights are small."""
    env = make_env(settings, 1)
    sizes = env.single_observation_space.shape[0], settings.hidden, int(env.single_action_space.n)
    env.close()
    return initial_network(np.random.default_rng(settings.seed).spawn(1)[0], sizes, 0.01)


def experience(env, policy, horizon, finished, rng):
    """Endless batches: actions, rewards, terminated, truncated, resetting [T, N] and, first,
    observations [T + 1, N, D]. Adds the returns of finished episodes to `finished`.

    After an episode's end, an environment spends its next call on the reset. These calls, marked
    in `resetting`, are no transitions; due to them, observations[t + 1] is always where actions[t]
    led, even at an episode's end.
    """
    observations, _ = env.reset(seed=int(rng.integers(2**31)))
    ended, returns = np.zeros(env.num_envs, bool), np.zeros(env.num_envs)
    while True:
        calls = []
        for noise in rng.gumbel(size=(horizon, env.num_envs, policy.sizes[2])):
            logits, _ = forward(policy, observations)
            actions = (logits + noise).argmax(axis=1)  # Gumbel noise: a sample of softmax(logits)
            before, resetting = observations, ended
            observations, rewards, terminated, truncated, _ = env.step(actions)
            calls.append((before, actions, rewards, terminated, truncated, resetting))
            ended = terminated | truncated
            returns += rewards
            finished.extend(returns[ended])
            returns[ended] = 0
        states, actions, rewards, *flags = (np.array(column) for column in zip(*calls))
        states = np.concatenate([states, observations[None]]).astype(np.float32)
        yield states, actions, rewards.astype(np.float32), *flags


# --- 5. Advantages --------------------------------------------------------------------------------
def gae(rewards, values, terminated, truncated, resetting, gamma, gae_lambda):
    """Generalized advantage estimates [T, N] from values [T + 1, N] (Schulman et al. 2016, eq. 16):

        A_t = delta_t + gamma lambda A_{t+1},    delta_t = r_t + gamma V(s_{t+1}) - V(s_t)

    A terminal s_{t+1} has V = 0; where an episode was only cut off (truncated), V counts.
    """
    deltas = rewards + gamma * values[1:] * ~terminated - values[:-1]
    ends = terminated | truncated | resetting
    advantages, following = np.zeros_like(deltas), np.zeros_like(deltas[0])
    for t in reversed(range(len(deltas))):
        following = advantages[t] = deltas[t] + gamma * gae_lambda * following * ~ends[t]
    return advantages * ~resetting


def normalize(advantages, targets):
    """Shift to mean 0, scale to standard deviation 1; all 0 if what differs is float32 rounding of
    the targets (estimated returns), from which nothing can be learned."""
    centered, rounding = advantages - advantages.mean(), 1e-5 * max(1.0, np.abs(targets).max())
    return centered / centered.std() if centered.std() > rounding else 0 * centered


# --- 6. Value function ----------------------------------------------------------------------------
def minibatches(rng, count, size):
    """Indices 0 to count - 1, shuffled and dealt into equal parts of at most `size`."""
    return np.array_split(rng.permutation(count), -(-count // size))


def fit_value(value, observations, targets, settings, decay, rng):
    """Reduce the mean of (V(s) - target)^2 / 2 by Adam steps on minibatches."""
    for _ in range(settings.value_epochs):
        for chosen in minibatches(rng, len(targets), settings.minibatch_size):
            values, activations = forward(value, observations[chosen])
            errors = (targets[chosen, None] - values) / len(chosen)  # uphill on minus that mean
            gradient = backward(value, activations, errors)
            adam(value, gradient, decay * settings.value_learning_rate)


def explained_variance(values, targets):
    """1 - Var(target - V) / Var(target): 1 perfect, 0 as good as a constant, below 0 worse."""
    residual, variance = np.var(targets - values, dtype=float), np.var(targets, dtype=float)
    return float(1 - residual / variance) if variance > 0 else 0.0


# --- 7. The update --------------------------------------------------------------------------------
def clipped_surrogate_gradient(ratio, advantages, clip):
    """Derivative of min(r A, clip(r, 1 - clip, 1 + clip) A) in the ratio r [B]: A, or 0 beyond the
    clip, on the side to which A pushes (Schulman et al. 2017, equation 7).
    """
    beyond = np.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)
    return np.where(beyond, 0, advantages)


def log_prob_of(log_probs, actions):
    """log pi(a|s) [B] of the actions taken, from log_probs [B, A]."""
    return log_probs[np.arange(len(actions)), actions]


def update_policy(policy, observations, actions, advantages, settings, decay, rng):
    """Epochs of Adam steps on minibatches (Schulman et al. 2017, algorithm 1)."""
    log_probs_old = log_softmax(forward(policy, observations)[0])
    log_prob_old = log_prob_of(log_probs_old, actions)
    clipped = []
    for epoch in range(settings.epochs):
        for chosen in minibatches(rng, len(actions), settings.minibatch_size):
            logits, activations = forward(policy, observations[chosen])
            log_probs = log_softmax(logits)
            ratio = np.exp(log_prob_of(log_probs, actions[chosen]) - log_prob_old[chosen])
            slope = clipped_surrogate_gradient(ratio, advantages[chosen], settings.clip)
            weights = slope * ratio  # chain rule: the gradient of r is r * gradient of log pi
            gradient = policy_gradient(policy, activations, log_probs, actions[chosen], weights)
            adam(policy, gradient, decay * settings.learning_rate)
            clipped.append(np.mean(np.abs(ratio - 1) > settings.clip))
        if kl(log_probs_old, log_softmax(forward(policy, observations)[0])) > settings.target_kl:
            break
    return {"clip_fraction": float(np.mean(clipped)), "epochs": epoch + 1}


# --- 8. Training ----------------------------------------------------------------------------------
def train(settings, policy=None):
    """Improve the policy (default: a new one) in place. Yields a dict of figures per update; raises
    FloatingPointError when one of them, or a parameter, is no longer finite."""
    start, steps, solved, finished = time.perf_counter(), 0, False, deque(maxlen=100)
    policy = policy or initial_policy(settings)
    _, value_rng, env_rng, rng = np.random.default_rng(settings.seed).spawn(4)
    value = initial_network(value_rng, (policy.sizes[0], settings.hidden, 1), 1.0)
    env = make_env(settings, settings.num_envs)
    threshold = env.spec.reward_threshold
    for update, batch in enumerate(experience(env, policy, settings.horizon, finished, env_rng), 1):
        observations, actions, rewards, terminated, truncated, resetting = batch
        values = forward(value, observations)[0][..., 0]  # [T + 1, N]
        discounts = settings.gamma, settings.gae_lambda
        advantages = gae(rewards, values, terminated, truncated, resetting, *discounts)
        real = ~resetting  # flatten [T, N] to [B], the calls that were transitions
        observations, actions = observations[:-1][real], actions[real]
        advantages, values = advantages[real], values[:-1][real]
        targets = advantages + values

        decay = 1 - steps / settings.steps  # of the learning rates, from 1 towards 0
        theta_old, log_probs_old = (
            policy.theta.copy(),
            log_softmax(forward(policy, observations)[0]),
        )
        advantages = normalize(advantages, targets)
        own = update_policy(policy, observations, actions, advantages, settings, decay, rng)
        log_probs_new = log_softmax(forward(policy, observations)[0])
        fit_value(value, observations, targets, settings, decay, rng)

        steps, recent = steps + len(actions), list(finished)
        solved |= threshold is not None and len(recent) == 100 and np.mean(recent) >= threshold
        row = {"update": update, "steps": steps}
        row["episode_return"] = float(np.mean(recent[-20:])) if recent else float("nan")
        row["kl"] = kl(log_probs_old, log_probs_new)
        row["entropy"] = -float((np.exp(log_probs_old) * log_probs_old).sum(axis=1).mean())
        row["step_norm"] = float(np.linalg.norm(policy.theta - theta_old))
        row["explained_variance"] = explained_variance(values, targets)
        row |= {"solved": bool(solved), "seconds": time.perf_counter() - start, **own}
        figures = [figure for key, figure in row.items() if key != "episode_return"]
        if not np.isfinite([*figures, policy.theta.sum(), value.theta.sum()]).all():
            raise FloatingPointError(f"update {update} is no longer finite: take smaller steps")
        yield row
        if steps >= settings.steps:
            break


# --- 9. Evaluation and command line ---------------------------------------------------------------
def evaluate(policy, env, seed, cap=1000):
    """Return [N] of the greedy policy in one episode of each of env's copies, and how many episodes
    were cut off at the cap."""
    observations, _ = env.reset(seed=int(np.random.default_rng(seed).integers(2**31)))
    returns, running = np.zeros(env.num_envs), np.ones(env.num_envs, bool)
    for _ in range(cap):
        actions = forward(policy, observations)[0].argmax(axis=1)
        observations, rewards, terminated, truncated, _ = env.step(actions)
        returns += rewards * running
        running &= ~(terminated | truncated)
        if not running.any():
            break
    return returns, running.sum()


def watch(policy, settings, episodes=3):
    """Play in a window. RuntimeError if it could not be seen."""
    env = make_env(settings, 1, vectorization_mode="sync", render_mode="human")
    env.reset()
    pygame = sys.modules.get("pygame")
    if pygame and pygame.display.get_driver() in ("dummy", "offscreen"):
        raise RuntimeError("--watch needs a display (on Linux, DISPLAY must be set)")
    for seed in range(episodes):
        evaluate(policy, env, seed)


def parse(argv=None):
    """The command line as Settings. For a mistake: one line on standard error, exit status 2."""
    program = os.path.basename(__file__)
    parser = argparse.ArgumentParser(
        program, description=__doc__.splitlines()[0], allow_abbrev=False
    )
    for setting in fields(Settings):
        flag = {"action": argparse.BooleanOptionalAction}
        kind = flag if setting.type is bool else {"type": setting.type}
        meaning = setting.metadata["meaning"] + " (default: %(default)s)"
        name = "--" + setting.name.replace("_", "-")
        parser.add_argument(name, default=setting.default, help=meaning, **kind)
    try:
        settings = Settings(**vars(parser.parse_args(argv)))
        make_env(settings, 1).close()
    except ValueError as error:
        parser.error(str(error))
    return settings


def print_row(cells):
    """Cells of ten characters: text, whole numbers, and others to three digits."""
    print("".join(f"{c:>10.3g}" if isinstance(c, float) else f"{c:>10}" for c in cells), flush=True)


def main():
    settings, lines, solved = parse(), 0, None
    np.seterr(over="ignore", invalid="ignore")  # `train` checks that all is finite
    policy = initial_policy(settings)
    for row in train(settings, policy):
        solved = solved or (row["solved"] and f"after {row['steps']} steps, {row['seconds']:.1f} s")
        del row["solved"]
        if lines == 0:  # episode_return as two words, one above the other
            print_row(key.rpartition("_")[0] for key in row)
            print_row(key.rpartition("_")[2] for key in row)
        if row["steps"] * 25 >= settings.steps * lines:  # about 25 lines a run
            print_row(row.values())
            lines += 1
    env = make_env(settings, 100)
    if env.spec.reward_threshold is not None:
        print(f"100 episodes averaged {env.spec.reward_threshold:g} or more: {solved or 'not yet'}")
    returns, cut = evaluate(policy, env, settings.seed)
    note = f" ({cut} of them cut off)" if cut else ""
    print(f"greedy policy, 100 fresh episodes: {returns.mean():.1f} ± {returns.std():.1f}{note}")
    if settings.watch:
        watch(policy, settings)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, FloatingPointError, RuntimeError, gym.error.Error) as error:
        sys.exit(f"{os.path.basename(__file__)}: {error}")
