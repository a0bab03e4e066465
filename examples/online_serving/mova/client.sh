#!/bin/sh
# A first frame and a prompt to a video with audio, with curl alone: client.sh IMAGE PROMPT OUTPUT [-F name=value ...]
# SERVER is the address. API_KEY is the key of a server that has some.
set -eu
usage="usage: client.sh IMAGE PROMPT OUTPUT [-F name=value ...]"
image=${1:?"$usage"}
prompt=${2:?"$usage"}
output=${3:?"$usage"}
shift 3
# --form-string: curl takes a text that begins with < for the name of a file.
# --fail-with-body: a refused request ends with an error, and its reason is printed.
curl --silent --show-error --fail-with-body "${SERVER:-http://127.0.0.1:8000}/v1/videos/sync" --output "$output" \
    ${API_KEY:+--header "Authorization: Bearer $API_KEY"} \
    --form-string "prompt=$prompt" --form "input_reference=@$image" "$@" ||
    { test -f "$output" && cat "$output" >&2 && rm "$output"; exit 1; }
