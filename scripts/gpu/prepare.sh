#!/usr/bin/env bash
# Fill .gpu, which git ignores, with what a machine without a network needs beside this repository: scripts, the Python
# packages that it lacks, and the data in parts, each small enough to be brought in one go with all the rest.
#
#   bash scripts/gpu/prepare.sh DATA [EARLIER]
#
# DATA holds unpack.py and, packed, a folder each for cifar10 and cifar100: `python unpack.py DEST NAME` beside such a
# folder makes DEST/NAME.npz. EARLIER holds the bundle of a run that was not finished: its archives are the first parts,
# and what they hold is not trained again. LIMIT, in MiB, is what can be brought in one go.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/../.."
data=${1:?"usage: prepare.sh DATA [EARLIER]"} earlier=${2:-} into=.gpu limit=$((${LIMIT:-64} << 20))
exclude=$(git rev-parse --git-path info/exclude)
grep -qxF '/.gpu/' "$exclude" 2>/dev/null || { mkdir -p "$(dirname "$exclude")"; echo '/.gpu/' >> "$exclude"; }
rm -rf "$into"
mkdir -p "$into/bin" "$into/wheels"
cp scripts/gpu/{run.sh,smoke.py} "$data/unpack.py" "$into/bin/"

# Figures are drawn at home, so what draws them stays here too. Two may be there, but too old for the others and for us.
grep -E '^(pydantic|pydantic_core|annotated-types|typing-inspection|typing_extensions|typer)==' constraints.txt > "$into/wheels/needed.txt"
if [ -n "${WHEELS:-}" ]; then # a folder that has them
    cp -r "$WHEELS/." "$into/wheels/"
else
    python3 -m pip download -q --no-deps --only-binary=:all: --python-version "${PYTHON_VERSION:-3.12}" \
        --implementation cp --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 \
        --platform manylinux2014_x86_64 -d "$into/wheels" -r "$into/wheels/needed.txt"
fi

tree=$(git ls-files -z --cached --others --exclude-standard | { xargs -0 stat -c %s 2>/dev/null || true; } | awk '{s += $1} END {print s + 0}')
fixed=$((tree + $(du -sb "$into" | cut -f1)))
number=0 filled=$limit
bring() { # FILE NAME: into the part that is being filled, or a new one
    local size
    size=$(($(stat -c %s "$1") + 4096))
    [ $((fixed + size)) -le "$limit" ] || { echo "$1 is too large: $((size / 1000)) kB beside $((fixed / 1000)) kB" >&2; exit 1; }
    [ $((filled + size)) -le "$limit" ] || { number=$((number + 1)) filled=$fixed; }
    install -D -m 644 "$1" "$into/part-$number/$2"
    filled=$((filled + size))
}
for archive in ${earlier:+"$earlier"/*.tar}; do bring "$archive" "stages/$(basename "$archive")"; done
[ -z "$earlier" ] || filled=$limit # what is trained comes before any data
for name in cifar10 cifar100; do # nothing is trained on a data set before it is whole
    (cd "$data/$name" && find . -type f | cut -c3- | sort) > "$into/bin/$name.list"
    while read -r file; do bring "$data/$name/$file" "packed/$name/$file"; done < "$into/bin/$name.list"
    echo "$name is whole with part $number"
done
for part in $(seq "$number"); do
    echo "part $part: $(((fixed + $(du -sb "$into/part-$part" | cut -f1)) / 1000)) kB of $((limit / 1000)) with all the rest"
done
