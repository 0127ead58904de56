#!/bin/sh
# As much of the CIFAR half of the paper as fits into a time limit, most valuable first.
#
#   scripts/gpu_reproduce.sh DATA_DIR MINUTES OUT [OPTION ...]
#
# DATA_DIR holds CIFAR-10 and CIFAR-100: torchvision's layout, or cifar10.npz and cifar100.npz. OUT gets a folder for each
# data set with JSON, claims, tables, figures and the report, no weights; those go to OUT-store, or $TAILSCOPE_STORE.
# The same call goes on where the last one stopped. Further options are those of `tailscope reproduce`: --seeds 1,
# --quick, --recipe paper-as-printed, --device cpu, --jobs 4 (backbones trained side by side on one GPU).
#
# Exit status: 0 everything is done; 3 the time is up and pieces are left (OUT/reproduce.json names them); else an error.
set -eu
if [ "$#" -lt 3 ]; then
    echo "usage: $0 DATA_DIR MINUTES OUT [OPTION ...]" >&2
    exit 2
fi
data=$1 minutes=$2 out=$3
shift 3
python=${PYTHON:-python3}
"$python" -m tailscope reproduce everything --data-root "$data" --time-limit "${minutes}m" --out "$out" "$@"
"$python" -c 'import json, sys; sys.exit(0 if json.load(open(sys.argv[1]))["finished"] else 3)' "$out/reproduce.json"
