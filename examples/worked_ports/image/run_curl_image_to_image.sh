#!/bin/sh
# An image and a prompt to an image: run_curl_image_to_image.sh IMAGE [PROMPT [OUTPUT [-F name=value ...]]]
# BASE_URL is the address, API_KEY the key of a server that has some.
set -eu
image=${1:?"usage: run_curl_image_to_image.sh IMAGE [PROMPT [OUTPUT [-F name=value ...]]]"}
prompt=${2:-"a cat on a wet street at night"}
output=${3:-image_to_image.png}
shift $(($# < 3 ? $# : 3))
answer=$(mktemp)
trap 'rm -f "$answer"' EXIT
# --fail-with-body: the body of an error has the server's message
curl --silent --show-error --fail-with-body ${API_KEY:+--header "Authorization: Bearer $API_KEY"} \
    --form-string "prompt=$prompt" -F "image=@$image" "$@" --output "$answer" \
    "${BASE_URL:-http://127.0.0.1:8000}/v1/images/edits" || { cat "$answer" >&2; echo >&2; exit 1; }
sed -n 's/.*"b64_json": *"\([^"]*\)".*/\1/p' "$answer" | base64 -d >"$output"
echo "$output"
