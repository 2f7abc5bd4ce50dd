"""Faults that others shipped, put into copies of the scripts: test_smoke.py must fail."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# script, tests that must notice (pytest -k), right text, wrong text
FAULTS = [
    # tianshou PR 1287: parameters not restored when the line search fails
    ("trpo", "line_search", "    policy.theta = theta_old\n    return", "    return"),
    # modular_rl 29, wojzaremba/trpo 1 and 2: the line search does not check the KL
    ("trpo", "line_search", " and kl(batch.log_probs_old, log_probs) <= settings.delta", ""),
    ("trpo", "line_search", "gain > 0 and kl(", "kl("),
    # stable-baselines3-contrib 38, rllab 24: Fisher-vector product wrong, x F x negative, NaN
    ("trpo", "fisher", "(d_logits - mean_change)", "d_logits"),
    # mushroom-rl 79: conjugate gradient never converges
    ("trpo", "fisher", "(probs * d_logits).sum(axis=1", "d_logits.sum(axis=1"),
    ("trpo", "conjugate", "direction = residual + beta * direction", "direction = residual"),
    # deep_rl 5: the KL of a distribution with itself, always 0
    ("trpo", "line_search", "kl(batch.log_probs_old, log_probs) <=", "kl(log_probs, log_probs) <="),
    # cleanrl 198: truncation treated as termination
    ("vpg", "gae", "np.where(terminated, 0,", "np.where(terminated | truncated, 0,"),
    # cleanrl 562: the resetting step of a vector environment learned from
    ("vpg", "collect", "real = ~resetting", "real = np.ones_like(resetting)"),
    ("trpo", "gae", " | truncated\n    advantages", "\n    advantages"),
    # cleanrl 499: Gymnasium 1.0 resets one step later than before
    ("vpg", "collect", "self.resetting = terminated", "self.resetting = False & terminated"),
    # several: all advantages equal, or a zero gradient, divide by zero
    ("trpo", "conjugate", "residual @ residual <= 1e-10", "residual @ residual < 1e-10"),
    ("trpo", "update_policy", "if curvature <= 0:", "if curvature < 0:"),
    # several: GAE wrong in the batch's first or last row
    ("trpo", "gae", "reversed(range(len(rewards)))", "reversed(range(1, len(rewards)))"),
    ("vpg", "gae", "reversed(range(len(rewards)))", "reversed(range(len(rewards) - 1))"),
    ("ppo", "gae", "    advantages = np.zeros", "    td_errors[-1] = 0\n    advantages = np.zeros"),
]  # fmt: skip


@pytest.mark.parametrize(("script", "tests", "right", "wrong"), FAULTS)
def test_fault_is_noticed(script, tests, right, wrong, tmp_path):
    """In a copy without the other scripts, so that no comparison of the files can notice it."""
    text = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    assert text.count(right) == 1, "the script has changed: adapt the table"
    (tmp_path / f"{script}.py").write_text(text.replace(right, wrong), encoding="utf-8")
    (tmp_path / "test_smoke.py").write_bytes((ROOT / "test_smoke.py").read_bytes())
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", tests]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=300, check=False)
    assert done.returncode == 1, done.stdout.decode()  # 2 would be an error, 5: there is no test
