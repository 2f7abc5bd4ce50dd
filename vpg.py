"""Vanilla policy gradient (VPG): try actions, then make those that went well more likely.

A policy pi(a|s; theta) is a neural network with weights theta. For a state s it gives each action a
a probability. The return is the sum of an episode's rewards, discounted: r_0 + gamma r_1 +
gamma^2 r_2 + ... We want the theta with the largest expected return. V(s) is the expected return
from state s on, with pi playing; Q(s, a) the same, but with a as the first action; the advantage
A(s, a) = Q(s, a) - V(s) says how much better a is than pi's average. All change with theta.

The policy gradient theorem (Sutton & Barto 2018, section 13.2) says, for gamma = 1: the gradient
of the expected return is, up to a positive factor, the mean of Q(s, a) * gradient of log pi(a|s)
over the steps that the policy takes. A may stand for Q, as shown below. For gamma < 1, step t of an
episode would also have the weight gamma^t; it is usual to leave this out, as otherwise late steps
would hardly count. The gradient is estimated from a batch of steps, by

    g  =  mean over the batch of  Â * gradient of log pi(a|s; theta),

where Â, an estimate of A, is roughly the return that followed minus V(s). With the return alone,
this is REINFORCE. V(s) is a baseline: it makes g less noisy, but does not change its mean. For V(s)
is the same for all a, pi * gradient of log pi = gradient of pi, and the probabilities sum to 1:
    sum_a pi * V * gradient of log pi  =  V * gradient of sum_a pi  =  V * gradient of 1  =  0.
So Q - V = A may stand for Q. A second network, `value`, estimates V. It has another use: where the
batch ends before the episode does, its output for the last state replaces the rewards not seen. In
part it replaces even rewards that were seen, as it is less noisy (section 5). But where it is
wrong, it changes the mean of g: a bias.

    repeat:  play a batch of steps with the policy                      (section 4)
             estimate Â; targets of `value`: Â + value(s); normalize Â  (section 5)
             change theta once, by Adam, with g                         (sections 6, 3 and 2)
             fit `value` to its targets                                 (section 5)
Only one change for each batch, as g is right only for the policy that played it. (Adam's step is
not quite along g: it averages over batches and weighs each parameter, section 2.)
Run:  python vpg.py    Options:  python vpg.py --help
"""

import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, BooleanOptionalAction
from dataclasses import dataclass, field, fields
from types import SimpleNamespace

import gymnasium as gym
import numpy as np


# --- 1. Settings ----------------------------------------------------------------------------------
def option(default, meaning, low=None, high=float("inf")):
    return field(default=default, metadata={"meaning": meaning, "range": (low, high)})


@dataclass
class Settings:
    env: str = option("CartPole-v1", "Gymnasium environment")
    seed: int = option(0, "seed of all random numbers", 0)
    steps: int = option(150_000, "environment steps to train for (the last batch is completed)", 1)
    num_envs: int = option(16, "environments that run side by side", 1)
    horizon: int = option(48, "steps of each environment in a batch, resets included", 2)
    gamma: float = option(0.99, "discount factor", 0, 1)
    gae_lambda: float = option(0.99, "lambda of `gae`: 0 relies on `value`, 1 on rewards", 0, 1)
    hidden: int = option(64, "units in the hidden layer", 1)
    value_learning_rate: float = option(2e-2, "learning rate of `value`; falls to 0", 0, 1000)
    value_epochs: int = option(4, "passes over each batch to fit `value`", 0)
    minibatches: int = option(4, "parts into which each pass splits the batch", 1)
    watch: bool = option(False, "in the end, show the policy in a window")
    learning_rate: float = option(2.4e-2, "learning rate of the policy; falls to 0", 0, 1000)

    def __post_init__(self):
        for setting in fields(self):
            value = getattr(self, setting.name)
            low, high = setting.metadata["range"]
            if low is not None and not low <= value <= high:
                raise ValueError(f"{setting.name} must be from {low} to {high}, not {value}")


# --- 2. Network -----------------------------------------------------------------------------------
# Shapes: T steps in a row, N environments side by side, B rows of a batch, b of a part, D numbers
# in a state, H hidden units, K outputs (of a policy: one per action), P parameters.
class Network:
    def __init__(self, sizes, last_gain, rng):
        """The policy, or `value`: a tanh and a linear layer. Its parameters are a vector, theta."""
        D, H, K = sizes
        W1 = rng.standard_normal((D, H)) / np.sqrt(D)  # as a sum of D random terms grows as sqrt(D)
        W2 = rng.standard_normal((H, K)) / np.sqrt(H) * last_gain  # if small, so are the outputs
        parts = [W1.ravel(), np.zeros(H), W2.ravel(), np.zeros(K)]  # the order of `unflatten`
        self.theta = np.concatenate(parts).astype(np.float32)  # [P]
        self.sizes = sizes
        self.adam_m = np.zeros_like(self.theta)  # memory of `adam`, where it is used
        self.adam_v = np.zeros_like(self.theta)
        self.adam_steps = 0


def unflatten(vector, sizes):
    """Cut a vector [P] into weights and biases: W1 [D, H], b1 [H], W2 [H, K], b2 [K]."""
    D, H, K = sizes
    layer1 = vector[: (D + 1) * H].reshape(D + 1, H)  # the D rows of W1, then b1 as one more row
    layer2 = vector[(D + 1) * H :].reshape(H + 1, K)  # the H rows of W2, then b2
    return layer1[:-1], layer1[-1], layer2[:-1], layer2[-1]


def forward(network, inputs):
    """Outputs [..., K] for inputs [..., D]; and the activations, which `backward` needs."""
    W1, b1, W2, b2 = unflatten(network.theta, network.sizes)
    hidden = np.tanh(inputs @ W1 + b1)  # [..., D] -> [..., H]
    outputs = hidden @ W2 + b2  # [..., H] -> [..., K]
    return outputs, (inputs, hidden)


def backward(network, activations, grad_outputs):
    """The chain rule: from dy / d outputs [B, K], of some number y, to dy / d theta [P]."""
    _, _, W2, _ = unflatten(network.theta, network.sizes)
    inputs, hidden = activations
    # As outputs[b, k] = sum_h hidden[b, h] * W2[h, k] + b2[k]:
    grad_b2 = grad_outputs.sum(axis=0)  # [K], entries sum_b grad_outputs[b, k]
    grad_W2 = hidden.T @ grad_outputs  # [H, K], sum_b hidden[b, h] * grad_outputs[b, k]
    grad_hidden = grad_outputs @ W2.T  # [B, H], sum_k grad_outputs[b, k] * W2[h, k]
    grad_before_tanh = grad_hidden * (1 - hidden**2)  # [B, H], as tanh' = 1 - tanh^2
    grad_b1 = grad_before_tanh.sum(axis=0)  # [H], and W1 [D, H], likewise
    grad_W1 = inputs.T @ grad_before_tanh
    return np.concatenate([grad_W1.ravel(), grad_b1, grad_W2.ravel(), grad_b2])


def adam(network, gradient, learning_rate):
    """One step uphill (Kingma & Ba 2015, algorithm 1). m: mean of recent gradients, sqrt(v): their
    usual size. Where they are steady, large or small, a parameter moves by about learning_rate."""
    network.adam_steps += 1
    network.adam_m = 0.9 * network.adam_m + 0.1 * gradient
    network.adam_v = 0.999 * network.adam_v + 0.001 * gradient**2
    # In adam_m a gradient of k steps ago has the weight 0.1 * 0.9^k. These weights add up to
    # 1 - 0.9^steps; dividing by this makes it a mean. Likewise adam_v.
    m = network.adam_m / (1 - 0.9**network.adam_steps)
    v = network.adam_v / (1 - 0.999**network.adam_steps)
    network.theta = network.theta + learning_rate * m / (np.sqrt(v) + 1e-8)  # 1e-8: never 0 / 0


# --- 3. Policy ------------------------------------------------------------------------------------
def log_softmax(logits):
    """log pi [B, K] of a policy's outputs z, the logits: pi(a|s) = exp(z_a) / sum_j exp(z_j)."""
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)  # safe for large z


def sample_actions(policy, states, rng):
    """Draw an action for each state: lay the probabilities end to end, from 0 to 1; pick a random
    point. The action is the number of those that end before the point."""
    logits, _ = forward(policy, states)
    ends = np.exp(log_softmax(logits)).cumsum(axis=1)  # [N, K], where the parts end
    points = rng.random((len(states), 1))
    return (points > ends[:, :-1]).sum(axis=1)  # rounded, the last end may be below a point


def kl(log_probs_old, log_probs_new):
    """Kullback-Leibler divergence: how far pi_new is from pi_old, in nats, mean over the states.
    In a state it is sum_a pi_old log(pi_old / pi_new): 0 if the two are equal, else positive."""
    return float((np.exp(log_probs_old) * (log_probs_old - log_probs_new)).sum(axis=1).mean())


def policy_gradient(policy, activations, log_probs, actions, coefficients):
    """Gradient by theta [P] of  mean over the batch of coefficient * log pi(a|s),  the coefficients
    [B] held fixed. As log pi(a|s) = z_a - log sum_j exp(z_j), d log pi(a|s) / dz_k is
    (1 if k = a, else 0) - exp(z_k) / sum_j exp(z_j), that is, (1 if k = a, else 0) - pi(k|s)."""
    grad_log_prob = -np.exp(log_probs)  # [B, K]
    grad_log_prob[np.arange(len(actions)), actions] += 1  # in row i the column actions[i]
    grad_logits = coefficients[:, None] * grad_log_prob / len(actions)  # [B, K], / B for the mean
    return backward(policy, activations, grad_logits)


# --- 4. Experience --------------------------------------------------------------------------------
def make_env(settings, num_envs, **options):
    """Copies of settings.env, stepped together. ValueError unless the network fits them."""
    env = gym.make_vec(settings.env, num_envs, **options)
    space = env.single_observation_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"env must have vectors (1-D Box) as observations, not {space}")
    space = env.single_action_space
    if not isinstance(space, gym.spaces.Discrete) or space.start != 0:
        raise ValueError(f"env must have Discrete actions from 0 on, not {space}")
    reset_mode = env.metadata.get("autoreset_mode")  # None if it does not say
    if reset_mode is not None and reset_mode.name != "NEXT_STEP":  # see `Experience`
        raise ValueError("env must reset one step late (autoreset mode NEXT_STEP)")
    return env


class Experience:
    """Environments side by side, whose episodes go on from batch to batch. Each step is a row.
    If row 7 ends an episode, Gymnasium returns its last state, s8. The next call of step plays
    nothing there: it ignores the action and returns the first state of a new episode. So there are
        row 7  state s7  action taken    leads to s8: terminated, or truncated by a time limit
        row 8  state s8  action ignored  leads to a new episode's first state: resetting
    Row 8 is no experience. `gae` uses value(s8) if row 7 was truncated; `collect` drops row 8."""

    def __init__(self, settings, rng):
        env = make_env(settings, settings.num_envs)
        self.env = gym.wrappers.vector.RecordEpisodeStatistics(env)  # for `report`
        self.states, _ = self.env.reset(seed=int(rng.integers(2**31)))  # [N, D]
        self.resetting = np.zeros(settings.num_envs, bool)

    def play(self, policy, horizon, rng):
        """T rows: states [T, N, D]; actions, rewards, terminated, truncated, resetting [T, N]."""
        rows = []
        for _ in range(horizon):
            states = self.states
            resetting = self.resetting
            actions = sample_actions(policy, states, rng)
            self.states, rewards, terminated, truncated, _ = self.env.step(actions)
            self.resetting = terminated | truncated  # the next row resets these
            rows.append((states, actions, rewards, terminated, truncated, resetting))
        return [np.array(column) for column in zip(*rows)]  # from T rows of 6 to 6 arrays of T


# --- 5. Values and advantages ---------------------------------------------------------------------
def gae(rewards, values, terminated, truncated, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016): Â [T, N]. values [T + 1, N] estimate
    V, of the states in the T rows and of those the last led to. The temporal-difference (TD) error
        td_error_t = r_t + gamma value(s_{t+1}) - value(s_t)
    says how much better a step went than predicted; if value(s) = V(s), its mean is A. In the sum
        td_error_t + gamma td_error_{t+1}
            = r_t + gamma r_{t+1} + gamma^2 value(s_{t+2}) - value(s_t)
    value(s_{t+1}) has canceled. Add gamma^2 td_error_{t+2} ... to the end: rewards are left, minus
    value(s_t), plus a last value if the episode goes on. A sum of few relies on `value`, which can
    be wrong; of many, on rewards, which are noisy. Lambda, from 0 to 1, lets the later ones fade:
        Â_t = td_error_t + gamma lambda td_error_{t+1} + (gamma lambda)^2 td_error_{t+2} + ...
            = td_error_t + gamma lambda Â_{t+1},   up to the end of the episode or batch."""
    # Terminated: nothing more is earned. Truncated: `value` says what would have been earned.
    next_values = np.where(terminated, 0, values[1:])  # row t + 1 holds where row t led
    td_errors = rewards + gamma * next_values - values[:-1]
    ended = terminated | truncated
    advantages = np.zeros_like(values)  # [T + 1, N]; the last row stays 0
    for t in reversed(range(len(rewards))):
        following = np.where(ended[t], 0, advantages[t + 1])  # not the Â of a resetting row
        advantages[t] = td_errors[t] + gamma * gae_lambda * following
    return advantages[:-1]


def collect(experience, policy, value, settings, rng):
    """Play, and return a batch: what an update needs, with one row for each real step, [B]."""
    columns = experience.play(policy, settings.horizon, rng)
    states, actions, rewards, terminated, truncated, resetting = columns
    all_states = np.concatenate([states, [experience.states]], dtype=np.float32)  # [T + 1, N, D]
    outputs, _ = forward(value, all_states)  # [T + 1, N, 1]
    values = outputs[..., 0]
    advantages = gae(rewards, values, terminated, truncated, settings.gamma, settings.gae_lambda)
    real = ~resetting  # as an index it takes the rows that are True: [T, N] -> [B]
    batch = SimpleNamespace()
    batch.states = all_states[:-1][real]  # [B, D]
    batch.actions = actions[real]
    batch.values = values[:-1][real]  # before the fit, for `report`
    batch.targets = (advantages + values[:-1])[real]  # Â + value(s) estimates the return
    advantages = advantages[real]
    # Usual, though no theory asks for it: minus the mean, nearly one more baseline (each step's own
    # Â is in it, too); divided by the standard deviation, which gives all batches one scale.
    batch.advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    logits, _ = forward(policy, batch.states)  # again, as `play` keeps only the actions
    batch.log_probs_old = log_softmax(logits)  # [B, K], old: of the policy that played
    return batch


def fit_value(value, batch, settings, decay, rng):
    """Bring `value` closer to the targets: uphill on the mean of -(target - output)^2 / 2."""
    for _ in range(settings.value_epochs):
        order = rng.permutation(len(batch.targets))
        for chosen in np.array_split(order, settings.minibatches):
            outputs, activations = forward(value, batch.states[chosen])  # [b, 1], of a minibatch
            errors = batch.targets[chosen, None] - outputs  # the derivative by the outputs
            gradient = backward(value, activations, errors / len(chosen))
            adam(value, gradient, decay * settings.value_learning_rate)


# --- 6. The update --------------------------------------------------------------------------------
def update_policy(policy, batch, settings, decay, rng):
    """Change theta once, by Adam. The policy is still the one that played, with log_probs_old.
    It does without rng, which ppo.py needs, and has no figures of its own to return."""
    _, activations = forward(policy, batch.states)
    g = policy_gradient(policy, activations, batch.log_probs_old, batch.actions, batch.advantages)
    adam(policy, g, decay * settings.learning_rate)
    return {}


# --- 7. Training ----------------------------------------------------------------------------------
def initial_policy(settings):
    """A policy for settings.env, nearly undecided in every state, as its last weights are small."""
    env = make_env(settings, 1)
    sizes = (env.single_observation_space.shape[0], settings.hidden, env.single_action_space.n)
    return Network(sizes, 0.01, np.random.default_rng([settings.seed, 0]))  # [seed, 0]: one stream


def train(settings, policy):
    """Train `policy`, in place. A generator: after each update, it yields a row of figures."""
    start = time.perf_counter()
    rng = np.random.default_rng([settings.seed, 1])  # another stream; `main` has 2 and 3
    value = Network((*policy.sizes[:2], 1), 1.0, rng)  # sizes (D, H, 1)
    experience = Experience(settings, rng)
    steps = 0
    update = 0
    while steps < settings.steps:
        decay = 1 - steps / settings.steps  # factor of the learning rates, from 1 towards 0
        batch = collect(experience, policy, value, settings, rng)
        theta_old = policy.theta.copy()  # for `report`
        own_figures = update_policy(policy, batch, settings, decay, rng)
        fit_value(value, batch, settings, decay, rng)
        update += 1
        steps += len(batch.actions)
        row = {"update": update, "steps": steps} | report(policy, theta_old, batch, experience)
        if not np.isfinite([policy.theta.sum(), value.theta.sum(), row["kl"]]).all():
            raise FloatingPointError(f"update {update} is no longer finite: rates too high?")
        yield row | {"seconds": time.perf_counter() - start} | own_figures


def report(policy, theta_old, batch, experience):
    """Figures of an update. (compare.py saves all of them, `main` prints some.)"""
    logits, _ = forward(policy, batch.states)
    returns = experience.env.return_queue  # of the last 100 finished episodes, not discounted
    entropies = -(np.exp(batch.log_probs_old) * batch.log_probs_old).sum(axis=1)  # [B], in nats
    variance = float(batch.targets.var())
    unexplained = float((batch.targets - batch.values).var())  # by `value`, before its fit
    return {
        "episodes": int(experience.env.episode_count),
        "episode_return": float(np.mean(returns)) if returns else np.nan,
        "kl": kl(batch.log_probs_old, log_softmax(logits)),  # from the old policy to the new one
        "entropy": float(entropies.mean()),  # log K if undecided, 0 if certain
        "step_norm": float(np.linalg.norm(policy.theta - theta_old)),  # how far theta has moved
        "explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
    }


# --- 8. Evaluation and command line ---------------------------------------------------------------
def evaluate(policy, env, rng, max_steps=1000):
    """The return [N] of an episode in each environment (to max_steps), by the likeliest actions."""
    states, _ = env.reset(seed=int(rng.integers(2**31)))
    returns = np.zeros(env.num_envs)
    running = np.ones(env.num_envs, bool)
    for _ in range(max_steps):
        logits, _ = forward(policy, states)
        states, rewards, terminated, truncated, _ = env.step(logits.argmax(axis=1))
        returns += np.where(running, rewards, 0)
        running &= ~(terminated | truncated)
    return returns


def parse(argv=None):
    """The command line as Settings. After a mistake: usage, a line that says it, exit status 2."""
    parser = ArgumentParser(formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False)
    for setting in fields(Settings):
        name = "--" + setting.name.replace("_", "-")
        kind = {"action": BooleanOptionalAction} if setting.type is bool else {"type": setting.type}
        parser.add_argument(name, default=setting.default, help=setting.metadata["meaning"], **kind)
    try:
        settings = Settings(**vars(parser.parse_args(argv)))
        make_env(settings, 1).close()  # can it be made?
        return settings
    except (ValueError, gym.error.Error, ModuleNotFoundError) as error:
        parser.error(str(error))


def main():
    settings = parse()
    np.seterr(all="ignore")  # no warnings: `train` stops if a result is not finite
    policy = initial_policy(settings)
    env = make_env(settings, 100)
    threshold = np.inf if env.spec.reward_threshold is None else env.spec.reward_threshold
    solved = "never"
    print("   steps  episode_return        kl  step_norm  entropy  seconds")
    line = "{steps:8}{episode_return:16.1f}{kl:10.2g}{step_norm:11.2g}{entropy:9.3f}{seconds:9.1f}"
    for row in train(settings, policy):
        if row["update"] % 5 == 1:
            print(line.format(**row), flush=True)
        if solved == "never" and row["episodes"] >= 100 and row["episode_return"] >= threshold:
            solved = f"after {row['steps']} steps"
    if threshold < np.inf:
        print(f"mean of 100 training episodes at {threshold:g}: {solved}")
    returns = evaluate(policy, env, np.random.default_rng([settings.seed, 2]))
    print(f"greedy policy, 100 fresh episodes: {returns.mean():.1f} ± {returns.std():.1f}")
    if settings.watch:
        window = make_env(settings, 1, vectorization_mode="sync", render_mode="human")
        evaluate(policy, window, np.random.default_rng([settings.seed, 3]))
        window.close()


if __name__ == "__main__":
    try:
        main()
    except (FloatingPointError, KeyboardInterrupt) as error:
        raise SystemExit(str(error) or 130)  # Ctrl-C has no message; its usual status is 130
