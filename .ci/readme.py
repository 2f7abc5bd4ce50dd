"""Run every command of README.md on a small budget, and grade its exercises.

Every line of a bash block runs in order in a copy of the project, every python block as a script of
its own. For every `pytest -k NAME` the body of function NAME is emptied: the command must then fail.
"""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import ROOT, SCRIPTS, emptied, functions

STEPS, TIMEOUT = 3000, 600
FILES = *(f"{name}.py" for name in (*SCRIPTS, "compare", "test_smoke")), "README.md"
NOT_RUN = "pip", "uv", "git checkout", "git clone", "cd", "source"  # these only have to parse
problems = []


def report(what, problem=""):
    """One line of output; a problem counts."""
    print(f"{what}: {problem or 'ok'}", flush=True)
    if problem:
        problems.append(what)


def blocks(text):
    """(language, text without its indentation) of all fenced blocks."""
    fence = r"^([ \t]*)```(\w*)[^\n]*\n(.*?)^[ \t]*```[ \t]*$"
    for indent, language, body in re.findall(fence, text, re.MULTILINE | re.DOTALL):
        yield language, re.sub(f"^{indent}", "", body, flags=re.MULTILINE)


def commands(text):
    """The lines of all bash blocks, continued lines joined."""
    for language, body in blocks(text):
        if language in ("sh", "shell", "console", "zsh"):
            report(f"```{language}", "write ```bash, so that the commands are tried")
        for line in body.replace("\\\n", " ").splitlines() if language == "bash" else ():
            if line.strip() and not line.lstrip().startswith("#"):
                yield line.strip()


def fewer(word):
    """The word with the steps that it names reduced: for --steps inside a variant."""
    less = lambda match: f"{match[1]}{min(int(match[2]), STEPS)}"
    return re.sub(r"(--steps[ =])(\d+)", less, word)


def with_option(words, name, value):
    """The words with option name at that value, or below if it is already."""
    words = [part for word in words for part in re.sub(f"^{name}=", f"{name}\n", word).split("\n")]
    if name not in words:
        return [*words, name, str(value)]
    place = words.index(name) + 1
    return [*words[:place], str(min(int(words[place]), value)), *words[place + 1 :]]


def small(words):
    """The command with a small budget, run by this Python; None if there is no rule for it."""
    words = words[2:] if words[:2] == ["python", "-m"] else words
    if words[0] == "pytest":
        return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words[1:]]
    if words[:3] == ["git", "diff", "--no-index"]:
        return words
    if words[0] not in ("python", "python3") or len(words) < 2 or not words[1].endswith(".py"):
        return None
    words = [fewer(word) for word in words[1:] if word not in ("--watch", "--show")]
    if words[0] != "test_smoke.py" and "--help" not in words:
        words = with_option(words, "--steps", STEPS)
        words = with_option(words, "--seeds", 1) if words[0] == "compare.py" else words
    return [sys.executable, *words]


def run(command, folder):
    """Exit status and what was printed. Pictures are drawn without a display."""
    env = os.environ | {"MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUTF8": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            check=False,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=TIMEOUT,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return None, str(error)
    return done.returncode, done.stdout


def last_line(output):
    """What to print of a failed command."""
    return output.strip().splitlines()[-1][:300] if output.strip() else "no output"


def try_command(line, folder, done):
    """Run one line of a bash block, unless the same was done before."""
    words = shlex.split(line, comments=True)
    plain = " ".join(words[2:] if words[:2] == ["python", "-m"] else words)
    if plain.startswith(tuple(f"{prefix} " for prefix in NOT_RUN)):
        return report(f"{line} (not run)")
    command = small(words)
    if not command:
        return report(line, "no rule in readme.py for this command")
    if command in done:
        return report(f"{line} (as above)")
    done.append(command)
    began = time.perf_counter()
    status, output = run(command, folder)
    fine = status == 0 or status == 1 and words[:2] == ["git", "diff"]
    if fine and words[:2] != ["git", "diff"]:
        fine = "Traceback" not in output
    seconds = f"{time.perf_counter() - began:.1f} s"
    report(f"{line} ({seconds})", "" if fine else f"exit status {status}, {last_line(output)}")


def copy_project(folder):
    """The files of the project that exist, in an empty folder."""
    for name in FILES:
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder)
    if (ROOT / ".github").is_dir():
        shutil.copytree(ROOT / ".github", Path(folder, ".github"))


def exercise(name):
    """With the body of function `name` emptied, `pytest -k name` must fail."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy_project(folder)
        found = False
        for script in SCRIPTS:
            path = Path(folder, f"{script}.py")
            source = path.read_text(encoding="utf-8")
            for function in (node for node in functions(source) if node.name == name):
                path.write_text(emptied(source, function), encoding="utf-8", newline="\n")
                found = True
        if not found:
            tests = functions(Path(folder, "test_smoke.py").read_text(encoding="utf-8"))
            known = any(name in test.name for test in tests)
            return report(f"pytest -k {name}", "" if known else "no such function, no such test")
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-k", name]
        status, output = run(command, folder)
    problem = "" if status in (1, 2) else f"exit status {status}, {last_line(output)}"
    report(f"pytest -k {name}, its body emptied, fails", problem)


def links(text):
    """Relative links and pictures exist, anchors have a heading, pictures are small."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
    found = re.findall(r"\]\(([^)\s]+)", prose)
    found += re.findall(r"(?:src|srcset|href)=\"([^\"\s]+)", prose)
    for link in dict.fromkeys(link for link in found if not re.match(r"\w+:", link)):
        path, _, anchor = link.partition("#")
        missing = anchor not in anchors if not path else not (ROOT / path).exists()
        report(f"link {link}", "there is no such file or heading" if missing else "")
    for path in sorted((ROOT / ".github").rglob("*")):
        if path.suffix in (".png", ".svg", ".jpg", ".gif", ".webp"):
            size = path.stat().st_size
            report(f"{path.name}, {size} bytes", "" if size < 300_000 else "too large")


def main():
    """All checks; the exit status."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    if left := re.findall(r"\{\{\w+\}\}", text):
        report("README.md", f"placeholders left: {' '.join(left)}")
    links(text)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy_project(folder)
        done = []
        for line in commands(text):
            try_command(line, folder, done)
        for language, body in blocks(text):
            if language == "python":
                ast.parse(body)
                less = lambda match: f"steps={min(int(match[1]), STEPS)}"
                Path(folder, "block.py").write_text(
                    re.sub(r"\bsteps=([\d_]+)", less, body), encoding="utf-8"
                )
                status, output = run([sys.executable, "block.py"], folder)
                problem = "" if status == 0 else f"exit status {status}, {last_line(output)}"
                report(f"python block: {body.splitlines()[0]} ...", problem)
    quoted = re.findall(r"pytest(?: [\w.]+)* -k[ =]['\"]?(\w+)", text)
    for name in dict.fromkeys(quoted):
        exercise(name)
    print(f"README.md: {len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
