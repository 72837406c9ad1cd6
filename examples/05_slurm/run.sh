#!/usr/bin/env bash
# Print every job of the chain; nothing is written or submitted.
set -euo pipefail
cd "$(dirname "$0")/../.."
"${PYTHON:-python}" tools/slurm/submit.py --settings examples/05_slurm/cluster.yaml chain --dry-run
