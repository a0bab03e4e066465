#!/bin/sh
# A prompt to audio: run_curl_text_to_audio.sh [PROMPT [OUTPUT [FIELDS]]], FIELDS as in '"audio_length": 2, "seed": 3'
# BASE_URL is the address, API_KEY the key of a server that has some.
set -eu
prompt=$(printf %s "${1:-"rain falls on a tin roof"}" | sed 's/[\\"]/\\&/g')
output=${2:-text_to_audio.wav}
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT
# --fail-with-body: the body of an error has the server's message
curl --silent --show-error --fail-with-body ${API_KEY:+--header "Authorization: Bearer $API_KEY"} \
    --header "Content-Type: application/json" --data "{\"input\": \"$prompt\"${3:+, $3}}" --output "$answer" \
    "${BASE_URL:-http://127.0.0.1:8000}/v1/audio/generate" || { cat "$answer" >&2; echo >&2; exit 1; }
cat "$answer" >"$output"
echo "$output"
