"""Trust region policy optimization (TRPO): improve the policy, but change its probabilities little.

pi_old, with weights theta_old, played the batch. V(s) is its expected return from state s on, the
return being r_0 + gamma r_1 + gamma^2 r_2 + ... A(s, a), the advantage, is how much more than V(s)
it is if a comes first, and then pi_old plays on. What does another policy pi gain? Let pi choose
the first action, and pi_old all others: that gains A(s_0, a_0), on average. Let pi choose the
second, too, in the s_1 it has reached: gamma A(s_1, a_1) more. And so on: over episodes of pi,

    expected return of pi  =  expected return of pi_old  +  mean of sum_t gamma^t A(s_t, a_t)

(equation 1 of the paper). But the batch is pi_old's. Its actions can be reweighted: in each state,
sum_a pi A = sum_a pi_old (pi / pi_old) A. To reweight its states, one would need the product of the
ratios of all earlier actions: much too noisy. So pi_old's states are kept, and that is nearly right
only while pi acts like pi_old. With an estimate Â of A (no gamma^t, or late steps hardly count):

    maximize    L(theta)  =  mean over the batch of  Â * pi(a|s; theta) / pi(a|s; theta_old)
    subject to  mean over its states of KL(pi_old || pi)  <=  delta

L is the surrogate of the gain, pi / pi_old the ratio, KL = sum_a pi_old log(pi_old / pi), and the
set with KL <= delta the trust region. (Equal changes of theta can alter pi a lot or hardly at all.)

    repeat:  play a batch of steps with the policy                         (section 4)
             estimate Â; targets of `value`: Â + value(s); normalize Â     (section 5)
             change theta, in the best direction as far as KL <= delta     (section 6)
             fit the network `value`, an estimate of V                     (section 5)
Run:  python trpo.py    Options:  python trpo.py --help    Schulman et al. 2015, arXiv:1502.05477
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
    delta: float = option(0.01, "trust region: largest mean KL of an update, in nats", 1e-12, 1e6)
    damping: float = option(0.03, "multiple of the identity added to the Fisher matrix", 0, 1000)
    cg_iterations: int = option(5, "conjugate gradient iterations", 1)
    line_search: bool = option(True, "shorten a step until KL <= delta and L has grown")
    max_backtracks: int = option(10, "how often a step is shortened before it is given up", 0)
    backtrack_factor: float = option(0.8, "each shortening multiplies the step by this", 0, 1)

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
# 1. The gradient of a ratio is ratio * gradient of log pi; at theta_old every ratio is 1. So there
#    the gradient g of L is REINFORCE's, with Â. For a small step, L grows by about g . step.
# 2. At theta_old the mean KL is 0, its least value, so its gradient is 0, too. With F [P, P], its
#    second derivatives, the KL grows by about step . F step / 2 (Taylor).
# 3. Take these two for exact. Their gradients are g and F step. The best step has KL = delta, and
#    there the two are parallel (Lagrange): else, sliding along KL = delta would raise g . step.
# 4. So step = c x, where F x = g. Its KL, c^2 x . F x / 2, is delta for c^2 = 2 delta / (x . F x).
# x, the natural gradient, is found from products F v alone. (With a million weights, F is too big.)
def jacobian_vector_product(policy, activations, vector):
    """J v [B, K], J = dz/dtheta: how fast the logits z change as theta moves along v [P], that
    is, as W1 moves along d_W1, and so on. Each line of `forward` is differentiated."""
    _, _, W2, _ = unflatten(policy.theta, policy.sizes)
    d_W1, d_b1, d_W2, d_b2 = unflatten(vector, policy.sizes)
    inputs, hidden = activations
    d_before_tanh = inputs @ d_W1 + d_b1  # [B, H]
    d_hidden = (1 - hidden**2) * d_before_tanh  # [B, H], as tanh' = 1 - tanh^2
    return d_hidden @ W2 + hidden @ d_W2 + d_b2  # [B, K], by the product rule


def fisher_vector_product(policy, activations, probs, vector):
    """F v [P]. F, the Fisher matrix, holds the mean KL's second derivatives by theta, at theta_old.
    For one state, with logits z, p = pi(.|s; theta) and J = dz/dtheta [K, P]:
        KL = const - sum_k p_old_k log p_k = const - sum_k p_old_k z_k + log sum_j exp(z_j)
        dKL/dz = p - p_old,    and by the chain rule dKL/dtheta = J^T (p - p_old)
        dp_k/dz_j = p_k (1 if j = k, else 0) - p_k p_j,    the matrix diag(p) - p p^T
    The derivative of J^T (p - p_old) has two terms: one with the factor p - p_old, 0 at theta_old,
    and J^T dp/dtheta = J^T dp/dz J.  So  F = J^T (diag(p) - p p^T) J."""
    d_logits = jacobian_vector_product(policy, activations, vector)  # J v
    mean = (probs * d_logits).sum(axis=1, keepdims=True)  # p^T J v
    d_probs = probs * (d_logits - mean)  # (diag(p) - p p^T) J v
    return backward(policy, activations, d_probs / len(probs))  # times J^T, as the chain rule does


def conjugate_gradient(product, b, iterations):
    """Solve M x = b from product(v) = M v; M is symmetric, and v . M v > 0. Stop after `iterations`
    rounds, or when the residual r = b - M x is at most 1e-5 times as long as b (also if b = 0).
    f(x) = b . x - x . M x / 2 has the gradient r, so it is largest where M x = b. Climb from x = 0:
    alpha   Along a direction d, f grows by alpha r . d - alpha^2 d . M d / 2. The top of this is at
            alpha = r . d / (d . M d). The residual there, r' = r - alpha M d, has r' . d = 0.
    beta    r' . d = 0: no more is to be gained along d. A climb along e = r' + beta d next will
            leave it so if d . M e = d . M r' + beta d . M d = 0, as it takes some M e from r'.
    (So for earlier d: Nocedal & Wright 2006, theorems 5.2 and 5.3. Unrounded, P rounds suffice.)"""
    x = np.zeros_like(b)
    residual = b
    direction = b
    for _ in range(iterations):
        if residual @ residual <= 1e-10 * (b @ b):  # squares of the lengths
            break
        M_direction = product(direction)
        curvature = direction @ M_direction
        alpha = (residual @ direction) / curvature
        x = x + alpha * direction
        residual = residual - alpha * M_direction
        beta = -(residual @ M_direction) / curvature
        direction = residual + beta * direction
    return x


def line_search(policy, full_step, batch, settings):
    """Move theta. full_step is approximate, so measure KL and L. Take the first of full_step *
    backtrack_factor^n, n = 0 to max_backtracks, with KL <= delta and a larger L (or, without
    settings.line_search, the first); if none will do, keep theta. Return L's growth, last n."""
    theta_old = policy.theta
    for backtracks in range(settings.max_backtracks + 1):
        policy.theta = theta_old + settings.backtrack_factor**backtracks * full_step
        logits, _ = forward(policy, batch.states)
        log_probs = log_softmax(logits)
        log_ratios = log_probs - batch.log_probs_old  # [B, K]
        ratio = np.exp(log_ratios[np.arange(len(log_ratios)), batch.actions])  # [B], actions taken
        gain = float((batch.advantages * (ratio - 1)).mean())  # L - L(theta_old)
        accepted = gain > 0 and kl(batch.log_probs_old, log_probs) <= settings.delta
        if accepted or not settings.line_search:
            return {"surrogate_gain": gain, "backtracks": backtracks}
    policy.theta = theta_old
    return {"surrogate_gain": 0.0, "backtracks": settings.max_backtracks}


def update_policy(policy, batch, settings, decay, rng):  # decay and rng are not needed here
    """The step c x, then the line search. Where F v is almost 0, x is huge along v, far outside the
    region near theta_old where the model holds. So F + damping I replaces F. This turns x towards
    g. And c makes KL + damping |step|^2 / 2 equal to delta, so that less is left for the KL."""
    _, activations = forward(policy, batch.states)
    g = policy_gradient(policy, activations, batch.log_probs_old, batch.actions, batch.advantages)
    probs = np.exp(batch.log_probs_old)

    def damped_product(v):
        return fisher_vector_product(policy, activations, probs, v) + settings.damping * v

    x = conjugate_gradient(damped_product, g, settings.cg_iterations)
    curvature = x @ damped_product(x)
    if curvature <= 0:  # no gradient, no change
        return {"surrogate_gain": 0.0, "backtracks": 0}
    full_step = np.sqrt(2 * settings.delta / curvature) * x
    return line_search(policy, full_step, batch, settings)


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
