#!/bin/sh
# A prompt to a video with sound, with curl alone: client.sh PROMPT OUTPUT [more fields, as -F name=value]
# A first frame is one of them: -F input_reference=@first_frame.png. SERVER is the address.
# API_KEY is the key of a server that has some.
set -eu
prompt=${1:?"usage: client.sh PROMPT OUTPUT [-F name=value ...]"}
output=${2:?"usage: client.sh PROMPT OUTPUT [-F name=value ...]"}
shift 2
# --form-string: curl takes a text that begins with < for the name of a file.
# --fail-with-body: a refused request ends with an error, and its reason is printed.
curl --silent --show-error --fail-with-body "${SERVER:-http://127.0.0.1:8000}/v1/videos/sync" --output "$output" \
    ${API_KEY:+--header "Authorization: Bearer $API_KEY"} \
    --form-string "prompt=$prompt" "$@" || { test -f "$output" && cat "$output" >&2 && rm "$output"; exit 1; }
