"""README.md: its commands and Python blocks run, its links lead somewhere, what it names exists.

Each block runs in a copy of the project of its own; what installs packages is run by .ci/run, which
also sets MPLBACKEND=Agg, so that no picture needs a window.
"""

import builtins
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = sorted(ROOT.glob("*.py"))
CODE = "\n".join(path.read_text(encoding="utf-8") for path in FILES)
BLOCK = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
BLOCKS = [(language, textwrap.dedent(body)) for _, language, body in BLOCK.findall(TEXT)]
PROSE = BLOCK.sub("", TEXT)
INSTALLS = "pip ", "uv ", "venv", "git checkout", "git clone", "cd ", "source "
BUDGET = ["--steps", "3000"]


# --- Blocks ---------------------------------------------------------------------------------------
def commands(body):
    """Lines of a bash block without those that install; continued lines are joined."""
    lines = [line.strip() for line in body.replace("\\\n", " ").splitlines()]
    lines = [line for line in lines if line and not line.startswith("#")]
    return [line for line in lines if not any(word in line for word in INSTALLS)]


@pytest.fixture
def project(tmp_path):
    """A folder with a copy of the project."""
    for path in FILES:
        shutil.copy(path, tmp_path)
    return tmp_path


def run(folder, *words, status=0):
    """Run a command there; it must end with that status."""
    done = subprocess.run(words, cwd=folder, capture_output=True, timeout=500, check=False)
    printed = (done.stdout + done.stderr).decode("utf-8", "replace")
    assert done.returncode == status, printed
    assert "Traceback" not in printed


def run_small(folder, line):
    """Run a command of the README with few steps; for pytest, without -k, see what is collected."""
    words = shlex.split(line, comments=True)
    words = words[2:] if words[:2] == ["python", "-m"] else words
    if words[0] == "cp":
        shutil.copy(folder / words[1], folder / words[2])
    elif words[0] == "git":
        run(folder, *words, status=1)  # git diff: there are differences
    elif words[0] == "pytest":
        run(folder, sys.executable, "-m", *words, *([] if "-k" in words else ["--collect-only"]))
    else:
        assert words[0] == "python", f"no rule for this command: {line}"
        words = [re.sub(r"--steps[ =]\d+", "--steps 3000", word) for word in words[1:]]
        budget = ["--seeds", "1", *BUDGET] if words[0] == "compare.py" else BUDGET
        for word in words:
            if word.endswith(".csv") and not (folder / word).exists():
                out = ["--out", word.replace(".csv", ".png")]
                run(folder, sys.executable, "compare.py", *budget, *out)
        run(folder, sys.executable, *[word for word in words if word != "--watch"], *budget)


BASH = [body for language, body in BLOCKS if language == "bash" and commands(body)]
PYTHON = [body for language, body in BLOCKS if language == "python"]


@pytest.mark.parametrize("body", BASH, ids=lambda body: commands(body)[0])
def test_bash_block(body, project):
    for line in commands(body):
        run_small(project, line)


@pytest.mark.parametrize("body", PYTHON, ids=lambda body: body.split("\n")[0])
def test_python_block(body, project):
    (project / "block.py").write_text(body, encoding="utf-8")
    run(project, sys.executable, "block.py")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"(?:pytest|smoke\.py) -k (\w+)", TEXT))))
def test_exercise_has_tests_that_pass(name, project):
    run(project, sys.executable, "-m", "pytest", "-q", "-k", name)


# --- Links and names ------------------------------------------------------------------------------
LINKS = re.findall(r"\]\(([^)\s]+)", PROSE) + re.findall(r'(?:src|srcset|href)="([^"\s]+)"', PROSE)
HEADINGS = re.findall(r"^#+ (.*)$", PROSE, re.MULTILINE)
ANCHORS = {re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-") for text in HEADINGS}


@pytest.mark.parametrize("link", sorted({link for link in LINKS if not re.match(r"\w+:", link)}))
def test_link(link):
    """Files and headings exist; pictures are small."""
    path, _, anchor = link.partition("#")
    assert (ROOT / path).exists()
    assert path or anchor in ANCHORS
    if Path(path).suffix in (".png", ".svg", ".jpg", ".gif", ".webp"):
        assert (ROOT / path).stat().st_size <= 300_000


@pytest.mark.parametrize("span", sorted(set(re.findall(r"`([^`]+)`", PROSE))))
def test_names_exist(span):
    """In backticks, code too: functions with (), names with an underscore, the programs' options."""
    names = set(re.findall(r"(?<![\w-])[a-z]+_\w+", span)) - {"my_ppo"}  # a learner's copy
    functions = re.findall(r"(?<![\w.])([a-z]\w+)\(", span)
    options = re.findall(r"(?<!\S)--(?:no-)?([a-z][\w-]+)", span)
    if span.startswith(("git ", "pip ", "python -m ")):
        options = []
    assert all(re.search(rf"\b{name}\b", CODE) for name in names)
    assert all(hasattr(builtins, name) or f"def {name}(" in CODE for name in functions)
    for name in options:
        field = f"\n    {name.replace('-', '_')}: "
        assert name == "help" or field in CODE or f'"--{name}"' in CODE
