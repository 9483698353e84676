#!/usr/bin/env bash
# A Ray head with dashboard and token on this machine, to submit jobs to.
#
#   source cluster/local.sh start   start it and point this shell at it
#   cluster/local.sh start          start it; what follows are more options of `ray start`, as --num-gpus=1
#   cluster/local.sh env            print what a shell has to set: eval "$(cluster/local.sh env)"
#   cluster/local.sh stop           end this head and what runs on it, and nothing else
#
# Settings (environment): RAYLUX_LOCAL, its folder with token, log and process number (default: ~/.raylux-local);
# RAYLUX_LOCAL_PORT of the dashboard (8265); RAYLUX_LOCAL_GCS_PORT (6379); RAYLUX_LOCAL_CPUS (all).
# `ray` and `python` are those of the shell: activate the environment that holds raylux first.

if [ "${BASH_SOURCE[0]}" != "$0" ]; then # sourced: all is done by a shell of its own, this one gets the variables
    bash "${BASH_SOURCE[0]}" "$@" && if [ "${1:-}" = start ]; then eval "$(bash "${BASH_SOURCE[0]}" env)"; fi
    return
fi

set -euo pipefail
folder=${RAYLUX_LOCAL:-$HOME/.raylux-local}
port=${RAYLUX_LOCAL_PORT:-8265}
gcs=${RAYLUX_LOCAL_GCS_PORT:-6379}

running() {
    [ -s "$folder/pid" ] && ray_head "$(cat "$folder/pid")"
}

# Is process $1 the head that was started here, and not a later process of the same number?
ray_head() {
    cat "/proc/$1/cmdline" 2>/dev/null | tr '\0' ' ' | grep -q -- "--dashboard-port=$port "
}

# Does the dashboard answer, and tell of a node that jobs can run on? It answers some seconds before there is one.
answers() {
    python - "$port" "$folder/token" <<'PYTHON' 2>/dev/null
import json, sys, urllib.request
port, token = sys.argv[1], open(sys.argv[2]).read().strip()
url = f"http://127.0.0.1:{port}/api/v0/nodes"
request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
nodes = json.load(urllib.request.urlopen(request, timeout=5))["data"]["result"]["result"]
sys.exit(not any(node["state"] == "ALIVE" for node in nodes))
PYTHON
}

start() {
    command -v ray >/dev/null || { echo "no ray here: activate the environment that holds raylux" >&2; exit 2; }
    if running; then
        echo "already running: http://127.0.0.1:$port, token in $folder/token" >&2
        return
    fi
    mkdir -p "$folder"
    chmod 700 "$folder"
    if [ ! -s "$folder/token" ]; then
        (umask 077 && python -c 'import secrets; print(secrets.token_hex(32), end="")' >"$folder/token")
    fi
    # Jobs inherit this from the head: the token is in no job's settings, which the dashboard shows.
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH="$folder/token" RAY_USAGE_STATS_ENABLED=0
    unset RAY_ADDRESS RAY_API_SERVER_ADDRESS RAY_AUTH_TOKEN
    # Ports of workers are taken as they are free: another cluster on this machine may have Ray's usual ones.
    setsid nohup ray start --head --block --disable-usage-stats --node-ip-address=127.0.0.1 \
        --port="$gcs" --ray-client-server-port=$((gcs + 1)) \
        --dashboard-host=127.0.0.1 --dashboard-port="$port" --dashboard-agent-listen-port=0 \
        --min-worker-port=0 --max-worker-port=0 \
        ${RAYLUX_LOCAL_CPUS:+--num-cpus=$RAYLUX_LOCAL_CPUS} \
        --log-color=false "$@" </dev/null >"$folder/log" 2>&1 &
    echo $! >"$folder/pid"
    for _ in $(seq 120); do
        if answers; then
            echo "a Ray head answers at http://127.0.0.1:$port, token in $folder/token" >&2
            return
        fi
        running || break
        sleep 1
    done
    echo "the head did not start; the end of $folder/log:" >&2
    tail -5 "$folder/log" >&2
    stop
    exit 1
}

stop() {
    if ! running; then
        echo "not running" >&2
        return
    fi
    head=$(cat "$folder/pid")
    # Ray's own processes and the jobs: children of the head, and theirs.
    all=$(tree "$head")
    kill -TERM "$head" 2>/dev/null || true
    gone "$all" 15 || {
        # Nodes that an autoscaler started hear nothing of the head's end.
        # shellcheck disable=SC2086  # a list of numbers
        kill -KILL $all 2>/dev/null || true
        gone "$all" 15 || { echo "some of its processes do not end: ${all//$'\n'/ }" >&2; exit 1; }
    }
    rm -f "$folder/pid"
    echo "stopped" >&2
}

tree() {
    echo "$1"
    for child in $(cat /proc/"$1"/task/*/children 2>/dev/null); do tree "$child"; done
}

# Wait until no process of list $1 runs, at most $2 seconds. One that ended and that nobody has asked after is gone.
gone() {
    local until=$((SECONDS + $2)) process left
    while :; do
        left=
        for process in $1; do
            grep -qs '^State:[[:space:]]*[^ZX]' "/proc/$process/status" && left=$process
        done
        [ -n "$left" ] || return 0
        [ $SECONDS -lt "$until" ] || return 1
        sleep 0.5
    done
}

variables() {
    printf 'export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=%q RAY_API_SERVER_ADDRESS=%q RAY_USAGE_STATS_ENABLED=0\n' \
        "$folder/token" "http://127.0.0.1:$port"
}

case ${1:-} in
start) start "${@:2}" ;;
stop) stop ;;
env) variables ;;
*)
    echo "usage: [source] cluster/local.sh start | stop | env" >&2
    exit 2
    ;;
esac
