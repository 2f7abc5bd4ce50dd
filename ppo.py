"""Proximal policy optimization (PPO-Clip): use each batch several times, but stay near its policy.

V(s) is the mean discounted return from state s on under pi_old, the policy that played the batch;
a second network estimates it. A(s, a), the advantage, is how much more it is if action a comes
first (section 5). A policy with sum_a pi A > 0 in each state is better: its every step gains on
pi_old. As sum_a pi A = sum_a pi_old (pi / pi_old) A, an action played has, as its weight, the
ratio = pi(a|s; theta) / pi(a|s; theta_old):

    L(theta)  =  mean over the batch of  min( ratio * A,  clipped ratio * A )

with the clipped ratio kept from 1 - clip to 1 + clip. At theta_old all ratios are 1, L's gradient
is that of REINFORCE with A for the return. Far from it, ratio * A misleads, as the states and the A
are still those of pi_old. So a term of L stops growing once its ratio has passed the limit on the
side that A wants; one that moved the other way is still pulled back, thanks to the min. (That
bounds the gain, not the ratio: a step may overshoot, and steps for other actions move it too.)

    repeat:  play a batch of steps with the policy                         (section 4)
             estimate A; set targets for V, A + V; then normalize A        (section 5)
             for each epoch, for each part (minibatch) of the shuffled batch:
                 theta <- theta + a step by Adam, uphill on L              (sections 6 and 2)
             fit V to its targets                                          (section 5)
Run:  python ppo.py    Options:  python ppo.py --help    Schulman et al. 2017, arXiv:1707.06347
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for speed: one thread suits small arrays
import numpy as np

np.empty(2**21)  # for speed only: from here on Linux's malloc keeps freed memory for later
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, BooleanOptionalAction
from dataclasses import dataclass, field, fields
from types import SimpleNamespace

import gymnasium as gym


# --- 1. Settings ----------------------------------------------------------------------------------
def option(default, meaning, low=None, high=float("inf")):
    return field(default=default, metadata={"meaning": meaning, "range": (low, high)})


@dataclass
class Settings:
    env: str = option("CartPole-v1", "Gymnasium environment")
    seed: int = option(0, "seed of all random numbers", 0)
    steps: int = option(150_000, "environment steps to train for (the last batch is completed)", 1)
    num_envs: int = option(16, "environments that run side by side", 1)
    horizon: int = option(48, "steps of each environment in a batch, with those that reset", 2)
    gamma: float = option(0.99, "discount factor", 0, 1)
    gae_lambda: float = option(0.99, "lambda of `gae`: 0 relies on V, 1 on the rewards", 0, 1)
    hidden: int = option(64, "units in the hidden layer", 1)
    value_learning_rate: float = option(2e-2, "Adam's for V; falls to 0", 0, 1000)
    value_epochs: int = option(4, "passes over each batch to fit V", 0)
    minibatches: int = option(4, "parts into which each pass splits the batch", 1)
    watch: bool = option(False, "in the end, show the policy in a window")
    # The update of the policy (section 6):
    learning_rate: float = option(6e-3, "Adam's for the policy; falls to 0", 0, 1000)
    epochs: int = option(4, "passes over each batch that update the policy", 1)
    clip: float = option(0.2, "how far from 1 a ratio may pay off; inf: any", 0)
    target_kl: float = option(float("inf"), "after an epoch with a larger KL, leave the batch", 0)

    def __post_init__(self):
        for setting in fields(self):
            value = getattr(self, setting.name)
            low, high = setting.metadata["range"]
            if low is not None and not low <= value <= high:
                raise ValueError(f"{setting.name} must be from {low} to {high}, not {value}")


# --- 2. Network -----------------------------------------------------------------------------------
# Shapes: T steps in a row, N environments side by side, B rows of a batch or minibatch, D numbers
# in a state, H hidden units, K outputs (of a policy: one per action), P parameters.
class Network:
    def __init__(self, sizes, last_gain, rng):
        """A layer with tanh, then a linear one. All parameters are one vector, theta."""
        D, H, K = sizes
        # A sum of n random numbers around 0 is about sqrt(n) times as large as one: divide by it.
        W1 = rng.standard_normal((D, H)) / np.sqrt(D)
        W2 = rng.standard_normal((H, K)) / np.sqrt(H) * last_gain  # if small, so are the outputs
        parts = [W1.ravel(), np.zeros(H), W2.ravel(), np.zeros(K)]  # the order of `unflatten`
        self.theta = np.concatenate(parts).astype(np.float32)  # [P]
        self.sizes = sizes
        self.adam_mean = np.zeros_like(self.theta)  # what `adam` remembers from step to step
        self.adam_mean_square = np.zeros_like(self.theta)
        self.adam_steps = 0


def unflatten(vector, sizes):
    """Cut a vector [P] into weights and biases: W1 [D, H], b1 [H], W2 [H, K], b2 [K]."""
    D, H, K = sizes
    layer1 = vector[: (D + 1) * H].reshape(D + 1, H)  # W1 [D, H] and b1 [H], one after the other
    layer2 = vector[(D + 1) * H :].reshape(H + 1, K)
    return layer1[:-1], layer1[-1], layer2[:-1], layer2[-1]


def forward(network, inputs):
    """Outputs [..., K] for inputs [..., D]; and the activations, which `backward` needs."""
    W1, b1, W2, b2 = unflatten(network.theta, network.sizes)
    hidden = np.tanh(inputs @ W1 + b1)  # [..., D] -> [..., H]
    outputs = hidden @ W2 + b2  # [..., H] -> [..., K]
    return outputs, (inputs, hidden)


def backward(network, activations, grad_outputs):
    """The chain rule: an objective's derivatives by theta [P] from those by the outputs [B, K]."""
    _, _, W2, _ = unflatten(network.theta, network.sizes)
    inputs, hidden = activations
    grad_hidden = grad_outputs @ W2.T  # [B, K] -> [B, H]
    grad_before_tanh = grad_hidden * (1 - hidden**2)  # [B, H], as tanh' = 1 - tanh^2
    grad_layer1 = [inputs.T @ grad_before_tanh, grad_before_tanh.sum(axis=0)]  # W1, b1
    grad_layer2 = [hidden.T @ grad_outputs, grad_outputs.sum(axis=0)]  # W2, b2
    return np.concatenate([grad.ravel() for grad in [*grad_layer1, *grad_layer2]])


def adam(network, gradient, learning_rate):
    """Move theta uphill by learning_rate * m / sqrt(v): m is a fading mean of the gradient, v of
    its square (Kingma & Ba 2015, algorithm 1). For a steady gradient, m / sqrt(v) is 1 or -1."""
    network.adam_steps += 1
    network.adam_mean = 0.9 * network.adam_mean + 0.1 * gradient
    network.adam_mean_square = 0.999 * network.adam_mean_square + 0.001 * gradient**2
    m = network.adam_mean / (1 - 0.9**network.adam_steps)  # it began at 0: its weights sum to this
    v = network.adam_mean_square / (1 - 0.999**network.adam_steps)
    network.theta = network.theta + learning_rate * m / (np.sqrt(v) + 1e-8)  # 1e-8: never 0 / 0


# --- 3. Policy ------------------------------------------------------------------------------------
def log_softmax(logits):
    """log pi [B, K] of a policy's outputs z, the logits: pi(a|s) = exp(z_a) / sum_j exp(z_j)."""
    log_sum = np.logaddexp.reduce(logits, axis=1, keepdims=True)  # log sum_j exp(z_j), no overflow
    return logits - log_sum


def sample_actions(policy, states, rng):
    """An action for each state: action a owns pi(a|s) of the line from 0 to 1; a point picks."""
    logits, _ = forward(policy, states)
    ends = np.exp(log_softmax(logits)).cumsum(axis=1)  # [N, K], where the parts end
    points = rng.random((len(states), 1))
    return (points > ends[:, :-1]).sum(axis=1)  # how many ends lie before the point: its part


def kl(log_probs_old, log_probs_new):
    """How far pi_new is from pi_old: 0 if they are equal, else positive (and not symmetric). The
    Kullback-Leibler divergence sum_a pi_old log(pi_old / pi_new), mean over states, in nats."""
    per_state = (np.exp(log_probs_old) * (log_probs_old - log_probs_new)).sum(axis=1)  # [B]
    return float(per_state.mean())


def policy_gradient(policy, activations, log_probs, actions, coefficients):
    """Gradient by theta [P] of the mean over the batch of coefficient (held fixed) * log pi(a|s).
    With logits z, log pi(a|s) = z_a - log sum_j exp(z_j). Its derivative by z_k is
    (1 if k = a, else 0) - exp(z_k) / sum_j exp(z_j), which is onehot(a)_k - pi(k|s)."""
    onehot = np.zeros_like(log_probs)  # [B, K]
    onehot[np.arange(len(actions)), actions] = 1  # in row i the column actions[i]
    grad_log_prob = onehot - np.exp(log_probs)  # [B, K]
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
    reset_mode = env.metadata.get("autoreset_mode")  # not listed in Gymnasium 1.0
    if reset_mode is not None and reset_mode.name != "NEXT_STEP":
        raise ValueError("env must reset one step late (autoreset mode NEXT_STEP)")
    return env


class Experience:
    """Environments side by side, whose episodes go on from one batch to the next.
    They reset one step late. If the step in row t ends an episode, and s' is its last state:
        row t      state s     action taken      leads to s', terminated or truncated
        row t + 1  state s'    action ignored    leads to a new episode's first state: resetting
    Row t + 1 shows s', whose value `gae` needs for row t. Its action does nothing, so that nothing
    can be learned from it: `collect` drops the row."""

    def __init__(self, settings, rng):
        self.env = make_env(settings, settings.num_envs)
        self.states, _ = self.env.reset(seed=int(rng.integers(2**31)))  # [N, D]
        self.resetting = np.zeros(settings.num_envs, bool)
        self.running_returns = np.zeros(settings.num_envs)  # sums of rewards, not discounted
        self.finished_returns = []

    def play(self, policy, horizon, rng):
        """T = horizon steps. Returns six arrays: states [T, N, D], actions, rewards, terminated
        (the episode is over), truncated (a time limit cut it short), resetting [T, N]."""
        rows = []
        for _ in range(horizon):
            states = self.states
            actions = sample_actions(policy, states, rng)
            self.states, rewards, terminated, truncated, _ = self.env.step(actions)
            rows.append((states, actions, rewards, terminated, truncated, self.resetting))
            self.running_returns += np.where(self.resetting, 0, rewards)
            ended = terminated | truncated
            self.finished_returns.extend(self.running_returns[ended])
            self.running_returns[ended] = 0
            self.resetting = ended  # the next step only resets these
        return [np.array(column) for column in zip(*rows)]  # all states, all actions, ...


# --- 5. Values and advantages ---------------------------------------------------------------------
# V(s), a network, predicts the discounted return r_t + gamma r_{t+1} + gamma^2 r_{t+2} + ...
def gae(rewards, values, terminated, truncated, gamma, gae_lambda):
    """Generalized advantage estimation [T, N] (Schulman et al. 2016, section 3). values [T + 1, N].
    delta_t = r_t + gamma V(s_{t+1}) - V(s_t); if V is exact, its mean is A(s_t, a_t)
    A_t     = delta_t + gamma lambda delta_{t+1} + ... = delta_t + gamma lambda A_{t+1}
    V(s_{t+1}) counts as 0 after `terminated`; the sum ends after `terminated` and `truncated`.
    lambda = 1: every V in between cancels, A_t = r_t + gamma r_{t+1} + ... + gamma^n V(s_{t+n}) -
    V(s_t), with s_{t+n} at the end of the episode or batch: noisy, and wrong as far as that V is.
    lambda = 0: A_t = delta_t: less noisy, but wrong as far as V(s_{t+1}) is, at every step."""
    # values[t + 1] is V of the state that step t led to, of s' at an episode's end. A terminated
    # episode earns no more. A truncated one would have earned about V more.
    next_values = np.where(terminated, 0, values[1:])
    deltas = rewards + gamma * next_values - values[:-1]
    ended = terminated | truncated  # the next row resets: its A is no part of this one
    advantages = np.zeros_like(values)  # [T + 1, N]; the last row stays 0: there V is trusted
    for t in reversed(range(len(deltas))):
        following = np.where(ended[t], 0, advantages[t + 1])
        advantages[t] = deltas[t] + gamma * gae_lambda * following
    return advantages[:-1]


def collect(experience, policy, value, settings, rng):
    """Play, and return what an update needs by name, one row for each real step."""
    columns = experience.play(policy, settings.horizon, rng)
    states, actions, rewards, terminated, truncated, resetting = columns
    all_states = np.concatenate([states, experience.states[None]], dtype=np.float32)
    outputs, _ = forward(value, all_states)  # [T + 1, N, 1]
    values = outputs[..., 0]
    advantages = gae(rewards, values, terminated, truncated, settings.gamma, settings.gae_lambda)
    targets = advantages + values[:-1]  # for V: as A estimates return - V, they estimate the return
    real = ~resetting  # as an index it takes the steps that are True, in one row: [T, N] -> [B]
    logits, _ = forward(policy, all_states[:-1][real])
    # Usual, though no theory asks for it: minus the mean, which acts much like a baseline; divided
    # by the spread. (The scale of A alone hardly changes a step of Adam's, and not at all TRPO's.)
    normalized = (advantages - advantages[real].mean()) / (advantages[real].std() + 1e-8)
    return SimpleNamespace(
        states=all_states[:-1][real],  # [B, D]
        actions=actions[real],  # [B]
        log_probs_old=log_softmax(logits),  # [B, K], of all actions, from the policy that played
        advantages=normalized[real],  # [B], normalized
        values=values[:-1][real],  # [B], V before it is fitted, for `report`
        targets=targets[real],  # [B], from advantages before they were normalized
    )


def fit_value(value, batch, settings, remaining, rng):
    """Bring V closer to the targets, several times: uphill on the mean of -(target - V)^2 / 2."""
    for _ in range(settings.value_epochs):
        order = rng.permutation(len(batch.targets))
        for rows in np.array_split(order, settings.minibatches):
            outputs, activations = forward(value, batch.states[rows])  # [B, 1]
            errors = batch.targets[rows, None] - outputs  # [B, 1], the derivative by V
            gradient = backward(value, activations, errors / len(rows))
            adam(value, gradient, remaining * settings.value_learning_rate)


# --- 6. The update --------------------------------------------------------------------------------
def clipped_surrogate_gradient(ratio, advantages, clip):
    """Derivative [B] of min(ratio * A, clipped ratio * A) by the ratio (equation 7): 0 if A > 0 and
    ratio > 1 + clip (raised enough), or if A < 0 and ratio < 1 - clip (lowered enough). Else A, for
    a ratio beyond the clip on the other side, too: it is to come back."""
    unclipped = ratio * advantages
    clipped = np.clip(ratio, 1 - clip, 1 + clip) * advantages
    return np.where(clipped < unclipped, 0, advantages)  # 0: the clipped term is a constant


def minibatch_step(policy, batch, rows, settings, remaining):
    """One step of Adam with rows of the batch. Returns which ratios are outside the clip,
    on either side: those that moved against A still have a gradient."""
    actions = batch.actions[rows]
    logits, activations = forward(policy, batch.states[rows])
    log_probs = log_softmax(logits)
    log_probs_taken = log_probs[np.arange(len(rows)), actions]  # [B], of the actions taken
    ratio = np.exp(log_probs_taken - batch.log_probs_old[rows, actions])  # 1 in the first minibatch
    slope = clipped_surrogate_gradient(ratio, batch.advantages[rows], settings.clip)
    # The ratio is exp(log pi - log pi_old): its derivative is ratio * derivative of log pi.
    gradient = policy_gradient(policy, activations, log_probs, actions, slope * ratio)
    adam(policy, gradient, remaining * settings.learning_rate)
    return np.abs(ratio - 1) > settings.clip


def update_policy(policy, batch, settings, remaining, rng):
    """Epochs of minibatch steps. After each epoch the KL shows how far the policy has moved."""
    kls = []
    outside = []
    for _ in range(settings.epochs):
        order = rng.permutation(len(batch.actions))
        for rows in np.array_split(order, settings.minibatches):
            outside.append(minibatch_step(policy, batch, rows, settings, remaining))
        logits, _ = forward(policy, batch.states)
        kls.append(kl(batch.log_probs_old, log_softmax(logits)))
        if kls[-1] > settings.target_kl:
            break
    clip_fraction = float(np.concatenate(outside).mean())
    return {"kl_first_epoch": kls[0], "clip_fraction": clip_fraction, "epochs": len(kls)}


# --- 7. Training ----------------------------------------------------------------------------------
def initial_policy(settings):
    """A policy for settings.env, nearly undecided in every state, as its last weights are small."""
    env = make_env(settings, 1)
    D = env.single_observation_space.shape[0]
    K = int(env.single_action_space.n)
    return Network((D, settings.hidden, K), 0.01, np.random.default_rng([settings.seed, 0]))


def train(settings, policy):
    """Generator: each `next` updates the policy in place. FloatingPointError if it isn't finite."""
    start = time.perf_counter()
    rng = np.random.default_rng([settings.seed, 1])  # stream 0 made the policy, 2 evaluates
    value = Network((*policy.sizes[:2], 1), 1.0, rng)  # sizes (D, H, 1)
    experience = Experience(settings, rng)
    steps = 0
    update = 0
    while steps < settings.steps:
        remaining = 1 - steps / settings.steps  # factor of Adam's learning rates: from 1 towards 0
        batch = collect(experience, policy, value, settings, rng)
        theta_old = policy.theta.copy()
        own_figures = update_policy(policy, batch, settings, remaining, rng)
        fit_value(value, batch, settings, remaining, rng)
        update += 1
        steps += len(batch.actions)
        row = {"update": update, "steps": steps} | report(policy, theta_old, batch, experience)
        row["seconds"] = time.perf_counter() - start
        if not np.isfinite([policy.theta.sum(), value.theta.sum(), row["kl"]]).all():
            raise FloatingPointError(f"update {update} is no longer finite: smaller steps may help")
        yield row | own_figures


def report(policy, theta_old, batch, experience):
    """What to print: kl and step_norm of the update; entropy, explained_variance from before it;
    episode_return, the mean of the last 100 finished episodes (nan if there are none)."""
    logits, _ = forward(policy, batch.states)
    variance = float(batch.targets.var())
    unexplained = float((batch.targets - batch.values).var())  # V off by a constant is not seen
    return {
        "episodes": len(experience.finished_returns),
        "episode_return": float(np.mean(experience.finished_returns[-100:] or [np.nan])),
        "kl": kl(batch.log_probs_old, log_softmax(logits)),  # from the old policy to the new one
        "entropy": -float((np.exp(batch.log_probs_old) * batch.log_probs_old).sum(axis=1).mean()),
        "step_norm": float(np.linalg.norm(policy.theta - theta_old)),
        "explained_variance": 1 - unexplained / variance if variance > 0 else 0.0,
    }


# --- 8. Evaluation and command line ---------------------------------------------------------------
def evaluate(policy, env, rng, max_steps=1000):
    """Return [N] of one episode in each environment (to max_steps) with the likeliest actions."""
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
    np.seterr(all="ignore")  # `train` checks that its results are finite
    policy = initial_policy(settings)
    env = make_env(settings, 100)
    threshold = env.spec.reward_threshold or np.inf  # of the mean return; some have none
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
    except FloatingPointError as error:
        raise SystemExit(str(error))
    except KeyboardInterrupt:
        raise SystemExit(130)  # 128 + 2, the number of the signal
