"""Vanilla policy gradient (VPG): try actions, then make those that went well more likely.

A policy pi(a|s), a neural network with weights theta, gives each action a probability in a state s.
The return from s on is r_0 + gamma r_1 + gamma^2 r_2 + ..., a sum of rewards. V(s) is its mean, if
pi plays. We want the theta with the largest mean return.

REINFORCE with a baseline (Sutton & Barto 2018, section 13.4) adds up, over the steps of an episode,
    gamma^t * (return from s on - V(s)) * gradient of log pi(a|s)        (t: number of the step)
On average, this is the gradient of the mean return. Subtracting V(s) usually makes it less noisy,
and leaves its average as it is: gradient of log pi is (gradient of pi) / pi, so
    sum_a pi * V(s) * gradient of log pi = V(s) * gradient of sum_a pi = V(s) * gradient of 1 = 0.
VPG leaves gamma^t out, as is usual: late steps would hardly count. (So it does not quite follow the
gradient.) It replaces return - V(s) by Â (see `gae`). Both estimate the advantage A(s, a): how
much more the mean return is if a comes first and then pi plays on. A second network, `value`,
estimates V, for two uses. (1) It is subtracted: errors do no harm on average, as the 0 above holds
for any function of s. (2) It stands for rewards: for all that come after the batch, and more
(`gae`). That is less noisy, but its errors are then errors of Â, even on average.

    repeat:  play a batch of steps with the policy                    (section 4)
             estimate Â; targets: Â + value(s); normalize Â           (section 5)
             g = mean of Â * gradient of log pi; change theta by Adam (section 6)
             fit `value` to its targets, estimates of the return      (section 5)
g needs actions drawn from the present policy. So after one change of theta, play a new batch.
Run:  python vpg.py    Options:  python vpg.py --help
"""

import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, BooleanOptionalAction
from dataclasses import dataclass, field, fields
from types import SimpleNamespace

import gymnasium as gym
import numpy as np


# --- 1. Settings ----------------------------------------------------------------------------------
def option(default, text, low=0, high=float("inf")):
    """A setting, with the text that --help shows; a number must be from low to high."""
    return field(default=default, metadata={"text": text, "range": (low, high)})


@dataclass
class Settings:
    env: str = option("CartPole-v1", "Gymnasium environment")
    seed: int = option(0, "seed of all random numbers")
    steps: int = option(150_000, "steps to train for, in all; the last batch is completed", low=1)
    num_envs: int = option(16, "environments that run side by side", low=1)
    horizon: int = option(48, "steps of each environment in a batch, resets included", low=2)
    gamma: float = option(0.99, "discount factor", high=1)
    gae_lambda: float = option(0.99, "GAE: 0 is one reward, then `value`; 1 all rewards", high=1)
    hidden: int = option(64, "units in the hidden layer", low=1)
    value_learning_rate: float = option(2e-2, "learning rate of `value`; falls to 0", high=1000)
    value_epochs: int = option(4, "passes over each batch to fit `value`")
    minibatches: int = option(4, "parts into which each pass splits the batch", low=1)
    watch: bool = option(False, "in the end, show the policy in a window")
    learning_rate: float = option(2.4e-2, "learning rate of the policy; falls to 0", high=1000)

    def __post_init__(self):  # runs when the fields have been set
        for setting in fields(self):
            given = getattr(self, setting.name)
            low, high = setting.metadata["range"]
            if setting.type is not str and not low <= given <= high:
                raise ValueError(f"{setting.name} must be from {low} to {high}, not {given}")


# --- 2. Network -----------------------------------------------------------------------------------
# Shapes: T steps in a row, N environments side by side, B rows of a batch or minibatch, D numbers
# in a state, H hidden units, K outputs (of a policy: one per action), P parameters.
class Network:
    def __init__(self, sizes, last_gain, rng):
        """A tanh layer, then a linear one. Outputs: value(s), or a policy's logits (section 3)."""
        D, H, K = sizes
        self.sizes = sizes
        # A sum of D random numbers of size 1 has about the size sqrt(D). Dividing keeps it at 1.
        W1 = rng.standard_normal((D, H)) / np.sqrt(D)
        W2 = rng.standard_normal((H, K)) / np.sqrt(H) * last_gain
        parts = [W1.ravel(), np.zeros(H), W2.ravel(), np.zeros(K)]  # in the order of `unflatten`
        self.theta = np.concatenate(parts).astype(np.float32)  # [P]: an update is theta + step
        self.adam_m = np.zeros_like(self.theta)  # what `adam` remembers from step to step
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
    """dy/dtheta [P] of a number y, by the chain rule, from grad_outputs = dy/doutputs [B, K]."""
    _, _, W2, _ = unflatten(network.theta, network.sizes)
    inputs, hidden = activations
    # Differentiate outputs[i, k] = sum_h hidden[i, h] * W2[h, k] + b2[k]:
    grad_b2 = grad_outputs.sum(axis=0)  # [K], entries sum_i grad_outputs[i, k]
    grad_W2 = hidden.T @ grad_outputs  # [H, K], sum_i hidden[i, h] * grad_outputs[i, k]
    grad_hidden = grad_outputs @ W2.T  # [B, H], sum_k grad_outputs[i, k] * W2[h, k]
    # The same for the first layer, after the way back through tanh, with tanh' = 1 - tanh^2:
    grad_before_tanh = grad_hidden * (1 - hidden**2)  # [B, H]
    grad_b1 = grad_before_tanh.sum(axis=0)  # [H]
    grad_W1 = inputs.T @ grad_before_tanh  # [D, H]
    return np.concatenate([grad_W1.ravel(), grad_b1, grad_W2.ravel(), grad_b2])


def adam(network, gradient, learning_rate):
    """One step uphill, by learning_rate * m / sqrt(v) (Kingma & Ba 2015, algorithm 1). m is a mean
    of each parameter's recent gradients, v of their squares. So the gradients' scale cancels."""
    network.adam_steps += 1
    network.adam_m = 0.9 * network.adam_m + 0.1 * gradient
    network.adam_v = 0.999 * network.adam_v + 0.001 * gradient**2
    # Both means began at 0. The weights in adam_m add up to 1 - 0.9^steps: divide by this.
    m = network.adam_m / (1 - 0.9**network.adam_steps)
    v = network.adam_v / (1 - 0.999**network.adam_steps)
    network.theta = network.theta + learning_rate * m / (np.sqrt(v) + 1e-8)  # 1e-8: never 0 / 0


# --- 3. Policy ------------------------------------------------------------------------------------
def log_softmax(logits):
    """log pi(a|s) [B, K] of logits z, any numbers: pi(a|s) = exp(z_a) / sum_j exp(z_j)."""
    return logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)  # log sum_j exp, no overflow


def sample_actions(policy, states, rng):
    """Draw an action for each state. Probabilities 0.2, 0.5, 0.3, laid end to end, end at 0.2, 0.7
    and 1. A random point between 0 and 1, say 0.6, has one end before it: that gives action 1."""
    logits, _ = forward(policy, states)
    ends = np.exp(log_softmax(logits)).cumsum(axis=1)  # [N, K]
    points = rng.random((len(states), 1))
    # The last end is left out: rounded below 1, it could give action K, which does not exist.
    return (points >= ends[:, :-1]).sum(axis=1)


def kl(log_probs_old, log_probs_new):
    """Kullback-Leibler divergence, in nats: how differently pi_old and pi_new act. In a state it is
    sum_a pi_old log(pi_old / pi_new), 0 if they are equal, else positive. Mean over the states."""
    return float((np.exp(log_probs_old) * (log_probs_old - log_probs_new)).sum(axis=1).mean())


def policy_gradient(policy, activations, log_probs, actions, coefficients):
    """The mean over the batch of coefficient * gradient of log pi(a|s), by theta [P], from the
    coefficients [B]. With logits z, log pi(a|s) = z_a - log sum_j exp(z_j), so
        d log pi(a|s) / dz_k = (1 if k = a, else 0) - pi(k|s)."""
    taken = np.arange(log_probs.shape[1]) == actions[:, None]  # [B, K], True (1) where k = a
    derivatives = taken - np.exp(log_probs)  # [B, K]
    grad_logits = coefficients[:, None] * derivatives / len(actions)  # [B, K], / B for the mean
    return backward(policy, activations, grad_logits)


# --- 4. Experience --------------------------------------------------------------------------------
def make_env(settings, num_envs, **options):
    """Copies of settings.env, stepped together. ValueError if this file cannot learn in it."""
    env = gym.make_vec(settings.env, num_envs, **options)
    state_space = env.single_observation_space
    if not isinstance(state_space, gym.spaces.Box) or len(state_space.shape) != 1:
        raise ValueError(f"env must have vectors (1-D Box) as observations, not {state_space}")
    action_space = env.single_action_space
    if not isinstance(action_space, gym.spaces.Discrete) or action_space.start != 0:
        raise ValueError(f"env must have Discrete actions from 0 on, not {action_space}")
    autoreset = env.metadata.get("autoreset_mode")  # None (Gymnasium 1.0) means NEXT_STEP
    if autoreset is not None and autoreset.name != "NEXT_STEP":  # `play` says what it is
        raise ValueError("env must reset one step late (autoreset mode NEXT_STEP)")
    return env


class Experience:
    def __init__(self, settings, rng):
        """Environments side by side. Episodes go on from batch to batch; a wrapper counts them."""
        env = make_env(settings, settings.num_envs)
        self.env = gym.wrappers.vector.RecordEpisodeStatistics(env, buffer_length=100)
        self.states, _ = self.env.reset(seed=int(rng.integers(2**31)))  # [N, D]
        self.resetting = np.zeros(settings.num_envs, bool)  # [N], True where the next step resets

    def play(self, policy, horizon, rng):
        """T = horizon steps, a row each. Returns states [T, N, D]; actions, rewards, terminated,
        truncated, resetting [T, N]; and where the last step has led: last_states [N, D].
        If row 7 of an environment ends an episode, it takes row 8 to begin a new one (NEXT_STEP):
            row 7:  s7, action taken, to s8; terminated (by the task) or truncated (by time limit)
            row 8:  s8, action ignored, to the first state of the new episode; resetting
        Row 8 is no real step: `collect` drops it. But if row 7 was truncated, `gae` needs s8."""
        rows = []
        for _ in range(horizon):
            actions = sample_actions(policy, self.states, rng)
            next_states, rewards, terminated, truncated, _ = self.env.step(actions)
            rows.append((self.states, actions, rewards, terminated, truncated, self.resetting))
            self.states = next_states
            self.resetting = terminated | truncated
        columns = [np.array(column) for column in zip(*rows)]  # all states, all actions, ...
        return [*columns, self.states]


# --- 5. Values and advantages ---------------------------------------------------------------------
def gae(rewards, values, terminated, truncated, gamma, gae_lambda):
    """Generalized advantage estimation (Schulman et al. 2016): Â [T, N], from values [T + 1, N]
    (their last row: where the last step led). A(s_t, a_t) is the mean of r_t + gamma V(s_{t+1}),
    minus V(s_t). So the temporal-difference (TD) error estimates it, with one reward:
        error_t = r_t + gamma value(s_{t+1}) - value(s_t)
    With two rewards, the estimate is a sum of two errors, in which gamma value(s_{t+1}) cancels:
        r_t + gamma r_{t+1} + gamma^2 value(s_{t+2}) - value(s_t) = error_t + gamma error_{t+1}
    More rewards rely less on `value`, but are noisier. GAE is a weighted mean of all estimates:
        1 reward:   error_t                                            weight  1 - lambda
        2 rewards:  error_t + gamma error_{t+1}                        weight (1 - lambda) lambda
        3 rewards:  error_t + gamma error_{t+1} + gamma^2 error_{t+2}  weight (1 - lambda) lambda^2
    and so on. The longest, to the end of episode or batch, gets what is left: all add up to 1.
    error_{t+1} is in all but the first: together these weigh 1 - (1 - lambda) = lambda. error_{t+2}
    is not in the second, either: lambda - (1 - lambda) lambda = lambda^2 is left. So
        Â_t = error_t + gamma lambda error_{t+1} + (gamma lambda)^2 error_{t+2} + ...
            = error_t + gamma lambda Â_{t+1}."""
    # Terminated: nothing more is earned. Truncated: `value` says what would have been earned.
    next_values = np.where(terminated, 0, values[1:])  # [T, N]
    td_errors = rewards + gamma * next_values - values[:-1]
    ended = terminated | truncated
    advantages = np.zeros_like(values)  # [T + 1, N]; the last row stays 0: no more errors
    for t in reversed(range(len(rewards))):
        following = np.where(ended[t], 0, advantages[t + 1])  # after an end, row t + 1 is a reset
        advantages[t] = td_errors[t] + gamma * gae_lambda * following
    return advantages[:-1]


def collect(experience, policy, value, settings, rng):
    """Play, and return the batch: arrays with one row for each real step, [B] or [B, ...]."""
    played = experience.play(policy, settings.horizon, rng)
    states, actions, rewards, terminated, truncated, resetting, last_states = played
    all_states = np.concatenate([states, [last_states]], dtype=np.float32)  # [T + 1, N, D]
    outputs, _ = forward(value, all_states)  # [T + 1, N, 1]
    values = outputs[..., 0]
    advantages = gae(rewards, values, terminated, truncated, settings.gamma, settings.gae_lambda)
    targets = advantages + values[:-1]  # Â + value(s) estimates the return from s on
    real = ~resetting  # [T, N]; as an index it takes the entries that are True: [T, N] to [B]
    batch = SimpleNamespace()
    batch.states = all_states[:-1][real]  # [B, D]
    batch.actions = actions[real]
    batch.values = values[:-1][real]  # only for `report`
    batch.targets = targets[real]
    # Normalize Â, as is customary. Mean 0: nearly one more baseline, but signs may flip. Spread 1:
    # batches weigh alike in the means of `adam`. (A step of trpo.py is the same without spread 1.)
    advantages = advantages[real]
    batch.advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    logits, _ = forward(policy, batch.states)
    batch.log_probs_old = log_softmax(logits)  # [B, K], log pi of the policy that has played
    return batch


def fit_value(value, batch, settings, rate_factor, rng):
    """Least squares: uphill on -(target - output)^2 / 2, several times (the targets stay fixed)."""
    for _ in range(settings.value_epochs):
        order = rng.permutation(len(batch.targets))
        for chosen in np.array_split(order, settings.minibatches):
            outputs, activations = forward(value, batch.states[chosen])
            errors = batch.targets[chosen, None] - outputs  # [B, 1], the derivative by the outputs
            gradient = backward(value, activations, errors / len(chosen))
            adam(value, gradient, rate_factor * settings.value_learning_rate)


# --- 6. The update --------------------------------------------------------------------------------
def update_policy(policy, batch, settings, rate_factor, rng):
    """A step of Adam with g = mean of Â * gradient of log pi. (Only ppo.py needs rng.)"""
    logits, activations = forward(policy, batch.states)
    log_probs = log_softmax(logits)
    g = policy_gradient(policy, activations, log_probs, batch.actions, batch.advantages)
    adam(policy, g, rate_factor * settings.learning_rate)
    return {}  # no figures of its own


# --- 7. Training ----------------------------------------------------------------------------------
def initial_policy(settings):
    """A policy for settings.env, nearly undecided in every state, as its last weights are small."""
    env = make_env(settings, 1)
    sizes = (env.single_observation_space.shape[0], settings.hidden, env.single_action_space.n)
    return Network(sizes, 0.01, np.random.default_rng([settings.seed, 0]))  # [seed, 0]: one stream


def train(settings, policy):
    """Train `policy`, in place. A generator: it does one update for each turn of a loop over it."""
    start = time.perf_counter()
    rng = np.random.default_rng([settings.seed, 1])  # another stream; `main` has 2 and 3
    value = Network((*policy.sizes[:2], 1), 1.0, rng)  # as wide as the policy, one output
    experience = Experience(settings, rng)
    steps = 0
    update = 0
    while steps < settings.steps:
        rate_factor = 1 - steps / settings.steps  # factor of learning rates, from 1 towards 0
        batch = collect(experience, policy, value, settings, rng)
        theta_old = policy.theta.copy()  # for `report`
        update_figures = update_policy(policy, batch, settings, rate_factor, rng)
        fit_value(value, batch, settings, rate_factor, rng)
        update += 1
        steps += len(batch.actions)
        figures = {"update": update, "steps": steps} | report(policy, theta_old, batch, experience)
        if not np.isfinite([policy.theta.sum(), value.theta.sum(), figures["kl"]]).all():
            raise FloatingPointError(f"update {update} is no longer finite: rates too high?")
        yield figures | {"seconds": time.perf_counter() - start} | update_figures


def report(policy, theta_old, batch, experience):
    """Numbers that describe an update. episode_return adds up rewards without gamma, as usual."""
    logits, _ = forward(policy, batch.states)
    returns = experience.env.return_queue  # of the last 100 episodes
    entropies = -(np.exp(batch.log_probs_old) * batch.log_probs_old).sum(axis=1)  # [B], in nats
    variance = float(batch.targets.var())
    unexplained = float((batch.targets - batch.values).var())  # 0: right up to a constant
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
    """Sums of rewards [N] in the first episodes, by the likeliest actions, in at most max_steps."""
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
        parser.add_argument(name, default=setting.default, help=setting.metadata["text"], **kind)
    try:
        settings = Settings(**vars(parser.parse_args(argv)))
        make_env(settings, 1).close()  # can it be made?
        return settings
    except (ValueError, gym.error.Error, ModuleNotFoundError) as error:
        parser.error(str(error))


def main():
    settings = parse()
    policy = initial_policy(settings)
    env = make_env(settings, 100)
    threshold = np.inf if env.spec.reward_threshold is None else env.spec.reward_threshold
    solved_after = "never"
    print("   steps  episode_return        kl  step_norm  entropy  seconds")
    line = "{steps:8}{episode_return:16.1f}{kl:10.2g}{step_norm:11.2g}{entropy:9.3f}{seconds:9.1f}"
    for row in train(settings, policy):
        if row["update"] % 5 == 1:
            print(line.format(**row), flush=True)
        solved = row["episodes"] >= 100 and row["episode_return"] >= threshold
        if solved and solved_after == "never":
            solved_after = f"after {row['steps']} steps"
    if threshold < np.inf:
        print(f"mean of 100 training episodes at {threshold:g}: {solved_after}")
    returns = evaluate(policy, env, np.random.default_rng([settings.seed, 2]))
    print(f"greedy policy, 100 fresh episodes: {returns.mean():.1f} ± {returns.std():.1f}")
    if settings.watch:
        window = make_env(settings, 1, vectorization_mode="sync", render_mode="human")
        evaluate(policy, window, np.random.default_rng([settings.seed, 3]))


if __name__ == "__main__":
    try:
        with np.errstate(all="ignore"):  # no warnings: `train` stops if theta or KL is not finite
            main()
    except FloatingPointError as error:
        raise SystemExit(str(error))  # a line and exit status 1
    except KeyboardInterrupt:
        raise SystemExit(130)  # the usual status after Ctrl-C
