#!/usr/bin/env bash
# Builds the wheel, installs it alone in a new environment, and uses it from a folder that has
# packages named like our top-level folders. Third-party packages are lent by .venv.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$root/.venv/bin/python" -m build --quiet --wheel --outdir "$work/dist" "$root"
"$root/.venv/bin/python" -m venv "$work/clean"
"$work/clean/bin/pip" install --quiet --disable-pip-version-check --no-deps "$work"/dist/*.whl
mkdir -p "$work/elsewhere/tools" "$work/elsewhere/envs"
touch "$work/elsewhere/tools/__init__.py" "$work/elsewhere/envs/__init__.py"
cd "$work/elsewhere"
PYTHONPATH=$("$root/.venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
export PYTHONPATH
"$work/clean/bin/python" - <<'PY'
import tir_alp.envs, tir_alp.tools, tools, envs
for module in (tir_alp.envs, tir_alp.tools):
    assert "/clean/" in module.__file__ and "site-packages" in module.__file__, module.__file__
for module in (tools, envs):
    assert "/elsewhere/" in module.__file__, module.__file__
PY
"$work/clean/bin/python" -m tir_alp.train --name wheel --steps 1 --eval.num_tasks 8 --rollout.groups_per_step 2
test -s runs/wheel/metrics.jsonl
echo "the wheel works"
