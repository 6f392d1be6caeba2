#!/usr/bin/env bash
# A Ray node on a spot machine: `ray start --block` with the arguments given, and a look at the machine's metadata
# every five seconds. EC2 announces there, two minutes ahead, that it takes the machine back. SIGTERM makes Ray drain
# the node, and raymuon moves on without it at the next step.
set -euo pipefail
metadata=${METADATA_URL:-http://169.254.169.254}/latest

noticed() {
    local token
    token=$(curl --silent --fail --max-time 2 --request PUT "$metadata/api/token" \
        --header 'X-aws-ec2-metadata-token-ttl-seconds: 60') || return 1
    curl --silent --fail --max-time 2 --output /dev/null --header "X-aws-ec2-metadata-token: $token" \
        "$metadata/meta-data/spot/instance-action" # 404 while nothing is announced
}

# Ten seconds less than the notice: what it takes to see it, and to end.
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=${RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S:-100}
ray start --block "$@" &
ray=$!
trap 'kill -TERM "$ray"' TERM INT

while kill -0 "$ray" 2>/dev/null; do
    if noticed; then
        echo "$(date --iso-8601=seconds): this machine is taken back; draining"
        kill -TERM "$ray"
        break
    fi
    sleep 5 &
    wait $! || true
done
wait "$ray"
