"""Right and wrong answers to the seven rewriting exercises, graded as the README says.

Every line of RIGHT and WRONG changes one of the SOLUTIONS (old => new && old => new), which replaces
the body in a copy of its script. WRONG also tells after !! what the grader has to say about it.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

SOLUTIONS = {
    ("ppo", "policy_gradient"): """
    B, K = log_probs.shape
    onehot = (np.arange(K) == actions[:, None]).astype(float)
    score = onehot - np.exp(log_probs)
    return backward(policy, activations, coefficients[:, None] * score / B)
""",
    ("vpg", "gae"): """
    advantages = np.zeros(rewards.shape)
    later = np.zeros(rewards.shape[1])
    for t in range(len(rewards) - 1, -1, -1):
        next_value = np.where(terminated[t], 0, values[t + 1])
        delta = rewards[t] + gamma * next_value - values[t]
        later = delta + gamma * gae_lambda * later * ~(terminated[t] | truncated[t])
        advantages[t] = later
    return advantages
""",
    ("ppo", "clipped_surrogate_gradient"): """
    high = 1 + clip
    low = 1 - clip
    stop = np.where(advantages >= 0, ratio > high, ratio < low)
    return advantages * ~stop
""",
    ("trpo", "jacobian_vector_product"): """
    W1, b1, W2, b2 = unflatten(policy.theta, policy.sizes)
    V1, c1, V2, c2 = unflatten(vector, policy.sizes)
    inputs, hidden = activations
    d_hidden = (inputs @ V1 + c1) * (1 - hidden * hidden)
    return hidden @ V2 + c2 + d_hidden @ W2
""",
    ("trpo", "fisher_vector_product"): """
    u = jacobian_vector_product(policy, activations, vector)
    u = probs * (u - (probs * u).sum(axis=1)[:, None])
    return backward(policy, activations, u) / len(probs)
""",
    ("trpo", "conjugate_gradient"): """
    x = np.zeros_like(b)
    r = b - product(x)
    d = r.copy()
    for _ in range(iterations):
        rr = r @ r
        if rr <= 1e-10 * (b @ b):
            break
        image = product(d)
        alpha = rr / (d @ image)
        x = x + alpha * d
        r = r - alpha * image
        d = r + r @ r / rr * d
    return x
""",
    ("trpo", "line_search"): """
    theta_old = policy.theta
    rows = np.arange(len(batch.actions))
    backtracks = settings.max_backtracks if settings.line_search else 0
    for k in range(backtracks + 1):
        policy.theta = theta_old + full_step
        logits, _ = forward(policy, batch.states)
        log_probs = log_softmax(logits)
        ratio = np.exp(log_probs - batch.log_probs_old)[rows, batch.actions]
        gain = np.mean(batch.advantages * ratio) - np.mean(batch.advantages)
        near = kl(batch.log_probs_old, log_probs) <= settings.delta
        if near and gain > 0 or not settings.line_search:
            return {"surrogate_gain": gain, "backtracks": k}
        full_step = full_step * settings.backtrack_factor
    policy.theta = theta_old
    return {"surrogate_gain": 0.0, "backtracks": settings.max_backtracks}
""",
}

RIGHT = r"""
policy_gradient: (np.arange(K) == actions[:, None]).astype(float) => np.eye(K)[actions]
policy_gradient: .astype(float) => .astype(np.float32)
gae: np.zeros(rewards.shape) => np.zeros(rewards.shape, np.float32)
gae: later * ~(terminated[t] | truncated[t]) => np.where(terminated[t] | truncated[t], 0, later)
gae: np.where(terminated[t], 0, values[t + 1]) => values[t + 1] * (1 - terminated[t])
clipped_surrogate_gradient: advantages >= 0 => advantages > 0
clipped_surrogate_gradient: advantages * ~stop => np.where(stop, 0.0, advantages)
jacobian_vector_product: hidden * hidden => np.tanh(inputs @ W1 + b1) ** 2
fisher_vector_product: , u) / len(probs) => , u / len(probs))
conjugate_gradient: b - product(x) => b
conjugate_gradient: r - alpha * image => b - product(x)
conjugate_gradient: rr <= 1e-10 * (b @ b) => np.linalg.norm(r) <= 1e-5 * np.linalg.norm(b)
line_search: full_step = full_step * settings => full_step *= settings
line_search: theta_old = policy.theta\n    rows => theta_old = policy.theta.copy()\n    rows \
&& policy.theta = theta_old => policy.theta[:] = theta_old
line_search: "surrogate_gain": 0.0 => "surrogate_gain": np.mean(batch.advantages * (ratio / ratio - 1))
"""

WRONG = r"""
policy_gradient:  / B => !! 12 times the expected, everywhere: the batch has 12 samples
policy_gradient: onehot - np.exp(log_probs) => np.exp(log_probs) - onehot !! sign reversed
policy_gradient: onehot - np.exp(log_probs) => onehot !! wrong, at
policy_gradient: return backward => backward !! None
gae: np.where(terminated[t], 0, values[t + 1]) => values[t + 1] !! where an episode was terminated
gae: where(terminated[t], => where(terminated[t] | truncated[t], !! where an episode was truncated
gae: ~(terminated[t] | truncated[t]) => ~terminated[t] !! where an episode was truncated
gae: delta + gamma * => delta + 0.98 * !! gamma 0.9
gae: + gamma * next_value => + 0.98 * next_value !! gamma 0.9
gae: len(rewards) - 1, -1, -1 => len(rewards) - 1, 0, -1 !! t=0, n=
gae: len(rewards) - 1, -1, -1 => len(rewards) - 2, -1, -1 !! t=9, n=
gae: advantages = np.zeros(rewards.shape) => advantages = values[:-1] !! read-only
gae: np.zeros(rewards.shape) => np.zeros(values.shape) !! the shape is (11, 4)
clipped_surrogate_gradient: np.where(advantages >= 0, ratio > high, ratio < low) => (ratio > high) | (ratio < low) !! ratio 0.1, A = 5.0: expected 5, got 0
clipped_surrogate_gradient: ratio > high, ratio < low => ratio < low, ratio > high !! ratio
clipped_surrogate_gradient: advantages * ~stop => ratio * advantages * ~stop !! ratio
jacobian_vector_product: * (1 - hidden * hidden) => !! in W1
jacobian_vector_product: hidden @ V2 + c2 + => c2 + !! in W2
jacobian_vector_product: + c1 => !! in b1
jacobian_vector_product: return hidden => vector *= 2; return hidden !! read-only
jacobian_vector_product: return hidden @ V2 + c2 + d_hidden @ W2 => n = Network(policy.sizes, 1, np.random.default_rng(0)); n.theta = policy.theta + 1e-7 * vector; return (forward(n, inputs)[0] - hidden @ W2 - b2) / 1e-7 !! J v
fisher_vector_product:  / len(probs) => !! 12 times the expected
fisher_vector_product: probs * (u - (probs * u).sum(axis=1)[:, None]) => probs * u !! F v
fisher_vector_product: axis=1)[:, None] => axis=0) !! F v
fisher_vector_product: (probs * u).sum(axis=1)[:, None] => u.mean(axis=1)[:, None] !! F v
conjugate_gradient: 1e-10 * => 1e-2 * !! expected
conjugate_gradient: 1e-10 * => 1e-6 * !! expected
conjugate_gradient: 1e-10 * (b @ b) => 1e-20 !! expected
conjugate_gradient: range(iterations) => range(min(iterations, 10)) !! at most 15 iterations
conjugate_gradient: range(iterations) => range(iterations + 1) !! at most 1 iterations
conjugate_gradient: d = r + r @ r / rr * d => d = r !! at most 2 iterations
conjugate_gradient: if rr <= 1e-10 * (b @ b) => if False !! divide
conjugate_gradient: x = x + alpha * d => b += alpha * d !! read-only
line_search: policy.theta = theta_old\n => !! expected theta_old
line_search: policy.theta = theta_old\n => policy.theta = policy.theta - full_step\n !! theta
line_search: range(backtracks + 1) => range(backtracks) !! expected trial 4
line_search: range(backtracks + 1) => range(backtracks + 2) !! expected theta_old
line_search: "backtracks": settings.max_backtracks => "backtracks": None !! expected {
line_search: , "backtracks": settings.max_backtracks => !! expected {
line_search:  - np.mean(batch.advantages) => !! expected
line_search: gain > 0 => gain >= 0 !! expected theta_old
line_search: near and gain > 0 => gain > 0 !! expected trial 2
line_search: kl(batch.log_probs_old, log_probs) => kl(log_probs, batch.log_probs_old) !! expected
line_search:  or not settings.line_search => !! expected trial 0
line_search: policy.theta = theta_old + full_step => policy.theta += full_step !! expected
line_search: rows = np => best = []\n    rows = np && \
if near and gain > 0 or not settings.line_search: => \
if near and gain > 0:\n            best.append((gain, k, policy.theta))\n        \
if k == backtracks and best:\n            gain, k, policy.theta = max(best, key=lambda one: one[0]) \
!! expected trial 3
"""


def answers(text):
    """(exercise, its solution with changes, what the grader has to say) of each line."""
    for line in text.replace("\\\n", "").strip().splitlines():
        name, changes = line.split(": ", 1)
        changes, _, message = changes.replace("\\n", "\n").partition(" !! ")
        [body] = [body for (_, exercise), body in SOLUTIONS.items() if exercise == name]
        for change in changes.split(" && "):
            old, _, new = change.partition(" =>")
            assert old in body, line
            body = body.replace(old, new.removeprefix(" "))
        yield pytest.param(name, body, message, id=line)


def grade(folder, name, body, file=None):
    """The README's command in a folder that holds nothing but the answer and test_smoke.py."""
    [script] = [script for script, exercise in SOLUTIONS if exercise == name]
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    [function] = [part for part in ast.parse(text).body if getattr(part, "name", "") == name]
    lines = text.splitlines()
    lines[function.body[0].end_lineno : function.end_lineno] = body.strip("\n").splitlines()
    (folder / (file or f"{script}.py")).write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copy(ROOT / "test_smoke.py", folder)
    command = [sys.executable, "-m", "pytest", "-k", name]
    return subprocess.run(
        command, cwd=folder, capture_output=True, check=False, encoding="utf-8", errors="replace"
    )


@pytest.mark.parametrize("name, body, _", [*answers(RIGHT)])
def test_right_answers_pass(tmp_path, name, body, _):
    result = grade(tmp_path, name, body)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", [name for _, name in SOLUTIONS])
def test_a_copy_is_graded_alike(tmp_path, name):
    [body] = [body for (_, exercise), body in SOLUTIONS.items() if exercise == name]
    assert grade(tmp_path, name, body, "my_answer.py").returncode == 0
    assert grade(tmp_path, name, "    return None", "my_answer.py").returncode == 1


@pytest.mark.parametrize("name, body, message", [*answers(WRONG)])
def test_wrong_answers_fail_in_words(tmp_path, name, body, message):
    result = grade(tmp_path, name, body)
    assert result.returncode == 1 and message in result.stdout, result.stdout


def test_an_endless_loop_ends_and_says_where(tmp_path):
    body = SOLUTIONS["trpo", "conjugate_gradient"].replace(
        "for _ in range(iterations)", "while True"
    )
    result = grade(tmp_path, "conjugate_gradient", body.replace("break", "continue"))
    assert "Timeout" in result.stderr and "in conjugate_gradient" in result.stderr


def test_a_syntax_error_fails_its_own_script_alone(tmp_path):
    shutil.copy(ROOT / "vpg.py", tmp_path / "my_vpg.py")
    result = grade(tmp_path, "gae", "    return (", "vpg.py")
    assert "Python cannot read vpg.py" in result.stdout
    assert " 3 passed" in result.stdout and " 3 errors" in result.stdout
