"""Put faults into copies of the scripts, one at a time: the tests must fail every time.

    python .ci/faults.py            every fault of the list below
    python .ci/faults.py --empty    the body of every function of every script, emptied
    python .ci/faults.py -k WORD    only faults whose script or description holds WORD

Each copy lies in a folder of its own with its tests and no other script, so that a test that
compares the scripts with each other cannot be the one that notices. (compare.py needs the scripts.)
"""

import ast
import re
import shutil
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = "vpg", "trpo", "ppo"
TIMEOUT = 300  # seconds for one run of the tests
ALL = " ".join(SCRIPTS)

# What is wrong | which scripts | tests to try first (pytest -k) | right text | wrong text
FAULTS = [
    # Shared by the three scripts: the network and the policy.
    ("tanh' left out, upper layer", ALL, "backward or gradient", " * (1 - hidden2**2)", ""),
    ("tanh' left out, lower layer", ALL, "backward or gradient", " * (1 - hidden1**2)", ""),
    (
        "log-sum-exp without the maximum",
        ALL,
        "log_softmax",
        "shifted = logits - logits.max(axis=1, keepdims=True)",
        "shifted = logits",
    ),
    (
        "old and new policy swapped in the KL",
        ALL,
        "kl",
        "(np.exp(log_probs_old) * (log_probs_old - log_probs_new))",
        "(np.exp(log_probs_new) * (log_probs_new - log_probs_old))",
    ),
    (
        "KL: the sum over states, not their mean",
        ALL,
        "kl",
        ".sum(axis=1).mean())\n\n\ndef policy_gradient",
        ".sum())\n\n\ndef policy_gradient",
    ),
    (
        "KL of a distribution with itself",
        ALL,
        "train or kl",
        'row["kl"] = kl(log_probs_old, log_probs_new)',
        'row["kl"] = kl(log_probs_new, log_probs_new)',
    ),
    (
        "KL reported of new and old, swapped",
        ALL,
        "train or kl",
        'row["kl"] = kl(log_probs_old, log_probs_new)',
        'row["kl"] = kl(log_probs_new, log_probs_old)',
    ),
    (
        "sign of the policy gradient",
        ALL,
        "policy_gradient",
        "grad_log_prob = onehot - np.exp(log_probs)",
        "grad_log_prob = np.exp(log_probs) - onehot",
    ),
    (
        "policy gradient: no mean over the batch",
        ALL,
        "policy_gradient",
        "weights[:, None] * grad_log_prob / len(actions))",
        "weights[:, None] * grad_log_prob)",
    ),
    ("sign of Adam's step", ALL, "adam", "network.theta += learning", "network.theta -= learning"),
    ("Adam's means not unbiased", ALL, "adam", "learning_rate * unbias *", "learning_rate *"),
    # Shared: experience.
    ("actions not sampled", ALL, "experience", "(logits + noise).argmax", "logits.argmax"),
    (
        "the observation after the action recorded in place of that before it",
        ALL,
        "experience",
        "calls.append((observations, actions",
        "calls.append((following, actions",
    ),
    (
        "the call after an episode's end not marked (meaning changed in Gymnasium 1.0)",
        ALL,
        "experience",
        "terminated, truncated, ended))",
        "terminated, truncated, np.zeros_like(ended)))",
    ),
    (
        "an episode's last call marked as the resetting one",
        ALL,
        "experience",
        "terminated, truncated, ended))",
        "terminated, truncated, terminated | truncated))",
    ),
    (
        "a resetting call in the batch's first row forgotten",
        ALL,
        "experience",
        "        calls = []\n",
        "        calls, ended = [], np.zeros(env.num_envs, bool)\n",
    ),
    (
        "resetting calls learned from",
        ALL,
        "train or experience",
        "real = ~flags[-1]",
        "real = np.ones_like(flags[-1])",
    ),
    # Shared: advantages and values.
    (
        "truncation treated as termination (done for terminated)",
        ALL,
        "gae",
        "values[1:] * ~terminated",
        "values[1:] * ~(terminated | truncated)",
    ),
    ("bootstrap from a terminal state", ALL, "gae", "values[1:] * ~terminated", "values[1:]"),
    (
        "GAE runs on across terminations",
        ALL,
        "gae",
        "goes_on = ~(terminated | truncated)",
        "goes_on = ~truncated",
    ),
    (
        "GAE runs on across truncations",
        ALL,
        "gae",
        "goes_on = ~(terminated | truncated)",
        "goes_on = ~terminated",
    ),
    (
        "an advantage for resetting calls",
        ALL,
        "gae",
        "return advantages * ~resetting",
        "return advantages",
    ),
    (
        "GAE wrong in the first row",
        ALL,
        "gae",
        "reversed(range(len(deltas)))",
        "reversed(range(1, len(deltas)))",
    ),
    (
        "GAE wrong in the last row",
        ALL,
        "gae",
        "reversed(range(len(deltas)))",
        "reversed(range(len(deltas) - 1))",
    ),
    (
        "no bootstrap at the end of the batch",
        ALL,
        "gae",
        "gamma * values[1:] * ~terminated",
        "gamma * np.concatenate([values[1:-1], 0 * values[-1:]]) * ~terminated",
    ),
    (
        "an end in the last row goes unnoticed",
        ALL,
        "gae",
        "values[1:] * ~terminated -",
        "values[1:] * ~np.concatenate([terminated[:-1], terminated[-1:] & False]) -",
    ),
    ("lambda for gamma in GAE", ALL, "gae", "+ gamma * values[1:]", "+ gae_lambda * values[1:]"),
    (
        "lambda and gamma swapped in the call of GAE",
        ALL,
        "train or gae",
        "*flags, settings.gamma, settings.gae_lambda)",
        "*flags, settings.gae_lambda, settings.gamma)",
    ),
    (
        "sign of the value gradient",
        ALL,
        "fit_value",
        "(targets[chosen, None] - values)",
        "(values - targets[chosen, None])",
    ),
    (
        "value gradient: no mean over the batch",
        ALL,
        "fit_value",
        "- values) / len(chosen)",
        "- values)",
    ),
    (
        "equal advantages divided by their deviation 0",
        ALL,
        "train or advantages",
        "advantages *= 1 / advantages.std() if advantages.std() > rounding else 0",
        "advantages /= advantages.std()",
    ),
    (
        "float32 noise in equal advantages learned from",
        ALL,
        "train or advantages",
        "rounding = 1e-5 * max(1.0, np.abs(targets).max())",
        "rounding = 0.0",
    ),
    # TRPO's own.
    ("J v: tanh' left out", "trpo", "jacobian", "(1 - hidden2**2) * (d_hidden1", "(d_hidden1"),
    ("J v: a layer left out", "trpo", "jacobian", "(d_hidden1 @ policy.W2 + hidden1", "(hidden1"),
    (
        "Fisher-vector product without p p^T",
        "trpo",
        "fisher",
        "d_probs = probs * (d_logits - (probs * d_logits).sum(axis=1, keepdims=True))",
        "d_probs = probs * d_logits",
    ),
    (
        "Fisher-vector product: v F v may be negative",
        "trpo",
        "fisher",
        "(d_logits - (probs",
        "(d_logits - 2 * (probs",
    ),
    (
        "Fisher-vector product not symmetric, CG cannot converge",
        "trpo",
        "fisher",
        "d_probs = probs * (d_logits - (probs * d_logits).sum",
        "d_probs = probs * (d_logits - d_logits.sum",
    ),
    ("Fisher: no mean over the batch", "trpo", "fisher", "d_probs / len(probs))", "d_probs)"),
    ("damping left out of the product", "trpo", "fisher", " + damping * vector", ""),
    (
        "damping not handed to the product",
        "trpo",
        "update_policy",
        "np.exp(log_probs), v, settings.damping)",
        "np.exp(log_probs), v)",
    ),
    (
        "a zero gradient divides by zero in CG",
        "trpo",
        "conjugate_gradient",
        "if squared <= 1e-10 * (target @ target)",
        "if squared < 1e-10 * (target @ target)",
    ),
    (
        "CG: an absolute tolerance",
        "trpo",
        "conjugate_gradient or update_policy",
        "if squared <= 1e-10 * (target @ target)",
        "if squared <= 1e-10",
    ),
    (
        "CG: plain steepest descent",
        "trpo",
        "conjugate_gradient",
        "direction = residual + squared / before * direction",
        "direction = residual",
    ),
    (
        "CG: the factor of the direction upside down",
        "trpo",
        "conjugate_gradient",
        "squared / before * direction",
        "before / squared * direction",
    ),
    (
        "the step divided by curvature 0",
        "trpo",
        "update_policy",
        " if curvature > 0 else np.zeros_like(x)",
        "",
    ),
    ("the step too short", "trpo", "update_policy", "2 * settings.delta", "settings.delta"),
    (
        "line search: theta not restored",
        "trpo",
        "line_search",
        '    policy.theta[:] = theta_old\n    return {"surrogate_gain": 0.0',
        '    return {"surrogate_gain": 0.0',
    ),
    (
        "line search: the old theta is a view",
        "trpo",
        "line_search",
        "theta_old, taken = policy.theta.copy()",
        "theta_old, taken = policy.theta",
    ),
    (
        "line search: the KL not checked",
        "trpo",
        "line_search",
        "good = gain > 0 and kl(log_probs_old, log_probs) <= settings.delta",
        "good = gain > 0",
    ),
    (
        "line search: the surrogate not checked",
        "trpo",
        "line_search",
        "good = gain > 0 and kl(",
        "good = kl(",
    ),
    (
        "line search: KL of the new policy with itself",
        "trpo",
        "line_search",
        "and kl(log_probs_old, log_probs)",
        "and kl(log_probs, log_probs)",
    ),
    (
        "line search: old and new policy swapped in the KL",
        "trpo",
        "line_search",
        "and kl(log_probs_old, log_probs)",
        "and kl(log_probs, log_probs_old)",
    ),
    # PPO's own.
    (
        "clip on the wrong side",
        "ppo",
        "clipped",
        "ratio > 1 + clip, ratio < 1 - clip)",
        "ratio < 1 - clip, ratio > 1 + clip)",
    ),
    (
        "clip whatever the advantage's sign",
        "ppo",
        "clipped",
        "np.where(advantages > 0, ratio > 1 + clip, ratio < 1 - clip)",
        "np.abs(ratio - 1) > clip",
    ),
    ("no clip", "ppo", "clipped", "np.where(beyond, 0, advantages)", "advantages"),
    (
        "the ratio left out of the gradient",
        "ppo",
        "update_policy or gradient",
        "weights = ratio * clipped",
        "weights = clipped",
    ),
    (
        "the ratio always 1",
        "ppo",
        "update_policy",
        "log_probs[taken] - log_probs_old[chosen][taken]",
        "log_probs[taken] - log_probs[taken]",
    ),
    (
        "--target-kl: KL of a distribution with itself",
        "ppo",
        "target_kl or update_policy",
        "if kl(log_probs_old, log_softmax(",
        "if 0 * kl(log_probs_old, log_softmax(",
    ),
    # Evaluation, settings and seeds.
    (
        "evaluation goes on after a truncation",
        ALL,
        "evaluate",
        "running & ~(terminated | truncated)",
        "running & ~terminated",
    ),
    (
        "one call more than the horizon",
        ALL,
        "train",
        "size=(horizon, env.num_envs",
        "size=(horizon + 1, env.num_envs",
    ),
    (
        "always eight environments",
        ALL,
        "train",
        "env = make_env(settings, settings.num_envs)",
        "env = make_env(settings, 8)",
    ),
    (
        "the value function's size fixed",
        ALL,
        "settings",
        "value_rng, (policy.sizes[0], settings.hidden, 1), 1.0)",
        "value_rng, (policy.sizes[0], 64, 1), 1.0)",
    ),
    (
        "the value function's last weights small",
        ALL,
        "settings",
        "settings.hidden, 1), 1.0)",
        "settings.hidden, 1), 0.01)",
    ),
    (
        "five minibatches whatever is set",
        ALL,
        "settings",
        "rng.permutation(len(targets)), settings.minibatches)",
        "rng.permutation(len(targets)), 5)",
    ),
    (
        "always the same seed",
        ALL,
        "seed",
        "np.random.default_rng(settings.seed).spawn(4)",
        "np.random.default_rng(0).spawn(4)",
    ),
    (
        "weights all positive",
        ALL,
        "initial",
        "rng.standard_normal(weights.shape)",
        "rng.random(weights.shape)",
    ),
    ("solved at the first good episode", ALL, "counts", "len(recent) == 100 and ", ""),
    ("return of five episodes", ALL, "counts", "recent[-20:]", "recent[-5:]"),
    (
        "no check that all is finite",
        ALL,
        "finite",
        "if not np.isfinite(",
        "if False and not np.isfinite(",
    ),
    ("noise taken for a signal", ALL, "rounding", "rounding = 1e-5 *", "rounding = 0 *"),
    # compare.py, the laboratory.
    (
        "a variant's own options give way to those of all",
        "compare",
        "parse",
        "shared + own",
        "own + shared",
    ),
    (
        "all runs with the same seed",
        "compare",
        "data",
        "module.parse(options), seed=seed)",
        "module.parse(options), seed=0)",
    ),
    ("the variant's own seed forgotten", "compare", "data", "variants[text][2].seed + n", "n"),
    (
        "a failed run counted as finished",
        "compare",
        "failing",
        'if ended.get(run) == ""]',
        "if run in ended]",
    ),
    (
        "status 0 although a run failed",
        "compare",
        "failing",
        "130 if missing else 1 if problems else 0",
        "130 if missing else 0",
    ),
    (
        "an interrupt loses what has finished",
        "compare",
        "interrupt",
        "except KeyboardInterrupt:  # `ended`",
        "except OSError:  # `ended`",
    ),
    ("processes left after an interrupt", "compare", "interrupt", "process.terminate()", "pass"),
    (
        "rows in the order in which they came",
        "compare",
        "data",
        "for run in finished if run[0] == text] for text in variants}",
        "for run in finished if run[0] == text] for text in sorted(variants)}",
    ),
    (
        "columns of the first row only",
        "compare",
        "data",
        "dict.fromkeys(key for row in rows for key in row))",
        'list(rows[0]), extrasaction="ignore")',
    ),
    ("interquartile mean: an eighth left out", "compare", "interquartile_mean", "// 4", "// 8"),
    (
        "a collapse counted at each update of a fall",
        "compare",
        "collapses",
        "count, recovered = count + 1, None",
        "count += 1",
    ),
    (
        "a collapse: half of the return, not of the gain",
        "compare",
        "collapses",
        "max(returns[: now + 1]) - returns[0]) / 2",
        "max(returns[: now + 1])) / 2",
    ),
    (
        "slow declines counted as collapses",
        "compare",
        "collapses",
        "max(recovered, now - 10)",
        "recovered",
    ),
    ("noise counted as a collapse", "compare", "collapses", "2 * half > smallest", "2 * half > 0"),
    (
        "first instead of last return in the table",
        "compare",
        "table",
        "last = [values[-1]",
        "last = [values[0]",
    ),
    (
        "steps of the last update as the steps to solved",
        "compare",
        "table",
        'run[column(run, "solved").argmax()]["steps"]',
        'run[-1]["steps"]',
    ),
    ("mean instead of median KL", "compare", "table", "np.median(kl)", "np.mean(kl)"),
    (
        "updates that moved nothing drawn on the log axis",
        "compare",
        "picture",
        'if row["kl"] > NOISE]',
        "]",
    ),
    (
        "KL drawn without the log axis",
        "compare",
        "picture",
        'ylabel=kl, yscale="log")',
        "ylabel=kl)",
    ),
    (
        "another color in the cloud",
        "compare",
        "picture",
        'style |= {"marker"',
        'style |= {"color": "red", "marker"',
    ),
    (
        "the mean over seeds as the bold curve",
        "compare",
        "picture",
        "samples, interquartile_mean, style)",
        "samples, np.max, style)",
    ),
    ("the marks forgotten", "compare", "picture", "axis.axhline(height,", "axis.axhline(1,"),
    (
        "all lines thin although there are eight variants",
        "compare",
        "picture",
        "len(results) < 5",
        "True",
    ),
    ("a picture of another size", "compare", "picture", "dpi=110", "dpi=100"),
    (
        "progress: time left counts runs, not steps",
        "compare",
        "progress",
        'part[-1]["steps"] / variants[key[0]][2].steps',
        "1",
    ),
    (
        "progress: a line for every row",
        "compare",
        "progress",
        '(not terminal and ended.get(run) != "")',
        "False",
    ),
]


def emptied(source, function):
    """The source with the body of one function (a node of its tree) replaced by `return None`."""
    lines, first = source.splitlines(keepends=True), function.body[0]
    line, end = first.lineno, function.end_lineno
    indent = " " * first.col_offset
    if ast.get_docstring(function) is not None:
        line = first.end_lineno + 1
    return "".join([*lines[: line - 1], f"{indent}return None\n", *lines[end:]])


def functions(source):
    """All functions and methods of a source, as nodes of its tree."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]


def run_tests(folder, *options):
    """Run the tests of a folder up to the first failure: exit status, name of the failed test."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider"]
    try:
        done = subprocess.run(
            [*command, *options],
            check=False,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT,
        )
    except subprocess.TimeoutExpired:
        return None, f"no end within {TIMEOUT} s"
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if not failed and done.returncode:
        failed = [" ".join((done.stdout + done.stderr).split())[-200:]]
    return done.returncode, failed[0].split("::")[-1] if failed else ""


def killed(script, source, first, alone=False):
    """The test that fails for this source, tried first the tests that `first` selects; or None."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        Path(folder, f"{script}.py").write_text(source, encoding="utf-8", newline="\n")
        beside = ["test_smoke.py"]  # what is handed out is a script and its tests, nothing else
        if script == "compare":
            beside = ["vpg.py", "trpo.py", "ppo.py", ".ci/test_compare.py"]
        elif not alone:
            beside += [".ci/test_border.py"]
        for name in beside:
            shutil.copy(ROOT / name, folder)
        status, test = run_tests(folder, "-k", first)
        if status in (0, 5):  # all pass, or none is selected
            status, test = run_tests(folder)
    if status not in (0, 1, 2):  # neither passed nor failed: stopped from outside, or no end
        print(f"{script}.py: pytest ended with status {status}: {test}", flush=True)
    return test if status in (1, 2) else None


def sound(script):
    """Whether all tests pass for a script as it is, alone in a folder."""
    source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
    test = killed(script, source, "gae or parse")
    if test:
        print(f"{script}.py: fails without any fault: {test}")
    return not test


def listed(word):
    """(description, script, source with the fault, tests to try first) of the list above."""
    for name, scripts, first, right, wrong in FAULTS:
        for script in scripts.split():
            source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
            if right not in source:
                sys.exit(f"{script}.py: the fault {name!r} no longer applies; not found: {right}")
            if word in f"{script}.py {name}":
                yield name, script, source.replace(right, wrong), first


def empty_bodies(word):
    """The same for the emptied functions of the three scripts."""
    for script in SCRIPTS:
        source = (ROOT / f"{script}.py").read_text(encoding="utf-8")
        for function in functions(source):
            if word in function.name:
                name = f"{function.name} (line {function.lineno}) emptied"
                yield name, script, emptied(source, function), function.name.strip("_")


def main():
    """Try all faults, two at a time; the exit status is 1 if one survives."""
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--empty", action="store_true", help="empty every function instead")
    parser.add_argument("-k", default="", metavar="WORD", help="only faults that hold WORD")
    options, began = parser.parse_args(), time.perf_counter()
    if not (ROOT / "test_smoke.py").is_file():
        sys.exit("test_smoke.py is missing")
    faults = list(empty_bodies(options.k) if options.empty else listed(options.k))
    survived = 0
    with ThreadPoolExecutor(2) as pool:
        if not all(pool.map(sound, dict.fromkeys(script for _, script, *_ in faults))):
            return 1
        tests = pool.map(lambda fault: killed(*fault[1:], alone=options.empty), faults)
        for (name, script, *_), test in zip(faults, tests):
            survived += test is None
            print(f"{script + '.py':8} {name}: {test or 'SURVIVED'}", flush=True)
    seconds = time.perf_counter() - began
    print(f"{len(faults) - survived} faults killed, {survived} survived in {seconds:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
