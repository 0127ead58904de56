#!/usr/bin/env bash
# The CIFAR half of the paper on a machine without a network, in the background of several calls.
#
#   bash .gpu/bin/run.sh look              measure: are the steps sound, and how many trainings at a time are best
#   bash .gpu/bin/run.sh begin             choose, and start `tailscope reproduce`; returns in seconds
#   bash .gpu/bin/run.sh more              take in what this call brought; returns in seconds
#   bash .gpu/bin/run.sh finish SECONDS    the same, wait, stop in time, and leave the bundle in $OUT
#
# Each is called from the repository's root with .gpu/bin, .gpu/wheels and one .gpu/part-N beside it, and first takes in
# that part. Work goes on between the calls, and after another `begin` where it was stopped. OPTIONS are further ones of
# `tailscope reproduce`, such as "--seeds 1"; DEVICE is cuda:0; PYTHON is python3.
set -uo pipefail
began=$SECONDS
bin=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
work=${WORK:-out/gpu} device=${DEVICE:-cuda:0} python=${PYTHON:-python3}
OUT=${OUT:-$work/brought}
mkdir -p "$OUT" "$work/packed" "$work/npz"
export PYTHONPATH=${SOURCE:-src}:$work/site PYTHONUNBUFFERED=1
export TORCHINDUCTOR_CACHE_DIR=$PWD/$work/inductor TRITON_CACHE_DIR=$PWD/$work/triton
export CUDA_DEVICE_MAX_CONNECTIONS=32 # hardware queues: as many trainings side by side must not share one
# What augments and fits on the CPU leaves cores to the threads that launch kernels.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + 2) / 3))}

alive() { # whether it runs: one that has ended may stay as a zombie, where nothing collects it
    local state
    [ -f "$work/$1.pid" ] && state=$(sed 's/.*) //' "/proc/$(cat "$work/$1.pid")/stat" 2> /dev/null) && [ "${state%% *}" != Z ]
}
detached() { # NAME COMMAND: in a session of its own, which outlives this call
    setsid nohup "${@:2}" >> "$work/$1.log" 2>&1 < /dev/null &
    echo $! > "$work/$1.pid"
}
smoke() { timeout -k 5 "${SMOKE_LIMIT:-110}" "$python" "$bin/smoke.py" "$@" --folder "$work" --device "$device" ${SMOKE_OPTIONS:-}; }

take_in() {
    if [ ! -d "$work/site" ] && ls "$bin"/../wheels/*.whl > /dev/null 2>&1; then
        "$python" -m pip install -q --no-index --no-deps --no-compile --target "$work/site.partial" "$bin"/../wheels/*.whl \
            2>&1 | grep -v '^WARNING: Location'
        mv "$work/site.partial" "$work/site"
    fi
    local part name
    for part in "$bin"/../part-*; do
        [ -d "$part/packed" ] && cp -rf "$part/packed/." "$work/packed/"
        [ -d "$part/stages" ] && "$python" -m tailscope store add "$part"/stages/*.tar --store "$work/store"
    done
    cp -f "$bin/unpack.py" "$work/packed/"
    for name in cifar10 cifar100; do # put together once, when all of its files are there; it appears whole
        if [ ! -f "$work/npz/$name.npz" ] && (cd "$work/packed/$name" && xargs ls < "$bin/$name.list") > /dev/null 2>&1; then
            "$python" "$work/packed/unpack.py" "$work/unpacking" "$name" && mv "$work/unpacking/$name.npz" "$work/npz/"
        fi
    done
}

graphless() { # whether the look found that captures go wrong
    [ "$(cat "$work/graphs" 2> /dev/null)" = 0 ]
}

reproduce() { # takes the place of the shell: call it in the background
    graphless && export TAILSCOPE_GRAPHS=${TAILSCOPE_GRAPHS:-0} # whoever asks for them has them
    exec "$python" -m tailscope reproduce everything --data-root "$work/npz" --wait-for-data --device "$device" \
        --out "$work/results" --store "$work/store" --bundle "$work/bundle" "$@"
}

stuck() { # whether two lines of progress in a row told of trainings and of no image
    [ "$(grep ' images/s; ' "$1" | tail -n 2 | grep -c ' 0 images/s; .*%')" = 2 ]
}

uncaptured() { # whether a capture failed: in PyTorch 2.11 those after it in the same process may then fail, too
    grep -q "is not captured as a CUDA graph" "$1"
}

attempts() { # one that dies or hangs is followed by a more careful one; what is stored is not trained again
    local careful code ending tried=0 log=$work/attempt.log
    for careful in "" "--engine eager" "--engine eager --jobs 2" "--engine eager --jobs 2"; do # one job tells of no hang
        tried=$((tried + 1))
        [ "$tried" -le 2 ] || export TAILSCOPE_GRAPHS=0 # an eager step is captured, too
        reproduce $(cat "$work/options" 2>/dev/null || echo "--jobs 2 --engine eager") ${OPTIONS:-} $careful > "$log" 2>&1 &
        echo $! > "$work/reproduce.pid"
        ending=
        while alive reproduce; do
            sleep 1
            stuck "$log" && echo "nothing moves" >> "$log" && kill -KILL "$(cat "$work/reproduce.pid")"
            if [ -z "$ending" ] && uncaptured "$log"; then # once: a second signal would lose what it has not yet written
                echo "a capture failed" >> "$log"
                kill -TERM "$(cat "$work/reproduce.pid")"
                ending=$SECONDS
            fi
            [ -n "$ending" ] && [ $((SECONDS - ending)) -gt "${ENDING:-40}" ] && kill -KILL "$(cat "$work/reproduce.pid")"
        done
        wait $!
        code=$?
        cat "$log" >> "$work/reproduce.log"
        { [ "$code" = 0 ] || [ -e "$work/stop" ]; } && break
        echo "== ended with $code; the next attempt is more careful" | tee -a "$work/reproduce.log"
    done
}

begin() {
    alive attempts && return
    for _ in $(seq 150); do # compiled steps may still be measured
        alive compiled || break
        sleep 1
    done
    smoke choose
    rm -rf "$work/stop" "$work/bin" "$work/src" # from copies: the next call replaces what it carries
    cp -r "$bin" "$work/bin"
    cp -r src "$work/src"
    SOURCE=$work/src detached attempts bash "$work/bin/run.sh" attempts
}

status() {
    tail -n "${1:-12}" "$work/attempt.log"
    nvidia-smi --query-gpu=utilization.gpu,memory.used,power.draw,clocks.sm --format=csv,noheader 2> /dev/null
}

finish() { # SECONDS since the call began
    local was_alive=
    begin
    while [ $((SECONDS - began)) -lt "$1" ] && alive attempts; do
        sleep 1
        [ $(((SECONDS - began) % 60)) = 0 ] && status 2
    done
    touch "$work/stop"
    if alive reproduce; then
        was_alive=1
        kill -TERM "$(cat "$work/reproduce.pid")"
        for _ in $(seq 15); do
            alive reproduce || break
            sleep 1
        done
        alive reproduce && { kill -KILL "$(cat "$work/reproduce.pid")"; rm -f "$work/bundle/results.tar.gz"; }
    fi
    # One that had to be killed has left no whole bundle: this makes it, and nothing else. Should even that take too
    # long, the backbones lie in $OUT as they are: unpacked in a store, they are its entries.
    if [ ! -f "$work/bundle/results.tar.gz" ] || { [ "$was_alive" ] && [ "$work/stop" -nt "$work/bundle/results.tar.gz" ]; }; then
        (cd "$work/store" && ls -d stage1/*/ | split -l 5 - ../raw.) 2> /dev/null
        for list in "$work"/raw.*; do
            [ -f "$list" ] && tar -C "$work/store" -cf "$OUT/$(basename "$list").tar" -T "$list"
        done
        timeout -k 5 40 bash "$bin/run.sh" bundle 2>&1 | tail -n 3
        [ -f "$work/bundle/results.tar.gz" ] && rm -f "$OUT"/raw.*.tar
        rm -f "$work"/raw.*
    fi
    status
    cp -f "$work"/bundle/*.tar* "$OUT"/ 2> /dev/null
    (cd "$work" && tar -czf - smoke.jsonl *.log) > "$OUT/logs.tar.gz" 2> /dev/null # one file: few come home
    ls -l "$OUT"
}

case ${1:-} in
look)
    take_in
    rm -f "$work/smoke.jsonl" "$work/options" "$work/graphs"
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2> /dev/null
    "$python" -m tailscope --version || echo "THE COMMAND LINE IS BROKEN: mend that before anything else"
    # Two processes: an error that sticks to one does not spoil the other. Compiling stops all other trainings meanwhile,
    # which within a quarter of an hour costs more than it brings.
    smoke plain 2>&1 | tee "$work/plain.log"
    [ "${COMPILED:-no}" = no ] || SMOKE_LIMIT=150 detached compiled bash "$bin/run.sh" compiled
    smoke choose
    ;;
compiled) smoke compiled ;;
attempts) attempts ;;
bundle) reproduce ${OPTIONS:-} --time-limit 1s ;;
begin)
    take_in
    begin
    sleep "${LOOK:-12}"
    status
    ;;
more)
    take_in
    [ -f "$work/attempt.log" ] && status
    true
    ;;
finish)
    take_in
    finish "${2:?run.sh finish SECONDS}"
    ;;
*)
    sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
    exit 2
    ;;
esac
