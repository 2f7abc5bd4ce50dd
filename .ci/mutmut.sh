#!/usr/bin/env bash
# Changes to a script that test_smoke.py does not notice, with mutmut 3.8 (trpo: two minutes):
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
    --deselect=test_smoke.py::test_shared_parts_are_the_same
END
mutmut run "$@" && mutmut results
