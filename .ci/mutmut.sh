#!/usr/bin/env bash
# Which changes to a script does test_smoke.py not notice? By hand, with mutmut 3.8 installed:
#     bash .ci/mutmut.sh trpo                                  all of it, two minutes on two cores
#     bash .ci/mutmut.sh ppo "*update_policy*" "*minibatch*" "*clipped*"    section 6; mutmut results
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
script="$1" && shift
cd "$(mktemp -d)"
cp "$root/$script.py" "$root/test_smoke.py" .
cat >setup.cfg <<END
[mutmut]
source_paths=$script.py
only_mutate=$script.py
pytest_add_cli_args_test_selection=test_smoke.py
pytest_add_cli_args=
    -x
    --deselect=test_smoke.py::test_shared_parts_are_the_same
END
mutmut run "$@" && mutmut results
